"""The messages between the pool and a worker: frames of a 4-byte length and a body.

Towards a worker a body is pickle, since rows hold dates, bytes and arrays. Back it is JSON: a process that ran reward
functions is never unpickled from.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from .load import FunctionSpec

_LENGTH = struct.Struct(">I")
MAX_FRAME_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Setup:
    """The first message to a worker."""

    specs: tuple[FunctionSpec, ...]
    sys_path: tuple[str, ...]
    """Folders from which the trainer imports; those that are missing here are added at the end."""


@dataclass(frozen=True, slots=True)
class Work:
    """One completion and the functions that are to score it, in order."""

    job: int
    functions: tuple[int, ...]
    completion: bytes
    """A pickled Completion; every function gets a fresh copy, so none sees what another one changed."""


class WireError(ValueError):
    """Bytes that no worker of ours would send."""


def frame(body: bytes) -> bytes:
    """Return a body with its length before it."""
    return _LENGTH.pack(len(body)) + body


def read_frame(stream: BinaryIO) -> bytes | None:
    """Return the next body of a blocking stream; None at its end."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    body = stream.read(length)
    return body if len(body) == length else None


def encode_report(report: dict[str, Any]) -> bytes:
    """Return a framed JSON report."""
    return frame(json.dumps(report, separators=(",", ":")).encode())


def jsonable(value: Any) -> Any:
    """Return a value as JSON has it: arrays become lists, anything unknown becomes its text."""
    try:
        return json.loads(json.dumps(value, default=_plain))
    except (TypeError, ValueError, RecursionError):
        return str(value)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


class ReportReader:
    """Collects the bytes of one worker and yields its complete reports."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Add bytes and yield every report that is complete. Raises WireError for anything that is not one."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise WireError(f"a report of {length} bytes")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            try:
                report = json.loads(body)
            except ValueError as e:
                raise WireError("a report that is not JSON") from e
            if not isinstance(report, dict):
                raise WireError("a report that is not a mapping")
            yield report
