"""The process that starts the reward workers: `python -m strop.rewards.forkserver`, started by the pool.

It is a fresh interpreter without torch of ours and without the user's `__main__`. It loads the reward functions once
and then forks a worker whenever the pool asks for one, which takes milliseconds whatever the functions import. It also

- passes on what workers print, up to a cap, so that no function fills the disk;
- counts the processes that a worker starts, and kills a worker that starts too many;
- ends with the trainer, and takes with it every process that descends from it.

Forking a process that has threads is not safe. If loading the functions started some, the server says so and starts
every worker as a fresh interpreter instead; so it does where there is no Linux.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from ..errors import RewardError
from .call import BoundFunction
from .limits import (
    MAX_PROCESSES,
    adopt_orphans,
    children_of,
    descendants_of,
    die_with_parent,
    how_it_ended,
    kernel_lists_children,
    kill_each,
    kill_group,
    num_threads,
)
from .load import Loaded
from .progress import Progress
from .wire import Setup, encode_message, read_frame
from .worker import Channel, load_all, plain_streams, serve

LOOK_S = 0.05
"""Time between two counts of a worker's processes."""
WORKER_OUTPUT_BYTES, RUN_OUTPUT_BYTES = 4 << 20, 64 << 20
"""What one worker, and all of a run, may print."""
READ_BYTES = 1 << 16
PIECE_BYTES = 4096
"""A pipe that is ready takes this many bytes without blocking."""
REAP_WAIT_S, CLOSE_WAIT_S = 0.05, 2.0


@dataclass(slots=True, eq=False)
class Child:
    """One worker, seen from its parent."""

    number: int
    pid: int
    output: int
    """Descriptor from which its standard output and error are read; -1 when it is closed."""
    printed: int = 0
    is_cut: bool = False
    """Whether some of what it printed was dropped."""
    status: int | None = None
    """Wait status, once it is reaped; its pid may be anyone's from then on."""
    why: str = ""
    """Why the server killed it, if it did."""


def main() -> None:
    """Load the functions, then serve the pool until it closes its end."""
    die_with_parent()
    # User code knows descriptors 0 to 2: they are nothing to read, and the log.
    control = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    plain_streams()
    with control.makefile("rb", buffering=0) as stream:
        body = read_frame(_Whole(stream))
    if body is None:
        return
    setup: Setup = pickle.loads(body)
    try:
        loaded = load_all(setup)
    except RewardError as e:
        control.sendall(encode_message({"refused": e.message, "hint": e.hint}))
        return
    why_fresh = _why_not_fork()
    control.sendall(
        encode_message({"ready": True, "fresh": bool(why_fresh), "notes": _notes(why_fresh), **_facts(loaded)})
    )
    gc.collect()
    gc.freeze()  # a collection in a worker then leaves the pages shared
    Server(control, None if why_fresh else [item.function for item in loaded], setup.memory_bytes).run()


