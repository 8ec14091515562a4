"""Does a prompt help models that never saw it? The study behind nbs/explanations/02_does_it_transfer.ipynb.

    python benchmarks/transfer_study.py tune     --work DIR     # choose each method's numbers, on validation pictures
    python benchmarks/transfer_study.py train    --work DIR     # all prompts, for every training length
    python benchmarks/transfer_study.py evaluate --work DIR     # all models, test pictures
    python benchmarks/transfer_study.py collect  --work DIR     # tables into benchmarks/results

Every stage skips what is there already, so it can be interrupted. `--shard 0/2` and `--shard 1/2` share a stage between two processes.
"""
import argparse
import itertools
import json
import os
from pathlib import Path

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tvp.prompt import VisualPrompt
from tvp.recipes import METHODS, find_recipe, make_learner
from tvp.tasks import load_task, task_names
from tvp.transfer import TransferResults, TransferRun, evaluate_transfer
from tvp.zoo import load_zoo

SOURCES, SEEDS = ("tiny-minigpt4", "tiny-instructblip"), (0, 1, 2)
LENGTHS = (2, 8, 24)  # epochs, 50 updates each (digits: 31)
TUNE_SOURCE, TUNE_SEED = "tiny-blip2-opt", 100  # neither is used in the study itself
TUNE_TARGETS = ("tiny-blip2-opt", "tiny-minigpt4", "tiny-instructblip")  # one tower: models on other towers have no say
GRID = {
    "VP": [dict(lr=lr) for lr in (1, 5, 20)],
    "EVP": [dict(lr=lr) for lr in (2, 4, 8)],
    "TVP": [dict(lr=lr, fca=fca, tse=tse) for lr in (4, 8) for fca in (.05, .2) for tse in (.01, .05)],
}
RESULTS = Path(__file__).parent / "results"


def write(path: Path, text: str) -> None:
    "Write beside the file, then rename."
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


def tune(work: Path, mine) -> None:
    "Validation accuracy of every setting in GRID, for every task, at two training lengths."
    jobs = [(task, method, i, epochs) for epochs in LENGTHS[:2] for task in task_names() for method in METHODS for i in range(len(GRID[method]))]
    for task, method, i, epochs in mine(jobs):
        path = work / "tune" / f"{task}-{method}-{i}-{epochs}.json"
        if path.exists(): continue
        prompt = make_learner(method, load_zoo("tiny"), TUNE_SOURCE, load_task(task), TUNE_SEED, epochs=epochs, **GRID[method][i]).fit()
        df = evaluate_transfer(prompt, load_task(task), load_zoo("tiny"), source=TUNE_SOURCE, split="valid", targets=TUNE_TARGETS).df
        df = df[df.method == method]
        write(path, json.dumps(dict(task=task, method=method, epochs=epochs, **GRID[method][i], clean=df.clean.mean(), prompted=df.prompted.mean())))


def prompt_path(work: Path, *what) -> Path:
    "Where a prompt of the study lies."
    return work / "prompts" / ("-".join(map(str, what)) + ".safetensors")


def train(work: Path, mine) -> None:
    "Every prompt of the study, the recipe's own length first."
    lengths = sorted(LENGTHS, key=lambda epochs: epochs != find_recipe("TVP").epochs)
    for epochs, seed, task, source, method in mine(list(itertools.product(lengths, SEEDS, task_names(), SOURCES, METHODS))):
        path = prompt_path(work, task, source, method, epochs, seed)
        if path.exists(): continue
        path.parent.mkdir(parents=True, exist_ok=True)
        make_learner(method, load_zoo("tiny"), source, load_task(task), seed, epochs=epochs).fit().save(path)


def evaluate(work: Path, mine) -> None:
    "All prompts of one task, source and seed on all models: the recipe's length on test pictures, all lengths on validation pictures."
    zoo, own = load_zoo("tiny"), find_recipe("TVP").epochs
    for split, seed, task, source in mine(list(itertools.product(("test", "valid"), SEEDS, task_names(), SOURCES))):
        path = work / split / f"{task}-{source}-{seed}.safetensors"
        prompts = {(m if split == "test" else f"{m} {e}"): prompt_path(work, task, source, m, e, seed)
                   for m in METHODS for e in LENGTHS if split == "valid" or e == own}
        if path.exists() or not all(p.exists() for p in prompts.values()): continue
        loaded = {"frame": VisualPrompt(zoo.size, zoo.width)} | {name: VisualPrompt.load(p) for name, p in prompts.items()}
        result = evaluate_transfer(loaded, load_task(task), zoo, source=source, split=split, seed=seed)
        save_run(result.only_run(), path)


def save_run(run: TransferRun, path: Path) -> None:
    "All scores of a run in one file."
    tensors = {"|".join(key): torch.from_numpy(scores) for key, scores in run.scores.items()}
    tensors |= dict(labels=torch.from_numpy(run.labels), index=torch.from_numpy(run.index))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path.with_suffix(".part"), dict(run=json.dumps({k: getattr(run, k) for k in ("task", "source", "seed", "metric", "towers")})))
    os.replace(path.with_suffix(".part"), path)


def load_run(path: Path) -> TransferRun:
    "What `save_run` wrote."
    with safe_open(path, "np") as file:
        tensors, facts = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["run"])
    scores = {tuple(name.split("|")): value for name, value in tensors.items() if "|" in name}
    return TransferRun(scores=scores, labels=tensors["labels"], index=tensors["index"], **facts)


def load_results(work: Path, split: str) -> TransferResults:
    "Everything evaluated so far."
    return TransferResults(map(load_run, sorted((work / split).glob("*.safetensors"))))


def collect(work: Path, mine) -> None:
    "Small tables of all results."
    rows = pd.DataFrame([json.loads(f.read_text()) for f in sorted((work / "tune").glob("*.json"))])
    write(RESULTS / "transfer_tune.csv", rows.round(4).to_csv(index=False))
    test, valid = load_results(work, "test"), load_results(work, "valid")
    write(RESULTS / "transfer_rows.csv", test.df.round(4).to_csv(index=False))
    write(RESULTS / "transfer_mean.csv", test.mean().round(4).to_csv(index=False))
    write(RESULTS / "transfer_groups.csv", test.summary().round(4).to_csv(index=False))
    for method, baseline in (("TVP", "EVP"), ("TVP", "frame"), ("EVP", "frame")):
        write(RESULTS / f"transfer_{method}_minus_{baseline}.csv", test.compare(method, baseline).round(4).to_csv(index=False))
    write(RESULTS / "transfer_lengths.csv", valid.summary().round(4).to_csv(index=False))


def main() -> None:
    "Run one stage."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("tune", "train", "evaluate", "collect"))
    parser.add_argument("--work", type=Path, required=True, help="folder for prompts and raw results")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th job, from the i-th")
    args = parser.parse_args()
    i, n = map(int, args.shard.split("/"))
    torch.set_num_threads(1)
    globals()[args.stage](args.work, lambda jobs: jobs[i::n])


if __name__ == "__main__":
    main()
