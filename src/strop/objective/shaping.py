"""Length shaping on advantages: right and shorter counts a little more; nothing else changes.

The polarity bonus of QGLAS (2026) adds lam * h to an advantage, with

    h = 1[A > 0] * clip((Lref - L) / Lref, 0, c) / c,        Lref = mean L of the favoured completions of the group

so that no advantage changes its sign. Here lam is relative to the advantage itself, A~ = A (1 + lam h): a factor means
the same whether advantages are divided by the deviation of the group, of the batch, or by nothing. Favoured are the
completions that are right, have A > 0 and stopped by themselves. Groups of wrong answers, in which a length reward
teaches to give up early, and groups of right answers alone keep what they have, which is 0 without other rewards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..types import Metric, ScoredRollout

FULL_BONUS_AT = 0.5
"""c: a completion that is shorter than Lref by this part gets all of the bonus."""


@dataclass(frozen=True, slots=True)
class PolarityBonus:
    """Settings of the shaping; see `rewards.length_shaping`."""

    weight: float = 0.1
    """lam: the largest factor is 1 + weight."""
    from_share: float = 0.3
    """It acts in steps in which at least this share of the completions with a verdict is right."""

    def __str__(self) -> str:
        """Return the sentence that a run begins with."""
        return (
            f"length shaping: the advantage of a right completion shorter than its group's right ones grows by up to "
            f"{self.weight:.0%}, in steps with {self.from_share:.0%} right or more (rewards.length_shaping)"
        )


@dataclass(frozen=True, slots=True)
class Shaped:
    """Advantages after shaping."""

    advantages_N: tuple[float | None, ...]
    metrics: Mapping[str, Metric]


def polarity_bonus(
    advantages_N: Sequence[float | None],
    scored_N: Sequence[ScoredRollout],
    num_generations: int,
    bonus: PolarityBonus,
) -> Shaped:
    """Return the advantages of P groups of G completions, in (problem, sample) order, with the bonus.

    Order within a group makes no difference. Raises ValueError when the lengths do not fit together.
    """
    if num_generations < 1 or len(advantages_N) != len(scored_N) or len(scored_N) % num_generations:
        raise ValueError(f"{len(advantages_N)} advantages, {len(scored_N)} completions, groups of {num_generations}")
    verdicts = [s.correct for s in scored_N if s.correct is not None]
    shaped = list(advantages_N)
    if verdicts and sum(verdicts) >= bonus.from_share * len(verdicts):
        for start in range(0, len(shaped), num_generations):
            _shape_group(shaped, scored_N, range(start, start + num_generations), bonus.weight)
    pairs = [(a, b) for a, b in zip(advantages_N, shaped, strict=True) if a is not None and b is not None]
    flips = sum(_sign(a) != _sign(b) for a, b in pairs)
    metrics = {
        "shaping/touched": Metric(sum(a != b for a, b in pairs), len(pairs)),
        "shaping/sign_flips": Metric(flips, len(pairs)),
    }
    return Shaped(tuple(shaped), metrics)


def _shape_group(shaped: list[float | None], scored_N: Sequence[ScoredRollout], members: range, weight: float) -> None:
    """Change the advantages of one group in place."""
    favoured = {
        i: (advantage, scored_N[i].rollout.num_completion_tokens)
        for i in members
        if scored_N[i].correct and not scored_N[i].rollout.is_truncated
        if (advantage := shaped[i]) is not None and advantage > 0
    }
    if not favoured:
        return
    reference = math.fsum(length for _, length in favoured.values()) / len(favoured)
    for i, (advantage, length) in favoured.items():
        shorter = min(max((reference - length) / max(reference, 1.0), 0.0), FULL_BONUS_AT) / FULL_BONUS_AT
        shaped[i] = advantage * (1.0 + weight * shorter)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
