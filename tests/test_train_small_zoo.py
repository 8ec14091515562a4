"""The training of the small zoo: every part of it, on few scenes and for single updates.

python tests/test_train_small_zoo.py
"""

import io
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from fastcore.test import expect_fail, test_close, test_eq
from torch import Generator, nn

from tvp._files import RunLock
from tvp._loading import load_safetensors
from tvp.models.adapters import Mllm
from tvp.models.tiny import CANVAS_SIZE, TINY_MODELS, build_mllm, load_tiny, tiny_processor
from tvp.tasks.drawing import AGREEMENT_TEMPLATE, CLASSIFICATION_INSTRUCTION, SHAPES

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "studies"))

import train_small_zoo
from train_small_zoo import (
    TOWER_SCHEDULES,
    InstructionCollator,
    SupervisionHeads,
    classify_question,
    evaluate_skills,
    generate_scenes,
    normalize,
    object_multi_hot,
    precompute_features,
    supervision_loss,
    train_language,
    train_loop,
    train_tower,
    train_zoo,
)

QUESTIONS = [CLASSIFICATION_INSTRUCTION, AGREEMENT_TEMPLATE.format("r")]
ANSWERS = ["purple triangle", "yes"]
FOLDER = TemporaryDirectory()
SMALL = Path(FOLDER.name)


@cache
def scenes():
    "The scenes that the tests share: 100 of them to train on."
    return generate_scenes(SMALL, n=2100, seed=9)


def test_scenes():
    "Scenes are drawn once and read afterwards."
    test_eq(len(scenes()), 2100)
    with patch("train_small_zoo.draw_scenes", side_effect=AssertionError("drawn again")):
        test_eq(generate_scenes(SMALL, n=2100, seed=9).images, scenes().images)


def test_supervision():
    "What a tower is asked, and which objects are there."
    tokens = torch.randn(4, 37, 64)
    loss, right = supervision_loss(SupervisionHeads()(tokens), scenes()[:4], framed=2)
    assert loss > 0 and set(right) == {"count", "objects", "digit", "letter", "color"}
    some = scenes()[:50]
    present = object_multi_hot(some)
    test_eq((present.sum(1) > 0), some.count > 0)
    assert (present.sum(1) <= some.count).all()  # two equal objects count once


def fit_line(folder, stop_at=None):
    "Weights of a small network after six steps, with or without a pause."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 1))

    def loss_of(step):
        if step == stop_at:
            signal.raise_signal(signal.SIGINT)
        x = torch.randn(8, 40, generator=Generator().manual_seed(step))
        return (net(x) - x.sum(1, keepdim=True)).square().mean(), {}

    train_loop("line", net, loss_of, 6, (1e-2, 1e-2), folder)
    return net[0].weight.detach()


def test_loop():
    "A training that was stopped goes on, and the pause leaves no trace."
    # also where the parent ignores it, as nohup and a shell's & do
    signal.signal(signal.SIGINT, signal.default_int_handler)
    (one := SMALL / "one").mkdir()
    (two := SMALL / "two").mkdir()
    whole = fit_line(one)
    with expect_fail(KeyboardInterrupt):
        fit_line(two, stop_at=3)
    # the update under way was finished
    test_eq(torch.load(two / "line.checkpoint.pt", weights_only=True)["step"], 4)
    test_eq(fit_line(two), whole)
    test_eq([file.name for file in two.iterdir()], [])


def test_towers():
    "Towers and CLIP; the same seed gives the same tower."
    numbers = train_tower("tiny-clip", scenes(), SMALL, steps=1, seed=3, batch_size=8)
    numbers |= train_tower("clip", scenes(), SMALL, steps=1, seed=4, batch_size=8)
    assert (SMALL / "clip.safetensors").exists()
    assert all(0 <= value <= 1 for name, value in numbers.items() if name != "contrast")
    before = load_safetensors(SMALL / "clip.safetensors")
    train_tower("clip", scenes(), SMALL, steps=1, seed=4, batch_size=8)
    for name, value in load_safetensors(SMALL / "clip.safetensors").items():
        test_eq(value, before[name])


