"""Make the prompts that ship with the package: one TVP prompt for each embedded task, learned on tiny-minigpt4.

    python benchmarks/gallery.py            # into tvp/data/gallery; about five minutes on one core

The recipe, its range and the seed are fixed beforehand; test images are looked at once, for the
table on the card.
"""

import argparse
import shutil
import time
from pathlib import Path

import torch
from range_study import make as make_learner

from tvp.training.recipes import get_recipe
from tvp.prompts.loading import GALLERY_DIR
from tvp.tasks.loading import load_task, task_names
from tvp.evaluation.transfer import evaluate_transfer
from tvp.models.zoo import load_zoo

SOURCE = "tiny-minigpt4"
SEED = 0
GATE = 100  # labeled validation images on which the card says for whom the prompt is
RANGE = "uint8"


def make(task_name: str, folder: Path) -> None:
    "One prompt with its card."
    zoo = load_zoo("tiny")
    task = load_task(task_name)
    learner = make_learner(SOURCE, task_name, SEED, RANGE, get_recipe("TVP").lr)
    start = time.monotonic()
    prompt = learner.fit()
    seconds = time.monotonic() - start
    results = evaluate_transfer(prompt, task, zoo, seed=SEED, gate=GATE)
    shutil.rmtree(folder, ignore_errors=True)
    prompt.save_pretrained(
        folder,
        model_card_kwargs=dict(
            results=results,
            seconds=seconds,
            license="apache-2.0",
            name=f"tvp/data/gallery/{folder.name}",
        ),
    )
    print(
        folder.name,
        results.summary()
        .query("method.str.startswith('TVP')")[["group", "method", "clean", "prompted", "gain"]]
        .round(3)
        .to_string(index=False),
        sep="\n",
        flush=True,
    )


def main() -> None:
    "Make all of them."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=GALLERY_DIR, help="folder for the prompts' folders")
    parser.add_argument("--task", choices=task_names(), nargs="+", default=task_names())
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.task:
        make(name, args.out / f"{name}-tvp")


if __name__ == "__main__":
    main()
