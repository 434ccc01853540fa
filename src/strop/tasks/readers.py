"""Rows from one file: JSON lines, JSON, CSV or Parquet, each bad row named by file and line or row index."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class FileRows:
    """The rows of one file or table, with the place of each for messages."""

    label: str
    """The path as the user gave it."""
    rows: list[Row]
    lines: list[int] | None = None
    """Line of each row, counted from 1; None where a format has no lines: then places are row indices from 0."""

    def where(self, index: int) -> str:
        """Return the place of a row, e.g. `train.jsonl:17` or `train.parquet, row 16`."""
        return f"{self.label}:{self.lines[index]}" if self.lines else f"{self.label}, row {index}"


def read_file(path: Path) -> FileRows:
    """Read all rows of a file whose suffix is one of `READERS`.

    Raises DataError, naming file and place, if it cannot be read, decoded or parsed, if a row is no object, or if a
    text in it cannot be stored as UTF-8 (lone surrogates) or holds a NUL character.
    """
    try:
        found = READERS[path.suffix.lower()](path)
    except OSError as e:
        raise DataError(
            f"`{path}` cannot be read: {e.strerror or e}", hint="check task.path and its permissions"
        ) from e
    check_texts(found)
    return found


def check_texts(found: FileRows) -> None:
    """Raise DataError if any text in a row, however deep, holds a lone surrogate or a NUL character."""
    for index, row in enumerate(found.rows):
        for column, value in row.items():
            problem = _bad_text(column) or _bad_text(value)
            if problem:
                raise DataError(
                    f"{found.where(index)}: column {column!r} holds {problem}",
                    hint="clean the row; text has to be valid Unicode",
                )


def _bad_text(value: Any) -> str:
    if isinstance(value, str):
        if "\0" in value:
            return "a NUL character"
        if value.isascii():
            return ""
        try:
            value.encode()
        except UnicodeEncodeError as e:
            return f"half of a surrogate pair (U+{ord(value[e.start]):04X})"
    elif isinstance(value, dict):
        return next((p for pair in value.items() for p in map(_bad_text, pair) if p), "")
    elif isinstance(value, list):
        return next((p for p in map(_bad_text, value) if p), "")
    return ""


def _decode(data: bytes, label: str, first_line: int = 1) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        line = first_line + data.count(b"\n", 0, e.start)
        raise DataError(
            f"{label}:{line}: byte 0x{data[e.start]:02x} is not UTF-8 text ({e.reason})", hint="save the file as UTF-8"
        ) from e


def _content(path: Path) -> bytes:
    return path.read_bytes().removeprefix(b"\xef\xbb\xbf")


class _BadJson(ValueError):
    """What is wrong with a JSON text, with the line in that text."""

    def __init__(self, reason: str, line: int = 1) -> None:
        super().__init__(reason)
        self.reason, self.line = reason, line


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as e:
        raise _BadJson(f"not valid JSON ({e.msg} at column {e.colno})", e.lineno) from e
    except RecursionError as e:
        raise _BadJson("nested too deeply") from e
    except _BadJson:
        raise
    except ValueError as e:  # a whole number with more digits than Python converts
        raise _BadJson(str(e)) from e


def _unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _BadJson(f"the key {twice!r} stands twice in one object")
    return row


def _need_object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: the row is a {type(value).__name__}, an object with columns is needed",
            hint='a row looks like {"question": "2+2?", "answer": "4"}',
        )
    return value


def _read_jsonl(path: Path) -> FileRows:
    data = _content(path)
    rows: list[Row] = []
    numbers: list[int] = []
    parts = data.split(b"\n")
    for number, part in enumerate(parts, 1):
        text = _decode(part.rstrip(b"\r"), str(path), number)
        if not text.strip():
            continue
        try:
            value = _parse_json(text)
        except _BadJson as e:
            cut = "; the file ends here without a line break, so it may be cut off" if number == len(parts) else ""
            raise DataError(f"{path}:{number}: {e.reason}{cut}", hint="each line has to be one JSON object") from e
        rows.append(_need_object(value, f"{path}:{number}"))
        numbers.append(number)
    return FileRows(str(path), rows, numbers)


def _read_json(path: Path) -> FileRows:
    """A list of objects, or (as many tools write it under this suffix) one object per line."""
    data = _content(path)
    if not data.lstrip().startswith(b"["):
        return _read_jsonl(path)
    try:
        values = _parse_json(_decode(data, str(path)))
    except _BadJson as e:
        raise DataError(f"{path}:{e.line}: {e.reason}", hint="the file has to be a list of objects") from e
    return FileRows(str(path), [_need_object(value, f"{path}, row {i}") for i, value in enumerate(values)])


def _read_csv(path: Path) -> FileRows:
    """The first line names the columns; all values are text. A column without a name (a saved index) is left out."""
    reader = csv.reader(io.StringIO(_decode(_content(path), str(path)), newline=""), strict=True)
    rows: list[Row] = []
    numbers: list[int] = []
    header: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            start, line = line, reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = _check_header(fields, f"{path}:{start}")
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{path}:{start}: {len(fields)} fields, the header has {len(header)}",
                    hint="put fields with commas or line breaks in double quotes",
                )
            rows.append({column: value for column, value in zip(header, fields, strict=True) if column})
            numbers.append(start)
    except csv.Error as e:
        raise DataError(f"{path}:{line}: not valid CSV ({e})", hint="check the quotes of this record") from e
    return FileRows(str(path), rows, numbers)


def _check_header(fields: list[str], where: str) -> list[str]:
    for column in fields:
        if column and fields.count(column) > 1:
            raise DataError(f"{where}: the column {column!r} stands twice in the header", hint="rename one of them")
    return fields


def _read_parquet(path: Path) -> FileRows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
        rows = table.to_pylist()
    except pa.ArrowException as e:
        raise DataError(
            f"`{path}` is not a Parquet file that can be read: {e}", hint="check that it was copied whole"
        ) from e
    except UnicodeDecodeError as e:
        raise DataError(f"`{path}` holds text that is not UTF-8: {e.reason}", hint="write its columns as UTF-8") from e
    twice = next((name for name in table.column_names if table.column_names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"`{path}`: the column {twice!r} stands twice", hint="rename one of them")
    return FileRows(str(path), rows)


READERS: Mapping[str, Callable[[Path], FileRows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""How files are read, by suffix."""


def is_missing(value: Any) -> bool:
    """Whether a value is what tables put where there is none: None, NaN, or blank text."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    )
