"""What makes a prompt help models that it never saw? The study behind nbs/explanations/08_beyond_the_paper.ipynb.

    python benchmarks/transfer_tricks.py ablate   --work DIR             # every trick alone, on validation images
    python benchmarks/transfer_tricks.py search   --work DIR             # optuna puts tricks together, on validation images
    python benchmarks/transfer_tricks.py train    --work DIR --zoo ZOO   # the prompts of the comparison
    python benchmarks/transfer_tricks.py evaluate --work DIR --zoo ZOO   # all models, test images, once
    python benchmarks/transfer_tricks.py retain   --work DIR             # prompts on the tasks that they were not trained for
    python benchmarks/transfer_tricks.py agree    --work DIR             # what models want of a prompt
    python benchmarks/transfer_tricks.py drift    --work DIR             # what prompts do to features
    python benchmarks/transfer_tricks.py collect  --work DIR             # tables into benchmarks/transfer

ZOO is `tiny`, the models that come along, or a folder that `python
benchmarks/studies/train_small_zoo.py --seed 100 --out FOLDER` has filled. Every stage skips what
is there already, so it can be interrupted; `--shard 0/2` and `--shard 1/2` share a stage between
two processes.
"""

import argparse
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save

from tvp._validation import parse_source_names
from tvp._files import write_atomic as write
from tvp.training.gradient_filters import BlurParametrizationFilter, DCTLowPassFilter, GaussianGradientFilter
from tvp.training.gradient_estimators import CWAGradient, SAMGradient, SPSAGradient
from tvp.training.learner import Learner
from tvp.training.losses import FeatureConsistency, LayerConsistency, TaskLoss, TaskSemantics
from tvp.prompts.pixel_ops import IMAGE_ADJUSTMENTS
from tvp.prompts.visual_prompt import VisualPrompt
from tvp.training.recipes import get_recipe, make_learner
from tvp.evaluation.studies import evaluate_retention
from tvp.tasks.loading import load_task, task_names
from tvp.evaluation.transfer import evaluate_transfer
from tvp.training.optimizers import NormalizedGradient, parameter_groups
from tvp.training.input_transforms import ContrastBrightnessJitter, RandomResizePad, RandomTranslate, scale_copies
from tvp.models.zoo import tiny_zoo

# one model of each vision encoder
SHARED = "tiny-minigpt4"
CLIP = "tiny-llava"
SIGLIP = "tiny-llava-siglip"
# of every prompt that is trained to choose something; none of the comparison has it
TUNE_SEED = 100
RESULTS = Path(__file__).parent / "transfer"


@dataclass(frozen=True)
class Setting:
    """Everything that the study varies. The defaults are TVP as it comes for the small models, but
    for half as long."""

    lr: float = 45.0  # length of a step
    epochs: int = 4
    width: int = 6  # of the border, pixels
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
    apart: bool = False  # does each of what is adjusted have a step of its own?
    combine: str = "mean"
    gradient: object = None
    views: tuple = ()
    filters: tuple = ()
    average: int = 0


