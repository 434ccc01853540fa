"""What a worker may take of the machine, and how processes are found and tied to each other (Linux)."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

FILE_BYTES = 1 << 30
"""Size of a file that a reward function may write."""
MAX_PROCESSES = 64
"""Processes that one worker may have started and not yet ended."""
OOM_PREFERENCE = 500
"""Added to a worker's badness: when memory runs out the kernel takes a worker, not the trainer."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def limit_worker(memory_bytes: int) -> None:
    """Cap this process and, each for itself, the processes that it starts.

    Address space: what it has now plus `memory_bytes`; past it an allocation fails (MemoryError). It counts what is
    mapped and not what is touched: arrays, objects, mapped files, 8 MiB for every thread. A file may grow to FILE_BYTES
    (OSError past it); no core dump is written. The number of processes is not capped here: RLIMIT_NPROC counts all
    processes of a user and none of root's, so the server counts them instead.
    """
    import resource

    def cap(limit: int, value: int) -> None:
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))

    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        cap(resource.RLIMIT_AS, pages * os.sysconf("SC_PAGE_SIZE") + memory_bytes)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(str(OOM_PREFERENCE))
    cap(resource.RLIMIT_FSIZE, FILE_BYTES)
    cap(resource.RLIMIT_CORE, 0)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send a signal to this process when the thread that started it ends (Linux)."""
    _prctl(_PR_SET_PDEATHSIG, number)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that none is lost sight of (Linux)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value)


def num_threads() -> int:
    """Threads of this process, those of C libraries included; 0 where that is not known."""
    with contextlib.suppress(OSError):
        return len(os.listdir("/proc/self/task"))
    return 0


def children_of(pid: int) -> list[int]:
    """Return the children of a process, zombies included; nothing if it is gone or the kernel does not tell."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
    return found


def kernel_lists_children() -> bool:
    """Whether `children_of` can know."""
    return os.path.exists(f"/proc/self/task/{os.getpid()}/children")


def descendants_of(pid: int, at_most: int = 10_000) -> list[int]:
    """Return the processes below one, parents first, and stop looking after `at_most`."""
    found, look = [], [pid]
    while look and len(found) < at_most:
        below = children_of(look.pop())
        found += below
        look += below
    return found


def kill_group(pid: int) -> None:
    """Kill a process group at once; no member can fork its way out of it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def kill_each(pids: list[int]) -> None:
    """Kill processes one by one."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def how_it_ended(status: int) -> str:
    """Return a wait status in words."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-code).name}"
    return f"signal {-code}"
