"""Updates a second on one and two threads, on an idle machine and beside a program that keeps one core busy.

python benchmarks/threads.py [--seconds 4] [--rounds 3] [--json benchmarks/results/threads.json]

`zoo` trains a prompt on a model of the small zoo, which `tvp.models.torch_settings` puts on one
thread; `zoo as torch is set` is the same without it. `sizes` repeats forward and backward passes
through transformers of growing width, which is where `tvp.models.torch_settings.SMALL` comes from.
The settings take turns, round by round, and the median is kept; `load` is the load average beside
each round, since whatever else runs on the machine changes the numbers.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

import tvp
from tvp.models import torch_settings

# width, layers
SIZES = {"0.4 M": (64, 8), "3 M": (256, 4), "13 M": (512, 4), "43 M": (768, 6), "101 M": (1024, 8)}


@contextmanager
def busy_core(busy: bool):
    "Keep one core busy with another program while the block runs, if asked to."
    program = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if program:
            program.kill()
            program.wait()


def zoo_update():
    "Make the function that makes one update of TVP on the small zoo."
    zoo = tvp.load_zoo("tiny")
    learner = tvp.make_learner("TVP", zoo, "tiny-minigpt4", tvp.load_task("shapes"))
    steps = learner.steps(epochs=10_000)
    return lambda: next(steps)


def transformer_update(width: int, layers: int):
    "Make the function that goes forward and backward once: 16 images of 45 tokens, frozen weights."
    layer = nn.TransformerEncoderLayer(
        width, width // 64 or 1, 4 * width, dropout=0, batch_first=True, norm_first=True
    )
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).requires_grad_(False)
    tokens = torch.randn(16, 45, width, requires_grad=True)
    return lambda: model(tokens).square().mean().backward()


def rate(update, threads: int, busy: bool, seconds: float) -> float:
    "Count the updates a second."
    torch.set_num_threads(threads)
    with busy_core(busy):
        update()
        start = now = time.perf_counter()
        made = 0
        while now - start < seconds:
            update()
            made = made + 1
            now = time.perf_counter()
    return made / (now - start)


def measured(update, seconds: float, rounds: int) -> dict:
    "The median rate of each setting; all of them take turns."
    settings = [(threads, busy) for busy in (False, True) for threads in (2, 1)]
    rates = {setting: [] for setting in settings}
    load = []
    for _ in range(rounds):
        load.append(round(os.getloadavg()[0], 2))
        for setting in settings:
            rates[setting].append(rate(update, *setting, seconds))
    names = {
        s: f"{s[0]} thread{'s' * (s[0] > 1)}, {'one core busy' if s[1] else 'idle'}"
        for s in settings
    }
    return {names[s]: round(statistics.median(r), 2) for s, r in rates.items()} | {"load": load}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=4, help="for each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("zoo", "sizes"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }

    def keep(name: str, rates: dict):
        found[name] = rates
        print(name, rates, flush=True)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")

    if args.only != "sizes":
        for name, small in {"zoo": torch_settings.SMALL, "zoo as torch is set": 0}.items():
            with patch.object(torch_settings, "SMALL", small):
                keep(name, measured(zoo_update(), args.seconds, args.rounds))
    if args.only != "zoo":
        for name, size in SIZES.items():
            keep(name, measured(transformer_update(*size), args.seconds, args.rounds))


if __name__ == "__main__":
    main()
