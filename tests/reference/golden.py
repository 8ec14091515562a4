"""Small models whose numbers the reference code has written down, so that ours can be held against
the paper's own implementation.

A golden folder holds a tiny random model in LAVIS's format, inputs, and everything the released
reference code computed from them: token ids, visual tokens, loss, the gradient at the image, ranking
scores, and what the language model received. It proves arithmetic (what is added, masked, normalized,
in which order), not that a published checkpoint loads; the former is where mistakes are silent.

    golden.json                     geometry, texts, token ids, the meaning of every tensor
    state_dict.safetensors          the weights under LAVIS's names
    io.safetensors                  inputs and outputs
    tokenizer/, qformer_tokenizer/  as they are

`golden_mllm` builds the model of any such folder with the same functions that load the large models
(`tvp.models.paper.modeling_lavis`, `tvp.models.paper.loading`), and goes by what `golden.json` says,
not by what the folder is called. The folders do not come with this repository: the environment
variable TVP_SHARED names the place that holds them in `golden/`.
"""

import json
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tvp.models.adapters import Clip, Mllm
from tvp.models.paper.loading import build_adapter, build_processor
from tvp.models.paper.specs import ALL_PREFIXES, PROMPT_TEMPLATES, PromptTemplate

SKIPPED = "skipped: the reference's numbers are not here. TVP_SHARED names the folder that holds them"


def read_golden(
    folder: str | Path,  # with golden.json and io.safetensors
) -> tuple[dict, dict[str, Tensor]]:  # what golden.json says; inputs and outputs
    "A golden folder without its weights."
    from tvp._loading import load_safetensors

    folder = Path(folder)
    if not (folder / "golden.json").is_file():
        raise ValueError(f"`folder` must contain golden.json, and {folder} does not.")
    return json.loads((folder / "golden.json").read_text()), load_safetensors(
        folder / "io.safetensors"
    )


def _golden_weights(
    folder: str | Path,  # of a model, or of a training run that borrows one
    # the model's own folder, its golden.json, its weights under LAVIS's names
) -> tuple[Path, dict, dict[str, Tensor]]:
    """The weights of a golden model. A training run borrows those of a model folder and replaces
    single tensors, as its golden.json says."""
    from tvp._loading import load_safetensors

    folder = Path(folder)
    said, tensors = read_golden(folder)
    if "config" in said:
        return folder, said, load_safetensors(folder / "state_dict.safetensors")
    borrowed = re.search(r"(\S+)/state_dict\.safetensors", said["weights"])
    base = (folder / borrowed[1]).resolve()
    weights = load_safetensors(base / "state_dict.safetensors")
    for name, key in re.findall(r"(\S+) replaced by io\['([^']+)'\]", said["weights"]):
        if name in weights:
            weights[name] = tensors[key]
    return base, read_golden(base)[0], weights


def _golden_model_kind(
    golden: dict,  # of golden.json
    # name of the class in `tvp.models.paper.modeling_lavis`, and how the reference wraps its inputs
) -> tuple[str, PromptTemplate]:
    "The kind of model that a golden.json describes."
    reads = golden["config"]["qformer"].get("text_input", False)
    if "<ImageHere>" in golden["cls_prompt"]:
        before, after = golden["cls_prompt"].split("<ImageHere>")
        line = f"<s>{before}<image>{after}" + "{}"
        alone = tuple(filter(None, ("<s>", before, after)))
        return "LavisBlip2", replace(
            PROMPT_TEMPLATES["minigpt4"],
            template=line,
            ranking=line,
            end=golden["end_sym"],
            alone=alone,
        )
    if "vision_project.weight" in golden["state_dict_keys"]:
        return "Bliva", PROMPT_TEMPLATES["bliva"]
    if "d_model" in golden["config"]["lm"]:
        return "LavisInstructBlip" if reads else "LavisBlip2", PROMPT_TEMPLATES["blip2-t5"]
    if reads:
        return "LavisInstructBlip", PROMPT_TEMPLATES["instructblip"]
    raise ValueError(
        "golden.json must describe a MiniGPT-4, VPGTrans, BLIP-2 T5, InstructBLIP or BLIVA, got "
        f"{golden.get('family')}, which is none."
    )


