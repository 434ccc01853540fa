"""The canary: stored completions are scored again, a changed verdict stops the run, and nothing else is disturbed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from records import rollout
from test_wiring import OPTIMIZER, TOY, config, rollouts

from strop import train
from strop.config import RewardsConfig
from strop.errors import RunError
from strop.monitor.metrics import deterministic_part, read_metrics
from strop.rewards.pool import RewardPool
from strop.trainer.canary import COMPLETIONS, Canary, VerdictChangedError
from strop.trainer.checkpoint import find_checkpoints, read_latest
from strop.types import ScoredRollout

REWARDS = """
import time
from pathlib import Path

from strop.rewards.contract import reward

folder = Path(__file__).parent
calls = 0

def lookup(completions, **kwargs):
    "A value from outside, as a service or a package that is updated would give."
    given = (folder / "value").read_text() if (folder / "value").exists() else "1.0"
    time.sleep(30 if given == "sleep" else 0)
    return [None if given == "none" else float(given) for _ in completions]

def counts(completions, **kwargs):
    global calls
    calls += 1
    return [len(str(c)) + calls / 1000 for c in completions]

@reward(scope="group")
def rank(completions, log_metric=None, **kwargs):
    lengths = [len(str(c)) for c in completions]
    log_metric("ranked", float(len(lengths)))
    return [sorted(lengths).index(n) / len(lengths) for n in lengths]
