"""The worker pool: user functions as they are, hangs, deaths, verdict log, order, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np
import pytest

import strop
from strop.config import RewardsConfig
from strop.errors import RewardError, RunError
from strop.rewards.pool import RewardPool
from strop.types import Message, Problem, Rollout, Segment

FUNCTIONS = """
import asyncio, os, re, signal, subprocess, sys, time
from pathlib import Path

def length(completions, **kwargs):
    return [float(len(c)) for c in completions]

def chat_length(prompts, completions, **kwargs):
    assert prompts[0][0]["role"] == "user"
    return [float(len(c[0]["content"])) for c in completions]

async def slow_length(completions, **kwargs):
    await asyncio.sleep(0.001)
    return [float(len(c)) for c in completions]

class Prefix:
    def __init__(self, prefix):
        self.prefix = prefix
        self.__name__ = "prefix"
    def __call__(self, completions, answer, **kwargs):
        return [1.0 if c.startswith(self.prefix + a) else 0.0 for c, a in zip(completions, answer)]
prefix = Prefix("=")

class AsyncScorer:
    async def __call__(self, completions):
        await asyncio.sleep(0)
        return [3.0]
async_scorer = AsyncScorer()

def everything(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **kwargs):
    log_extra("seen", ["%s|%s|%s" % (prompts[0], kwargs["answer"][0], kwargs["when"][0].isoformat())])
    log_metric("ids", len(completion_ids[0]))
    return [trainer_state.global_step + 0.5 * (kwargs["prefill"] == ["<think>"])]

def no_row(completions):
    return [1.0 for _ in completions]

def even_only(completions, answer, **kwargs):
    return [1.0 if int(a) % 2 == 0 else None for a in answer]

def fussy(completions, **kwargs):
    text = completions[0]
    if text == "raise":
        raise ValueError("not this one")
    if text == "exit":
        sys.exit(3)
    if text == "nan":
        return [float("nan")]
    if text == "recurse":
        return fussy(completions) + fussy(completions)
    return [1.0]

def two_values(completions, **kwargs):
    return [1.0, 2.0]

def a_string(completions, **kwargs):
    return ["good"]

def dangerous(completions, **kwargs):
    text = completions[0]
    with open("calls.txt", "a") as file:
        file.write(text + "\\n")
    if text == "sleep":
        time.sleep(1000)
    if text == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        re.match(r"(a+)+$", "a" * 60 + "b")
    if text == "power":
        9**9**9
    if text == "child":
        Path("child.pid").write_text(str(subprocess.Popen(["sleep", "1000"]).pid))
        time.sleep(1000)
    if text == "exit":
        os._exit(7)
    if text == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == "fork":
        os.fork()
    return [1.0]

def noisy(completions, **kwargs):
    print("x" * 100000)
    sys.stdout.write("\\x00\\x00\\x00\\x05hello")
    os.write(1, b"raw bytes to one")
    print("to stderr", file=sys.stderr)
    try:
        input()
    except EOFError:
        return [float(len(sys.stdin.read()))]
    return [-1.0]

def mutates(completions, answer, **kwargs):
    answer[0].append("changed")
    completions.clear()
    return [1.0]

def after_mutation(completions, answer, **kwargs):
    return [float(len(answer[0]))]

def modules(completions, log_extra, **kwargs):
    log_extra("modules", [sorted(m for m in sys.modules if m in ("torch", "transformers", "vllm", "pydantic"))])
    log_extra("main", [sys.modules["__main__"].__spec__.name])
    log_extra("pid", [os.getpid()])
    return [1.0]

def draws(completions, **kwargs):
    import random
    return [random.random() + hash(completions[0]) % 1000]

def boom(completions, log_extra, **kwargs):
    log_extra("x", [1, 2])
    return [1.0]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.py").write_text(FUNCTIONS)
    return tmp_path


def pool_of(
    *names: str, weights: tuple[float, ...] = (), timeout_s: float = 20.0, workers: int = 1, log: Path | None = None
) -> RewardPool:
    funcs = tuple(name if name in ("numeric", "math", "think_format") else f"f.py:{name}" for name in names)
    config = RewardsConfig(funcs=funcs, weights=weights, timeout_s=timeout_s, workers=workers)
    return RewardPool(config, default_funcs=("numeric",), verdict_log=log, output=Path("out.log"))


def rollout(
    text: str = "abc",
    *,
    seed: int = 0,
    prompt: str | tuple[Message, ...] = "question",
    prefill: str = "",
    **row: object,
) -> Rollout:
    problem = Problem("t/0", prompt, (1, 2), {"answer": "3"} | row, prefill)
    segments = (Segment("prompt", (1, 2), (False,) * 2), Segment("sampled", (3, 4, 5), (True,) * 3, (-1.0,) * 3))
    return Rollout(problem, 0, segments, text, "stop", policy_version=4, seed=seed)


def rewards_of(pool: RewardPool, *texts: str) -> list[float | None]:
    return [scored.reward for scored in pool.score(rollout(text, seed=i) for i, text in enumerate(texts))]