def _golden_config(
    golden: dict,  # of golden.json
    model_class: type,  # of `tvp.models.paper.modeling_lavis`
    # config of that class
    positions: int,  # of the encoder: patches and the class token
):
    "The geometry of a golden model."
    vit, q, lm = (golden["config"][part] for part in ("vit", "qformer", "lm"))
    vision = dict(
        hidden_size=vit["embed_dim"],
        intermediate_size=vit["mlp_hidden"],
        num_hidden_layers=vit["depth"],
        num_attention_heads=vit["num_heads"],
        patch_size=vit["patch_size"],
        image_size=round((positions - 1) ** 0.5) * vit["patch_size"],
        layer_norm_eps=vit["block_norm_eps"],
    )
    same = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "layer_norm_eps",
        "hidden_act",
        "max_position_embeddings",
        "vocab_size",
    )
    qformer = {
        **{k: q[k] for k in same if q.get(k) is not None},
        "cross_attention_frequency": q["cross_attention_freq"],
    }
    text = {
        "model_type": "t5" if "d_model" in lm else "llama",
        **{k: v for k, v in lm.items() if v is not None},
    }
    # the reference adds tokens to some
    text["vocab_size"] = golden["config"].get("lm_num_embeddings", lm["vocab_size"])
    return model_class.config_class(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=q["num_query_tokens"],
        image_token_index=0,
        vision_norm_eps=vit["ln_vision_eps"],
    )


@contextmanager
def _no_progress_bar():
    "No progress bar of transformers: these models load in a tenth of a second."
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def golden_mllm(
    folder: str | Path,  # of a model, or of a training run that borrows one
    # rank as the reference does, also where it forgets BLIVA's patches
    reference_ranking: bool = True,
) -> Mllm:  # the reference's tiny model
    "A model of the reference with the reference's arithmetic, in transformers' classes."
    from transformers import AutoTokenizer

    from tvp.models.paper import modeling_lavis as lavis

    base, golden, weights = _golden_weights(folder)
    if "qformer" not in golden["config"]:
        raise ValueError(
            f"`folder` must hold a model of LAVIS's form, got {folder}. ChatGLM's is read by "
            "golden_chatglm."
        )
    form, wrapper = _golden_model_kind(golden)
    model_class = getattr(lavis, form)
    config = _golden_config(golden, model_class, weights["visual_encoder.pos_embed"].shape[1])
    with _no_progress_bar():
        model, report = lavis.load_from_parts(
            model_class, config, {"golden": (weights, ALL_PREFIXES)}
        )
    reads = (
        AutoTokenizer.from_pretrained(base / "qformer_tokenizer", trust_remote_code=False)
        if (base / "qformer_tokenizer").is_dir()
        else None
    )
    normalise = {f"image_{what}": golden[f"normalize_{what}"] for what in ("mean", "std")}
    processor = build_processor(
        model,
        AutoTokenizer.from_pretrained(base / "tokenizer", trust_remote_code=False),
        wrapper,
        reads,
        **normalise,
    )
    mllm = build_adapter(model, processor, wrapper, f"golden-{golden['name']}", reference_ranking)
    mllm.report = report
    return mllm


@contextmanager
def _record_language_model_calls(
    # yields a list that receives the keyword arguments of every forward pass of the language model
    mllm: Mllm,  # with a `language_model` inside
):
    "Listen in on the language model."
    calls = []
    handle = mllm.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    try:
        yield calls
    finally:
        handle.remove()


def _drop_padding(
    values: Tensor,  # (B, L, ...)
    mask: Tensor,  # (B, L), 1 where there is something
) -> Tensor:  # (all real entries, ...), row after row
    "A batch without its padding."
    return values[mask.bool()]


