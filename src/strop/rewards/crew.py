"""The pool's processes: the launcher and its workers, their limits, and which work lies where."""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any, Protocol

from ..errors import RewardError
from .jobs import Job
from .launcher import Launcher, LauncherGoneError
from .process import WorkerProcess
from .wire import Message, Records, Report, Setup

LOAD_LIMIT_S = 120.0
"""Functions that are not imported by then are an error."""
MAX_BARREN_DEATHS = 3
"""Processes in a row that may die without anything having been answered before the run stops."""
MAX_SUSPICION = 2
"""How often the launcher may die while a completion is scored before that completion is blamed for it."""


class Owner(Protocol):
    """Whom the crew tells what happened."""

    def learn(self, ready: Mapping[str, Any]) -> None:
        """The functions are loaded; this is what the launcher says of them."""

    def take(self, job: Job, report: Report) -> None:
        """A function answered for a job, the first that remains."""

    def take_value(self, job: Job, function: int, value: float | None) -> None:
        """The same, of one completion and without anything beside the value."""

    def blame(self, job: Job, function: int, reason: str) -> None:
        """A function that remains gives no answer for this job, for a reason outside of it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How many workers there are, and how long a call may take."""

    num_workers: int
    timeout_s: float


class Crew:
    """Keeps workers alive and busy, in the thread of its owner. What a method raises is a broken contract."""

    def __init__(self, setup: Setup, limits: Limits, owner: Owner, hash_seed: int) -> None:
        """Start nothing yet."""
        self._setup, self._limits, self._owner, self._hash_seed = setup, limits, owner, hash_seed
        self._launcher: Launcher | None = None
        self._output: IO[bytes] | None = None
        self.workers: list[WorkerProcess] = []
        self.pending: deque[Job] = deque()
        """Jobs that no worker has yet."""
        self._suspects: set[int] = set()
        self._barren_deaths = 0

    @property
    def is_ready(self) -> bool:
        """Whether every worker runs and has the functions."""
        return len(self.workers) == self._limits.num_workers and all(worker.ready for worker in self.workers)

    @property
    def launcher_pid(self) -> int:
        """Process id of the launcher."""
        assert self._launcher is not None, "it has been started"
        return self._launcher.pid

    def start(self, output: IO[bytes] | None) -> None:
        """Start the launcher, which loads the functions, and return at once."""
        self._output = output
        if self._launcher is None:
            self._launcher = Launcher(self._setup, output, hash_seed=self._hash_seed)

    def close(self) -> None:
        """Kill the workers and what they started."""
        for worker in self.workers:
            worker.close()
        self.workers.clear()
        if self._launcher is not None:
            self._launcher.close()
            self._launcher = None

    def forget(self, job: Job) -> None:
        """A job is done or dropped: it is under no suspicion any more."""
        self._suspects.discard(job.number)

    def turn(self, *, block: bool) -> None:
        """One round: wait if asked to, read, enforce limits, hand out. Raises RewardError."""
        if block:
            self._wait()
        self._tend_launcher()
        for worker in list(self.workers):
            self._read(worker)
        self._enforce_limits()
        self._hand_out()

    def _wait(self) -> None:
        """Sleep until a process reports, takes more bytes, or reaches its limit."""
        poller = select.poll()
        limits: list[float] = []
        if self._launcher is not None and self._launcher.ready is None:
            poller.register(self._launcher.fd, select.POLLIN)
            limits.append(self._launcher.started + LOAD_LIMIT_S)
        elif len(self.workers) < self._limits.num_workers:
            return
        for worker in self.workers:
            limits += [limit] if (limit := self._limit(worker)) is not None else []
            poller.register(worker.read_fd, select.POLLIN)
            if worker.write_fd is not None:
                poller.register(worker.write_fd, select.POLLOUT)
        timeout = max(0.0, min(limits) - time.monotonic()) if limits else LOAD_LIMIT_S
        poller.poll(timeout * 1000 + 1)

    def _tend_launcher(self) -> None:
        launcher = self._launcher
        if launcher is None or len(self.workers) == self._limits.num_workers:
            return  # workers die with it, so its end is seen there
        try:
            while launcher.ready is None and (message := launcher.poll()) is not None:
                _raise_refusal(message)
                launcher.ready = dict(message)
                self._owner.learn(message)
            while launcher.ready is not None and len(self.workers) < self._limits.num_workers:
                self.workers.append(WorkerProcess(launcher))
        except LauncherGoneError as e:
            self._restart(str(e))

    def _restart(self, how: str) -> None:
        """Start another launcher after the death of one, and hand its workers' jobs out again.

        A completion that was being scored may have caused it. It runs alone the next time, and is blamed for the next
        death.
        """
        assert self._launcher is not None, "it died"
        was_ready, ended = self._launcher.ready is not None, self._launcher.close()
        how = ended if not was_ready or how == "it ended" else f"{ended}, {how}"
        lost, self.workers, self._launcher = self.workers, [], None
        unfinished: list[Job] = []
        for worker in lost:
            worker.close()
            jobs = [job for job in worker.jobs if job.remaining and not job.dropped]
            if worker.call is not None and worker.call[0] in jobs:
                self._suspect(*worker.call)
            unfinished += [job for job in jobs if job.remaining]
        self.pending.extendleft(reversed(unfinished))
        self._count_barren_death(how)
        self.start(self._output)

    def _suspect(self, job: Job, function: int) -> None:
        job.suspicion += 1
        self._suspects.add(job.number)
        if job.suspicion >= MAX_SUSPICION:
            self._owner.blame(job, function, "the process that starts the reward workers died while it ran")

    def _hand_out(self) -> None:
        while self.pending:
            free = [worker for worker in self.workers if worker.has_room]
            if not free or (self._suspects and any(worker.jobs for worker in self.workers)):
                break
            min(free, key=lambda worker: len(worker.jobs)).hand(self.pending.popleft())
        for worker in self.workers:
            worker.send()

    def _read(self, worker: WorkerProcess) -> None:
        if worker not in self.workers:
            return  # its launcher died meanwhile
        for message in worker.receive():
            if message is None or not self._take(worker, message):
                self._replace_dead(worker)
                return

    def _take(self, worker: WorkerProcess, message: Message) -> bool:
        """Take in a message. Returns False for one that answers nothing that was asked: who knows what wrote it."""
        if isinstance(message, list):
            return self._take_records(worker, message)
        if not isinstance(message, Report):
            _raise_refusal(message)
            worker.ready = True
            return True
        job = worker.asked(message.job, message.function)
        if job is None or not message.fits(len(job.members)):
            return False
        self._barren_deaths = 0
        worker.note_duration(message.seconds * len(self._setup.specs))
        self._owner.take(job, message)
        if not job.remaining:
            worker.jobs.popleft()
        return True

    def _take_records(self, worker: WorkerProcess, records: Records) -> bool:
        for number, function, applies, value, seconds in records:
            job = worker.asked(number, function)
            if job is None or len(job.members) != 1:
                return False
            self._barren_deaths = 0
            worker.note_duration(seconds * len(self._setup.specs))
            self._owner.take_value(job, function, value if applies else None)
            if not job.remaining:
                worker.jobs.popleft()
        return True

    def _limit(self, worker: WorkerProcess) -> float | None:
        start = worker.waited_for_since
        if start is None:
            return None
        return start + (self._limits.timeout_s if worker.ready else LOAD_LIMIT_S)

    def _enforce_limits(self) -> None:
        now = time.monotonic()
        loading = self._launcher is not None and self._launcher.ready is None
        starts = [self._launcher.started] if self._launcher is not None and loading else []
        starts += [w.waited_for_since or now for w in self.workers if not w.ready]
        if any(now >= start + LOAD_LIMIT_S for start in starts):
            raise RewardError(
                f"the reward functions have not been imported within {LOAD_LIMIT_S:g} s",
                hint="look for work at import time in the files of rewards.funcs, and move it into the function",
            )
        for worker in list(self.workers):
            limit = self._limit(worker)
            if limit is not None and now >= limit and worker in self.workers:
                call = worker.call or (worker.jobs[0], worker.jobs[0].remaining[0])
                self._replace(worker, call, f"ran past the limit of {self._limits.timeout_s:g} s (rewards.timeout_s)")

    def _replace_dead(self, worker: WorkerProcess) -> None:
        try:
            how, why = worker.end()
        except LauncherGoneError as e:
            self._restart(str(e))
            return
        if worker.call is None:
            self._count_barren_death(how)
        self._replace(worker, worker.call, why or f"the worker process died ({how})")

    def _replace(self, worker: WorkerProcess, call: tuple[Job, int] | None, reason: str) -> None:
        """End a worker, blame the call for it, if there was one, and hand the rest to others."""
        self.workers.remove(worker)
        if call is not None:
            self._owner.blame(*call, reason)
        unfinished = [job for job in worker.jobs if job.remaining and not job.dropped]
        self.pending.extendleft(reversed(unfinished))
        try:
            worker.end()
        except LauncherGoneError as e:
            self._restart(str(e))
        self._tend_launcher()

    def _count_barren_death(self, how: str) -> None:
        self._barren_deaths += 1
        if self._barren_deaths >= MAX_BARREN_DEATHS:
            raise RewardError(
                f"{self._barren_deaths} reward workers in a row died without an answer, or with one that is none of "
                f"ours, the last with {how}",
                hint=f"import the functions by hand to see why: {', '.join(spec.entry for spec in self._setup.specs)}",
            )


def _raise_refusal(message: Mapping[str, Any]) -> None:
    if "refused" in message:
        raise RewardError(str(message["refused"]), hint=str(message["hint"]))
