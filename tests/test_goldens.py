"""Hold the paper's models against numbers of the reference's own code: `python tests/test_goldens.py`.

Tokens, loss, gradient, visual tokens and ranking of every golden model; saved and loaded again; Feature
Consistency Alignment (FCA) of each; the first step of the golden training run. What needs the reference's
numbers is skipped, and says so, where TVP_SHARED does not name them (see `reference/golden.py`).
"""

import os
import sys
import tempfile
from functools import cache
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))

import pandas as pd
import torch
from fastcore.test import test_close, test_eq, test_fail, test_is
from reference.golden import (
    SKIPPED,
    _golden_model_kind,
    compare_with_golden,
    golden_clip,
    golden_mllm,
    loss_errors,
    max_abs_difference,
    read_golden,
)
from torch import nn
from transformers.utils.logging import disable_progress_bar

from tvp.models.paper.loading import load_saved_adapter, save_adapter
from tvp.testing import reference_data_dir

disable_progress_bar()


def check_reference_data_dir():
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, TVP_SHARED=folder):
        test_is(reference_data_dir(), None)
        (Path(folder) / "golden").mkdir()
        test_eq(reference_data_dir(), Path(folder))
    with patch.dict(os.environ, TVP_SHARED=""):
        test_is(reference_data_dir(), None)


def check_refusals():
    with tempfile.TemporaryDirectory() as folder:
        test_fail(lambda: read_golden(folder), contains="must contain golden.json")
    unknown = {
        "config": {"qformer": {"text_input": False}, "lm": {"hidden_size": 8}},
        "cls_prompt": "{question}",
        "state_dict_keys": {},
        "family": "lab.Other",
    }
    test_fail(lambda: _golden_model_kind(unknown), contains="got lab.Other, which is none")
    tagged = _golden_model_kind({**unknown, "cls_prompt": "<a><ImageHere>", "end_sym": "###"})[1]
    expected = "<s><a><image>{}", "###", ("<s>", "<a>")
    test_eq((tagged.template, tagged.end, tagged.alone), expected)


@cache
def golden_models() -> dict:  # name -> Mllm
    "Build every golden model that was written down with its texts."
    models = {}
    for folder in sorted((reference_data_dir() / "golden").iterdir()):
        if (folder / "state_dict.safetensors").is_file() and "variants" in read_golden(folder)[0]:
            models[folder.name] = golden_mllm(folder)
    return models


def golden_folder(name: str) -> Path:
    "The folder of a golden model."
    return reference_data_dir() / "golden" / name


def token_pairs(mllm, golden: dict):
    "Yield a name, our ids and the reference's ids, for everything that golden.json has ids of."
    tokens = golden["tokens"]
    texts = golden["variants"]["varlen"]["text_input"]
    classes = golden["classes"]

    def ids(text):
        return mllm.processor.tokenizer(text, add_special_tokens=False).input_ids

    def row(adapter, text):
        ids = adapter.text.row(text, (56, 56))["input_ids"][0].tolist()
        return [i for i in ids if i != mllm.model.config.image_token_id]

    def answers(*end):
        return [list(mllm.text.answer_ids("", name, *end)) for name in classes]

    yield "candidates", answers(), tokens["class_ids_nospecial"]
    if "wrap_before_ids" in tokens:
        tags = [tokens["wrap_before_ids"], tokens["wrap_after_ids"]]
        yield "tags", [ids(tag) for tag in mllm.wrapper.alone[1:]], tags
    if "class_plus_end_sym_ids" in tokens:
        yield "answers", answers(mllm.end), tokens["class_plus_end_sym_ids"]
    if "prompt_ids_special" in tokens:
        ours = [row(mllm, text) for text in texts]
        yield "instructions in the loss", ours, tokens["prompt_ids_special"]
        ours = [row(mllm.scorer, text) for text in texts]
        yield "in ranking", ours, tokens["prompt_ids_nospecial"]
    if (reference := tokens.get("class_ids_special_as_text_output")) is not None:
        begin = tokens["special"]["bos_token_id"]
        theirs = [r[1:] if r[0] == begin else r for r in reference]
        yield "answers", answers(mllm.end), theirs
    if "qformer_text_ids" in tokens:
        ours = [mllm.text.row(text, (56, 56))["qformer_input_ids"][0].tolist() for text in texts]
        yield "for the Q-Former", ours, tokens["qformer_text_ids"]