"""


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    (tmp_path / "rewards").mkdir()
    path = tmp_path / "rewards" / "functions.py"
    path.write_text(REWARDS)
    return path


Pool = Callable[..., RewardPool]


@pytest.fixture
def pool_of(functions: Path) -> Iterator[Pool]:
    pools: list[RewardPool] = []

    def start(*names: str, log: Path | None = None, **settings: Any) -> RewardPool:
        entries = tuple(f"{functions}:{name}" for name in names)
        pools.append(RewardPool(RewardsConfig(funcs=entries, **settings), default_funcs=(), verdict_log=log))
        pools[-1].wait_ready()
        return pools[-1]

    yield start
    for pool in pools:
        pool.close()


def scored_groups(pool: RewardPool, groups: int = 3, size: int = 4) -> list[ScoredRollout]:
    made = [
        replace(
            rollout([1, 2], range(3 + g), problem_id=f"p{p}", sample_index=g, truncated=g == 0),
            text="x" * (5 * p + g), seed=100 * p + g,
        )
        for p in range(groups)
        for g in range(size)
    ]  # fmt: skip
    scored = pool.score(made, group_size=size, global_step=0)
    pool.take_metrics()
    return scored


def test_equal_verdicts_pass_also_of_functions_that_compare_a_group(pool_of: Pool, tmp_path: Path) -> None:
    pool = pool_of("lookup", "rank")
    canary = Canary.take(tmp_path, 0, scored_groups(pool), 4)
    assert [k.scores["rank"] for k in canary.kept[:4]] == [0.0, 0.25, 0.5, 0.75]
    canary.check(pool, step=7)
    assert pool.take_metrics() == {}  # what functions log meanwhile is of no step
    assert pool.take_extras() == {}


@pytest.mark.parametrize(("now", "said"), [("1.5", "1.5 now"), ("none", "None (does not apply)"), ("x", "no value")])
def test_another_verdict_is_an_error_that_names_all(now: str, said: str, pool_of: Pool, tmp_path: Path) -> None:
    pool = pool_of("lookup", "rank")
    canary = Canary.take(tmp_path, 2, scored_groups(pool), 4)
    (tmp_path / "rewards" / "value").write_text(now)
    with pytest.raises(VerdictChangedError) as error:
        canary.check(pool, step=100)
    assert "reward `lookup`" in error.value.message
    assert "completion 0 of p0 1.0 at step 3" in error.value.message
    assert said in error.value.message
    assert ("could not convert" in error.value.message) == (now == "x")
    assert "after step 100" in error.value.message
    assert "monitor.canary_steps" in error.value.hint


def test_the_last_bit_counts(pool_of: Pool, tmp_path: Path) -> None:
    pool = pool_of("lookup")
    canary = Canary.take(tmp_path, 0, scored_groups(pool), 4)
    (tmp_path / "rewards" / "value").write_text("1.0000000000000002")
    with pytest.raises(VerdictChangedError, match=r"1\.0000000000000002"):
        canary.check(pool, step=1)


def test_what_a_clock_decides_is_no_change(pool_of: Pool, tmp_path: Path) -> None:
    pool = pool_of("lookup", log=tmp_path / "verdicts.jsonl", timeout_s=0.2)
    canary = Canary.take(tmp_path, 0, scored_groups(pool, groups=1, size=2), 2)
    (tmp_path / "rewards" / "value").write_text("sleep")
    canary.check(pool, step=1)
    assert len((tmp_path / "verdicts.jsonl").read_text().splitlines()) == 2


def test_whole_groups_are_kept_those_with_most_verdicts_first(pool_of: Pool, tmp_path: Path) -> None:
    scored = scored_groups(pool_of("lookup"), groups=8, size=6)
    scored = [replace(s, scores={"lookup": float(i % 6) if 24 <= i < 30 else 1.0}) for i, s in enumerate(scored)]
    canary = Canary.take(tmp_path, 0, scored, 6)
    assert len(canary.kept) == 18 >= COMPLETIONS
    assert [k.rollout.problem.id for k in canary.kept[::6]] == ["p4", "p0", "p1"]
    assert len(Canary.take(tmp_path, 0, scored[:12], 6).kept) == 12  # a step that has no more


def test_any_text_can_be_kept(pool_of: Pool, tmp_path: Path) -> None:
    scored = scored_groups(pool_of("lookup"), groups=1)
    odd = [replace(s, rollout=replace(s.rollout, text="half \ud83d, NUL \0, \u2028")) for s in scored]
    canary = Canary.take(tmp_path, 0, odd, 4)
    stored = json.loads(canary.path.read_bytes().decode("utf-8", "surrogatepass"))
    assert stored["completions"][0]["text"] == odd[0].rollout.text


# --- in a run --------------------------------------------------------------------------------------------------------


def given(folder: Path, function: str, **run: Any) -> dict[str, Any]:
    return config(
        rewards={"funcs": [f"{folder}/rewards/functions.py:{function}", TOY], "weights": [0.001, 1.0]},
        run={"max_steps": 4, "save_steps": 2, **run},
    )


def state(out: Path) -> dict[str, Any]:
    return {name: value.tolist() for name, value in read_latest(out).tensors(OPTIMIZER).items()}  # type: ignore[union-attr]


def test_a_run_with_a_canary_is_bit_equal_to_one_without(functions: Path, tmp_path: Path) -> None:
    with_it, without = given(tmp_path, "rank"), given(tmp_path, "rank")
    with_it["monitor"], without["monitor"] = {"canary_steps": 1}, {"canary_steps": 0}
    for name, settings in (("with", with_it), ("without", without)):
        train(settings, out=tmp_path / name)
    rows = [list(map(deterministic_part, read_metrics(tmp_path / n / "metrics.jsonl"))) for n in ("with", "without")]
    assert rows[0] == rows[1]
    assert [row["ranked"] for row in rows[0]] == [4.0] * 4  # of the step alone
    assert state(tmp_path / "with") == state(tmp_path / "without")
    assert not (tmp_path / "without" / "canary.json").exists()
    stored = json.loads((tmp_path / "with" / "canary.json").read_text())
    texts = {row["completion"] for row in rollouts(tmp_path / "with", 0)}
    assert {c["text"] for c in stored["completions"]} <= texts
    assert len(stored["completions"]) == 12  # all that a step of three groups has


def test_a_function_that_counts_its_calls_stops_the_run_and_nothing_is_lost(functions: Path, tmp_path: Path) -> None:
    settings = given(tmp_path, "counts")
    settings["monitor"] = {"canary_steps": 3}
    with pytest.raises(VerdictChangedError, match="reward `counts`"):
        train(settings, out=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stopped"] == "failed"
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3
    assert find_checkpoints(tmp_path / "run") == [2, 3]


def test_a_resumed_run_checks_at_once_and_goes_on_when_the_verdicts_are_back(functions: Path, tmp_path: Path) -> None:
    settings, out = given(tmp_path, "lookup", max_steps=2), tmp_path / "run"
    train(settings, out=out)
    settings["run"]["max_steps"] = 3
    (tmp_path / "rewards" / "value").write_text("0.5")
    with pytest.raises(VerdictChangedError, match="after step 2"):
        train(settings, out=out, resume=True)
    assert len(read_metrics(out / "metrics.jsonl")) == 2
    (tmp_path / "rewards" / "value").unlink()
    assert train(settings, out=out, resume=True)["stopped"] == "finished"
    assert len(read_metrics(out / "metrics.jsonl")) == 3

    kept = (out / "canary.json").read_text()
    settings["run"]["max_steps"] = 4
    (out / "canary.json").write_text(kept.replace('"problem": "', '"problem": "other-'))
    with pytest.raises(RunError, match=r"canary\.json does not fit") as error:
        train(settings, out=out, resume=True)
    assert error.value.hint
    (out / "canary.json").unlink()
    assert train(settings, out=out, resume=True)["stopped"] == "finished"
    assert json.loads((out / "canary.json").read_text())["step"] == 3
