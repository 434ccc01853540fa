"""A page of memory that a worker shares with the pool: which call it is in, and since when.

Reports of quick calls are sent together, so the reports alone do not tell what a worker that hangs or dies was doing.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import time

_ENTRY = struct.Struct("<QHd")
_BUSY = _ENTRY.size
PAGE_BYTES = 64


def make_page() -> int:
    """Return a descriptor of a fresh page, which says that no call is running."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("strop-progress")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, PAGE_BYTES)
    return fd


class Progress:
    """Either side's view of the page. The worker writes it, the pool reads it."""

    def __init__(self, fd: int) -> None:
        """Map the page and close the descriptor."""
        self._page = mmap.mmap(fd, PAGE_BYTES)
        os.close(fd)

    def begin(self, job: int, function: int) -> float:
        """A call begins, with the reading of its arguments; return when, by time.monotonic()."""
        now = time.monotonic()
        _ENTRY.pack_into(self._page, 0, job, function, now)
        self._page[_BUSY] = 1
        return now

    def end(self) -> None:
        """It is over."""
        self._page[_BUSY] = 0

    @property
    def running(self) -> tuple[int, int, float] | None:
        """(job, function, time.monotonic() of its begin) of the call that runs; None where none does."""
        return _ENTRY.unpack_from(self._page) if self._page[_BUSY] else None

    def close(self) -> None:
        """Unmap the page."""
        self._page.close()
