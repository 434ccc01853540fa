"""Functions of group scope, what counts as right, gating, options and versions, through real workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from strop.config import RewardsConfig
from strop.errors import RewardError
from strop.rewards.pool import RewardPool
from strop.types import Problem, Rollout, Segment

FUNCTIONS = """
import time
from strop.rewards.contract import reward

@reward(kind="correctness", version="7")
def right(completions, answer, **kwargs):
    return [None if a is None else float(a in c) for c, a in zip(completions, answer)]

@reward(kind="format", low=-1.0)
def tidy(completions, **kwargs):
    if completions[0] == "raise":
        raise ValueError("untidy")
    return [0.5 for _ in completions]

@reward(kind="length", scope="group")
def rank(completions, correct, completion_ids, truncated, max_completion_length, log_extra, log_metric, **kwargs):
    if "hang" in completions:
        with open("calls.txt", "a") as file:
            file.write("x")
        time.sleep(1000)
    log_extra("seen", ["%d/%d %s %s %d" % (i, len(completions), c, t, max_completion_length)
                       for i, (c, t) in enumerate(zip(correct, truncated))])
    log_metric("groups", len(completions))
    order = sorted(completions, key=len)
    return [float(order.index(c)) if ok else None for c, ok in zip(completions, correct)]

@reward(kind="correctness", scope="group")
def majority(completions):
    most = max(sorted(set(completions)), key=completions.count)
    return [float(c == most) for c in completions]

@reward(scope="group")
def short(completions):
    return [1.0]

def needs_correct(completions, correct):
    return [1.0]

def with_defaults(completions, answer, *, scale=1.0, correct=None, **kwargs):
    return [scale * len(c) for c in completions]

def plain(completions, **kwargs):
    return [float(len(c) > 2) for c in completions]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.py").write_text(FUNCTIONS)
    return tmp_path


def pool_of(*names: str, log: Path | None = None, **settings: Any) -> RewardPool:
    funcs = tuple(name if name in ("numeric", "think_format") else f"f.py:{name}" for name in names)
    config = RewardsConfig(funcs=funcs, **settings)
    return RewardPool(config, default_funcs=(), verdict_log=log, max_completion_length=64)


def rollout(
    text: str, index: int = 0, problem: str = "t/0", *, answer: str | None = "3", version: int = 0, cut: bool = False
) -> Rollout:
    segments = (Segment("prompt", (1, 2), (False,) * 2), Segment("sampled", (3,), (True,), (-1.0,)))
    asked = Problem(problem, "q", (1, 2), {"answer": answer})
    seed = 100 * version + 10 * int(problem[-1]) + index
    return Rollout(asked, index, segments, text, "length" if cut else "stop", version, seed)


def test_a_group_is_scored_once_when_it_is_complete_in_the_order_of_its_samples() -> None:
    texts = {"t/0": ["333", "3", "no"], "t/1": ["3", "33", "x3y"]}
    finished = [("t/0", 2), ("t/1", 1), ("t/0", 0), ("t/1", 0), ("t/1", 2), ("t/0", 1)]
    with pool_of("right", "rank", workers=2, weights=(1.0, 0.5)) as pool:
        scored = pool.score(
            (rollout(texts[problem][g], g, problem, cut=g == 2) for problem, g in finished), group_size=3
        )
        assert [(s.rollout.problem.id, s.rollout.sample_index) for s in scored] == finished
        by_place = {(s.rollout.problem.id, s.rollout.sample_index): s for s in scored}
        assert [by_place["t/0", g].scores["rank"] for g in range(3)] == [2.0, 0.0, None]
        assert [by_place["t/1", g].scores["rank"] for g in range(3)] == [0.0, 1.0, 2.0]
        assert [by_place["t/0", g].reward for g in range(3)] == [2.0, 1.0, 0.0]
        assert [by_place["t/0", g].correct for g in range(3)] == [True, True, False]
        seen = pool.take_extras()["seen"]
        assert [seen[finished.index(("t/0", g))] for g in range(3)] == [
            "0/3 True False 64", "1/3 True False 64", "2/3 False True 64",
        ]  # fmt: skip
        assert pool.take_metrics() == {"groups": [3.0, 3.0]}


