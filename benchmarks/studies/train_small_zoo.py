"""Train the small zoo: the recipe behind the weights that ship with the package.

    python benchmarks/studies/train_small_zoo.py --out zoo
    python benchmarks/studies/train_small_zoo.py --out zoo --parts clip tiny-llava   # these alone
    python benchmarks/studies/train_small_zoo.py --out zoo2 --seed 100               # another zoo

The small zoo is trained in two stages, as its big namesakes are.

1. **Vision towers** learn from scenes with everything there is to tell about them: how many
   objects, which, which digit, which letter, and what lies in each patch. One tower is shared by
   the five BLIP-type models; `tiny-llava` and `tiny-llava-siglip` have towers of their own, and so
   has `tiny-clip`, which learns to match captions besides. *Every tower has its own seed, its own
   order of scenes and its own frames.* A shared start would be kinship, and kinship looks like
   transfer.
2. **Language models** learn to answer questions about scenes through a frozen tower, together with
   the Q-Former or projector in front of them. The tower's features of all scenes are stored once,
   so that a step costs only what is trained.

Everything starts from nothing and can be interrupted at any time: the same command goes on where it
was; every part is seeded. What is finished in the folder is kept, and one folder holds one zoo;
`tvp.models.zoo.load_zoo(folder)` loads it. The weights that ship took about two and a half hours of
one core.
"""

import argparse
import io
import json
import logging
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Generator, Tensor, nn

from tvp._files import RunLock, write_atomic
from tvp._loading import load_safetensors
from tvp._signals import defer_signals
from tvp._validation import check_int
from tvp.models.adapters import Mllm
from tvp.models.tiny import (
    CANVAS_SIZE,
    NUM_QUERIES,
    PATCH_SIZE,
    TINY_MODELS,
    _weights,
    build_clip,
    build_mllm,
    build_tower,
    load_tiny,
    tiny_tokenizer,
    vision_tower_path,
)
from tvp.tasks.drawing import (
    CLASSIFICATION_INSTRUCTION,
    COLORS,
    DIGIT,
    DIGITS,
    LETTER,
    LETTERS,
    MAX_OBJECTS,
    OBJECTS,
    SHAPES,
    Scenes,
    add_random_frames,
    describe_scene,
    draw_scenes,
    sample_caption,
    sample_question,
)

log = logging.getLogger("train_small_zoo")


def normalize(
    images: Tensor,  # (B, 3, size, size) in [0, 1]
) -> Tensor:  # (B, 3, size, size)
    "What the small models' image processors do: mean 0.5, standard deviation 0.25."
    return (images - 0.5) / 0.25


