"""Time a step and a ranking.

How long a step and a ranking take, beside the released code's loop and beside the bare arithmetic.

A number of seconds says little: another machine, another number. Two ratios say more. The first is
to the *reference*, the released code's algorithm on the same model (reference.py): how
much faster is this? The second is to the *floor*: one forward pass of the source, the gradient of
its input, and one pass of CLIP's image encoder with gradient, everything prepared beforehand. No
implementation of TVP can be faster than that on the same kernels, so it says how much is still
lost.

Whoever measures A for a minute and then B for a minute measures what else the machine did in those
minutes. So the contestants take turns, A, B, C, A, B, C, ..., the first round is thrown away, and
ratios are taken within a round.
"""

import gc
import io
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from tvp._images import LazyImages
from tvp._validation import check_choice, check_int
from tvp.models.adapters import Clip, Mllm
from tvp.models.forward import append_answer_ids, decoder_start_token_id
from tvp.prompts.visual_prompt import VisualPrompt
from tvp.tasks.task import Batch, Split, Task
from tvp.training.learner import Learner
from tvp.training.losses import tvp_losses

from models import (
    MODEL_SHAPES,
    bench_clip,
    bench_mllm,
    bench_task,
    candidate_names,
    count_flops,
)
from reference_loop import ReferenceLoop, model_inputs, normalize_pixels, reference_rank


def time_interleaved(
    contestants: dict[str, Callable],  # name -> function without arguments
    rounds: int,  # measured, each contestant once in each
    warmup: int = 1,  # rounds before that
    # called before the clock is read; on a graphics card torch.cuda.synchronize
    wait: Callable | None = None,
) -> dict[str, list[float]]:  # seconds, `rounds` for each name
    "Take turns."
    check_int("rounds", rounds)
    times = {name: [] for name in contestants}
    wait = wait or (lambda: None)
    for turn in range(warmup + rounds):
        gc.collect()
        for name, run in contestants.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def quartiles(
    values: list[float],  # at least one
) -> dict[str, float]:  # median, low and high: the middle half of the values
    "The middle and how far it can be trusted."
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {"median": middle, "low": low, "high": high, "runs": len(values)}


def paired_ratio(
    times: dict[str, list[float]],  # from `time_interleaved`
    one: str,
    other: str,  # by which it is divided
) -> dict[str, float]:  # of `quartiles`
    "One contestant's time over another's, round by round."
    return quartiles([a / b for a, b in zip(times[one], times[other])])


# --- A step --------------------------------------------------------------------------------------
#
# A scene is everything that a step needs. Its models are those of models.py, or a trained
# one of the small zoo by name.


@dataclass
class BenchmarkSetup:
    "Models, images and geometry."

    name: str  # of the shape
    source: Mllm
    clip: Clip
    task: Task
    size: int  # canvas, pixels
    width: int  # border, pixels
    batch: int  # images in a step

    def learner(self) -> Learner:
        "Ours, with the paper's losses and update."
        return Learner(
            VisualPrompt(self.size, self.width),
            self.source,
            self.task,
            tvp_losses(clip=self.clip),
            batch_size=self.batch,
        )

    def reference(self) -> ReferenceLoop:
        "The released algorithm."
        return ReferenceLoop(self.size, self.width, self.source, self.clip)

    def batches(self) -> Iterator[Batch]:
        "Training images without end."
        generator = torch.Generator().manual_seed(0)
        while True:
            yield from self.task.batches(
                "train", self.size - 2 * self.width, self.batch, shuffle=True, generator=generator
            )


def make_setup(
    name: str,  # one of MODEL_SHAPES, or a model of the small zoo
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,  # of the source; CLIP and the prompt stay in float32
) -> BenchmarkSetup:
    "Build or load what belongs to a name."
    from tvp.models.zoo import load_zoo

    zoo = load_zoo("tiny")
    check_choice("name", name, [*MODEL_SHAPES, *zoo])
    if name in MODEL_SHAPES:
        shape = MODEL_SHAPES[name]
        return BenchmarkSetup(
            name,
            bench_mllm(name, device, dtype),
            bench_clip(name, device),
            bench_task(name, 2 * shape.batch),
            shape.size,
            shape.width,
            shape.batch,
        )
    from tvp.tasks.loading import load_task

    task = load_task("shapes")
    some = task.train.select(range(32))  # two steps: cached tokens come back soon
    return BenchmarkSetup(
        name, zoo[name], zoo.clip, replace(task, train=some), zoo.size, zoo.width, 16
    )


# Four contestants. Ours makes one update each time it is asked, once with clean tokens remembered
# (images come back in every epoch), once without (as with random crops, where no image comes
# back). Loading the batch is part of the step, for ours and for the reference. The floor has its
# batch ready.