def test_groups_are_told_apart_and_need_no_size() -> None:
    with pool_of("right", "rank") as pool:
        old = [rollout("3" * n, n, version=1) for n in (1, 2)]
        new = [rollout("3" * n, n, version=2) for n in (4, 3)]
        scored = pool.score([*old, *new])
        assert [s.scores["rank"] for s in scored] == [0.0, 1.0, 1.0, 0.0]
        for size in (1, 2):  # one after the other of one problem
            scored = pool.score([*old, *old], group_size=size)
            assert [s.scores["rank"] for s in scored] == [0.0, size - 1.0] * 2


def test_a_group_that_lacks_members_is_named() -> None:
    with pool_of("right", "rank") as pool, pytest.raises(RewardError, match="t/0 has 2 of 3 completions, and rank"):
        pool.score([rollout("3"), rollout("3", 1)], group_size=3)
    with pool_of("right") as pool:  # without functions of group scope nothing waits for them
        assert [s.reward for s in pool.score([rollout("3"), rollout("3", 1)], group_size=3)] == [1.0, 1.0]


def test_a_hang_in_a_group_function_leaves_the_group_unscored(folder: Path) -> None:
    log = folder / "verdicts.jsonl"
    texts = [("3", "t/0"), ("hang", "t/0"), ("3", "t/1"), ("33", "t/1")]
    rollouts = [rollout(text, i % 2, problem) for i, (text, problem) in enumerate(texts)]
    for timeout_s in (0.7, 60.0):  # the second time the verdict is replayed
        with pool_of("right", "rank", log=log, timeout_s=timeout_s) as pool:
            scored = pool.score(rollouts, group_size=2)
        assert [s.reward for s in scored] == [None, None, 1.0, 2.0]
        assert {s.failures.get("rank") for s in scored[:2]} == {"ran past the limit of 0.7 s (rewards.timeout_s)"}
        assert [s.correct for s in scored] == [True, False, True, True]
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [entry["function"] for entry in entries] == ["rank", "rank"]
    assert len({entry["text"] for entry in entries}) == 2
    assert (folder / "calls.txt").read_text() == "x"
    log.write_text(log.read_text().splitlines(keepends=True)[0])  # torn between the two lines
    with pool_of("right", "rank", log=log) as pool:
        assert [s.reward for s in pool.score(rollouts, group_size=2)] == [None, None, 1.0, 2.0]


def test_a_group_function_may_decide_what_is_right() -> None:
    with pool_of("rank", "majority", weights=(0.5, 1.0)) as pool:
        scored = pool.score([rollout(text, i) for i, text in enumerate(["aa", "b", "aa"])], group_size=3)
    assert [s.correct for s in scored] == [True, False, True]
    assert [s.scores["rank"] for s in scored] == [1.0, None, 1.0]


def test_a_wrong_number_of_values_for_a_group_stops_the_run() -> None:
    with pool_of("short") as pool, pytest.raises(RewardError, match=r"one number or None per completion \(2\)"):
        pool.score([rollout("a"), rollout("b", 1)], group_size=2)


def test_a_function_of_one_completion_cannot_know_what_is_right() -> None:
    with pool_of("needs_correct") as pool, pytest.raises(RewardError, match="`needs_correct` needs `correct`"):
        pool.score([rollout("a")])