def check_tokens():
    for name, mllm in golden_models().items():
        loss, ranked = (repr(t.render("INSTRUCTION")) for t in (mllm.text, mllm.scorer.text))
        print(f"{name:13} {mllm} reads {loss} and ranks with {ranked}")
        pairs = list(token_pairs(mllm, read_golden(golden_folder(name))[0]))
        for _, ours, theirs in pairs:
            test_eq(ours, theirs)
        print(f"{name:13} equal: {', '.join(what for what, _, _ in pairs)}")


@cache
def golden_tables() -> dict:  # name -> DataFrame of distances
    "Compare every golden model."
    models = golden_models()
    return {name: compare_with_golden(mllm, golden_folder(name)) for name, mllm in models.items()}


def check_numbers():
    tables = golden_tables()
    for table in tables.values():
        assert table.ok.all(), table[~table.ok]
    both = pd.concat(tables, names=["model", None]).reset_index("model").astype({"tolerance": str})
    worst = both.pivot_table(
        index=["quantity", "tolerance"], columns="model", values="gap", aggfunc="max", sort=False
    )
    print(worst.map(lambda value: "" if pd.isna(value) else f"{value:.0e}").to_string())


def check_reference_ranking():
    # by default the golden BLIVA ranks as the reference does, which forgets the patches
    for name, mllm in golden_models().items():
        if not mllm.wrapper.reference_ranking:
            continue
        whole = golden_mllm(golden_folder(name), reference_ranking=False)
        golden, io = read_golden(golden_folder(name))
        images = io["in.image_uint8"].float() / 255
        texts = golden["variants"]["varlen"]["text_input"]
        scores = [m.rank(images, texts, golden["classes"]) for m in (mllm, whole)]
        print(
            f"{name}: with patches the scores move by up to {max_abs_difference(*scores):.2f}, and "
            f"the best candidates from {scores[0].argmax(1).tolist()} to {scores[1].argmax(1).tolist()}"
        )
        test_eq(
            set(loss_errors(whole, golden, io, "varlen").items()),
            set(loss_errors(mllm, golden, io, "varlen").items()),
        )


def check_saved():
    for name, mllm in golden_models().items():
        table = golden_tables()[name]
        with tempfile.TemporaryDirectory() as folder:
            again = load_saved_adapter(save_adapter(mllm, folder), device="cpu")
        test_eq(compare_with_golden(again, golden_folder(name)).gap.tolist(), table.gap.tolist())
        print(f"{name:13} the same {len(table)} distances from a folder")


def check_consistency():
    # FCA works with each of them; the reference's works with MiniGPT-4 alone
    for name, mllm in golden_models().items():
        io = read_golden(golden_folder(name))[1]
        clean = io["in.image_uint8"].float() / 255
        border = torch.zeros(3, 56, 56)
        border[:, :8] = 0.3
        texts = ["This is a photo of a"] * 3
        border = border.requires_grad_()
        distance = mllm.visual_tokens(clean + border, texts) - mllm.visual_tokens(clean, texts)
        fca = distance.norm(dim=-1).mean()
        fca.backward()
        print(
            f"{name:13} {mllm.visual_tokens(clean, texts).shape[1]:2} visual tokens, FCA {fca:.3f}, "
            f"norm of its gradient {border.grad.norm():.3f}"
        )
        assert fca > 0 and border.grad.norm() > 0


def check_first_training_step():
    # before any update; the notebook of `tvp.training.learner` repeats all five steps
    folder = golden_folder("train_minigpt4_224")
    mllm = golden_mllm(folder)
    clip = golden_clip(folder)
    golden, io = read_golden(folder)
    images = io["train.images41_uint8"][:2].repeat_interleave(4, 2).repeat_interleave(4, 3)
    framed = nn.functional.pad(images.float() / 255, [golden["pad"]] * 4)
    names = [golden["classes"][i] for i in io["train.labels"][:2]]
    run = golden["runs"]["tvp224"]
    loss = mllm(framed, ["This is a photo of a"] * 2, names).loss.item()
    texts = clip.text_features([f"this is a photo of a {name}" for name in names])
    cosines = (clip.image_features(framed) * texts).sum(-1)
    score = (clip.logit_scale * cosines).mean().item()
    print(
        f"task {loss:.6f}, apart by {abs(loss - run['main'][0]):.0e}; TSE {score:.5f}, apart by "
        f"{abs(score - run['clip'][0]):.0e}"
    )
    test_close(loss, run["main"][0], 1e-5)
    test_close(score, run["clip"][0], 1e-4)


if __name__ == "__main__":
    check_reference_data_dir()
    check_refusals()
    if reference_data_dir() is None:
        print(SKIPPED)
    else:
        check_tokens()
        check_numbers()
        check_reference_ranking()
        check_saved()
        check_consistency()
        check_first_training_step()
        print("all equal within their tolerances")