def max_abs_difference(
    ours: Tensor,  # any shape
    theirs: Tensor,  # the same, if all is well
) -> float:  # largest difference; infinite if the shapes differ
    "How far two tensors are apart."
    return (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf")


def loss_errors(
    mllm: Mllm,  # from `golden_mllm`, or one that should compute the same
    golden: dict,  # of golden.json
    io: dict[str, Tensor],  # of io.safetensors
    variant: str,  # "default" or "varlen"
) -> dict[str, float]:  # quantity: distance from the reference
    """The loss, its gradient at the image, the visual tokens, and what the language model
    received."""
    texts = golden["variants"][variant]
    images = (io["in.image_uint8"].float() / 255).requires_grad_()
    with _record_language_model_calls(mllm) as calls:
        out = mllm(images, texts["text_input"], texts["text_output"])
    out.loss.backward()
    gradient = images.grad * torch.tensor(golden["normalize_std"])[:, None, None]
    queries = golden["config"]["qformer"]["num_query_tokens"]
    ours = {
        "loss": out.loss.detach(),
        "image_feats": out.visual_tokens[:, :queries].detach(),
        "patch_feats": out.visual_tokens[:, queries:].detach(),
        "loss_grad_image": gradient,
        "loss_grad_image_stride4": gradient[:, :, ::4, ::4],
        "loss_grad_image_norm": gradient.norm(),
    }
    gaps = {
        name: max_abs_difference(value, io[f"{variant}.{name}"])
        for name, value in ours.items()
        if f"{variant}.{name}" in io
    }
    mask = calls[0]["attention_mask"]
    theirs = io[f"{variant}.loss.lm_attention_mask"]
    gaps["lm_attention_mask"] = max_abs_difference(mask.sum(1), theirs.sum(1))
    gaps["lm_inputs_embeds"] = max_abs_difference(
        _drop_padding(calls[0]["inputs_embeds"].detach(), mask),
        _drop_padding(io[f"{variant}.loss.lm_inputs_embeds"], theirs),
    )
    return {**gaps, "lm_labels": _label_error(mllm, texts, calls[0], io, variant)}


def _label_error(
    mllm: Mllm, texts: dict, call: dict, io: dict[str, Tensor], variant: str
) -> float:  # 0.0 where all agree
    """Labels in `io` as the reference gives them to the language model, per `variant`, from our
    answers to `texts` and our mask; for T5 also what `call` shows its decoder read."""
    ids, answered = mllm.text.collate_answers(texts["text_input"], texts["text_output"], mllm.end)
    theirs = io[f"{variant}.loss.lm_labels"]
    if mllm.text.seq2seq:
        # T5 begins with its padding, 0
        read = torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], 1)
        return max(
            max_abs_difference(ids.masked_fill(answered == 0, -100), theirs),
            max_abs_difference(
                _drop_padding(call["decoder_input_ids"], answered), _drop_padding(read, answered)
            ),
        )
    before = call["attention_mask"].shape[1] - ids.shape[1]
    labels = torch.cat([ids.new_full((len(ids), before), -100), ids], 1)
    return max_abs_difference(
        _drop_padding(labels, call["attention_mask"]),
        _drop_padding(theirs, io[f"{variant}.loss.lm_attention_mask"]),
    )


def _ranking_errors(
    mllm: Mllm,  # from `golden_mllm`, or one that should compute the same
    golden: dict,  # of golden.json
    io: dict[str, Tensor],  # of io.safetensors
    variant: str,  # "default" or "varlen"
) -> dict[str, float]:  # quantity: distance from the reference
    """Mean and summed log-likelihoods of the candidates, and the prefix that the language model
    received."""
    texts = golden["variants"][variant]["text_input"]
    images = io["in.image_uint8"].float() / 255
    classes = golden["classes"]
    # the first time, packed ranking is compared with the plain way, on parts of the batch
    mllm.rank(images, texts, classes)
    with _record_language_model_calls(mllm) as calls:
        mean = mllm.rank(images, texts, classes)
    lengths = torch.tensor([len(mllm.scorer.text.answer_ids(texts[0], name)) for name in classes])
    mask = calls[0]["attention_mask"]
    theirs = io[f"{variant}.loglik.lm_attention_mask"]
    embeds = max_abs_difference(
        _drop_padding(calls[0]["inputs_embeds"], mask),
        _drop_padding(io[f"{variant}.loglik.lm_inputs_embeds"], theirs),
    )
    return {
        "loglik_mean": max_abs_difference(mean, io[f"{variant}.loglik_mean"]),
        "loglik_sum": max_abs_difference(mean * lengths, io[f"{variant}.loglik_sum"]),
        "loglik.lm_attention_mask": max_abs_difference(mask, theirs),
        "loglik.lm_inputs_embeds": embeds,
    }


