r"""The `math` reward: exact paths first, then math-verify on answers whose size is bounded beforehand.

math-verify stops long computations with SIGALRM, which works in no thread and makes a verdict depend on the load of
the machine. It runs here without its clock; `within_budget` refuses what could run long, and the pool kills what still
does.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ..errors import RewardError
from .answers import (
    MAX_ANSWER_CHARS,
    after_hashes,
    answer_part,
    completion_text,
    fold,
    last_box,
    last_number,
    parse_number,
    reference_answer,
    tail,
)

GOLD_COLUMNS = ("answer", "solution", "ground_truth")
MAX_GOLD_CHARS = 512
MAX_DEPTH = 8
MAX_OPERATORS = 64
MAX_COMMANDS = 40
MAX_FUNCTIONS = 8
MAX_INTEGER_DIGITS = 15
MAX_EXPONENT = 20
MAX_EXPONENT_PRODUCT = 1_000
MAX_ANGLE_FACTOR = 100
MAX_LOGARITHM_FACTOR = 100_000

_SPAN = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_GOLD_ONLY = re.compile(
    r"!|%|\\(?:[dt]?binom|choose|sum|prod|i*int|oint|lim|pm|mp|bmod|pmod|mod|gcd|begin|neq|approx|lor|vee|cup)(?![A-Za-z])"
    r"|(?<![A-Za-z])(?:or|and)(?![A-Za-z])|[<>]"
)
_TRIGONOMETRIC = re.compile(r"sin|cos|tan|cot|sec|csc")
_LOGARITHMIC = re.compile(r"log|ln|lg|exp")
_FUNCTION = re.compile(r"\\(?:(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|sqrt|min|max|operatorname)(?![A-Za-z])")
_EXPONENT = re.compile(r"(?P<base>.?) ?\^ ?(?:\{(?P<group>[^{}]*(?:\{[^{}]*\}[^{}]*)*)\}|(?P<single>\\?\w))")
_ASSIGNMENT = re.compile(r"\s*(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?)?(?:\([A-Za-z]\))?\s*=")


def math_reward(completions: Sequence[Any], prefill: Sequence[str] | None = None, **columns: Any) -> list[float | None]:
    r"""1.0 where the final answer equals the reference, 0.0 where not, None where the reference cannot be read.

    The final answer is the last `\boxed{}` after the thinking part, else the text after `####`, the last `$...$`, a
    short answer as a whole, or the last number. The reference is the column `answer`, else `solution`, else
    `ground_truth`. A number is compared exactly and has to be written as one number; `2+2` is not 4. Only other answers
    go to math-verify. Raises RewardError if the rows have none of the three columns.
    """
    column = next((name for name in GOLD_COLUMNS if columns.get(name) is not None), None)
    if column is None:
        raise RewardError(
            f"reward `math` needs a column `answer`, `solution` or `ground_truth`; the rows have {sorted(columns)}",
            hint="rename the reference column of the data set, or take another function in rewards.funcs",
        )
    golds = [
        next((columns[name][i] for name in GOLD_COLUMNS if name in columns and columns[name][i] is not None), None)
        for i in range(len(completions))
    ]
    prefills = prefill if prefill is not None else [""] * len(completions)
    return [
        _score(completion_text(completion), gold, start)
        for completion, gold, start in zip(completions, golds, prefills, strict=True)
    ]


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


def _score(text: str, gold_value: Any, prefill: str) -> float | None:
    gold = reference_answer(gold_value)
    if gold is None or len(gold) > MAX_GOLD_CHARS:
        return None
    gold_number = parse_number(gold)
    gold_key = _key(gold)
    is_word = gold_key.isalpha() and len(gold_key) > 1
    if not gold_key or (gold_number is None and not is_word and not _parse_gold(gold)):
        return None
    part = answer_part(text, prefill)
    answer = None if part is None else _final_answer(tail(part))
    if not answer or len(answer) > MAX_ANSWER_CHARS:
        return 0.0
    if _key(answer) == gold_key:
        return 1.0
    if gold_number is not None:
        return float(parse_number(answer) == gold_number)
    if is_word or not within_budget(fold(answer), fold(gold)):
        return 0.0
    return float(_equivalent(gold, fold(answer)))


def _final_answer(end: str) -> str | None:
    boxed = last_box(end)
    if boxed is not None:
        return boxed
    hashes = after_hashes(end)
    if hashes is not None:
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


def within_budget(answer: str, gold: str) -> bool:
    """Whether an answer is small enough to be parsed and compared, and uses no construct that the reference lacks.

    Bounds length, nesting, digits, operators, functions and exponents; refuses factorials, sums, integrals, percent
    signs, alternatives and chains of `=` unless the reference has them.
    """
    if (
        len(answer) > MAX_ANSWER_CHARS
        or not answer.isprintable()
        or "**" in answer
        or re.search(r"\d[eE][+-]?\d", answer)
    ):
        return False
    if any(len(digits) > MAX_INTEGER_DIGITS for digits in re.findall(r"\d+", answer)) or _depth(answer) > MAX_DEPTH:
        return False
    if len(re.findall(r"[-+*/^=,]", answer)) > MAX_OPERATORS or answer.count("\\") > MAX_COMMANDS:
        return False
    if len(_FUNCTION.findall(answer)) > MAX_FUNCTIONS or not _exponents_are_small(answer, gold):
        return False
    return _factors_are_small(answer, gold) and _no_new_constructs(answer, gold)


def _depth(text: str) -> int:
    depth = deepest = 0
    for ch in text:
        depth += (ch in "([{") - (ch in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _exponents_are_small(answer: str, gold: str) -> bool:
    matches = list(_EXPONENT.finditer(answer))
    if len(matches) != answer.count("^"):  # a tower, `^(`, or an unclosed group
        return False
    known = {_exponent_text(match) for match in _EXPONENT.finditer(gold)}
    product = 1
    for match in matches:
        exponent = _exponent_text(match)
        digits = re.findall(r"\d+", exponent)
        if "^" in exponent or "!" in exponent:
            return False
        if exponent in known:
            continue
        size = math.prod(max(int(d), 1) for d in digits)
        if size > MAX_EXPONENT or sum(map(len, digits)) > 4:
            return False
        product *= max(size, 1)
    return product <= MAX_EXPONENT_PRODUCT


def _factors_are_small(answer: str, gold: str) -> bool:
    """Whether SymPy can expand sin(n x), a polynomial of degree n, and contract n log(m), the integer m^n."""
    if _TRIGONOMETRIC.search(answer):
        limit = MAX_ANGLE_FACTOR
    elif _LOGARITHMIC.search(answer):
        limit = MAX_LOGARITHM_FACTOR
    else:
        return True
    known = set(re.findall(r"\d+", gold))
    factor = math.prod(max(int(digits), 1) for digits in re.findall(r"\d+", answer) if digits not in known)
    powers = [match for match in _EXPONENT.finditer(answer) if match["base"].isdigit() or match["base"] in (")", "}")]
    exponents = [int(digits) for match in powers for digits in re.findall(r"\d+", _exponent_text(match))]
    return factor <= limit and factor ** max(exponents, default=1) <= limit


def _exponent_text(match: re.Match[str]) -> str:
    return (match["group"] if match["group"] is not None else match["single"]).replace(" ", "")


def _no_new_constructs(answer: str, gold: str) -> bool:
    if "=" in gold:
        if answer.count("=") > gold.count("="):
            return False
    elif "=" in answer and (answer.count("=") > 1 or not _ASSIGNMENT.match(answer)):
        return False
    allowed = _GOLD_ONLY.findall(gold)
    for construct in _GOLD_ONLY.findall(answer):
        if construct not in allowed:
            return False
        allowed.remove(construct)
    return not any(int(digits) > 20 for digits in re.findall(r"(\d+) ?!", answer)) and not re.search(
        r"[)}!] ?!", answer
    )


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
