"""Does every reader give a right result or a named error, whatever is in the file? The figures behind SECURITY.md.

    python benchmarks/fuzz_readers.py                # some 1,000 changed files, a few minutes
    python benchmarks/fuzz_readers.py --files 500    # for each reader
    python benchmarks/fuzz_readers.py --only checkpoint --seed 3

Good files of every kind are changed at random (bytes, and values inside their JSON, metadata and
pickles), with a fixed seed, and read. A reader may give a result that passes its check, or one
line that names the file or the parameter (ValueError, TypeError, OSError). Anything else is a
fault: another kind of error, several lines, a wrong result, more than `SECONDS` or `MEMORY`, or a
crash. Each reader runs in a process of its own. Faults are kept in --keep FOLDER. Needs a system
with fork. The result goes to benchmarks/results/fuzz.json.
"""

import argparse
import csv
import faulthandler
import io
import json
import os
import platform
import random
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

# before the libraries are imported
os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import torch
from PIL import Image
from transformers.utils.logging import disable_progress_bar, set_verbosity

import tvp
from tvp._checkpoint import read_checkpoint, write_checkpoint
from tvp.testing.families import tiny_clip, tiny_model, tiny_processor
from tvp.models.paper.specs import PAPER_MODELS
from tvp.models.paper.loading import load_saved_adapter, save_adapter
from tvp.models.pretrained import load_pretrained
from tvp.prompts.visual_prompt import VisualPrompt
from tvp.training.recipes import make_learner
from tvp.tasks.loading import load_task
from tvp.testing import tiny_mllm
from tvp.models.zoo import load_clip, load_zoo

ROOT = Path(__file__).parent
RESULT = ROOT / "results" / "fuzz.json"
FIXTURES = ROOT.parent / "nbs" / "api" / "fixtures"
# for one file; the address space of one reader's process, bytes
SECONDS = 20
MEMORY = 6 * 2**30
NAMED = (ValueError, TypeError, OSError)
ODD = (
    None,
    True,
    False,
    -1,
    0,
    1,
    10**18,
    10**400,
    0.5,
    -1e30,
    1e30,
    float("nan"),
    float("inf"),
    "",
    "x",
    "x" * 2000,
    "../x",
    "/etc/passwd",
    "\0",
    "a/b",
    "{",
    "{0.__class__}",
    [],
    [[]],
    [1, "x"],
    [None],
    {},
    {"": {}},
    {"auto_map": {"AutoConfig": "evil.X"}},
)


class Slow(BaseException):
    "A file that takes too long; no reader catches it."


# --- changes -------------------------------------------------------------------------------------


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    "The same content with something cut, put in, overwritten or repeated."
    at = rng.randrange(len(data) + 1)
    size = rng.choice((1, 1, 2, 8, 64))
    middle = bytes(rng.randrange(256) for _ in range(size))
    return rng.choice(
        (
            data[:at],
            data[at:],
            data[:at] + middle + data[at:],
            data[:at] + middle + data[at + size :],
            data[:at] + data[at + size :],
            data[:at] + bytes(size) + data[at + size :],
            data + data[:at],
            data[:at] + b"\xff" * size + data[at + size :],
        )
    )


def change_value(value, rng: random.Random):
    "JSON with one value, name or item changed, at any depth."
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        copy = value.copy()
        if rng.random() < 0.15:
            del copy[key]
        else:
            copy[key] = change_value(value[key], rng)
        return copy
    return rng.choice(ODD)


def change_json(data: bytes, rng: random.Random) -> bytes:
    "A JSON file with another value, or another form."
    if rng.random() < 0.2:
        return change_bytes(data, rng)
    text = json.dumps(change_value(json.loads(data), rng))
    forms = (
        lambda: b"\xef\xbb\xbf" + text.encode(),
        lambda: text.encode("utf-16"),
        lambda: b"[" * 50_000,
        lambda: b"version https://git-lfs.github.com/spec/v1\n",
        lambda: ('{"a": 1, "a": 2, ' + text[1:]).encode(),
        lambda: ("[" + text + "]").encode(),
    )
    return rng.choice(forms)() if rng.random() < 0.2 else text.encode()


