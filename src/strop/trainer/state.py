"""The little state of a run that is not a function of the step number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..monitor.summary import EvalSummary


@dataclass(slots=True)
class RunState:
    """What a checkpoint keeps beside weights and optimizer."""

    step: int = 0
    """Optimizer steps done, skipped ones included: the next step's number."""
    nonfinite_steps: int = 0
    """Steps in a row that were not finite."""
    num_tokens: int = 0
    """Prompt and completion tokens of all training rollouts so far, as TRL counts them."""
    seconds: float = 0.0
    """Wall time of all processes of this run."""
    reward: float | None = None
    """Mean reward of the last step; None when nothing was scored."""
    eval_before: EvalSummary | None = None
    best: tuple[int, float, int] | None = None
    """Step of the best checkpoint, its `Monitor.score`, and the steps that this is a mean of."""

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "step": self.step,
            "nonfinite_steps": self.nonfinite_steps,
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
            "reward": self.reward,
            "eval_before": self.eval_before.to_dict() if self.eval_before else None,
            "best": list(self.best) if self.best else None,
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> RunState:
        """Inverse of `as_dict`."""
        before = EvalSummary.from_dict(stored["eval_before"]) if stored["eval_before"] else None
        return cls(
            stored["step"],
            stored["nonfinite_steps"],
            stored["num_tokens"],
            stored["seconds"],
            stored["reward"],
            before,
            (int(best[0]), float(best[1]), int(best[2])) if (best := stored.get("best")) else None,
        )
