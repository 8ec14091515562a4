"""Where does a prompt stop helping? The studies behind nbs/explanations/06_bad_pictures.ipynb and 07_beyond_the_task.ipynb.

    python benchmarks/transfer_study.py train  --work DIR     # the prompts, if they are not there: those of the transfer study
    python benchmarks/beyond_study.py tasks       --work DIR     # other images with the same answers, and other tasks
    python benchmarks/beyond_study.py corruptions --work DIR     # nineteen corruptions at three severities; needs imagecorruptions
    python benchmarks/beyond_study.py collect     --work DIR     # tables into benchmarks/results

Every stage skips what is there already, so it can be interrupted. `--shard 0/2` and `--shard 1/2`
share a stage between two processes.
"""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Generator
from transfer_study import SEEDS, prompt_path, run_stage, write

from tvp.tasks.corruptions import CORRUPTIONS, all_corruptions
from tvp.tasks.bundled import IMAGE_SIZE, _draw_groups, degrade_images
from tvp.prompts.visual_prompt import VisualPrompt
from tvp.training.recipes import PAPER_METHODS, get_recipe
from tvp.evaluation.studies import evaluate_generalization, evaluate_retention
from tvp.tasks.task import Split, Task
from tvp.tasks.loading import load_task, task_names
from tvp.evaluation.results import TransferResults
from tvp.evaluation.transfer import evaluate_transfer
from tvp.tasks.drawing import (
    COLORS,
    COUNTING_INSTRUCTION,
    DIGITS,
    CLASSIFICATION_INSTRUCTION,
    SHAPES,
    _uniform,
    draw_backgrounds,
    draw_objects,
    load_glyphs,
    count_phrase,
    alpha_blend,
    place_glyphs,
    jitter_colors,
)
from tvp._images import random_integers
from tvp.models.zoo import load_zoo

SOURCE = "tiny-minigpt4"
SEVERITIES = (1, 3, 5)
# of each task; of each corruption at each severity
PICTURES = 200
BAD_PICTURES = 60
# the source, two on its encoder, two on others
SOME = ("tiny-minigpt4", "tiny-vpgtrans", "tiny-instructblip", "tiny-llava", "tiny-llava-siglip")
CAMERAS = {
    "good camera": dict(contrast=0.9, blotches=0.02, light=1.0),
    "dark room": dict(contrast=0.5, blotches=0.05, light=0.5),
}
RESULTS = Path(__file__).parent / "results"


def photographed(images: torch.Tensor, camera: str, g: Generator) -> torch.Tensor:
    "Drawings through one of CAMERAS."
    how = CAMERAS[camera]
    return degrade_images(images.clamp(0, 1) * how["light"], how["contrast"], how["blotches"], g)


def draw_shapes(n: int, camera: str, g: Generator) -> Split:
    "The task `shapes`, through another camera."
    shape = random_integers((n, 1), len(SHAPES), g)
    color = random_integers((n, 1), len(COLORS), g)
    images, _ = draw_backgrounds(n, IMAGE_SIZE, g)
    draw_objects(
        images, torch.ones(n, dtype=torch.long), shape, color, _uniform((n, 1), 9, 17, g), g
    )
    return Split(
        photographed(images, camera, g),
        [CLASSIFICATION_INSTRUCTION] * n,
        shape[:, 0].tolist(),
        [SHAPES[i] for i in shape[:, 0]],
    )


def draw_counting(n: int, camera: str, g: Generator) -> Split:
    "The task `counting`, through another camera."
    images, objects = _draw_groups(n, 1, g)
    return Split(
        photographed(images, camera, g),
        [COUNTING_INSTRUCTION] * n,
        [len(o) - 1 for o in objects],
        [count_phrase(len(o)) for o in objects],
    )


def draw_printed(n: int, g: Generator) -> Split:
    "Printed digits, through the camera of the task `digits`, which has handwriting."
    label = random_integers((n,), 10, g)
    bank = load_glyphs()[0]
    images, _ = draw_backgrounds(n, IMAGE_SIZE, g)
    middle = torch.full((n,), IMAGE_SIZE / 2)
    mask = place_glyphs(
        bank[label, random_integers((n,), bank.shape[1], g)],
        _uniform((n,), 22, 30, g),
        middle,
        middle,
        IMAGE_SIZE,
        g,
    )
    alpha_blend(images, torch.arange(n), mask, jitter_colors(random_integers((n,), len(COLORS), g), g))
    return Split(
        degrade_images(images, 0.5, 0.03, g), [CLASSIFICATION_INSTRUCTION] * n, label.tolist(), [DIGITS[i] for i in label]
    )


