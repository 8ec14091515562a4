"""What does it cost a prompt to be an image? The study behind nbs/explanations/05_what_a_picture_can_hold.ipynb.

    python benchmarks/range_study.py tune     --work DIR     # the step length of `unit` and `uint8`, on validation images
    python benchmarks/range_study.py train    --work DIR     # all prompts
    python benchmarks/range_study.py evaluate --work DIR     # all models, validation and test images; as JPEG on test images
    python benchmarks/range_study.py collect  --work DIR     # tables into benchmarks/results

Every stage skips what is there already, so it can be interrupted. `--shard 0/2` and `--shard 1/2`
share a stage between two processes.
"""

import itertools
import json
from pathlib import Path

import pandas as pd
from safetensors import safe_open
from transfer_study import TUNE_SEED, TUNE_SOURCE, TUNE_TARGETS, save_run, run_stage, write

from tvp.evaluation.compression import compressed_variants
from tvp.training.learner import Learner
from tvp.training.losses import tvp_losses
from tvp.prompts.visual_prompt import VisualPrompt
from tvp.training.recipes import get_recipe
from tvp.tasks.loading import load_task, task_names
from tvp.evaluation.results import TransferResults
from tvp.evaluation.transfer import evaluate_transfer
from tvp.evaluation.runs import TransferRun
from tvp.models.zoo import load_zoo

# more of them: more entries, and hours
SOURCES = ("tiny-minigpt4",)
SEEDS = (0,)
# the source, two on its encoder, two on others
TARGETS = ("tiny-minigpt4", "tiny-vpgtrans", "tiny-blip2-t5", "tiny-llava", "tiny-llava-siglip")
LIMIT = 500  # test images
RANGES = ("free", "unit", "uint8")
LRS = (5, 15, 45, 135)  # of `unit` and `uint8`; free has its recipe's, 45
QUALITIES = (95, 85, 75)
METHODS = [
    "none",
    "free",
    "clipped",
    "unit",
    "uint8",
    *(f"uint8, JPEG {q}" for q in QUALITIES),
    *(f"no prompt, JPEG {q}" for q in QUALITIES),
]
RESULTS = Path(__file__).parent / "results"


def make(source: str, task: str, seed: int, range: str, lr: float) -> Learner:
    "TVP's recipe in a range, with a step length."
    zoo = load_zoo("tiny")
    recipe = get_recipe("TVP", lr=lr)
    prompt = VisualPrompt(zoo.size, zoo.width, recipe.kind, seed, range=range)
    learner = Learner(
        prompt,
        zoo[source],
        load_task(task),
        tvp_losses(recipe.fca, recipe.tse, zoo.clip),
        recipe.make_optimizer(prompt),
        batch_size=recipe.batch_size,
        seed=seed,
        augment=recipe.augment,
        epochs=recipe.epochs,
    )
    learner.provenance |= {"method": recipe.name, "source": source, "epochs": recipe.epochs}
    return learner


def tuned(work: Path) -> pd.DataFrame:
    "What `tune` has found so far."
    return pd.DataFrame([json.loads(f.read_text()) for f in sorted((work / "tune").glob("*.json"))])


def tune(work: Path, mine) -> None:
    """Validation accuracy of every step length: a source and a seed that the study does not use,
    models on other encoders have no say."""
    for task, range, lr in mine(list(itertools.product(task_names(), RANGES, LRS))):
        path = work / "tune" / f"{task}-{range}-{lr}.json"
        if path.exists() or (range == "free" and lr != get_recipe("TVP").lr):
            continue
        prompt = make(TUNE_SOURCE, task, TUNE_SEED, range, lr).fit()
        df = evaluate_transfer(
            prompt,
            load_task(task),
            load_zoo("tiny"),
            source=TUNE_SOURCE,
            split="valid",
            targets=TUNE_TARGETS,
        ).df
        df = df[df.method == "TVP"]
        write(
            path,
            json.dumps(
                dict(
                    task=task,
                    range=range,
                    lr=lr,
                    clean=df.clean.mean(),
                    prompted=df.prompted.mean(),
                )
            ),
        )


