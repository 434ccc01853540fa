r"""The `math` reward: exact paths first, then math-verify on answers whose size is bounded beforehand.

math-verify stops long computations with SIGALRM, which works in no thread and makes a verdict depend on the load of
the machine. It runs here without its clock; `within_budget` refuses what could run long, and the pool kills what still
does.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..errors import RewardError
from .answers import (
    MAX_ANSWER_CHARS,
    Written,
    after_hashes,
    fold,
    last_box,
    last_number,
    parse_number,
    reference_answer,
    tail,
    written,
)
from .budget import gold_within_budget, within_budget
from .contract import reward

GOLD_COLUMNS = ("answer", "solution", "ground_truth")
MAX_GOLD_CHARS = 512

_SPAN = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


@reward(kind="correctness", version="1")
def math_reward(
    completions: Sequence[Any],
    prefill: Sequence[str] | None = None,
    truncated: Sequence[bool] | None = None,
    **columns: Any,
) -> list[float | None]:
    r"""1.0 where the final answer equals the reference, else 0.0; None where the reference cannot be read.

    Answer and reference are compared as text first, apart from spelling (spaces, `\dfrac`, `\left`, `\text`).
    The final answer is the last `\boxed{}` after the thinking part, else the text after `####`, the last `$...$`, a
    short answer as a whole, or the last number; of a truncated completion only a closed box or a whole line with
    `####`. The reference is the column `answer`, else `solution`, else `ground_truth`. A number is compared exactly and
    has to be written as one number; `2+2` is not 4. Only other answers go to math-verify, and only within the budgets
    of `budget.py`; a reference beyond them, or with a sum, product, integral or limit, is compared as text only. Raises
    RewardError if the rows have none of the three columns.
    """
    samples = written(completions, prefill, truncated)
    return [_score(sample, gold) for sample, gold in zip(samples, _golds(columns, len(samples)), strict=True)]


@reward(kind="correctness", version="1")
def reasoning_accuracy_reward(
    completions: Sequence[Any],
    prefill: Sequence[str] | None = None,
    truncated: Sequence[bool] | None = None,
    *,
    reasoning_delimiters: Sequence[str] = ("</think>",),
    **columns: Any,
) -> list[float | None]:
    """As `math`, but 0.0 without the end of a thinking part; only what follows it is read.

    The option `reasoning_delimiters` lists the texts that end it; the first of them that occurs counts, where it occurs
    last.
    """
    samples = written(completions, prefill, truncated)
    ends = [reasoning_delimiters] if isinstance(reasoning_delimiters, str) else reasoning_delimiters
    scores: list[float | None] = []
    for sample, gold in zip(samples, _golds(columns, len(samples)), strict=True):
        end = next((end for end in ends if end and end in sample.text), None)
        rest = "" if end is None else sample.text.rpartition(end)[2]
        scores.append(_score(Written(rest, "", sample.truncated), gold))
    return scores


def _golds(columns: Mapping[str, Any], count: int) -> list[Any]:
    """Return per row the first reference that is there."""
    given = [columns[name] for name in GOLD_COLUMNS if columns.get(name) is not None]
    if not given:
        raise RewardError(
            f"reward `math` needs a column `answer`, `solution` or `ground_truth`; the rows have {sorted(columns)}",
            hint="rename the reference column of the data set, or take another function in rewards.funcs",
        )
    return [next((column[i] for column in given if column[i] is not None), None) for i in range(count)]


def preload() -> None:
    """Import math-verify and parse once, so that its start-up time is in no completion's limit.

    Raises RewardError if it is not installed.
    """
    try:
        _parse_gold("x+1")
    except ImportError as e:
        raise RewardError(
            f"reward `math` needs math-verify, which cannot be imported: {e}", hint="pip install math-verify"
        ) from e


def _score(sample: Written, gold_value: Any) -> float | None:
    gold = reference_answer(gold_value)
    if gold is None or len(gold) > MAX_GOLD_CHARS:
        return None
    gold_key = _key(gold)
    if not gold_key:
        return None
    part = sample.part
    answer = None if part is None else _final_answer(tail(part), sample.truncated)
    if answer and len(answer) > MAX_ANSWER_CHARS:
        answer = None
    if answer and _key(answer) == gold_key:
        return 1.0
    gold_number = parse_number(gold)
    if gold_number is not None:
        number = None if answer is None else parse_number(answer)
        return float(number is not None and number[:2] == gold_number[:2] and number.fits(gold_number))
    if (gold_key.isalpha() and len(gold_key) > 1) or not gold_within_budget(fold(gold)):
        return 0.0
    if not _parse_gold(gold):
        return None
    if not answer or ("." in answer and "." not in gold and parse_number(answer) is not None):
        return 0.0  # of a decimal, math-verify would take six digits for the same
    return float(within_budget(fold(answer), fold(gold)) and _equivalent(gold, fold(answer)))


def _final_answer(end: str, truncated: bool) -> str | None:
    boxed = last_box(end)
    if boxed is not None:
        return boxed
    hashes = after_hashes(end, whole_line=truncated)
    if hashes is not None or truncated:
        return hashes
    spans = list(_SPAN.finditer(end))
    if spans:
        return next(group for group in spans[-1].groups() if group is not None).strip()
    whole = end.strip()
    return whole if len(whole) <= 64 and "\n" not in whole and " " not in whole else last_number(end)


def _key(text: str) -> str:
    """Return a form in which answers that differ only in spelling are equal strings."""
    key = fold(text).strip().strip("$").rstrip(".")
    key = re.sub(r"\\left(?![A-Za-z])|\\right(?![A-Za-z])|\\[!,;:]", "", key)
    key = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", key)
    key = re.sub(r"\\(?:text|textbf|mathrm|mbox) ?\{([^{}]*)\}", r"\1", key)
    return re.sub(r"\s*([^\w\s])\s*", r"\1", re.sub(r"\s+", " ", key)).strip()


@lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> tuple[Any, ...]:
    return _parse(fold(gold))


def _parse(latex: str) -> tuple[Any, ...]:
    """Parse one expression with math-verify's LaTeX grammar, which evaluates no text; () if it cannot."""
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns once that its clock is off
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    source = rf"\boxed{{{latex.strip().strip('$')}}}"
    found = parse(source, config, fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=0)
    return tuple(found)


def _equivalent(gold: str, answer: str) -> bool:
    from math_verify import verify

    parsed = _parse(answer)
    return bool(parsed) and bool(verify(list(_parse_gold(gold)), list(parsed), timeout_seconds=0))
