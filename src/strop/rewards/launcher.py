"""The pool's side of the process that starts the workers (`forkserver`)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from .limits import how_it_ended
from .progress import Progress, make_page
from .wire import MessageReader, Setup, WireError, encode_message, frame

ANSWER_LIMIT_S = 15.0
"""A server that does not answer for so long counts as dead."""
CLOSE_LIMIT_S = 10.0
READ_BYTES = 1 << 16
PIPE_BYTES = 1 << 18


class LauncherGoneError(Exception):
    """The server ended, or does not answer."""


class Launcher:
    """One running server, and what it said of the functions once it has loaded them."""

    def __init__(self, setup: Setup, output: IO[bytes] | None, *, hash_seed: int = 0) -> None:
        """Start the server and return at once."""
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # -P: no folder of the user's may shadow the standard library while the interpreter starts.
                [sys.executable, "-P", "-m", "strop.rewards.forkserver"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=output,
                env=environment(hash_seed),
                start_new_session=True,  # Ctrl-C in the terminal reaches the trainer alone
            )
        self.started = time.monotonic()
        self.ready: dict[str, Any] | None = None
        """The server's account of the functions; None while it loads them."""
        self.setup = setup
        self._reader = MessageReader()
        self._messages: deque[Any] = deque()
        self._next_number = 0
        with contextlib.suppress(OSError):
            self._control.sendall(frame(pickle.dumps(setup)))

    @property
    def fd(self) -> int:
        """Descriptor on which the server reports."""
        return self._control.fileno()

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    @property
    def fresh(self) -> bool:
        """Whether workers are fresh interpreters that have to load the functions themselves."""
        return bool(self.ready and self.ready["fresh"])

    def poll(self) -> Mapping[str, Any] | None:
        """Return a message that has arrived by itself, without waiting. Raises LauncherGoneError at the end."""
        if not self._messages:
            self._receive(0.0)
        return self._messages.popleft() if self._messages else None

    def start_worker(self) -> tuple[int, int, int, int, Progress]:
        """Have a worker started; return its number, its pid, our ends of its pipes (to write, to read), its progress.

        Raises LauncherGoneError.
        """
        number, self._next_number = self._next_number, self._next_number + 1
        their_inbox, inbox = os.pipe()
        _widen(inbox)
        outbox, their_outbox = os.pipe()
        page = make_page()
        progress = Progress(os.dup(page))
        try:
            reply = self._ask({"start": number}, their_inbox, their_outbox, page)
            if "pid" not in reply:
                raise LauncherGoneError(f"no process could be started: {reply.get('failed')}")
        except BaseException:
            os.close(inbox)
            os.close(outbox)
            progress.close()
            raise
        finally:
            os.close(page)
            os.close(their_inbox)
            os.close(their_outbox)
        os.set_blocking(inbox, False)
        os.set_blocking(outbox, False)
        return number, reply["pid"], inbox, outbox, progress

    def end_worker(self, number: int) -> tuple[str, str]:
        """Have a worker killed with all that it started; return how it ended and why the server had killed it, if so.

        Raises LauncherGoneError.
        """
        reply = self._ask({"end": number})
        return reply["how"], reply["why"]

    def close(self) -> str:
        """End the server and everything below it; return how it ended."""
        self._control.close()
        try:
            self._process.wait(timeout=CLOSE_LIMIT_S if self.ready else 0.0)
        except subprocess.TimeoutExpired:  # it is in code of the user's, or stuck
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
        code = self._process.returncode
        return how_it_ended(code << 8 if code >= 0 else -code)

    def _ask(self, request: Mapping[str, Any], *fds: int) -> dict[str, Any]:
        try:
            socket.send_fds(self._control, [encode_message(request)], list(fds))
        except OSError as e:
            raise LauncherGoneError(str(e)) from e
        deadline = time.monotonic() + ANSWER_LIMIT_S
        while not self._messages:
            left = deadline - time.monotonic()
            if left <= 0:
                raise LauncherGoneError(f"it has not answered for {ANSWER_LIMIT_S:g} s")
            self._receive(left)
        return self._messages.popleft()

    def _receive(self, timeout: float) -> None:
        try:
            self._control.settimeout(timeout)
            data = self._control.recv(READ_BYTES)
        except (BlockingIOError, TimeoutError):
            return
        except OSError as e:
            raise LauncherGoneError(str(e)) from e
        finally:
            self._control.settimeout(None)
        if not data:
            raise LauncherGoneError("it ended")
        try:
            self._messages.extend(self._reader.feed(data))
        except WireError as e:
            raise LauncherGoneError(str(e)) from e


def _widen(pipe: int) -> None:
    """Let a pipe hold more than a few completions, so that worker and pool wake each other less often (Linux)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def environment(hash_seed: int) -> dict[str, str]:
    """Return the trainer's environment with `strop` importable and nothing in it that could change a verdict.

    Hashes of text, the locale, the default encoding, the time zone and the number of threads that a sum is split over
    are the same on every machine.
    """
    changed = {
        "PYTHONHASHSEED": str(hash_seed), "PYTHONUTF8": "1", "LC_ALL": "C.UTF-8", "TZ": "UTC",
        "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NUMEXPR_NUM_THREADS": "1",
    }  # fmt: skip
    found = {**os.environ, **changed}
    root = Path(__file__).resolve().parents[2]
    if root.name not in ("site-packages", "dist-packages"):
        known = [found["PYTHONPATH"]] if found.get("PYTHONPATH") else []
        found["PYTHONPATH"] = os.pathsep.join([*known, str(root)])
    return found
