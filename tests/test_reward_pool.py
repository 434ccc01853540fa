"""The worker pool: user functions as they are, contracts, order, the verdict log."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from pools import FUNCTIONS, pool_of, rewards_of, rollout

from strop.config import RewardsConfig
from strop.errors import RewardError, RunError
from strop.rewards.pool import RewardPool
from strop.types import Message, Problem, Rollout


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.py").write_text(FUNCTIONS)
    return tmp_path


def test_functions_in_trl_form_work_unchanged() -> None:
    names = ("length", "slow_length", "prefix", "async_scorer", "no_row", "numeric", "even_only")
    with pool_of(*names) as pool:
        assert pool.names == names
        assert pool.weights == (1.0,) * 7
        (scored,) = pool.score([rollout("=3")])
    assert scored.scores == {
        "length": 2.0, "slow_length": 2.0, "prefix": 1.0, "async_scorer": 3.0, "no_row": 1.0, "numeric": 1.0,
        "even_only": None,
    }  # fmt: skip
    assert scored.reward == 10.0
    assert scored.failures == {}


def test_conversations_and_all_keywords() -> None:
    chat: tuple[Message, ...] = ({"role": "user", "content": "hi"},)
    with pool_of("chat_length") as pool:
        assert pool.score([rollout("abcd", prompt=chat)])[0].reward == 4.0
    with pool_of("everything") as pool:
        first = rollout(prefill="<think>", when=date(2026, 1, 2), blob=b"\xff", array=np.arange(3))
        second = rollout("\ud800", seed=1, when=date(2026, 1, 3))
        assert [s.reward for s in pool.score([first, second])] == [4.5, 4.0]
        assert pool.take_extras() == {"seen": ["question|3|2026-01-02", "question|3|2026-01-03"]}
        assert pool.take_metrics() == {"ids": [3.0, 3.0]}
        assert pool.take_extras() == {}
        pool.submit(rollout(when=date(2026, 1, 2)), global_step=9)
        assert pool.collect()[0].reward == 9.0


def test_failures_are_unscored_with_their_reason_and_the_worker_lives_on() -> None:
    with pool_of("fussy", "length", "even_only", weights=(1.0, 0.5, 0.0)) as pool:
        scored = pool.score(rollout(text, seed=i) for i, text in enumerate(["raise", "exit", "nan", "recurse", "fine"]))
    assert [s.reward for s in scored] == [None, None, None, None, 3.0]
    assert [s.scores["length"] for s in scored] == [5.0, 4.0, 3.0, 7.0, 4.0]
    reasons = [s.failures.get("fussy", "") for s in scored]
    assert reasons[0].startswith("raised ValueError: not this one (f.py, line ")
    assert reasons[1].startswith("raised SystemExit: 3")
    assert reasons[2] == "returned nan"
    assert reasons[3].startswith("raised RecursionError")
    assert reasons[4] == ""


def test_weight_zero_is_logged_only() -> None:
    with pool_of("length", "fussy", weights=(1.0, 0.0)) as pool:
        scored = pool.score([rollout("raise"), rollout("ok", seed=1)])
    assert [s.reward for s in scored] == [5.0, 2.0]
    assert [s.scores["fussy"] for s in scored] == [None, 1.0]
    assert list(scored[0].failures) == ["fussy"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two_values", r"`two_values` returned \[1.0, 2.0\] \(list of length 2\); a list with one number"),
        ("a_string", r"`a_string` returned \['good'\].*value is a str"),
        ("boom", r"log_extra\('x', ...\) got \[1, 2\]"),
    ],
)
def test_a_broken_contract_stops_the_run(name: str, message: str) -> None:
    with pool_of("length", name, weights=(1.0, 0.0)) as pool:
        with pytest.raises(RewardError, match=message):
            pool.score([rollout()])
        with pytest.raises(RewardError, match=message):
            pool.submit(rollout())


def test_columns_that_cannot_be_given_are_named(folder: Path) -> None:
    with pool_of("length", "prefix") as pool:
        with pytest.raises(RewardError, match="a column `prompts`"):
            pool.submit(rollout(prompts="x"))
        with pytest.raises(RewardError, match="the column f cannot be sent"):
            pool.submit(rollout(f=lambda: 1))
        bare = rollout()
        problem = Problem("t/9", "q", (1, 2), {"question": "?"})
        with pytest.raises(RewardError, match="`prefix` needs the column answer, which row t/9 does not have"):
            pool.score([Rollout(problem, 0, bare.segments, "a", "stop", 0, 1)])


def test_load_errors_surface_before_any_rollout(folder: Path) -> None:
    with pytest.raises(RewardError, match=r"the file `g\.py`"):
        RewardPool(RewardsConfig(funcs=("g.py:length",)), default_funcs=())
    with pytest.raises(RewardError, match="no reward function"):
        RewardPool(RewardsConfig(), default_funcs=())
    with pool_of("lenght") as pool, pytest.raises(RewardError, match="has no function `lenght`") as caught:
        pool.wait_ready()
    assert "`length`" in caught.value.hint
    (folder / "dies.py").write_text("import os\nos._exit(9)\n")
    with (
        RewardPool(RewardsConfig(funcs=("dies.py:f",)), default_funcs=()) as pool,
        pytest.raises(
            RewardError, match=r"3 reward workers in a row died without an answer, .* the last with exit code 9"
        ),
    ):
        pool.wait_ready()


def test_start_returns_at_once(folder: Path) -> None:
    (folder / "slow.py").write_text("import time\ntime.sleep(0.7)\ndef f(completions):\n    return [1.0]\n")
    with RewardPool(RewardsConfig(funcs=("slow.py:f",)), default_funcs=()) as pool:
        start = time.monotonic()
        pool.start()
        pool.pump()
        assert time.monotonic() - start < 0.5
        pool.wait_ready()
        assert time.monotonic() - start > 0.7
        assert rewards_of(pool, "a") == [1.0]


def test_functions_do_not_see_what_others_changed() -> None:
    with pool_of("mutates", "after_mutation") as pool:
        (scored,) = pool.score([rollout(answer=["x"])])
    assert scored.scores == {"mutates": 1.0, "after_mutation": 1.0}


def test_order_is_that_of_submission_with_several_workers() -> None:
    texts = ["a" * (i * 7 % 31) for i in range(200)]
    with pool_of("length", workers=3) as pool:
        assert rewards_of(pool, *texts) == [float(len(t)) for t in texts]
        assert pool.collect() == []


def test_draws_depend_on_the_rollout_and_not_on_the_worker() -> None:
    texts = [f"text {i}" for i in range(20)]
    with pool_of("draws") as one, pool_of("draws", workers=3) as three:
        expected = rewards_of(one, *texts)
        assert rewards_of(three, *texts) == expected
    assert len(set(expected)) == 20


def test_rollouts_are_dropped_when_their_source_raises() -> None:
    def source() -> Iterator[Rollout]:
        yield rollout("aaa")
        raise KeyboardInterrupt

    with pool_of("length") as pool:
        with pytest.raises(KeyboardInterrupt):
            pool.score(source())
        assert rewards_of(pool, "b") == [1.0]


def test_verdicts_of_the_clock_are_written_and_replayed(folder: Path) -> None:
    log = folder / "run" / "verdicts.jsonl"
    with pool_of("length", "dangerous", timeout_s=1.0, log=log) as pool:
        first = pool.score(rollout(t, seed=i) for i, t in enumerate(["sleep", "exit", "a"]))
    calls = (folder / "calls.txt").read_text().split()
    assert calls == ["sleep", "exit", "a"]
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(e["function"], e["seed"], e["reason"][:8]) for e in entries] == [
        ("dangerous", 0, "ran past"),
        ("dangerous", 1, "the work"),
    ]
    with log.open("a") as file:
        file.write('{"function": "dangerous", "se')
    with pool_of("length", "dangerous", timeout_s=30, log=log) as pool:
        again = pool.score(rollout(t, seed=i) for i, t in enumerate(["sleep", "exit", "a"]))
        assert rewards_of(pool, "b") == [2.0]  # the same seed with another text is another completion
    assert again == first
    assert (folder / "calls.txt").read_text().split() == [*calls, "a", "b"]
    assert len(log.read_text().splitlines()) == 2


def test_a_verdict_is_on_disk_before_it_is_used(folder: Path) -> None:
    (folder / "blocked").write_text("a file where the log's folder should be")
    log = folder / "blocked" / "verdicts.jsonl"
    with pool_of("dangerous", log=log) as pool:
        pool.submit(rollout("exit"))
        with pytest.raises(RunError, match="cannot be written"):
            pool.collect()
        with pytest.raises(RunError, match="cannot be written"):
            pool.collect()


def test_a_damaged_verdict_log_is_named(folder: Path) -> None:
    (folder / "v.jsonl").write_text('{"function": "f"}\n')
    with pytest.raises(RunError, match=r"v.jsonl:1 is not a verdict"):
        pool_of("length", log=folder / "v.jsonl")


def test_large_rows_pass_through_the_pipes() -> None:
    with pool_of("length", timeout_s=5) as pool:
        scored = pool.score(rollout("x" * 300_000, seed=i, blob="y" * 1_000_000) for i in range(20))
    assert [s.reward for s in scored] == [300_000.0] * 20


def test_throughput_of_one_worker() -> None:
    rollouts = [rollout("a" * 200, seed=i, question="q" * 200) for i in range(2000)]
    with pool_of("no_row") as pool:
        pool.wait_ready()
        pool.score(rollouts[:200])
        start = time.perf_counter()
        assert len(pool.score(rollouts)) == 2000
        rate = 2000 / (time.perf_counter() - start)
    assert rate > 500, f"{rate:.0f} completions/s"  # several thousand on an idle machine
