"""The `json_schema` reward: an answer in JSON that a schema describes, with budgets before anything is parsed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..errors import RewardError
from .answers import Written, written
from .contract import reward
from .pattern import PATTERN_TAIL, compile_pattern

MAX_JSON_CHARS = 20_000
MAX_JSON_DEPTH = 32
MAX_JSON_VALUES = 1_000
MAX_JSON_DIGITS = 64
MAX_SCHEMA_CHARS = 50_000
MAX_SCHEMA_SIZE = 2_000
"""Nodes of a schema with every reference written out."""
MAX_SCHEMA_DEPTH = 32

_FENCE = re.compile(r"```(?:json|JSON)?[ \t]*\n(.*?)\n[ \t]*```", re.DOTALL)
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[\]{},]', re.DOTALL)
_FOREIGN = ("$dynamicRef", "$recursiveRef", "$dynamicAnchor", "$recursiveAnchor", "$anchor", "$id", "id")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose value maps names to schemas."""
_LITERALS = ("const", "enum", "default", "examples", "required", "dependentRequired")
_SETTING = "rewards.options.json_schema.schema"


@reward(kind="correctness", version="1")
def json_schema(
    completions: Sequence[Any],
    json_schema: Sequence[Any] | None = None,
    prefill: Sequence[str] | None = None,
    truncated: Sequence[bool] | None = None,
    *,
    schema: Mapping[str, Any] | bool | str | None = None,
    **_: Any,
) -> list[float | None]:
    """1.0 where the answer is one JSON value that fits the schema, else 0.0; None where the row has no schema.

    The schema is the column `json_schema` (a mapping or JSON text), else the option `schema`; a right answer of one row
    alone is written with `const`. The value is the content of the only fenced block, else all of what follows the
    thinking part; of a truncated completion only the former. Refused are more than 20,000 characters, 1,000 values, 32
    levels or 64 digits, a key that occurs twice, NaN and infinity. Schemas refer to their own definitions only, not in
    circles. Raises RewardError for a schema that is none or breaks these rules, or without any.
    """
    if json_schema is None and schema is None:
        raise RewardError(
            "reward `json_schema` has no schema: the rows have no column `json_schema`, and no option is set",
            hint=f"set {_SETTING}, or add a column `json_schema` to the data set",
        )
    if schema is not None:
        _checked(schema)
    given = json_schema if json_schema is not None else [None] * len(completions)
    return [
        _json_schema(sample, schema if own is None else own)
        for sample, own in zip(written(completions, prefill, truncated), given, strict=True)
    ]


def preload_jsonschema() -> None:
    """Import jsonschema. Raises RewardError if it is not installed."""
    try:
        import jsonschema
    except ImportError as e:
        raise RewardError(
            f"reward `json_schema` needs jsonschema, which cannot be imported: {e}", hint="pip install jsonschema"
        ) from e
    del jsonschema


def _json_schema(sample: Written, schema: Any) -> float | None:
    if schema is None:
        return None
    validator, has_patterns = _checked(schema)
    part = sample.part
    source = None if part is None else _json_text(part, sample.truncated)
    if source is None:
        return 0.0
    try:
        value = _read(source)
    except ValueError:
        return 0.0
    if has_patterns and any(len(text) > PATTERN_TAIL for text in _texts(value)):
        return 0.0
    return float(validator.is_valid(value))


def _json_text(part: str, truncated: bool) -> str | None:
    if len(part) > MAX_JSON_CHARS:
        return None
    if part.count("```") == 2 and (fenced := _FENCE.search(part)):
        return fenced[1]
    return None if truncated or "```" in part else part.strip()