TEMPLATES = ["this is a photo of a {}", "an image of a {}", "an image with a {}"]
NEW = "TVP-lens"  # the recipe that the search has led to
LENS = {
    name: getattr(get_recipe(NEW), name)
    for name in ("lr", "width", "epochs", "fca", "tse", "adjust", "adjust_lr")
}
TRICKS = {  # name: what it changes in TVP; lengths of steps are scaled where the trick changes them
    "TVP": {},
    "without FCA and TSE": dict(fca=0.0, tse=0.0),
    "smaller steps": dict(lr=10.0),
    "narrower border": dict(width=3),
    "in [0, 1]": dict(range="unit", lr=5.0),
    "momentum": dict(lr=4.5, momentum=0.9),
    "Nesterov": dict(lr=4.5, momentum=0.9, nesterov=True),
    "input diversity": dict(views=(RandomResizePad(0.85),)),
    "shifts": dict(views=(RandomTranslate(2),)),
    "jitter": dict(views=(ContrastBrightnessJitter(),)),
    "scale copies": dict(views=tuple(scale_copies(3))),
    "smoothed gradient": dict(filters=(GaussianGradientFilter(),)),
    "low frequencies": dict(filters=(DCTLowPassFilter(8),)),
    "convolutional": dict(filters=(BlurParametrizationFilter(),)),
    "average": dict(average=50),
    "sharpness-aware": dict(gradient=SAMGradient(2.0)),
    "black box": dict(
        gradient=SPSAGradient(4), fca=0.0, filters=(DCTLowPassFilter(6),), lr=2.0, momentum=0.9, nesterov=True
    ),
    "black box, lens": dict(
        gradient=SPSAGradient(2), fca=0.0, lr=1e-6, adjust=("sharpness",), adjust_lr=0.04
    ),
    "TSE on crops": dict(crops=2),
    "TSE in several words": dict(templates=3),
    "contrastive TSE": dict(tse=0.0, contrastive=0.3),
    "FCA in every layer": dict(fca=0.0, layers=0.02),
    "FCA by cosine": dict(distance="cosine", fca=1.0),
    "relative FCA": dict(distance="relative", fca=0.3),
    "color": dict(adjust=("color",)),
    "sharpness": dict(adjust=("sharpness",)),
    "scale": dict(adjust=("scale",)),
    "color, sharpness and scale": dict(adjust=tuple(IMAGE_ADJUSTMENTS)),
    "color, sharpness and scale, a step each": dict(adjust=tuple(IMAGE_ADJUSTMENTS), apart=True),
    NEW: LENS,
    f"{NEW}, a step each": dict(LENS, apart=True),
    "these alone, no border": dict(adjust=tuple(IMAGE_ADJUSTMENTS), lr=1e-6),
    "sharpness alone, no border": dict(adjust=("sharpness",), lr=1e-6),
}
ENSEMBLES = {
    "mean": {},
    "normalized": dict(combine="normalized"),
    "common direction": dict(combine="common"),
    "adaptive": dict(combine="adaptive"),
    "common weakness": dict(gradient=CWAGradient(0.5, 2.0)),
}


def losses(setting: Setting, task, clip) -> list:
    "The terms of a setting."
    words = TEMPLATES[: setting.templates]
    captions = list(
        dict.fromkeys(what for batch in task.batches("train", 8, 100) for what in batch.semantics)
    )
    terms = [
        TaskLoss(),
        FeatureConsistency(setting.fca, setting.distance),
        LayerConsistency(setting.layers),
        TaskSemantics(setting.tse, clip, words, setting.crops)
        if setting.tse
        else TaskSemantics(setting.contrastive, clip, words, setting.crops, captions),
    ]
    return [term for term in terms if term.weight]


def make(setting: Setting, zoo, source: str, task, seed: int) -> Learner:
    "A learner as a setting says; `source` is a name, or several with ` + ` in between."
    prompt = VisualPrompt(
        zoo.size, setting.width, seed=seed, range=setting.range, adjust=setting.adjust
    )
    border, *rest = parameter_groups(prompt, setting.adjust_lr)
    if setting.apart:
        rest = [group | {"params": [one]} for group in rest for one in group["params"]]
    optimizer = NormalizedGradient(
        [border, *rest], setting.lr, prompt.canvas_gradient_norm, setting.momentum, setting.nesterov
    )
    return Learner(
        prompt,
        [zoo[name] for name in parse_source_names(source)],
        task,
        losses(setting, task, zoo.clip),
        optimizer,
        seed=seed,
        epochs=setting.epochs,
        ensemble=setting.combine,
        gradient_estimator=setting.gradient,
        input_transforms=setting.views,
        gradient_filters=setting.filters,
        average_last_steps=setting.average,
    )


def tried(work: Path, name: str, setting: Setting, task: str, source: str) -> pd.DataFrame:
    """Train one prompt, ask all models about validation images; from the file where that has been
    done before."""
    path = work / "valid" / f"{name}-{task}-{source}.json"
    if not path.exists():
        zoo = tiny_zoo()
        prompt = make(setting, zoo, source, load_task(task), TUNE_SEED).fit()
        rows = evaluate_transfer(
            {name: prompt}, load_task(task), zoo, source=source, split="valid", seed=TUNE_SEED
        )
        write(path, json.dumps(grouped(rows).to_dict("records")))
    return pd.DataFrame(json.loads(path.read_text()))


