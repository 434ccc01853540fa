"""The tests of a row of code problems, each split into what goes into the sandbox and what is compared outside."""

from __future__ import annotations

import ast
import builtins
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from .sandbox import Report

_COLLECTIONS: dict[str, Callable[[Any], Any]] = {"set": set, "frozenset": frozenset, "tuple": tuple, "list": list}


@dataclass(frozen=True, slots=True)
class ProgramTest:
    """One test."""

    message: Mapping[str, Any]
    """What the sandbox is told: never the expected value."""
    passes: Callable[[Report], bool]
    """Whether the report of a program that ran to its end is what was expected."""


class _Opaque:
    """Stands for a value that is no plain data; equal to nothing."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return False


def tests_of_row(row: Mapping[str, Any]) -> list[ProgramTest] | str:
    """Return the tests of a row by its columns, or why there are none that can be run."""
    try:
        found = _read(row)
    except (ValueError, TypeError, KeyError, SyntaxError, MemoryError, RecursionError) as e:
        return f"the tests are not understood: {type(e).__name__}: {e}"[:200]
    if not found:
        return "the row has no tests"
    return found


def _read(row: Mapping[str, Any]) -> list[ProgramTest]:
    row = {name: _plain(value) for name, value in row.items()}
    if row.get("test_list"):
        setup = "\n".join([*_lines(row.get("test_imports")), *_lines(row.get("test_setup_code"))])
        return [_assertion(str(text), setup) for text in row["test_list"]]
    if row.get("tests"):
        tests = _from_json(row["tests"])
        if isinstance(tests, Mapping):
            return _columns(cast("Mapping[str, Any]", tests))
        return [_assertion(t, "") if isinstance(t, str) else _listed(t) for t in tests]
    if row.get("input_output"):
        return _columns(_from_json(row["input_output"]))
    return _columns(row)


def _columns(row: Mapping[str, Any]) -> list[ProgramTest]:
    inputs, outputs = row.get("inputs") or [], row.get("outputs") or []
    inputs, outputs = _from_json(inputs), _from_json(outputs)
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs")
    name = row.get("fn_name")
    if not name:
        return [_printed(given, wanted) for given, wanted in zip(inputs, outputs, strict=True)]
    return [_called(str(name), given, wanted) for given, wanted in zip(inputs, outputs, strict=True)]


def _listed(test: Mapping[str, Any]) -> ProgramTest:
    wanted = test["output"] if "output" in test else test["expected"]
    if "fn_name" in test:
        return _called(str(test["fn_name"]), test["args"] if "args" in test else test["input"], wanted, boxed=False)
    return _printed(test["input"], wanted)


def _printed(given: Any, wanted: Any) -> ProgramTest:
    expected = _trimmed(_text(wanted))
    return ProgramTest({"stdin": _text(given)}, lambda report: _trimmed(report.stdout) == expected)


def _called(name: str, args: Any, wanted: Any, *, boxed: bool = True) -> ProgramTest:
    """Test a function that is called with `args` as JSON. APPS may wrap the value in a list of one (`boxed`)."""
    args = _from_json(args)
    if not isinstance(args, list):
        raise ValueError("the arguments of a call are no list")
    if not name.isidentifier():
        raise ValueError(f"`{name}` is no name of a function")
    accepted = [wanted, *(wanted if boxed and isinstance(wanted, list) and len(wanted) == 1 else [])]

    def passes(report: Report) -> bool:
        value = _as_json(decode(report.value))
        return any(_same(value, one) for one in accepted)

    return ProgramTest({"function": name, "args": args}, passes)


def _assertion(text: str, setup: str) -> ProgramTest:
    """Split `assert call == literal` and its like into the call and what it has to give. Raises ValueError."""
    tree = ast.parse(text.strip())
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.Assert):
        raise ValueError(f"`{text.strip()[:60]}` is not one assertion")
    call, passes = _split(tree.body[0].test)
    if any(isinstance(node, ast.Compare) for node in ast.walk(call)):
        raise ValueError(f"`{text.strip()[:60]}` compares inside the call")
    return ProgramTest({"call": ast.unparse(call), "setup": setup}, lambda report: passes(decode(report.value)))


def _split(test: ast.expr) -> tuple[ast.expr, Callable[[Any], bool]]:
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not) and _calls(test.operand):
        return test.operand, lambda value: not isinstance(value, _Opaque) and not value
    if isinstance(test, ast.Call) and ast.unparse(test.func) in ("math.isclose", "isclose"):
        return _close(test)
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        sides, operator = (test.left, test.comparators[0]), test.ops[0]
        calls = [side for side in sides if _calls(side)]
        if len(calls) == 1:
            expected = literal(sides[1] if calls[0] is sides[0] else sides[0])
            if isinstance(operator, ast.Eq):
                return calls[0], lambda value: _same(value, expected)
            if isinstance(operator, ast.Is) and (expected is None or isinstance(expected, bool)):
                return calls[0], lambda value: value is expected
            if isinstance(operator, ast.In) and isinstance(expected, list | tuple | set):
                return calls[0], lambda value: any(_same(value, one) for one in expected)
            if isinstance(operator, ast.NotEq):
                return calls[0], lambda value: not isinstance(value, _Opaque) and not _same(value, expected)
    elif isinstance(test, ast.Call) and _calls(test):
        return test, lambda value: not isinstance(value, _Opaque) and bool(value)
    raise ValueError(f"`{ast.unparse(test)[:60]}` does not compare one call with one literal")


def _close(test: ast.Call) -> tuple[ast.expr, Callable[[Any], bool]]:
    options = {keyword.arg: literal(keyword.value) for keyword in test.keywords}
    if len(test.args) != 2 or not set(options) <= {"rel_tol", "abs_tol"} or not _calls(test.args[0]):
        raise ValueError(f"`{ast.unparse(test)[:60]}` is not isclose(call, literal)")
    expected = literal(test.args[1])

    def passes(value: Any) -> bool:
        return isinstance(value, int | float) and math.isclose(value, expected, **cast("dict[str, float]", options))

    return test.args[0], passes


def _calls(node: ast.expr) -> bool:
    """Whether an expression calls something that Python itself does not bring."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call):
            name = inner.func.id if isinstance(inner.func, ast.Name) else ""
            if not hasattr(builtins, name):
                return True
    return False