def relatives(home: Task) -> list[Task]:
    "Other data with the candidates of a task."
    g = Generator().manual_seed(9)
    if home.name == "digits":
        return [replace(home, name="printed digits", test=draw_printed(PICTURES, g))]
    draw = {"shapes": draw_shapes, "counting": draw_counting}.get(home.name)
    return (
        [
            replace(home, name=f"{home.name}, {camera}", test=draw(PICTURES, camera, g))
            for camera in CAMERAS
        ]
        if draw
        else []
    )


def prompts_of(work: Path, home: str, methods=PAPER_METHODS) -> dict[str, VisualPrompt]:
    "The prompts of the transfer study for one task: `method seed` -> prompt."
    epochs = get_recipe("TVP").epochs
    return {
        f"{method} {seed}": VisualPrompt.load(prompt_path(work, home, SOURCE, method, epochs, seed))
        for method in methods
        for seed in SEEDS
    }


def by_seed(results: TransferResults) -> TransferResults:
    "Runs of all seeds at once, as a run for each seed."
    runs = []
    for run in results.runs:
        for seed in SEEDS:
            scores = {
                (method.rpartition(" ")[0] or method, target): s
                for (method, target), s in run.scores.items()
                if method in ("none", "frame") or method.endswith(f" {seed}")
            }
            runs.append(replace(run, scores=scores, seed=seed))
    return TransferResults(runs)


def save(path: Path, results: TransferResults) -> None:
    """Rows for each group of models (`group`), for each model (`target`), and for TVP against EVP
    by group."""
    results = by_seed(results)
    compared = results.compare("TVP", "EVP").assign(method="TVP - EVP")
    write(
        path, pd.concat([results.summary(), compared, results.mean()]).round(4).to_csv(index=False)
    )


def tasks(work: Path, mine) -> None:
    "Each task's prompts on every task, and on other data with the same answers."
    zoo = load_zoo("tiny")
    for home in mine(task_names()):
        path = work / "beyond" / f"tasks-{home}.csv"
        if path.exists():
            continue
        task = load_task(home)
        prompts = prompts_of(work, home, PAPER_METHODS[1:]) | {"frame": VisualPrompt(zoo.size, zoo.width)}
        how = dict(source=SOURCE, limit=PICTURES, targets=SOME)
        results = evaluate_retention(
            prompts, task, [load_task(name) for name in task_names() if name != home], zoo, **how
        )
        if others := relatives(task):
            results = TransferResults(
                [
                    *results.runs,
                    *evaluate_generalization(prompts, task, others, zoo, **how).runs[1:],
                ]
            )
        save(path, results)


def corruptions(work: Path, mine) -> None:
    "Two tasks with bad images."
    zoo = load_zoo("tiny")
    for home, kind in mine(
        [(home, kind) for home in ("shapes", "digits") for kind in ("clean", *CORRUPTIONS)]
    ):
        path = work / "beyond" / f"corruption-{home}-{kind}.csv"
        if path.exists():
            continue
        bad = None if kind == "clean" else all_corruptions(kind, SEVERITIES)
        save(
            path,
            evaluate_transfer(
                prompts_of(work, home, PAPER_METHODS[1:]),
                load_task(home),
                zoo,
                source=SOURCE,
                limit=BAD_PICTURES,
                targets=SOME,
                corruption=bad,
            ),
        )


def collect(work: Path, mine) -> None:
    "Small tables of all results."
    for name, pattern in (
        ("beyond_tasks", "tasks-*.csv"),
        ("beyond_corruptions", "corruption-*.csv"),
    ):
        tables = [pd.read_csv(path) for path in sorted((work / "beyond").glob(pattern))]
        if not tables:
            continue
        # one source, one metric
        rows = pd.concat(tables).drop(columns=["source", "metric", "tower", "baseline"])
        write(
            RESULTS / f"{name}.csv",
            rows[rows.target.isna() | rows.method.isin(["EVP", "TVP"])].to_csv(index=False),
        )


if __name__ == "__main__":
    run_stage(__doc__, tasks, corruptions, collect)