def grouped(results) -> pd.DataFrame:
    "The rows of a result with a prompt, and to which group each model belongs."
    run = results.only_run()
    df = results.df.query("method != 'none'")
    return df.assign(group=[run.target_group(target) for target in df.target])[
        ["task", "method", "source", "target", "group", "clean", "prompted", "gain", "n", "seed"]
    ]


def ablate(work: Path, mine, **_) -> None:
    "Every trick alone with one source, every combiner with two sources on two encoders."
    jobs = [
        (name, change, task, source)
        for task in task_names()
        for source, tricks in ((SHARED, TRICKS), (f"{SHARED} + {CLIP}", ENSEMBLES))
        for name, change in tricks.items()
    ]
    for name, change, task, source in mine(jobs):
        tried(work, name, Setting(**change), task, source)


VIEWS = {"none": (), "jitter": (ContrastBrightnessJitter(),), "shift": (RandomTranslate(2),), "resize": (RandomResizePad(0.9),)}
FILTERS = {"none": (), "low": (DCTLowPassFilter(12),), "smooth": (GaussianGradientFilter(),)}
SEARCH_SOURCES = (SHARED, SIGLIP)
START = dict(
    range="free",
    lr=45.0,
    epochs=4,
    width=6,
    fca=0.005,
    tse=0.005,
    contrastive=False,
    momentum=0.0,
    color=False,
    sharpness=False,
    scale=False,
    adjust_lr=0.02,
    view="none",
    filter="none",
    sharp=False,
)  # TVP, half as long as its recipe
HINTS = [
    {},
    dict(sharpness=True),
    dict(color=True, sharpness=True),
    dict(range="unit", lr=15.0, color=True, sharpness=True),
    dict(lr=10.0, fca=0.05, color=True, sharpness=True, scale=True),
    dict(lr=2.0, color=True, sharpness=True),
    dict(range="unit", lr=15.0, sharpness=True),
    dict(range="unit", lr=15.0, sharpness=True, width=3),
    dict(range="unit", lr=15.0, sharpness=True, width=3, adjust_lr=0.05),
    dict(lr=30.0, sharpness=True, width=2),
    dict(range="unit", lr=15.0, sharpness=True, width=4, contrastive=True, tse=0.02),
]


def suggested(trial) -> dict:
    "What the search may choose."
    pick = trial.suggest_categorical
    return dict(
        range=pick("range", ["free", "unit"]),
        lr=trial.suggest_float("lr", 0.5, 50, log=True),
        epochs=pick("epochs", [2, 4]),
        width=trial.suggest_int("width", 1, 6),
        fca=trial.suggest_float("fca", 0.001, 0.5, log=True),
        tse=trial.suggest_float("tse", 0.001, 0.1, log=True),
        contrastive=pick("contrastive", [False, True]),
        momentum=pick("momentum", [0.0, 0.9]),
        color=pick("color", [False, True]),
        sharpness=pick("sharpness", [False, True]),
        scale=pick("scale", [False, True]),
        adjust_lr=trial.suggest_float("adjust_lr", 0.003, 0.1, log=True),
        view=pick("view", list(VIEWS)),
        filter=pick("filter", list(FILTERS)),
        sharp=pick("sharp", [False, True]),
    )


def chosen(params: dict) -> Setting:
    "A setting from what the search has chosen."
    p = dict(params)
    adjust = tuple(name for name in IMAGE_ADJUSTMENTS if p.pop(name))
    views = VIEWS[p.pop("view")]
    filters = FILTERS[p.pop("filter")]
    sharp = p.pop("sharp")
    contrastive = p.pop("contrastive")
    tse = p.pop("tse")
    lr = p.pop("lr") * (0.1 if p["momentum"] else 1)  # steps with momentum grow tenfold
    return Setting(
        lr,
        **p,
        adjust=adjust,
        views=views,
        filters=filters,
        gradient=SAMGradient(lr / 20) if sharp else None,
        tse=0.0 if contrastive else tse,
        contrastive=10 * tse if contrastive else 0.0,
    )


