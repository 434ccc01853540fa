"""From the outcome of each function to one reward: the weighted sum in which unscored is not zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..types import Rollout, ScoredRollout

LARGEST = 1e100
"""Rewards beyond plus or minus this count as failed: the squares of a deviation would leave the range of a float."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one function said of one completion: a value, None (does not apply), or a failure with its reason."""

    value: float | None
    failure: str = ""


def combine(
    rollout: Rollout, names: Sequence[str], weights: Sequence[float], outcomes: Mapping[str, Outcome]
) -> ScoredRollout:
    """Return the rollout with sum(weight * value) over the functions that apply.

    The reward is None (unscored) if a function with a weight failed or none with a weight applies. A function of weight
    0 is logged only: its value and its failure are kept and change nothing.
    """
    scores = {name: None if outcomes[name].failure else outcomes[name].value for name in names}
    failures = {name: outcomes[name].failure for name in names if outcomes[name].failure}
    weighted = [(name, weight) for name, weight in zip(names, weights, strict=True) if weight != 0]
    terms = [weight * value for name, weight in weighted if (value := scores[name]) is not None]
    reward: float | None = None
    if terms and not any(name in failures for name, _ in weighted):
        reward = sum(terms)
        if not abs(reward) <= LARGEST:
            failures["weighted sum"] = f"the weighted sum is {reward:g}"
            reward = None
    return ScoredRollout(rollout=rollout, reward=reward, scores=scores, failures=failures)
