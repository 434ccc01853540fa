"""What a worker does: take work, call reward functions, report.

Workers are forked by `forkserver`, which has loaded the functions. `python -m strop.rewards.worker INBOX OUTBOX PAGE`
is the other way, for functions whose process cannot be forked: a fresh interpreter that loads them itself. Either way a
worker holds no torch of ours and never imports the user's `__main__`. The pipes are descriptors that no user
code knows: functions see an empty standard input, and what they print goes through the server into the log.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import RewardError
from .call import BoundFunction, Completion
from .limits import die_with_parent, limit_worker
from .load import Loaded, load
from .progress import Progress
from .wire import (
    LENGTH_BYTES,
    RECORD_BYTES,
    Setup,
    Work,
    decode_work,
    encode_message,
    encode_records,
    encode_report,
    length_at,
)

QUICK_S = 0.004
"""Reports of calls that take less are held back for as long, to be sent together. A worker that dies takes those along;
their calls are then made again."""
READ_BYTES = 1 << 16


def main() -> None:
    """Load the functions in a fresh interpreter and serve until the inbox ends."""
    inbox, outbox, page = (int(argument) for argument in sys.argv[1:4])
    die_with_parent()
    plain_streams()
    channel = Channel(inbox, outbox)
    body = channel.receive()
    if body is None:
        return
    setup: Setup = pickle.loads(body)
    try:
        functions = [loaded.function for loaded in load_all(setup)]
    except RewardError as e:
        channel.send(encode_message({"refused": e.message, "hint": e.hint}))
        return
    serve(channel, Progress(page), functions, setup.memory_bytes)


def load_all(setup: Setup) -> list[Loaded]:
    """Import all functions of a run. Raises RewardError for one that cannot be loaded."""
    sys.path.extend(folder for folder in setup.sys_path if folder not in sys.path)
    # A function that imports it in its first call would draw from a generator that no one has seeded.
    with contextlib.suppress(ImportError):
        import numpy.random  # noqa: F401
    return [load(spec, setup.options.get(spec.name, {}), setup.facts) for spec in setup.specs]


def plain_streams() -> None:
    """Let what functions print appear line by line, whatever it holds, on what descriptors 1 and 2 are by now."""
    sys.stdout = sys.__stdout__ = open(1, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


class Channel:
    """The worker's ends of its pipes."""

    def __init__(self, inbox: int, outbox: int) -> None:
        self._inbox, self._outbox = inbox, outbox
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._begin = self._end = 0
        self._held: list[bytes] = []
        self._held_since = 0.0

    def receive(self) -> memoryview | None:
        """Return the body of the next message; None at the end. What is held back is sent before it waits.

        A body is a view that the next call overwrites.
        """
        while True:
            begin, there = self._begin, self._end - self._begin
            wanted = LENGTH_BYTES
            if there >= LENGTH_BYTES:
                wanted += length_at(self._buffer, begin)[0]
                if there >= wanted:
                    self._begin = begin + wanted
                    return self._buffer[begin + LENGTH_BYTES : self._begin]
            self.flush()
            old = self._buffer
            if wanted > len(old) or wanted < len(old) > READ_BYTES:
                self._buffer = memoryview(bytearray(max(READ_BYTES, wanted)))
            self._buffer[:there] = old[begin : self._end]
            self._begin, self._end = 0, there
            count = os.readv(self._inbox, [self._buffer[there:]])
            if not count:
                return None
            self._end += count

    def hold(self, report: bytes, began: float, now: float) -> None:
        """Send the report of a call, or keep it for a moment; both times are of time.monotonic()."""
        if len(report) != RECORD_BYTES:
            self.send(report)
            return
        if not self._held:
            self._held_since = began
        self._held.append(report)
        if now - self._held_since > QUICK_S:
            self.flush()

    def send(self, message: bytes) -> None:
        """Send a message, after what is held back."""
        self._write((encode_records(self._held) if self._held else b"") + message)

    def flush(self) -> None:
        """Send what is held back."""
        if self._held:
            self._write(encode_records(self._held))

    def _write(self, data: bytes) -> None:
        self._held.clear()
        written = 0
        while written < len(data):
            written += os.write(self._outbox, data[written:] if written else data)


def serve(channel: Channel, progress: Progress, functions: Sequence[BoundFunction], memory_bytes: int) -> None:
    """Cap this process, say that it is ready, and score until the inbox ends."""
    limit_worker(memory_bytes)
    channel.send(encode_message({"ready": True}))
    run_async = _AsyncRunner()
    process = os.getpid()
    while (body := channel.receive()) is not None:
        try:
            _score(channel, progress, functions, decode_work(body), run_async, process)
        except RewardError as e:
            _leave_fork(process)
            channel.send(encode_message({"refused": e.message, "hint": e.hint}))


def _score(
    channel: Channel,
    progress: Progress,
    functions: Sequence[BoundFunction],
    work: Work,
    run_async: Callable[[Any], Any],
    process: int,
) -> None:
    job, indices, correct, bodies = work
    kept: list[Completion] | None = None
    for index in indices:
        function = functions[index]
        began = progress.begin(job, index)
        completions = kept if kept is not None and function.pure else [_unpickled(body) for body in bodies]
        # A function of ours leaves its arguments as they are; after any other they are read anew.
        kept = completions if function.pure else None
        outcomes, logged = function.score(completions, run_async, correct)
        if not function.pure:
            _leave_fork(process)
        now = time.monotonic()
        progress.end()
        channel.hold(encode_report(job, index, outcomes, now - began, logged), began, now)


def _leave_fork(process: int) -> None:
    """End a child that a function forked and let return: it would take work and answer beside its parent."""
    if os.getpid() != process:
        os._exit(0)


def _unpickled(body: memoryview) -> Completion:
    try:
        return Completion(*pickle.loads(body))
    except Exception as e:  # unpickling runs the constructors of whatever the row holds
        raise RewardError(
            f"a row cannot be read in the reward worker: {type(e).__name__}: {e}",
            hint="keep to text, numbers, lists, dates and bytes in the columns of the data set",
        ) from e


class _AsyncRunner:
    """Waits for awaitables on one event loop that lives as long as the worker, so that cached clients stay usable."""

    def __init__(self) -> None:
        self._loop: Any = None

    def __call__(self, awaitable: Any) -> Any:
        import asyncio

        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)
        return self._loop.run_until_complete(awaitable)


if __name__ == "__main__":
    main()
