"""The messages between the pool, the process that starts its workers, and a worker: a 4-byte length and a body.

Towards a worker a body is a few numbers and the pickled completions, since rows hold dates, bytes and arrays. Back it
is JSON, or for the common reports a run of fixed records: a process that ran reward functions is never unpickled from.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

from .call import Logged, RunFacts
from .combine import Outcome
from .load import FunctionSpec

_LENGTH = struct.Struct(">I")
LENGTH_BYTES = _LENGTH.size
length_at = _LENGTH.unpack_from
"""(length,) of the message that begins at an offset of a buffer."""
_HEAD, _FRAMED_HEAD = struct.Struct(">QHI"), struct.Struct(">IQHI")
_VERDICTS: tuple[bool | None, ...] = (False, True, None)
_NO_VERDICT = 3
_RECORD = struct.Struct(">QHBdd")
RECORD_BYTES = _RECORD.size
_RECORDS = 1
"""First byte of a run of records; JSON never starts with it."""
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
    job: int, functions: Sequence[int], correct: Sequence[bool | None] | None, bodies: Sequence[bytes]
) -> bytes:
    """Return the framed message."""
    lengths = [len(body) for body in bodies]
    verdicts = [_NO_VERDICT] * len(bodies) if correct is None else [_VERDICTS.index(right) for right in correct]
    numbers = _numbers(len(functions), len(bodies))
    total = _HEAD.size + numbers.size + sum(lengths)
    head = _FRAMED_HEAD.pack(total, job, len(functions), len(bodies))
    return b"".join((head, numbers.pack(*functions, *lengths, *verdicts), *bodies))


def decode_work(body: memoryview) -> Work:
    """Inverse of `encode_work`, without the frame; the bodies are views of it."""
    job, num_functions, num_bodies = _HEAD.unpack_from(body)
    numbers = _numbers(num_functions, num_bodies)
    values = numbers.unpack_from(body, _HEAD.size)
    end = _HEAD.size + numbers.size
    if num_bodies == 1 and values[-1] == _NO_VERDICT:
        return job, values[:num_functions], None, [body[end:]]
    lengths, verdicts = values[num_functions:-num_bodies], values[-num_bodies:]
    bodies: list[memoryview] = []
    for length in lengths:
        bodies.append(body[end : end + length])
        end += length
    correct = None if verdicts[0] == _NO_VERDICT else tuple(_VERDICTS[verdict] for verdict in verdicts)
    return job, values[:num_functions], correct, bodies


@lru_cache(maxsize=256)
def _numbers(num_functions: int, num_bodies: int) -> struct.Struct:
    return struct.Struct(f">{num_functions}H{num_bodies}I{num_bodies}B")


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

    def fits(self, count: int) -> bool:
        """Whether it says something of each of `count` completions."""
        return len(self.outcomes) == count and all(len(values) == count for values in self.extras.values())


Records = list[tuple[int, int, int, float, float]]
"""Common reports, of one completion and without failure or anything logged: job, function, whether it applies, value,
seconds."""


def encode_report(job: int, function: int, outcomes: Sequence[Outcome], seconds: float, logged: Logged) -> bytes:
    """Return a record if the report is a common one, else the framed message of a Report."""
    value, failure = outcomes[0]
    if len(outcomes) == 1 and not (failure or logged.extras or logged.metrics):
        return _RECORD.pack(job, function, value is not None, 0.0 if value is None else value, seconds)
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


def encode_records(records: Sequence[bytes]) -> bytes:
    """Return the framed message of records in a row."""
    return b"".join((_LENGTH.pack(1 + RECORD_BYTES * len(records)), bytes([_RECORDS]), *records))


Message = Report | Records | dict[str, Any]


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
    try:
        if length and buffer[start] == _RECORDS:
            return list(_RECORD.iter_unpack(bytes(buffer[start + 1 : start + length])))
        message = json.loads(bytes(buffer[start : start + length]))
        if not isinstance(message, dict):
            raise WireError("a message that is not a mapping")
        if "outcomes" not in message:
            return message
        message["outcomes"] = [Outcome(*outcome) for outcome in message["outcomes"]]
        message["metrics"] = [(name, value) for name, value in message["metrics"]]
        return Report(**message)
    except (ValueError, TypeError, KeyError, struct.error) as e:
        raise WireError("a message that is not one of ours") from e
