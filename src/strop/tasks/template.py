"""`task.template`: a prompt made of a row's columns."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from string import Formatter
from typing import Any

from ..errors import ConfigError, DataError
from .readers import is_missing


class PromptTemplate:
    """Text with `{column}` placeholders; `{{` and `}}` are braces, as in str.format.

    A placeholder is the name of a column and nothing else (a format such as `{price:.2f}` may follow), so that no
    attribute of a value can be reached. Raises ConfigError if the template cannot be read so, or names no column.
    """

    def __init__(self, template: str) -> None:
        try:
            self._parts = list(Formatter().parse(template))
        except ValueError as e:
            raise ConfigError(f"task.template: {e}", hint=r"write braces that are text twice, e.g. \boxed{{}}") from e
        for _, column, spec, _ in self._parts:
            if column is not None and (not column or column.isdigit()):
                raise ConfigError(
                    f"task.template: `{{{column}}}` names no column",
                    hint=r"write {question}, for example; braces that are text stand twice, e.g. \boxed{{}}",
                )
            if spec and "{" in spec:
                raise ConfigError(f"task.template: the format `{spec}` has braces", hint="write the format out")
        if all(column is None for _, column, _, _ in self._parts):
            raise ConfigError(
                f"task.template: {template!r} holds no placeholder, so every prompt would be the same",
                hint="write the name of a column in braces, e.g. {question}",
            )

    def fill(self, row: Mapping[str, Any]) -> str:
        """Return the text for a row. Raises DataError if a column is unknown, empty, or does not take the format."""
        return "".join(
            literal + ("" if column is None else self._field(row, column, spec or "", conversion))
            for literal, column, spec, conversion in self._parts
        )

    def _field(self, row: Mapping[str, Any], column: str, spec: str, conversion: str | None) -> str:
        if column not in row:
            near = difflib.get_close_matches(column, row, n=1)
            raise DataError(
                f"task.template names `{{{column}}}`; the columns are {', '.join(map(str, row)) or 'none'}",
                hint=(f"did you mean {{{near[0]}}}? " if near else "")
                + r"braces that are text stand twice, e.g. \boxed{{}}",
            )
        value = row[column]
        if is_missing(value):
            raise DataError(f"column `{column}` is empty ({value!r})", hint="remove the row, or change task.template")
        try:
            return format(Formatter().convert_field(value, conversion), spec)
        except (ValueError, TypeError) as e:
            raise DataError(
                f"column `{column}` is {value!r}, which does not take the format `{spec}`: {e}",
                hint="change task.template",
            ) from e