def gain_so_far(trial, work: Path) -> float:
    """Mean gain on models that a prompt never saw, over tasks and sources, on validation images;
    a hopeless setting is given up early."""
    import optuna

    setting = chosen(suggested(trial))
    gains = []
    for number, (task, source) in enumerate(
        itertools.product(("shapes", "counting", "digits", "agreement", "presence"), SEARCH_SOURCES)
    ):
        rows = tried(work, f"trial{trial.number}", setting, task, source)
        gains.append(rows[rows.group != "source"].gain.mean())
        trial.report(float(np.mean(gains)), number)
        if trial.should_prune():
            raise optuna.TrialPruned
    return float(np.mean(gains))


def search(work: Path, mine, **_) -> None:
    "Tricks put together by optuna, until it is stopped."
    import optuna

    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(work / "search.log"))
    )
    study = optuna.create_study(
        storage=storage,
        study_name="tricks",
        direction="maximize",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(
            seed=mine([0, 1])[0], multivariate=True, constant_liar=True
        ),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=6, n_warmup_steps=3),
    )
    for hint in HINTS if not study.trials else []:
        study.enqueue_trial(START | hint)
    study.optimize(lambda trial: gain_so_far(trial, work))


SEEDS = (0, 1, 2, 3, 4)
PAIR_SEEDS = (0,)
# two encoders: the third is new to the prompt
PAIRS = ((SHARED, CLIP), (SHARED, SIGLIP), (CLIP, SIGLIP))
PICTURES = 300  # of every task's test images, the first ones


def some_zoo(name: str):
    "The models that come along, or those of a folder."
    return tiny_zoo() if name == "tiny" else tiny_zoo(Path(name))


def prompt_path(work: Path, zoo: str, task: str, source: str, method: str, seed: int) -> Path:
    "Where a prompt of the comparison lies."
    return (
        work / "final" / Path(zoo).name / "prompts" / f"{task}|{source}|{method}|{seed}.safetensors"
    )


def rounds(zoo) -> list[tuple[int, str, list[str]]]:
    """Seed, `one` or `two`, and the sources: every model alone with all seeds, then pairs on two
    encoders."""
    pairs = [" + ".join(pair) for pair in PAIRS]
    return [
        *((seed, "one", list(zoo)) for seed in SEEDS),
        *((seed, "two", pairs) for seed in PAIR_SEEDS),
    ]


def train(work: Path, mine, zoo: str) -> None:
    "Every prompt of the comparison, one seed after the other."
    models = some_zoo(zoo)
    jobs = [
        (task, source, method, seed)
        for seed, _, sources in rounds(models)
        for source, task, method in itertools.product(sources, task_names(), ("TVP", NEW))
    ]
    for task, source, method, seed in mine(jobs):
        path = prompt_path(work, zoo, task, source, method, seed)
        if not path.exists():
            make_learner(method, models, source, load_task(task), seed).fit().save(path)


def evaluate(work: Path, mine, zoo: str) -> None:
    """Which test images every model gets right, without a prompt and with each one of a task and
    a seed."""
    models = some_zoo(zoo)
    for (seed, kind, sources), name in mine(list(itertools.product(rounds(models), task_names()))):
        path = work / "final" / Path(zoo).name / f"{name}-{kind}-{seed}.safetensors"
        wanted = {
            f"{source}|{method}": prompt_path(work, zoo, name, source, method, seed)
            for source in sources
            for method in ("TVP", NEW)
        }
        if path.exists() or not all(place.exists() for place in wanted.values()):
            continue
        run = evaluate_transfer(
            {key: VisualPrompt.load(place) for key, place in wanted.items()},
            load_task(name),
            models,
            limit=PICTURES,
            seed=seed,
        ).only_run()
        right = {
            "|".join(key): torch.from_numpy(scores.argmax(1) == run.labels).to(torch.uint8)
            for key, scores in run.scores.items()
        }
        write(path, save(right, {"towers": json.dumps(run.towers), "metric": run.metric}))


