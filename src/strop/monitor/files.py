"""Files of a run folder: written aside, synced, renamed, so that a kill leaves the old file or the new one."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LEFTOVER = re.compile(r"\..+\.(partial|removed)-\d+")


def partial_path(path: Path) -> Path:
    """Return the hidden name beside `path` under which this process writes it; see `is_leftover`."""
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def removed_path(path: Path) -> Path:
    """Return the hidden name that `path` is renamed to before it is deleted; see `is_leftover`."""
    return path.with_name(f".{path.name}.removed-{os.getpid()}")


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is unfinished work of a process, worthless once that process is dead."""
    return _LEFTOVER.fullmatch(name) is not None


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file so that after a kill or a power cut it holds its former content or `data`, nothing between.

    Raises OSError; the former file is then untouched.
    """
    partial = partial_path(path)
    try:
        with partial.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names that were added to or renamed in `folder` durable. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as e:
        # Some network and FUSE file systems have no fsync for folders; there is nothing better to call on them.
        if e.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(fd)


def reason_of(error: OSError, folder: Path) -> str:
    """Return why a file in `folder` could not be written, in a user's words; for a full disk with what is free."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            reason += f", {shutil.disk_usage(folder).free:,} bytes are free"
    return reason


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return standard JSON on which any reader agrees: NaN and infinities, which JSON lacks, become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
