"""Faults of reward functions (F31 to F41), each injected into a step and survived; the same verdict everywhere."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from strop.config import RewardsConfig
from strop.errors import RewardError
from strop.rewards.forkserver import WORKER_OUTPUT_BYTES
from strop.rewards.limits import MAX_PROCESSES, descendants_of
from strop.rewards.pool import RewardPool
from strop.types import Problem, Rollout, Segment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of processes are Linux's")

FUNCTIONS = """
import math, os, random, re, signal, subprocess, sys, threading, time
import numpy as np

def length(completions, **kwargs):
    return [float(len(c)) for c in completions]

class Spiteful(Exception):
    def __str__(self):
        raise RuntimeError("no")
    __repr__ = __str__
    __float__ = __str__

def spiteful(completions, **kwargs):
    if completions[0] == "raised":
        raise Spiteful
    if completions[0] == "half a character":
        raise ValueError("\\ud800")
    return Spiteful() if completions[0] == "returned" else [Spiteful()] if completions[0] == "in a list" else [1.0]

def forks(completions, **kwargs):
    if os.fork() == 0:
        if completions[0] == "raises":
            raise ValueError
        return "no list" if completions[0] == "breaks the contract" else [5.0]
    return [1.0]

def forges(completions, **kwargs):
    import struct
    record = struct.pack(">BQHBdd", 1, 12345, 0, 1, 99.0, 0.0)
    for descriptor in range(3, 40):
        try:
            os.write(descriptor, struct.pack(">I", len(record)) + record)
        except OSError:
            pass
    return [1.0]

def draws(completions, **kwargs):
    return [random.random() + np.random.random() for _ in completions]

def fork_bomb():
    # The bound is the test's own: past it nothing forks any more, whatever the pool does.
    log, end = os.open("forks", os.O_RDWR | os.O_CREAT | os.O_APPEND), time.monotonic() + 20
    while time.monotonic() < end:
        if os.fstat(log).st_size < 2000:
            os.write(log, b"x")
            os.fork()
        else:
            time.sleep(0.01)

def print_gigabyte():
    for _ in range(1024):
        os.write(1, b"x" * (1 << 20))

def allocate():
    blocks = []
    while len(blocks) < 160:
        blocks.append(bytearray(64 << 20))

def leave_a_daemon():
    if os.fork() == 0:
        os.setsid()
        open("daemon.pid", "w").write(str(os.getpid()))
        time.sleep(1000)
    while not os.path.exists("daemon.pid"):
        time.sleep(0.01)

def fault(completions, **kwargs):
    text = completions[0]
    with open("calls.txt", "a") as file:
        file.write(text + "\\n")
    if text == "raises":
        raise ValueError("no")
    if text == "sleeps":
        time.sleep(1000)
    if text == "hangs in C":
        pow(3, 10**9)
    if text == "ignores signals":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        re.match(r"(a+)+$", "a" * 60 + "b")
    if text == "allocates":
        allocate()
    if text == "starts threads without end":
        while True:
            threading.Thread(target=time.sleep, args=(1000,)).start()
    if text == "exits":
        os._exit(5)
    if text == "fork bomb":
        fork_bomb()
    if text == "prints":
        print_gigabyte()
    if text == "fills the disk":
        with open("big", "wb") as file:
            file.seek(2 << 30)
            file.write(b"x")
    if text == "kills its parent":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(1000)
    if text == "daemon":
        leave_a_daemon()
    if text == "wrong count":
        return [1.0, 2.0]
    if text == "wrong type":
        return "1.0"
    if text == "mutates":
        kwargs["answer"][0].append("changed")
        kwargs["prompts"].clear()
        completions[0] = "changed"
    if text == "touches the generators":
        random.seed(1)
        np.random.seed(1)
    if text == "not deterministic":
        return [time.perf_counter()]
    return [1.0]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.py").write_text(FUNCTIONS)
    return tmp_path


def pool_of(
    *names: str, workers: int = 1, timeout_s: float = 20.0, memory_gib: float = 0.25, log: Path | None = None
) -> RewardPool:
    funcs = tuple(name if name in ("numeric", "math") else f"f.py:{name}" for name in names)
    config = RewardsConfig(funcs=funcs, timeout_s=timeout_s, workers=workers, memory_gib=memory_gib)
    return RewardPool(config, default_funcs=(), verdict_log=log, output=Path("out.log"))


def rollout(text: str, seed: int = 0, answer: object = "3") -> Rollout:
    segments = (Segment("prompt", (1, 2), (False,) * 2), Segment("sampled", (3,), (True,), (-1.0,)))
    return Rollout(Problem(f"t/{seed}", "q", (1, 2), {"answer": answer}), 0, segments, text, "stop", 0, seed)


def step(pool: RewardPool, *texts: str) -> list[float | None]:
    return [scored.reward for scored in pool.score(rollout(text, seed) for seed, text in enumerate(texts))]