def change_header(data: bytes, rng: random.Random) -> bytes:
    "A safetensors file whose header says something else."
    if rng.random() < 0.3:
        return change_bytes(data, rng)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    facts = header.get("__metadata__", {})
    inner = [name for name, text in facts.items() if text[:1] in ("{", "[")]
    if inner and rng.random() < 0.5:
        name = rng.choice(inner)
        header["__metadata__"] = facts | {
            name: change_json(facts[name].encode(), rng).decode("utf-8", "replace")
        }
    else:
        header = change_value(header, rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def change_torch(data: bytes, rng: random.Random) -> bytes:
    "A torch file with other bytes, or other contents."
    if rng.random() < 0.6:
        return change_bytes(data, rng)
    tensor = rng.choice(
        (
            torch.empty(3, 64, 64, device="meta"),
            torch.zeros(0),
            torch.zeros(3, 64, 64),
            torch.ones(1).expand(3, 9000, 9000),
            torch.eye(64).to_sparse(),
            torch.full((3, 64, 64), float("nan")),
            torch.ones(3, 64, 64, dtype=torch.complex64),
            torch.ones(3, 64, 64, dtype=torch.int8),
            torch.ones(3, 5, 7),
        )
    )
    held = rng.choice(
        (
            {"perturbation": tensor},
            tensor,
            [tensor],
            {"perturbation": {"a": tensor}},
            {tensor: 1},
            {"perturbation": rng.choice(ODD[:15])},
            {},
        )
    )
    file = io.BytesIO()
    torch.save(held, file, _use_new_zipfile_serialization=rng.random() < 0.8)
    return file.getvalue()


def change_table(data: bytes, rng: random.Random) -> bytes:
    "A table with another cell, or other bytes."
    if rng.random() < 0.4:
        return change_bytes(data, rng)
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    if data[:1] == b"{" and lines[at]:
        lines[at] = change_json(lines[at], rng)
    else:
        cells = lines[at].split(b",")
        cells[rng.randrange(len(cells))] = str(rng.choice(ODD)).encode()
        lines[at] = b",".join(cells)
    return b"\n".join(lines)


CHANGES = {
    ".safetensors": change_header,
    ".json": change_json,
    ".pth": change_torch,
    ".csv": change_table,
    ".jsonl": change_table,
}


# --- readers -------------------------------------------------------------------------------------


@dataclass
class Reader:
    "A kind of file or folder, good examples of it, and what reads it."

    good: list[Path]  # files, or folders in which one file is changed
    read: Callable  # path -> result
    right: Callable  # result -> whether it can be used
    only: tuple[str, ...] = ()  # endings of the files of a folder that are changed; none: all


def usable_prompt(prompt: VisualPrompt) -> bool:
    """Finite numbers of the right shape, and an image comes out in [0, 1] or as the prompt's range
    says."""
    out = prompt(torch.zeros(1, 3, prompt.inner, prompt.inner))
    return (
        out.shape == (1, 3, prompt.size, prompt.size)
        and bool(out.isfinite().all())
        and isinstance(prompt.provenance, dict)
    )


def usable_task(task) -> bool:
    "Rows, candidates, and answers among them."
    return len(task.candidates) > 1 and all(
        len(task.split(name)) for name in ("train", "valid", "test")
    )


def write_images(folder: Path, count: int) -> Path:
    "Folders with images for two classes."
    for name, color in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8 + i, 8), color).save(
                folder / name / f"{i}.{'png' if i % 2 else 'jpg'}"
            )
    return folder


