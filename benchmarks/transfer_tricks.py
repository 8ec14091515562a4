"""What makes a prompt help models that it never saw? The study behind nbs/explanations/08_beyond_the_paper.ipynb.

    python benchmarks/transfer_tricks.py ablate   --work DIR             # every trick alone, on validation pictures
    python benchmarks/transfer_tricks.py search   --work DIR             # optuna puts tricks together, on validation pictures
    python benchmarks/transfer_tricks.py train    --work DIR --zoo ZOO   # the prompts of the comparison
    python benchmarks/transfer_tricks.py evaluate --work DIR --zoo ZOO   # all models, test pictures, once
    python benchmarks/transfer_tricks.py collect  --work DIR             # tables into benchmarks/transfer

ZOO is `tiny`, the models that come along, or a folder that `tvp train-zoo --seed 100 --out FOLDER` has filled. Every stage skips what is
there already, so it can be interrupted; `--shard 0/2` and `--shard 1/2` share a stage between two processes.
"""
import argparse
import itertools
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from tvp.arguments import source_names
from tvp.files import write_atomic as write
from tvp.filters import Convolutional, LowFrequency, Smooth
from tvp.gradients import CommonWeakness, SharpnessAware, Spsa
from tvp.learner import Learner
from tvp.losses import FeatureConsistency, LayerConsistency, TaskLoss, TaskSemantics
from tvp.prompt import VisualPrompt
from tvp.recipes import find_recipe, make_learner
from tvp.tasks import load_task, task_names
from tvp.transfer import evaluate_transfer
from tvp.updates import NormalizedGradient, parameter_groups
from tvp.views import Jitter, ResizePad, Shift, scale_copies
from tvp.zoo import tiny_zoo

SHARED, CLIP, SIGLIP = "tiny-minigpt4", "tiny-llava", "tiny-llava-siglip"  # one model of each vision tower
TUNE_SEED = 100  # of every prompt that is trained to choose something; none of the comparison has it
RESULTS = Path(__file__).parent / "transfer"


@dataclass(frozen=True)
class Setting:
    "Everything that the study varies. The defaults are TVP as it comes for the small models, but for half as long."
    lr: float = 45.0  # length of a step
    epochs: int = 4
    range: str = "free"
    fca: float = 0.005
    distance: str = "euclidean"
    layers: float = 0.0  # weight of FCA in every layer
    tse: float = 0.005
    contrastive: float = 0.0  # weight of TSE against the task's other captions, instead of `tse`
    templates: int = 1  # of TSE
    crops: int = 0  # of TSE
    momentum: float = 0.0
    nesterov: bool = False
    adjust: tuple[str, ...] = ()
    adjust_lr: float = 0.02
    combine: str = "mean"
    gradient: object = None
    views: tuple = ()
    filters: tuple = ()
    average: int = 0


TEMPLATES = ["this is a photo of a {}", "a picture of a {}", "an image with a {}"]
TRICKS = {  # name: what it changes in TVP; lengths of steps are scaled where the trick changes them
    "TVP": {}, "without FCA and TSE": dict(fca=0.0, tse=0.0), "smaller steps": dict(lr=10.0), "in [0, 1]": dict(range="unit", lr=5.0),
    "momentum": dict(lr=4.5, momentum=0.9), "Nesterov": dict(lr=4.5, momentum=0.9, nesterov=True),
    "input diversity": dict(views=(ResizePad(0.85),)), "shifts": dict(views=(Shift(2),)), "jitter": dict(views=(Jitter(),)),
    "scale copies": dict(views=tuple(scale_copies(3))), "smoothed gradient": dict(filters=(Smooth(),)),
    "low frequencies": dict(filters=(LowFrequency(8),)), "convolutional": dict(filters=(Convolutional(),)),
    "average": dict(average=50), "sharpness-aware": dict(gradient=SharpnessAware(2.0)), "black box": dict(gradient=Spsa(4), fca=0.0, filters=(LowFrequency(6),), lr=2.0, momentum=0.9, nesterov=True),
    "TSE on crops": dict(crops=2), "TSE in several words": dict(templates=3), "contrastive TSE": dict(tse=0.0, contrastive=0.3),
    "FCA in every layer": dict(fca=0.0, layers=0.02), "FCA by cosine": dict(distance="cosine", fca=1.0), "relative FCA": dict(distance="relative", fca=0.3),
    "color": dict(adjust=("color",)), "scale": dict(adjust=("scale",)), "color and scale alone": dict(adjust=("color", "scale"), lr=1e-6)}
ENSEMBLES = {"mean": {}, "normalized": dict(combine="normalized"), "common direction": dict(combine="common"), "adaptive": dict(combine="adaptive"),
             "common weakness": dict(gradient=CommonWeakness(2.0, 2.0))}


def losses(setting: Setting, task, clip) -> list:
    "The terms of a setting."
    words = TEMPLATES[:setting.templates]
    captions = list(dict.fromkeys(what for batch in task.batches("train", 8, 100) for what in batch.semantics))
    terms = [TaskLoss(), FeatureConsistency(setting.fca, setting.distance), LayerConsistency(setting.layers),
             TaskSemantics(setting.tse, clip, words, setting.crops) if setting.tse else TaskSemantics(setting.contrastive, clip, words, setting.crops, captions)]
    return [term for term in terms if term.weight]


