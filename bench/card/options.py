"""The command line of run.py: options that may be given per contender, and how long each of them runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workloads import WORKLOADS, Workload

CONTENDERS = ("strop", "trl", "unsloth")
RACES = ("L1", "W1", "W2", "W3", "W4", "W5", "W6")
"""What runs where no workload is named."""
FEW_STEPS = 4
LONG_S = 255.0
"""Seconds that L1 trains for where neither steps nor seconds are given."""
UNLIMITED_STEPS, UNLIMITED_S = 10_000, 1e9

PerContender = dict[str, Any]
"""Contender -> value."""


def per_contender(kind: Callable[[str], Any], default: Any = None) -> Callable[[str], PerContender]:
    """Return an argparse type that reads `255`, `strop=255,trl=1000` or `255,trl=1000` into a value per contender.

    A value without a name is for whom no other is given; without one of these, `default` is.
    """

    def read(text: str) -> PerContender:
        named: PerContender = {}
        rest = default
        for part in text.split(","):
            name, separator, value = part.strip().rpartition("=")
            if separator and name not in CONTENDERS:
                raise argparse.ArgumentTypeError(f"`{part}`: no contender `{name}`; there are {', '.join(CONTENDERS)}")
            try:
                number = kind(value)
            except ValueError:
                raise argparse.ArgumentTypeError(f"`{part}`: give {kind.__name__}, or NAME={kind.__name__}") from None
            if separator:
                named[name] = number
            else:
                rest = number
        return dict.fromkeys(CONTENDERS, rest) | named

    return read


def limits(work: Workload, contender: str, given: argparse.Namespace) -> tuple[int, float]:
    """Return (steps, seconds) of a contender's training.

    Without a word about either, a workload that learns runs for `LONG_S` seconds and any other for `FEW_STEPS` steps.
    """
    steps, seconds = given.steps[contender], given.seconds[contender]
    learns = work.shape is None
    if seconds is None:
        seconds = LONG_S if learns and steps is None else UNLIMITED_S
    if steps is None:
        steps = UNLIMITED_STEPS if learns else FEW_STEPS
    return steps, seconds


def wanted_workloads(given: argparse.Namespace) -> tuple[list[Workload], list[str]]:
    """Return what is to be run, and a line for each workload that is left out.

    Raises SystemExit where a workload was asked for by name that is not known or that lacks what it needs.
    """
    names = RACES if given.workloads is None else tuple(filter(None, given.workloads.split(",")))
    works: list[Workload] = []
    left_out: list[str] = []
    for name in names:
        if name not in WORKLOADS:
            raise SystemExit(f"--workloads: `{name}` is not known; there are {', '.join(WORKLOADS)}")
        work = WORKLOADS[name]
        if work.shape is None and not (given.model and given.data):
            needs = f"{name} needs --model (an instruct model's folder) and --data (a folder with GSM8K's rows)"
            if given.workloads is not None:
                raise SystemExit(needs)
            left_out.append(f"{name}: left out. {needs}")
            continue
        works.append(work)
    return works, left_out


def seeds(given: argparse.Namespace) -> list[int]:
    """Return the seeds to run with, in order."""
    return [given.seed] if given.seeds is None else given.seeds


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in CONTENDERS:
            raise argparse.ArgumentTypeError(f"no contender `{name}`; there are {', '.join(CONTENDERS)}")
    return names


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"`{text}`: give whole numbers with commas between") from None


def read(words: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Read the command line; what may be given per contender is a `PerContender`, `seeds` a list or None."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def each(name: str, kind: Callable[[str], Any], default: Any, text: str) -> None:
        everyone = dict.fromkeys(CONTENDERS, default)
        parser.add_argument(
            name, type=per_contender(kind, default), default=everyone, metavar="X|NAME=X,...", help=text
        )

    parser.add_argument("--workloads", help=f"of {', '.join(WORKLOADS)}; without it {', '.join(RACES)}")
    parser.add_argument("--contenders", type=_names, default=list(CONTENDERS))
    each("--steps", int, None, f"optimizer steps, the first reported apart ({FEW_STEPS}; L1: no limit)")
    each("--seconds", float, None, f"training time (L1: {LONG_S:g} unless there are --steps)")
    parser.add_argument("--model", help="L1: folder of the instruct model")
    parser.add_argument("--data", help="L1: folder with train.jsonl and test.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=_numbers, help="several, with commas: a row each")
    each("--micro-batch", int, 8, "peers: per_device_train_batch_size (8)")
    each("--checkpointing", int, 1, "peers: gradient checkpointing (1)")
    each("--utilization", float, 0.2, "peers: gpu_memory_utilization (0.2)")
    parser.add_argument(
        "--sweep", nargs="?", type=_names, const=[name for name in CONTENDERS if name != "strop"], default=[],
        metavar="NAMES", help="L1: peers (or these) first look for their fastest micro-batch",
    )  # fmt: skip
    parser.add_argument("--ablate", action="store_true", help="W1's training without each idea; needs about 55 GiB")
    parser.add_argument("--ablate-tokens", type=int, default=36_000, help="tokens of a micro-batch there")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one run may take")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/strop-bench"))
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "results")
    return parser.parse_args(words)