def test_objects_whose_text_cannot_be_made_end_no_worker() -> None:
    with pool_of("spiteful") as pool:
        pool.wait_ready()
        pid = pool._crew.workers[0].pid
        first, second, third = pool.score(
            rollout(text, i) for i, text in enumerate(("raised", "half a character", "fine"))
        )
        assert "raised Spiteful" in first.failures["spiteful"]
        assert "\\ud800" in second.failures["spiteful"].encode("utf-8").decode()
        assert third.reward == 1.0
        assert pool._crew.workers[0].pid == pid
        with pytest.raises(RewardError, match="returned"):
            step(pool, "returned")
    with pool_of("spiteful") as pool, pytest.raises(RewardError, match="a number or None is needed"):
        step(pool, "in a list")


def test_a_forked_child_neither_answers_nor_takes_work() -> None:
    with pool_of("forks", workers=2) as pool:
        texts = ["returns", "breaks the contract", "raises"] * 10
        assert step(pool, *texts) == [1.0] * len(texts)


def test_an_answer_to_nothing_that_was_asked_stops_the_run() -> None:
    with pool_of("forges") as pool, pytest.raises(RewardError, match="none of ours"):
        step(pool, "x")


def below_launcher(pool: RewardPool) -> list[int]:
    return descendants_of(pool._crew.launcher_pid)


def wait_until(condition: object) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("text", "reason", "in_log"),
    [
        ("raises", "raised ValueError: no", False),  # F31
        ("sleeps", "ran past the limit of 0.7 s", True),  # F32
        ("hangs in C", "ran past the limit of 0.7 s", True),  # F33
        ("ignores signals", "ran past the limit of 0.7 s", True),
        ("allocates", "raised MemoryError", True),  # F34
        ("starts threads without end", "raised RuntimeError: can't start new thread", False),
        ("exits", "the worker process died (exit code 5)", True),  # F35
        ("fork bomb", f"it started more than {MAX_PROCESSES} processes", True),  # F36
        ("fills the disk", "raised OSError: [Errno 27] File too large", False),
        ("kills its parent", "the process that starts the reward workers died while it ran", True),
    ],
)
def test_a_fault_leaves_one_completion_unscored(folder: Path, text: str, reason: str, in_log: bool) -> None:
    timeout_s = 0.7 if "0.7" in reason else 20.0
    with pool_of("length", "fault", workers=2, timeout_s=timeout_s, log=folder / "v.jsonl") as pool:
        pool.wait_ready()
        scored = pool.score(rollout(t, seed) for seed, t in enumerate(["a", "bb", text, "ccc", "dddd"]))
        assert [s.reward for s in scored] == [2.0, 3.0, None, 4.0, 5.0]
        assert scored[2].scores == {"length": float(len(text)), "fault": None}
        assert scored[2].failures["fault"].startswith(reason)
        assert step(pool, "a", "bb") == [2.0, 3.0]  # the next step
        assert wait_until(lambda: len(below_launcher(pool)) == 2)  # the two workers and nothing else
    logged = (folder / "v.jsonl").read_text().splitlines() if (folder / "v.jsonl").exists() else []
    assert len(logged) == in_log
    if in_log:  # another run does not try again
        calls = (folder / "calls.txt").read_text().split("\n").count(text)
        with pool_of("length", "fault", workers=2, log=folder / "v.jsonl") as pool:
            assert step(pool, "a", "bb", text) == [2.0, 3.0, None]
        assert (folder / "calls.txt").read_text().split("\n").count(text) == calls
    if text == "fork bomb":
        assert (folder / "forks").stat().st_size < 2000, "the test's own bound stopped it, not the pool"


def test_printing_without_end_fills_no_disk(folder: Path) -> None:  # F37
    with pool_of("length", "fault", workers=2) as pool:
        assert step(pool, "a", "prints", "bb") == [2.0, 7.0, 3.0]
    printed = (folder / "out.log").stat().st_size
    assert WORKER_OUTPUT_BYTES <= printed < WORKER_OUTPUT_BYTES + 1000
    assert b"the rest is dropped" in (folder / "out.log").read_bytes()


@pytest.mark.parametrize("text", ["wrong count", "wrong type"])
def test_a_wrong_return_stops_the_run_and_names_the_function(text: str) -> None:  # F38
    with pool_of("length", "fault") as pool, pytest.raises(RewardError, match="`fault` returned") as caught:
        step(pool, "a", text, "bb")
    assert "fault" in caught.value.hint


def test_changed_arguments_reach_nobody_else() -> None:  # F39
    with pool_of("fault", "length") as pool:
        scored = pool.score(rollout(t, i, ["x"]) for i, t in enumerate(["mutates", "mutates"]))
        assert [s.scores for s in scored] == [{"fault": 1.0, "length": 7.0}] * 2
        assert scored[0].rollout.problem.row == {"answer": ["x"]}


def test_touched_generators_change_no_draw() -> None:  # F40
    with pool_of("draws") as pool:
        alone = step(pool, "a", "b", "touches the generators", "c")
    with pool_of("fault", "draws") as pool:
        beside = step(pool, "a", "b", "touches the generators", "c")
        again = step(pool, "a", "b", "touches the generators", "c")
    assert [value - 1.0 for value in beside if value is not None] == pytest.approx(alone, abs=1e-12)
    assert again == beside
    assert len(set(alone)) == 4


