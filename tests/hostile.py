"""Texts that hang, crash or fool verifiers, by class, and the rows and options with which every built-in scores them.

The classes are those that math-verify, reasoning-gym and open-r1's rewards were found to stumble over.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from strop.rewards.contract import declaration_of
from strop.rewards.library import LIBRARY

RUNS_PROGRAMS = frozenset({"python_tests"})
"""Built-ins that start a process per text; tests of their own give them programs that misbehave."""

POWERS = (
    "9**9**9", "9^{9^9}", "10^{10^{10}}", "1.0x10^{4e8}", r"1.0 \times 10^{400000000}", r"9^{9^9} \bmod 100",
    "9^9^9", "((9!)!)!", "100000000!", "1000000!", "100!!", "10^{10^{10^{10}}}", "2^{3^{4^{5^{6}}}}", "x^(9^(9^9))",
    r"x^{1 1 1 1 1 1 1 1 1}", r"((((9^{99})^{99})^{99})^{99})", "(a+b+c+d)^{64}",
    r"2^{10 \cdot 10 \cdot 10 \cdot 10}", r"9^{99}\sqrt[5]{x}\log(\sqrt[5]{3})", "(x+1)^{1000}", "(x+y+z)^{99}",
    r"\left(1+\frac{1}{n}\right)^{999999}", r"e^{e^{e^{e^{10}}}}", "0^{0^0}", "10^{-999999999}", "(-1)^{0.333333}",
)  # fmt: skip
FUNCTIONS = (
    r"\sum_{i=1}^{1000000000} i^i", r"\sum_{i=1}^{100000} \sin(i)", r"\prod_{i=1}^{10000000} i",
    r"\int_0^1 \sin(x^x) dx", r"\lim_{x \to \infty} x^{x^x}", r"\binom{1000000}{500000}", r"\sin" * 60 + " x",
    r"\log" * 60 + " x", r"\log(\log(\log(10^{10^{10}})))", r"\log(\pi-e)\sin(12^{20} x)", r"\sin(200 x)",
    r"\cos(99 x) \sin(98 y) \tan(97 z)", r"\sqrt{a}-x+2 \cdot \log(99) \cdot 3 \cdot 123456789",
    r"\sqrt{" * 40 + "2" + "}" * 40, r"\sqrt[99999]{2}", r"\frac{" * 100 + "1" + "}{2}" * 100,
    r"\gcd(99999999999999, 11111111111111)", r"\operatorname{" * 20, r"\int" * 200, r"|" * 99 + "x" + "|" * 99,
    r"\lfloor" * 50 + "1" + r"\rfloor" * 50,
)  # fmt: skip
NESTING = (
    "(" * 12 + "81" + ")" * 12, "(" * 35 + "81" + ")" * 35, "(" * 44 + "x" + ")" * 44, "(" * 500 + "1" + ")" * 500,
    "(" * 5000, "{" * 10_000 + "x" + "}" * 10_000, "[" * 10_000 + "]" * 10_000, "}" * 10_000, r"\left(" * 300,
    r"\{" * 1000 + r"\}" * 1000, "-" * 500 + "81", "+-" * 300 + "1", "(-" * 200 + "1" + ")" * 200,
    "1+(" * 300 + "1", r"\begin{pmatrix}" * 50, r"\begin{pmatrix}" + r"1 & 2 \\" * 500 + r"\end{pmatrix}",
    r"\begin{array}{" + "c" * 5000 + "}", r"\text{" * 500 + "}" * 500, '{"a":' * 500 + "1" + "}" * 500, "<" * 2000,
)  # fmt: skip
NUMBERS = (
    "9" * 65, "9" * 4301, "9" * 20_000, "1e999999999", "-1e999999999", "1e-999999999", "0x" + "f" * 5000,
    "1" + ",000" * 900, "1," * 20_000, "1/" * 5000 + "1", "0." + "0" * 5000 + "1", "1_" * 2000 + "1", "nan", "inf",
    "-inf", "Infinity", "-0", "1/0", "0/0", "1e400", "1e", "--81", "81%" * 500, "0b1", "1.2.3.4",
    "1 2 3 4 5 6 7 8 9", "\u0661\u0662" * 999, "\uff18\uff11" * 999, "\u09ee\u09e7" * 999, "\u2168", "\u00bd" * 300,
    "8\u00b2" * 300, "\u2460\u2461",
)  # fmt: skip
HEDGES = (
    "82=80=81", r"8100\%", "2+2", r"\sum_{k=1}^{10}k", "81 or 82", r"81 \text{ or } 82", "80, 81, 82", "[80, 82]",
    r"\pm 81", "not 81", "80 < x < 82", "0..1000", " ".join(map(str, range(1000))), "A B C D", "A or B", "yes/no",
    r"\boxed{80} \boxed{81}", "x=81=x", r"\{80,81\}", r"81 \neq 80", r"\approx 81", "81?", "approximately 81",
    "definitely",
)  # fmt: skip
UNICODE = (
    "\ud800", "\udfff\ud800", "a\ud800b" * 500, "\x00", "8\x001", "\x00" * 1000, "\u202e18", "\u202e" * 500 + "81",
    "\u200b" * 5000, "8\u200b1", "\ufeff81", "\u0301" * 9000, "e" + "\u0323\u0301" * 4000, "\u0344" * 3000,
    "\ufdfa" * 500, "\U0001f600" * 2000, "\u2028" * 3000, "\r\n" * 5000, "\v\f\x1c\x85", "\u1160\u3164\u2800",
    "\U000e0041" * 500, "\u0130\u0149\ufb03" * 900, "\x1b[31m81\x1b[0m", "\ufffe\uffff",
)  # fmt: skip
MARKS = (
    r"\boxed{" * 5000, r"\boxed{1}" * 5000, r"\boxed{\boxed{" * 100 + "1" + "}}" * 100, r"\boxed", r"\boxed{",
    r"\boxed {}", r"\boxed{81}\boxed{", "}" + r"\boxed{81" + "{", "####" * 5000, "#### " * 1000 + "81",
    "<think>" * 5000, "</think>" * 5000, "<think></think>" * 1000, "<answer>" * 5000, "</answer>" * 5000,
    "<answer></answer>" * 1000, "<answer>" * 200 + "1+2" + "</answer>" * 200, "$" * 20_000, "$$" * 99 + "81",
    r"\(" * 2000, r"\[81\]" * 500, "**" * 5000, "```json\n" * 2000, "```json\n{}\n```" * 500, '"' * 15_000,
    '\\"' * 9000, "\\" * 9001, "Answer: " * 2000, "Answer: A\n" * 1000, "\n" * 100_000, " " * 100_000, "{,}" * 5000,
    r"\," * 5000, r"\\" * 5000, "^" * 5000, "_{" * 3000, "!" * 9999, "=" * 9999, "%" * 9999, "&" * 9999,
    ".,;:" * 2500,
)  # fmt: skip
CODE = (
    "__import__('os').system('true')", "eval('1')", "().__class__.__bases__[0].__subclasses__()", "exec('x=1')",
    "lambda: 81", "[x for x in range(10**9)]", "'a' * 10**10", "1 if 1 else 2", "open('/etc/passwd')",
    "sympy.Symbol('x')", "!!python/object/apply:os.system ['true']", "cos\nsystem\n(S'true'\ntR.", "{{ 7*7 }}",
    "%s%s%n", "; DROP TABLE x;", '{"$ref": "#"}', '{"a": 1, "a": 2}', "[" + "1," * 9000 + "1]", '{"__proto__": []}',
    "[NaN, Infinity]", "1e400", "1+" * 3000 + "1", "1*" * 99 + "1", "(1+2)*3", "1/0+1+2", "+1+2", "1//2", "2**.5",
    "1 2 3", "((1+2", "1+2)",
)  # fmt: skip
LOOPS = (
    "Let me check this again. " * 2000, "abc" * 20_000, " ".join(map(str, range(20_000))), "a" * 100_000,
    "\n".join(f"Step {i}: so x = {i}." for i in range(5000)), "\u200b".join("check" for _ in range(5000)),
    "ab" * 5000 + "ba" * 5000, "".join(chr(0x4E00 + i % 5000) for i in range(20_000)),
    "First, Second, Next, Finally, " * 500, "wait, " * 5000,
)  # fmt: skip
HUGE = (
    "x" * 1_000_000, "9" * 1_000_000, "$" * 1_000_000, "\n" * 1_000_000, r"\boxed{1}" * 110_000, "{" * 1_000_000,
    "\u4e00" * 1_000_000,
)  # fmt: skip

CLASSES = {
    "powers": POWERS, "functions": FUNCTIONS, "nesting": NESTING, "numbers": NUMBERS, "hedges": HEDGES,
    "unicode": UNICODE, "marks": MARKS, "code": CODE, "loops": LOOPS, "huge": HUGE,
}  # fmt: skip
_WRAPPED = ("powers", "functions", "nesting", "numbers", "hedges", "unicode")
"""Classes whose members are answers: they stand alone and in a box."""


def texts() -> Iterator[tuple[str, str]]:
    """Yield (class, text), the same ones every time."""
    for name, members in CLASSES.items():
        for member in members:
            yield name, member
            if name in _WRAPPED:
                yield name, rf"<think>so</think>The answer is \boxed{{{member}}}."
    yield "empty", ""


ROWS: tuple[dict[str, Any], ...] = (
    {"answer": r"x^2+\sqrt{2}", "target": 9, "numbers": [1, 2, 3], "json_schema": {"uniqueItems": True}},
    {"answer": "81", "target": 81, "numbers": [9, 9], "json_schema": {"items": {"pattern": r"^\s*\w*\s*x$"}}},
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "regex_answer": {"pattern": r"\s*(\w*)\W*x"},
    "reasoning_gym": {"dataset": "chain_sum"},
    "l1_max": {"target": 1000},
}


def names() -> list[str]:
    """The built-ins that score these texts, each function once."""
    first = {function: name for name, function in reversed(LIBRARY.items())}
    return [name for name, function in LIBRARY.items() if first[function] == name and name not in RUNS_PROGRAMS]


def score(name: str, text: str, row: dict[str, Any]) -> list[float | None]:
    """Score a text with a built-in: alone, or as a group of three for a function of group scope."""
    count = 3 if declaration_of(LIBRARY[name]).scope == "group" else 1
    return batch(name, [text] * count, [row] * count)


def batch(name: str, given: list[str], rows: list[dict[str, Any]]) -> list[float | None]:
    """Score several texts in one call."""
    function: Any = LIBRARY[name]
    count = len(given)
    arguments = {
        "prompts": ["?"] * count, "completions": given, "prefill": [""] * count, "truncated": [False] * count,
        "max_completion_length": 100_000, "correct": [number % 2 == 0 for number in range(count)],
        **{column: [row[column] for row in rows] for column in rows[0]},
    }  # fmt: skip
    parameters = inspect.signature(function).parameters
    if "completion_ids" in parameters:
        arguments["completion_ids"] = [list(text[:60_000].encode("utf-8", "surrogatepass")) for text in given]
    options = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    columns = {key: value for key, value in arguments.items() if key not in options}
    return function(**columns, **OPTIONS.get(name, {}))
