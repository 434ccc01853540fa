"""Programs run in the sandbox, and rows that score them."""

from __future__ import annotations

import pytest

from strop.rewards.code import python_tests
from strop.rewards.sandbox import Limits, Report, Sandbox, survey

WALL, WHY_NOT = survey()
isolated = pytest.mark.skipif(WALL is None, reason=f"no isolation on this machine: {WHY_NOT}")
FAST = Limits(cpu_s=1.0, memory_bytes=256 << 20, output_bytes=1 << 16)


def run(box: Sandbox, program: str, stdin: str = "", limits: Limits = FAST) -> Report:
    box.begin(program, limits)
    try:
        return box.run({"stdin": stdin}, limits)
    finally:
        box.end()


def score(program: str, row: dict[str, object], **options: object) -> float | None:
    columns = {name: [value] for name, value in row.items()}
    return python_tests([f"<think>hm</think>\n```python\n{program}\n```"], **columns, **options)[0]  # type: ignore[arg-type]


SQUARE: dict[str, object] = {"tests": [{"input": "3\n", "output": "9\n"}, {"input": "-4", "output": "16"}]}
