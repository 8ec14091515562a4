"""Is a long command that is killed again and again the same as one that never was? The figures behind SECURITY.md's promise.

    python benchmarks/kill_commands.py               # 20 kills for each of demo, evaluate, reproduce, train
    python benchmarks/kill_commands.py --kills 5     # fewer
    python benchmarks/kill_commands.py --only train evaluate

A child process runs the command, small: two models of the small zoo, a slice of a task, recipes of
one epoch. SIGKILL ends it at a random moment, or in the middle of writing; the same command is
given again, until it is done. After each kill every file is read; when the command is done, its
files are compared, bit for bit, with those of a command that was left alone (the report but for
its times). Needs a system with fork. The result goes to benchmarks/results/kills.json.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import tempfile
import time
import tomllib
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

os.environ["TQDM_DISABLE"] = "1"  # before tqdm is imported

import pandas as pd
import torch
from PIL import Image
from resume_kills import STAGES, deadly_write

from tvp._checkpoint import read_checkpoint
from tvp.cli import main as tvp
from tvp._files import write_atomic
from tvp.prompts.visual_prompt import VisualPrompt
from tvp.training.recipes import RECIPES, Recipe
from tvp.experiments.reproduction import reproduce
from tvp.tasks.task import Split, Task
from tvp.tasks.loading import load_task
from tvp.models.zoo import load_zoo

RESULT = Path(__file__).parent / "results" / "kills.json"
MODELS = ("tiny-minigpt4", "tiny-llava")


class SmallZoo(dict):
    "Two models of the small zoo, and what a zoo says of itself."

    def __init__(self, zoo):
        super().__init__((name, zoo[name]) for name in MODELS)
        self.size = zoo.size
        self.width = zoo.width
        self.clip = zoo.clip
        self.tower = zoo.tower


def small_task(name: str, data_dir: str | None = None) -> Task:
    "The first images of a task that ships with the package."
    task = load_task(name)

    def first(split: Split, rows: int) -> Split:
        return Split(
            split.images[:rows],
            split.instructions[:rows],
            split.labels[:rows],
            split.semantics[:rows],
        )

    return replace(
        task, train=first(task.train, 32), valid=first(task.valid, 10), test=first(task.test, 20)
    )


def short(recipes: dict[str, Recipe]) -> dict[str, Recipe]:
    "Recipes of one epoch."
    return {name: replace(recipe, epochs=1) for name, recipe in recipes.items()}


def run_reproduce(zoo: SmallZoo, out: Path) -> int:
    "What `tvp reproduce` does once its models are loaded, at the canvas of the small zoo."
    reproduce(small_task("digits"), MODELS[0], ["EVP", "TVP"], zoo, out)
    return 0


def commands(zoo: SmallZoo) -> dict:
    "Name -> what is run, given the folder for its output."
    return {
        "train": lambda out: tvp(
            ["train", "--task", "digits", "--epochs", "2", "--out", str(out / "p.safetensors")]
        ),
        "evaluate": lambda out: tvp(
            [
                "evaluate",
                "digits-tvp",
                "--corruption",
                "fog",
                "brightness",
                "--out",
                str(out / "r.csv"),
            ]
        ),
        "reproduce": lambda out: run_reproduce(zoo, out),
        "demo": lambda out: tvp(["demo", "--task", "digits", "--out", str(out)]),
    }


def child(
    run, out: Path, log: Path, seconds: float | None = None, stage: str = "", number: int = 0
) -> int | None:
    """Run a command in a process of its own, killed after so many seconds or at a stage of its so
    manieth write: its exit code, None if killed."""
    pid = os.fork()
    if not pid:
        code = 99
        try:
            stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(stream, 1), os.dup2(stream, 2)
            with deadly_write(stage, number):
                code = run(out)
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def read(file: Path) -> None:
    "Read a file of any kind that a command writes."
    if file.suffix == ".csv":
        pd.read_csv(file)
    elif file.suffix == ".png":
        Image.open(file).load()
    elif file.suffix == ".toml":
        tomllib.loads(file.read_text())
    elif file.suffix == ".html":
        assert file.read_text().rstrip().endswith("</html>")
    elif file.name.startswith(("part-", "training-", "settings", "checkpoint")):
        read_checkpoint(file)
    else:
        VisualPrompt.load(file)


def look(out: Path, found: dict) -> None:
    "Read every file that a killed command has left."
    files = [file for file in out.rglob("*") if file.is_file()]
    for file in files:
        if file.name.startswith("."):
            continue
        try:
            read(file)
        except Exception as error:
            found["unreadable"].append(f"{file.name}: {type(error).__name__}: {error}")
    found["while writing"] += any(file.suffix == ".part" for file in files)


def contents(out: Path) -> dict:
    """What a command has made, without the report, which has times in it; of a prompt its pixels
    and its story: safetensors shuffles a header."""
    made = {}
    for file in out.rglob("*"):
        if file.is_dir() or file.suffix == ".html" or file.name.startswith("."):
            continue
        made[file.name] = file.read_bytes()
        if file.suffix == ".safetensors":
            prompt = VisualPrompt.load(file)
            made[file.name] = (
                {name: value.tolist() for name, value in prompt.state_dict().items()},
                prompt.provenance,
            )
    return made


def kill_again_and_again(run, kills: int, work: Path, rng: random.Random) -> dict:
    """One command, killed so many times: three in ten in the middle of writing, the others at
    random moments."""
    start = time.monotonic()
    (work / "alone").mkdir()
    if child(run, work / "alone", work / "log"):
        raise RuntimeError((work / "log").read_text())
    seconds = time.monotonic() - start
    alone = contents(work / "alone")
    found = {
        "seconds alone": round(seconds, 1),
        "files": sorted(alone),
        "kills": 0,
        "while writing": 0,
        "unreadable": [],
        "finished": 0,
        "different": [],
    }
    writes = kills * 3 // 10
    plan = [""] * (kills - writes) + [STAGES[i % len(STAGES)] for i in range(writes)]
    rng.shuffle(plan)
    out = work / "run"
    while plan or out.exists():
        out.mkdir(exist_ok=True)
        stage = plan[0] if plan else ""
        moment = rng.uniform(0, 0.6 * seconds) if plan and not stage else None
        code = child(run, out, work / "log", moment, stage, rng.randint(1, 6))
        if code is None:
            found["kills"] += 1
            plan.pop(0)
            look(out, found)
            continue
        made = contents(out)
        # else: killed when all was done
        if code and made != alone:
            raise RuntimeError(f"exit code {code}: {(work / 'log').read_text()}")
        found["finished"] += 1
        found["different"] += [
            name for name in {*made, *alone} if made.get(name) != alone.get(name)
        ]
        shutil.rmtree(out)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[])
    args = parser.parse_args()
    torch.set_num_threads(1)
    zoo = SmallZoo(load_zoo("tiny"))
    results = {"torch": torch.__version__, "machine": platform.machine(), "seed": args.seed}
    with ExitStack() as stage:
        stage.enter_context(patch("tvp.experiments.naming.load_zoo", lambda name: zoo))
        stage.enter_context(patch("tvp.experiments.naming.load_task", small_task))
        stage.enter_context(
            patch.dict(RECIPES, {kind: short(recipes) for kind, recipes in RECIPES.items()})
        )
        for name, run in commands(zoo).items():
            if args.only and name not in args.only:
                continue
            with tempfile.TemporaryDirectory() as work:
                results[name] = kill_again_and_again(
                    run, args.kills, Path(work), random.Random(f"{args.seed} {name}")
                )
            print(name, json.dumps(results[name], indent=1), flush=True)
            if not args.only:
                write_atomic(RESULT, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
