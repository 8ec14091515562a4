"""Hold ChatGLM against its published code, number for number: `python tests/test_golden_chatglm.py`.

Positions and masks; logits, losses, likelihoods and gradients; scores of candidates; padding and generation.
Skipped, and says so, where TVP_SHARED does not name the reference's numbers (see `reference/golden_chatglm.py`).
"""

import json
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent))

import pandas as pd
import torch
from fastcore.test import test_eq
from reference.golden import SKIPPED
from reference.golden_chatglm import golden_chatglm
from safetensors.torch import load_file

from tvp.models.paper.modeling_chatglm import make_attention_mask, make_position_ids
from tvp.models.ranking import build_prefix_tree, token_log_probs, tree_attention_mask
from tvp.models.transformers_compat import output_cache
from tvp.testing import reference_data_dir

CASES = ("text1", "text2_noteop", "batch2", "mask_mid", "image_batch2", "image_single")


@cache
def reference() -> SimpleNamespace:  # golden: of golden.json; io: tensors; models: tag -> modules
    "Read the numbers, and build the models of both kinds of residual."
    folder = reference_data_dir() / "golden" / "visualglm"
    models = {
        "": golden_chatglm(folder),
        ".alpha_actual_layers": golden_chatglm(folder, residual_layers=3),
    }
    golden = json.loads((folder / "golden.json").read_text())
    return SimpleNamespace(golden=golden, io=load_file(folder / "io.safetensors"), models=models)


def check_positions_and_masks():
    # ours are position + step, and step; the original's are position, and step
    io = reference().io
    config = reference().models[""][0].config
    for case in CASES:
        positions = make_position_ids(io[f"{case}.input_ids"], None, config)
        theirs = torch.stack([positions[0] - positions[1], positions[1]], 1)
        test_eq(theirs, io[f"{case}.position_ids"])
        test_eq(
            make_attention_mask(positions, None, 0, torch.float32) < 0,
            io[f"{case}.attention_mask_bool_true_is_masked"],
        )
        print(f"{case:13} {tuple(io[f'{case}.input_ids'].shape)} equal")


def embeddings(model, ids, images, start):
    "Embed a text with the images' tokens in its middle."
    embeds = model.get_input_embeddings()(ids)
    if images is None:
        return embeds
    return torch.cat([embeds[:, :start], images, embeds[:, start + images.shape[1] :]], 1)


def distances(case: str, tag: str) -> dict[str, float]:
    "Measure the largest distance of each quantity."
    io = reference().io
    model, projection = reference().models[tag]
    ids = io[f"{case}.input_ids"]
    labels = io[f"{case}.labels"]
    start = reference().golden["cases"][case].get("pre_image_length")
    queries = None if start is None else io[f"{case}.qformer_output"].clone().requires_grad_()
    images = None if start is None else projection(queries)
    out = model(
        inputs_embeds=embeddings(model, ids, images, start),
        position_ids=make_position_ids(ids, None, model.config),
        labels=labels,
    )
    chosen = out.logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    counted = labels[:, 1:] >= 0
    pairs = {
        "logits": out.logits,
        "loss": out.loss[None],
        "answer_mean_loglik": (chosen * counted).sum(1) / counted.sum(1),
    }
    if start is not None:
        gradients = torch.autograd.grad(out.loss, [images, queries])
        pairs["grad_image_embeds"], pairs["grad_qformer_output"] = gradients
    return {
        name: (value - io[f"{case}.{name}{tag}"]).abs().max().item()
        for name, value in pairs.items()
    }


def check_numbers():
    tags = reference().models
    table = pd.DataFrame({case + tag: distances(case, tag) for case in CASES for tag in tags}).T
    limits = {name: 1e-6 if name.startswith("grad") else 1e-5 for name in table}
    assert not (table > pd.Series(limits)).any(axis=None), table
    print(table.map("{:.0e}".format).to_string())


