"""Which formulas may be parsed and compared: structural limits, read off the text before anything works on it.

They take the place of a clock. What stays within them ends in seconds; what does not is refused, or compared as text
where it is the reference. They were found by running what the tests hold against math-verify without its clock.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

from .answers import MAX_ANSWER_CHARS

MAX_DEPTH = 8
MAX_OPERATORS = 64
MAX_COMMANDS = 40
MAX_FUNCTIONS = 8
MAX_INTEGER_DIGITS = 15
MAX_EXPONENT = 20
MAX_EXPONENT_PRODUCT = 1_000
MAX_EXPANDED_TERMS = 300
MAX_EXPANDED_TERMS_BESIDE_FUNCTIONS = 30
MAX_GOLD_EXPONENT = 1_000
MAX_FACTORIAL = 20
MAX_ANGLE_FACTOR = 24
"""SymPy doubles angles: beside a polynomial, sin(32 x) takes minutes."""
MAX_LOGARITHM_FACTOR = 100_000

_UNBOUNDED = re.compile(r"\\(?:sum|prod|i*int|oint|lim)(?![A-Za-z])|\*\*|\d[eE][+-]?\d")
"""What can take any time, however short it is written."""
_GOLD_ONLY = re.compile(
    r"!|%|\\(?:[dt]?binom|choose|pm|mp|bmod|pmod|mod|gcd|begin|neq?|approx|sim|to|max|min|lor|vee|cup)(?![A-Za-z])"
    r"|(?<![A-Za-z])(?:or|and)(?![A-Za-z])|[<>]"
)
_TRIGONOMETRIC = re.compile(r"sin|cos|tan|cot|sec|csc")
_LOGARITHMIC = re.compile(r"log|ln|lg|exp")
_BINOMIAL = re.compile(r"binom|choose|bmod|pmod|mod|gcd")
_FUNCTION = re.compile(r"\\(?:(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|sqrt|min|max|operatorname)(?![A-Za-z])")
_EXPONENT = re.compile(r"(?P<base>.?) ?\^ ?(?:\{(?P<group>[^{}]*(?:\{[^{}]*\}[^{}]*)*)\}|(?P<single>\\?\w))(?! ?\^)")
_TEXT = re.compile(r"\\(?:text|textrm|textbf|mathrm|mbox) ?\{[^{}]*\}")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}")
"""Prose, which would be read as a product of letters."""
_ASSIGNMENT = re.compile(r"\s*(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?)?(?:\([A-Za-z]\))?\s*=")


def within_budget(answer: str, gold: str) -> bool:
    """Whether an answer is small enough to be parsed and compared, and uses no construct that the reference lacks.

    Bounds length, nesting, digits, operators, functions and exponents; refuses sums, products, integrals and limits,
    and trigonometric functions, logarithms, factorials, percent signs, alternatives and chains of `=` unless the
    reference has such.
    """
    if len(answer) > MAX_ANSWER_CHARS or not _is_plain(answer, MAX_INTEGER_DIGITS):
        return False
    return _exponents_are_small(answer, gold) and _factors_are_small(answer) and _no_new_constructs(answer, gold)


@lru_cache(maxsize=4096)
def gold_within_budget(gold: str) -> bool:
    """Whether a reference may be parsed; the answers to it that are within their budget can then be compared."""
    if not _is_plain(gold, MAX_INTEGER_DIGITS):
        return False
    matches = list(_EXPONENT.finditer(gold))
    if len(matches) != gold.count("^"):
        return False
    has_functions = _TRIGONOMETRIC.search(gold) or _LOGARITHMIC.search(gold)
    for match in matches:
        exponent = _exponent_text(match)
        limit = MAX_GOLD_EXPONENT if match["base"].isalnum() and not has_functions else MAX_EXPONENT
        if "^" in exponent or "!" in exponent or _product(re.findall(r"\d+", exponent)) > limit:
            return False
    is_small = _expansions_are_small(gold, matches, gold) and _factors_are_small(gold)
    return is_small and _factorials_are_small(gold, MAX_GOLD_EXPONENT)


def _is_plain(text: str, digits: int) -> bool:
    return (
        text.isprintable()
        and not _UNBOUNDED.search(text)
        and all(len(number) <= digits for number in re.findall(r"\d+", text))
        and _depth(text) <= MAX_DEPTH
        and len(re.findall(r"[-+*/^=,]", text)) <= MAX_OPERATORS
        and text.count("\\") <= MAX_COMMANDS
        and len(_FUNCTION.findall(text)) <= MAX_FUNCTIONS
    )


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
    # A large power that the reference has may be used as often as there; its base must be one sign.
    known = [(m["base"], _exponent_text(m)) for m in _EXPONENT.finditer(gold) if m["base"].isalnum()]
    product, limit = 1, MAX_EXPONENT_PRODUCT
    for match in matches:
        exponent = _exponent_text(match)
        digits = re.findall(r"\d+", exponent)
        if "^" in exponent or "!" in exponent:
            return False
        size = _product(digits)
        if size <= MAX_EXPONENT and sum(map(len, digits)) <= 4:
            product *= size
        elif (match["base"], exponent) in known:
            known.remove((match["base"], exponent))
            limit = MAX_EXPONENT
        else:
            return False
    return product <= limit and _expansions_are_small(answer, matches, gold)


def _expansions_are_small(text: str, powers: list[re.Match[str]], gold: str) -> bool:
    """Whether the powers of brackets, multiplied out, have few terms: C(n + t, t) for an exponent n and t + 1 terms."""
    has_functions = _TRIGONOMETRIC.search(gold) or _LOGARITHMIC.search(gold)
    signs = len(re.findall(r"[-+]", text))
    terms = 1
    for power in powers:
        if power["base"] in (")", "}", "]"):
            exponent = _product(re.findall(r"\d+", _exponent_text(power)))
            terms *= math.comb(exponent + signs, signs)
    return terms <= (MAX_EXPANDED_TERMS_BESIDE_FUNCTIONS if has_functions else MAX_EXPANDED_TERMS)


def _factors_are_small(text: str) -> bool:
    """Whether SymPy can expand sin(n x), a polynomial of degree n, and contract n log(m), the integer m^n."""
    numbers = re.findall(r"\d+", text)
    if _BINOMIAL.search(text) and any(int(digits) > MAX_GOLD_EXPONENT for digits in numbers):
        return False
    if _TRIGONOMETRIC.search(text):
        limit = MAX_ANGLE_FACTOR
    elif _LOGARITHMIC.search(text):
        limit = MAX_LOGARITHM_FACTOR
    else:
        return True
    factor = _product(numbers)
    powers = [match for match in _EXPONENT.finditer(text) if match["base"].isdigit() or match["base"] in (")", "}")]
    exponents = [int(digits) for match in powers for digits in re.findall(r"\d+", _exponent_text(match))]
    return factor <= limit and factor ** max(exponents, default=1) <= limit


def _product(digits: list[str]) -> int:
    return math.prod(max(int(number), 1) for number in digits)


def _exponent_text(match: re.Match[str]) -> str:
    return (match["group"] if match["group"] is not None else match["single"]).replace(" ", "")


def _no_new_constructs(answer: str, gold: str) -> bool:
    if "=" in gold:
        if answer.count("=") > gold.count("="):
            return False
    elif "=" in answer and (answer.count("=") > 1 or not _ASSIGNMENT.match(answer)):
        return False
    if any(family.search(answer) and not family.search(gold) for family in (_TRIGONOMETRIC, _LOGARITHMIC)):
        return False
    if any(word not in gold for word in _WORD.findall(_TEXT.sub(" ", answer))):
        return False
    allowed = _GOLD_ONLY.findall(gold)
    for construct in _GOLD_ONLY.findall(answer):
        if construct not in allowed:
            return False
        allowed.remove(construct)
    return _factorials_are_small(answer, MAX_FACTORIAL)


def _factorials_are_small(text: str, limit: int) -> bool:
    return not re.search(r"[)}!] ?!", text) and all(int(n) <= limit for n in re.findall(r"(\d+) ?!", text))
