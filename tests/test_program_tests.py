"""Honest programs: rows of tests in every form, what is compared, and that expected values stay outside."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from programs import SQUARE, isolated, score

from strop.rewards import program_tests
from strop.rewards.code import program_of, python_tests
from strop.rewards.jail.run import encode
from strop.rewards.program_tests import decode


@isolated
@pytest.mark.parametrize(
    ("program", "value"),
    [
        ("print(int(input()) ** 2)", 1.0),
        ("import sys\nprint(int(sys.stdin.read()) ** 2, end='  \\n\\n')\nsys.exit(0)", 1.0),
        ("print(9)", 0.0),
        ("print(int(input()) ** 2)\nprint('and more')", 0.0),
        ("print(int(input()) ** 2); raise ValueError", 0.0),
        ("print(int(input()) ** 2); exit(3)", 0.0),
        ("def solve(:", 0.0),
        ("import threading\nt = threading.Thread(target=lambda: print(int(input()) ** 2))\nt.start(); t.join()", 1.0),
        ("import time\ntime.sleep(5)\nprint(int(input()) ** 2)", 1.0),
    ],
)
def test_what_is_printed_is_compared_in_full(program: str, value: float) -> None:
    assert score(program, SQUARE, cpu_seconds=1.0) == value


@isolated
def test_forms_of_tests() -> None:
    program = "def f(x, y=1):\n    return (x, [y, {x}], 0.1 + 0.2)"
    good = ["assert f(2)[0] == 2", "assert f(3, y=5)[1] == [5, {3}]"]
    assert score(program, {"test_list": good}) == 1.0
    assert score(program, {"test_list": [*good, "assert f(2)[0] == 3"]}) == 0.0
    assert score(program, {"test_list": ["assert math.isclose(f(1)[2], 0.3, rel_tol=1e-9)"]}) == 1.0
    assert score(program, {"test_list": ["assert f(1)[2] == 0.3"]}) == 0.0
    assert score("def f(x): return x", {"test_list": ["assert f(n) == 7"], "test_setup_code": "n = 7"}) == 1.0
    assert (
        score("def f(x): return x > 1", {"test_list": ["assert f(2)", "assert not f(0)", "assert f(2) is True"]}) == 1
    )
    assert (
        score("def f(x): return (x, x)", {"inputs": [[1], [2]], "outputs": [[1, 1], [[2, 2]]], "fn_name": "f"}) == 1.0
    )
    apps = json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]})
    assert score("print(sum(map(int, input().split())))", {"input_output": apps}) == 1.0
    method = "class Solution:\n    def twice(self, x):\n        return 2 * x"
    assert score(method, {"tests": [{"fn_name": "twice", "args": [4], "output": 8}]}) == 1.0
    assert score(method, {"tests": [{"fn_name": "twice", "args": [4], "output": 9}]}) == 0.0


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"test_list": []},
        {"test_list": ["assert f(1) == g(1)"]},
        {"test_list": ["assert (f(1) == 2) == True"]},
        {"test_list": ["f(1)"]},
        {"test_list": ["assert f(1) == 2", "assert f(1) < 9"]},
        {"tests": "no json"},
        {"inputs": ["1"], "outputs": []},
        {"tests": [{"input": "1"}]},
    ],
)
def test_a_row_without_tests_that_are_understood_does_not_apply(row: dict[str, object]) -> None:
    reasons: list[str] = []
    columns = {name: [value] for name, value in row.items()}
    values = python_tests(["```python\n1\n```"], **columns, log_extra=lambda _, told: reasons.extend(told))  # type: ignore[arg-type]
    assert values == [None]
    assert "tests" in reasons[0]


def test_no_expected_value_is_sent() -> None:
    secret = "73501"
    rows: list[dict[str, object]] = [
        {"test_list": [f"assert f(1) == {secret}", f"assert {secret} == f(2)", f"assert f(1) != {secret}"]},
        {"test_list": [f"assert f(1) in [{secret}]"]},
        {"test_list": [f"assert math.isclose(f(1), {secret}, rel_tol=0.1)", f"assert f(1) == 1, '{secret}'"]},
        {"tests": [{"input": "1", "output": secret}, {"fn_name": "f", "args": [1], "output": int(secret)}]},
        {"inputs": ["1"], "outputs": [secret]},
        {"input_output": json.dumps({"fn_name": "f", "inputs": [[1]], "outputs": [int(secret)]})},
    ]  # fmt: skip
    for row in rows:
        found = program_tests.tests_of_row(row)
        assert not isinstance(found, str), found
        assert found
        assert all(secret not in json.dumps(dict(test.message)) for test in found)


def test_the_program_is_the_last_closed_block_after_the_thinking() -> None:
    assert program_of("<think>```python\n1\n```</think>\n```python\n2\n```\nor\n```py\n3\n```") == "3\n"
    assert program_of("```python\n1\n```\n```\nnot python\n```") == "1\n"
    assert program_of("```python\n1\n") is None
    assert program_of("<think>```python\n1\n```") is None
    assert program_of("no code") is None


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -7, 10**30, "é\n", 0.1, float("inf"), 1 + 2j, b"\x00", [1, (2, {3})], {"a": [1], (1, 2): None}],
)
def test_values_come_out_as_they_are(value: object) -> None:
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value
    assert type(back) is type(value)


def test_what_is_no_plain_data_equals_nothing() -> None:
    back = decode(json.loads(json.dumps(encode(SimpleNamespace()))))
    assert back != back
    assert all(decode(bad) != 1 for bad in ({"float": "x"}, {"dict": [[{"dict": []}, 1]]}, {"a": 1, "b": 2}))
