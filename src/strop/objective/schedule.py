"""Learning rate as a function of the step, so that resuming needs nothing but the step number."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, warmup_steps: int, max_steps: int, kind: str = "constant") -> float:
    """Return the learning rate of step 0, 1, ….

    Linear warm-up reaches `peak` at step `warmup_steps - 1`; then constant, or linear or cosine decay that ends just
    above 0 at step `max_steps - 1`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    remaining = max(1, max_steps - warmup_steps)
    progress = min(1.0, (step - warmup_steps) / remaining)
    factors = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return peak * factors[kind]
