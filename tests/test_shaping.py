"""The polarity bonus: a slow reference, no sign changed, nothing learned without right answers, its place in a step."""

from __future__ import annotations

import math
import random
import statistics
from typing import Literal

import pytest

from strop.config import Config
from strop.objective.advantages import group_advantages
from strop.objective.samples import SampleBatch, make_samples
from strop.objective.shaping import PolarityBonus, Shaped, polarity_bonus
from strop.trainer.parts import length_shaping
from strop.types import Problem, Rollout, ScoredRollout, Segment

Scale = Literal["group", "batch", "none"]
SCALES: tuple[Scale, ...] = ("group", "batch", "none")
ALWAYS = PolarityBonus(weight=0.2, from_share=0.0)
LIMIT = 1024


def scored(length: int, correct: bool | None, reward: float | None = None, *, cut: bool = False) -> ScoredRollout:
    problem = Problem("p/0", "q", (1, 2))
    tokens = tuple(range(length))
    segments = (
        Segment("prompt", (1, 2), (False, False)),
        Segment("sampled", tokens, (True,) * length, (0.0,) * length),
    )
    rollout = Rollout(problem, 0, segments, "t", "length" if cut else "stop", 0, 0)
    value = (None if correct is None else float(correct)) if reward is None else reward
    return ScoredRollout(rollout, value, {"r": value}, correct=correct)


def shape(scored_N: list[ScoredRollout], size: int, scale: Scale = "none", bonus: PolarityBonus = ALWAYS) -> Shaped:
    plain = group_advantages([s.reward for s in scored_N], size, scale=scale)
    return polarity_bonus(plain.advantages_N, scored_N, size, bonus)


def groups(seed: int, count: int, size: int = 8, style: float = 0.0) -> list[ScoredRollout]:
    rng, made = random.Random(seed), []
    for _ in range(count):
        share = rng.choice([0.0, 0.2, 0.5, 0.8, 1.0])
        for _ in range(size):
            right = rng.random() < share
            n = min(LIMIT, max(1, round(rng.lognormvariate(math.log(100 if right else 140), 0.5))))
            made.append(scored(n, right, right + style * rng.random(), cut=rng.random() < 0.05))
    return made


def slow(plain: list[float | None], members: list[ScoredRollout], weight: float) -> list[float | None]:
    """One group, as the formula stands."""
    favoured = [
        i for i, (a, s) in enumerate(zip(plain, members, strict=True))
        if a is not None and a > 0 and s.correct and s.rollout.finish_reason == "stop"
    ]  # fmt: skip
    if not favoured:
        return plain
    lengths = [len(s.rollout.segments[1].token_ids) for s in members]
    reference = statistics.fmean(lengths[i] for i in favoured)
    out = list(plain)
    for i in favoured:
        h = sorted((0.0, (reference - lengths[i]) / reference, 0.5))[1] / 0.5
        out[i] = plain[i] + weight * h * abs(plain[i])  # type: ignore[operator, arg-type]
    return out


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("style", [0.0, 0.3])
def test_it_is_the_formula(scale: Scale, style: float) -> None:
    batch = groups(1, 200, style=style)
    plain = list(group_advantages([s.reward for s in batch], 8, scale=scale).advantages_N)
    shaped = shape(batch, 8, scale).advantages_N
    for start in range(0, len(batch), 8):
        part = slice(start, start + 8)
        assert shaped[part] == pytest.approx(slow(plain[part], batch[part], 0.2), rel=1e-12)
    assert shaped != tuple(plain)


@pytest.mark.parametrize("scale", SCALES)
def test_no_sign_changes_in_a_thousand_groups(scale: Scale) -> None:
    batch = groups(2, 1000, style=0.3)
    plain = group_advantages([s.reward for s in batch], 8, scale=scale).advantages_N
    result = shape(batch, 8, scale)
    for before, after in zip(plain, result.advantages_N, strict=True):
        assert before is not None
        assert after is not None
        assert math.copysign(1, before) == math.copysign(1, after)
        assert abs(before) <= abs(after) <= 1.2 * abs(before) + 1e-12
    assert result.metrics["shaping/sign_flips"].value == 0.0
    assert 0.05 < result.metrics["shaping/touched"].value < 0.5


@pytest.mark.parametrize("right", [True, False])
def test_groups_of_one_verdict_stay_at_exactly_0(right: bool) -> None:
    rng = random.Random(3)
    batch = [scored(rng.randint(1, 500), right) for _ in range(8 * 100)]
    assert set(shape(batch, 8).advantages_N) == {0.0}