# the norm gathers the rounding of all pixels: 2e-6 where a processor has no AVX-512
_TOLERANCES = {
    "loglik_sum": 3e-5,
    "loss_grad_image": 1e-6,
    "loss_grad_image_stride4": 1e-6,
    "loss_grad_image_norm": 5e-6,
    # everything else 1e-5
    "lm_labels": 0.0,
    "lm_attention_mask": 0.0,
    "loglik.lm_attention_mask": 0.0,
}


def compare_with_golden(
    mllm: Mllm,  # from `golden_mllm`, or one that should compute the same
    # DataFrame: variant, quantity, gap, tolerance, ok
    folder: str | Path,  # of the model
):
    "Everything the reference wrote down about a model, held against ours."
    import pandas as pd

    golden, io = read_golden(folder)
    gaps = {
        variant: {
            **loss_errors(mllm, golden, io, variant),
            **_ranking_errors(mllm, golden, io, variant),
        }
        for variant in golden["variants"]
    }
    rows = [
        (variant, name, value, _TOLERANCES.get(name, 1e-5))
        for variant, found in gaps.items()
        for name, value in found.items()
    ]
    table = pd.DataFrame(rows, columns=["variant", "quantity", "gap", "tolerance"])
    return table.assign(ok=table.gap <= table.tolerance)


_CLIP_RENAMES = (  # of OpenAI's CLIP -> of transformers
    (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"^transformer\.resblocks", "text_model.encoder.layers"),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc", ".mlp.fc1"),
    (r"\.mlp\.c_proj", ".mlp.fc2"),
    (r"\.attn\.", ".self_attn."),
    (r"^visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1", "vision_model.embeddings.patch_embedding"),
    (r"^visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre", "vision_model.pre_layrnorm"),
    (r"^visual\.ln_post", "vision_model.post_layernorm"),
    (r"^positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding", "text_model.embeddings.token_embedding"),
    (r"^ln_final", "text_model.final_layer_norm"),
)


def _clip_renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's CLIP with transformers' names: fused projections split in three, output projections
    transposed."""
    out = {
        "visual_projection.weight": weights["visual.proj"].T.contiguous(),
        "text_projection.weight": weights["text_projection"].T.contiguous(),
    }
    for name, value in weights.items():
        for old, new in _CLIP_RENAMES:
            name = re.sub(old, new, name)
        if ".in_proj_" in name:
            out.update(
                {
                    name.replace("in_proj_", f"{x}_proj."): part
                    for x, part in zip("qkv", value.chunk(3))
                }
            )
        elif not name.endswith(("visual.proj", "text_projection")):
            out[name] = value
    return out


def golden_clip(
    folder: str | Path,  # .../golden/train_minigpt4_224
) -> Clip:  # the reference's tiny CLIP, 224 pixels
    "The golden training run's CLIP, in transformers' classes."
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    from tvp._loading import load_safetensors

    folder = Path(folder)
    training, tensors = read_golden(folder)
    weights = load_safetensors(folder / "clip_state_dict.safetensors")
    size = training["res"]
    weights["visual.positional_embedding"] = tensors["clip.visual.positional_embedding"]
    text = dict(
        vocab_size=len(weights["token_embedding.weight"]),
        hidden_size=24,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=602,
        eos_token_id=603,
        pad_token_id=0,
    )
    vision = dict(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=size,
        patch_size=14,
    )
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20))
    model.load_state_dict(_clip_renamed(weights))
    tokenizer = CLIPTokenizer.from_pretrained(folder / "clip_tokenizer", trust_remote_code=False)
    resize = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    return Clip(model, CLIPProcessor(resize, tokenizer), "golden-clip")