def write_tables(folder: Path) -> list[Path]:
    "The same images as a CSV and as a jsonl file."
    images = write_images(folder / "images", 10)
    rows = [
        {
            "image": str(path.relative_to(folder)),
            "answer": path.parent.name,
            "instruction": "what color is it",
        }
        for path in sorted(images.rglob("*.*"))
    ]
    with (folder / "t.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [folder / "t.csv", folder / "t.jsonl"]


def write_models(folder: Path) -> dict[str, Path]:
    "A model of transformers, one of the paper's, and a CLIP."
    for name, shards in (("qwen", "1GB"), ("shards", "40KB")):
        tiny_model("qwen2_5_vl").save_pretrained(folder / name, max_shard_size=shards)
        tiny_processor("qwen2_5_vl").save_pretrained(folder / name)
    paper = tiny_mllm("visualglm")
    paper.wrapper = PAPER_MODELS["visualglm-6b"].wrapper
    save_adapter(paper, folder / "saved")
    clip = tiny_clip()
    clip.model.save_pretrained(folder / "clip")
    clip.processor.save_pretrained(folder / "clip")
    return {name: folder / name for name in ("qwen", "shards", "saved", "clip")}


def new_learner():
    "TVP on the small zoo."
    return make_learner("TVP", load_zoo("tiny"), ["tiny-minigpt4"], load_task("digits"), 0)


def forge(path: Path, rng: random.Random) -> bool:
    "Change a checkpoint's state and give it the right digest; False where it cannot be written."
    try:
        write_checkpoint(path, change_value(read_checkpoint(path), rng))
    except Exception:
        return False
    return True


def readers(folder: Path) -> dict[str, Reader]:
    "All of them, with good files in `folder`."
    models = write_models(folder / "models")
    prompts = FIXTURES.glob("prompt-*.safetensors")
    learner = new_learner()
    next(learner.steps(1))
    learner.save_checkpoint(folder / "c.safetensors")

    def read_progress(path):
        learner.load_checkpoint(path)
        return learner

    def sound(learner):
        return 0 <= learner.state.step <= learner.total_steps and bool(
            learner.prompt.delta.isfinite().all()
        )

    def is_model(mllm):
        return not any(parameter.requires_grad for parameter in mllm.model.parameters())

    gallery = Path(tvp.__file__).parent / "data" / "gallery" / "digits-tvp"
    return {
        "prompt .safetensors": Reader([*prompts], VisualPrompt.load, usable_prompt),
        "prompt .png": Reader([*FIXTURES.glob("*.png")], VisualPrompt.load, usable_prompt),
        "reference .pth": Reader([*FIXTURES.glob("*.pth")], VisualPrompt.load, usable_prompt),
        "prompt folder": Reader(
            [gallery], VisualPrompt.from_pretrained, usable_prompt, ("config.json", ".safetensors")
        ),
        "checkpoint": Reader([folder / "c.safetensors"], read_progress, sound),
        "model folder": Reader(
            [models["qwen"], models["shards"]],
            lambda path: load_pretrained(path, device="cpu"),
            is_model,
            (".json", ".safetensors"),
        ),
        "saved model folder": Reader(
            [models["saved"]],
            lambda path: load_saved_adapter(path, device="cpu"),
            is_model,
            (".json", ".safetensors"),
        ),
        "tvp.json": Reader(
            [models["saved"]],
            lambda path: load_saved_adapter(path, device="cpu"),
            is_model,
            ("tvp.json", "marker_processor.json"),
        ),
        "CLIP folder": Reader(
            [models["clip"]],
            lambda path: load_clip(path, device="cpu"),
            is_model,
            (".json", ".safetensors"),
        ),
        "table .csv, .jsonl": Reader(write_tables(folder / "tables"), load_task, usable_task),
        "folder of images": Reader([write_images(folder / "images", 10)], load_task, usable_task),
    }


# --- one reader, in a process of its own ---------------------------------------------------------


def change_one(reader: Reader, path: Path, place: Path, rng: random.Random) -> tuple[Path, str]:
    "A changed copy of an example in `place`, and which file was changed."
    shutil.rmtree(place, ignore_errors=True)
    if path.is_dir():
        copy = shutil.copytree(path, place / path.name)
        files = sorted(
            file
            for file in copy.rglob("*")
            if file.is_file() and (not reader.only or file.name.endswith(reader.only))
        )
        file = rng.choice(files)
    elif path.suffix in (".csv", ".jsonl"):
        copy = file = shutil.copytree(path.parent, place / "tables") / path.name
    else:
        place.mkdir()
        copy = file = Path(shutil.copy(path, place / path.name))
    if path.name == "c.safetensors" and rng.random() < 0.5 and forge(file, rng):
        return copy, f"{file.name} (forged)"
    if path.is_dir() and rng.random() < 0.05:
        file.unlink()
    else:
        file.write_bytes(CHANGES.get(file.suffix, change_bytes)(file.read_bytes(), rng))
    return copy, file.name


def fault_of(reader: Reader, copy: Path, changed: str) -> tuple[str, str]:
    "Read one file: what became of it, and for a fault what was wrong."

    def late(*_):
        raise Slow

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        result = reader.read(copy)
        return ("read", "") if reader.right(result) else ("fault", "a wrong result")
    except Slow:
        return "fault", f"more than {SECONDS} seconds"
    except Exception as error:
        said = str(error)
        lines = traceback.extract_tb(error.__traceback__)
        where = (
            f"{type(error).__name__}: {said[:300]} (at "
            f"{Path(lines[-1].filename).name}:{lines[-1].lineno})"
        )
        named = (
            isinstance(error, NAMED)
            and not isinstance(error, (json.JSONDecodeError, UnicodeError))
            and type(error).__module__.partition(".")[0] in ("builtins", "tvp")
        )
        if not named:
            return "fault", where
        if "\n" in said.strip() or not said:
            return "fault", "not one line: " + where
        names = "`", copy.name, changed.split(" ")[0]
        return (
            ("refused", "")
            if any(name in said for name in names)
            else ("fault", "names nothing: " + where)
        )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def run_reader(
    name: str, reader: Reader, files: int, seed: int, keep: Path | None, report: Path
) -> None:
    """Read so many changed files; the report is written before each, so that a crash says where it
    was."""
    warnings.simplefilter("ignore")
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    counts = Counter()
    faults = []
    place = Path(tempfile.mkdtemp())
    for number in range(files):
        rng = random.Random(f"{name} {seed} {number}")
        copy, changed = change_one(reader, reader.good[number % len(reader.good)], place / "x", rng)
        report.write_text(
            json.dumps(
                {
                    "counts": counts,
                    "faults": [*faults, {"number": number, "file": changed, "fault": "crash"}],
                }
            )
        )
        faulthandler.dump_traceback_later(5 * SECONDS, exit=True)
        became, fault = fault_of(reader, copy, changed)
        counts[became] += 1
        if fault:
            faults.append({"number": number, "file": changed, "fault": fault})
        if fault and keep:
            shutil.copytree(place / "x", keep / f"{name.split()[0]}-{number}", dirs_exist_ok=True)
    faulthandler.cancel_dump_traceback_later()
    shutil.rmtree(place)
    report.write_text(json.dumps({"counts": counts, "faults": faults}))


def main() -> None:
    "Run all readers, print what was found, and keep the figures."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a reader whose name begins so; the figures are not kept")
    parser.add_argument("--keep", type=Path, help="a folder for the files that made faults")
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    set_verbosity(100)  # transformers' tables of wrong shapes
    warnings.simplefilter("ignore")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, reader in readers(Path(folder)).items():
            if args.only and not name.startswith(args.only):
                continue
            report = Path(folder) / "report.json"
            if not (child := os.fork()):
                try:
                    run_reader(name, reader, args.files, args.seed, args.keep, report)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
            found[name] = json.loads(report.read_text())
            print(name, found[name]["counts"], flush=True)
            for fault in found[name]["faults"]:
                print("   ", fault, flush=True)
    faults = sum(len(each["faults"]) for each in found.values())
    result = {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "seed": args.seed,
        "seconds for a file": SECONDS,
        "files": args.files * len(found),
        "faults": faults,
        "readers": found,
    }
    if not args.only:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['files']} files, {faults} faults")


if __name__ == "__main__":
    main()
