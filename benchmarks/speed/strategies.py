"""What each strategy for transfer costs: the time of its training step over that of the plain step.

All steps are made in turns in one run, so that a busy machine slows all of them alike; a ratio is
the median over the turns. The plain step is TVP's, on one source, with clean tokens remembered. It
is made a second time at the end of each turn: what its ratio is away from 1 is the measurement's.

    python benchmarks/speed/strategies.py                     # some minutes; prints a table
    python benchmarks/speed/strategies.py --json FILE         # all figures go to FILE
    python benchmarks/speed/strategies.py --rounds 3          # faster, and less sure
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tvp._files import write_atomic
from tvp._validation import check_int
from tvp.models.zoo import load_zoo
from tvp.prompts.visual_prompt import VisualPrompt
from tvp.training.gradient_estimators import (
    CWAGradient,
    MEFGradient,
    PGNGradient,
    SAMGradient,
    SPSAGradient,
)
from tvp.training.input_transforms import (
    ChannelGainJitter,
    RandomBorderMask,
    RandomJPEG,
    RandomResizePad,
    RandomRotate,
    RandomSpectrum,
    RandomTranslate,
    scale_copies,
)
from tvp.training.learner import Learner
from tvp.training.losses import TaskLoss, TaskSemantics, tvp_losses
from tvp.training.source_transforms import (
    AttentionDropout,
    CleanTokens,
    DropConnect,
    DropPath,
    HeadPermutation,
    PatchDrop,
)
from tvp.training.auxiliary_losses import (
    EncoderConsistency,
    PrototypeContrast,
    SemanticLoss,
    TotalVariation,
    choose_exemplars,
)

from run import machine_info
from timing import BenchmarkSetup, make_setup, paired_ratio, quartiles, time_interleaved

PLAIN = "plain (TVP)"
CONTROL = "plain, again"


def strategies(
    setup: BenchmarkSetup,
) -> dict[str, dict[str, Any]]:  # name -> arguments of Learner that differ from the plain step's
    "List the strategies, one argument of the learner for each."
    sources = [
        DropConnect(),
        DropPath(),
        AttentionDropout(),
        HeadPermutation(),
        PatchDrop(),
        CleanTokens(),
    ]
    views = [
        RandomResizePad(),
        RandomTranslate(),
        RandomRotate(),
        ChannelGainJitter(),
        RandomSpectrum(),
        RandomBorderMask(setup.width),
        RandomJPEG(),
    ]
    estimators = [SAMGradient(), PGNGradient(), MEFGradient(), CWAGradient(), SPSAGradient()]
    listed = {type(each).__name__: {"source_transforms": [each]} for each in sources}
    listed |= {type(each).__name__: {"input_transforms": [each]} for each in views}
    listed["scale_copies"] = {"input_transforms": scale_copies()}
    listed |= {type(each).__name__: {"gradient_estimator": each} for each in estimators}
    return listed | loss_strategies(setup)


def loss_strategies(
    setup: BenchmarkSetup,
) -> dict[str, dict[str, Any]]:  # as above
    "List the losses that are added to the plain ones, and variants of these."
    plain = tvp_losses(clip=setup.clip)
    exemplars = choose_exemplars(setup.task, setup.size, per_class=4)
    added = {
        "SemanticLoss": SemanticLoss(0.1),
        "TotalVariation": TotalVariation,
        "PrototypeContrast": PrototypeContrast(0.1, setup.clip, exemplars),
        "EncoderConsistency": EncoderConsistency(0.1, setup.clip),
    }
    listed = {name: {"losses": [*plain, term]} for name, term in added.items()}
    candidates = TaskLoss(candidates=setup.task.candidates)
    listed["TaskLoss(candidates)"] = {"losses": [candidates, *plain[1:]]}
    clips = [setup.clip] * 4
    listed["TSE with 4 CLIPs"] = {"losses": [*plain[:2], TaskSemantics(0.001, clips)]}
    listed["TSE with 1 of 4 CLIPs"] = {
        "losses": [*plain[:2], TaskSemantics(0.001, clips, sample=1)]
    }
    return listed


def make_steps(
    setup: BenchmarkSetup,
) -> dict[str, Callable]:  # name -> makes one step
    "Make a learner for each strategy, and one epoch, in which clean tokens are remembered."
    other = load_zoo("tiny")["tiny-minigpt4"]
    two = {
        name: {"source": [setup.source, other], "ensemble": name} for name in ("mean", "sampled")
    }
    listed = {PLAIN: {}} | strategies(setup)
    listed |= {f"two sources, {name}": options for name, options in two.items()}
    listed[CONTROL] = {}
    steps = {}
    for name, options in listed.items():
        prompt = VisualPrompt(setup.size, setup.width)
        settings = {
            "source": setup.source,
            "task": setup.task,
            "losses": tvp_losses(clip=setup.clip),
            "batch_size": setup.batch,
        } | options
        losses = settings["losses"]
        settings["losses"] = [
            term(0.1, prompt) if isinstance(term, type) else term for term in losses
        ]
        updates = Learner(prompt, **settings).steps(10**6)
        steps[name] = partial(next, updates)
        for _ in range(2):
            steps[name]()
    return steps


def main(argv: Sequence[str] | None = None) -> None:
    "Measure, print a table of ratios, and write what was measured."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all results")
    parser.add_argument("--rounds", type=int, default=7, help="turns that are measured")
    parser.add_argument("--model", default="tiny-llava", help="the source, of the small zoo")
    arguments = parser.parse_args(argv)
    rounds = check_int("rounds", arguments.rounds)
    steps = make_steps(make_setup(arguments.model))
    times = time_interleaved(steps, rounds)
    ratios = {name: paired_ratio(times, name, PLAIN) for name in steps}
    for name, ratio in ratios.items():
        print(f"{name:24} {ratio['median']:6.2f}  ({ratio['low']:.2f} to {ratio['high']:.2f})")
    seconds = {name: quartiles(values) for name, values in times.items()}
    results = machine_info() | {"model": arguments.model, "ratios": ratios, "seconds": seconds}
    if arguments.json:
        write_atomic(arguments.json, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
