"""`python_tests`: the program in a completion is run on the tests of its row, and compared outside the sandbox."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..errors import RewardError
from .answers import answer_part, completion_text
from .contract import reward
from .program_tests import ProgramTest, tests_of_row
from .sandbox import Limits, Sandbox, Wall, choose_wall

_OPENS = re.compile(r"[ \t]*```[ \t]*(?:python|python3|py)[ \t]*\r?\n", re.I)
_CLOSES = re.compile(r"[ \t]*```[ \t]*\r?\n?")
MAX_PROGRAM_CHARS = 200_000

_sandboxes: dict[Wall, Sandbox] = {}


@reward(kind="correctness", version="1")
def python_tests(
    completions: Sequence[Any],
    tests: Sequence[Any] | None = None,
    test_list: Sequence[Any] | None = None,
    test_setup_code: Sequence[Any] | None = None,
    test_imports: Sequence[Any] | None = None,
    inputs: Sequence[Any] | None = None,
    outputs: Sequence[Any] | None = None,
    input_output: Sequence[Any] | None = None,
    fn_name: Sequence[Any] | None = None,
    prefill: Sequence[str] | None = None,
    log_extra: Any = None,
    *,
    cpu_seconds: float = 4.0,
    memory_mib: int = 1024,
    output_kib: int = 1024,
    unsafe: bool = False,
    **_: Any,
) -> list[float | None]:
    """1.0 where the program passes every test of its row, else 0.0; None where the row has no test that is understood.

    The program is the last closed block fenced as ```python after the thinking part. The tests stand in one of

        tests                    list of {"input", "output"}, read from stdin and printed, or of
                                 {"fn_name", "args", "output"}; or its JSON
        test_list                list of `assert call == literal` (MBPP), with `test_setup_code`, `test_imports`
        inputs, outputs          lists, with `fn_name` for calls; `input_output` holds both as JSON (APPS, TACO)

    What is printed has to be equal, but for white space at the ends of lines and of the text; what is returned has to
    be equal. Tests run in order until one fails. Expected values never enter the sandbox.

    `cpu_seconds` are those of all tests of a completion together, `memory_mib` and `output_kib` those of one test.
    `unsafe` runs the program without isolation where the machine offers none. Raises RewardError where there is none
    and `unsafe` is not set, OSError where the sandbox fails for a reason that lies in the machine.
    """
    columns = {
        "tests": tests, "test_list": test_list, "test_setup_code": test_setup_code, "test_imports": test_imports,
        "inputs": inputs, "outputs": outputs, "input_output": input_output, "fn_name": fn_name,
    }  # fmt: skip
    for option, given in (("cpu_seconds", cpu_seconds), ("memory_mib", memory_mib), ("output_kib", output_kib)):
        _check_limit(option, given, whole=option != "cpu_seconds")
    limits = Limits(cpu_seconds, memory_mib << 20, output_kib << 10)
    values: list[float | None] = []
    reasons: list[str] = []
    for i, completion in enumerate(completions):
        row = {name: column[i] for name, column in columns.items() if column is not None}
        found = tests_of_row(row)
        if isinstance(found, str):
            value, reason = None, found
        else:
            program = program_of(completion_text(completion), prefill[i] if prefill is not None else "")
            value, reason = _score(program, found, limits, unsafe)
        values.append(value)
        reasons.append(reason)
    if log_extra is not None:
        log_extra("python_tests", reasons)
    return values


def _check_limit(option: str, value: Any, *, whole: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not 0 < value < 1 << 40:
        raise RewardError(
            f"reward `python_tests`: {option} is {value!r}; a {'whole ' * whole}number above 0 is needed",
            hint=f"set rewards.options.python_tests.{option}, or leave it out",
        )


def program_of(text: str, prefill: str = "") -> str | None:
    """Return the last closed block of Python after the thinking part, or None."""
    found, block = None, None
    for line in re.findall(r"[^\n]*\n|[^\n]+", answer_part(text, prefill) or ""):
        if block is None:
            block = [] if _OPENS.fullmatch(line) else None
        elif _CLOSES.fullmatch(line):
            found, block = "".join(block), None
        else:
            block.append(line)
    return found if found is not None and len(found) <= MAX_PROGRAM_CHARS else None


def _score(program: str | None, tests: Sequence[ProgramTest], limits: Limits, unsafe: bool) -> tuple[float, str]:
    wall = choose_wall(unsafe=unsafe)
    if program is None:
        return 0.0, "no closed ```python block after the thinking part"
    sandbox = _sandboxes.setdefault(wall, Sandbox(wall))  # its helper starts with the first program
    sandbox.begin(program, limits)
    try:
        for number, test in enumerate(tests, start=1):
            report = sandbox.run(test.message, limits)
            if not report.ok:
                return 0.0, f"test {number} of {len(tests)}: {report.detail}"
            if not test.passes(report):
                return 0.0, f"test {number} of {len(tests)}: another result than expected"
    finally:
        sandbox.end()
    return 1.0, f"passed {len(tests)} tests"
