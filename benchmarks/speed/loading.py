"""Images per second that reach a training step from a folder of JPEG files.

    python benchmarks/speed/loading.py                      print the figures
    python benchmarks/speed/loading.py --json benchmarks/results/loading.json    and keep them
    python benchmarks/speed/loading.py --images 200 --rounds 1    a short try

Smooth random images are written to a temporary folder and read as a task, shuffled and randomly
cropped as a training does. Nothing waits for a model: the figures are what loading can give at
most. The contestants take turns (`time_interleaved`), and the first round is thrown away, which
also starts the worker processes of torch's DataLoader and fills the page cache.

- plain: `Task.batches`, what a training on a CPU iterates over
- ahead: the same through `prefetch`, what a training on a graphics card iterates over
- N workers: torch's DataLoader over the same rows with N processes that decode and resize
- N threads: as plain, with the images of a batch decoded by N threads
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tvp import load_task
from tvp._files import write_atomic
from tvp._images import resize_images
from tvp._prefetch import prefetch
from tvp.tasks.task import Split

from run import machine_info
from timing import paired_ratio, quartiles, time_interleaved

SIDE = 400  # of the written images, pixels
SIZE = 164  # of the images in a batch: the paper's canvas of 224 without its border of 30
BATCH = 100  # images
CLASSES = 4


def write_images(
    folder: Path,
    count: int,  # at least a few for each class
) -> None:
    "Write smooth random JPEG files, wide and tall in turn, a folder for each class."
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        height, width = [(SIDE, SIDE * 3 // 4), (SIDE * 3 // 4, SIDE)][number % 2]
        coarse = torch.rand(1, 3, 12, 12, generator=generator)
        image = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
        grain = 0.02 * torch.randn(3, height, width, generator=generator)
        pixels = ((image + grain).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
        file = folder / f"class {number % CLASSES}" / f"{number:05}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file, quality=90)


class ResizedImages(Dataset):
    "Decode, resize and crop one row at a time, in whatever process asks."

    def __init__(self, split: Split):
        self.split = split

    def __len__(self):
        return len(self.split)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(row)
        image = resize_images([self.split.images[row]], SIZE, "crop", generator)[0]
        return image, self.split.labels[row]


def consume(batches: Iterable) -> None:
    "Iterate to the end."
    for _ in batches:
        pass


def decode_in_threads(
    split: Split,
    pool: ThreadPoolExecutor,
) -> None:
    "Read a split once as `Task.batches` does, the images of a batch decoded by the pool."
    generator = torch.Generator()
    order = torch.randperm(len(split), generator=generator)
    for rows in order.split(BATCH):
        images = list(pool.map(split.images.__getitem__, rows.tolist()))
        resize_images(images, SIZE, "crop", generator)


def contestants(
    task,  # of `load_task`
    workers: list[int],  # processes of the DataLoader, or threads, two contestants for each
) -> dict[str, Callable]:  # name -> reads all training images once
    "Make the ways to read a task's training images."

    def batches():
        return task.batches(
            "train", SIZE, BATCH, shuffle=True, augment=True, generator=torch.Generator()
        )

    found = {
        "plain": lambda: consume(batches()),
        "ahead": lambda: consume(prefetch(batches())),
    }
    for count in workers:
        loader = DataLoader(
            ResizedImages(task.train),
            batch_size=BATCH,
            shuffle=True,
            num_workers=count,
            persistent_workers=True,
        )
        found[f"{count} workers"] = partial(consume, loader)
        found[f"{count} threads"] = partial(
            decode_in_threads, task.train, ThreadPoolExecutor(count)
        )
    return found


def measure(
    count: int,  # images
    rounds: int,
    workers: list[int],  # processes of the DataLoader, or threads, two contestants for each
) -> dict:  # to be kept as JSON
    "Write the images, let the contestants take turns, and say how many images a second they read."
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), count)
        task = load_task(Path(folder))
        times = time_interleaved(contestants(task, workers), rounds)
        images = len(task.train)
    rates = []
    for name, its in times.items():
        rate = quartiles([images / time for time in its])
        row = {"loading": name, "images a second": round(rate["median"], 1)}
        row |= {"low": round(rate["low"], 1), "high": round(rate["high"], 1)}
        rates.append(row | {"over plain": round(paired_ratio(times, "plain", name)["median"], 2)})
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "images": images,
        "side": SIDE,
        "size": SIZE,
        "batch": BATCH,
        "usable cores": usable,
        "rates": rates,
        **machine_info(),
    }


def main() -> None:
    "Read the command's options, measure, print and keep."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.images, options.rounds, options.workers)
    for row in found["rates"]:
        print(*(f"{key}: {value}" for key, value in row.items()), sep="   ")
    if options.json:
        write_atomic(options.json, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
