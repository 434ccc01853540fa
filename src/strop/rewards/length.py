"""Rewards for length, in tokens, never characters. Every one needs a correctness function beside it.

With c = 1 for a right completion and 0 for a wrong one, and L its tokens (the stop token included), sums and means
taken over the scored members of a group:

    soft_overlong   -factor * clip((L - (Lmax - cache)) / cache, 0, 1)               right or wrong
    kimi            lam if right else min(0, lam), lam = 0.5 - (L - min) / (max - min)
    gr3             c * (1 / (1 + alpha L / mean L) - 1)
    lead            c * (exp(-alpha z) - 1), z = (L - mean of the right) / their deviation
    l1_max          c * (clip(alpha (target - L) + 0.5, 0, 1) - 1)
    cosine          c * (cosine from max_value_correct to min_value_correct - 1), the same with its own ends if wrong
    truncation      -c where the completion ran into its limit

gr3, lead, l1_max, cosine and truncation stand in their papers for the whole reward of a completion. Here they are what
is to be added to a correctness of 0 or 1 so that the sum, with weights of 1, is the paper's reward. A completion whose
`correct` is None gets None. No value depends on the order of the group: sums are exact (`math.fsum`).

`polarity_bonus`, the default shaping, is no reward: it acts on advantages (`objective/shaping.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import RewardError
from .contract import reward

Ids = Sequence[Sequence[int]]
Correct = Sequence[bool | None]

CACHE_SHARE = 0.125
"""Part of the token limit in which `soft_overlong` grows, by default."""
_EPSILON = 1e-6


def _lengths(completion_ids: Ids) -> list[int]:
    return [len(ids) for ids in completion_ids]


def _limit(name: str, option: str, given: int | None, max_completion_length: int | None) -> int:
    limit = max_completion_length if given is None else given
    if limit is None or limit < 1:
        raise RewardError(
            f"reward `{name}` got {limit} as the longest completion; a number of tokens is needed",
            hint=f"set rewards.options.{name}.{option}, or rollout.max_completion_length",
        )
    return limit


def _positive(name: str, option: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise RewardError(
            f"reward `{name}`: {option} is {value!r}; a number above 0 is needed",
            hint=f"set rewards.options.{name}.{option}",
        )
    return value


def _per_member(lengths: Sequence[int], correct: Correct, value: Callable[[int, bool], float]) -> list[float | None]:
    return [None if right is None else value(length, right) for length, right in zip(lengths, correct, strict=True)]


@reward(kind="length", low=-0.5, high=0.0, version="1")
def soft_overlong(
    completion_ids: Ids,
    max_completion_length: int | None = None,
    *,
    factor: float = 0.5,
    cache: int | None = None,
    max_length: int | None = None,
    **_: Any,
) -> list[float | None]:
    """Soft overlong punishment: nothing up to `cache` tokens before the limit, then linearly down to -factor.

    Equation 13 of DAPO (Yu et al. 2025, arXiv 2503.14476), whose rewards are -1 and 1, so that its -1 is half their
    distance; `factor` is 0.5 for rewards of 0 and 1. `cache` is an eighth of the limit by default; `max_length` is
    rollout.max_completion_length.
    """
    limit = _limit("soft_overlong", "max_length", max_length, max_completion_length)
    buffer = max(1, round(limit * CACHE_SHARE)) if cache is None else cache
    return _overlong("soft_overlong", _lengths(completion_ids), limit, buffer, factor)


@reward(kind="length", low=-1.0, high=0.0, version="1")
def get_soft_overlong_punishment(
    completion_ids: Ids,
    max_completion_length: int | None = None,
    *,
    max_completion_len: int | None = None,
    soft_punish_cache: int | None = None,
    **_: Any,
) -> list[float | None]:
    """`soft_overlong` under TRL's name, with its options and its least value of -1."""
    name = "get_soft_overlong_punishment"
    limit = _limit(name, "max_completion_len", max_completion_len, max_completion_length)
    buffer = max(1, round(limit * CACHE_SHARE)) if soft_punish_cache is None else soft_punish_cache
    return _overlong(name, _lengths(completion_ids), limit, buffer, 1.0)


