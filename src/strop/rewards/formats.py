"""Rewards for the form of a completion; worth nothing unless it is right as well."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from typing import Any

from ..errors import RewardError
from .answers import MAX_ANSWER_CHARS, answer_part, boxes, opens_thinking, written
from .contract import reward
from .scripts import SCRIPTS, share_of

MAX_AFTER_ANSWER = 32
"""Characters of white space and closing marks that may follow an answer."""

_BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Characters that count as printable and show nothing."""
_CLOSERS = re.compile(r"(?:[\s.$*)\]}!]|\\[)\]]|</answer>)*")
_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_LINE = re.compile(r"\s*[^\n]{0,64}(?=\n|\Z)")
_NOT_PROSE = re.compile(r"\\[A-Za-z]+|</?[a-z]{1,16}>|\$[\x00-#%-\x7f]{0,200}\$|```[\x00-_a-\x7f]{0,2000}```")


@reward(kind="format", version="1")
def think_format(completions: Sequence[Any], prefill: Sequence[str] | None = None, **_: Any) -> list[float | None]:
    """1.0 for exactly one `<think>...</think>` with content, an answer after it and nothing before it; else 0.0.

    Where the chat template already opened `<think>` (`prefill`), the completion starts inside it and must not open it
    again.
    """
    return [float(_is_thought_then_answer(sample.text, sample.prefill)) for sample in written(completions, prefill)]


def _is_thought_then_answer(text: str, prefill: str) -> bool:
    if opens_thinking(prefill):
        text = prefill[prefill.rfind("<think>") :] + text
    before, opened, rest = text.partition("<think>")
    thought, closed, answer = rest.partition("</think>")
    if not opened or not closed or before.strip() or "<think>" in rest or "</think>" in answer:
        return False
    return _is_visible(thought) and _is_visible(answer)


@reward(kind="format", version="1")
def single_box(completions: Sequence[Any], prefill: Sequence[str] | None = None, **_: Any) -> list[float | None]:
    r"""1.0 for exactly one `\boxed{...}` with content after the thinking part, else 0.0: more than one is a hedge."""
    return [_has_single_box(sample.text, sample.prefill) for sample in written(completions, prefill)]


def _has_single_box(text: str, prefill: str) -> float:
    part = answer_part(text, prefill)
    if part is None or part.count("\\boxed") != 1:
        return 0.0
    return float(any(map(_is_visible, boxes(part))))


@reward(kind="format", version="1")
def answer_last(
    completions: Sequence[Any],
    prefill: Sequence[str] | None = None,
    truncated: Sequence[bool] | None = None,
    **_: Any,
) -> list[float | None]:
    r"""1.0 where the completion ends with its answer, else 0.0: nothing may follow the last box but closing marks.

    The answer is the last `\boxed{...}`, else the last `<answer>...</answer>`, else the line after the last `####`.
    White space, a full stop and what closes a formula or bold text may follow, 32 characters in all. A truncated
    completion did not end.
    """
    return [
        0.0 if sample.truncated else _ends_with_answer(answer_part(sample.text, sample.prefill))
        for sample in written(completions, prefill, truncated)
    ]


def _ends_with_answer(part: str | None) -> float:
    if part is None:
        return 0.0
    end = _end_of_answer(part)
    if end is None or len(part) - end > MAX_AFTER_ANSWER:
        return 0.0
    return float(_CLOSERS.fullmatch(part, end) is not None)


def _end_of_answer(part: str) -> int | None:
    """Return where the last marked answer ends, None without one, or if it is empty or too long for one."""
    boxed = next(iter(deque(_BOX.finditer(part), maxlen=1)), None)
    if boxed is not None:
        start = boxed.end()
        end = _closing_brace(part, start)
        after = None if end is None else end + 1
    elif (end := part.rfind("</answer>")) >= 0:
        opened = part.rfind("<answer>", 0, end)
        start = opened + len("<answer>")
        after = end + len("</answer>") if opened >= 0 else None
    else:
        start = part.rfind("####") + 4
        line = _LINE.match(part, start) if start > 3 else None
        end = after = None if line is None else line.end()
    is_answer = end is not None and end - start <= MAX_ANSWER_CHARS and _is_visible(part[start:end])
    return after if is_answer else None


def _closing_brace(part: str, start: int) -> int | None:
    depth = 1
    for token in _BRACE.finditer(part, start, start + MAX_ANSWER_CHARS + 1):
        depth += (token.group() == "{") - (token.group() == "}")
        if not depth:
            return token.start()
    return None


@reward(kind="format", version="1")
def script_consistency(
    completions: Sequence[Any],
    *,
    script: str | Sequence[str] = "Latin",
    threshold: float = 0.9,
    **_: Any,
) -> list[float | None]:
    r"""1.0 where at least `threshold` (0.9) of the letters are of the script asked for, else 0.0, as without a letter.

    The option `script` names one or several scripts of Unicode: `Latin` (default), `Cyrillic`, `Han`, `Japanese`, ...
    LaTeX commands, tags, and formulas and code in ASCII are left out. It tells scripts apart, not languages. Raises
    RewardError for an unknown script or a threshold outside 0 to 1.
    """
    names = [script] if isinstance(script, str) else list(script)
    unknown = [name for name in names if name not in SCRIPTS]
    if unknown or not names:
        raise RewardError(
            f"reward `script_consistency`: there is no script {unknown or script!r}",
            hint=f"set rewards.options.script_consistency.script to one of {', '.join(SCRIPTS)}",
        )
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise RewardError(
            f"reward `script_consistency`: threshold is {threshold!r}; a number from 0 to 1 is needed",
            hint="set rewards.options.script_consistency.threshold to a share of the letters, such as 0.9",
        )
    shares = [share_of(_NOT_PROSE.sub(" ", sample.text), names) for sample in written(completions)]
    return [float(share is not None and share >= threshold) for share in shares]


def _is_visible(text: str) -> bool:
    return any(ch.isprintable() and not ch.isspace() and ch not in _BLANK for ch in text)
