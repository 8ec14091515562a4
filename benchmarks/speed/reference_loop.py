"""The loop of the released code.

What the released code of TVP computes in a step and in a ranking, written plainly on the same
models: the other side of every benchmark.

A benchmark against a straw man says nothing. So the released algorithm is here once more, in its
own order, and tests/test_speed.py holds two things: that it reproduces the numbers which the
released code itself computed, and that our `Learner` and `rank` compute the same as it.

What the released code does that costs time or memory, and what we left out in its favor:

- Encodes per step: three, for the language model's loss, for FCA with the prompt, for FCA without
  it; the first two with gradient. Here the same.
- Clean tokens: encoded anew in every epoch. Here the same.
- CLIP: texts encoded in every step; its weights are not frozen, so gradients for them are computed
  and never used. Here texts in every step, weights frozen.
- Vocabulary: logits at every position, the instruction's labels masked; shifted by copying them.
  Here logits at every position; transformers' own loss, which does not copy.
- Text: tokenized in every step. Here once, by our adapter.
- The prompt: one copy for each image, gradients averaged. Here the same.
- Images: padded and normalized; no processor. Here the same.
- Ranking: image and instruction once, with logits at every position; then one call of the language
  model for every candidate, behind the kept keys and values, for all images at once; half
  precision. Here the same, in the model's own precision, and nothing copied between calls.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

from tvp._validation import check_float, check_str_list, check_type
from tvp.models.adapters import Clip, Mllm
from tvp.models.forward import (
    append_answer_ids,
    decoder_start_token_id,
    flatten_visual_tokens,
    last_position_ids,
    make_position_ids,
)
from tvp.models.ranking import token_log_probs
from tvp.models.transformers_compat import cache_argument, output_cache
from tvp.prompts.pixel_ops import border_mask
from tvp.tasks.task import Batch

# --- A step --------------------------------------------------------------------------------------
#
# The image is padded, the prompt added, and the sum normalized. Nothing is resized: the canvas
# has the size that the model wants.


def normalize_pixels(
    processor,  # with an `image_processor` that has `image_mean` and `image_std`
    images: Tensor,  # (B, 3, size, size), in the size that the model wants
) -> Tensor:  # the same, normalized
    "Pixels as the reference makes them."
    mean, std = (
        images.new_tensor(getattr(processor.image_processor, name))[:, None, None]
        for name in ("image_mean", "image_std")
    )
    return (images - mean) / std


# The loss of the answers runs the whole model with the answers behind the instructions and all
# labels but the answers' masked. Models with an encoder and a decoder (T5) have only answers in
# the decoder.


def language_loss(
    source: Mllm,
    pixels: Tensor,  # (B, 3, size, size), normalized
    instructions: list[str],  # one per image
    answers: list[str],  # one per image
) -> Tensor:  # scalar
    "The model's own loss, with labels."
    inputs = model_inputs(source, pixels, instructions)
    (ids, mask) = source.text.collate_answers(instructions, answers, source.end)
    ids = ids.to(source.device)
    mask = mask.to(source.device)
    labels = ids.masked_fill(mask == 0, -100)
    if source.text.seq2seq:
        start = ids.new_full((len(ids), 1), decoder_start_token_id(source.model))
        return source.model(
            **inputs,
            decoder_input_ids=torch.cat([start, ids[:, :-1]], 1),
            labels=labels,
            use_cache=False,
        ).loss
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), labels], 1)
    return source.model(
        **append_answer_ids(source.model, inputs, ids, mask), labels=labels, use_cache=False
    ).loss


def model_inputs(
    source: Mllm, pixels: Tensor, instructions: list[str]
) -> dict[str, Tensor]:  # the model's inputs
    "Normalized pixels and instructions, padded on the left."
    text = source.text.collate_instructions(instructions, tuple(pixels.shape[-2:]))
    return {name: value.to(source.device) for name, value in text.items()} | {
        "pixel_values": pixels.to(source.dtype)
    }


def visual_tokens(
    source: Mllm,
    pixels: Tensor,  # (B, 3, size, size), normalized
    instructions: list[str],  # one per image; only a Q-Former that reads them looks at them
) -> Tensor:  # (B, T, D), as handed to the language model
    "One more encode."
    encode = source.owner.get_image_features
    names = inspect.signature(encode).parameters
    inputs = model_inputs(source, pixels, instructions)
    return flatten_visual_tokens(
        encode(
            **{name: value for name, value in inputs.items() if name in names}, return_dict=True
        ),
        len(pixels),
    )


def clip_scores(
    clip: Clip,
    images: Tensor,  # (B, 3, size, size) in [0, 1], prompted
    captions: list[str],  # one per image
) -> Tensor:  # (B,) cosine of image and caption
    "Both encoded, images and texts."
    wanted = clip.model.config.vision_config.image_size
    if images.shape[-1] != wanted:
        images = F.interpolate(images, (wanted, wanted), mode="bicubic", antialias=True)
    texts = clip.processor.tokenizer(captions, padding=True, return_tensors="pt").to(
        clip.model.device
    )
    pixels = normalize_pixels(clip.processor, images).to(clip.model.dtype)
    seen = clip.model.get_image_features(pixel_values=pixels).pooler_output.float()
    read = clip.model.get_text_features(
        input_ids=texts["input_ids"], attention_mask=texts["attention_mask"]
    ).pooler_output.float()
    return F.cosine_similarity(seen, read)


# With these, a step is a dozen lines. The update divides by the norm over the whole canvas and
# then masks.


class ReferenceLoop:
    "TVP as it was released: losses, gradient and update of a border prompt."

    def __init__(
        self,
        size: int,  # canvas, pixels
        width: int,  # border, pixels
        source: Mllm,  # whose processor only normalizes images of that size
        clip: Clip,
        fca: float = 0.005,  # weight of Feature Consistency Alignment
        tse: float = 0.001,  # weight of Task Semantics Enrichment
        lr: float = 10.0,  # length of a step before the mask
    ):
        check_type("source", source, Mllm)
        check_type("clip", clip, Clip)
        check_float("lr", lr, above=True)
        if not hasattr(source.owner, "get_image_features"):
            raise TypeError(
                "`source` must have visual tokens of its own (get_image_features), got "
                f"{source.name}. Take a BLIP-2 or a LLaVA."
            )
        self.mask = border_mask(size, width).to(source.device)
        self.width = width
        self.source = source
        self.clip = clip
        self.fca = fca
        self.tse = tse
        self.lr = lr
        self.delta = torch.zeros(3, size, size, device=source.device)

    def losses(
        self, batch: Batch, delta: Tensor
    ) -> dict[str, Tensor]:  # delta: (B, 3, size, size), one copy for each image
        "Three encodes of the source, two of CLIP."
        source = self.source
        clean = F.pad(batch.images.to(delta), [self.width] * 4)
        prompted = clean + delta
        pixels = normalize_pixels(source.processor, prompted)
        task = language_loss(source, pixels, batch.instructions, batch.answers)
        moved = visual_tokens(source, pixels, batch.instructions)
        with torch.no_grad():
            still = visual_tokens(
                source, normalize_pixels(source.processor, clean), batch.instructions
            )
        scores = clip_scores(
            self.clip, prompted, [f"this is a photo of a {what}" for what in batch.semantics]
        )
        return {
            "task": task,
            "fca": (moved - still).float().norm(dim=-1).mean(),
            "tse": self.clip.logit_scale * scores.mean(),
        }

    def step(self, batch: Batch) -> dict[str, float]:  # losses and norm, by name
        "One update; its numbers."
        delta = self.delta.repeat(len(batch.images), 1, 1, 1).requires_grad_()
        values = self.losses(batch, delta)
        total = values["task"] + self.fca * values["fca"] - self.tse * values["tse"]
        total.backward()
        gradient = delta.grad.mean(0)
        norm = gradient.norm()
        self.delta -= self.lr * self.mask * (gradient / (norm + 1e-10))
        return {
            name: value.item()
            for name, value in (values | {"loss": total, "grad_norm": norm}).items()
        }


# --- A ranking -----------------------------------------------------------------------------------
#
# Image and instruction are read once and their keys and values kept. Then the language model is
# called for each candidate, for all images at once. A cache is changed in place; cutting it back
# costs nothing, since the next call copies keys and values anyway when it appends to them.


@torch.no_grad()
def reference_rank(
    source: Mllm,  # a decoder
    images: Tensor,  # (B, 3, size, size) in [0, 1], in the size that the model wants
    instructions: list[str],  # one per image
    candidates: list[str],  # N possible answers
) -> Tensor:  # (B, N) mean log-likelihood per token
    "One call of the language model per candidate."
    check_str_list("candidates", candidates)
    if source.text.seq2seq:
        raise TypeError(f"`source` must be a decoder, got {source.name}, an encoder-decoder.")
    inputs = model_inputs(source, normalize_pixels(source.processor, images), instructions)
    positions = make_position_ids(source.model, inputs)
    out = source.model(**inputs, position_ids=positions, use_cache=True)  # logits at every position
    cache = output_cache(out)
    prefix = (inputs["attention_mask"], last_position_ids(positions), out.logits[:, -1:], cache)
    scores = []
    for candidate in candidates:
        ids = torch.tensor(
            source.text.answer_ids(instructions[0], candidate), device=images.device
        ).expand(len(images), -1)
        scores.append(score_continuation(source, ids, *prefix))
    return torch.stack(scores, 1)


def score_continuation(
    source: Mllm,
    ids: Tensor,  # (B, A), a candidate
    attention_mask: Tensor,  # (B, L), of the instructions
    last: Tensor,  # (B, 1), their last position
    first: Tensor,  # (B, 1, V), logits behind them
    cache,  # their keys and values
) -> Tensor:  # (B,)
    "The candidate's mean log-likelihood, from one call."
    mask = torch.cat([attention_mask, torch.ones_like(ids)], 1)
    steps = last + torch.arange(1, ids.shape[1] + 1, device=ids.device)
    # a BLIP-2 insists on images, its language model does not
    language_model = getattr(source.model, "language_model", source.model)
    past = cache_argument(language_model, cache)
    logits = language_model(
        input_ids=ids, attention_mask=mask, position_ids=steps, use_cache=True, **past
    ).logits
    cache.crop(-ids.shape[1])
    return token_log_probs(torch.cat([first, logits[:, :-1]], 1).float(), ids).mean(1)
