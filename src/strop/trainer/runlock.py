"""One process per run folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path

from ..errors import RunError
from ..monitor.files import reason_of

_held: set[RunLock] = set()


class RunLock:
    """An exclusive lock on a folder. The system drops it when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        """Take the lock and write process id and host into `FOLDER/.lock`.

        Raises RunError with the holder's process id when another process has it.
        """
        file = folder / ".lock"
        try:
            fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as e:
            raise _cannot_lock(folder, e) from e
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.write(fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        except BlockingIOError as e:
            holder = os.read(fd, 1000)
            os.close(fd)
            raise RunError(
                f"run folder {folder} is in use by {_described(holder)}",
                hint="wait for it or stop it, or give another folder with --out",
            ) from e
        except OSError as e:
            os.close(fd)
            raise _cannot_lock(folder, e) from e
        self._fd = fd
        _held.add(self)

    def release(self) -> None:
        """Give the folder free; a second call does nothing."""
        if self in _held:
            _held.remove(self)
            os.close(self._fd)


def _close_in_child() -> None:
    # A lock lives as long as any process has its file open. A forked child that outlives a killed run must not hold it.
    while _held:
        os.close(_held.pop()._fd)


os.register_at_fork(after_in_child=_close_in_child)


def _described(holder: bytes) -> str:
    try:
        who = json.loads(holder)
        return f"process {who['pid']} on {who['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _cannot_lock(folder: Path, error: OSError) -> RunError:
    return RunError(
        f"run folder {folder} cannot be locked: {reason_of(error, folder)}",
        hint="mend permissions or free space there, or give a folder on a local disk with --out or run.out",
    )