@torch.no_grad()
def candidate_scores(model, embeds, ids, plan):  # plain and packed, each (B, N)
    "Score candidates by one pass each, and side by side behind the prompt's keys and values."
    positions = make_position_ids(ids, None, model.config)
    batch = len(embeds)
    plain = []
    for tokens in plan:
        answer = torch.tensor(tokens).expand(batch, -1)
        both = torch.cat([embeds, model.get_input_embeddings()(answer)], 1)
        longer = torch.cat([positions, positions[..., -1:] + torch.arange(1, len(tokens) + 1)], -1)
        logits = model(inputs_embeds=both, position_ids=longer).logits
        plain.append(token_log_probs(logits[:, -len(tokens) - 1 : -1], answer).mean(1))
    out = model(inputs_embeds=embeds, position_ids=positions)
    tree = build_prefix_tree(plan, "cpu")
    scores = out.logits[:, -1].log_softmax(-1)[:, [tokens[0] for tokens in plan]]
    mask = tree_attention_mask(torch.ones(embeds.shape[:2]), tree.visible, embeds.dtype)
    steps = positions[..., -1:] + 1 + tree.depth
    logits = model(tree.token.expand(batch, -1), mask, steps, output_cache(out)).logits
    gains = token_log_probs(logits[:, tree.node], tree.next_token.expand(batch, -1))
    scores = scores.index_add(1, tree.candidate, gains)
    return torch.stack(plain, 1), scores / torch.tensor([len(tokens) for tokens in plan])


def check_candidates():
    io = reference().io
    for case in ("cands_text", "cands_image"):
        about = reference().golden["cases"][case]
        ids = torch.tensor([about["prompt_ids_with_specials"]])
        plan = tuple(map(tuple, about["candidates"]))
        start = about["pre_image_length"]
        for tag, (model, projection) in reference().models.items():
            images = None if start is None else projection(io[f"{case}.qformer_output"])
            ids = ids.expand(1 if start is None else len(images), -1)
            scores = candidate_scores(model, embeddings(model, ids, images, start), ids, plan)
            gaps = [(s - io[f"{case}.cand_mean_loglik{tag}"]).abs().max().item() for s in scores]
            print(f"{case + tag:31} plain apart by {gaps[0]:.0e}, packed by {gaps[1]:.0e}")
            assert max(gaps) < 1e-5


def check_padding():
    # the original's positions count the padding, ours do not: rotations only see differences
    io = reference().io
    model = reference().models[""][0]
    ids = io["leftpad2.input_ids"]
    mask = io["leftpad2.attention_mask_2d"]
    theirs = io["leftpad2.position_ids"].transpose(0, 1)
    for positions in (None, torch.stack([theirs.sum(0), theirs[1]])):
        gap = (model(ids, mask, positions).logits - io["leftpad2.logits"])[mask.bool()].abs().max()
        print(f"padded by two, apart by {gap:.0e}")
        assert gap < 1e-5


def check_generation():
    # greedy words, with and without a cache
    io = reference().io
    ids = io["greedy_image.input_ids"]
    start = reference().golden["cases"]["image_batch2"]["pre_image_length"]
    models = reference().models
    for tag, name in zip(models, ("greedy_image", "greedy_image_alpha_actual_layers")):
        model, projection = models[tag]
        embeds = embeddings(model, ids, projection(io["image_batch2.qformer_output"]), start)
        for use_cache in (True, False):
            out = model.generate(
                input_ids=ids,
                inputs_embeds=embeds,
                max_new_tokens=6,
                do_sample=False,
                use_cache=use_cache,
            )
            test_eq(out, io[f"{name}.output_ids"])
    print("words equal:", out[:, -6:].tolist())


if __name__ == "__main__":
    if reference_data_dir() is None:
        print(SKIPPED)
    else:
        print(reference().golden["what"])
        check_positions_and_masks()
        check_numbers()
        check_candidates()
        check_padding()
        check_generation()
