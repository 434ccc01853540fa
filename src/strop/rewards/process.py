"""The pool's side of one worker process: start it, write to it and read from it without blocking, kill it."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..types import Rollout
from .combine import Outcome
from .wire import ReportReader, Setup, WireError, Work, frame

READ_BYTES = 1 << 16
TARGET_BACKLOG_S = 0.05
"""Work that is kept in a worker's pipe, in seconds, so that it never waits for the pool."""
KILL_WAIT_S = 10.0
MIN_BACKLOG, MAX_BACKLOG = 2, 64


@dataclass(slots=True, eq=False)
class Job:
    """One rollout on its way through the pool."""

    number: int
    rollout: Rollout
    completion: bytes
    remaining: deque[int]
    """Functions that have not answered yet, in order."""
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    metrics: list[tuple[str, float]] = field(default_factory=list)
    dropped: bool = False
    """Nobody waits for it any more."""


class WorkerProcess:
    """A worker and the jobs that were handed to it. The first unanswered function of the first job is what it runs."""

    def __init__(self, setup: Setup, output: IO[bytes] | None) -> None:
        self._process = subprocess.Popen(
            # -P: no folder of the user's may shadow the standard library while the interpreter starts.
            [sys.executable, "-P", "-m", "strop.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            bufsize=0,
            env=_environment(),
            start_new_session=True,  # Ctrl-C in the terminal reaches the trainer alone; one kill reaches all children
        )
        assert self._process.stdin is not None, "it is a pipe"
        assert self._process.stdout is not None, "it is a pipe"
        self._inbox, self._outbox = self._process.stdin, self._process.stdout
        os.set_blocking(self._inbox.fileno(), False)
        os.set_blocking(self._outbox.fileno(), False)
        self.jobs: deque[Job] = deque()
        self.ready = False
        self._reader = ReportReader()
        self._unsent: deque[tuple[memoryview, Job | None]] = deque()
        self._clock_start = time.monotonic()
        self._seconds_per_job = TARGET_BACKLOG_S
        self._unsent.append((memoryview(frame(pickle.dumps(setup))), None))
        self.send()

    @property
    def pid(self) -> int:
        """Process id, which is also that of its process group."""
        return self._process.pid

    @property
    def read_fd(self) -> int:
        """Descriptor on which reports arrive."""
        return self._outbox.fileno()

    @property
    def write_fd(self) -> int | None:
        """Descriptor to wait on while something is left to send."""
        return self._inbox.fileno() if self._unsent else None

    @property
    def has_room(self) -> bool:
        """Whether another job keeps it busy without piling up behind a slow one."""
        backlog = int(TARGET_BACKLOG_S / max(self._seconds_per_job, 1e-6))
        return self.ready and len(self.jobs) < min(max(backlog, MIN_BACKLOG), MAX_BACKLOG)

    def hand(self, job: Job) -> None:
        """Queue a job for this worker."""
        work = Work(job.number, tuple(job.remaining), job.completion)
        self.jobs.append(job)
        self._unsent.append((memoryview(frame(pickle.dumps(work))), job))

    def send(self) -> None:
        """Write what the pipe takes now. A broken pipe is left to `receive`, which sees the end of the stream."""
        while self._unsent:
            data, job = self._unsent[0]
            try:
                written = os.write(self._inbox.fileno(), data)
            except (BlockingIOError, BrokenPipeError):
                return
            if written < len(data):
                self._unsent[0] = (data[written:], job)
                return
            self._unsent.popleft()
            if job is not None and job is self.jobs[0]:
                self._clock_start = time.monotonic()

    def receive(self) -> Iterator[dict[str, Any] | None]:
        """Yield the reports that have arrived; None last if the worker is gone or does not speak our language."""
        while True:
            try:
                data = os.read(self._outbox.fileno(), READ_BYTES)
            except BlockingIOError:
                return
            if not data:
                yield None
                return
            self._clock_start = time.monotonic()
            try:
                yield from self._reader.feed(data)
            except WireError:
                yield None
                return

    def note_duration(self, seconds: float) -> None:
        """Keep the running mean that `has_room` is judged by."""
        self._seconds_per_job += 0.2 * (seconds - self._seconds_per_job)

    @property
    def running_since(self) -> float | None:
        """time.monotonic() at which the current call (or loading) began; None while idle or still being sent work."""
        if not self.ready:
            return self._clock_start
        if not self.jobs or any(job is self.jobs[0] for _, job in self._unsent):
            return None
        return self._clock_start

    def kill(self) -> str:
        """Kill the whole process group, reap the process, close the pipes and return how the process ended."""
        if self._process.returncode is None:
            # The group is killed before the process is reaped: until then nobody else can have its number.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=KILL_WAIT_S)
            self._inbox.close()
            self._outbox.close()
        code = self._process.returncode
        if code is None or code >= 0:
            return f"exit code {code}"
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
        return f"signal {-code}"


def _environment() -> dict[str, str]:
    """Return the trainer's environment, with `strop` importable and hashes of strings equal in every worker."""
    environment = dict(os.environ)
    environment.setdefault("PYTHONHASHSEED", "0")
    root = Path(__file__).resolve().parents[2]
    if root.name not in ("site-packages", "dist-packages"):
        known = [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
        environment["PYTHONPATH"] = os.pathsep.join([*known, str(root)])
    return environment
