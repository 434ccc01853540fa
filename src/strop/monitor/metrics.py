"""`metrics.jsonl`: one JSON object per step, readable while the run goes on and equal after a resume."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import RunError
from .files import reason_of, to_json, write_atomically

_TIMED_PARTS = frozenset({"time", "memory", "step_time"})


class MetricsLog:
    """Appends rows to `metrics.jsonl`; each row is on disk when `write` returns."""

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        """Open the log. Rows of steps beyond `resume_step`, the last step that the checkpoint covers, and a torn last
        line are removed; None starts an empty log.

        Raises RunError when the file cannot be read or written.
        """
        self.path = path
        self.removed = 0
        """How many lines of an earlier process were removed: beyond the checkpoint, torn, or not readable."""
        try:
            self._drop_rows(resume_step)
            self._file = path.open("a", encoding="utf-8")
        except OSError as e:
            raise _cannot_write(path, e) from e

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append `{"step": step, ...values}` in the given order; values that are not finite become null.

        Raises RunError when the disk does not take the row.
        """
        row: dict[str, Any] = {"step": step}
        row.update((name, value) for name, value in values.items() if name != "step")
        try:
            self._file.write(to_json(row) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as e:
            raise _cannot_write(self.path, e) from e

    def close(self) -> None:
        """Close the file; no row is lost without it."""
        # After a failed write the buffer still holds the row that `write` has already reported.
        try:
            self._file.close()
        except OSError as e:
            raise _cannot_write(self.path, e) from e

    def __enter__(self) -> MetricsLog:
        """Return the log."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close the file."""
        self.close()

    def _drop_rows(self, resume_step: int | None) -> None:
        before = self.path.read_bytes() if self.path.exists() else b""
        kept = []
        for _, line, row in _lines(before):
            if resume_step is None or row is None or row["step"] > resume_step:
                self.removed += 1
            else:
                kept.append(line + b"\n")
        after = b"".join(kept)
        if after != before:
            write_atomically(self.path, after)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.jsonl`, also while a run is writing it: a torn last line is left out.

    A missing file has no rows. Raises RunError with the line number for any other line that is not a row.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as e:
        raise RunError(f"{path} cannot be read: {e.strerror}") from e
    rows = []
    torn = data.count(b"\n") + 1
    for number, line, row in _lines(data):
        if row is not None:
            rows.append(row)
        elif number != torn:
            raise RunError(
                f"{path}:{number} is not a row of metrics: {line[:60]!r}; a JSON object with `step` is needed",
                hint="remove the line, or resume the run, which removes it",
            )
    return rows


def deterministic_part(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without what differs between two equal runs: times, rates (`…_per_s`) and memory."""
    return {name: value for name, value in row.items() if not _is_timed(name)}


def _is_timed(name: str) -> bool:
    return name.endswith("_per_s") or not _TIMED_PARTS.isdisjoint(name.split("/"))


def _lines(data: bytes) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """Yield (line number, line, its row or None where it is not one) for every line that is not blank."""
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        is_row = isinstance(row, dict) and type(row.get("step")) is int
        yield number, line, row if is_row else None


def _cannot_write(path: Path, error: OSError) -> RunError:
    return RunError(
        f"{path} cannot be written: {reason_of(error, path.parent)}",
        hint="free space or mend permissions there, then go on with --resume",
    )