def test_collator():
    """What a model reads while it trains is what it is given later, token by token: the training's
    layout, written for speed, against the models' own processors, and the loss against `Mllm`'s."""
    images = torch.rand(2, 3, CANVAS_SIZE, CANVAS_SIZE)
    for name, (_, language, template) in TINY_MODELS.items():
        mllm = Mllm(
            build_mllm(name),
            tiny_processor(name),
            template=template.format,
            name=name,
            end="</s>",
        )
        batch = InstructionCollator(name).batch(list(zip(QUESTIONS, ANSWERS)))
        if language == "t5":
            test_eq(batch["input_ids"], mllm.model_inputs(images, QUESTIONS)["input_ids"])
        with torch.no_grad():
            loss = mllm.model(pixel_values=normalize(images), **batch).loss
            test_close(loss, mllm(images, QUESTIONS, ANSWERS).loss, 1e-5)


def test_language():
    "A language model behind the tower of `test_towers`, and what it can do."
    features = precompute_features("clip", scenes(), SMALL)
    test_eq(features.shape, (2100, 37, 64))
    train_language("tiny-llava", scenes(), features, SMALL, steps=1, seed=5, batch_size=8)
    loaded = load_tiny("tiny-llava", SMALL)
    images = torch.rand(2, 3, CANVAS_SIZE, CANVAS_SIZE)
    test_eq(loaded.rank(images, QUESTIONS, ["yes", "no"]).shape, (2, 2))
    assert all(0 <= share <= 1 for share in evaluate_skills(loaded, scenes()[:60]).values())


def test_questions():
    "Which ability a question tests."
    test_eq(classify_question(CLASSIFICATION_INSTRUCTION, "ring"), ("shape", SHAPES))
    test_eq(classify_question(CLASSIFICATION_INSTRUCTION, "red ring and a blue star"), None)
    test_eq(classify_question("How many objects are there?", "3")[0], "count")


def test_zoo():
    "A seed is added to every part's; one folder holds one zoo, and one run at a time."
    seeds = []

    def train_tower(name, pool, folder, steps, seed):
        seeds.append(seed)

    with patch.multiple(
        train_small_zoo, generate_scenes=lambda folder: None, train_tower=train_tower
    ):
        train_zoo(SMALL, ["shared", "siglip"], seed=100)
    test_eq(seeds, [TOWER_SCHEDULES[name][1] + 100 for name in ("shared", "siglip")])
    assert not any((SMALL / f"{name}.json").exists() for name in ("shared", "siglip"))
    for wrong in (-1, 0.5, "0", True, None):
        with expect_fail((TypeError, ValueError), "`seed` must be a whole number"):
            train_zoo(SMALL, seed=wrong)
    with expect_fail(ValueError, "`seed` must be 100: "):
        train_zoo(SMALL, ["shared"], seed=3)
    with RunLock(SMALL), expect_fail(BlockingIOError, "another run is writing"):
        train_zoo(SMALL, ["shared"], seed=100)


def failing(*line):
    "What the command says when it refuses a line, with exit status 2."
    told = io.StringIO()
    with redirect_stdout(told), redirect_stderr(told):
        try:
            train_small_zoo.main(list(line))
        except SystemExit as stop:
            test_eq(stop.code, 2)
    return told.getvalue()


def test_command():
    "The command hands on what was asked for, and refuses what it does not know."
    told = io.StringIO()
    with patch("train_small_zoo.train_zoo", print), redirect_stdout(told):
        test_eq(train_small_zoo.main(["--out", "zoo"]), 0)
        line = ["--out", "zoo", "--seed", "100", "--parts", "clip", "tiny-llava"]
        test_eq(train_small_zoo.main(line), 0)
    test_eq(told.getvalue(), "zoo None 0\nzoo ['clip', 'tiny-llava'] 100\n")
    assert "tiny-llava" in failing("--parts", "tiny-gpt")
    assert "--parts" in failing("--parts")
    assert "--seed must be a whole number >= 0, got -1" in failing("--out", str(SMALL), "--seed=-1")
    assert "--seed must be 100: " in failing("--out", str(SMALL), "--seed", "3")


def main():
    "Run the tests and say what each has checked."
    for test in (
        test_scenes,
        test_supervision,
        test_loop,
        test_towers,
        test_collator,
        test_language,
        test_questions,
        test_zoo,
        test_command,
    ):
        print(f"{test.__name__}: {test.__doc__}", flush=True)
        test()


if __name__ == "__main__":
    main()