def best_lr(work: Path, range: str) -> float:
    "The step length with the best mean over tasks; `free` keeps its recipe's."
    if range == "free":
        return get_recipe("TVP").lr
    found = tuned(work)
    found = found[found.range == range]
    if len(found) < len(LRS) * len(task_names()):
        raise SystemExit("run the stage `tune` first")
    return float(found.groupby("lr").prompted.mean().idxmax())


def prompt_path(work: Path, *what) -> Path:
    "Where a prompt of the study lies."
    return work / "prompts" / ("-".join(map(str, what)) + ".safetensors")


def train(work: Path, mine) -> None:
    "Every prompt of the study."
    for source, seed, task, range in mine(
        list(itertools.product(SOURCES, SEEDS, task_names(), RANGES))
    ):
        path = prompt_path(work, task, source, range, seed)
        if not path.exists():
            make(source, task, seed, range, best_lr(work, range)).fit().save(path)


def evaluate(work: Path, mine) -> None:
    """All prompts of one task, source and seed on all models; as tensors, as 8-bit images, as
    JPEG files."""
    for source, seed, task, split in mine(
        list(itertools.product(SOURCES, SEEDS, task_names(), ("valid", "test")))
    ):
        path = work / split / f"{task}-{source}-{seed}.safetensors"
        if path.exists():
            continue
        prompts = {
            range: VisualPrompt.load(prompt_path(work, task, source, range, seed))
            for range in RANGES
        }
        prompts["clipped"] = prompts["free"].to_range("uint8")
        sent = {
            name if name.startswith("no") else name.replace("prompt", "uint8"): p
            for name, p in compressed_variants(prompts["uint8"], QUALITIES).items()
            if "JPEG" in name and split == "test"
        }
        result = evaluate_transfer(
            prompts | sent,
            load_task(task),
            load_zoo("tiny"),
            source=source,
            split=split,
            seed=seed,
            targets=TARGETS,
            limit=LIMIT,
        )
        save_run(result.only_run(), path)


def load_run(path: Path) -> TransferRun:
    "What `save_run` wrote, in the order of METHODS and of the zoo."
    with safe_open(path, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        facts = json.loads(file.metadata()["run"])
    targets = list(load_zoo("tiny"))
    keys = sorted(
        (tuple(n.split("|")) for n in tensors if "|" in n),
        key=lambda key: (targets.index(key[1]), METHODS.index(key[0])),
    )
    return TransferRun(
        scores={key: tensors["|".join(key)] for key in keys},
        labels=tensors["labels"],
        index=tensors["index"],
        **facts,
    )


def collect(work: Path, mine) -> None:
    "Small tables of all results."
    write(RESULTS / "ranges_tune.csv", tuned(work).round(4).to_csv(index=False))
    rows = []
    for path in sorted((work / "prompts").glob("*-free-*.safetensors")):
        prompt = VisualPrompt.load(path)
        if prompt.provenance["seed"] in SEEDS:
            rows.append(
                dict(
                    task=prompt.provenance["task"],
                    source=prompt.provenance["source"],
                    seed=prompt.provenance["seed"],
                    **dict(zip(("outside", "kept"), prompt.clipping_stats())),
                )
            )
    write(RESULTS / "ranges_clipping.csv", pd.DataFrame(rows).round(4).to_csv(index=False))
    for split in ("valid", "test"):
        results = TransferResults(map(load_run, sorted((work / split).glob("*.safetensors"))))
        write(
            RESULTS / f"ranges_{split}_groups.csv", results.summary().round(4).to_csv(index=False)
        )
        write(RESULTS / f"ranges_{split}_mean.csv", results.mean().round(4).to_csv(index=False))
        against = [(m, "free") for m in ("clipped", "unit", "uint8")] + [
            (f"uint8, JPEG {q}", "uint8") for q in QUALITIES if split == "test"
        ]
        write(
            RESULTS / f"ranges_{split}_compare.csv",
            pd.concat([results.compare(*pair) for pair in against]).round(4).to_csv(index=False),
        )
    write(RESULTS / "ranges_rows.csv", results.df.round(4).to_csv(index=False))


if __name__ == "__main__":
    run_stage(__doc__, tune, train, evaluate, collect)