def test_one_completion_can_be_scored_twice_so_that_an_audit_sees_a_difference() -> None:  # F41
    with pool_of("fault") as pool:
        first, second = pool.score([rollout("not deterministic"), rollout("not deterministic")])
    assert first.reward != second.reward


def test_many_kills_leave_no_process_behind() -> None:
    with pool_of("fault", workers=2) as pool:
        assert step(pool, *["exits", "a"] * 20) == [None, 1.0] * 20
        assert wait_until(lambda: len(below_launcher(pool)) == 2)


def test_what_leaves_the_worker_ends_with_the_run(folder: Path) -> None:
    with pool_of("fault") as pool:
        assert step(pool, "daemon") == [1.0]
        pid = int((folder / "daemon.pid").read_text())
        os.kill(pid, 0)
    assert wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_a_module_with_threads_gets_fresh_processes_and_a_note(folder: Path) -> None:
    (folder / "threads.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(1000,), daemon=True, name='watcher').start()\n" + FUNCTIONS
    )
    notes: list[str] = []
    config = RewardsConfig(funcs=("threads.py:length", "threads.py:fault"), timeout_s=1.0, workers=2)
    with RewardPool(config, default_funcs=(), note=notes.append) as pool:
        assert step(pool, "a", "sleeps", "exits", "bb") == [2.0, None, None, 3.0]
        assert pool.versions()["fault"].startswith("source ")
    assert len(notes) == 1
    assert "instead of forked" in notes[0]
    assert "watcher" in notes[0]


@pytest.mark.parametrize("name", ["fault", "math"])
def test_a_kill_and_a_replacement_take_milliseconds(name: str) -> None:
    """From the kill of a worker until another one has said that it is ready."""
    with pool_of(name) as pool:
        pool.wait_ready()
        times: list[float] = []
        for _ in range(9):
            begin, old = time.perf_counter(), pool._crew.workers[0].pid
            os.kill(old, 9)
            while pool._crew.workers[0].pid == old or not pool._crew.is_ready:
                pool.pump()
                time.sleep(0.0005)
            times.append(time.perf_counter() - begin)
            assert step(pool, "a") != [None]  # or else three deaths in a row without an answer are an error
    print(f"{name}: kill and replacement in {1000 * statistics.median(times):.1f} ms")
    assert statistics.median(times) < 0.1


# --- the same verdict everywhere ---------------------------------------------------------------------------------


STACK = ("numeric", "exact", "math", "think_format", "single_box")


def texts() -> list[str]:
    r"""Forty completions, right, wrong and broken: `\boxed`, fractions, tags, other scripts, a lone surrogate."""
    rng = random.Random(5)
    forms = [
        "{}",
        "\\boxed{{{}}}",
        "<think>\nhm {}</think>\n\\boxed{{{}}}",
        "#### {}",
        "the answer is {}.",
        "<think>{}",
    ]
    values = ["3", "\\frac{6}{2}", "4", "3.0", "x^2", "\uff13", "\ud800", ""]
    return [rng.choice(forms).format(*[rng.choice(values)] * 2) for _ in range(40)]


def verdicts(workers: int, hash_seed: int = 0, order: int = 0) -> dict[str, list[dict[str, float | None]]]:
    listed = [rollout(text, seed) for seed, text in enumerate(texts())]
    random.Random(order).shuffle(listed)
    config = RewardsConfig(funcs=(*STACK, "f.py:draws"), workers=workers, timeout_s=60)
    with RewardPool(config, default_funcs=(), hash_seed=hash_seed) as pool:
        scored = pool.score(listed)
    return {s.rollout.problem.id: [dict(s.scores), {"reward": s.reward}] for s in scored}


@pytest.fixture
def load() -> Iterator[None]:
    """Keep every core busy meanwhile."""
    spin = [sys.executable, "-c", "while True: pass"]
    with ExitStack() as stack:
        for _ in range(2 * (os.cpu_count() or 1)):
            stack.callback(stack.enter_context(subprocess.Popen(spin)).kill)
        yield


def test_verdicts_are_the_same_idle_and_under_load_with_one_and_eight_workers_and_five_hash_seeds(
    load: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "77")  # the trainer's own says nothing to the workers
    monkeypatch.setenv("LC_ALL", "tr_TR.UTF-8")
    expected = verdicts(workers=1)
    assert len({json.dumps(scores) for scores in expected.values()}) > 10
    assert verdicts(workers=8, order=1) == expected
    for hash_seed in (1, 2, 3, 4):
        assert verdicts(workers=2, hash_seed=hash_seed, order=hash_seed) == expected


def test_a_completion_is_scored_as_if_it_were_alone() -> None:
    config = RewardsConfig(funcs=("numeric", "exact", "think_format", "f.py:draws"))
    listed = [rollout(text, seed) for seed, text in enumerate(texts()[:12])]
    with RewardPool(config, default_funcs=()) as pool:
        together = pool.score(listed)
        assert [pool.score([one])[0] for one in listed] == together
        assert pool.score(reversed(listed)) == together[::-1]