def lower_bound_step(
    scene: BenchmarkSetup,
) -> Callable:  # runs it; returns the gradients of both models' pixels
    "Forward and input gradient of the source, and one of CLIP's image encoder."
    source = scene.source
    batch = next(scene.batches())
    images = F.pad(batch.images, [scene.width] * 4).to(source.device)
    pixels = normalize_pixels(source.processor, images).to(source.dtype)
    side = scene.clip.model.config.vision_config.image_size
    seen = normalize_pixels(
        scene.clip.processor, F.interpolate(images, (side, side))
    ).requires_grad_()
    ids, mask = (
        t.to(source.device)
        for t in source.text.collate_answers(batch.instructions, batch.answers, source.end)
    )
    inputs = model_inputs(source, pixels, batch.instructions)
    if source.text.seq2seq:
        inputs["decoder_input_ids"] = torch.cat(
            [ids.new_full((len(ids), 1), decoder_start_token_id(source.model)), ids[:, :-1]], 1
        )
    else:
        inputs = append_answer_ids(source.model, inputs, ids, mask) | {
            "logits_to_keep": ids.shape[1] + 1
        }
    inputs["pixel_values"] = pixels.detach().requires_grad_()
    labels = ids.masked_fill(mask == 0, -100).flatten()

    def run():
        logits = source.model(**inputs, use_cache=False).logits
        logits = logits if source.text.seq2seq else logits[:, -ids.shape[1] - 1 : -1]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels)
        features = scene.clip.model.get_image_features(pixel_values=seen).pooler_output
        inputs["pixel_values"].grad = seen.grad = None
        (loss + features.sum()).backward()
        return inputs["pixel_values"].grad, seen.grad

    return run


def step_variants(
    scene: BenchmarkSetup,
) -> dict[str, Callable]:  # cached, uncached, reference, floor
    "Functions that make one step each."
    cached = scene.learner()
    uncached = scene.learner()
    reference = scene.reference()
    uncached.clean_features = None
    batches = scene.batches()
    steps = {"cached": cached.steps(10**6), "uncached": uncached.steps(10**6)}
    ours = {name: partial(next, updates) for name, updates in steps.items()}
    return ours | {
        "reference": lambda: reference.step(next(batches)),
        "floor": lower_bound_step(scene),
    }


def time_steps(
    scene: BenchmarkSetup,
    rounds: int,  # measured
    wait: Callable | None = None,  # as in `time_interleaved`
) -> dict:  # for the results: medians, spreads and ratios
    "The step's row of the table."
    contestants = step_variants(scene)
    for _ in range(2):
        contestants["cached"]()  # an epoch: now all clean tokens are known
    flops = {name: count_flops(run) for name, run in contestants.items()}
    times = time_interleaved(contestants, rounds, wait=wait)
    pairs = {
        "cached_vs_reference": ("cached", "reference"),
        "uncached_vs_reference": ("uncached", "reference"),
        "cached_vs_floor": ("cached", "floor"),
        "uncached_vs_floor": ("uncached", "floor"),
    }
    return {
        "model": scene.name,
        "parameters": scene.source.model.num_parameters(),
        "batch": scene.batch,
        "gflops": {n: f / 1e9 for n, f in flops.items()},
        "seconds": {name: quartiles(t) for name, t in times.items()},
        "ratios": {name: paired_ratio(times, *pair) for name, pair in pairs.items()},
    }


# The counted operations tell what to expect before any clock is read. With a vision encoder and a
# language model of the same size and CLIP's hundredth beside them, the reference pays for two
# forward and two backward passes of the encoder and one more forward; ours for one and one: four
# parts instead of seven, 0.57.


# --- A ranking -----------------------------------------------------------------------------------
#
# All candidates for a batch of images, as an evaluation asks for them. The first call, in which
# the packed way is checked against the plain one, falls into the round that is thrown away.


def single_token_words(
    scene: BenchmarkSetup,
) -> list[str]:  # sorted
    "Words that are one token of the source."
    return sorted(
        w[1:]
        for w in scene.source.processor.tokenizer.get_vocab()
        if len(w) > 2 and w[0] == "▁" and w[1:].isalpha()
    )