def is_gone(pid: int) -> bool:
    """Whether no process has that number, not even a zombie (of ours)."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        state = Path(f"/proc/{pid}/stat")
        if state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return int(state.read_text().rsplit(")", 1)[1].split()[1]) != os.getpid()  # someone else's to reap
        time.sleep(0.02)
    return False


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


@pytest.mark.parametrize("text", ["sleep", "stubborn", "power"])
def test_a_hang_costs_one_completion_of_one_function(text: str) -> None:
    with pool_of("length", "dangerous", "no_row", weights=(1.0, 1.0, 1.0), timeout_s=1.0) as pool:
        pool.wait_ready()
        start = time.monotonic()
        scored = pool.score(rollout(t, seed=i) for i, t in enumerate(["a", text, "bb", "ccc"]))
        assert 1.0 < time.monotonic() - start < 20.0
    assert [s.reward for s in scored] == [3.0, None, 4.0, 5.0]
    assert scored[1].scores == {"length": float(len(text)), "dangerous": None, "no_row": 1.0}
    assert scored[1].failures == {"dangerous": "ran past the limit of 1 s (rewards.timeout_s)"}


def test_a_hang_is_killed_with_its_children(folder: Path) -> None:
    with pool_of("dangerous", timeout_s=1.0) as pool:
        assert rewards_of(pool, "child", "a") == [None, 1.0]
        assert is_gone(int((folder / "child.pid").read_text()))


def test_a_dead_worker_costs_one_completion() -> None:
    with pool_of("length", "dangerous", workers=2) as pool:
        scored = pool.score(
            rollout(t, seed=i) for i, t in enumerate(["a", "exit", "bb", "segfault", "ccc", "fork", "d"])
        )
    assert [s.reward for s in scored] == [2.0, None, 3.0, None, 4.0, 5.0, 2.0]
    assert scored[1].failures == {"dangerous": "the worker process died (exit code 7)"}
    assert scored[3].failures == {"dangerous": "the worker process died (signal SIGSEGV)"}
    assert scored[3].scores["length"] == 8.0


def test_a_worker_killed_while_idle_costs_nothing() -> None:
    with pool_of("modules") as pool:
        pool.score([rollout()])
        (pid,) = pool.take_extras()["pid"]
        os.kill(pid, 9)
        time.sleep(0.1)
        assert rewards_of(pool, "a", "b") == [1.0, 1.0]


def test_output_and_input_of_functions_leave_the_protocol_alone(folder: Path) -> None:
    with pool_of("noisy") as pool:
        assert rewards_of(pool, "a", "b") == [0.0, 0.0]
    printed = (folder / "out.log").read_bytes()
    assert printed.count(b"x" * 100_000) == 2
    assert printed.count(b"raw bytes to one") == 2
    assert printed.count(b"to stderr") == 2


def test_functions_do_not_see_what_others_changed() -> None:
    with pool_of("mutates", "after_mutation") as pool:
        (scored,) = pool.score([rollout(answer=["x"])])
    assert scored.scores == {"mutates": 1.0, "after_mutation": 1.0}


def test_workers_hold_no_torch_and_not_the_callers_main() -> None:
    with pool_of("modules", "math", "numeric") as pool:
        pool.score([rollout(r"\boxed{3}")])
        extras = pool.take_extras()
    assert extras["modules"] == [[]]
    assert extras["main"] == ["strop.rewards.forkserver"]


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


def test_nothing_is_left_after_close() -> None:
    pool = pool_of("modules", workers=2)
    pool.wait_ready()
    pids = [worker.pid for worker in pool._crew.workers]
    assert all(os.getsid(pid) == pid for pid in pids)  # Ctrl-C in the terminal does not reach them
    pool.submit(rollout())
    pool.close()
    pool.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="a busy worker notices its parent's death on Linux only")
def test_workers_die_with_a_killed_parent_even_in_the_middle_of_a_call(folder: Path) -> None:
    script = (
        "import time\n"
        "from strop.config import RewardsConfig\nfrom strop.rewards.pool import RewardPool\n"
        "from strop.types import Problem, Rollout, Segment\n"
        "pool = RewardPool(RewardsConfig(funcs=('f.py:dangerous',), timeout_s=600, workers=2), default_funcs=())\n"
        "pool.wait_ready()\n"
        "s = (Segment('prompt', (1,), (False,)), Segment('sampled', (2,), (True,), (-1.0,)))\n"
        "pool.submit(Rollout(Problem('t/0', 'q', (1,)), 0, s, 'sleep', 'stop', 0, 1))\n"
        "pool.pump()\n"
        "print(*[w.pid for w in pool._crew.workers], flush=True)\n"
        "time.sleep(1000)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(strop.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        deadline = time.monotonic() + 20
        while not (folder / "calls.txt").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        parent.kill()
    assert (folder / "calls.txt").read_text() == "sleep\n"
    assert len(pids) == 2
    assert all(is_gone(pid) for pid in pids)


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
