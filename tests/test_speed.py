"""Benchmarks of speed and memory: what benchmarks/speed measures is what it says.

python tests/test_speed.py
"""

import io
import json
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import pandas as pd
import torch
from fastcore.test import expect_fail, test_close, test_eq

from tvp.prompts.visual_prompt import VisualPrompt
from tvp.testing import reference_data_dir, tiny_mllm
from tvp.training.learner import Learner
from tvp.training.losses import tvp_losses

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "speed"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import run
from models import (
    MODEL_SHAPES,
    bench_clip,
    bench_mllm,
    bench_task,
    bench_tokenizer,
    candidate_names,
    count_flops,
    forward_flops,
    synthetic_words,
)
from reference.golden import golden_clip, golden_mllm
from reference_loop import (
    ReferenceLoop,
    language_loss,
    normalize_pixels,
    reference_rank,
    visual_tokens,
)
from run import (
    FULL,
    QUICK,
    SECTIONS,
    BenchmarkPlan,
    format_results,
    headline_ratios,
    machine_info,
    measure_memory,
    memory_growth,
    resident_memory,
    run_bench,
    time_variants,
)
from timing import (
    lower_bound_step,
    make_setup,
    paired_ratio,
    quartiles,
    synthetic_photo_task,
    time_interleaved,
    time_loading,
    time_ranking,
    time_repeated_images,
    time_steps,
)


def vision_share(name):
    "What a forward pass costs, and which shares of it are the vision encoder's and CLIP's."
    shape = MODEL_SHAPES[name]
    mllm = bench_mllm(name)
    batch = next(bench_task(name, 1).batches("train", shape.size - 2 * shape.width, 1))
    images = torch.nn.functional.pad(batch.images, [shape.width] * 4)
    whole, seen = forward_flops(mllm, images, batch.instructions, batch.answers)
    clip = count_flops(lambda: bench_clip(name).image_features(images))
    return dict(
        model=name,
        parameters=mllm.model.num_parameters(),
        gflops=whole / 1e9,
        vision=seen / whole,
        clip=clip / whole,
    )


def differences(name, steps=3):
    "Largest differences between Learner and ReferenceLoop, and between rank and reference_rank."
    mllm = bench_mllm(name)
    clip = bench_clip(name)
    task = bench_task(name, 4)
    prompt = VisualPrompt(48, 6)
    reference = ReferenceLoop(48, 6, mllm, clip)
    learner = Learner(prompt, mllm, task, tvp_losses(clip=clip), batch_size=2, epochs=steps)
    worst = {}
    seen = []

    def batches(*args, **how):
        for batch in task.batches(*args, **how):
            seen.append(batch)
            yield batch

    learner.task = SimpleNamespace(name=task.name, split=task.split, batches=batches)
    for record in learner.steps():
        pass
    for record, batch in zip(learner.records, seen):
        reference.lr = record.lr  # a cosine, the same for both
        theirs = reference.step(batch)
        for part in ("loss", "task", "fca", "tse"):
            worst[part] = max(
                worst.get(part, 0),
                abs(getattr(record, part) - theirs[part]) / max(1, abs(theirs[part])),
            )
        worst["gradient"] = max(
            worst.get("gradient", 0), abs(record.grad_norm / 2 / theirs["grad_norm"] - 1)
        )
    worst["prompt"] = (
        prompt.delta.detach() - reference.delta
    ).abs().max().item() / reference.delta.abs().max().item()
    images = torch.rand(3, 3, 48, 48)
    names = candidate_names(12)
    instructions = [batch.instructions[0]] * 3
    worst["ranking"] = (
        (mllm.rank(images, instructions, names) - reference_rank(mllm, images, instructions, names))
        .abs()
        .max()
        .item()
    )
    return worst


