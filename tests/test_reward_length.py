"""Rewards for length against formulas written out slowly, and what they do to advantages in many synthetic groups."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from strop.errors import RewardError
from strop.objective.advantages import group_advantages
from strop.rewards.contract import declaration_of
from strop.rewards.length import (
    cosine,
    get_cosine_scaled_reward,
    get_soft_overlong_punishment,
    gr3,
    kimi,
    l1_max,
    lead,
    soft_overlong,
    truncation,
)
from strop.rewards.library import LIBRARY
from strop.rewards.lint import terms_of

LIMIT = 1024
Values = list[float | None]
NAMES = ("soft_overlong", "kimi", "gr3", "lead", "l1_max", "cosine", "truncation")
OPTIONS: dict[str, dict[str, Any]] = {"l1_max": {"target": 400, "alpha": 1e-3}}


def values(name: str, lengths: Sequence[int], correct: Sequence[bool | None], **options: Any) -> Values:
    return LIBRARY[name](
        completion_ids=[[7] * n for n in lengths],
        correct=list(correct),
        truncated=[n >= LIMIT for n in lengths],
        max_completion_length=LIMIT,
        **{**OPTIONS.get(name, {}), **options},
    )


def group(rng: random.Random, right: float, size: int = 8) -> tuple[list[int], list[bool]]:
    """Log-normal lengths, wrong answers 1.4 times as long, cut at the limit."""
    correct = [rng.random() < right for _ in range(size)]
    lengths = [min(LIMIT, max(1, round(rng.lognormvariate(math.log(400 * (1 if c else 1.4)), 0.5)))) for c in correct]
    return lengths, correct


# --- values ---


def slow(name: str, lengths: list[int], correct: list[bool]) -> list[float]:
    """The formulas of the papers, as they stand there, with statistics from another library."""
    right = [n for n, c in zip(lengths, correct, strict=True) if c]
    out: list[float] = []
    for n, c in zip(lengths, correct, strict=True):
        if name == "soft_overlong":
            buffer = LIMIT // 8
            paper = 0.0 if n <= LIMIT - buffer else -1.0 if n > LIMIT else (LIMIT - buffer - n) / buffer
            out.append(paper / 2)
        elif name == "kimi":
            lam = 0.0 if len(set(lengths)) == 1 else 0.5 - (n - min(lengths)) / (max(lengths) - min(lengths))
            out.append(lam if c else min(0.0, lam))
        elif name == "gr3":
            out.append(int(c) * 1 / (1 + 0.33 * n / statistics.fmean(lengths)) - int(c))
        elif name == "lead":
            z = (n - statistics.fmean(right)) / (statistics.pstdev(right) + 1e-6) if c else 0.0
            out.append(math.exp(-0.05 * z) - 1 if c else 0.0)
        elif name == "l1_max":
            out.append(int(c) * sorted((0.0, 1e-3 * (400 - n) + 0.5, 1.0))[1] - int(c))
        elif name == "cosine":
            low, high = (0.5, 1.0) if c else (0.0, 0.0)
            out.append(low + 0.5 * (high - low) * (1 + math.cos(n / LIMIT * math.pi)) - int(c))
        else:
            out.append(-1.0 if c and n == LIMIT else 0.0)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_the_papers(name: str) -> None:
    rng = random.Random(1)
    seen = set()
    for _ in range(200):
        lengths, correct = group(rng, rng.random())
        assert values(name, lengths, correct) == pytest.approx(slow(name, lengths, correct), abs=1e-12)
        seen |= set(values(name, lengths, correct))
    assert len(seen) > 1


@pytest.mark.parametrize("name", NAMES)
def test_permuting_the_group_permutes_the_values_bit_for_bit(name: str) -> None:
    rng = random.Random(2)
    for _ in range(100):
        lengths, correct = group(rng, 0.6, size=9)
        order = rng.sample(range(9), 9)
        moved = values(name, [lengths[i] for i in order], [correct[i] for i in order])
        assert moved == [values(name, lengths, correct)[i] for i in order]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "soft_overlong"])
def test_a_completion_without_a_verdict_has_no_value_and_moves_no_other(name: str) -> None:
    lengths, correct = [100, 300, 500, 1024], [True, False, True, True]
    with_none = values(name, [*lengths, 9], [*correct, None])
    assert with_none == [*values(name, lengths, correct), None]
    assert values(name, [5, 6], [None, None]) == [None, None]


@pytest.mark.parametrize("name", [*NAMES, "get_soft_overlong_punishment", "get_cosine_scaled_reward"])
def test_values_stay_within_the_declared_range(name: str) -> None:
    declaration = declaration_of(LIBRARY[name])
    assert declaration.kind == "length"
    assert declaration.scope == ("sample" if "overlong" in name else "group")
    rng = random.Random(3)
    for size in (2, 8, 64):
        for share in (0.0, 0.5, 1.0):
            lengths, correct = group(rng, share, size)
            for value in values(name, lengths, correct):
                assert value is not None
                assert declaration.low <= value <= declaration.high


def test_tokens_count_and_not_characters() -> None:
    long_words = soft_overlong([[1] * 10], max_completion_length=16, completions=["x" * 10_000])
    many_tokens = soft_overlong([[1] * 16], max_completion_length=16, completions=["x"])
    assert (long_words, many_tokens) == ([0.0], [-0.5])


def test_trl_names_give_trl_values() -> None:
    """The examples of TRL's documentation, and its edges."""
    given = {"max_completion_len": 100, "soft_punish_cache": 20}
    lengths = [[1] * n for n in (80, 90, 100, 130)]
    assert get_soft_overlong_punishment(lengths, **given) == [0.0, -0.5, -1.0, -1.0]
    without_cache = get_soft_overlong_punishment(lengths[2:], max_completion_len=100, soft_punish_cache=0)
    assert without_cache == [0.0, -1.0]
    half = [[1] * 50, [1] * 50]
    assert get_cosine_scaled_reward(half, [True, False], max_len=100) == pytest.approx([0.75, -0.75])
    ends = [[], [1] * 100, [1] * 250]
    assert get_cosine_scaled_reward(ends, [True] * 3, max_len=100) == pytest.approx([1.0, 0.5, 0.5])
    assert get_cosine_scaled_reward(ends, [False] * 3, max_len=100) == pytest.approx([-1.0, -0.5, -0.5])
    assert {t.builtin for t in terms_of(["get_soft_overlong_punishment", "get_cosine_scaled_reward"])} == {
        "get_soft_overlong_punishment", "get_cosine_scaled_reward",
    }  # fmt: skip