def outcomes(place: Path) -> list[dict]:
    """One entry for each prompt and model of a comparison: who, in which group, and per image
    what was right without and with the prompt."""
    from tvp.evaluation.runs import TransferRun

    found = []
    for path in sorted(place.glob("*.safetensors")):
        task, kind, seed = path.stem.rsplit("-", 2)
        with safe_open(path, "np") as file:
            right, facts = (
                {name: file.get_tensor(name).astype(float) for name in file.keys()},
                file.metadata(),
            )
        towers = json.loads(facts["towers"])
        for name, prompted in right.items():
            *who, target = name.split("|")
            if who == ["none"]:
                continue
            run = TransferRun(task, who[0], int(seed), facts["metric"], np.zeros(0), {}, towers)
            found.append(
                dict(
                    zoo=place.name,
                    sources=kind,
                    task=task,
                    method=who[1],
                    source=who[0],
                    target=target,
                    seed=int(seed),
                    metric=facts["metric"],
                    group=run.target_group(target),
                    clean=right[f"none|{target}"],
                    prompted=prompted,
                )
            )
    return found


def interval(differences: list[np.ndarray], draws: int = 2000) -> tuple[float, float, float]:
    """Mean over tasks of arrays (seeds, images), and its 95 % interval: seeds and images of
    every task are drawn anew."""
    rng = np.random.default_rng(0)
    means = np.zeros(draws)

    def often(n):
        return rng.multinomial(n, np.full(n, 1 / n), draws) / n

    for values in differences:
        means += (often(len(values)) @ values * often(values.shape[1])).sum(1) / len(differences)
    return float(np.mean([values.mean() for values in differences])), *np.quantile(
        means, [0.025, 0.975]
    )


def by_task(entries: list[dict]) -> dict[str, np.ndarray]:
    "Gain over no prompt, mean over sources and models: task -> (seeds, images)."
    found = {}
    for entry in entries:
        found.setdefault(entry["task"], {}).setdefault(entry["seed"], []).append(
            entry["prompted"] - entry["clean"]
        )
    return {
        task: np.stack([np.mean(values, axis=0) for values in seeds.values()])
        for task, seeds in found.items()
    }


def groups_of(entries: list[dict]) -> dict[str, list[dict]]:
    "The groups of models that are reported."
    chosen = {
        name: [e for e in entries if e["group"] == name]
        for name in ("source", "unseen, same tower", "unseen, other tower")
    }
    return chosen | {"unseen": [e for e in entries if e["group"] != "source"]}


def gains(entries: list[dict]) -> pd.DataFrame:
    """Gain over no prompt, and of the new recipe over TVP, by zoo (and their mean), kind of source,
    group and task, with intervals; `all` is the mean over tasks."""
    rows = []
    zoos = list(dict.fromkeys(e["zoo"] for e in entries))
    for kind, group in itertools.product(("one", "two"), groups_of([])):
        split = {}
        for zoo, method in itertools.product(zoos, ("TVP", NEW)):
            inside = groups_of(
                [e for e in entries if (e["zoo"], e["sources"], e["method"]) == (zoo, kind, method)]
            )[group]
            split[zoo, method] = by_task(inside)
        for method in ("TVP", NEW):
            split["both", method] = {
                task: np.mean([split[zoo, method][task] for zoo in zoos], axis=0)
                for task in split[zoos[0], method]
            }
        for zoo in (*zoos, "both"):
            split[zoo, f"{NEW} - TVP"] = {
                task: split[zoo, NEW][task] - split[zoo, "TVP"][task] for task in split[zoo, "TVP"]
            }
        for (zoo, method), tasks in split.items():
            for task, arrays in [
                *((task, [array]) for task, array in tasks.items()),
                ("all", list(tasks.values())),
            ]:
                rows.append(
                    dict(
                        zip(
                            ["zoo", "sources", "group", "method", "task", "gain", "low", "high"],
                            [zoo, kind, group, method, task, *interval(arrays)],
                        )
                    )
                )
    return pd.DataFrame(rows)