def golden_steps(folder):
    "Absolute differences from what the released code computed."
    from safetensors.torch import load_file

    golden = json.loads((folder / "golden.json").read_text())
    tensors = load_file(folder / "io.safetensors")
    facts = golden["runs"]["tvp224"]
    small = tensors["train.images41_uint8"]
    images = small.repeat_interleave(4, 2).repeat_interleave(4, 3) / 255
    names = [golden["classes"][i] for i in tensors["train.labels"]]
    loop = ReferenceLoop(
        golden["res"],
        golden["border"],
        golden_mllm(folder),
        golden_clip(folder),
        facts["fca"],
        facts["tse"],
        golden["lr"],
    )
    rows = []
    for i, pair in enumerate(torch.arange(10).split(2)):
        some = [names[row] for row in pair]
        made = loop.step(
            SimpleNamespace(
                images=images[pair],
                instructions=["This is a photo of a"] * 2,
                answers=some,
                semantics=some,
            )
        )
        rows.append(
            {
                ours: abs(made[ours] - facts[theirs][i])
                for ours, theirs in dict(
                    loss="loss", task="main", fca="emb", tse="clip", grad_norm="g_norm"
                ).items()
            }
        )
        border = loop.delta[loop.mask.bool().expand(3, -1, -1)]
        if i in (0, 4):
            rows[-1]["border"] = (
                (border - tensors[f"perturbation_border_step{i + 1}"]).abs().max().item()
            )
    return pd.DataFrame(rows, index=pd.Index(range(1, 6), name="step"))


def floor_gradient(name):
    """Largest difference of the gradient of the task loss, ours and the floor's, relative to the
    largest gradient."""
    scene = make_setup(name)
    # one image again and again: the order cannot matter
    one = replace(scene.task, train=scene.task.train.select([0] * scene.batch))
    scene.task = one
    prompt = VisualPrompt(scene.size, scene.width)
    learner = Learner(prompt, scene.source, one, batch_size=scene.batch)
    next(learner.steps(1))
    std = torch.tensor(scene.source.processor.image_processor.image_std)[:, None, None]
    theirs = (lower_bound_step(scene)()[0] / std).sum(0)
    return (prompt.canvas_gradient - theirs).abs().max().item() / theirs.abs().max().item()


def test_models():
    "Models of the paper's proportions, and their tasks."
    tokenizer = bench_tokenizer(32_000)
    print(synthetic_words(3), tokenizer.tokenize("this is a photo of a babe bedu"))
    test_eq(len(tokenizer), 32_000)
    test_eq(len(bench_tokenizer(1360)), 1360)
    test_eq(len(set(synthetic_words(20_000))), 20_000)
    with expect_fail(ValueError, "vocabulary"):
        bench_tokenizer(100)

    print(candidate_names(6))
    test_eq(candidate_names(1000), candidate_names(1000))
    names = candidate_names(1000)
    test_eq(len(set(names)), 1000)
    test_close(
        sum(len(bench_tokenizer(1360)(name, add_special_tokens=False).input_ids) for name in names)
        / 1000,
        2,
        0.05,
    )
    test_eq(len(candidate_names(100, ["red", "green", "blue", "cat", "dog"])), 100)
    with expect_fail(ValueError, "words"):
        candidate_names(100, ["red", "blue"])

    for name, shape in MODEL_SHAPES.items():
        print(
            f"{name:18} {shape.kind:13} {shape.size} px, {shape.picture_tokens:3} visual tokens, "
            f"vocabulary {shape.vocabulary:,}"
        )

    mllm = bench_mllm("mini")
    clip = bench_clip("mini")
    print(mllm)
    images = torch.rand(2, 3, 48, 48)
    print(
        mllm.visual_tokens(images, ["this is a photo of a"] * 2).shape,
        clip.image_features(images).shape,
    )
    with expect_fail(ValueError, "name"):
        bench_mllm("huge")
    with expect_fail(ValueError, "name"):
        bench_clip("huge")

    for name in ("mini-instructblip", "mini-llava"):
        scores = bench_mllm(name).rank(
            images, ["this is a photo of a"] * 2, ["babe", "bedu bafi"]
        )
        assert scores.shape == (2, 2) and scores.isfinite().all()
    test_eq(bench_mllm("mini", dtype=torch.bfloat16).dtype, torch.bfloat16)

    task = bench_task("mini")
    batch = next(task.batches("train", 36, 4))
    print(batch.instructions[0], "|", batch.answers[:2])
    test_eq(mllm.text.answer_ids(batch.instructions[0], batch.answers[0], mllm.end).__len__(), 3)
    with expect_fail(ValueError, "name"):
        bench_task("huge")

    # `gflops` is for one image, forward only; `vision` is the share of everything before the language
    # model; `clip` is what CLIP's image encoder costs beside it.

    shares = pd.DataFrame(
        [vision_share(name) for name in ("mini", "mini-llava", "paper", "paper-32k", "llava")]
    ).set_index("model")
    print(
        shares.assign(
            gflops=shares.gflops.round(2),
            vision=shares.vision.map("{:.1%}".format),
            clip=shares["clip"].map("{:.1%}".format),
        )
    )
    assert (
        0.4 < shares.vision["paper"] < 0.6
        and 0.4 < shares.vision["paper-32k"] < 0.6
        and shares.vision["llava"] < 0.15
    )
    assert shares["clip"]["paper"] < 0.03


