"""The built-in rewards: pure functions of the completion and its row, in TRL's signature.

No clock, no random numbers, no state: the same text and row give the same float in every process. Each takes lists of
any equal length. None means that the reward does not apply to that row.
"""

from __future__ import annotations

import ast
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from .answers import (
    after_hashes,
    answer_part,
    boxes,
    completion_text,
    gold_text,
    last_box,
    last_number,
    opens_thinking,
    parse_number,
    reference_answer,
    tail,
)
from .symbolic import math_reward, preload

MAX_EXPRESSION_CHARS = 200
MAX_LITERAL_DIGITS = 12

_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ARITHMETIC = re.compile(r"[\d+\-*/() \t\n]+", re.ASCII)
_SIGNS = {0xD7: "*", 0xF7: "/", 0x2212: "-"}


def numeric(
    completions: Sequence[Any], answer: Sequence[Any], prefill: Sequence[str] | None = None, **_: Any
) -> list[float | None]:
    r"""1.0 where the final number equals the column `answer` exactly, else 0.0; None where `answer` is no number.

    The final number is the last `\boxed{}` after the thinking part, else the text after the last `####`, else the last
    number of the answer. A box or `####` that holds more than one number (`81 or 82`, `82=80=81`) is wrong. A percent
    sign counts as a unit: `50%` equals 50, not 0.5.
    """
    return [
        _numeric(completion_text(completion), gold, start)
        for completion, gold, start in zip(completions, answer, _prefills(prefill, completions), strict=True)
    ]


def _numeric(text: str, gold_value: Any, prefill: str) -> float | None:
    reference = reference_answer(gold_value)
    gold = None if reference is None else parse_number(reference)
    if gold is None:
        return None
    part = answer_part(text, prefill)
    if part is None:
        return 0.0
    end = tail(part)
    candidates = (last_box(end), after_hashes(end), last_number(end))
    written = next((candidate for candidate in candidates if candidate is not None), None)
    number = None if written is None else parse_number(written)
    return float(number is not None and number.value == gold.value)


def exact(
    completions: Sequence[Any], answer: Sequence[Any], prefill: Sequence[str] | None = None, **_: Any
) -> list[float | None]:
    r"""1.0 where the answer part, NFKC-normalised and trimmed, equals the column `answer`, else 0.0; None without one.

    If the answer part holds exactly one `\boxed{}`, its content is compared instead.
    """
    return [
        _exact(completion_text(completion), gold, start)
        for completion, gold, start in zip(completions, answer, _prefills(prefill, completions), strict=True)
    ]


def _exact(text: str, gold_value: Any, prefill: str) -> float | None:
    gold = gold_text(gold_value)
    if gold is None:
        return None
    part = answer_part(text, prefill)
    if part is None or len(part) > 4 * len(gold) + 10_000:
        return 0.0
    boxed = boxes(part)
    given = boxed[0] if len(boxed) == 1 and part.count("\\boxed") == 1 else part
    wanted = unicodedata.normalize("NFKC", gold).strip()
    return float(unicodedata.normalize("NFKC", given).strip() == wanted)


def countdown(
    completions: Sequence[Any],
    target: Sequence[Any],
    numbers: Sequence[Any] | None = None,
    nums: Sequence[Any] | None = None,
    prefill: Sequence[str] | None = None,
    **_: Any,
) -> list[float | None]:
    """1.0 where an arithmetic expression uses each of `numbers` (or `nums`) exactly once and equals `target`, else 0.0.

    The expression is the content of the last `<answer>...</answer>` after the thinking part, else all of that part.
    Only `+ - * /`, parentheses and whole numbers are understood, in exact fractions; nothing is evaluated as code.
    None where `target` or the numbers are missing or are not whole numbers.
    """
    pools = numbers if numbers is not None else nums if nums is not None else [None] * len(completions)
    return [
        _countdown(completion_text(completion), goal, pool, start)
        for completion, goal, pool, start in zip(
            completions, target, pools, _prefills(prefill, completions), strict=True
        )
    ]


def _countdown(text: str, goal: Any, pool: Any, prefill: str) -> float | None:
    target = _whole(goal)
    listed = pool.tolist() if hasattr(pool, "tolist") else pool
    available = [_whole(n) for n in listed] if isinstance(listed, list | tuple) else []
    if target is None or not available or None in available:
        return None
    part = answer_part(text, prefill)
    if part is None:
        return 0.0
    tagged = _ANSWER_TAG.findall(tail(part))
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


def think_format(completions: Sequence[Any], prefill: Sequence[str] | None = None, **_: Any) -> list[float | None]:
    """1.0 for exactly one `<think>...</think>` with content, an answer after it and nothing before it; else 0.0.

    Where the chat template already opened `<think>` (`prefill`), the completion starts inside it and must not open it
    again.
    """
    return [
        float(_is_thought_then_answer(completion_text(completion), start))
        for completion, start in zip(completions, _prefills(prefill, completions), strict=True)
    ]


def _is_thought_then_answer(text: str, prefill: str) -> bool:
    if opens_thinking(prefill):
        text = prefill[prefill.rfind("<think>") :] + text
    before, opened, rest = text.partition("<think>")
    thought, closed, answer = rest.partition("</think>")
    if not opened or not closed or before.strip() or "<think>" in rest or "</think>" in answer:
        return False
    return _is_visible(thought) and _is_visible(answer)


def single_box(completions: Sequence[Any], prefill: Sequence[str] | None = None, **_: Any) -> list[float | None]:
    r"""1.0 for exactly one `\boxed{...}` with content after the thinking part, else 0.0: more than one is a hedge."""
    return [
        _has_single_box(completion_text(completion), start)
        for completion, start in zip(completions, _prefills(prefill, completions), strict=True)
    ]


def _has_single_box(text: str, prefill: str) -> float:
    part = answer_part(text, prefill)
    if part is None or part.count("\\boxed") != 1:
        return 0.0
    return float(any(map(_is_visible, boxes(part))))


def _is_visible(text: str) -> bool:
    return any(ch.isprintable() and not ch.isspace() for ch in text)


def _prefills(prefill: Sequence[str] | None, completions: Sequence[Any]) -> Sequence[str]:
    return prefill if prefill is not None else [""] * len(completions)


LIBRARY: Mapping[str, Callable[..., list[float | None]]] = {
    "numeric": numeric,
    "exact": exact,
    "math": math_reward,
    "countdown": countdown,
    "think_format": think_format,
    "single_box": single_box,
    "accuracy_reward": math_reward,
    "think_format_reward": think_format,
}
"""Names for `rewards.funcs`; the last two are TRL's."""

PRELOADS: Mapping[str, Callable[[], None]] = {"math": preload, "accuracy_reward": preload}
"""What a worker does before it takes work, so that an import's time is in no completion's limit."""
