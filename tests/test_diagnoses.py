"""Monitors: every diagnosis fires on a history that shows it and not on a near miss, and a resume changes nothing."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import rollout

from strop.config import Config, DiagnosisName, MonitorConfig
from strop.config_load import dump_config, load_config
from strop.errors import ConfigError
from strop.monitor.diagnoses import CATALOGUE
from strop.monitor.findings import Monitor, Round
from strop.monitor.history import COLUMNS, History
from strop.monitor.observe import final_answer, observe, repeated_share, top_answer_share
from strop.trainer.watch import stopped_by
from strop.types import Rollout, ScoredRollout

ROOT = Path(__file__).resolve().parent.parent
HEALTHY = {
    "reward": 0.5, "accuracy": 0.5, "length": 40.0, "clipped": 0.01, "unscored": 0.0, "zero_std": 0.2,
    "all_right": 0.1, "all_wrong": 0.1, "length_correlation": 0.0, "log_length_gap": -0.1, "repetition": 0.1,
    "sign_flips": 0.0, "format_share": 0.1, "answer_share": 0.02, "entropy": 0.5, "grad_norm": 0.3, "logp_gap": 0.005,
}  # fmt: skip
"""A step at which nothing is wrong; nothing was evaluated."""


def history(steps: int, **columns: Any) -> list[dict[str, float]]:
    """Observations of a healthy run, but for some columns: a number, or a function of the step."""
    return [
        {**HEALTHY, **{name: value(i) if callable(value) else value for name, value in columns.items()}}
        for i in range(steps)
    ]


def feed(monitor: Monitor, observations: Sequence[Mapping[str, float]], start: int = 0) -> list[Round]:
    return [monitor.feed(start + i, observation) for i, observation in enumerate(observations)]


def told(rounds: Sequence[Round]) -> list[tuple[int, str, str]]:
    return [(f.step, f.name, f.level) for r in rounds for f in r.told]


def monitor(**settings: Any) -> Monitor:
    return Monitor.create(MonitorConfig(**settings))


def every_tenth(value: Any) -> Any:
    return lambda i: value(i) if i % 10 == 9 else math.nan


@dataclass(frozen=True)
class Case:
    """One diagnosis: steps that show it, at a level, and steps that nearly do."""

    columns: dict[str, Any]
    near_miss: dict[str, Any]
    level: str = "act"
    steps: int = 60
    first: int = 19
    """The step at which it is told."""


def grows(per_step: float) -> Any:
    return lambda i: -0.2 + per_step * i


CASES: dict[DiagnosisName, Case] = {
    "budget_too_small": Case(
        {"clipped": lambda i: 0.26 if i == 0 else 0.0}, {"clipped": lambda i: 0.25 if i == 0 else 0.0}, first=0
    ),
    "truncated": Case({"clipped": 0.2}, {"clipped": 0.1}, level="warn"),
    "reward_length_correlation": Case({"length_correlation": 0.51}, {"length_correlation": 0.3}),
    # Wrong answers that grow from shorter than right ones to as long, as in a healthy demo, are no finding.
    "wrong_answers_grow": Case({"log_length_gap": grows(0.01)}, {"log_length_gap": grows(0.006)}, "warn", first=45),
    "wrong_right_length_ratio": Case({"log_length_gap": math.log(2.6)}, {"log_length_gap": math.log(1.49)}),
    "no_signal": Case({"zero_std": 0.9, "all_right": 0.0}, {"zero_std": 0.9, "all_right": 0.41}),
    "all_right": Case({"zero_std": 0.99, "all_right": 0.99}, {"zero_std": 0.85, "all_right": 0.85}),
    "repetition": Case({"repetition": lambda i: 0.1 if i < 5 else 0.4}, {"repetition": 0.9}, level="warn", first=19),
    "shaping_sign_flips": Case({"sign_flips": 0.005}, {"sign_flips": 0.0}, level="warn"),
    "unscored": Case({"unscored": 0.06}, {"unscored": 0.005}),
    "format_share": Case({"format_share": 0.55}, {"format_share": 0.3}),
    "answer_collapse": Case({"answer_share": 0.95}, {"answer_share": 0.3}),
    "held_out_flat": Case(
        {"reward": lambda i: 0.3 + 0.01 * i, "eval": every_tenth(lambda i: 0.4)},
        {"reward": lambda i: 0.3 + 0.01 * i, "eval": every_tenth(lambda i: 0.4 + 0.01 * i)},
        first=39,
    ),
    "accuracy_falls": Case(
        {"accuracy": lambda i: 0.5 if i < 30 else 0.2}, {"accuracy": lambda i: 0.5 if i < 30 else 0.41}, first=41
    ),
    "entropy_collapse": Case(
        {"entropy": lambda i: 0.5 if i == 0 else 0.005},
        {"entropy": lambda i: 0.5 if i == 0 else 0.005, "accuracy": 0.95},
    ),
    "entropy_rise": Case({"entropy": lambda i: 0.5 if i < 10 else 2.5}, {"entropy": lambda i: 0.5 if i < 10 else 1.0},
                         level="warn", first=19),
    "gradient_spike": Case(
        {"grad_norm": lambda i: 30.0 if i == 50 else 0.3}, {"grad_norm": lambda i: 0.5 if i == 50 else 0.3}, first=50
    ),
    "logprob_mismatch": Case(
        {"logp_gap": lambda i: 0.02 if i == 0 else 0.2}, {"logp_gap": lambda i: 0.001 if i == 0 else 0.019}
    ),
}  # fmt: skip


def test_every_diagnosis_has_a_name_in_the_settings_and_a_case_here() -> None:
    assert tuple(CATALOGUE) == get_args(DiagnosisName)
    assert set(CASES) == set(CATALOGUE)
    assert all(entry.warn <= entry.act for entry in CATALOGUE.values())


@pytest.mark.parametrize("name", CASES)
def test_a_diagnosis_fires_when_it_should_and_not_on_a_near_miss(name: DiagnosisName) -> None:
    case = CASES[name]
    rounds = feed(monitor(), history(case.steps, **case.columns))
    mine = [(step, level) for step, found, level in told(rounds) if found == name]
    assert mine
    assert mine[0][0] == case.first
    assert case.level in {level for _, level in mine}
    assert len(mine) <= 2
    (finding, *_) = [f for r in rounds for f in r.told if f.name == name]
    assert re.search(r"\d", finding.text), "a finding says its number"
    assert finding.note().startswith(f"step {case.first + 1}: {name} ({finding.level}, above ")
    assert f"\n  hint: {CATALOGUE[name].hint}" in finding.note()
    near = feed(monitor(), history(case.steps, **case.near_miss))
    assert [t for t in told(near) if t[1] == name] == []


def test_nothing_is_said_of_a_healthy_run() -> None:
    """Noise around healthy numbers, an accuracy that grows, an entropy that falls with it, wrong answers that catch up
    with right ones in length: what the demo looks like."""
    draw = random.Random(0)
    columns = {
        name: (lambda i, v=value: v + (0.02 * draw.gauss(0, 1) if v not in (0.0,) else 0.0))
        for name, value in HEALTHY.items()
        if name not in ("clipped", "grad_norm", "logp_gap", "length")
    }
    columns |= {
        "accuracy": lambda i: min(0.95, 0.4 + i / 100),
        "entropy": lambda i: 0.5 * max(0.18, 1 - i / 60),
        "log_length_gap": lambda i: -0.5 * math.exp(-i / 25) + 0.05 * draw.gauss(0, 1),
        "all_right": lambda i: min(0.6, i / 100),
        "zero_std": lambda i: min(0.65, 0.05 + i / 100),
        "grad_norm": lambda i: 0.3 * math.exp(0.3 * draw.gauss(0, 1)),
    }
    assert told(feed(monitor(), history(300, **columns))) == []


@pytest.mark.parametrize("name", CASES)
def test_numbers_that_are_missing_tell_nothing(name: DiagnosisName) -> None:
    rounds = feed(monitor(window=4), [dict.fromkeys(COLUMNS, math.nan)] * 30)
    assert told(rounds) == []
    assert all(r.values == {} for r in rounds)


# --- when it is told -------------------------------------------------------------------------------------------------


def test_a_finding_is_told_once_again_after_it_ceased_and_every_hundred_steps() -> None:
    watch = monitor(window=20, actions={"all_right": "off"})
    high, low = {"unscored": 0.02}, {"unscored": 0.0}
    rounds = feed(watch, history(30, **high) + history(50, **low) + history(150, **high))
    steps = [step for step, _, _ in told(rounds)]
    ceased = [i for i, r in enumerate(rounds) if r.ceased]
    assert steps == [19, 85, 185]
    assert ceased == [45]
    assert watch.summary() == [
        {"name": "unscored", "first_step": 19, "level": "warn", "text": "2.0% of completions have no reward",
         "holds": True}
    ]  # fmt: skip


def test_a_number_on_the_threshold_is_told_once() -> None:
    wobble = history(200, format_share=lambda i: 0.302 if i % 40 < 20 else 0.295)
    assert len(told(feed(monitor(), wobble))) == 2  # at 19, and again after a hundred steps


def test_a_worse_finding_is_told_at_once() -> None:
    rounds = feed(monitor(), history(25, unscored=0.02) + history(20, unscored=0.2))
    assert [(step, level) for step, _, level in told(rounds)] == [(19, "warn"), (28, "act")]


# --- what follows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["pause", "stop"])
def test_the_action_follows_at_the_act_threshold_and_once_until_it_ceased(action: str) -> None:
    watch = monitor(action=action)
    assert [r.halt for r in feed(watch, history(40, unscored=0.02)) if r.halt] == []
    ends = [f for r in feed(watch, history(140, unscored=0.2), 40) if (f := r.halt)]
    assert [(f.name, f.action) for f in ends] == [("unscored", action)]
    feed(watch, history(40), 180)
    again = [f for r in feed(watch, history(40, unscored=0.2), 220) if (f := r.halt)]
    assert len(again) == 1


def test_one_diagnosis_can_have_its_own_action_and_thresholds() -> None:
    both = {"unscored": 0.2, "format_share": 0.6}
    watch = monitor(action="pause", actions={"unscored": "off", "format_share": "stop"})
    halts = [f for r in feed(watch, history(30, **both)) if (f := r.halt)]
    assert [(f.name, f.action) for f in halts] == [("format_share", "stop")]
    assert all(f.name != "unscored" for r in feed(watch, history(30, **both), 30) for f in r.told)
    assert told(feed(monitor(thresholds={"unscored": (0.3, 0.4)}), history(30, unscored=0.2))) == []
    strict = feed(monitor(thresholds={"unscored": (0.001, 0.002)}), history(30, unscored=0.004))
    assert told(strict) == [(19, "unscored", "act")]


def test_stop_comes_before_pause() -> None:
    watch = monitor(action="pause", actions={"format_share": "stop"})
    (end,) = [f for r in feed(watch, history(25, unscored=0.2, format_share=0.6)) if (f := r.halt)]
    assert (end.name, end.action) == ("format_share", "stop")
    error = stopped_by(end, 20)
    assert error.exit_code == 1
    assert "format_share" in error.message
    assert "60%" in error.message
    assert end.cause in error.message
    assert "rewards.weights" in error.hint


# --- resume ----------------------------------------------------------------------------------------------------------


@st.composite
def observations(draw: st.DrawFn) -> list[dict[str, float]]:
    seed = draw(st.integers(0, 10_000))
    rng = random.Random(seed)
    level = {name: rng.choice([0.0, 0.2, 0.6, 3.0]) for name in COLUMNS}
    rows = []
    for _ in range(draw(st.integers(2, 60))):
        if rng.random() < 0.1:
            name = rng.choice(COLUMNS)
            level[name] = rng.choice([0.0, 0.01, 0.3, 0.9, 4.0])
        rows.append({n: math.nan if rng.random() < 0.1 else v + 0.01 * rng.random() for n, v in level.items()})
    return rows


@given(observations(), st.integers(0, 60), st.sampled_from(["warn", "pause", "stop"]))
def test_a_resumed_monitor_comes_to_the_same_findings(rows: list[dict[str, float]], at: int, action: str) -> None:
    at = min(at, len(rows))
    config = MonitorConfig(window=4, action=action)  # type: ignore[arg-type]
    whole = Monitor.create(config)
    rounds = feed(whole, rows)
    first = Monitor.create(config)
    before = feed(first, rows[:at])
    second = Monitor.create(config, json.loads(json.dumps(first.as_dict(), allow_nan=False)))
    assert before + feed(second, rows[at:], at) == rounds
    assert second.as_dict() == whole.as_dict()
    assert second.summary() == whole.summary()


def test_the_history_is_bounded() -> None:
    watch = monitor(window=3)
    feed(watch, history(500))
    assert {len(column) for column in watch.history.columns.values()} == {15}
    assert len(json.dumps(watch.as_dict())) < 10_000


def test_a_history_goes_on_under_another_window() -> None:
    old = History(10)
    for i in range(60):
        old.add({"reward": float(i)})
    new = History.from_dict(4, json.loads(json.dumps(old.as_dict())))
    assert new.mean("reward") == 57.5
    assert new.first["reward"] == 0.0
    assert new.steps == 60


def test_a_best_window_of_another_length_is_not_compared_with() -> None:
    old = History(2)
    for i in range(100):
        old.add({"accuracy": 0.8 if 91 <= i <= 92 else 0.4 + 0.01 * (i % 3)})
    stored = json.loads(json.dumps(old.as_dict()))
    assert stored["best"]["accuracy"][0] == pytest.approx(0.8)
    assert History.from_dict(2, stored).best == old.best
    longer = History.from_dict(4, stored)
    longer.add({"accuracy": 0.4})
    assert longer.fall("accuracy", 0.0) == pytest.approx((0.4075, 0.6025))
    del stored["best"]  # a checkpoint of an earlier version: what its columns show is found again
    again = History.from_dict(2, stored)
    again.add({"accuracy": 0.4})
    assert again.best == {"accuracy": pytest.approx((0.8, 0.0))}


def test_a_step_without_verdicts_does_not_end_a_fall() -> None:
    watch = monitor()
    rounds = feed(watch, history(60, accuracy=lambda i: math.nan if i == 50 else 0.5 if i < 30 else 0.2))
    found = [(step, level) for step, name, level in told(rounds) if name == "accuracy_falls"]
    assert found == [(41, "warn"), (43, "act")]


@pytest.mark.parametrize(("share", "prompts", "size"), [(0.1, 4, 8), (0.3, 8, 8), (0.6, 2, 4)])
def test_a_policy_that_stays_the_same_does_not_fall(share: float, prompts: int, size: int) -> None:
    """Problems are of any difficulty, so steps differ by much more than coin tosses do."""
    rng = random.Random(0)
    falls = 0
    for _ in range(30):
        found = History(20)
        for _ in range(300):
            chances = [rng.betavariate(share, 1 - share) for _ in range(prompts)]
            found.add({"accuracy": statistics.fmean(rng.random() < p for p in chances for _ in range(size))})
            value = CATALOGUE["accuracy_falls"].measure(found)
            if value is not None and value > CATALOGUE["accuracy_falls"].warn:
                falls += 1
                break
    assert falls <= 1


def test_a_score_is_never_a_reward_where_there_is_an_accuracy() -> None:
    watch = monitor(window=4)
    feed(watch, history(4, accuracy=0.5, reward=3.0))
    assert watch.score() == 0.5
    feed(watch, history(3, accuracy=math.nan, reward=3.0), 4)
    assert watch.score() is None
    watch = monitor(window=4)
    feed(watch, history(4, accuracy=math.nan, reward=3.0))
    assert watch.score() == 3.0


@given(st.lists(st.floats(-5, 5), min_size=4, max_size=20))
def test_the_slope_is_that_of_a_fitted_line(values: list[float]) -> None:
    h = History(4)
    for v in values:
        h.add({"reward": v})
    slope, _ = statistics.linear_regression(range(len(values)), values)
    assert h.slope("reward", 4) == pytest.approx(slope, abs=1e-9)
    assert h.span("reward") == len(values) - 1
    assert h.slope("reward", len(values) + 1) is None


# --- what is seen of a step ------------------------------------------------------------------------------------------


def one(
    group: int, reward: float | None, length: int, *, text: str = "1", answer: str | None = None, **scores: float | None
) -> ScoredRollout:
    made: Rollout = rollout([1], list(range(length)), problem_id=f"p{group}")
    made = replace(made, text=text, problem=replace(made.problem, row={"answer": answer} if answer else {}))
    return ScoredRollout(made, reward, scores or {"reward": reward})


def see(scored: Sequence[ScoredRollout], correct: Sequence[bool | None], size: int, **kwargs: Any) -> dict[str, float]:
    advantages = kwargs.pop("advantages", [0.0] * len(scored))
    settings: dict[str, Any] = {"weights": {"reward": 1.0}, "format_functions": frozenset(), **kwargs}
    judged = [replace(s, correct=c) for s, c in zip(scored, correct, strict=True)]
    seen = observe(judged, advantages, size, **settings)
    return {**seen.columns, **seen.metrics}


def test_pay_for_length_shows_and_longer_right_answers_do_not() -> None:
    lengths = [10, 12, 14, 30, 32, 34]
    right = [False, False, False, True, True, True]
    honest = see([one(0, float(c), n) for c, n in zip(right, lengths, strict=True)], right, 6)
    assert honest["length_correlation"] == 0.0  # although right answers are longer throughout
    greedy = [c + 0.01 * n for c, n in zip(right, lengths, strict=True)]
    paid = see([one(0, r, n) for r, n in zip(greedy, lengths, strict=True)], right, 6)
    assert paid["length_correlation"] == pytest.approx(1.0)
    wrong_only = [1.0 if c else 0.01 * n for c, n in zip(right, lengths, strict=True)]
    seen = see([one(0, r, n) for r, n in zip(wrong_only, lengths, strict=True)], right, 6)
    assert 0.6 < seen["length_correlation"] < 0.8
    unknown = see([one(0, r, n) for r, n in zip(greedy, lengths, strict=True)], [None] * 6, 6)
    assert unknown["length_correlation"] == pytest.approx(statistics.correlation(greedy, lengths))
    assert math.isnan(unknown["groups/all_right"])


def test_groups_are_told_apart() -> None:
    scored = [one(g, r, 5) for g, r in enumerate([1.0, 1.0, 0.0, 0.0, 1.0, 0.0]) for _ in range(1)]
    seen = see(scored, [True, True, False, False, True, False], 2)
    assert (seen["groups/all_right"], seen["groups/all_wrong"]) == (1 / 3, 1 / 3)


def test_lengths_of_right_and_wrong_are_compared_within_a_group() -> None:
    # The hard problem is long and always wrong; within the mixed group both are equally long.
    scored = [one(0, 1.0, 10), one(0, 0.0, 10), one(1, 0.0, 90), one(1, 0.0, 90)]
    seen = see(scored, [True, False, False, False], 2)
    assert seen["log_length_gap"] == 0.0
    assert seen["completions/mean_length_right"] == 10
    assert seen["completions/mean_length_wrong"] == pytest.approx(190 / 3)


def test_a_flipped_sign_is_counted_in_mixed_groups_alone() -> None:
    scored = [one(0, r, 5) for r in (0.4, 0.5)] + [one(1, r, 5) for r in (0.1, 0.2)]
    seen = see(scored, [True, False, False, False], 2, advantages=[-0.7, 0.7, -0.7, 0.7])
    assert seen["sign_flips"] == 1.0
    right_way = see(scored, [True, False, False, False], 2, advantages=[0.7, -0.7, -0.7, 0.7])
    assert right_way["sign_flips"] == 0.0
    unscored = see(scored, [True, None, True, None], 2, advantages=[None, None, None, None])
    assert math.isnan(unscored["sign_flips"])


def test_the_share_of_form_is_what_was_paid_for_it() -> None:
    scored = [one(0, 0.5, 5, exact=0.0, think_format=1.0), one(0, 1.5, 5, exact=1.0, think_format=1.0)]
    scored.append(one(0, None, 5, exact=None, think_format=1.0))  # unscored: nothing was paid
    scored.append(one(0, -1.0, 5, exact=0.0, think_format=None))
    weights = {"exact": 1.0, "think_format": 0.5}
    seen = see(scored, [False, True, None, False], 4, weights=weights, format_functions=frozenset({"think_format"}))
    assert seen["format_share"] == pytest.approx(1.0 / 2.0)
    form = frozenset({"think_format"})
    seen = see(scored, [False, True, None, False], 4, weights=weights, format_functions=form, gated=form)
    assert seen["format_share"] == pytest.approx(0.5 / 1.5)


@given(st.lists(st.integers(0, 3), max_size=60))
def test_repeated_4_grams_are_counted(ids: list[int]) -> None:
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    share = repeated_share(ids)
    assert share == (None if not grams else pytest.approx(1 - len(set(grams)) / len(grams)))


@pytest.mark.parametrize(
    ("answers", "golds", "excess"),
    [
        (["7"] * 8, ["1", "2", "3", "4"], 1.0),
        (["1", "1", "2", "2", "3", "3", "4", "4"], ["1", "2", "3", "4"], 0.0),
        (["yes"] * 8, ["yes", "no", "yes", "no"], 1.0),
        (["yes", "yes", "no", "no", "yes", "yes", "no", "no"], ["yes", "no", "yes", "no"], 0.0),
        (["same"] * 8, ["same"] * 4, 0.0),
        (["7", "7", "2", "2", "3", "3", "7", "7"], [None] * 4, (0.5 - 0.25) / 0.75),
    ],
)
def test_one_answer_to_different_prompts(answers: list[str], golds: list[str | None], excess: float) -> None:
    rollouts = [one(i // 2, 0.0, 5, text=a, answer=golds[i // 2]).rollout for i, a in enumerate(answers)]
    assert top_answer_share(rollouts) == pytest.approx(excess)
    assert top_answer_share(rollouts[:6]) is None  # of three prompts nothing can be said


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>3+4 = 7</think>\n7 ", "7"),
        (r"so \boxed{12} or \boxed{ 13 }", "13"),
        ("work #### 42\n", "42"),
        ("x" * 100 + " which makes 19 apples", "19"),
        ("<think>never ends 5", None),
        ("YES", "yes"),
        ("", None),
        (None, None),
    ],
)
def test_final_answers(text: str | None, answer: str | None) -> None:
    assert final_answer(text) == answer


# --- settings and documentation --------------------------------------------------------------------------------------


def test_settings_of_monitors_are_checked_and_survive_the_resolved_file(tmp_path: Path) -> None:
    given_settings = ["monitor.actions.truncated=off", "monitor.thresholds.unscored=[0, 1]", "monitor.action=stop"]
    config = load_config(None, given_settings)
    assert config.monitor.actions == {"truncated": "off"}
    assert config.monitor.thresholds == {"unscored": (0, 1)}
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config != Config()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("monitor.actions.truncatd=stop", "did you mean `truncated`?"),
        ("monitor.actions.truncated=halt", "'warn', 'pause', 'stop' or 'off'"),
        ("monitor.thresholds.truncated=[0.5]", "[warn, act]"),
        ("monitor.thresholds.truncated=[0.5, 0.1]", "the first no larger"),
        ("monitor.thresholds.nothing=[0.1, 0.5]", "is not a diagnosis"),
        ("monitor.action=off", "'warn', 'pause' or 'stop'"),
        ("monitor.window=1", "greater than or equal to 2"),
    ],
)
def test_mistakes_in_settings_of_monitors_are_named(setting: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [setting])
    assert said in error.value.message
    assert error.value.hint


def test_the_page_lists_every_diagnosis_with_its_thresholds() -> None:
    text = (ROOT / "docs/monitors.md").read_text(encoding="utf-8")
    rows = {
        name: (float(warn), float(act))
        for name, warn, act in re.findall(r"^\| `(\w+)` \|.*?\| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE)
    }
    assert rows == {name: (entry.warn, entry.act) for name, entry in CATALOGUE.items()}


def test_every_setting_that_a_hint_names_exists() -> None:
    known = {f"{section}.{key}" for section, values in Config().model_dump().items() for key in values}
    sections = "|".join(Config.model_fields)
    for name, entry in CATALOGUE.items():
        named = re.findall(rf"\b(?:{sections})\.\w+", f"{entry.hint} {entry.cause}")
        assert named, name
        assert set(named) <= known, name
