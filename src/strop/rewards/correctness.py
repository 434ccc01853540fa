"""Rewards that compare one final answer with one reference, exactly: `numeric`, `gsm8k` and `exact`."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from ..errors import RewardError
from .answers import (
    Number,
    Written,
    after_hashes,
    boxes,
    gold_text,
    last_box,
    last_number,
    parse_number,
    reference_answer,
    tail,
    written,
)
from .contract import reward

GSM8K_TAIL = 300
"""Characters at the end in which `gsm8k` looks for its mark: what follows an answer at length is no answer."""


@reward(kind="correctness", version="1")
def numeric(
    completions: Sequence[Any],
    answer: Sequence[Any],
    prefill: Sequence[str] | None = None,
    truncated: Sequence[bool] | None = None,
    *,
    tolerance: float = 0,
    relative_tolerance: float = 0,
    **_: Any,
) -> list[float | None]:
    r"""1.0 where the final number equals the column `answer` exactly, else 0.0; None where `answer` is no number.

    The final number is the last `\boxed{}` after the thinking part, else the text after the last `####`, else the last
    number of the answer; of a truncated completion only a closed box or a whole line with `####`. A box or `####` that
    holds more than one number (`81 or 82`, `82=80=81`) is wrong. A percent sign counts as a unit: `50%` equals 50, not
    0.5. Units that are both given must agree. Options: `tolerance`, the largest difference that is still right, and
    `relative_tolerance`, the same as a share of the reference; the larger of the two counts, both compared exactly.
    Raises RewardError for an option below zero.
    """
    slack = _slack("tolerance", tolerance), _slack("relative_tolerance", relative_tolerance)
    return [
        _numeric(sample, gold, *slack)
        for sample, gold in zip(written(completions, prefill, truncated), answer, strict=True)
    ]


def _numeric(sample: Written, gold_value: Any, absolute: Fraction, relative: Fraction) -> float | None:
    gold = _gold_number(gold_value)
    if gold is None:
        return None
    part = sample.part
    if part is None:
        return 0.0
    end = tail(part)
    given = last_box(end)
    if given is None:
        given = after_hashes(end, whole_line=sample.truncated)
    if given is None and not sample.truncated:
        given = last_number(end)
    number = None if given is None else parse_number(given)
    if number is None or not number.fits(gold):
        return 0.0
    return float(abs(number.value - gold.value) <= max(absolute, relative * abs(gold.value)))


def _slack(option: str, value: Any) -> Fraction:
    is_number = isinstance(value, int | float | Fraction) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise RewardError(
            f"reward `numeric`: {option} is {value!r}; a number of at least 0 is needed",
            hint=f"set rewards.options.numeric.{option} to the difference that is still right, or leave it out",
        )
    return Fraction(str(value))


def _gold_number(value: Any) -> Number | None:
    reference = reference_answer(value)
    return None if reference is None else parse_number(reference)


@reward(kind="correctness", version="1")
def gsm8k(
    completions: Sequence[Any],
    answer: Sequence[Any],
    prefill: Sequence[str] | None = None,
    truncated: Sequence[bool] | None = None,
    **_: Any,
) -> list[float | None]:
    r"""1.0 where the number in `\boxed{}` or after the last `####` equals `answer`, else 0.0; None without a number.

    Stricter than `numeric`: the mark has to stand in the last 300 characters, a number without a mark is no answer, and
    a box and a `####` that are both there must agree. `answer` may be GSM8K's whole solution. Compared exactly.
    """
    return [_gsm8k(sample, gold) for sample, gold in zip(written(completions, prefill, truncated), answer, strict=True)]


def _gsm8k(sample: Written, gold_value: Any) -> float | None:
    gold = _gold_number(gold_value)
    if gold is None:
        return None
    part = sample.part
    if part is None:
        return 0.0
    end = part.rstrip()[-GSM8K_TAIL:]
    line = after_hashes(end, whole_line=sample.truncated)
    marked = [given for given in (last_box(end), _inside_box(line)) if given is not None]
    numbers = [parse_number(given) for given in marked]
    right = [number is not None and number.value == gold.value and number.fits(gold) for number in numbers]
    return float(bool(right) and all(right))


def _inside_box(line: str | None) -> str | None:
    boxed = None if line is None else last_box(line)
    return line if boxed is None else boxed


@reward(kind="correctness", version="1")
def exact(
    completions: Sequence[Any],
    answer: Sequence[Any],
    prefill: Sequence[str] | None = None,
    truncated: Sequence[bool] | None = None,
    **_: Any,
) -> list[float | None]:
    r"""1.0 where the answer part, NFKC-normalised and trimmed, equals the column `answer`, else 0.0; None without one.

    If the answer part holds exactly one `\boxed{}`, its content is compared instead; a truncated completion needs one.
    """
    return [_exact(sample, gold) for sample, gold in zip(written(completions, prefill, truncated), answer, strict=True)]


def _exact(sample: Written, gold_value: Any) -> float | None:
    gold = gold_text(gold_value)
    if gold is None:
        return None
    part = sample.part
    if part is None or len(part) > 4 * len(gold) + 10_000:
        return 0.0
    boxed = boxes(part)
    in_box = len(boxed) == 1 and part.count("\\boxed") == 1
    if sample.truncated and not in_box:
        return 0.0
    wanted = unicodedata.normalize("NFKC", gold).strip()
    return float(unicodedata.normalize("NFKC", boxed[0] if in_box else part).strip() == wanted)
