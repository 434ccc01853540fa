"""Reward functions in TRL's signature for runs of a random byte model."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def share_of_low_bytes(completions: list[Any], **kwargs: Any) -> list[float]:
    """Share of characters below 'P', so that every completion of a random byte model differs a little."""
    return [sum(c < "P" for c in _text(c)) / max(1, len(_text(c))) for c in completions]


def kills_the_trainer(completions: list[Any], trainer_state: Any, **kwargs: Any) -> list[float]:
    """Kill the training process, the parent of this worker's parent, in the step STROP_TEST_KILL_STEP; once."""
    marker = Path(os.environ["STROP_TEST_KILL_MARKER"])
    if trainer_state.global_step == int(os.environ["STROP_TEST_KILL_STEP"]) and not marker.exists():
        marker.touch()
        launcher = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()
        os.kill(int(launcher[1]), signal.SIGKILL)
    return share_of_low_bytes(completions)
