"""What the reward pool costs: throughput against the same functions in-process, waiting after the last token, kills.

python bench/reward_pool.py

A step of 64 groups of 8 completions, all there at once, so that nothing is hidden behind decoding; best of seven.
In-process means the same calls, one completion at a time and with the same seeding, in this process. CPU time is that
of all workers and of the trainer. Wall times need a machine of their own, with a core for each process.
"""

from __future__ import annotations

import os
import pickle
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src")]

from strop.config import RewardsConfig  # noqa: E402
from strop.rewards.call import Completion, RunFacts  # noqa: E402
from strop.rewards.jobs import pickled  # noqa: E402
from strop.rewards.load import load, read_entries  # noqa: E402
from strop.rewards.pool import RewardPool  # noqa: E402
from strop.types import Problem, Rollout, Segment  # noqa: E402

GROUPS, SIZE, REPEATS = 64, 8, 7
STACKS = (("numeric", "think_format"), ("math", "think_format"), ("think_format",))
SENTENCE = "First we add 12 and 30 to get 42, then we check the result. "


def rollouts(chars: int) -> list[Rollout]:
    found: list[Rollout] = []
    for i in range(GROUPS * SIZE):
        text = f"<think>\n{(f'Attempt {i}. ' + SENTENCE * (chars // 60 + 1))[:chars]}</think>\nIt is \\boxed{{42}}"
        ids = tuple(range(len(text) // 4))
        segments = (
            Segment("prompt", (1,) * 20, (False,) * 20),
            Segment("sampled", ids, (True,) * len(ids), (-0.5,) * len(ids)),
        )
        problem = Problem(f"t/{i // SIZE}", "What is 12 + 30?", (1,) * 20, {"answer": "42", "question": "12 + 30"})
        found.append(Rollout(problem, i % SIZE, segments, text, "stop", 3, i))
    return found


def best(run: Callable[[], float]) -> float:
    return min(run() for _ in range(REPEATS))


def in_process(funcs: Sequence[str], given: Sequence[Rollout]) -> tuple[float, float]:
    """Wall time and CPU time per completion."""
    functions = [load(spec, {}, RunFacts()).function for spec in read_entries(funcs)]
    completions = [Completion(*pickle.loads(pickled(rollout, 3, {}))) for rollout in given]

    def measured(clock: Callable[[], float]) -> float:
        start = clock()
        for completion in completions:
            for function in functions:
                function(completion, None)  # type: ignore[arg-type]
        return (clock() - start) / len(given)

    return best(lambda: measured(time.perf_counter)), best(lambda: measured(time.process_time))


def cpu_seconds(pid: int) -> float:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def in_pool(funcs: Sequence[str], given: Sequence[Rollout], workers: int) -> tuple[float, float, float]:
    """Wall time, a worker's CPU time and the trainer's, per completion."""
    with RewardPool(RewardsConfig(funcs=tuple(funcs), workers=workers), default_funcs=()) as pool:
        pool.wait_ready()
        pool.score(given, group_size=SIZE)
        pids = [worker.pid for worker in pool._crew.workers]
        rows: list[tuple[float, float, float]] = []
        for _ in range(REPEATS):
            start = (time.perf_counter(), sum(map(cpu_seconds, pids)), time.process_time())
            for rollout in given:
                pool.submit(rollout, group_size=SIZE)
            pool.collect()
            now = (time.perf_counter(), sum(map(cpu_seconds, pids)), time.process_time())
            rows.append(tuple((b - a) / len(given) for a, b in zip(start, now, strict=True)))  # type: ignore[arg-type]
    wall, worker, trainer = (min(column) for column in zip(*rows, strict=True))
    return wall, worker, trainer


def after_the_last(funcs: Sequence[str], given: Sequence[Rollout]) -> float:
    """Seconds from the last completion to its step's rewards, when completions come in over a third of a second."""
    waits: list[float] = []
    with RewardPool(RewardsConfig(funcs=tuple(funcs)), default_funcs=()) as pool:
        pool.wait_ready()
        for _ in range(REPEATS):
            for i, rollout in enumerate(given):
                pool.submit(rollout, group_size=SIZE)
                if i % 16 == 15:  # one decode step
                    time.sleep(0.01)
                    pool.pump()
            start = time.perf_counter()
            pool.collect()
            waits.append(time.perf_counter() - start)
    return statistics.median(waits)


def replacement(funcs: Sequence[str]) -> float:
    """Seconds from the kill of a worker until the next one is ready."""
    times: list[float] = []
    given = rollouts(100)[:1]
    with RewardPool(RewardsConfig(funcs=tuple(funcs)), default_funcs=()) as pool:
        pool.wait_ready()
        for _ in range(20):
            start, old = time.perf_counter(), pool._crew.workers[0].pid
            os.kill(old, 9)
            while pool._crew.workers[0].pid == old or not pool._crew.is_ready:
                pool.pump()
                time.sleep(0.0002)
            times.append(time.perf_counter() - start)
            pool.score(given)
    return statistics.median(times)


def main() -> None:
    for funcs in STACKS:
        for chars in (200, 1200, 4000):
            given = rollouts(chars)
            own, own_cpu = in_process(funcs, given)
            wall, worker, trainer = in_pool(funcs, given, 1)
            wall2, _, _ = in_pool(funcs, given, 2)
            print(
                f"{'+'.join(funcs):22} {chars:5} chars, us a completion: in-process wall {1e6 * own:5.1f}, CPU "
                f"{1e6 * own_cpu:5.1f}; 1 worker: wall {1e6 * wall:5.1f} ({wall / own:.2f}x), CPU of the worker "
                f"{1e6 * worker:5.1f} ({worker / own_cpu:.2f}x), of the trainer {1e6 * trainer:4.1f}; 2 workers: wall "
                f"{1e6 * wall2:5.1f} ({wall2 / own:.2f}x)"
            )
        print(f"{'+'.join(funcs):22} wait after the last of 512: {1e3 * after_the_last(funcs, rollouts(1200)):.2f} ms")
        print(f"{'+'.join(funcs):22} kill and replacement: {1e3 * replacement(funcs):.1f} ms")


if __name__ == "__main__":
    main()