def time_ranking(
    scene: BenchmarkSetup,
    candidates: int,  # how many
    num_images: int,  # in the batch
    rounds: int,  # measured
    wait: Callable | None = None,  # as in `time_interleaved`
) -> dict:  # for the results: medians, spreads, ratio, the largest difference of a score
    "The ranking's row of the table."
    names = candidate_names(candidates, single_token_words(scene))
    images = torch.rand(num_images, 3, scene.size, scene.size, device=scene.source.device)
    instructions = [scene.task.train.instructions[0]] * num_images
    tokens = sum(len(scene.source.text.answer_ids(instructions[0], name)) for name in names)
    contestants = {
        "ours": lambda: scene.source.rank(images, instructions, names),
        "reference": lambda: reference_rank(scene.source, images, instructions, names),
    }
    ours = contestants["ours"]()
    theirs = contestants["reference"]()
    gap = (ours - theirs).abs().max().item()
    size = theirs.abs().max().item()
    times = time_interleaved(contestants, rounds, warmup=0, wait=wait)
    return {
        "model": scene.name,
        "parameters": scene.source.model.num_parameters(),
        "images": num_images,
        "candidates": candidates,
        "tokens": tokens,
        "largest_difference": gap,
        "largest_score": size,
        "seconds": {name: quartiles(t) for name, t in times.items()},
        "ratio": paired_ratio(times, "ours", "reference"),
    }


# --- Several questions about an image -----------------------------------------------------------
#
# POPE asks six questions of each image. The vision encoder looks once at what a batch shows
# several times (`tvp.models.ranking`), so the same questions about as many images that all
# differ are the yardstick: all else is the same. What can be gained is the encoder's share of
# a ranking, less what an image still needs. The scores are compared with those of one question at
# a time.


def time_repeated_images(
    scene: BenchmarkSetup,
    num_images: int,  # in the batch
    questions: int,  # about each of them
    rounds: int,  # measured
    wait: Callable | None = None,  # as in `time_interleaved`
) -> dict:  # for the results: medians, spreads, ratio, the largest difference of a score
    "The shared images' row of the table."
    source = scene.source
    rows = check_int("num_images", num_images) * check_int("questions", questions)
    asked = [
        f"is there a {name} in the image"
        for name in candidate_names(questions, single_token_words(scene))
    ] * num_images
    different = torch.rand(rows, 3, scene.size, scene.size, device=source.device)
    shared = different[:num_images].repeat_interleave(questions, 0)
    contestants = {
        name: partial(source.rank, images, asked, ["no", "yes"])
        for name, images in (("shared", shared), ("different", different))
    }
    alone = torch.cat(
        [
            source.rank(shared[row : row + 1], asked[row : row + 1], ["no", "yes"])
            for row in range(questions)
        ]
    )
    contestants["shared"]()  # the first time the encoder is compared with itself
    gap = (contestants["shared"]()[:questions] - alone).abs().max().item()
    flops = {name: count_flops(run) / 1e9 for name, run in contestants.items()}
    times = time_interleaved(contestants, rounds, warmup=0, wait=wait)
    return {
        "model": scene.name,
        "parameters": source.model.num_parameters(),
        "images": num_images,
        "questions": questions,
        "largest_difference": gap,
        "gflops": flops,
        "seconds": {name: quartiles(t) for name, t in times.items()},
        "ratio": paired_ratio(times, "shared", "different"),
    }


# --- Loading -------------------------------------------------------------------------------------
#
# Photographs of the size that Food-101 and Pets have, as JPEG in memory, are decoded and fitted to
# the frame of a 224-pixel canvas. The second pass over the same images shows what is remembered.


def synthetic_photo_task(
    num_images: int,  # in each split
    height: int = 375,  # pixels
    width: int = 500,  # pixels
) -> Task:
    "JPEGs of soft noise, which compress about as photographs do."
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    files = []
    for _ in range(num_images):
        rough = torch.rand(1, 3, height // 25, width // 25, generator=generator)
        smooth = F.interpolate(rough, (height, width), mode="bicubic").clamp(0, 1)[0]
        noisy = smooth + 0.04 * torch.randn(3, height, width, generator=generator)
        pixels = (noisy.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "jpeg", quality=90)
        files.append({"bytes": file.getvalue()})
    split = Split(
        LazyImages(files), ["this is a photo of a"] * num_images, [0] * num_images, ["cat"] * num_images
    )
    return Task("photos", split, split, split, ["cat", "dog"])


def time_loading(
    task: Task,
    size: int,  # side that images are fitted to, pixels
    batch: int,  # images in a batch
    rounds: int,  # measured, in new tasks
) -> dict:  # for the results: images per second in the first and in the second pass
    "The loading's row of the table."
    passes = {"first": [], "again": []}
    for _ in range(rounds + 1):
        fresh = replace(task, train=task.train.select(range(len(task.train))))
        for times in passes.values():
            start = time.perf_counter()
            for _ in fresh.batches("train", size, batch):
                pass
            times.append(time.perf_counter() - start)
    rate = {
        name: quartiles([len(task.train) / seconds for seconds in times[1:]])
        for name, times in passes.items()
    }
    return {
        "task": task.name,
        "size": size,
        "images": len(task.train),
        "images_per_second": rate,
    }