def test_reference():
    "The released loop computes what ours does, and what its authors recorded."
    mllm = bench_mllm("mini")
    images = torch.rand(2, 3, 48, 48)
    ours = mllm.processor.image_processor(list(images * 255), return_tensors="pt")["pixel_values"]
    pixels = normalize_pixels(mllm.processor, images)
    test_close(pixels, ours, 1e-5)

    instructions = ["this is a photo of a"] * 2
    test_close(
        visual_tokens(mllm, pixels, instructions),
        mllm.visual_tokens(images, instructions),
        1e-4,
    )
    test_close(
        language_loss(mllm, pixels, instructions, ["babe", "bedu bafi"]),
        mllm(images, instructions, ["babe", "bedu bafi"]).loss,
        1e-4,
    )

    task = bench_task("mini", 4)
    clip = bench_clip("mini")
    reference = ReferenceLoop(48, 6, mllm, clip)
    for batch in task.batches("train", 36, 2):
        print(reference.step(batch))

    with expect_fail(TypeError, "source"):
        ReferenceLoop(48, 6, "mini", clip)
    with expect_fail(TypeError, "clip"):
        ReferenceLoop(48, 6, mllm, None)
    with expect_fail(ValueError, "lr"):
        ReferenceLoop(48, 6, mllm, clip, lr=0)
    with expect_fail(TypeError, "get_image_features"):
        ReferenceLoop(48, 6, tiny_mllm("git"), clip)

    scores = reference_rank(mllm, images, instructions, candidate_names(4))
    test_close(scores, mllm.rank(images, instructions, candidate_names(4)), 1e-4)
    print(scores)

    # On three kinds of models, after several steps: relative differences, of the scores the largest
    # absolute one. The reference's gradient is ours divided by the batch size, because it averages
    # over copies of the prompt what is a mean already.

    table = pd.DataFrame(
        {name: differences(name) for name in ("mini", "mini-instructblip", "mini-llava")}
    ).T
    print(table.map("{:.1e}".format))
    assert (
        table[["loss", "task", "fca", "tse", "ranking"]].max().max() < 1e-5
        and table[["gradient", "prompt"]].max().max() < 1e-4
    ), table

    # The numbers of the released code itself, five steps on its tiny MiniGPT-4 at 224 pixels: each is
    # an absolute difference; `border` is the largest over its 69,840 pixels after that step.

    shared = reference_data_dir()
    if shared is None:
        print("skipped: no reference numbers here (set TVP_SHARED)")
    else:
        gaps = golden_steps(shared / "golden/train_minigpt4_224")
        for name in ("loss", "task", "fca", "border"):
            assert gaps[name].max() <= 1e-5, gaps
        assert gaps.tse.max() <= 2e-5 and gaps.grad_norm.max() <= 2e-6, gaps
        print(gaps.map("{:.1e}".format))

    with expect_fail(TypeError, "decoder"):
        reference_rank(tiny_mllm("blip2-t5"), images, instructions, ["cat"])
    with expect_fail(TypeError, "candidates"):
        reference_rank(mllm, images, instructions, [])


