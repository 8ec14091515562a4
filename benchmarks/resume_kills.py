"""Is a training that is killed again and again the same as one that never was? The figures behind nbs/api/52_resume.ipynb.

    python benchmarks/resume_kills.py                # 20 kills at random moments and 10 in the middle of writing, for each training
    python benchmarks/resume_kills.py --kills 5      # fewer

A child process trains a prompt on the small zoo and writes a checkpoint after every update, until
SIGKILL; the next child goes on. After each kill every checkpoint is read; after each training the
prompt, the history and the provenance are compared, bit for bit, with those of a training that was
left alone. Needs a system with fork. The result goes to benchmarks/results/resume_kills.json.
"""

import argparse
import json
import os
import platform
import random
import signal
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

os.environ["TQDM_DISABLE"] = "1"  # before tqdm is imported

import torch

from tvp._checkpoint import read_checkpoint
from tvp.training.learner import Learner
from tvp.training.losses import TaskLoss
from tvp.prompts.visual_prompt import VisualPrompt
from tvp.training.recipes import make_learner
from tvp.tasks.task import Task
from tvp.tasks.loading import load_task
from tvp.training.optimizers import cosine_schedule_with_warmup
from tvp.models.zoo import load_zoo

RESULT = Path(__file__).parent / "results" / "resume_kills.json"
STAGES = ("half written", "before the rename", "after the rename")


def small_task(rows: int) -> Task:
    "The first images of a task that ships with the package."
    task = load_task("shapes")
    return Task(
        task.name,
        task.train.select(range(rows)),
        task.valid,
        task.test,
        task.candidates,
        fit=task.fit,
        flip=task.flip,
    )


def tvp_learner(zoo, task: Task, epochs: int) -> Learner:
    "TVP: a border, the normalized gradient, remembered clean tokens, CLIP."
    return make_learner("TVP", zoo, "tiny-minigpt4", task, epochs=epochs)


def patch_learner(zoo, task: Task, epochs: int) -> Learner:
    "A patch at random places, Adam, warm-up, random crops and flips."
    prompt = VisualPrompt(zoo.size, 12, "random-patch")
    adam = torch.optim.Adam(prompt.parameters(), lr=0.05)
    return Learner(
        prompt,
        zoo["tiny-llava"],
        task,
        [TaskLoss()],
        adam,
        cosine_schedule_with_warmup(5),
        augment=True,
        epochs=epochs,
    )


def die(*_) -> None:
    "SIGKILL for this very process."
    os.kill(os.getpid(), signal.SIGKILL)


def deadly_write(stage: str, number: int):
    "A patch that kills this process at a stage of its so manieth write."
    calls = []
    fsync = os.fsync
    replace = os.replace

    def fsync_or_die(file):
        calls.append(file)
        if stage == "half written" and len(calls) == number:
            os.ftruncate(file, random.randrange(os.fstat(file).st_size))
            die()
        fsync(file)

    def replace_or_die(*paths):
        if stage == "before the rename" and len(calls) == number:
            die()
        replace(*paths)
        if stage == "after the rename" and len(calls) == number:
            die()

    return patch.multiple(os, fsync=fsync_or_die, replace=replace_or_die)


def child(
    learner: Learner, folder: Path, seconds: float | None, stage: str | None, number: int
) -> bool:
    """A process that trains until it is killed (after so many seconds, or at a stage of its so
    manieth write); was it?"""
    pid = os.fork()
    if not pid:
        try:
            with deadly_write(stage or "", number):
                learner.fit(checkpoint=folder, save_steps=1, resume=True)
        finally:
            os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def look(folder: Path, found: dict) -> int:
    "Read every checkpoint; the number of updates made."
    done = 0
    for file in folder.glob("[!.]*"):
        try:
            done = read_checkpoint(file)["position"]["done"]
        except Exception as error:
            found["unreadable"].append(f"{file.name}: {error}")
    found["while writing"] += any(folder.glob(".*.part"))
    return done


def kill_again_and_again(make, kills: int, work: Path, rng: random.Random) -> dict:
    """One training, killed `kills` times at random moments and `kills // 2` times in the middle of
    writing."""
    alone = make()
    start = time.monotonic()
    alone.fit()
    seconds = time.monotonic() - start
    steps = len(alone.records)
    found = {
        "updates": steps,
        "kills": 0,
        "while writing": 0,
        "unreadable": [],
        "trainings": 0,
        "different": 0,
        "updates before each kill": [],
    }
    plan = [("time", None)] * kills + [("stage", STAGES[i % 3]) for i in range(kills // 2)]
    rng.shuffle(plan)
    while plan or any(work.iterdir()):
        folder = work / "run"
        folder.mkdir(exist_ok=True)
        kind, stage = plan[0] if plan else ("none", None)
        moment = (
            rng.uniform(0, 4.5 * seconds / (kills + kills // 2)) + 0.01 if kind == "time" else None
        )
        if child(make(), folder, moment, stage, rng.randint(1, 3)):
            plan.pop(0)
            found["kills"] += 1
            found["updates before each kill"].append(look(folder, found))
            continue
        look(folder, found)  # it has come to its end
        learner = make()
        learner.fit(checkpoint=folder, resume=True)
        found["trainings"] += 1
        found["different"] += not (
            torch.equal(learner.prompt.delta, alone.prompt.delta)
            and learner.history.equals(alone.history)
            and learner.prompt.provenance == alone.prompt.provenance
        )
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    zoo = load_zoo("tiny")
    task = small_task(80)
    rng = random.Random(args.seed)
    results = {"torch": torch.__version__, "machine": platform.machine(), "seed": args.seed}
    for make in (tvp_learner, patch_learner):
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as work:
            found = kill_again_and_again(
                lambda: make(zoo, task, epochs=12), args.kills, Path(work), rng
            )
        results[make.__doc__.rstrip(".")] = found | {"seconds": round(time.monotonic() - start, 1)}
        print(json.dumps(found, indent=1), flush=True)
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