def _read(source: str) -> Any:
    """Parse JSON within the budgets. Raises ValueError for anything beyond them."""
    depth = deepest = values = 0
    for token in _STRING_OR_BRACKET.findall(source):
        depth += (token in "[{") - (token in "]}")
        deepest = max(deepest, depth)
        values += token in ",[{"
    if deepest > MAX_JSON_DEPTH or values > MAX_JSON_VALUES:
        raise ValueError("too large")
    return json.loads(
        source, object_pairs_hook=_unique, parse_int=_integer, parse_float=_float, parse_constant=_no_constant
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > MAX_JSON_DIGITS:
        raise ValueError("too many digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if len(digits) > MAX_JSON_DIGITS or not math.isfinite(value):
        raise ValueError("no number of JSON")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _texts(value: Any) -> Iterator[str]:
    """Yield every text within a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _checked(schema: Any) -> tuple[Any, bool]:
    return _validator(schema if isinstance(schema, str) else _as_text(schema))


def _as_text(schema: Any) -> str:
    try:
        return json.dumps(schema, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as e:
        raise _refusal(f"it cannot be written as JSON: {e}") from e


@lru_cache(maxsize=1024)
def _validator(text: str) -> tuple[Any, bool]:
    """Return a validator and whether its schema holds regular expressions."""
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for

    if len(text) > MAX_SCHEMA_CHARS:
        raise _refusal(f"it has {len(text)} characters, at most {MAX_SCHEMA_CHARS}")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise _refusal(f"it is not JSON: {e}") from e
    if not isinstance(schema, Mapping | bool):
        raise _refusal(f"it is a {type(schema).__name__}; an object is needed")
    kind: Any = validator_for(schema, default=Draft202012Validator)
    patterns: list[str] = []
    if _size(schema, schema, (), 0, patterns) > MAX_SCHEMA_SIZE:
        raise _refusal(f"it has more than {MAX_SCHEMA_SIZE} parts with every reference written out")
    for pattern in patterns:
        compile_pattern(pattern, option=_SETTING)
    try:
        kind.check_schema(schema)
    except SchemaError as e:
        raise _refusal(f"{e.message} (at {e.json_path})") from e
    return kind(schema), bool(patterns)


def _size(node: Any, root: Any, path: tuple[str, ...], depth: int, patterns: list[str]) -> int:
    """Return the number of parts of a schema with references written out, and collect its regular expressions.

    `path` holds the references that are open. Raises RewardError for a reference that is foreign or circular.
    """
    if depth > MAX_SCHEMA_DEPTH:
        raise _refusal(f"it has more than {MAX_SCHEMA_DEPTH} levels")
    if not isinstance(node, Mapping):
        return 1
    for name in _FOREIGN:
        if name in node:
            raise _refusal(f"it uses `{name}`; only `$ref` to its own definitions is understood")
    if isinstance(pattern := node.get("pattern"), str):
        patterns.append(pattern)
    below: list[Any] = []
    for keyword, value in node.items():
        if keyword in _MAPS and isinstance(value, Mapping):
            below.extend(value.values())
            patterns.extend(value if keyword == "patternProperties" else ())
        elif keyword not in _LITERALS:
            below.extend(value if isinstance(value, list) else [value])
    size = 1
    target = node.get("$ref")
    if isinstance(target, str):
        if target in path:
            raise _refusal(f"its reference `{target}` leads back to itself")
        size += _size(_resolve(root, target), root, (*path, target), depth + 1, patterns)
    for part in below:
        size += _size(part, root, path, depth + 1, patterns)
        if size > MAX_SCHEMA_SIZE:
            break
    return size


def _resolve(root: Any, target: str) -> Any:
    if not target.startswith("#/") or "%" in target or "~" in target:
        raise _refusal(f"its reference `{target}` does not lead to a definition of its own, such as `#/$defs/name`")
    node = root
    for name in target[2:].split("/"):
        if not isinstance(node, Mapping) or name not in node:
            raise _refusal(f"its reference `{target}` leads nowhere")
        node = node[name]
    return node


def _refusal(problem: str) -> RewardError:
    return RewardError(
        f"reward `json_schema` cannot use a schema: {problem}",
        hint=f"correct {_SETTING}, or the column `json_schema` of the data set",
    )
