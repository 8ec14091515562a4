"""Does a prompt help models that never saw it? The study behind nbs/explanations/02_does_it_transfer.ipynb.

    python benchmarks/transfer_study.py tune     --work DIR     # choose each method's numbers, on validation images; run it twice
    python benchmarks/transfer_study.py train    --work DIR     # all prompts, for every training length
    python benchmarks/transfer_study.py evaluate --work DIR     # all models, test images
    python benchmarks/transfer_study.py collect  --work DIR     # tables into benchmarks/results

Every stage skips what is there already, so it can be interrupted. `--shard 0/2` and `--shard 1/2`
share a stage between two processes.
"""

import argparse
import itertools
import json
from pathlib import Path

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save

from tvp._files import write_atomic as write  # the other studies take it from here
from tvp.prompts.visual_prompt import VisualPrompt
from tvp.training.recipes import PAPER_METHODS, get_recipe, make_learner
from tvp.tasks.loading import load_task, task_names
from tvp.evaluation.results import TransferResults
from tvp.evaluation.transfer import evaluate_transfer
from tvp.evaluation.runs import TransferRun
from tvp.models.zoo import load_zoo

SOURCES = ("tiny-minigpt4", "tiny-instructblip")
SEEDS = (0, 1, 2)
# epochs, 50 updates each (digits: 31); other than the recipe's: first seed only, and the longest
# without VP
LENGTHS = (2, 8, 24)
# neither is used in the study itself
TUNE_SOURCE = "tiny-blip2-opt"
TUNE_SEED = 100
# one encoder: models on other encoders have no say
TUNE_TARGETS = ("tiny-blip2-opt", "tiny-blip2-t5", "tiny-vpgtrans")
GRID = {
    "VP": [dict(lr=lr) for lr in (1, 4, 12)],
    "EVP": [dict(lr=lr) for lr in (5, 15, 45)],
    "TVP": [
        dict(lr=lr, fca=fca, tse=tse)
        for lr in (15, 45)
        for fca in (0.005, 0.02)
        for tse in (0.005, 0.02)
    ],
}
RESULTS = Path(__file__).parent / "results"


def tuned(work: Path) -> pd.DataFrame:
    "What `tune` has found so far: one row for each task and setting."
    return pd.DataFrame([json.loads(f.read_text()) for f in sorted((work / "tune").glob("*.json"))])