def test_timing():
    "Taking turns; every contestant computes the same."
    order = []
    times = time_interleaved({name: partial(order.append, name) for name in "ab"}, rounds=2)
    test_eq("".join(order), "ababab")
    test_eq([len(t) for t in times.values()], [2, 2])
    test_eq(quartiles([1.0, 2.0, 3.0, 4.0, 5.0]), {"median": 3, "low": 2, "high": 4, "runs": 5})
    test_eq(quartiles([2.0])["median"], 2)
    test_eq(paired_ratio({"a": [1.0, 2.0, 9.0], "b": [2.0, 4.0, 6.0]}, "a", "b")["median"], 0.5)
    with expect_fail(ValueError, "rounds"):
        time_interleaved({}, 0)

    scene = make_setup("mini")
    print(scene.source, scene.clip.name, scene.task)
    with expect_fail(ValueError, "name"):
        make_setup("huge")
    test_eq(make_setup("tiny-llava").batch, 16)

    row = time_steps(scene, rounds=2)
    print({name: round(value, 2) for name, value in row["gflops"].items()})
    # nothing is computed that the floor does not compute
    assert 0.95 < row["gflops"]["cached"] / row["gflops"]["floor"] < 1.02
    assert row["gflops"]["cached"] < row["gflops"]["uncached"] < row["gflops"]["reference"]
    print(
        {name: f"{value['median']:.2f}" for name, value in row["ratios"].items()},
        "(a model this small says nothing about larger ones)",
    )

    # The floor's gradient, taken back to the prompt, is that of a step with the task loss alone.

    for name in ("mini", "mini-instructblip", "mini-llava", "tiny-blip2-t5", "tiny-llava-siglip"):
        gap = floor_gradient(name)
        print(f"{name:18} {gap:.1e}")
        assert gap < 1e-3

    for name in ("mini-llava", "tiny-minigpt4"):
        row = time_ranking(make_setup(name), candidates=10, num_images=2, rounds=2)
        print(name, row["tokens"], "tokens,", f"largest difference {row['largest_difference']:.1e}")
        assert row["largest_difference"] < 1e-4

    for name in ("mini-instructblip", "mini-llava", "tiny-instructblip"):
        row = time_repeated_images(make_setup(name), num_images=4, questions=6, rounds=2)
        print(
            f"{name:18} {row['gflops']['shared']:.1f} of {row['gflops']['different']:.1f} GFLOPs, "
            f"largest difference {row['largest_difference']:.0e}"
        )
        assert (
            row["gflops"]["shared"] < 0.9 * row["gflops"]["different"]
            and row["largest_difference"] < 1e-4
        )
    with expect_fail(ValueError, "`questions` must be a whole number >= 1, got 0"):
        time_repeated_images(scene, 1, 0, 1)

    photos = synthetic_photo_task(4)
    print(photos, len(photos.train.images.source(0)["bytes"]) // 1000, "kB each")
    row = time_loading(photos, 164, 4, rounds=2)
    test_eq(sorted(row), ["images", "images_per_second", "size", "task"])
    assert row["images_per_second"]["first"]["median"] > 0


def test_run():
    "Plans, memory, other kernels, the table and the command line."
    for name, plan in (("quick", QUICK), ("full", FULL)):
        print(name, [model for model, _ in plan.steps], sorted({row[1] for row in plan.rankings}))

    print(f"{resident_memory() / 1e6:.0f} MB now, {resident_memory('VmHWM') / 1e6:.0f} MB at most")
    assert memory_growth("mini", "floor") >= 0
    with expect_fail(ValueError, "contestant"):
        memory_growth("mini", "nobody")
    broken = SimpleNamespace(returncode=1, stderr="no memory left")
    with (
        patch("subprocess.run", lambda *_, **__: broken),
        expect_fail(RuntimeError, "no memory left"),
    ):
        measure_memory("mini", ["floor"])

    row = time_variants("mini", 2, compiled=False)
    test_eq(sorted(row["ratios"]), ["bfloat16", "channels_last"])

    facts = machine_info()
    print(facts["versions"], facts["threads"], "threads")
    test_eq(sorted(facts), ["commit", "load_average", "machine", "threads", "versions"])

    tiny = BenchmarkPlan(
        [("mini", 2)], [("mini", 10, 2, 1), ("mini", 100, 2, 1)], 4, [], shared=[("mini", 2, 6, 2)]
    )
    results = run_bench(plan=tiny)
    print(format_results(results))

    json.dumps(results)  # nothing in it that JSON does not know
    named = headline_ratios(results | {"step": [results["step"][0] | {"model": "paper"}]})
    test_eq(
        list(named),
        [
            "step_vs_reference",
            "step_vs_reference_no_cache",
            "step_vs_floor",
            "rank100_vs_reference",
        ],
    )
    assert min(named.values()) > 0 and "step_vs_floor" not in results
    test_eq(
        {
            "machine",
            "versions",
            "commit",
            "threads",
            "seconds",
            "plan",
            "loading",
            "memory",
            "variants",
        }
        - set(results),
        set(),
    )
    faked = headline_ratios(
        {
            "memory": [{"ratios": {"cached_vs_reference": 0.4}}],
            "ranking": [{"candidates": 100, "ratio": {"median": m}} for m in (0.3, 0.4)],
        }
    )
    test_eq(faked, {"rank100_vs_reference": 0.4, "memory_vs_reference": 0.4})
    with expect_fail(ValueError, "only"):
        run_bench(only=["speed"])
    row = measure_memory("mini", ["reference"])
    test_eq((sorted(row["megabytes"]), row["ratios"]), (["reference"], {}))
    print(
        format_results(
            results | {"memory": [row], "variants": [time_variants("mini", 1, compiled=False)]}
        ).splitlines()[-2:]
    )


def failing(*line):
    "What the command says when it refuses a line, with exit status 2."
    told = io.StringIO()
    with redirect_stdout(told), redirect_stderr(told), expect_fail(SystemExit):
        run.main(list(map(str, line)))
    return told.getvalue()


def test_command():
    "The command writes its file, and refuses what it cannot do before it measures anything."
    with TemporaryDirectory() as folder:
        file = Path(folder) / "new" / "speed.json"
        told = io.StringIO()
        with redirect_stdout(told), redirect_stderr(io.StringIO()):
            run.main(["--quick", "--only", "loading", "--json", str(file)])
        made = json.loads(file.read_text())
        assert "images/s" in told.getvalue(), told.getvalue()
        test_eq(set(made) & {"step", "loading"}, {"loading"})
        assert "--json" in failing("--json", folder)
        assert "cannot write" in failing("--json", file / "below.json")
    assert "step, ranking, shared" in failing("--only", "speed")
    named = re.search(r"some of ([a-z,\s]+);", run_help())[1]
    test_eq("".join(named.split()).split(","), list(SECTIONS))


def run_help():
    "What `--help` prints."
    told = io.StringIO()
    with redirect_stdout(told), expect_fail(SystemExit):
        run.main(["--help"])
    return told.getvalue()


def main():
    "Run the tests and say what each has checked."
    for test in (test_models, test_reference, test_timing, test_run, test_command):
        print(f"{test.__name__}: {test.__doc__}", flush=True)
        test()


if __name__ == "__main__":
    main()
