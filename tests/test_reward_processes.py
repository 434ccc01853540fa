"""The pool's worker processes: hangs, deaths, what they print, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pools import FUNCTIONS, pool_of, rewards_of, rollout

import strop


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.py").write_text(FUNCTIONS)
    return tmp_path


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


def test_workers_hold_no_torch_and_not_the_callers_main() -> None:
    with pool_of("modules", "math", "numeric") as pool:
        pool.score([rollout(r"\boxed{3}")])
        extras = pool.take_extras()
    assert extras["modules"] == [[]]
    assert extras["main"] == ["strop.rewards.forkserver"]


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
