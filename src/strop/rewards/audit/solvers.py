"""Right and wrong answers for rows that do not hold any as text: countdown, code with tests, JSON with a schema."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import permutations, product
from typing import Any

from ...types import Problem

MAX_SOLVED_NUMBERS = 5
"""Countdown problems with more numbers are not solved by search."""
TEST_COLUMNS = ("tests", "test_list", "inputs", "input_output")
PROGRAM_COLUMNS = ("solution", "code", "canonical_solution", "solutions")
WRONG_PROGRAM = "raise SystemExit"
MAX_SCHEMA_DEPTH = 8


def countdown_row(row: Mapping[str, Any]) -> tuple[list[int], int | None]:
    """Return numbers and target of a countdown row, or ([], None)."""
    pool = row.get("numbers", row.get("nums"))
    listed = pool.tolist() if hasattr(pool, "tolist") else pool
    target = row.get("target")
    if not isinstance(listed, list | tuple) or isinstance(target, bool):
        return [], None
    try:
        return [int(n) for n in listed], int(target)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return [], None


_STEPS: Mapping[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
}  # fmt: skip


def solve(numbers: Sequence[int], target: int) -> str | None:
    """Return an expression with + - * / that uses each number once and equals the target; None if none is found."""
    if len(numbers) > MAX_SOLVED_NUMBERS:
        return None
    found = _search([(Fraction(n), str(n)) for n in numbers], Fraction(target))
    return None if found is None else found.removeprefix("(").removesuffix(")") if len(numbers) > 1 else found


def _search(terms: list[tuple[Fraction, str]], target: Fraction) -> str | None:
    if len(terms) == 1:
        return terms[0][1] if terms[0][0] == target else None
    for i, j in permutations(range(len(terms)), 2):
        (a, left), (b, right) = terms[i], terms[j]
        rest = [term for k, term in enumerate(terms) if k not in (i, j)]
        for sign, step in _STEPS.items():
            if (sign in "+*" and i > j) or (sign == "/" and not b):
                continue
            found = _search([*rest, (step(a, b), f"({left} {sign} {right})")], target)
            if found is not None:
                return found
    return None


def wrong_expression(numbers: Sequence[int], target: int) -> str:
    """Return an expression that obeys the rules of countdown and misses the target."""
    for signs in product("+*-", repeat=len(numbers) - 1):
        value, text = Fraction(numbers[0]), str(numbers[0])
        for sign, number in zip(signs, numbers[1:], strict=True):
            value, text = _STEPS[sign](value, Fraction(number)), f"({text} {sign} {number})"
        if value != target:
            return text.removeprefix("(").removesuffix(")") if len(numbers) > 1 else text
    return f"{numbers[0]} + 1"


FORBIDDEN: Sequence[tuple[tuple[int, ...], int, str]] = (
    ((2, 5, 1), 33, "2**5+1"), ((5, 0, 7), 8, "5**0+7"), ((7, 3, 20), 22, "7//3+20"), ((2, 5), 4, "2/.5"),
    ((17, 9), 17, "17.000009"), ((1, 2, 30), 42, "12+30"),
)  # fmt: skip
"""(numbers, target, expression that reaches it by what countdown does not allow, and by nothing that it does allow)."""


def with_numbers(problem: Problem, numbers: Sequence[int], target: int) -> Problem:
    """Return a countdown problem with other numbers; the rest of its row stays."""
    pool = "numbers" if "numbers" in problem.row else "nums"
    row = {**problem.row, pool: list(numbers), "target": target}
    return replace(problem, id=f"{problem.id} with {list(numbers)} and {target}", row=row)


def program_of(row: Mapping[str, Any]) -> str | None:
    """Return the program that a row of code problems holds beside its tests; None for any other row."""
    if not any(row.get(name) is not None for name in TEST_COLUMNS):
        return None
    for name in PROGRAM_COLUMNS:
        value: Any = row.get(name)
        if hasattr(value, "tolist"):
            value = value.tolist()
        text = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(text, str) and text.strip():
            return text.strip()
    return None


def schema_of(row: Mapping[str, Any], option: Any) -> Any:
    """Return the JSON schema of a row, else that of the option; None without one."""
    found = row.get("json_schema")
    found = option if found is None else found
    if not isinstance(found, str):
        return found
    try:
        return json.loads(found)
    except ValueError:
        return None


def json_answers(schema: Any) -> tuple[str, str] | None:
    """Return as JSON a small value that a simple schema describes and one that it does not; None where unclear."""
    try:
        right = _example(schema, 0)
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    wrong: Any = "wrong" if isinstance(right, dict | list) else {"wrong": [right]}
    return json.dumps(right), json.dumps(wrong)


def _example(schema: Any, depth: int) -> Any:
    if not isinstance(schema, Mapping) or depth > MAX_SCHEMA_DEPTH:
        raise ValueError("not a schema of a known form")
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema["type"]
    kind = kind[0] if isinstance(kind, list) else kind
    if any(key in schema for key in ("$ref", "allOf", "anyOf", "oneOf", "not", "pattern", "format", "if")):
        raise ValueError("not a schema of a known form")
    match kind:
        case "object":
            return {name: _example(schema["properties"][name], depth + 1) for name in schema.get("required", ())}
        case "array":
            return [_example(schema["items"], depth + 1) for _ in range(schema.get("minItems", 0))]
        case "string":
            return "a" * max(1, schema.get("minLength", 1))
        case "integer" | "number":
            return max(schema.get("minimum", 1), schema.get("exclusiveMinimum", 0) + 1)
        case "boolean":
            return True
        case "null":
            return None
    raise ValueError(f"no type of JSON: {kind}")
