"""Models for benchmarks.

Random weights in the proportions of the paper's models, scaled down to a processor, or at full
size on a graphics card.

How fast a model answers does not depend on what it has learned. So a benchmark needs no weights,
only the right *shape*: how many tokens go through how many layers of what width. A shape that is
scaled down should keep the ratios that decide which trick pays:

- how much of a pass is the vision encoder's, how much the language model's. In the paper's models
  (ViT-g/14 on 257 patches; Vicuna-7B on 32 queries and a short text) each does about half; in
  LLaVA (ViT-L/14 on 577 patches; Vicuna-7B on all of them) the language model does nearly
  everything;
- how much of the language model is its last layer, the projection on the vocabulary. For Vicuna-7B
  it is 2 %. With 32,000 words behind a language model of width 512 it would be a third, and
  whoever computes it needlessly would look slower than he is. So `paper` has a vocabulary in
  proportion. `paper-32k` has the full one, for memory: there the number of words counts, not their
  share;
- how large CLIP is beside the two. ViT-B/32 is about a hundredth of a pass, so ours is as well.
"""

from dataclasses import dataclass
from itertools import islice, product
from random import Random

import torch
from torch import Tensor

from tvp._validation import check_choice, check_int
from tvp.models.adapters import Clip, Mllm
from tvp.models.marker_processor import MarkerProcessor
from tvp.tasks.task import Split, Task
from tvp.testing.tiny_models import SPECIAL, WORDS, randomize_weights

# --- Vocabulary and candidates -------------------------------------------------------------------
#
# The tokenizer is the small one of `tvp.testing.tiny_models` with made-up words up to the size of
# the vocabulary.


def synthetic_words(
    count: int,  # how many
) -> list[str]:  # two or three syllables each, no two alike
    "Words that nobody has ever used."
    syllables = ["".join(pair) for pair in product("bdfghklmnprstvwz", "aeiou")]
    return [
        "".join(parts)
        for length in (2, 3)
        for parts in islice(product(syllables, repeat=length), count)
    ][:count]


def bench_tokenizer(
    vocabulary: int,  # number of pieces, at least 500
    # a PreTrainedTokenizerFast
    end: str = "",  # symbol that closes every text, as CLIP wants it
):
    "A Unigram tokenizer in which every made-up word is one token."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    check_int("vocabulary", vocabulary, 500)
    pieces = [
        *SPECIAL,
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        *map(chr, range(33, 127)),
        *(f"▁{word}" for word in dict.fromkeys(WORDS.split())),
    ]
    pieces += [f"▁{word}" for word in synthetic_words(vocabulary - len(pieces))]
    scores = [
        0.0 if p in SPECIAL else -2.0 if p.startswith("▁") and len(p) > 1 else -6.0 for p in pieces
    ]
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores)), unk_id=3, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {end}".strip(), special_tokens=[("<s>", 1), ("</Img>", 6)]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token=end or "</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )


# Candidates are one, two and three words long in turn, two on average, which is what the class
# names of CIFAR-100 have with Llama's tokenizer. The words are drawn from the whole vocabulary, so
# hardly two candidates begin alike: sharing their beginnings gains nothing here, though it would
# with real names ("Boeing 737-200", "Boeing 737-300").


def candidate_names(
    count: int,  # how many
    words: list[str] | None = None,  # to draw from; None: the made-up words of a vocabulary of 1360
) -> list[str]:  # one, two and three words in turn, no two alike
    "Possible answers of unequal length."
    words = words or synthetic_words(800)
    random = Random(0)
    names = {}
    limit = 100 * check_int("count", count)
    for i in range(limit):
        if len(names) == count:
            return list(names)
        # enough words for single ones? Else longer
        names[" ".join(random.choices(words, k=1 + len(names) % 3 if i < limit / 2 else 3))] = None
    raise ValueError(
        f"`words` must allow {count} different names of up to three words, got {len(words)} "
        "words. Give more words."
    )