def _overlong(name: str, lengths: Sequence[int], limit: int, cache: int, factor: float) -> list[float | None]:
    if not 0 <= cache <= limit:
        raise RewardError(
            f"reward `{name}`: a cache of {cache} tokens does not fit into a limit of {limit}",
            hint=f"set the cache in rewards.options.{name} to 0 to {limit}",
        )
    _positive(name, "factor", factor)
    start = limit - cache
    return [
        0.0 if length <= start else -factor if length >= limit else -factor * ((length - start) / cache)
        for length in lengths
    ]


@reward(kind="length", scope="group", low=-0.5, high=0.5, version="1")
def kimi(completion_ids: Ids, correct: Correct, **_: Any) -> list[float | None]:
    """The length reward of Kimi k1.5 (arXiv 2501.12599, section 2.3.3), to be added to correctness.

    Alone it puts a short wrong answer above a long right one. Groups of one length get 0.
    """
    lengths = _lengths(completion_ids)
    scored = [length for length, right in zip(lengths, correct, strict=True) if right is not None]
    shortest, longest = min(scored, default=0), max(scored, default=0)
    if shortest == longest:
        return _per_member(lengths, correct, lambda length, right: 0.0)

    def value(length: int, right: bool) -> float:
        lam = 0.5 - (length - shortest) / (longest - shortest)
        return lam if right else min(0.0, lam)

    return _per_member(lengths, correct, value)


@reward(kind="length", scope="group", low=-1.0, high=0.0, version="1")
def gr3(completion_ids: Ids, correct: Correct, *, alpha: float = 0.33, **_: Any) -> list[float | None]:
    """Group relative reward rescaling (GR3, arXiv 2603.10535): a right answer counts 1 / (1 + alpha L / mean L).

    Without the paper's calibration of alpha by the advantages. Wrong answers keep 0 whatever their length.
    """
    _positive("gr3", "alpha", alpha)
    lengths = _lengths(completion_ids)
    scored = [length for length, right in zip(lengths, correct, strict=True) if right is not None]
    mean = max(math.fsum(scored) / len(scored), _EPSILON) if scored else 1.0
    return _per_member(
        lengths, correct, lambda length, right: 1.0 / (1.0 + alpha * length / mean) - 1.0 if right else 0.0
    )


@reward(kind="length", scope="group", low=-1.0, high=1.0, version="1")
def lead(completion_ids: Ids, correct: Correct, *, alpha: float = 0.05, **_: Any) -> list[float | None]:
    """The length reward of GRPO-LEAD (arXiv 2504.09696): a right answer counts exp(-alpha z).

    z is its length in standard deviations (over n) from the mean of the right ones of the group. The paper's -1 for
    wrong answers and its weights for difficulty are left out. `high` holds up to groups of 192 at the default alpha.
    """
    _positive("lead", "alpha", alpha)
    lengths = _lengths(completion_ids)
    right_lengths = [length for length, right in zip(lengths, correct, strict=True) if right]
    if not right_lengths:
        return _per_member(lengths, correct, lambda length, right: 0.0)
    mean = math.fsum(right_lengths) / len(right_lengths)
    deviation = math.sqrt(math.fsum((length - mean) ** 2 for length in right_lengths) / len(right_lengths))

    def value(length: int, right: bool) -> float:
        return math.exp(-alpha * ((length - mean) / (deviation + _EPSILON))) - 1.0 if right else 0.0

    return _per_member(lengths, correct, value)