@pytest.mark.parametrize(
    ("settings", "rewards"),
    [
        ({}, [1.5, 0.0, None, None]),
        ({"gated": []}, [1.5, 0.5, 0.5, None]),
        ({"gated": ["tidy"]}, [1.5, 0.0, None, None]),
        ({"weights": [1.0, 0.0]}, [1.0, 0.0, None, 1.0]),
    ],
)
def test_format_counts_where_the_answer_is_right(settings: dict[str, Any], rewards: list[float | None]) -> None:
    rows = [rollout("3"), rollout("no"), rollout("3", answer=None), rollout("raise", answer="r")]
    with pool_of("right", "tidy", **settings) as pool:
        scored = pool.score(rows)
    assert [s.reward for s in scored] == rewards
    assert [s.scores["tidy"] for s in scored] == [0.5, 0.5, 0.5, None]
    assert [s.correct for s in scored] == [True, False, None, True]


def test_undeclared_functions_decide_where_none_is_declared_correctness() -> None:
    with pool_of("plain", "tidy") as pool:
        scored = pool.score([rollout("abc"), rollout("a")])
    assert [s.correct for s in scored] == [True, False]
    assert [s.reward for s in scored] == [1.5, 0.5]  # nothing is declared correctness, so nothing is gated
    with pool_of("plain", "tidy", gated=["tidy"]) as pool:
        assert [s.reward for s in pool.score([rollout("abc"), rollout("a")])] == [1.5, 0.0]


def test_options_reach_the_function_and_columns_do_not_pass_for_them() -> None:
    with pool_of("with_defaults", options={"with_defaults": {"scale": 3.0}}) as pool:
        assert [s.reward for s in pool.score([rollout("ab")])] == [6.0]


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"options": {"rihgt": {}}}, "rewards.options names `rihgt`", "did you mean `right`?"),
        ({"gated": ["tid"]}, "rewards.gated names `tid`", "did you mean `tidy`?"),
        ({"options": {"numeric": {"tolerence": 1}}}, "rewards.options.numeric: there is no option `tolerence`", ""),
    ],
)
def test_wrong_names_are_found_before_anything_is_started(settings: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        pool_of("right", "tidy", "numeric", **settings)
    assert hint in caught.value.hint


def test_an_option_that_a_user_function_lacks_is_found_when_it_is_loaded() -> None:
    with pool_of("with_defaults", options={"with_defaults": {"answer": 1}}) as pool:
        with pytest.raises(RewardError, match="there is no option `answer`") as caught:
            pool.wait_ready()
        assert caught.value.hint == "`with_defaults` has scale"


def test_gating_what_decides_is_refused() -> None:
    with pool_of("right", gated=["right"]) as pool, pytest.raises(RewardError, match="no other function decides"):
        pool.wait_ready()


def test_versions_follow_the_declaration_or_the_source(folder: Path) -> None:
    with pool_of("right", "plain", "numeric") as pool:
        first = pool.versions()
    assert first["right"] == "7"
    assert first["plain"].startswith("source ")
    assert first["numeric"].isdigit()
    (folder / "f.py").write_text(FUNCTIONS + "\n# a change\n")
    with pool_of("right", "plain", "numeric") as pool:
        second = pool.versions()
    assert {name for name in first if first[name] != second[name]} == {"plain"}


def test_a_resumed_run_names_the_functions_that_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from test_wiring import config, reward_file

    from strop import train
    from strop.trainer.checkpoint import read_latest

    entry = reward_file(tmp_path, "return [float(len(str(c)) % 7) for c in completions]")
    train(config(rewards={"funcs": [entry, "think_format"]}, run={"max_steps": 1}), out=tmp_path / "run")
    checkpoint = read_latest(tmp_path / "run")
    assert checkpoint is not None
    assert set(checkpoint.state["reward_versions"]) == {"f", "think_format"}
    capsys.readouterr()
    reward_file(tmp_path, "return [float(len(str(c)) % 7) for c in completions]  # as before")
    train(config(rewards={"funcs": [entry, "think_format"]}, run={"max_steps": 2}), out=tmp_path / "run", resume=True)
    notes = [line for line in capsys.readouterr().out.splitlines() if "changed since the checkpoint" in line]
    assert len(notes) == 1
    assert notes[0].endswith("so rewards may: f")
