"""From the outcome of each function to one reward and one verdict: a weighted sum in which unscored is not zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..types import Rollout, ScoredRollout
from .contract import Declaration

LARGEST = 1e100
"""Rewards beyond plus or minus this count as failed: the squares of a deviation would leave the range of a float."""
MARK_SLACK = 1e-6
"""How far below its maximum a correctness function may stay and still say right: sums of parts round."""


class Outcome(NamedTuple):
    """What one function said of one completion: a value, None (does not apply), or a failure with its reason."""

    value: float | None
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Rules:
    """Which functions decide what is right, and which count only then."""

    marks: Mapping[str, float] = field(default_factory=dict[str, float])
    """Value at which each deciding function says right."""
    gated: frozenset[str] = frozenset()


def make_rules(
    names: Sequence[str],
    weights: Sequence[float],
    declared: Mapping[str, Declaration],
    gated: Sequence[str] | None = None,
) -> Rules:
    """Return the rules of a run.

    Functions of kind `correctness` with a weight above 0 decide; where there is none, such of kind `other`; where there
    is none either, such of kind `format`. A function with a weight below 0 says what is not wanted. `gated` None means:
    the functions of kind `format`, if a declared correctness function decides.
    """
    wanted = [name for name, weight in zip(names, weights, strict=True) if weight > 0]
    kinds = {name: declared.get(name, Declaration()).kind for name in names}
    deciding = [name for name in wanted if kinds[name] == "correctness"]
    if gated is None:
        gated = [name for name in names if kinds[name] == "format"] if deciding else []
    for kind in ("other", "format"):
        deciding = deciding or [name for name in wanted if kinds[name] == kind]
    marks = {name: declared.get(name, Declaration()).high - MARK_SLACK for name in deciding if name not in gated}
    return Rules(marks, frozenset(gated))


def is_correct(rules: Rules, outcomes: Mapping[str, Outcome]) -> bool | None:
    """Whether every deciding function that applies reached its maximum; None if none applies or one failed.

    Functions without an outcome yet are left out.
    """
    verdict: bool | None = None
    for name, mark in rules.marks.items():
        if name not in outcomes:
            continue
        value, failure = outcomes[name]
        if failure:
            return None
        if value is not None:
            verdict = verdict is not False and value >= mark
    return verdict


def combine(
    rollout: Rollout,
    names: Sequence[str],
    weights: Sequence[float],
    outcomes: Mapping[str, Outcome],
    rules: Rules | None = None,
) -> ScoredRollout:
    """Return the rollout with sum(weight * value) over the functions that apply, and whether it is right.

    The reward is None (unscored) if a function with a weight failed or none with a weight applies. A function of weight
    0 is logged only: its value and its failure are kept and change nothing. A gated function adds its value where the
    completion is right, 0 where it is wrong, and does not apply where nothing decides that. Without `rules`, every
    function with a weight decides at 1 and none is gated.
    """
    rules = make_rules(names, weights, {}) if rules is None else rules
    correct = is_correct(rules, outcomes)
    scores: dict[str, float | None] = {}
    failures: dict[str, str] = {}
    terms: list[float] = []
    is_scored = True
    for name, weight in zip(names, weights, strict=True):
        value, failure = outcomes[name]
        scores[name] = None if failure else value
        if failure:
            failures[name] = failure
            is_scored = is_scored and weight == 0
        elif weight == 0 or value is None:
            continue
        elif name not in rules.gated:
            terms.append(weight * value)
        elif correct is not None:
            terms.append(weight * value if correct else 0.0)
    reward: float | None = None
    if terms and is_scored:
        reward = sum(terms)
        if not abs(reward) <= LARGEST:
            failures["weighted sum"] = f"the weighted sum is {reward:g}"
            reward = None
    return ScoredRollout(rollout=rollout, reward=reward, scores=scores, failures=failures, correct=correct)