@reward(kind="length", scope="group", low=-1.0, high=0.0, version="1")
def l1_max(
    completion_ids: Ids, correct: Correct, *, target: int | None = None, alpha: float = 3e-4, **_: Any
) -> list[float | None]:
    """LCPO-Max of L1 (arXiv 2503.04697): a right answer counts clip(alpha (target - L) + 0.5, 0, 1).

    `target` is a number of tokens and has to be set; the paper writes it into the prompt. At `target` + 0.5 / alpha
    tokens a right answer counts no more than a wrong one.
    """
    _positive("l1_max", "alpha", alpha)
    if target is None or isinstance(target, bool) or target < 1:
        raise RewardError(
            f"reward `l1_max`: target is {target!r}; a number of tokens is needed",
            hint="set rewards.options.l1_max.target to the length that answers should keep to",
        )
    return _per_member(
        _lengths(completion_ids), correct,
        lambda length, right: min(1.0, max(0.0, alpha * (target - length) + 0.5)) - 1.0 if right else 0.0,
    )  # fmt: skip


@reward(kind="length", scope="group", low=-1.0, high=0.0, version="1")
def cosine(
    completion_ids: Ids,
    correct: Correct,
    max_completion_length: int | None = None,
    *,
    max_len: int | None = None,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    min_value_wrong: float = 0.0,
    max_value_wrong: float = 0.0,
    **_: Any,
) -> list[float | None]:
    """The cosine reward (Yeo et al. 2025, arXiv 2502.03373, appendix C.1), less the correctness that it stands for.

    A right answer counts from `max_value_correct` (no tokens) to `min_value_correct` (`max_len` tokens and beyond: the
    cosine is clamped). The wrong side, from `min_value_wrong` at no tokens to `max_value_wrong`, is off: it would pay
    wrong answers for being long. `max_len` is rollout.max_completion_length. Names of options are TRL's.
    """
    ends = (min_value_correct, max_value_correct, min_value_wrong, max_value_wrong)
    values = _cosines("cosine", completion_ids, correct, max_len, max_completion_length, ends)
    return [None if value is None else value - float(bool(right)) for value, right in zip(values, correct, strict=True)]


@reward(kind="length", scope="group", low=-1.0, high=1.0, version="1")
def get_cosine_scaled_reward(
    completion_ids: Ids,
    correct: Correct,
    max_completion_length: int | None = None,
    *,
    max_len: int | None = None,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    **_: Any,
) -> list[float | None]:
    """The cosine reward under TRL's name, with its options and its values, the wrong side on as there.

    TRL judges the answer inside; here `correct` is what the run's correctness functions say.
    """
    ends = (min_value_correct, max_value_correct, min_value_wrong, max_value_wrong)
    return _cosines("get_cosine_scaled_reward", completion_ids, correct, max_len, max_completion_length, ends)


def _cosines(
    name: str,
    completion_ids: Ids,
    correct: Correct,
    max_len: int | None,
    max_completion_length: int | None,
    ends: tuple[float, float, float, float],
) -> list[float | None]:
    limit = _limit(name, "max_len", max_len, max_completion_length)
    long_right, short_right, short_wrong, long_wrong = ends

    def value(length: int, right: bool) -> float:
        short, long = (short_right, long_right) if right else (short_wrong, long_wrong)
        return long + 0.5 * (short - long) * (1.0 + math.cos(math.pi * min(1.0, length / limit)))

    return _per_member(_lengths(completion_ids), correct, value)


@reward(kind="length", scope="group", low=-1.0, high=0.0, version="1")
def truncation(completion_ids: Ids, correct: Correct, truncated: Sequence[bool], **_: Any) -> list[float | None]:
    """-1 for a right answer that ran into the token limit, so that with correctness at weight 1 it counts 0.

    The truncation penalty of DLER (arXiv 2510.15110). Give it the weight of the correctness function.
    """
    cut = zip(correct, truncated, strict=True)
    return [None if right is None else -1.0 if right and stopped else 0.0 for right, stopped in cut]
