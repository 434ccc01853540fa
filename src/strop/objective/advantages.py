"""Group-relative advantages (Shao et al. 2024, DeepSeekMath, arXiv 2402.03300, section 4.1).

    A_i = (r_i - mean of its group) / (std + 1e-4)

`std` is the group's ("group", GRPO), the batch's ("batch", Lite PPO, arXiv 2508.08221) or absent ("none", Dr. GRPO,
arXiv 2503.20783). Standard deviations are unbiased (n - 1), as in TRL, whose 1e-4 this is too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

STD_EPSILON = 1e-4
TIE_TOLERANCE = 1e-9
"""Rewards of a group that differ by less are a tie: the mean of equal floats need not equal them."""

Scale = Literal["group", "batch", "none"]


@dataclass(frozen=True, slots=True)
class GroupAdvantages:
    """Advantages of one batch, in (problem, sample) order."""

    advantages_N: tuple[float | None, ...]
    """None where the completion is unscored or its group has fewer than two scored members."""
    has_signal_P: tuple[bool, ...]
    """Whether the group's scored rewards differ."""
    group_std_P: tuple[float, ...]
    """Unbiased standard deviation of the group's scored rewards; NaN with fewer than two."""


def group_advantages(
    rewards_N: Sequence[float | None],
    num_generations: int,
    *,
    scale: Scale,
) -> GroupAdvantages:
    """Compute advantages from rewards laid out as P groups of `num_generations`; None is an unscored completion.

    Means and deviations are taken over the same, scored rewards. Raises ValueError when the length is no multiple of
    the group size.
    """
    if num_generations < 2 or len(rewards_N) % num_generations:
        raise ValueError(f"{len(rewards_N)} rewards cannot be split into groups of {num_generations}")
    batch_std = _std([r for r in rewards_N if r is not None])
    advantages: list[float | None] = []
    signals: list[bool] = []
    stds: list[float] = []
    for start in range(0, len(rewards_N), num_generations):
        group = rewards_N[start : start + num_generations]
        scored = [r for r in group if r is not None]
        std = _std(scored)
        signal = len(scored) >= 2 and max(scored) - min(scored) > TIE_TOLERANCE
        stds.append(std)
        signals.append(signal)
        if len(scored) < 2:
            advantages += [None] * num_generations
            continue
        mean = math.fsum(scored) / len(scored)
        divisor = {"group": std, "batch": batch_std, "none": 1.0 - STD_EPSILON}[scale] + STD_EPSILON
        advantages += [None if r is None else (r - mean) / divisor if signal else 0.0 for r in group]
    return GroupAdvantages(tuple(advantages), tuple(signals), tuple(stds))


def _std(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.nan
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