def test_cosine_and_its_trl_name_differ_by_correctness_alone() -> None:
    lengths, correct = group(random.Random(4), 0.5)
    ids = [[0] * n for n in lengths]
    wrong_side = {"min_value_wrong": -1.0, "max_value_wrong": -0.5}
    ours = cosine(ids, correct, LIMIT, **wrong_side)
    trl = get_cosine_scaled_reward(ids, correct, LIMIT)
    assert [a + c for a, c in zip(ours, correct, strict=True)] == pytest.approx(trl)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("call", "setting"),
    [
        (lambda: l1_max([[1]], [True]), "l1_max.target"),
        (lambda: soft_overlong([[1]]), "rollout.max_completion_length"),
        (lambda: soft_overlong([[1]], 10, cache=11), "rewards.options.soft_overlong"),
        (lambda: soft_overlong([[1]], 10, factor=-1), "soft_overlong.factor"),
        (lambda: gr3([[1]], [True], alpha=0), "gr3.alpha"),
        (lambda: lead([[1]], [True], alpha=math.inf), "lead.alpha"),
        (lambda: cosine([[1]], [True], max_len=0), "cosine.max_len"),
    ],
)
def test_a_wrong_option_is_named(call: Callable[[], Values], setting: str) -> None:
    with pytest.raises(RewardError) as error:
        call()
    assert setting in error.value.hint


def test_edges() -> None:
    assert kimi([[1], [1]], [True, False]) == [0.0, 0.0]
    assert gr3([[], []], [True, True]) == [0.0, 0.0]
    assert lead([[1] * 5, [1] * 9], [True, False]) == [0.0, 0.0]
    assert truncation([[1]] * 3, [True, False, None], [True, True, True]) == [-1.0, 0.0, None]


# --- what they do to advantages ---


def advantages(name: str | None, lengths: list[int], correct: list[bool], *, alone: bool = False) -> list[float]:
    extra = [0.0] * len(lengths) if name is None else [v or 0.0 for v in values(name, lengths, correct)]
    rewards = [0.0 * c + e if alone else float(c) + e for c, e in zip(correct, extra, strict=True)]
    result = group_advantages(rewards, len(lengths), scale="none").advantages_N
    return [a or 0.0 for a in result]


def flip_share(name: str, *, alone: bool = False) -> float:
    """Share of the advantages of mixed groups whose sign is not that of correctness alone."""
    rng, flips, count = random.Random(5), 0, 0
    for _ in range(1000):
        lengths, correct = group(rng, rng.uniform(0.1, 0.9))
        if len(set(correct)) == 2:
            plain, changed = advantages(None, lengths, correct), advantages(name, lengths, correct, alone=alone)
            flips += sum(p * c < 0 for p, c in zip(plain, changed, strict=True))
            count += len(plain)
    return flips / count


def correlation(name: str, *, right: bool, **options: Any) -> float:
    """Mean correlation of length and advantage over groups that are all right or all wrong; 0 where nothing differs."""
    rng, found = random.Random(6), []
    for _ in range(1000):
        lengths, correct = group(rng, float(right))
        rewards = [v or 0.0 for v in values(name, lengths, correct, **options)]
        result = [a or 0.0 for a in group_advantages(rewards, len(rewards), scale="none").advantages_N]
        constant = len(set(result)) == 1 or len(set(lengths)) == 1
        found.append(0.0 if constant else statistics.correlation(lengths, result))
    return statistics.fmean(found)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("soft_overlong", 0.01, 0.12), ("kimi", 0.02, 0.12), ("l1_max", 0.001, 0.2), ("gr3", 0.0, 0.03),
        ("cosine", 0.0, 0.05), ("lead", 0.0, 0.002),
    ],
)  # fmt: skip
def test_how_often_a_length_reward_turns_an_advantage_round(name: str, low: float, high: float) -> None:
    assert low <= flip_share(name) <= high


def test_kimi_alone_turns_a_quarter_round() -> None:
    assert flip_share("kimi", alone=True) > 0.2
    assert flip_share("kimi", alone=True) > 3 * flip_share("kimi")


def test_what_groups_of_wrong_answers_learn() -> None:
    """Additive terms teach to give up early, a cosine with its wrong side teaches to ramble, the others are neutral."""
    assert correlation("soft_overlong", right=False) < -0.3
    assert correlation("kimi", right=False) < -0.8
    on = {"min_value_wrong": -1.0, "max_value_wrong": -0.5}
    assert correlation("cosine", right=False, **on) > 0.9
    for name in ("gr3", "lead", "l1_max", "cosine", "truncation"):
        assert correlation(name, right=False) == 0.0


@pytest.mark.parametrize("name", ["kimi", "gr3", "lead", "l1_max", "cosine"])
def test_groups_of_right_answers_learn_to_be_short(name: str) -> None:
    assert correlation(name, right=True) < -0.8