def test_wrong_answers_learn_nothing_about_length_even_where_style_differs() -> None:
    rng = random.Random(4)
    batch = [scored(rng.randint(1, 500), False, rng.random()) for _ in range(8 * 50)]
    plain = group_advantages([s.reward for s in batch], 8, scale="none").advantages_N
    assert shape(batch, 8).advantages_N == plain


def test_right_answers_of_a_mixed_group_learn_to_be_short() -> None:
    correlations = []
    rng = random.Random(5)
    for _ in range(1000):
        right = [rng.randint(20, 400) for _ in range(5)]
        batch = [scored(n, True) for n in right] + [scored(300, False)] * 3
        found = shape(batch, 8).advantages_N[:5]
        correlations.append(statistics.correlation(right, found) if len(set(found)) > 1 else 0.0)  # type: ignore[arg-type]
    assert statistics.fmean(correlations) < -0.8


def test_the_factor_does_not_depend_on_how_advantages_are_scaled() -> None:
    batch = groups(6, 50)
    factors = []
    for scale in SCALES:
        plain = group_advantages([s.reward for s in batch], 8, scale=scale).advantages_N
        shaped = shape(batch, 8, scale).advantages_N
        factors.append([b / a if a else 1.0 for a, b in zip(plain, shaped, strict=True)])  # type: ignore[operator]
    assert factors[0] == pytest.approx(factors[1])
    assert factors[0] == pytest.approx(factors[2])


def test_order_within_a_group_makes_no_difference() -> None:
    batch = groups(7, 1)
    batch[0], batch[1] = scored(50, True), scored(90, True)
    base = shape(batch, 8).advantages_N
    order = random.Random(8).sample(range(8), 8)
    moved = shape([batch[i] for i in order], 8).advantages_N
    assert moved == tuple(base[i] for i in order)


def test_truncated_and_unscored_completions_get_nothing() -> None:
    batch = [scored(10, True, cut=True), scored(100, True), scored(50, True), scored(5, None), scored(80, False)]
    plain = group_advantages([s.reward for s in batch], 5, scale="none").advantages_N
    shaped = shape(batch, 5).advantages_N
    assert shaped[0] == plain[0]
    assert shaped[3] is None
    assert shaped[1] == plain[1], "longer than the mean"
    assert shaped[2] == pytest.approx(plain[2] * (1 + 0.2 * (25 / 75) / 0.5))  # type: ignore[operator]


def test_it_waits_until_enough_is_right() -> None:
    batch = [scored(10, True), scored(50, True)] + [scored(100, False)] * 6
    unchanged = group_advantages([s.reward for s in batch], 8, scale="none").advantages_N
    early = shape(batch, 8, bonus=PolarityBonus(0.2, 0.3))
    assert early.advantages_N == unchanged
    assert early.metrics["shaping/touched"].value == 0.0
    assert shape(batch, 8, bonus=PolarityBonus(0.2, 0.25)).advantages_N != unchanged
    nothing_known = [scored(10, None, 1.0), scored(50, None, 0.0)]
    assert shape(nothing_known, 2).advantages_N == (0.5, -0.5)


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 3"):
        polarity_bonus([0.0] * 4, [scored(1, True)] * 4, 3, ALWAYS)
    with pytest.raises(ValueError, match="2 advantages"):
        polarity_bonus([0.0] * 2, [scored(1, True)] * 4, 2, ALWAYS)


def samples(batch: list[ScoredRollout], shaping: PolarityBonus | None) -> SampleBatch:
    return make_samples(
        batch, 8, loss_type="dapo", scale_rewards="group", max_completion_length=LIMIT,
        mask_truncated_completions=False, keep_groups_without_signal=False, shaping=shaping,
    )  # fmt: skip


def test_samples_are_trained_with_the_shaped_advantages() -> None:
    batch = groups(9, 40)
    plain, shaped = samples(batch, None), samples(batch, ALWAYS)
    assert shaped.advantages_N == shape(batch, 8, "group").advantages_N != plain.advantages_N
    kept = {id(s.scored): s.advantage for s in shaped.samples}
    assert kept == {id(s): a for s, a in zip(batch, shaped.advantages_N, strict=True) if id(s) in kept}
    assert [s.token_weight for s in shaped.samples] == [s.token_weight for s in plain.samples]
    assert {"shaping/touched", "shaping/sign_flips"} == set(shaped.metrics) - set(plain.metrics)


def test_the_config_chooses() -> None:
    default = length_shaping(Config())
    assert default == PolarityBonus(weight=0.1, from_share=0.3)
    assert "10%" in str(default)
    off = Config.model_validate({"rewards": {"length_shaping": "none"}})
    assert length_shaping(off) is None
    own = {"length_shaping_weight": 0.5, "length_shaping_from": 0.0}
    assert length_shaping(Config.model_validate({"rewards": own})) == PolarityBonus(0.5, 0.0)
