"""Training steps at full size on a graphics card: InstructBLIP-7B's and LLaVA-7B's shapes with random weights in bfloat16.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json     # on a card with 40 GB or more
    python benchmarks/gpu.py --tiny                                 # the same at a tiny scale on the processor: does it run?

Ours with and without remembered clean tokens, the released algorithm and the bare arithmetic take
turns in one process on one model. For each: seconds, images per second, peak memory over the
weights, share of the card's matrix rate (measured just before, same dtype), and how often the
processor waited for the card. The weights are drawn on the card. torch.compile of the model is
tried last; if it fails, the reason is recorded.
"""

import argparse
import gc
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from tvp._files import write_atomic

sys.path.insert(0, str(Path(__file__).resolve().parent / "speed"))

from models import count_flops
from run import machine_info
from timing import (
    BenchmarkSetup,
    lower_bound_step,
    make_setup,
    paired_ratio,
    quartiles,
    step_variants,
    time_interleaved,
    time_ranking,
)

READS = (
    "aten::_local_scalar_dense",
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
)


@dataclass(frozen=True)
class Run:
    "Where, how large, how often."

    device: str
    dtype: torch.dtype
    shapes: tuple[str, ...]
    side: int  # of the square matrices whose product measures the card
    rounds: int
    candidates: int

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


CARD = Run("cuda", torch.bfloat16, ("instructblip-7b", "llava-7b"), 8192, 5, 100)
TINY = Run("cpu", torch.float32, ("mini-instructblip", "mini-llava"), 1024, 2, 10)


def matrix_rate(run: Run) -> float:
    "Floating-point operations per second of a large matrix product: the median of twenty."
    a, b = (torch.randn(run.side, run.side, device=run.device, dtype=run.dtype) for _ in range(2))
    times = time_interleaved({"product": lambda: a @ b}, 20, warmup=5, wait=run.wait)["product"]
    return 2 * run.side**3 / quartiles(times)["median"]


def peak_memory(run: Run, step) -> float | None:  # None: not on a card
    "Gigabytes during a step over those before it."
    if run.device != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def host_waits(run: Run, step) -> dict[str, int]:
    "How often a step reads a number back or waits for the card."
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (run.device == "cuda")
    with profile(activities=kinds) as seen:
        step()
    return {event.key: event.count for event in seen.key_averages() if event.key in READS}


def measure(run: Run, name: str, rate: float) -> dict:
    "All contestants on one shape."
    scene = make_setup(name, run.device, run.dtype)
    contestants = step_variants(scene)
    for _ in range(2):
        contestants["cached"]()  # an epoch: all clean tokens are known
    rows = {}
    for kind, step in contestants.items():
        step()
        rows[kind] = {
            "flops": count_flops(step),
            "peak_gigabytes": peak_memory(run, step),
            "waits": host_waits(run, step),
        }
    times = time_interleaved(contestants, run.rounds, warmup=1, wait=run.wait)
    for kind, row in rows.items():
        row["seconds"] = quartiles(times[kind])
        row |= {
            "pictures_per_second": scene.batch / row["seconds"]["median"],
            "share_of_matrix_rate": row["flops"] / row["seconds"]["median"] / rate,
        }
    ratios = {
        f"{kind}_vs_{other}": paired_ratio(times, kind, other)
        for kind in ("cached", "uncached")
        for other in ("reference", "floor")
    }
    ranking = time_ranking(scene, run.candidates, scene.batch, 3, run.wait)
    return {
        "model": name,
        "parameters": scene.source.model.num_parameters(),
        "batch": scene.batch,
        "steps": rows,
        "ratios": ratios,
        "ranking": ranking,
        "compiled": compiled(run, scene),
    }


def compiled(run: Run, scene: BenchmarkSetup) -> dict:
    "The floor through torch.compile beside the plain one."
    plain = lower_bound_step(scene)
    model = scene.source.model
    original = model.forward
    try:
        start = time.perf_counter()
        fast_forward = torch.compile(original, dynamic=False)

        def fast():
            model.forward = fast_forward
            try:
                return plain()
            finally:
                model.forward = original

        for _ in range(2):
            fast()
        run.wait()
        seconds = time.perf_counter() - start
        times = time_interleaved({"compiled": fast, "plain": plain}, run.rounds, wait=run.wait)
        return {
            "compiling_seconds": seconds,
            "compiled_vs_plain": paired_ratio(times, "compiled", "plain"),
        }
    # a result, too
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def table(results: dict) -> str:
    "What was measured, for people."
    lines = [
        f"{results['machine']['card'] or results['machine']['cpu']}: "
        f"{results['matrix_rate'] / 1e12:.1f} TFLOP/s in matrix products ({results['dtype']})"
    ]
    for model in results["models"]:
        for kind, row in model["steps"].items():
            memory = "" if row["peak_gigabytes"] is None else f"{row['peak_gigabytes']:7.1f} GB"
            lines.append(
                f"{model['model']:18} {kind:10} {row['pictures_per_second']:8.1f} images/s "
                f"{memory} {row['share_of_matrix_rate']:6.1%} of the matrix rate, "
                f"{sum(row['waits'].values())} waits"
            )
        lines.append(
            f"{model['model']:18} "
            + "  ".join(f"{name} {value['median']:.2f}" for name, value in model["ratios"].items())
        )
        ranking = model["ranking"]
        lines.append(
            f"{model['model']:18} ranking {ranking['candidates']} candidates: "
            f"{ranking['ratio']['median']:.2f} of the reference's time"
        )
        lines.append(f"{model['model']:18} torch.compile: {model['compiled']}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tiny", action="store_true", help="tiny shapes on the processor, in float32"
    )
    parser.add_argument("--json", metavar="FILE", help="where to write everything")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        print(
            "There is no graphics card here (torch.cuda.is_available() is False). --tiny runs "
            "the same on the processor, at a tiny scale.",
            file=sys.stderr,
        )
        return 2
    run = TINY if args.tiny else CARD
    results = machine_info() | {
        "dtype": str(run.dtype).removeprefix("torch."),
        "matrix_rate": matrix_rate(run),
        "models": [],
    }
    for name in run.shapes:
        results["models"].append(measure(run, name, results["matrix_rate"]))
        gc.collect()
        if run.device == "cuda":
            torch.cuda.empty_cache()
    print(table(results))
    if args.json:
        write_atomic(args.json, json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