def make(setting: Setting, zoo, source: str, task, seed: int) -> Learner:
    "A learner as a setting says; `source` is a name, or several with ` + ` in between."
    prompt = VisualPrompt(zoo.size, zoo.width, seed=seed, range=setting.range, adjust=setting.adjust)
    optimizer = NormalizedGradient(parameter_groups(prompt, setting.adjust_lr), setting.lr, prompt.canvas_gradient_norm, setting.momentum, setting.nesterov)
    return Learner(prompt, [zoo[name] for name in source_names(source)], task, losses(setting, task, zoo.clip), optimizer, seed=seed, epochs=setting.epochs,
                   combine=setting.combine, gradient=setting.gradient, views=setting.views, filters=setting.filters, average=setting.average)


def tried(work: Path, name: str, setting: Setting, task: str, source: str) -> pd.DataFrame:
    "Train one prompt, ask all models about validation pictures; from the file where that has been done before."
    path = work / "valid" / f"{name}-{task}-{source}.json"
    if not path.exists():
        zoo = tiny_zoo()
        prompt = make(setting, zoo, source, load_task(task), TUNE_SEED).fit()
        rows = evaluate_transfer({name: prompt}, load_task(task), zoo, source=source, split="valid", seed=TUNE_SEED)
        write(path, json.dumps(grouped(rows).to_dict("records")))
    return pd.DataFrame(json.loads(path.read_text()))


def grouped(results) -> pd.DataFrame:
    "The rows of a result with a prompt, and to which group each model belongs."
    from tvp.tables import target_group
    run = results.only_run()
    df = results.df.query("method != 'none'")
    return df.assign(group=[target_group(run, target) for target in df.target])[["task", "method", "source", "target", "group", "clean", "prompted", "gain", "n", "seed"]]


def ablate(work: Path, mine, **_) -> None:
    "Every trick alone with one source, every combiner with two sources on two towers."
    jobs = [(name, change, task, source) for task in task_names() for source, tricks in ((SHARED, TRICKS), (f"{SHARED} + {CLIP}", ENSEMBLES)) for name, change in tricks.items()]
    for name, change, task, source in mine(jobs): tried(work, name, Setting(**change), task, source)


def objective(trial, work: Path) -> float:
    "Mean gain on models that a prompt never saw, over tasks and sources, on validation pictures; hopeless settings are given up early."
    import optuna
    setting = chosen(trial.params if isinstance(trial, optuna.trial.FrozenTrial) else suggested(trial))
    gains = []
    for number, (task, source) in enumerate(itertools.product(("shapes", "counting", "digits", "agreement", "presence"), SEARCH_SOURCES)):
        rows = tried(work, f"trial{trial.number}", setting, task, source)
        gains.append(rows[rows.group != "source"].gain.mean())
        trial.report(float(np.mean(gains)), number)
        if trial.should_prune(): raise optuna.TrialPruned
    return float(np.mean(gains))


SEARCH_SOURCES = (SHARED, SIGLIP)


def suggested(trial) -> dict:
    "What the search may choose."
    pick = trial.suggest_categorical
    return dict(range=pick("range", ["free", "unit"]), lr=trial.suggest_float("lr", 0.5, 45, log=True), epochs=pick("epochs", [2, 4, 8]),
                fca=trial.suggest_float("fca", 0.001, 0.5, log=True), tse=trial.suggest_float("tse", 0.001, 0.1, log=True), contrastive=pick("contrastive", [False, True]),
                momentum=pick("momentum", [0.0, 0.9]), color=pick("color", [False, True]), scale=pick("scale", [False, True]),
                adjust_lr=trial.suggest_float("adjust_lr", 0.003, 0.1, log=True), view=pick("view", ["none", "jitter", "shift", "resize"]),
                filter=pick("filter", ["none", "low", "smooth"]), sharp=pick("sharp", [False, True]))


VIEWS = {"none": (), "jitter": (Jitter(),), "shift": (Shift(2),), "resize": (ResizePad(0.9),)}
FILTERS = {"none": (), "low": (LowFrequency(12),), "smooth": (Smooth(),)}


def chosen(params: dict) -> Setting:
    "A setting from what the search has chosen."
    p = dict(params)
    adjust = tuple(name for name in ("color", "scale") if p.pop(name))
    views, filters, sharp, contrastive = VIEWS[p.pop("view")], FILTERS[p.pop("filter")], p.pop("sharp"), p.pop("contrastive")
    tse = p.pop("tse")
    return Setting(**p, adjust=adjust, views=views, filters=filters, gradient=SharpnessAware(p["lr"] / 20) if sharp else None,
                   tse=0.0 if contrastive else tse, contrastive=10 * tse if contrastive else 0.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("ablate", "search", "train", "evaluate", "collect"))
    parser.add_argument("--work", type=Path, required=True, help="folder for prompts and raw results")
    parser.add_argument("--zoo", default="tiny", help="the models that come along, or a folder with others of the same make")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th job, from the i-th")
    args = parser.parse_args()
    i, n = map(int, args.shard.split("/"))
    torch.set_num_threads(1)
    globals()[args.stage](args.work, lambda jobs: jobs[i::n], zoo=args.zoo)
