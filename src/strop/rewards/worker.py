"""What a worker does: take work, call reward functions, report.

Workers are forked by `forkserver`, which has loaded the functions. `python -m strop.rewards.worker INBOX OUTBOX` is the
other way, for functions whose process cannot be forked: a fresh interpreter that loads them itself. Either way a worker
holds no torch of ours and never imports the user's `__main__`. The pipes of the protocol are descriptors that no user
code knows: functions see an empty standard input, and what they print goes through the server into the log.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

from ..errors import RewardError
from .call import BoundFunction, Completion
from .limits import die_with_parent, limit_worker
from .load import Loaded, load
from .wire import Setup, Work, decode_work, encode_message, encode_report, read_frame


def main() -> None:
    """Load the functions in a fresh interpreter and serve until the inbox ends."""
    inbox, outbox = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent()
    plain_streams()
    stream = os.fdopen(inbox, "rb", buffering=1 << 16)
    body = read_frame(stream)
    if body is None:
        return
    setup: Setup = pickle.loads(body)
    try:
        functions = [loaded.function for loaded in load_all(setup)]
    except RewardError as e:
        _send(outbox, encode_message({"refused": e.message, "hint": e.hint}))
        return
    serve(stream, outbox, functions, setup.memory_bytes)


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


def serve(inbox: BinaryIO, outbox: int, functions: Sequence[BoundFunction], memory_bytes: int) -> None:
    """Cap this process, say that it is ready, and score until the inbox ends."""
    limit_worker(memory_bytes)
    _send(outbox, encode_message({"ready": True}))
    run_async = _AsyncRunner()
    while (body := read_frame(inbox)) is not None:
        try:
            _score(outbox, functions, decode_work(body), run_async)
        except RewardError as e:
            _send(outbox, encode_message({"refused": e.message, "hint": e.hint}))


def _score(outbox: int, functions: Sequence[BoundFunction], work: Work, run_async: Callable[[Any], Any]) -> None:
    job, indices, correct, bodies = work
    process = os.getpid()
    kept: list[Completion] | None = None
    for index in indices:
        function = functions[index]
        completions = kept if kept is not None and function.pure else [_unpickled(body) for body in bodies]
        # A function of ours leaves its arguments as they are; after any other they are read anew.
        kept = completions if function.pure else None
        start = time.perf_counter()
        outcomes, logged = function.score(completions, run_async, correct)
        if os.getpid() != process:
            os._exit(0)  # a child that the function forked and let return
        seconds = time.perf_counter() - start
        _send(outbox, encode_report(job, index, outcomes, seconds, logged))


def _unpickled(body: memoryview) -> Completion:
    try:
        return Completion(*pickle.loads(body))
    except Exception as e:  # unpickling runs the constructors of whatever the row holds
        raise RewardError(
            f"a row cannot be read in the reward worker: {type(e).__name__}: {e}",
            hint="keep to text, numbers, lists, dates and bytes in the columns of the data set",
        ) from e


def _send(outbox: int, message: bytes) -> None:
    written = os.write(outbox, message)
    while written < len(message):
        written += os.write(outbox, message[written:])


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
