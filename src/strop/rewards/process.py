"""The pool's side of one worker: write to it and read from it without blocking, know what it runs, end it."""

from __future__ import annotations

import os
import pickle
import time
from collections import deque
from collections.abc import Iterator
from itertools import islice

from .jobs import Job
from .launcher import Launcher
from .wire import Message, MessageReader, WireError, frame

READ_BYTES = 1 << 16
TARGET_BACKLOG_S = 0.05
"""Work that is kept in a worker's pipe, in seconds, so that it never waits for the pool."""
MIN_BACKLOG, MAX_BACKLOG = 2, 256
MAX_PIECES = 256
"""Messages that are written with one system call."""


class WorkerProcess:
    """A worker and the jobs that were handed to it, which it does in order."""

    def __init__(self, launcher: Launcher) -> None:
        """Have the launcher start a worker. Raises LauncherGoneError."""
        self._launcher = launcher
        self._number, self.pid, self.write_end, self.read_fd, self._progress = launcher.start_worker()
        self.jobs: deque[Job] = deque()
        self.ready = False
        self._reader = MessageReader()
        self._unsent: deque[tuple[bytes | memoryview, Job | None]] = deque()
        self._clock_start = time.monotonic()
        self._seconds_per_job = TARGET_BACKLOG_S
        self._is_open = True
        self._last: tuple[Job, int, float] | None = None
        """What it was running when it was closed."""
        if launcher.fresh:
            self._unsent.append((frame(pickle.dumps(launcher.setup)), None))
            self.send()

    @property
    def write_fd(self) -> int | None:
        """Descriptor to wait on while something is left to send."""
        return self.write_end if self._unsent else None

    @property
    def has_room(self) -> bool:
        """Whether another job keeps it busy without piling up behind a slow one."""
        backlog = int(TARGET_BACKLOG_S / max(self._seconds_per_job, 1e-6))
        return self.ready and len(self.jobs) < min(max(backlog, MIN_BACKLOG), MAX_BACKLOG)

    def hand(self, job: Job) -> None:
        """Queue a job for this worker."""
        self.jobs.append(job)
        self._unsent.append((job.encoded(), job))

    def send(self) -> None:
        """Write what the pipe takes now. A broken pipe is left to `receive`, which sees the end of the stream."""
        while self._unsent:
            try:
                written = os.writev(self.write_end, [data for data, _ in islice(self._unsent, MAX_PIECES)])
            except (BlockingIOError, BrokenPipeError):
                return
            while written:
                data, job = self._unsent.popleft()
                if written < len(data):
                    self._unsent.appendleft((memoryview(data)[written:], job))
                    return
                written -= len(data)
                if job is not None and job is self.jobs[0]:
                    self._clock_start = time.monotonic()

    def receive(self) -> Iterator[Message | None]:
        """Yield the messages that have arrived; None last if the worker is gone or does not speak our language."""
        while True:
            try:
                data = os.read(self.read_fd, READ_BYTES)
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
            if len(data) < READ_BYTES:
                return

    def asked(self, number: int, function: int) -> Job | None:
        """Return the first job if that is its number and the function the first that remains of it, else None."""
        job = self.jobs[0] if self.jobs else None
        return job if job is not None and job.number == number and job.remaining[0] == function else None

    def note_duration(self, seconds: float) -> None:
        """Keep the running mean that `has_room` is judged by."""
        self._seconds_per_job += 0.2 * (seconds - self._seconds_per_job)

    def _running(self) -> tuple[Job, int, float] | None:
        """The job and the function that it runs, and since when."""
        if not self._is_open:
            return self._last
        running = self._progress.running
        if running is None:
            return None
        number, function, since = running
        job = next((job for job in self.jobs if job.number == number and function in job.remaining), None)
        return None if job is None else (job, function, since)

    @property
    def call(self) -> tuple[Job, int] | None:
        """The job and the function that it runs, or ran when it was closed; None between calls."""
        running = self._running()
        return None if running is None else running[:2]

    @property
    def waited_for_since(self) -> float | None:
        """time.monotonic() since when it runs a call, or loads, or leaves alone what it was sent; None while idle."""
        if not self.ready:
            return self._clock_start
        if not self.jobs or (self._unsent and self._unsent[0][1] is self.jobs[0]):
            return None  # what is unsent lies in the order of the jobs
        running = self._running()
        return self._clock_start if running is None else running[2]

    def end(self) -> tuple[str, str]:
        """Kill it with all that it started; return how it ended, and why the launcher had killed it before, if so.

        The second time it does nothing and returns empty texts. Raises LauncherGoneError.
        """
        if not self._is_open:
            return "", ""
        self.close()
        return self._launcher.end_worker(self._number)

    def close(self) -> None:
        """Close the pipes."""
        if self._is_open:
            self._last = self._running()
            self._is_open = False
            os.close(self.write_end)
            os.close(self.read_fd)
            self._progress.close()