def pairs_against_singles(entries: list[dict]) -> pd.DataFrame:
    """Two sources against the better of the two alone, on models that neither has seen; which is
    better is known from the very same images, which favors the single one."""
    rows = []
    for zoo, method, pair in itertools.product(
        dict.fromkeys(e["zoo"] for e in entries),
        ("TVP", NEW),
        dict.fromkeys(e["source"] for e in entries if " + " in e["source"]),
    ):
        mine = [
            e
            for e in entries
            if e["zoo"] == zoo
            and e["method"] == method
            and e["seed"] in PAIR_SEEDS
            and e["target"] not in parse_source_names(pair)
        ]
        split = {
            source: by_task([e for e in mine if e["source"] == source])
            for source in (pair, *parse_source_names(pair))
        }
        for task in split[pair]:
            better = max(parse_source_names(pair), key=lambda name: split[name][task].mean())
            average = np.mean([split[name][task].mean() for name in parse_source_names(pair)])
            rows.append(
                dict(
                    zip(
                        [
                            "zoo",
                            "method",
                            "pair",
                            "task",
                            "better",
                            "average",
                            "single",
                            "both",
                            "gain",
                            "low",
                            "high",
                        ],
                        [
                            zoo,
                            method,
                            pair,
                            task,
                            better,
                            average,
                            split[better][task].mean(),
                            split[pair][task].mean(),
                            *interval([split[pair][task] - split[better][task]]),
                        ],
                    )
                )
            )
    return pd.DataFrame(rows)


def tidy(entries: list[dict]) -> pd.DataFrame:
    """One row for each prompt and model, in the tidy columns of the package, with an interval over
    images."""
    from tvp.evaluation.metrics import bootstrap_interval
    from tvp.evaluation.runs import TIDY_COLUMNS

    rows = []
    for e in entries:
        gain, low, high = bootstrap_interval(e["clean"], e["prompted"], seed=e["seed"])
        rows.append(
            e
            | dict(
                clean=e["clean"].mean(),
                prompted=e["prompted"].mean(),
                gain=gain,
                low=low,
                high=high,
                n=len(e["prompted"]),
            )
        )
    return pd.DataFrame(rows)[["zoo", *TIDY_COLUMNS, "group"]]


def lenses(work: Path) -> pd.DataFrame:
    "Where the lens of every TVP-lens prompt of the comparison has ended."
    rows = []
    for path in sorted((work / "final").glob(f"*/prompts/*|{NEW}|*.safetensors")):
        task, source, _, seed = path.stem.split("|")
        prompt = VisualPrompt.load(path)
        rows.append(
            dict(
                zip(
                    ["fine", "medium", "coarse", "size"],
                    [*(1 + prompt.sharpness).tolist(), prompt.scale.exp().item()],
                ),
                zoo=path.parents[1].name,
                task=task,
                source=source,
                seed=int(seed),
            )
        )
    return pd.DataFrame(rows)


def collect(work: Path, mine, **_) -> None:
    "Small tables of everything there is."
    RESULTS.mkdir(exist_ok=True)

    def put(name, df):
        return write(RESULTS / f"{name}.csv", df.round(4).to_csv(index=False))

    runs = pd.concat(
        pd.DataFrame(json.loads(path.read_text()))
        for path in sorted((work / "valid").glob("*.json"))
    )
    isin = runs.method.str.startswith("trial")
    put("ablation", runs[~isin]), put("trials", runs[isin])
    if (work / "search.log").exists():
        put("settings", settings_tried(work))
    entries = [entry for place in sorted((work / "final").glob("*")) for entry in outcomes(place)]
    if entries:
        (
            put("final", tidy(entries)),
            put("gains", gains(entries)),
            put("pairs", pairs_against_singles(entries)),
            put("lenses", lenses(work)),
        )
    if kept := sorted((work / "retain").glob("*.json")):
        put("retention", pd.concat(pd.DataFrame(json.loads(path.read_text())) for path in kept))


def settings_tried(work: Path) -> pd.DataFrame:
    "Every trial of the search: its setting, how far it came and what it was worth."
    import optuna

    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(work / "search.log"))
    )
    study = optuna.load_study(storage=storage, study_name="tricks")
    return pd.DataFrame(
        [
            dict(
                trial=t.number,
                state=t.state.name.lower(),
                prompts=len(t.intermediate_values),
                gain=t.value,
                **t.params,
            )
            for t in study.trials
        ]
    )


