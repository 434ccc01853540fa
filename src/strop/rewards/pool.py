"""Scores rollouts in worker processes while others still decode.

The pool runs in the trainer's thread: `pump` is called from the decode loop, never blocks, reads what is finished,
enforces the limits and hands work out. A worker past its limit is killed and replaced; its completion is unscored,
never 0.
"""

from __future__ import annotations

import pickle
import select
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from ..errors import RewardError, StropError
from ..types import REWARD_KEYWORDS, Rollout, ScoredRollout
from .call import NOT_PASSED, Completion
from .combine import Outcome, combine
from .load import read_entries
from .process import Job, WorkerProcess
from .verdicts import VerdictLog
from .wire import Setup

if TYPE_CHECKING:
    from ..config import RewardsConfig

LOAD_LIMIT_S = 120.0
"""A worker that has not imported the functions by then is an error."""
MAX_BARREN_DEATHS = 3
"""Workers in a row that may die without having answered anything before the run stops."""


class RewardPool:
    """Worker processes with the reward functions of a run; a context manager that kills them on exit.

    Create and close it in a thread that outlives it: on Linux a worker dies with the thread that started it.
    """

    def __init__(
        self,
        config: RewardsConfig,
        *,
        default_funcs: Sequence[str],
        verdict_log: Path | None = None,
        output: Path | None = None,
    ) -> None:
        """Read the entries and the verdict log; starts nothing and imports no user code.

        `default_funcs` stands in for an empty `rewards.funcs`. What functions print is appended to `output`, or goes to
        standard error. Raises RewardError for an entry that cannot be read, RunError for an unreadable log.
        """
        self._specs = read_entries(config.funcs or default_funcs)
        if not self._specs:
            raise RewardError("there is no reward function", hint="name one in rewards.funcs, for example numeric")
        if config.weights and len(config.weights) != len(self._specs):
            raise RewardError(
                f"rewards.weights has {len(config.weights)} values for {len(self._specs)} functions",
                hint="give rewards.weights one value per function, or leave it out",
            )
        self.names: tuple[str, ...] = tuple(spec.name for spec in self._specs)
        self.weights: tuple[float, ...] = config.weights or (1.0,) * len(self._specs)
        self._timeout_s = config.timeout_s
        self._num_workers = config.workers
        self._verdicts = VerdictLog(verdict_log)
        self._output_path = output
        self._output: IO[bytes] | None = None
        self._files = ExitStack()
        self._workers: list[WorkerProcess] = []
        self._jobs: dict[int, Job] = {}
        self._pending: deque[Job] = deque()
        self._next_number = 0
        self._barren_deaths = 0
        self._extras: dict[str, list[Any]] = {}
        self._metrics: dict[str, list[float]] = {}
        self._error: StropError | None = None

    def __enter__(self) -> RewardPool:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the workers and return at once; they import the functions meanwhile (see `wait_ready`)."""
        if self._output_path is not None and self._output is None:
            self._output_path.parent.mkdir(parents=True, exist_ok=True)
            self._output = self._files.enter_context(self._output_path.open("ab"))
        while len(self._workers) < self._num_workers:
            self._workers.append(self._new_worker())

    def wait_ready(self) -> None:
        """Block until every worker has loaded every function. Raises RewardError if one cannot be loaded."""
        self.start()
        while not all(worker.ready for worker in self._workers):
            self._turn(block=True)

    def submit(self, rollout: Rollout, *, global_step: int | None = None) -> None:
        """Queue a finished rollout; `pump` and `collect` do the work.

        `global_step` is what functions see as `trainer_state.global_step`; by default the rollout's policy version.
        Raises RewardError for a column whose name or value cannot be given to a function.
        """
        self._raise_error()
        if not self._workers:
            self.start()
        job = self._new_job(rollout, rollout.policy_version if global_step is None else global_step)
        self._jobs[job.number] = job
        self._skip_known(job)
        if job.remaining:
            self._pending.append(job)

    def pump(self) -> None:
        """Read results, enforce limits and hand out work without waiting. Raises RewardError on a broken contract."""
        self._turn(block=False)

    def collect(self) -> list[ScoredRollout]:
        """Block until everything submitted is scored; return it in the order of submission and forget it."""
        self._turn(block=False)
        while any(job.remaining for job in self._jobs.values()):
            self._turn(block=True)
        jobs = list(self._jobs.values())
        self._jobs.clear()
        self._keep_logged(jobs)
        return [
            combine(
                job.rollout, self.names, self.weights, {self.names[i]: outcome for i, outcome in job.outcomes.items()}
            )
            for job in jobs
        ]

    def score(self, rollouts: Iterable[Rollout], *, global_step: int | None = None) -> list[ScoredRollout]:
        """Score rollouts as they arrive; if their iterator raises, those that were submitted are dropped."""
        try:
            for rollout in rollouts:
                self.submit(rollout, global_step=global_step)
                self.pump()
            return self.collect()
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Forget everything that was submitted and not collected."""
        for job in self._jobs.values():
            job.dropped = True
        self._jobs.clear()
        self._pending.clear()

    def take_metrics(self) -> dict[str, list[float]]:
        """Return what functions gave to `log_metric` for the rollouts of the last `collect`, in order; forget it."""
        taken, self._metrics = self._metrics, {}
        return taken

    def take_extras(self) -> dict[str, list[Any]]:
        """Return the columns given to `log_extra`, aligned with the last `collect` (None where absent); forget them."""
        taken, self._extras = self._extras, {}
        return taken

    def close(self) -> None:
        """Kill the workers and what they started. Safe to call twice."""
        self.discard()
        for worker in self._workers:
            worker.kill()
        self._workers.clear()
        self._files.close()
        self._output = None

    def _new_worker(self) -> WorkerProcess:
        return WorkerProcess(Setup(self._specs, tuple(folder for folder in sys.path if folder)), self._output)

    def _new_job(self, rollout: Rollout, global_step: int) -> Job:
        problem = rollout.problem
        columns = {name: value for name, value in problem.row.items() if name not in NOT_PASSED}
        taken = [name for name in columns if name in REWARD_KEYWORDS]
        if taken:
            raise RewardError(
                f"row {problem.id} has a column `{taken[0]}`, a name under which functions receive something else",
                hint=f"rename the column `{taken[0]}` of the data set",
            )
        prompt = (
            [dict(message) for message in problem.prompt] if not isinstance(problem.prompt, str) else problem.prompt
        )
        completion = Completion(
            prompt=prompt,
            completion=rollout.completion,
            completion_ids=rollout.completion_token_ids,
            prefill=problem.prefill,
            columns=columns,
            where=problem.id,
            seed=rollout.seed,
            global_step=global_step,
        )
        job = Job(self._next_number, rollout, _pickled(completion), deque(range(len(self._specs))))
        self._next_number += 1
        return job

    def _skip_known(self, job: Job) -> None:
        """Replay verdicts of an earlier run of the same rollout without running the function."""
        for index in list(job.remaining):
            reason = self._verdicts.find(self.names[index], job.rollout)
            if reason is not None:
                job.remaining.remove(index)
                job.outcomes[index] = Outcome(None, reason)

    def _turn(self, *, block: bool) -> None:
        """One round: wait if asked to, read, enforce limits, hand out. What it raises once, it raises ever after."""
        self._raise_error()
        try:
            self._round(block)
        except StropError as e:
            self._error = e
            raise

    def _round(self, block: bool) -> None:
        if block:
            self._wait()
        for worker in list(self._workers):
            for report in worker.receive():
                if report is None:
                    self._replace_dead(worker)
                else:
                    self._take(worker, report)
        self._enforce_limits()
        self._hand_out()

    def _hand_out(self) -> None:
        while self._pending:
            free = [worker for worker in self._workers if worker.has_room]
            if not free:
                break
            min(free, key=lambda worker: len(worker.jobs)).hand(self._pending.popleft())
        for worker in self._workers:
            worker.send()

    def _wait(self) -> None:
        """Sleep until a worker reports, takes more bytes, or reaches its limit."""
        now = time.monotonic()
        limits = [limit for worker in self._workers if (limit := self._limit(worker)) is not None]
        timeout = max(0.0, min(limits) - now) if limits else LOAD_LIMIT_S
        poller = select.poll()
        for worker in self._workers:
            poller.register(worker.read_fd, select.POLLIN)
            if worker.write_fd is not None:
                poller.register(worker.write_fd, select.POLLOUT)
        poller.poll(timeout * 1000 + 1)

    def _limit(self, worker: WorkerProcess) -> float | None:
        start = worker.running_since
        if start is None:
            return None
        return start + (self._timeout_s if worker.ready else LOAD_LIMIT_S)

    def _take(self, worker: WorkerProcess, report: dict[str, Any]) -> None:
        if "refused" in report:
            raise RewardError(str(report["refused"]), hint=str(report["hint"]))
        if "ready" in report:
            worker.ready = True
            return
        job, index = worker.jobs[0], worker.jobs[0].remaining[0]
        assert (report["job"], report["function"]) == (job.number, index), "a worker answers in order"
        self._barren_deaths = 0
        worker.note_duration(report["seconds"] * len(self._specs))
        job.extras.update(report.get("extras", {}))
        job.metrics.extend((name, value) for name, value in report.get("metrics", ()))
        self._settle(job, Outcome(report["value"], report["failure"]))
        if not job.remaining:
            worker.jobs.popleft()

    def _settle(self, job: Job, outcome: Outcome) -> None:
        job.outcomes[job.remaining.popleft()] = outcome

    def _enforce_limits(self) -> None:
        for worker in list(self._workers):
            limit = self._limit(worker)
            if limit is None or time.monotonic() < limit:
                continue
            if not worker.ready:
                raise RewardError(
                    f"a reward worker has not imported its functions within {LOAD_LIMIT_S:g} s",
                    hint="look for work at import time in the files of rewards.funcs, and move it into the function",
                )
            self._replace(worker, f"ran past the limit of {self._timeout_s:g} s (rewards.timeout_s)")

    def _replace_dead(self, worker: WorkerProcess) -> None:
        how = worker.kill()
        if worker.ready and worker.running_since is not None:
            self._replace(worker, f"the worker process died ({how})")
            return
        self._barren_deaths += 1
        if self._barren_deaths >= MAX_BARREN_DEATHS:
            raise RewardError(
                f"{self._barren_deaths} reward workers in a row died without an answer, the last with {how}",
                hint=f"import the functions by hand to see why: {', '.join(spec.entry for spec in self._specs)}",
            )
        self._replace(worker, "")

    def _replace(self, worker: WorkerProcess, reason: str) -> None:
        """Kill a worker, blame what it was running (unless `reason` is empty), hand the rest to others."""
        worker.kill()
        self._workers[self._workers.index(worker)] = self._new_worker()
        if reason:
            job = worker.jobs[0]
            self._verdicts.add(self.names[job.remaining[0]], job.rollout, reason)  # on disk before it is used
            self._settle(job, Outcome(None, reason))
        unfinished = [job for job in worker.jobs if job.remaining and not job.dropped]
        self._pending.extendleft(reversed(unfinished))

    def _keep_logged(self, jobs: Sequence[Job]) -> None:
        self._extras, self._metrics = {}, {}
        for row, job in enumerate(jobs):
            for column, value in job.extras.items():
                self._extras.setdefault(column, [None] * len(jobs))[row] = value
            for name, value in job.metrics:
                self._metrics.setdefault(name, []).append(value)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise type(self._error)(self._error.message, hint=self._error.hint)


def _pickled(completion: Completion) -> bytes:
    try:
        return pickle.dumps(completion)
    except Exception as e:  # pickling runs code of whatever the row holds
        bad = [name for name, value in completion.columns.items() if not _can_pickle(value)]
        raise RewardError(
            f"row {completion.where}: the column {', '.join(bad)} cannot be sent to the reward worker: {e}",
            hint="keep to text, numbers, lists, dates and bytes in the columns of the data set",
        ) from e


def _can_pickle(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        return False
    return True