class _Whole:
    """A raw stream whose `read` returns as many bytes as were asked for, and takes none beyond them."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def read(self, count: int, /) -> bytes:
        data = b""
        while len(data) < count and (more := self._raw.read(count - len(data))):
            data += more
        return data


def _why_not_fork() -> str:
    if sys.platform != "linux":
        return "they are forked on Linux only"
    named = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if named or num_threads() > 1:
        return f"loading the functions started threads ({', '.join(named) or f'{num_threads() - 1} of a C library'})"
    return ""


def _notes(why_fresh: str) -> list[str]:
    notes: list[str] = []
    if why_fresh and sys.platform == "linux":
        notes.append(f"reward workers are started one by one instead of forked, which is slower: {why_fresh}")
    if sys.platform == "linux" and not kernel_lists_children():
        notes.append(
            "the kernel does not list a process's children: a reward that starts processes without end is not stopped"
        )
    return notes


def _facts(loaded: Sequence[Loaded]) -> dict[str, Any]:
    declared = [item.declaration for item in loaded]
    return {
        "declared": [(d.kind, d.scope, d.low, d.high, d.version) for d in declared],
        "versions": [item.version for item in loaded],
        "with_ids": any(item.function.takes("completion_ids") for item in loaded),
    }


class Server:
    """Starts, watches and ends workers. Single-threaded, and never in user code."""

    def __init__(self, control: socket.socket, functions: list[BoundFunction] | None, memory_bytes: int) -> None:
        """`functions` None: workers are fresh interpreters that load them themselves."""
        self._control = control
        self._functions = functions
        self._memory_bytes = memory_bytes
        self._children: dict[int, Child] = {}
        self._ended: list[Child] = []
        self._printed = 0
        self._last_look = 0.0
        self._let_be = set(children_of(os.getpid()))
        """Processes that the user's modules started when they were imported."""

    def run(self) -> None:
        """Serve until the pool closes its end or its process ends; then end everything below this process."""
        adopt_orphans()
        signal.signal(signal.SIGTERM, _end)
        die_with_parent(signal.SIGTERM)
        try:
            self._loop()
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._close()

    def _loop(self) -> None:
        while True:
            poller = select.poll()
            poller.register(self._control, select.POLLIN)
            for child in (*self._children.values(), *self._ended):
                if child.output >= 0:
                    poller.register(child.output, select.POLLIN)
            busy = bool(self._children or self._ended)
            for fd, _ in poller.poll(LOOK_S * 1000 if busy else None):
                if fd != self._control.fileno():
                    self._pass_on(next(c for c in (*self._children.values(), *self._ended) if c.output == fd))
                elif not self._answer():
                    return
            if time.monotonic() - self._last_look >= LOOK_S:
                self._look()
                self._last_look = time.monotonic()

    def _answer(self) -> bool:
        """Do what the pool asks for. Returns False when it is gone."""
        data, fds, _, _ = socket.recv_fds(self._control, READ_BYTES, 3)
        if not data:
            return False
        request = json.loads(data[4:])
        if "start" in request:
            try:
                reply = {"pid": self._start(request["start"], *fds)}
            except OSError as e:
                reply = {"failed": str(e)}
            for fd in fds:
                os.close(fd)
        else:
            reply = self._finish(self._children.pop(request["end"]))
        self._control.sendall(encode_message(reply))
        return True

    # --- starting ---------------------------------------------------------------------------------------------------

    def _start(self, number: int, inbox: int, outbox: int, page: int) -> int:
        output, theirs = os.pipe()
        try:
            if self._functions is None:
                pid = _spawn((inbox, outbox, page), theirs)
            else:
                pid = self._fork(self._functions, (inbox, outbox, page), output, theirs)
        except OSError:
            os.close(output)
            raise
        finally:
            os.close(theirs)
        os.set_blocking(output, False)
        self._children[number] = Child(number, pid, output)
        return pid

    def _fork(self, functions: Sequence[BoundFunction], ends: tuple[int, int, int], output: int, theirs: int) -> int:
        server = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.setsid()
            die_with_parent()
            if os.getppid() != server:
                os._exit(1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.dup2(theirs, 1)
            os.dup2(theirs, 2)
            plain_streams()
            for fd in (theirs, output, *(c.output for c in (*self._children.values(), *self._ended) if c.output >= 0)):
                os.close(fd)
            self._control.close()
            inbox, outbox, page = ends
            serve(Channel(inbox, outbox), Progress(page), functions, self._memory_bytes)
            code = 0
        except BaseException:  # nothing of the server may run on in its fork
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    # --- watching ---------------------------------------------------------------------------------------------------

    def _pass_on(self, child: Child) -> None:
        """Move on some of what a worker printed, or drop it past the caps."""
        try:
            data = os.read(child.output, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            os.close(child.output)
            child.output = -1
            return
        room = max(0, min(WORKER_OUTPUT_BYTES - child.printed, RUN_OUTPUT_BYTES - self._printed))
        kept = data[:room]
        child.printed += len(kept)
        self._printed += len(kept)
        _print(kept)
        if len(kept) < len(data) and not child.is_cut:
            child.is_cut = True
            _print(b"\n[a reward function prints too much; the rest is dropped]\n")

    def _look(self) -> None:
        """Note workers that ended, count what the others started, and end what belongs to no worker any more."""
        for child in self._children.values():
            if child.status is None and _has_ended(child.pid):
                kill_group(child.pid)  # while the number is still its own; what is left holds the pipes open
                self._reap(child, 0.0)
        self._ended = [child for child in self._ended if not self._is_over(child)]
        alive = {child.pid: child for child in self._children.values() if child.status is None}
        started = {pid: len(descendants_of(pid, 20 * MAX_PROCESSES)) for pid in alive}
        ours = alive.keys() | {child.pid for child in self._ended} | self._let_be
        for orphan in (pid for pid in children_of(os.getpid()) if pid not in ours):
            with contextlib.suppress(OSError):
                if os.waitpid(orphan, os.WNOHANG)[0]:
                    continue
                session = os.getsid(orphan)
                if session in alive:
                    started[session] += 1
                else:
                    kill_each([*descendants_of(orphan), orphan])
        for pid, child in alive.items():
            if started[pid] > MAX_PROCESSES:
                child.why = f"it started more than {MAX_PROCESSES} processes"
                _kill(child)

    def _is_over(self, child: Child) -> bool:
        return self._reap(child, 0.0) and child.output < 0

    def _reap(self, child: Child, patience: float) -> bool:
        """Take the status of a worker that has been killed, waiting for it for a while. Returns whether it is there."""
        deadline = time.monotonic() + patience
        while child.status is None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(child.pid, os.WNOHANG)
                child.status = status if pid else None
            if child.status is None:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.0005)
        return True

    # --- ending -----------------------------------------------------------------------------------------------------

    def _finish(self, child: Child) -> dict[str, Any]:
        if child.status is None:
            _kill(child)
            self._reap(child, REAP_WAIT_S)
        self._ended.append(child)
        return {"how": "" if child.status is None else how_it_ended(child.status), "why": child.why}

    def _close(self) -> None:
        for child in self._children.values():
            if child.status is None:
                _kill(child)
        deadline = time.monotonic() + CLOSE_WAIT_S
        while time.monotonic() < deadline:
            kill_each(descendants_of(os.getpid()))
            with contextlib.suppress(OSError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
                time.sleep(0.001)
                continue
            break  # no child is left
        for child in (*self._children.values(), *self._ended):
            while child.output >= 0 and select.select([child.output], [], [], 0)[0]:
                self._pass_on(child)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit


def _spawn(ends: tuple[int, int, int], theirs: int) -> int:
    """Start a worker as a fresh interpreter. It is waited for by its number."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "strop.rewards.worker", *map(str, ends)],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        pass_fds=ends,
        start_new_session=True,
    )
    process.returncode = 0  # so that the object does not wait for it as well
    return process.pid


def _kill(child: Child) -> None:
    """Kill a worker and all that descends from it, whether it stayed in the worker's group or left it."""
    below = descendants_of(child.pid, 20 * MAX_PROCESSES)
    kill_group(child.pid)
    kill_each(below)


def _has_ended(pid: int) -> bool:
    if not hasattr(os, "waitid"):  # then its closed pipes tell the pool
        return False
    with contextlib.suppress(ChildProcessError):
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return True


def _print(data: bytes) -> None:
    """Write to the log, unless what reads it does not take it: a paused terminal must not hold the workers up."""
    for start in range(0, len(data), PIECE_BYTES):
        with contextlib.suppress(OSError):
            if select.select([], [2], [], 0.02)[1]:
                os.write(2, data[start : start + PIECE_BYTES])


if __name__ == "__main__":
    main()
