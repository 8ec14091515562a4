"""What does the gate save, and what does it cost? The study behind nbs/api/evaluation/12_gate.ipynb.

    python benchmarks/studies/gate.py --work DIR     # about fifteen minutes on one core; writes benchmarks/results/gate.csv

Prompts of the bundled recipes, some from the gallery and the others trained here, are tried on every
model of the small zoo. A row counts, for one prompt and one model, the answers that the prompt
corrects and breaks on all validation images, from which a gate of any size can be computed, and on
test images, which say what the right decision was. Prompts and rows that DIR holds are taken from
there, so the study can be interrupted; after the small zoo was trained anew, give an empty folder.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

from tvp._files import write_atomic
from tvp.evaluation.gate import GateDecision
from tvp.evaluation.transfer import score_task
from tvp.models.zoo import Zoo, load_zoo
from tvp.prompts.loading import load_prompt
from tvp.prompts.visual_prompt import VisualPrompt
from tvp.tasks.loading import load_task, task_names
from tvp.tasks.task import CachedTask
from tvp.training.recipes import make_learner

# method, source and seed of each prompt, for every task
PROMPTS = (
    ("VP", "tiny-minigpt4", 1),
    ("EVP", "tiny-llava", 0),
    ("TVP", "tiny-minigpt4", 0),
    ("TVP-lens", "tiny-llava-siglip", 0),
)
GALLERY = ("TVP", "tiny-minigpt4", 0)  # this one comes with the package
TEST_IMAGES = 300
RESULTS = Path(__file__).parents[1] / "results" / "gate.csv"


def get_prompt(
    work: Path, zoo: Zoo, task: str, method: str, source: str, seed: int
) -> VisualPrompt:
    "Load a prompt from the gallery or from an earlier run, or train it."
    if (method, source, seed) == GALLERY:
        return load_prompt(f"{task}-tvp")
    path = work / "prompts" / f"{task}-{method}-{source}-{seed}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        make_learner(method, zoo, source, load_task(task), seed).fit().save(path)
    return VisualPrompt.load(path)


def group(zoo: Zoo, source: str, target: str) -> str:
    "Is this model the source, an unseen one on its vision encoder, or one on another?"
    if target == source:
        return "source"
    same = zoo.tower(target) == zoo.tower(source)
    return "unseen, same tower" if same else "unseen, other tower"


def count_changes(zoo: Zoo, name: str, prompts: dict[tuple, VisualPrompt]) -> Iterator[dict]:
    "Ask every model about every prompt of one task: a row for each."
    task = CachedTask(load_task(name))
    asked = (("valid", None), ("test", TEST_IMAGES))
    for target, mllm in zoo.items():
        clean = [score_task(mllm, task, zoo.size, None, *which) for which in asked]
        for (method, source, seed), prompt in prompts.items():
            row = dict(task=name, method=method, source=source, seed=seed, target=target)
            row["group"] = group(zoo, source, target)
            for (split, limit), before in zip(asked, clean):
                after = score_task(mllm, task, zoo.size, prompt, split, limit)
                counts = GateDecision.from_scores(before[0], *after[:2])
                for field in ("images", "fixed", "broken"):
                    row[f"{split}_{field}"] = getattr(counts, field)
            yield row


def main() -> None:
    "Make all prompts, ask all models, write the table."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for prompts and rows")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the table")
    parser.add_argument("--task", choices=task_names(), nargs="+", default=task_names())
    args = parser.parse_args()
    torch.set_num_threads(1)
    zoo = load_zoo("tiny")
    tables = []
    for name in args.task:
        path = args.work / f"{name}.csv"
        if not path.exists():
            prompts = {what: get_prompt(args.work, zoo, name, *what) for what in PROMPTS}
            rows = pd.DataFrame(count_changes(zoo, name, prompts))
            write_atomic(path, rows.to_csv(index=False))
        tables.append(pd.read_csv(path))
    write_atomic(args.out, pd.concat(tables).to_csv(index=False))


if __name__ == "__main__":
    main()