def generate_scenes(
    folder: Path,  # where the scenes are kept
    n: int = 120_000,  # how many scenes
    seed: int = 1,  # the first chunk's; chunk i uses seed + i
) -> Scenes:  # n scenes
    "Scenes to train on, drawn once."
    path = folder / f"pool-{n}-{seed}.safetensors"
    if not path.exists():
        chunks = [
            draw_scenes(min(4000, n - i), CANVAS_SIZE, 1000 * seed + i // 4000)
            for i in range(0, n, 4000)
        ]
        write_atomic(
            path, save({k: torch.cat([getattr(c, k) for c in chunks]) for k in vars(chunks[0])})
        )
    return Scenes(**load_safetensors(path))


# --- Towers --------------------------------------------------------------------------------------
#
# A tower of 0.2 million parameters learns slowly from noise, so it starts from what is known
# without any label: the principal components of patches, and sines for positions. The heads that
# question it are thrown away afterwards.


@torch.no_grad()
def init_from_pca(
    model: nn.Module,  # a vision tower, or a CLIP
    scenes: Scenes,  # images to look at
) -> None:
    """Patch embedding from principal components, positions from sines: a small tower then learns
    several times faster."""
    grid = CANVAS_SIZE // PATCH_SIZE
    d = 64
    cells = (
        normalize(scenes.images[:3000] / 255)
        .unfold(2, PATCH_SIZE, PATCH_SIZE)
        .unfold(3, PATCH_SIZE, PATCH_SIZE)
    )
    cells = cells.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * PATCH_SIZE * PATCH_SIZE)
    values, vectors = torch.linalg.eigh(cells.T @ cells / len(cells))
    kernels = (vectors[:, -d:] / values[-d:].clamp(min=1e-2).sqrt()).T.flip(0).reshape(
        d, 3, PATCH_SIZE, PATCH_SIZE
    ) * 0.5
    y, x = torch.meshgrid(torch.arange(grid).float(), torch.arange(grid).float(), indexing="ij")
    rate = 1 / 30 ** (torch.arange(d // 4) / (d // 4))
    places = (
        torch.cat(
            [f(v.flatten()[:, None] * rate) for v in (x, y) for f in (torch.sin, torch.cos)], 1
        )
        * 0.5
    )
    for name, parameter in model.named_parameters():
        if "text" in name:
            continue
        if "patch_embedding.weight" in name:
            parameter.copy_(kernels)
        if "position_embedding" in name:
            parameter.view(-1, d)[-grid * grid :] = places


class SupervisionHeads(nn.Module):
    """What a tower must tell of a scene while it trains: the count, which colored shapes, the
    digit, the letter, colors, and what lies in each patch."""

    sizes = (MAX_OBJECTS + 1, len(SHAPES) * len(COLORS), 10, len(LETTERS), len(COLORS))

    def __init__(self, d: int = 64):  # width
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 6, d) * 0.1)
        self.attention = nn.MultiheadAttention(d, 4, batch_first=True)
        self.scene = nn.Sequential(
            nn.LayerNorm(6 * d), nn.Linear(6 * d, 128), nn.GELU(), nn.Linear(128, sum(self.sizes))
        )
        self.patch = nn.Linear(d, 25 + 1 + len(COLORS))

    def forward(
        self, tokens: Tensor
    ) -> tuple:  # (B, T, d) -> five scene predictions, patch predictions
        seen = self.attention(
            self.queries.expand(len(tokens), -1, -1), tokens, tokens, need_weights=False
        )[0]
        return *self.scene(seen.flatten(1)).split(self.sizes, -1), self.patch(
            tokens[:, -((CANVAS_SIZE // PATCH_SIZE) ** 2) :]
        )


def object_multi_hot(
    scenes: Scenes,  # a batch
) -> Tensor:  # (B, shapes * colors), 1 where such an object is there
    "Which of the 48 colored shapes are in each scene."
    present = torch.zeros(len(scenes), len(SHAPES) * len(COLORS))
    there = torch.arange(MAX_OBJECTS) < scenes.count[:, None]
    return present.scatter_add_(1, scenes.color * len(SHAPES) + scenes.shape, there.float()).clamp(
        max=1
    )


def supervision_loss(
    predictions: tuple,  # from `SupervisionHeads`
    scenes: Scenes,  # the truth
    # the first so many images have a frame: their patches have moved; None: leave patches out
    framed: int | None,
) -> tuple[Tensor, dict]:  # loss; accuracies
    "Cross-entropies of everything a tower tells."
    count, objects, digit, letter, color, patch = predictions
    present = object_multi_hot(scenes)
    is_objects = scenes.kind == OBJECTS
    is_digit = scenes.kind == DIGIT
    is_letter = scenes.kind == LETTER

    def only(label, rows):
        return torch.where(rows, label, -100)

    # none of a kind in the batch: 0, not NaN
    def ce(p, y):
        return F.cross_entropy(p, y, reduction="sum") / (y >= 0).sum().clamp(min=1)

    loss = ce(count, scenes.count) + 8 * F.binary_cross_entropy_with_logits(objects, present)
    loss = (
        loss + ce(digit, only(scenes.digit, is_digit)) + ce(letter, only(scenes.letter, is_letter))
    )
    loss = loss + 0.5 * ce(color, only(scenes.glyph_color, ~is_objects & (scenes.glyph_color >= 0)))
    if framed is not None:
        what, tint = patch[framed:].flatten(0, 1).split([25, 1 + len(COLORS)], -1)
        truth = scenes.patches[framed:].long().flatten(2)
        loss = loss + ce(what, truth[:, 0].flatten()) + 0.5 * ce(tint, truth[:, 1].flatten())

    def right(p, y, rows):
        return (p.argmax(-1) == y)[rows].float().mean().item()

    return loss, dict(
        count=right(count, scenes.count, is_objects),
        objects=((objects > 0) == (present > 0)).all(-1)[is_objects].float().mean().item(),
        digit=right(digit, scenes.digit, is_digit),
        letter=right(letter, scenes.letter, is_letter),
        color=right(color, scenes.glyph_color, is_letter),
    )


# --- The loop ------------------------------------------------------------------------------------
#
# Hidden matrices move by Muon (orthogonalized momentum), the rest by AdamW: at this size that is
# two to three times faster than AdamW alone. The rate holds for half of the training and then
# falls to zero, so a training can be lengthened before its half without spoiling anything.


def make_optimizers(
    named: list[tuple[str, nn.Parameter]],  # what to train
    lr: tuple[float, float],  # of Muon and of AdamW
) -> list[torch.optim.Optimizer]:  # both
    "Muon for hidden matrices, AdamW for the rest."
    hidden = [
        p
        for n, p in named
        if p.ndim == 2
        and min(p.shape) >= 32
        and not any(w in n for w in ("embed", "shared", "lm_head", "bias"))
    ]
    known = {id(p) for p in hidden}
    return [
        torch.optim.Muon(hidden, lr=lr[0], weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [p for _, p in named if id(p) not in known],
            lr=lr[1],
            weight_decay=0.0,
            betas=(0.9, 0.98),
        ),
    ]


def train_loop(
    name: str,  # what is trained, for log and checkpoint
    modules: nn.Module,  # everything whose parameters are trained
    loss_of,  # step -> (loss, numbers to log)
    steps: int,  # how many updates
    lr: tuple[float, float],  # of Muon and of AdamW, at the start
    folder: Path,  # for checkpoints
) -> None:
    "The loop of every training here: warm up, hold, decay to zero; resumes from its checkpoint."
    named = [(n, p) for n, p in modules.named_parameters() if p.requires_grad]
    optimizers = make_optimizers(named, lr)

    def share(step: int) -> float:
        "Share of the learning rate: up in 100 steps, down to nearly nothing in the second half."
        return min(1, (step + 1) / 100) * min(1, 2 * (1 - step / steps) + 0.01)

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, share) for o in optimizers]
    path = folder / f"{name}.checkpoint.pt"
    start = 0
    began = time.time()
    mean = None
    if path.exists():
        state = torch.load(path, weights_only=True)
        modules.load_state_dict(state["modules"])
        start = state["step"]
        for part, saved in zip(optimizers + schedules, state["optimizers"]):
            part.load_state_dict(saved)

    def keep(step: int) -> None:
        torch.save(
            dict(
                step=step,
                modules=modules.state_dict(),
                optimizers=[p.state_dict() for p in optimizers + schedules],
            ),
            buffer := io.BytesIO(),
        )
        write_atomic(path, buffer.getvalue())

    with defer_signals() as came:
        for step in range(start, steps):
            loss, numbers = loss_of(step)
            for o in optimizers:
                o.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
            for part in optimizers + schedules:
                part.step()
            mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
            if (step + 1) % 200 == 0:
                log.info(
                    "%s step %d/%d %.0f s loss %.3f %s",
                    name,
                    step + 1,
                    steps,
                    time.time() - began,
                    mean,
                    {k: round(v, 3) for k, v in numbers.items()},
                )
            if came or (step + 1) % 500 == 0:
                keep(step + 1)
            if came:
                break
    if came:
        raise KeyboardInterrupt  # where a handler of the caller's did not
    path.unlink(missing_ok=True)


# --- CLIP, and a tower from start to end ---------------------------------------------------------


def caption_ids(
    scenes: Scenes,  # what to describe
    seed: int,  # of the choice among true captions
) -> tuple[Tensor, Tensor]:  # (n, L) token ids and their mask
    "One tokenized caption for each scene."
    rng = random.Random(seed)
    tokenizer = tiny_tokenizer(end=True)
    texts = [
        f"this is a photo of a {sample_caption(describe_scene(scenes, i), rng)}"
        for i in range(len(scenes))
    ]
    out = tokenizer(texts, padding=True, return_tensors="pt")
    return out.input_ids, out.attention_mask


def clip_contrastive_loss(
    clip: nn.Module,  # a CLIPModel
    pooled: Tensor,  # (B, d) pooled image
    ids: Tensor,  # (B, L) captions
    mask: Tensor,  # (B, L)
) -> Tensor:  # scalar
    "CLIP's loss; equal captions in a batch share the credit."
    clip.logit_scale.data.clamp_(0, math.log(100))
    v = F.normalize(clip.visual_projection(pooled), dim=-1)
    t = F.normalize(
        clip.text_projection(clip.text_model(input_ids=ids, attention_mask=mask).pooler_output),
        dim=-1,
    )
    logits = clip.logit_scale.exp() * v @ t.T
    same = (ids[:, None] == ids[None]).all(-1).float()
    target = same / same.sum(-1, keepdim=True)
    return -(target * (logits.log_softmax(-1) + logits.T.log_softmax(-1))).sum(-1).mean() / 2


NUM_VALIDATION_SCENES = 2000  # the first scenes of a pool are never trained on


def train_tower(
    name: str,  # "shared", "clip", "siglip", or "tiny-clip" for the CLIP of task semantics
    pool: Scenes,  # scenes to train on
    folder: Path,  # where checkpoints and the result go
    steps: int,  # updates
    seed: int,  # of weights, order and frames
    batch_size: int = 128,  # scenes per update
) -> dict:  # accuracies on the first scenes of the pool, half of them framed
    "A vision tower (or CLIP) with supervised heads, from random weights."
    torch.manual_seed(seed)
    is_clip = name == "tiny-clip"
    model = build_clip() if is_clip else build_tower(name)
    heads = SupervisionHeads()
    init_from_pca(model, pool[torch.randperm(len(pool))[:3000]])
    tower = model.vision_model if is_clip else model
    if is_clip:
        ids, mask = caption_ids(pool, seed)

    def loss_of(step: int, rows: Tensor | None = None, seed: int = seed) -> tuple[Tensor, dict]:
        g = Generator().manual_seed(1_000_003 * seed + step)
        if rows is None:
            rows = torch.randint(NUM_VALIDATION_SCENES, len(pool), (batch_size,), generator=g)
        scenes = pool[rows]
        out = tower(pixel_values=normalize(add_random_frames(scenes.images / 255, g)))
        loss, numbers = supervision_loss(
            heads(out.last_hidden_state), scenes, framed=len(rows) // 2
        )
        if is_clip:
            loss_clip = clip_contrastive_loss(model, out.pooler_output, ids[rows], mask[rows])
            loss = loss + loss_clip
            numbers = numbers | dict(contrast=loss_clip.item())
        return loss, numbers

    train_loop(
        name, nn.ModuleDict(dict(model=model, heads=heads)), loss_of, steps, (4e-3, 3e-3), folder
    )
    model.eval()
    with torch.no_grad():
        numbers = loss_of(0, torch.arange(NUM_VALIDATION_SCENES), seed=0)[1]
    write_atomic(
        folder / f"{name}.safetensors",
        save({k: v.half().contiguous() for k, v in model.state_dict().items()}),
    )
    write_atomic(folder / f"{name}.json", json.dumps(numbers))
    log.info("%s done %s", name, numbers)
    return numbers


# --- Language models -----------------------------------------------------------------------------
#
# While a language model trains, stored features stand where its tower stood, and everything else
# is the model's ordinary forward pass. Questions are drawn afresh for every step. A small share of
# the loss asks the visual tokens themselves what is in the scene, which teaches a Q-Former in
# minutes what would take it hours from answers alone.


class PrecomputedFeatures(nn.Module):
    "Stands where a frozen tower stood: what it is given as pixels *are* the tower's features."

    def forward(self, pixel_values: Tensor, **kwargs):  # (B, T, d)
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(
            last_hidden_state=pixel_values, hidden_states=(pixel_values,)
        )


@torch.no_grad()
def precompute_features(
    name: str,  # the tower
    pool: Scenes,  # what to encode
    folder: Path,  # where the tower is and the features go
    seed: int = 7,  # of the frames
) -> Tensor:  # (n, T, 64) float16
    "Every scene through a trained tower, once; every second one in a frame."
    path = folder / f"{name}.features.safetensors"
    if not path.exists():
        tower = build_tower(name).eval()
        parts = []
        tower.load_state_dict(_weights(name, folder))
        for start in range(0, len(pool), 500):
            images = pool.images[start : start + 500] / 255
            images[::2] = add_random_frames(
                images[::2], Generator().manual_seed(seed + start), share=1.0
            )
            out = tower(pixel_values=normalize(images), output_hidden_states=True)
            parts.append(
                (out.last_hidden_state if name == "shared" else out.hidden_states[-1]).half()
            )
        write_atomic(path, save(dict(features=torch.cat(parts))))
    return load_safetensors(path)["features"]


class InstructionCollator:
    "Instructions and answers of one model as token ids, laid out as its processor lays them out."

    def __init__(self, name: str):  # one of TINY
        self.name = name
        self.tokenizer = tiny_tokenizer()
        self.known = {}
        self.tower, self.language, self.template = TINY_MODELS[name]

    def ids(self, text: str, special: bool = True) -> list[int]:
        "Token ids of a text, with special tokens or without, remembered."
        if (text, special) not in self.known:
            self.known[text, special] = self.tokenizer(text, add_special_tokens=special).input_ids
        return self.known[text, special]

    def prompt(self, instruction: str) -> list[int]:
        "Image placeholders and instruction."
        text = self.template.format(instruction)
        count = NUM_QUERIES if self.tower == "shared" else (CANVAS_SIZE // PATCH_SIZE) ** 2
        if "<image>" in text:
            return self.ids(text.replace("<image>", "<image>" * count))
        return [4] * count + self.ids(text)

    def batch(
        self, pairs: list[tuple[str, str]]
    ) -> dict[str, Tensor]:  # ids, mask and labels, (B, L)
        "Inputs from pairs of instruction and answer, with labels on the answer and its end."
        prompts = [self.prompt(q) for q, _ in pairs]
        answers = [self.ids(" " + a, special=False) + [2] for _, a in pairs]
        if self.language == "t5":
            out = dict(input_ids=pad_sequences(prompts), labels=pad_sequences(answers, -100))
        else:
            out = dict(
                input_ids=pad_sequences([p + a for p, a in zip(prompts, answers)]),
                labels=pad_sequences([[-100] * len(p) + a for p, a in zip(prompts, answers)], -100),
            )
        out["attention_mask"] = (out["input_ids"] != 0).long()
        if self.name == "tiny-instructblip":
            out["qformer_input_ids"] = pad_sequences([self.ids(q) for q, _ in pairs])
            out["qformer_attention_mask"] = (out["qformer_input_ids"] != 0).long()
        return out


def pad_sequences(
    rows: list[list[int]],  # token ids
    value: int = 0,  # what to fill up with
) -> Tensor:  # (B, longest)
    "Rows of different length as one tensor, filled up on the right."
    longest = max(map(len, rows))
    return torch.tensor([r + [value] * (longest - len(r)) for r in rows])


def train_language(
    name: str,  # a key of TINY
    pool: Scenes,  # scenes to ask about
    features: Tensor,  # their features, from `precompute_features`
    folder: Path,  # where checkpoints and the result go
    steps: int,  # updates
    seed: int,  # of weights, order and questions
    start_from: str | None = None,  # a model whose Q-Former to start from
    batch_size: int = 128,  # questions per update
) -> None:
    "Q-Former or projector and language model, on the stored features of a frozen tower."
    torch.manual_seed(seed)
    model = build_mllm(name)
    texts = InstructionCollator(name)
    heads = SupervisionHeads()
    if start_from is not None:
        known = _weights(start_from, folder)
        own = model.state_dict()
        shared = {
            k: v
            for k, v in known.items()
            if k.startswith(("qformer", "query_tokens")) and k in own and own[k].shape == v.shape
        }
        model.load_state_dict(shared, strict=False)
    where, _, attribute = vision_tower_path(model).rpartition(".")
    setattr(model.get_submodule(where), attribute, PrecomputedFeatures())
    words = [describe_scene(pool, i) for i in range(len(pool))]

    def loss_of(step: int) -> tuple[Tensor, dict]:
        g = Generator().manual_seed(1_000_003 * seed + step)
        rng = random.Random(1_000_003 * seed + step)
        rows = torch.randint(NUM_VALIDATION_SCENES, len(pool), (batch_size,), generator=g)
        seen = []
        if hasattr(model, "language_projection"):
            projection = model.language_projection
        else:
            projection = model.model.multi_modal_projector
        hook = projection.register_forward_hook(lambda module, inputs, output: seen.append(output))
        out = model(
            pixel_values=features[rows].float(),
            **texts.batch([sample_question(words[i], rng) for i in rows.tolist()]),
        )
        hook.remove()
        told, _ = supervision_loss(heads(seen[0]), pool[rows], framed=None)
        return out.loss + 0.1 * told, dict(answer=out.loss.item(), told=told.item())

    train_loop(
        name, nn.ModuleDict(dict(model=model, heads=heads)), loss_of, steps, (5e-3, 3e-3), folder
    )
    write_atomic(
        folder / f"{name}.safetensors",
        save({k: v.half().contiguous() for k, v in model.state_dict().items()}),
    )


# --- The whole zoo -------------------------------------------------------------------------------


# name: (steps, seed)
TOWER_SCHEDULES = {
    "shared": (8000, 11),
    "siglip": (5000, 13),
    "clip": (4000, 12),
    "tiny-clip": (4000, 14),
}
LANGUAGE_MODEL_SCHEDULES = {  # name: (steps, seed, whose Q-Former to start from)
    "tiny-minigpt4": (3500, 21, None),
    "tiny-instructblip": (2000, 22, "tiny-minigpt4"),
    "tiny-blip2-opt": (2000, 23, "tiny-minigpt4"),
    "tiny-blip2-t5": (2000, 24, "tiny-minigpt4"),
    "tiny-vpgtrans": (2000, 25, "tiny-minigpt4"),
    "tiny-llava": (2500, 26, None),
    "tiny-llava-siglip": (2500, 27, None),
}


def train_zoo(
    folder: Path,  # where scenes, checkpoints and weights go
    parts: list[str] | None = None,  # only these towers and models; None: all that are missing
    seed: int = 0,  # added to the seed of every tower and model: another zoo, of the same make
) -> None:
    """Everything from nothing. What is finished is skipped, what was interrupted goes on from its
    checkpoint."""
    check_int("seed", seed, 0)
    folder.mkdir(parents=True, exist_ok=True)
    with RunLock(folder):
        check_seed(folder, seed)
        train_missing(folder, parts, seed)


def check_seed(folder: Path, seed: int) -> None:
    "One folder holds one zoo."
    file = folder / "zoo.json"
    if not file.exists():
        write_atomic(file, json.dumps({"seed": seed}))
    elif (there := json.loads(file.read_text())["seed"]) != seed:
        raise ValueError(
            f"`seed` must be {there}: {str(folder)!r} holds parts of a zoo with that seed, got "
            f"{seed}. Choose another folder."
        )


def train_missing(folder: Path, parts: list[str] | None, seed: int) -> None:
    "What is not there yet, in order: as `train_zoo`, whose folder is locked."
    pool = generate_scenes(folder)
    for name, (steps, own) in TOWER_SCHEDULES.items():
        if (parts is None or name in parts) and not (folder / f"{name}.json").exists():
            train_tower(name, pool, folder, steps, own + seed)
    for name, (steps, own, start_from) in LANGUAGE_MODEL_SCHEDULES.items():
        if (parts is not None and name not in parts) or (folder / f"{name}.json").exists():
            continue
        train_language(
            name,
            pool,
            precompute_features(TINY_MODELS[name][0], pool, folder),
            folder,
            steps,
            own + seed,
            start_from,
        )
        write_atomic(
            folder / f"{name}.json",
            json.dumps(evaluate_skills(load_tiny(name, folder), pool[:NUM_VALIDATION_SCENES])),
        )


# Another seed gives another zoo of the same make, for studies that are to hold for more than one.


SKILLS = {
    "How many": ("count", tuple("1234")),
    "Is there": ("presence", ("no", "yes")),
    "This is an image": ("agreement", ("no", "yes")),
    "What color": ("color", COLORS),
    "What shape": ("shape", SHAPES),
    "What digit": ("digit", DIGITS),
    "What letter": ("letter", LETTERS),
}


def classify_question(
    instruction: str,  # a question of the small world
    answer: str,  # its answer
    # name of the ability, candidates; None if the answer is a longer text
) -> tuple[str, tuple] | None:
    "What a question tests."
    if instruction == CLASSIFICATION_INSTRUCTION:
        return next(
            (
                (name, words)
                for name, words in (("shape", SHAPES), ("digit", DIGITS))
                if answer in words
            ),
            None,
        )
    return next(kind for start, kind in SKILLS.items() if instruction.startswith(start))


def evaluate_skills(
    mllm: Mllm,  # a model of the small zoo
    scenes: Scenes,  # scenes it was not trained on
    seed: int = 0,  # of questions and frames
    frames: bool = True,  # put every second image into a frame
) -> dict:  # ability: accuracy
    "What a model can do in its own world, by ranking the possible answers."
    rng = random.Random(seed)
    asked = {}
    images = scenes.images / 255
    if frames:
        images[::2] = add_random_frames(images[::2], Generator().manual_seed(seed), share=1.0)
    for i in range(len(scenes)):
        for instruction, answer in {
            sample_question(describe_scene(scenes, i), rng) for _ in range(2)
        }:
            if kind := classify_question(instruction, answer):
                asked.setdefault(kind, []).append((i, instruction, answer))
    result = {}
    for (name, candidates), rows in asked.items():
        right = 0
        for start in range(0, len(rows), 100):
            index, instructions, answers = zip(*rows[start : start + 100])
            best = mllm.rank(images[list(index)], list(instructions), list(candidates)).argmax(1)
            right += sum(candidates[b] == a for b, a in zip(best.tolist(), answers))
        result[name] = right / len(rows)
    return result


def main(argv: list[str] | None = None) -> int:
    "Read the command line and train; returns the exit status."
    known = [*TOWER_SCHEDULES, *LANGUAGE_MODEL_SCHEDULES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("tvp-zoo"),
        metavar="FOLDER",
        help="for scenes, checkpoints and weights (default: %(default)s)",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=known,
        metavar="NAME",
        help="only these towers and models; all that are missing if not given",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="added to every seed: another zoo of the same make (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        train_zoo(args.out, args.parts, args.seed)
    except ValueError as error:
        parser.error(str(error).replace("`seed`", "--seed"))
    except KeyboardInterrupt:
        print("Stopped; the same command goes on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
