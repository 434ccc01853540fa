"""The `countdown` reward: an expression over given numbers, read as a syntax tree and computed in exact fractions."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from .answers import Written, gold_text, parse_number, tail, written
from .contract import reward

MAX_EXPRESSION_CHARS = 200
MAX_LITERAL_DIGITS = 12

_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ARITHMETIC = re.compile(r"[\d+\-*/() \t\n]+", re.ASCII)
_SIGNS = {0xD7: "*", 0xF7: "/", 0x2212: "-"}


@reward(kind="correctness", version="1")
def countdown(
    completions: Sequence[Any],
    target: Sequence[Any],
    numbers: Sequence[Any] | None = None,
    nums: Sequence[Any] | None = None,
    prefill: Sequence[str] | None = None,
    truncated: Sequence[bool] | None = None,
    **_: Any,
) -> list[float | None]:
    """1.0 where an arithmetic expression uses each of `numbers` (or `nums`) exactly once and equals `target`, else 0.0.

    The expression is the content of the last `<answer>...</answer>` after the thinking part, else all of that part; of
    a truncated completion only the former. Only `+ - * /`, parentheses and whole numbers are understood, in exact
    fractions; nothing is evaluated as code. None where `target` or the numbers are missing or are not whole numbers.
    """
    pools = numbers if numbers is not None else nums if nums is not None else [None] * len(completions)
    return [
        _countdown(sample, goal, pool)
        for sample, goal, pool in zip(written(completions, prefill, truncated), target, pools, strict=True)
    ]


def _countdown(sample: Written, goal: Any, pool: Any) -> float | None:
    target = _whole(goal)
    listed = pool.tolist() if hasattr(pool, "tolist") else pool
    available = [_whole(n) for n in listed] if isinstance(listed, list | tuple) else []
    if target is None or not available or None in available:
        return None
    part = sample.part
    if part is None:
        return 0.0
    tagged = _ANSWER_TAG.findall(tail(part))
    if sample.truncated and not tagged:
        return 0.0
    source = (tagged[-1] if tagged else part).strip().translate(_SIGNS)
    if len(source) > MAX_EXPRESSION_CHARS or not _ARITHMETIC.fullmatch(source):
        return 0.0
    try:
        tree = ast.parse(" ".join(source.split()), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return 0.0
    used: list[int] = []
    value = _evaluate(tree.body, used)
    return float(value == target and Counter(used) == Counter(available))


def _evaluate(node: ast.expr, used: list[int]) -> Fraction | None:
    """Return the exact value of a syntax tree and note its literals; None for anything but + - * / on whole numbers."""
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value < 10**MAX_LITERAL_DIGITS:
        used.append(node.value)
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp):
        return None
    left, right = _evaluate(node.left, used), _evaluate(node.right, used)
    if left is None or right is None:
        return None
    match node.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right if right else None
    return None


def _whole(value: Any) -> int | None:
    text = gold_text(value)
    number = None if text is None else parse_number(text)
    return int(number.value) if number is not None and number.value.denominator == 1 else None