def agree(work: Path, mine, **_) -> None:
    """Whether models want the same of a border, and of the image itself, before anything has been
    learned."""
    zoo = tiny_zoo()
    found = []
    for name in task_names():
        batch = next(load_task(name).batches("train", zoo.size - 2 * zoo.width, 200))
        wishes = {target: gradients_of(zoo[target], batch, zoo) for target in zoo}
        for part, (a, b) in itertools.product(
            ("border", *IMAGE_ADJUSTMENTS), itertools.combinations(zoo, 2)
        ):
            cosine = torch.cosine_similarity(wishes[a][part], wishes[b][part], dim=0).item()
            found.append(
                dict(
                    task=name,
                    part=part,
                    a=a,
                    b=b,
                    towers="same" if zoo.tower(a) == zoo.tower(b) else "other",
                    cosine=cosine,
                )
            )
    RESULTS.mkdir(exist_ok=True)
    write(RESULTS / "agreement.csv", pd.DataFrame(found).round(4).to_csv(index=False))


def retain(work: Path, mine, **_) -> None:
    "What prompts cost, or bring, on the four tasks that they were not trained for."
    zoo = tiny_zoo()
    for home, source in mine(list(itertools.product(task_names(), (SHARED, CLIP, SIGLIP)))):
        path = work / "retain" / f"{home}-{source}.json"
        if path.exists():
            continue
        prompts = {
            method: VisualPrompt.load(prompt_path(work, "tiny", home, source, method, 0))
            for method in ("TVP", NEW)
        }
        others = [load_task(name) for name in task_names() if name != home]
        results = evaluate_retention(
            prompts, load_task(home), others, zoo, source=source, limit=PICTURES
        )
        rows = results.df.query("method != 'none' and task != @home")
        write(path, json.dumps(rows.drop(columns=["low", "high"]).to_dict("records")))


def drift(work: Path, mine, **_) -> None:
    """How far prompts of both recipes move the features of every model, and whether they move them
    like those of the source (`alike`)."""
    from tvp.evaluation.feature_shift import measure_feature_shift, shift_similarity
    from tvp.evaluation.runs import TransferRun

    zoo = tiny_zoo()
    found = []
    towers = {name: zoo.tower(name) for name in zoo}
    for name, source, method in itertools.product(
        task_names(), (SHARED, CLIP, SIGLIP), ("TVP", NEW)
    ):
        task = load_task(name)
        prompt = VisualPrompt.load(prompt_path(work, "tiny", name, source, method, 0))
        learn = next(task.batches("train", prompt.inner, 400))
        batch = next(task.batches("valid", prompt.inner, 200))
        moved = measure_feature_shift({method: prompt}, batch, zoo)
        moved["alike"] = (
            shift_similarity(prompt, learn, batch, zoo).loc[source, moved.target].to_numpy()
        )
        run = TransferRun(name, source, 0, task.metric, np.zeros(0), {}, towers)
        found.append(
            moved.assign(
                task=name,
                source=source,
                group=[run.target_group(target) for target in moved.target],
            )
        )
    RESULTS.mkdir(exist_ok=True)
    write(RESULTS / "drift.csv", pd.concat(found).round(4).to_csv(index=False))


def gradients_of(mllm, batch, zoo) -> dict[str, torch.Tensor]:
    """What a model wants of a prompt that has not been trained: gradient of its task loss, by part
    of the prompt."""
    prompt = VisualPrompt(zoo.size, zoo.width, adjust=tuple(IMAGE_ADJUSTMENTS))
    mllm(prompt(batch.images), batch.instructions, batch.answers).loss.backward()
    return {
        part: (prompt.delta if part == "border" else getattr(prompt, part)).grad.flatten()
        for part in ("border", *IMAGE_ADJUSTMENTS)
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "stage",
        choices=("ablate", "search", "train", "evaluate", "retain", "agree", "drift", "collect"),
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for prompts and raw results"
    )
    parser.add_argument(
        "--zoo",
        default="tiny",
        help="the models that come along, or a folder with others of the same make",
    )
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th job, from the i-th")
    args = parser.parse_args()
    i, n = map(int, args.shard.split("/"))
    torch.set_num_threads(1)
    globals()[args.stage](args.work, lambda jobs: jobs[i::n], zoo=args.zoo)
