"""`summary.json`: how a run ended, in one small object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

StopReason = Literal["finished", "interrupted", "paused", "stopped", "diverged", "failed"]
"""`interrupted` by a signal; `paused` and `stopped` by a monitor; `failed` by the canary or for want of memory."""


@dataclass(frozen=True, slots=True)
class EvalSummary:
    """One evaluation on held-out problems."""

    pass_at_1: float
    """Mean share of right completions, 0 to 1."""
    pass_at_k: float
    """Share of problems with at least one right completion among k, 0 to 1."""
    k: int
    problems: int

    def to_dict(self) -> dict[str, Any]:
        """Return the form used in `summary.json` and in a checkpoint's state."""
        return {"pass@1": self.pass_at_1, "pass@k": self.pass_at_k, "k": self.k, "problems": self.problems}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> EvalSummary:
        """Inverse of `to_dict`."""
        return cls(stored["pass@1"], stored["pass@k"], stored["k"], stored["problems"])


def build_summary(
    *,
    steps: int,
    seconds: float,
    stopped: StopReason,
    reward: float | None,
    eval_before: EvalSummary | None = None,
    eval_after: EvalSummary | None = None,
    diagnoses: Sequence[Mapping[str, Any]] = (),
    best: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of `summary.json`.

    `steps` counts the steps of the whole run, `seconds` its wall time over all processes, `reward` is the mean of the
    last step. An evaluation that was not made is null. `diagnoses` are those that held at some time. `best` names
    the best checkpoint that is kept.
    """
    return {
        "stopped": stopped,
        "steps": steps,
        "seconds": round(seconds, 3),
        "reward": reward,
        "eval_before": eval_before.to_dict() if eval_before else None,
        "eval_after": eval_after.to_dict() if eval_after else None,
        "best": dict(best) if best else None,
        "diagnoses": [dict(entry) for entry in diagnoses],
    }
