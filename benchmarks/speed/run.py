"""All benchmarks in one go.

Steps, rankings, shared images, loading and memory, as a table of ratios and a file of everything
that was measured.

    python benchmarks/speed/run.py                           # a quarter of an hour
    python benchmarks/speed/run.py --quick --json FILE       # some minutes; all figures go to FILE
    python benchmarks/speed/run.py --only step,memory        # some sections
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tvp._files import write_atomic
from tvp._validation import check_choice

from timing import (
    lower_bound_step,
    make_setup,
    paired_ratio,
    quartiles,
    step_variants,
    synthetic_photo_task,
    time_interleaved,
    time_loading,
    time_ranking,
    time_repeated_images,
    time_steps,
)

HERE = Path(__file__).resolve().parent


# --- What is measured ----------------------------------------------------------------------------
#
# A plan lists the models and how often each contestant runs. The quick one takes a few minutes,
# the full one a quarter of an hour.


@dataclass(frozen=True)
class BenchmarkPlan:
    "Which models, and how often."

    steps: Sequence[tuple[str, int]]  # model, rounds
    rankings: Sequence[tuple[str, int, int, int]]  # model, candidates, images, rounds
    photos: int  # to load
    memory: Sequence[str]  # models
    variants: Sequence[tuple[str, int]] = ()  # model, rounds: other kernels
    # model, images, questions about each, rounds
    shared: Sequence[tuple[str, int, int, int]] = ()


ZOO = (
    "tiny-vpgtrans",
    "tiny-blip2-opt",
    "tiny-blip2-t5",
    "tiny-instructblip",
    "tiny-llava-siglip",
)
QUICK = BenchmarkPlan(
    steps=[("paper", 7), ("llava", 5), ("tiny-minigpt4", 15), ("tiny-llava", 15)],
    rankings=[
        ("tiny-minigpt4", 10, 50, 5),
        ("tiny-minigpt4", 100, 50, 5),
        ("tiny-minigpt4", 1000, 50, 2),
        ("tiny-llava", 100, 50, 5),
        ("llava-58m", 10, 2, 2),
        ("llava-58m", 100, 2, 3),
    ],
    photos=16,
    memory=["paper-32k"],
    shared=[("tiny-instructblip", 16, 6, 5), ("tiny-llava", 16, 6, 5)],
)
FULL = BenchmarkPlan(
    steps=[
        ("paper", 15),
        ("paper-32k", 9),
        ("llava", 9),
        ("llava-32k", 5),
        *((name, 25) for name in ("tiny-minigpt4", "tiny-llava", *ZOO)),
    ],
    rankings=[
        *(
            (name, n, 100, rounds)
            for name in ("tiny-minigpt4", "tiny-llava")
            for n, rounds in ((10, 7), (100, 7), (1000, 3))
        ),
        ("llava-58m", 10, 4, 3),
        ("llava-58m", 100, 4, 5),
        ("llava-58m", 1000, 1, 1),
    ],
    photos=64,
    memory=["paper-32k", "paper", "llava-32k"],
    variants=[("paper", 5)],
    shared=[
        *((name, 16, 6, 9) for name in ("tiny-instructblip", "tiny-minigpt4", "tiny-llava")),
        ("paper", 8, 6, 3),
        ("llava-58m", 2, 6, 3),
    ],
)


# --- Memory --------------------------------------------------------------------------------------
#
# A process never shrinks reliably, so each way of making a step runs in a process of its own.
# There two steps are made, which load whatever is loaded lazily and fill the cache of clean
# tokens. Then everything unused is handed back to the system, the mark of the highest memory is
# reset, and a third step is made. What it needs on top of the state before it is the figure:
# activations and logits, not weights. Small pieces of memory that the allocator keeps for later
# would hide some of it; the environment asks it not to keep any. Where the mark cannot be reset
# (not Linux), it is the process's highest ever (`ru_maxrss`) over the state before the step.


def resident_memory(
    what: str = "VmRSS",  # VmRSS, now; VmHWM, the highest since it was reset
) -> int:  # bytes
    "Memory of this process."
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what + ":"))


def memory_growth(
    model: str,  # as in `make_setup`
    contestant: str,  # cached, uncached, reference or floor
) -> int:  # bytes
    "Highest memory during a step over the memory before it; meaningful in a process of its own."
    step = step_variants(make_setup(model))
    check_choice("contestant", contestant, step)
    run = step[contestant]
    del step
    for _ in range(2):
        run()
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    before = resident_memory()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    run()
    return resident_memory("VmHWM") - before


def measure_memory(
    model: str,  # as in `make_setup`
    contestants: Sequence[str] = ("cached", "uncached", "reference", "floor"),  # who is measured
) -> dict:  # for the results: megabytes and ratios
    "The memory's row of the table, one process for each contestant."
    grown = {}
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
    }
    for contestant in contestants:
        code = f"from run import memory_growth; print(memory_growth({model!r}, {contestant!r}))"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment
        )
        if done.returncode:
            raise RuntimeError(
                f"measuring the memory of {model} ({contestant}) failed: {done.stderr[-500:]}"
            )
        grown[contestant] = int(done.stdout.split()[-1])
    against = {
        f"{name}_vs_reference": value / grown["reference"]
        for name, value in grown.items()
        if "reference" in grown and name != "reference"
    }
    return {
        "model": model,
        "megabytes": {name: value / 1e6 for name, value in grown.items()},
        "ratios": against,
    }


# --- Other kernels -------------------------------------------------------------------------------
#
# Would the same arithmetic be faster in another form? The floor is run again with pixels whose
# channels come last, under autocast to bfloat16, and compiled. What these gain for the floor is
# what they could gain for a step. They are measured, not adopted: half precision changes the
# gradient's last digits, and compiling takes longer than a short training.


def autocast(run):  # a function
    "The function under autocast to bfloat16."

    def fast():
        with torch.autocast("cpu", torch.bfloat16):
            return run()

    return fast


def time_variants(
    name: str,  # as in `make_setup`
    rounds: int,  # measured
    compiled: bool = True,  # with torch.compile, which takes a minute or two?
) -> dict:  # for the results: seconds, and ratios to the plain floor
    "The floor with other kernels."
    last = make_setup(name)
    failed = {}
    last.source.model.to(memory_format=torch.channels_last)
    plain = lower_bound_step(make_setup(name))
    contestants = {
        "plain": plain,
        "channels_last": lower_bound_step(last),
        "bfloat16": autocast(plain),
    }
    try:
        if compiled:
            contestants["compiled"] = compiled_lower_bound(name)
    # no C++ compiler, say: a result, too
    except Exception as error:
        failed["compiled"] = f"{type(error).__name__}: {str(error)[:200]}"
    times = time_interleaved(contestants, rounds)
    return {
        "model": name,
        "seconds": {n: quartiles(t) for n, t in times.items()},
        "ratios": {n: paired_ratio(times, n, "plain") for n in times if n != "plain"},
        "failed": failed,
    }


def compiled_lower_bound(
    # a function without arguments
    name: str,  # as in `make_setup`
):
    "The floor through torch.compile, run twice: compiled, and proven to run."
    scene = make_setup(name)
    scene.source.model.forward = torch.compile(scene.source.model.forward, dynamic=False)
    run = lower_bound_step(scene)
    for _ in range(2):
        run()
    return run


# --- The run -------------------------------------------------------------------------------------
#
# Five figures come first in the results. The bound beside each is what this package promises.


SECTIONS = ("step", "ranking", "shared", "loading", "memory", "variants")
TARGET_RATIOS = {  # headline -> at most
    "step_vs_reference": 0.62,
    "step_vs_reference_no_cache": 0.75,
    "step_vs_floor": 1.25,
    "rank100_vs_reference": 0.5,
    "memory_vs_reference": 0.6,
}


def machine_info() -> dict:  # names and values
    "On what, and with what, it was measured."
    import transformers

    from tvp import __version__

    cpu = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        cpu = next(
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tvp": __version__,
    }
    return {
        "machine": {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": versions,
        "commit": source_commit(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def source_commit() -> str | None:  # None: not a checkout, or no git
    "Which state of the code this is; + for one with changes."
    import tvp

    def git(*args):
        return subprocess.run(
            ["git", "-C", str(Path(tvp.__file__).parent), *args], capture_output=True, text=True
        )

    try:
        commit, changes = (
            git("rev-parse", "--short=12", "HEAD"),
            git("status", "--porcelain", "--", "."),
        )
    except OSError:
        return None
    return (
        commit.stdout.strip() + ("+" if changes.stdout.strip() else "")
        if commit.returncode == 0
        else None
    )


def headline_ratios(
    results: dict,  # of the sections that ran
) -> dict[str, float]:  # ratios, by name
    "The five figures, as far as they were measured."
    steps = {
        row["model"]: {name: value["median"] for name, value in row["ratios"].items()}
        for row in results.get("step", [])
    }
    first = steps.get("paper", {})
    named = {
        "step_vs_reference": "cached_vs_reference",
        "step_vs_reference_no_cache": "uncached_vs_reference",
        "step_vs_floor": "cached_vs_floor",
    }
    out = {name: first[key] for name, key in named.items() if key in first}
    hundred = [
        row["ratio"]["median"] for row in results.get("ranking", []) if row["candidates"] == 100
    ]
    if hundred:
        out["rank100_vs_reference"] = max(hundred)  # of the slowest model
    memory = [row["ratios"]["cached_vs_reference"] for row in results.get("memory", [])]
    return out | ({"memory_vs_reference": memory[0]} if memory else {})


def loading_rows(
    plan: BenchmarkPlan,
    steps: list[dict],  # the rows of the steps
) -> list[dict]:  # one row for each model
    "Photographs, and the part of a step of the paper's proportions that loading them takes."
    from tvp.tasks.loading import load_task

    row = time_loading(synthetic_photo_task(plan.photos), 164, 8, 3)
    small = time_loading(load_task("shapes"), 36, 16, 2)
    paper = next((r for r in steps if r["model"] == "paper"), None)
    if paper:
        row["share_of_a_step"] = (
            paper["batch"]
            / row["images_per_second"]["first"]["median"]
            / paper["seconds"]["cached"]["median"]
        )
    return [row, small]


def on_model(
    measure: Callable,  # takes a BenchmarkSetup first
) -> Callable:  # takes a model's name first
    "Let a measurement build its models."

    def measured(name, *how):
        return measure(make_setup(name), *how)

    return measured


def run_bench(
    quick: bool = True,  # a few minutes; else a quarter of an hour
    only: Sequence[str] | None = None,  # some of SECTIONS; None: all
    plan: BenchmarkPlan | None = None,  # None: QUICK or FULL
) -> dict:  # headlines, facts about the machine, and a list of rows for each section
    "Run the benchmarks; progress goes to standard error."
    for name in only or ():
        check_choice("only", name, SECTIONS)
    plan = plan or (QUICK if quick else FULL)
    wanted = only or SECTIONS
    start = time.time()
    results = {}

    def section(name, run, jobs):
        rows = results[name] = []
        for job in jobs:
            print(
                f"{time.time() - start:5.0f} s  {name} {' '.join(map(str, job))}",
                file=sys.stderr,
                flush=True,
            )
            rows.append(run(*job))

    if "step" in wanted:
        section("step", on_model(time_steps), plan.steps)
    if "ranking" in wanted:
        section("ranking", on_model(time_ranking), plan.rankings)
    if "shared" in wanted:
        section("shared", on_model(time_repeated_images), plan.shared)
    if "loading" in wanted:
        results["loading"] = loading_rows(plan, results.get("step", []))
    if "memory" in wanted:
        section("memory", measure_memory, [(name,) for name in plan.memory])
    if "variants" in wanted:
        section("variants", time_variants, plan.variants)
    return (
        headline_ratios(results)
        | machine_info()
        | {"plan": asdict(plan), "seconds": time.time() - start}
        | results
    )


# The table shows medians, with the middle half of the runs behind them. With the smallest models
# fixed costs are nearly all there is, so the headlines about steps are left to the model of the
# paper's proportions.


def figure(value: dict) -> str:
    return f"{value['median']:.2f} ({value['low']:.2f}..{value['high']:.2f})"


def shared_line(row: dict) -> str:
    counted = row["gflops"]["shared"] / row["gflops"]["different"]
    return (
        f"shared   {row['model']:18} {row['seconds']['shared']['median'] * 1000:8.1f} ms  "
        f"{row['questions']} questions about each of {row['images']} "
        f"images: vs different images {figure(row['ratio'])}, in FLOPs {counted:.2f}, "
        f"scores differ by {row['largest_difference']:.0e}"
    )


def format_results(
    results: dict,  # of `run_bench`
) -> str:
    "The table that is printed."
    lines = [
        f"{facts['cpu']}, {results['threads']} threads, torch {results['versions']['torch']}, "
        f"tvp {results['versions']['tvp']} ({results['commit']})"
        for facts in [results["machine"]]
    ]
    for name, bound in TARGET_RATIOS.items():
        if name in results:
            lines.append(
                f"{name:28} {results[name]:.2f}   at most {bound:.2f}: "
                f"{'met' if results[name] <= bound else 'MISSED'}"
            )
    for row in results.get("step", []):
        ours = row["seconds"]["cached"]["median"]
        lines.append(
            f"step     {row['model']:18} {ours * 1000:8.1f} ms  "
            + "  ".join(f"{name} {figure(value)}" for name, value in row["ratios"].items())
        )
    for row in results.get("ranking", []):
        lines.append(
            f"ranking  {row['model']:18} {row['seconds']['ours']['median'] * 1000:8.1f} ms  "
            f"{row['candidates']:4} candidates, {row['tokens']:4} tokens, "
            f"{row['images']} images: vs reference {figure(row['ratio'])}, scores up to "
            f"{row['largest_score']:.0f} differ by {row['largest_difference']:.0e}"
        )
    lines += [shared_line(row) for row in results.get("shared", [])]
    for row in results.get("loading", []):
        rate = row["images_per_second"]
        share = row.get("share_of_a_step")
        lines.append(
            f"loading  {row['task']:18} {rate['first']['median']:8.0f} images/s, again "
            f"{rate['again']['median']:.0f}" + (f", {share:.1%} of a step" if share else "")
        )
    for row in results.get("memory", []):
        lines.append(
            f"memory   {row['model']:18} "
            + "  ".join(f"{name} {value:.0f} MB" for name, value in row["megabytes"].items())
        )
    for row in results.get("variants", []):
        lines.append(
            f"floor    {row['model']:18} "
            + "  ".join(f"{name} {figure(value)}" for name, value in row["ratios"].items())
            + "".join(f"  {n}: {e}" for n, e in row["failed"].items())
        )
    return "\n".join(lines)


def bench(
    quick: bool = True,  # some minutes; else a quarter of an hour
    file: str | Path | None = None,  # where to write everything, as JSON
    only: Sequence[str] | None = None,  # some of SECTIONS
) -> dict:  # what the file holds
    "Run, print, write."
    results = run_bench(quick, only)
    print(format_results(results))
    if file is not None:
        print(
            "Everything that was measured: "
            f"{write_atomic(file, json.dumps(results, indent=1) + chr(10))}"
        )
    return results


def main(argv: Sequence[str] | None = None) -> None:
    "Read the command line, and see whether the results can be written before anything is measured."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer models and rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all results")
    parser.add_argument(
        "--only",
        type=lambda names: names.split(","),
        metavar="NAMES",
        help=f"some of {','.join(SECTIONS)}; all if not given",
    )
    args = parser.parse_args(argv)
    for name in args.only or ():
        if name not in SECTIONS:
            parser.error(f"--only: there is no section {name!r}. There are: {', '.join(SECTIONS)}.")
    if args.json is not None:
        if args.json.is_dir():
            parser.error(f"--json: {args.json} is a folder. Name a file.")
        try:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=args.json.parent):
                pass
        except OSError as error:
            parser.error(f"--json: cannot write to {args.json.parent}: {error.strerror}.")
    bench(args.quick, args.json, args.only)


if __name__ == "__main__":
    main()