def tune(work: Path, mine) -> None:
    """Validation accuracy of every setting in GRID at the shortest length; once all of them are
    there, of each method's better half at the next."""
    settings = [(method, i) for method in PAPER_METHODS for i in range(len(GRID[method]))]
    found = tuned(work)
    short = LENGTHS[0]
    short_runs = found[found.epochs == short] if len(found) else found
    if complete := len(short_runs) == len(settings) * len(task_names()):
        mean = short_runs.groupby(["method", "setting"]).prompted.mean()
        settings = [
            key
            for method in PAPER_METHODS
            for key in mean[[method]].nlargest(-(-len(GRID[method]) // 2)).index
        ]
    for task, (method, i) in mine(list(itertools.product(task_names(), settings))):
        path = work / "tune" / f"{task}-{method}-{i}-{LENGTHS[complete]}.json"
        if path.exists():
            continue
        prompt = make_learner(
            method,
            load_zoo("tiny"),
            TUNE_SOURCE,
            load_task(task),
            TUNE_SEED,
            epochs=LENGTHS[complete],
            **GRID[method][i],
        ).fit()
        df = evaluate_transfer(
            prompt,
            load_task(task),
            load_zoo("tiny"),
            source=TUNE_SOURCE,
            split="valid",
            targets=TUNE_TARGETS,
        ).df
        df = df[df.method == method]
        write(
            path,
            json.dumps(
                dict(
                    task=task,
                    method=method,
                    setting=i,
                    epochs=LENGTHS[complete],
                    **GRID[method][i],
                    clean=df.clean.mean(),
                    prompted=df.prompted.mean(),
                )
            ),
        )


def prompt_path(work: Path, *what) -> Path:
    "Where a prompt of the study lies."
    return work / "prompts" / ("-".join(map(str, what)) + ".safetensors")


def train(work: Path, mine) -> None:
    "Every prompt of the study, the recipe's own length first."
    own = get_recipe("TVP").epochs
    jobs = itertools.product(
        (own, *(epochs for epochs in LENGTHS if epochs != own)),
        SEEDS,
        task_names(),
        SOURCES,
        PAPER_METHODS,
    )
    for epochs, seed, task, source, method in mine(
        [
            job
            for job in jobs
            if job[0] == own or (job[1] == SEEDS[0] and (job[0] < own or job[4] != "VP"))
        ]
    ):
        path = prompt_path(work, task, source, method, epochs, seed)
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        make_learner(
            method, load_zoo("tiny"), source, load_task(task), seed, epochs=epochs
        ).fit().save(path)


def evaluate(work: Path, mine) -> None:
    """All prompts of one task, source and seed on all models: the recipe's length on test images,
    all lengths (first seed) on validation images."""
    zoo = load_zoo("tiny")
    own = get_recipe("TVP").epochs
    jobs = [("test", seed) for seed in SEEDS] + [("valid", SEEDS[0])]
    for (split, seed), task, source in mine(list(itertools.product(jobs, task_names(), SOURCES))):
        path = work / split / f"{task}-{source}-{seed}.safetensors"
        prompts = {
            (m if split == "test" else f"{m} {e}"): prompt_path(work, task, source, m, e, seed)
            for m in PAPER_METHODS
            for e in LENGTHS
            if split == "valid" or e == own
        }
        prompts = {name: p for name, p in prompts.items() if p.exists()}
        if path.exists() or not prompts:
            continue
        loaded = {"frame": VisualPrompt(zoo.size, zoo.width)} | {
            name: VisualPrompt.load(p) for name, p in prompts.items()
        }
        result = evaluate_transfer(
            loaded, load_task(task), zoo, source=source, split=split, seed=seed
        )
        save_run(result.only_run(), path)


def save_run(run: TransferRun, path: Path) -> None:
    "All scores of a run in one file."
    tensors = {"|".join(key): torch.from_numpy(scores) for key, scores in run.scores.items()}
    tensors |= dict(labels=torch.from_numpy(run.labels), index=torch.from_numpy(run.index))
    write(
        path,
        save(
            tensors,
            dict(
                run=json.dumps(
                    {k: getattr(run, k) for k in ("task", "source", "seed", "metric", "towers")}
                )
            ),
        ),
    )


def load_run(path: Path) -> TransferRun:
    "What `save_run` wrote."
    with safe_open(path, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        facts = json.loads(file.metadata()["run"])
    methods = ["none", "frame", *PAPER_METHODS]
    targets = list(load_zoo("tiny"))

    # safetensors sorts by name
    def place(key):
        return (targets.index(key[1]), methods.index(key[0].split()[0]), key[0])

    scores = {
        key: tensors["|".join(key)]
        for key in sorted((tuple(n.split("|")) for n in tensors if "|" in n), key=place)
    }
    return TransferRun(scores=scores, labels=tensors["labels"], index=tensors["index"], **facts)


def load_results(work: Path, split: str) -> TransferResults:
    "Everything evaluated so far."
    return TransferResults(map(load_run, sorted((work / split).glob("*.safetensors"))))


def collect(work: Path, mine) -> None:
    "Small tables of all results."
    write(RESULTS / "transfer_tune.csv", tuned(work).round(4).to_csv(index=False))
    test = load_results(work, "test")
    valid = load_results(work, "valid")
    write(RESULTS / "transfer_rows.csv", test.df.round(4).to_csv(index=False))
    write(RESULTS / "transfer_mean.csv", test.mean().round(4).to_csv(index=False))
    write(RESULTS / "transfer_groups.csv", test.summary().round(4).to_csv(index=False))
    for method, baseline in (("TVP", "EVP"), ("TVP", "frame"), ("EVP", "frame")):
        write(
            RESULTS / f"transfer_{method}_minus_{baseline}.csv",
            test.compare(method, baseline).round(4).to_csv(index=False),
        )
    write(RESULTS / "transfer_lengths.csv", valid.summary().round(4).to_csv(index=False))
    from tvp.plotting.transfer import plot_transfer

    figure_file = RESULTS.parent.parent / "nbs" / "images" / "transfer.png"
    figure_file.parent.mkdir(exist_ok=True)
    plot_transfer(
        test.mean().query("task == 'shapes' and source == 'tiny-minigpt4' and method != 'frame'")
    ).figure.savefig(figure_file, dpi=150, bbox_inches="tight")


def run_stage(
    description: str,  # for --help
    *stages,  # functions (folder of work, jobs -> this process's share of them)
) -> None:
    "The command line of a study: one of its stages, or a share of it."
    named = {stage.__name__: stage for stage in stages}
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=tuple(named))
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for prompts and raw results"
    )
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th job, from the i-th")
    args = parser.parse_args()
    i, n = map(int, args.shard.split("/"))
    torch.set_num_threads(1)
    named[args.stage](args.work, lambda jobs: jobs[i::n])


if __name__ == "__main__":
    run_stage(__doc__, tune, train, evaluate, collect)
