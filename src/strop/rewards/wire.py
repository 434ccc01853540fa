"""The messages between the pool, the process that starts its workers, and a worker: a 4-byte length and a body.

Towards a worker a body is pickle, since rows hold dates, bytes and arrays. Back it is JSON, or for the common report a
fixed record of numbers: a process that ran reward functions is never unpickled from.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from .call import Logged, RunFacts
from .combine import Outcome
from .load import FunctionSpec

_LENGTH = struct.Struct(">I")
LENGTH_BYTES = _LENGTH.size
_PLAIN, _HEADED = struct.Struct(">BQHdd"), struct.Struct(">IBQHdd")
_VALUE, _NOTHING = 1, 2
MAX_FRAME_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Setup:
    """What a process that is to run reward functions has to know first."""

    specs: tuple[FunctionSpec, ...]
    sys_path: tuple[str, ...]
    """Folders from which the trainer imports; those that are missing here are added at the end."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """Parameters by the function's name."""
    facts: RunFacts = field(default_factory=RunFacts)
    memory_bytes: int = 4 << 30
    """Address space of a worker beyond what it has when the functions are loaded."""


Work = tuple[int, tuple[int, ...], tuple[bool | None, ...] | None, list[memoryview]]
"""The job's number; the functions that are to score it, in order; for functions of group scope which completions are
right; the pickled fields of its Completions, one or those of a group. Every function gets fresh copies."""


def encode_work(
    job: int, functions: tuple[int, ...], correct: tuple[bool | None, ...] | None, bodies: list[bytes]
) -> list[bytes]:
    """Return the pieces of the framed message; the completions are not copied."""
    lengths = [len(body) for body in bodies]
    head = pickle.dumps((job, functions, correct, lengths), 5)
    total = _LENGTH.size + len(head) + sum(lengths)
    return [_LENGTH.pack(total) + _LENGTH.pack(len(head)) + head, *bodies]


def decode_work(body: memoryview) -> Work:
    """Inverse of `encode_work`, without the frame."""
    (end,) = _LENGTH.unpack_from(body)
    end += _LENGTH.size
    job, functions, correct, lengths = pickle.loads(body[_LENGTH.size : end])
    bodies: list[memoryview] = []
    for length in lengths:
        bodies.append(body[end : end + length])
        end += length
    return job, functions, correct, bodies


@dataclass(slots=True)
class Report:
    """What one function said of one job."""

    job: int
    function: int
    outcomes: list[Outcome]
    """One per completion of the job."""
    seconds: float
    extras: Mapping[str, list[Any]] = field(default_factory=dict[str, list[Any]])
    metrics: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])
    by_machine: bool = False
    """Whether it failed for want of memory, disk or processes, so that another time it might not."""


def encode_report(job: int, function: int, outcomes: list[Outcome], seconds: float, logged: Logged) -> bytes:
    """Return the framed message of a Report; that of one value is a record of numbers."""
    first = outcomes[0]
    if len(outcomes) == 1 and not (first.failure or logged.extras or logged.metrics):
        value = first.value
        if value is None:
            return _HEADED.pack(_PLAIN.size, _NOTHING, job, function, 0.0, seconds)
        return _HEADED.pack(_PLAIN.size, _VALUE, job, function, value, seconds)
    return encode_message(
        {
            "job": job,
            "function": function,
            "outcomes": [(outcome.value, outcome.failure) for outcome in outcomes],
            "seconds": seconds,
            "extras": {column: jsonable(values) for column, values in logged.extras.items()},
            "metrics": logged.metrics,
            "by_machine": logged.by_machine,
        }
    )


Message = Report | dict[str, Any]


class WireError(ValueError):
    """Bytes that no process of ours would send."""


def frame(body: bytes) -> bytes:
    """Return a body with its length before it."""
    return _LENGTH.pack(len(body)) + body


class Stream(Protocol):
    """What bytes are read from, as many as were asked for unless it ends."""

    def read(self, count: int, /) -> bytes:
        """Return that many bytes, fewer at the end."""
        ...


def read_frame(stream: Stream) -> bytes | None:
    """Return the next body of a blocking stream; None at its end."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    body = stream.read(length)
    return body if len(body) == length else None


def encode_message(message: Mapping[str, Any]) -> bytes:
    """Return a framed JSON message."""
    return frame(json.dumps(message, separators=(",", ":")).encode())


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


class MessageReader:
    """Collects the bytes of one process and yields its complete messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Add bytes and yield every message that is complete. Raises WireError for anything that is not one."""
        self._buffer += data
        start, end = 0, len(self._buffer)
        try:
            while end - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._buffer, start)
                if length > MAX_FRAME_BYTES:
                    raise WireError(f"a message of {length} bytes")
                body = start + _LENGTH.size
                if end < body + length:
                    return
                message = _decoded(self._buffer, body, length)
                start = body + length
                yield message
        finally:
            del self._buffer[:start]


def _decoded(buffer: bytearray, start: int, length: int) -> Message:
    if length == _PLAIN.size and buffer[start] in (_VALUE, _NOTHING):
        tag, job, function, value, seconds = _PLAIN.unpack_from(buffer, start)
        return Report(job, function, [Outcome(value if tag == _VALUE else None)], seconds)
    try:
        message = json.loads(bytes(buffer[start : start + length]))
        if not isinstance(message, dict):
            raise WireError("a message that is not a mapping")
        if "outcomes" not in message:
            return message
        message["outcomes"] = [Outcome(*outcome) for outcome in message["outcomes"]]
        message["metrics"] = [(name, value) for name, value in message["metrics"]]
        return Report(**message)
    except (ValueError, TypeError, KeyError) as e:
        raise WireError("a message that is not one of ours") from e
