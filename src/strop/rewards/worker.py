"""A process that runs reward functions: `python -m strop.rewards.worker`, started and killed by the pool.

It is a fresh interpreter, so it holds no torch and never imports the user's `__main__`. It takes frames on standard
input and answers on what was standard output; the functions themselves see an empty standard input, and what they print
goes to standard error. It ends when its input ends, and on Linux also when its parent dies in the middle of a call.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

from ..errors import RewardError
from .call import BoundFunction, Completion
from .load import load_function
from .wire import Setup, Work, encode_report, jsonable, read_frame


def main() -> None:
    """Serve until the input ends."""
    inbox, outbox = _private_pipes()
    _die_with_parent()
    setup = read_frame(inbox)
    if setup is None:
        return
    try:
        functions = _load(pickle.loads(setup))
    except RewardError as e:
        _send(outbox, {"refused": e.message, "hint": e.hint})
        return
    _send(outbox, {"ready": True})
    run_async = _AsyncRunner()
    while (body := read_frame(inbox)) is not None:
        try:
            _score(outbox, functions, pickle.loads(body), run_async)
        except RewardError as e:
            _send(outbox, {"refused": e.message, "hint": e.hint})


def _private_pipes() -> tuple[BinaryIO, int]:
    """Move the pool's pipes to descriptors that no user code knows, and give it harmless ones instead."""
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Callable[..., None] = getattr(stream, "reconfigure", lambda **_: None)
        reconfigure(line_buffering=True, errors="backslashreplace")
    return inbox, outbox


def _die_with_parent() -> None:
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _load(setup: Setup) -> list[BoundFunction]:
    sys.path.extend(folder for folder in setup.sys_path if folder not in sys.path)
    return [BoundFunction(spec.name, load_function(spec)) for spec in setup.specs]


def _score(outbox: int, functions: Sequence[BoundFunction], work: Work, run_async: Callable[[Any], Any]) -> None:
    process = os.getpid()
    for index in work.functions:
        completion: Completion = _unpickle(work.completion)
        start = time.perf_counter()
        outcome, logged = functions[index](completion, run_async)
        if os.getpid() != process:
            os._exit(0)  # a child that the function forked and let return
        report: dict[str, Any] = {
            "job": work.job,
            "function": index,
            "value": outcome.value,
            "failure": outcome.failure,
            "seconds": time.perf_counter() - start,
        }
        if logged.extras:
            report["extras"] = {column: jsonable(value) for column, value in logged.extras.items()}
        if logged.metrics:
            report["metrics"] = logged.metrics
        _send(outbox, report)


def _unpickle(body: bytes) -> Completion:
    try:
        return pickle.loads(body)
    except Exception as e:  # unpickling runs the constructors of whatever the row holds
        raise RewardError(
            f"a row cannot be read in the reward worker: {type(e).__name__}: {e}",
            hint="keep to text, numbers, lists, dates and bytes in the columns of the data set",
        ) from e


def _send(outbox: int, report: dict[str, Any]) -> None:
    data = memoryview(encode_report(report))
    while data:
        data = data[os.write(outbox, data) :]


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