# --- Shapes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelShape:
    "How large the parts of a model are: (width, layers, heads, width of the MLP) each."

    kind: str  # "blip-2", "instructblip" or "llava"
    size: int  # canvas, pixels
    width: int  # border of the prompt, pixels
    patch: int  # pixels
    vision: tuple[int, int, int, int]  # a vision transformer
    text: tuple[int, int, int, int]  # a Llama
    vocabulary: int  # tokens
    qformer: tuple[int, int, int, int] = (0, 0, 1, 0)  # not for llava
    clip: tuple[int, int, int, int] = (96, 6, 4, 384)  # vision and text alike
    batch: int = 4  # images per step
    instruction: int = 6  # words

    queries = 32  # visual tokens of a Q-Former

    @property
    def picture_tokens(self) -> int:
        "Visual tokens of an image."
        return (self.size // self.patch) ** 2 if self.kind == "llava" else self.queries


PAPER = dict(
    size=224,
    width=30,
    patch=14,
    vision=(256, 7, 4, 1120),
    qformer=(128, 4, 4, 512),
    text=(512, 11, 8, 1376),
)
LLAVA = dict(size=336, width=45, patch=14, vision=(96, 3, 4, 384), text=(384, 4, 6, 1032))
VICUNA = (4096, 32, 32, 11008)
B32 = (768, 12, 12, 3072)
MODEL_SHAPES = {
    "paper": ModelShape("blip-2", vocabulary=1360, **PAPER),
    "paper-32k": ModelShape("blip-2", vocabulary=32_000, **PAPER),
    "llava": ModelShape("llava", vocabulary=1024, batch=2, **LLAVA),
    "llava-32k": ModelShape("llava", vocabulary=32_000, batch=2, **LLAVA),
    "llava-58m": ModelShape(
        "llava",
        vocabulary=32_000,
        batch=2,
        **LLAVA | dict(text=(512, 12, 8, 1376), vision=(192, 6, 4, 768)),
        instruction=19,
    ),
    "mini": ModelShape(
        "blip-2",
        48,
        6,
        8,
        (64, 4, 4, 128),
        (64, 3, 4, 128),
        1360,
        qformer=(64, 2, 4, 128),
        clip=(32, 2, 4, 64),
    ),
    "mini-instructblip": ModelShape(
        "instructblip",
        48,
        6,
        8,
        (64, 4, 4, 128),
        (64, 3, 4, 128),
        1360,
        qformer=(64, 2, 4, 128),
        clip=(32, 2, 4, 64),
    ),
    "mini-llava": ModelShape(
        "llava",
        48,
        6,
        8,
        (64, 4, 4, 128),
        (64, 3, 4, 128),
        1360,
        clip=(32, 2, 4, 64),
        instruction=19,
    ),
    "instructblip-7b": ModelShape(
        "instructblip",
        224,
        30,
        14,
        (1408, 39, 16, 6144),
        VICUNA,
        32_000,
        qformer=(768, 12, 12, 3072),
        clip=B32,
        batch=16,
    ),
    "llava-7b": ModelShape(
        "llava", 336, 45, 14, (1024, 24, 16, 4096), VICUNA, 32_000, clip=B32, batch=16
    ),
}


# The parts are the real classes of transformers, with their own processors.


def bench_config(
    # a config of transformers
    shape: ModelShape,
):
    "The model's config."
    from transformers import AutoConfig

    def part(sizes, **more):
        return (
            dict(
                zip(
                    (
                        "hidden_size",
                        "num_hidden_layers",
                        "num_attention_heads",
                        "intermediate_size",
                    ),
                    sizes,
                )
            )
            | more
        )

    ids = dict(vocab_size=shape.vocabulary, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    text = part(
        shape.text,
        model_type="llama",
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **ids,
    )
    vision = part(shape.vision, image_size=shape.size, patch_size=shape.patch)
    if shape.kind == "llava":
        return AutoConfig.for_model(
            "llava",
            vision_config=vision | {"model_type": "clip_vision_model"},
            text_config=text,
            image_token_index=4,
            image_seq_length=shape.picture_tokens,
        )
    former = part(
        shape.qformer,
        vocab_size=shape.vocabulary,
        encoder_hidden_size=shape.vision[0],
        cross_attention_frequency=2,
    )
    return AutoConfig.for_model(
        shape.kind,
        vision_config=vision,
        qformer_config=former,
        text_config=text,
        num_query_tokens=shape.queries,
        image_token_index=4,
    )


def bench_processor(
    # a processor
    shape: ModelShape,
):
    "The model's processor: images that have the right size already are only normalized."
    import transformers as tf

    square = dict(height=shape.size, width=shape.size)
    tokenizer = bench_tokenizer(shape.vocabulary)
    if shape.kind == "llava":
        images = tf.CLIPImageProcessor(size=dict(shortest_edge=shape.size), crop_size=square)
        return tf.LlavaProcessor(
            images,
            tokenizer,
            patch_size=shape.patch,
            num_additional_image_tokens=1,
            vision_feature_select_strategy="default",
            image_token="<image>",
        )
    if shape.kind == "blip-2":
        return MarkerProcessor(tf.BlipImageProcessor(size=square), tokenizer, shape.queries)
    return tf.InstructBlipProcessor(
        tf.BlipImageProcessor(size=square),
        tokenizer,
        bench_tokenizer(shape.vocabulary),
        num_query_tokens=shape.queries,
    )


# Weights are drawn on the device where the model will run: fourteen gigabytes need not pass
# through a processor.


def bench_mllm(
    name: str,  # one of MODEL_SHAPES
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Mllm:
    "A random model of a shape."
    from transformers import AutoModelForImageTextToText

    check_choice("name", name, MODEL_SHAPES)
    shape = MODEL_SHAPES[name]
    config = bench_config(MODEL_SHAPES[name])
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, trust_remote_code=False
        )
        model = randomize_weights(model.requires_grad_(False))
    template = {"blip-2": "<Img><image></Img> {}", "instructblip": "{}", "llava": "<image> {}"}[
        shape.kind
    ]
    return Mllm(model, bench_processor(shape), template.format, name=name, end="</s>")


def bench_clip(
    name: str,  # one of MODEL_SHAPES
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Clip:
    "A random CLIP for a shape: patches of 32 pixels, or six to a side where an image is small."
    import transformers as tf

    check_choice("name", name, MODEL_SHAPES)
    size = MODEL_SHAPES[name].size
    (width, layers, heads, mlp) = MODEL_SHAPES[name].clip
    size = 224 if size > 224 else size  # the paper's CLIP sees 224 pixels, whatever the model sees
    part = dict(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
    )
    tokenizer = bench_tokenizer(1360, "</Img>")
    text = dict(
        part,
        vocab_size=len(tokenizer),
        max_position_embeddings=77,
        bos_token_id=1,
        eos_token_id=6,
        pad_token_id=0,
    )
    config = tf.CLIPConfig(
        text_config=text,
        vision_config=dict(part, image_size=size, patch_size=32 if size >= 224 else size // 6),
        projection_dim=width,
    )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(1)
        model = randomize_weights(tf.CLIPModel(config).requires_grad_(False)).to(dtype)
    images = tf.CLIPImageProcessor(
        size=dict(shortest_edge=size), crop_size=dict(height=size, width=size)
    )
    return Clip(model, tf.CLIPProcessor(images, tokenizer), f"{name}-clip")


# --- A task --------------------------------------------------------------------------------------
#
# Images of noise, as bytes, of the size that fits the prompt's frame. Every answer has two
# tokens.


def bench_instruction(
    shape: ModelShape,
) -> str:  # shape.instruction words
    "What is asked."
    return " ".join(
        islice(("this is a photo of a " * shape.instruction).split(), shape.instruction)
    )


def bench_task(
    name: str,  # one of MODEL_SHAPES
    num_images: int = 8,  # in each split
    classes: int = 10,  # names, so candidates
) -> Task:
    "Noise with names."
    shape = MODEL_SHAPES[check_choice("name", name, MODEL_SHAPES)]
    words = synthetic_words(2 * check_int("classes", classes))
    generator = torch.Generator().manual_seed(0)
    side = shape.size - 2 * shape.width
    names = [f"{a} {b}" for a, b in zip(words[::2], words[1::2])]
    labels = [i % classes for i in range(num_images)]
    images = torch.randint(
        0, 256, (num_images, 3, side, side), dtype=torch.uint8, generator=generator
    )
    split = Split(
        images, [bench_instruction(shape)] * num_images, labels, [names[label] for label in labels]
    )
    return Task(f"bench-{name}", split, split, split, names)


# --- Counting ------------------------------------------------------------------------------------
#
# Floating-point operations are counted by torch while a pass runs. The share of the vision encoder
# (with the Q-Former and the projection) is what `paper` was made for.


def count_flops(
    run,  # a function without arguments
) -> int:
    "Floating-point operations of matrix products, convolutions and attention."
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@torch.no_grad()
def forward_flops(
    mllm: Mllm,
    images: Tensor,  # (B, 3, H, W) in [0, 1]
    instructions: list[str],  # B of them
    answers: list[str],  # likewise
) -> tuple[int, int]:  # of the whole pass; of images to visual tokens alone
    "What one pass with answer-only logits costs."
    whole = count_flops(lambda: mllm(images, instructions, answers))
    seen = count_flops(lambda: mllm.visual_tokens(images, instructions))
    return whole, seen