def literal(node: ast.expr) -> Any:
    """Return the value of a literal, or of `set(...)` and its like around one. Raises ValueError for anything else."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        make = _COLLECTIONS.get(node.func.id)
        if make is not None and len(node.args) <= 1:
            return make(literal(node.args[0])) if node.args else make(())
    return ast.literal_eval(node)


def decode(value: Any) -> Any:
    """Return the Python value that `jail/run.py` encoded; `_Opaque` for anything that is no plain data."""
    try:
        return _decode(value)
    except (ValueError, TypeError, RecursionError):
        return _Opaque()


def _decode(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, list):
        return [_decode(item) for item in cast("list[Any]", value)]
    if not isinstance(value, dict) or len(cast("dict[str, Any]", value)) != 1:
        return _Opaque()
    ((kind, content),) = cast("dict[str, Any]", value).items()
    if kind == "float":
        return float.fromhex(content)
    if kind == "complex":
        return complex(*(float.fromhex(part) for part in content))
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "dict":
        return {_decode(k): _decode(v) for k, v in content}
    if kind in ("tuple", "set"):
        return (tuple if kind == "tuple" else set)(_decode(item) for item in content)
    return _Opaque()


def _same(value: Any, expected: Any) -> bool:
    try:
        return bool(value == expected)
    except RecursionError:
        return False


def _as_json(value: Any) -> Any:
    """Return a value as JSON would have it: tuples are lists, keys are text."""
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in cast("Sequence[Any]", value)]
    if isinstance(value, dict):
        return {
            k if isinstance(k, str) else json.dumps(k): _as_json(v) for k, v in cast("dict[Any, Any]", value).items()
        }
    return value


def _trimmed(text: str) -> str:
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    return "\n".join(lines).rstrip("\n")


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "\n".join(_text(item) for item in cast("Sequence[Any]", value))
    return value if isinstance(value, str) else json.dumps(value)


def _lines(value: Any) -> list[str]:
    if not value:
        return []
    return [str(item) for item in cast("Sequence[Any]", value)] if isinstance(value, list) else [str(value)]


def _from_json(value: Any) -> Any:
    return _plain(json.loads(value)) if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    """Arrays, as Parquet has them, as lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(item) for item in cast("Sequence[Any]", value)] if isinstance(value, list | tuple) else value
