"""From the text of a completion to its answer, and from an answer to a number.

Everything is a pure function of its arguments and bounded by the caps below before any parsing starts.
"""

from __future__ import annotations

import numbers
import re
import unicodedata
from collections import deque
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

ANSWER_TAIL = 2000
"""Characters at the end of the answer part in which a final answer is looked for."""
MAX_ANSWER_CHARS = 256
"""A boxed answer longer than this is no answer."""
MAX_NUMBER_CHARS = 128
MAX_DIGITS = 64
MAX_NESTED_BOXES = 8

_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d"), "-")
_SLASHES = {0x2044: "/", 0x2215: "/"}
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_FOLDED_FORMS = ("<wide>", "<narrow>", "<font>", "<noBreak>")

_BOX_TOKEN = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3})?"
_FRACTION = re.compile(
    rf"(?P<whole>\d+(?= |\\))? ?(?:(?P<a>{_DECIMAL}) ?/ ?(?P<b>{_DECIMAL})"
    rf"|\\[dt]?frac ?(?:\{{ ?(?P<sign>[+-]?) ?(?P<c>{_DECIMAL}) ?\}} ?\{{ ?(?P<d>{_DECIMAL}) ?\}}|(?P<e>\d)(?P<f>\d)))"
)
_PLAIN = re.compile(_DECIMAL)
_PREFIX = re.compile(r"(?:[A-Za-z] ?= ?)?(?P<sign>[+-]?) ?[$£€¥₹]? ?(?P<late>[+-]?) ?")
_UNIT = re.compile(
    r" ?(?:\\(?:text|textrm|textbf|mathrm|mbox) ?\{(?P<text>[A-Za-z .]{1,32})\}"
    r"|(?P<word>(?<= )(?:[A-Za-z]{3,16}|[cmk]m|[mk]g|ml|ft|lb|oz|mi|hr)))$"
)
_SAME_UNIT = {
    "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "meter": "m", "metre": "m",
    "kilometer": "km", "kilometre": "km", "gram": "g", "kilogram": "kg", "liter": "l", "litre": "l", "feet": "ft",
    "foot": "ft", "inche": "in", "inch": "in", "mile": "mi", "pound": "lb", "ounce": "oz", "hour": "h", "hr": "h",
    "minute": "min", "second": "s", "sec": "s", "buck": "dollar",
}  # fmt: skip
_CURRENCIES = {"£": "pound sterling", "€": "euro", "¥": "yen", "₹": "rupee"}
"""`$` is not among them: it marks a formula as often as dollars."""
_DEGREES = re.compile(r" ?(?:\^ ?(?:\\circ|\{ ?\\circ ?\})|°)$")
_NOT_A_UNIT = re.compile(
    "and|or|to|not|plus|minus|times|half|quarter|third|dozen|percent|hundred|thousand|million|billion|trillion"
)
_WRAPPED = re.compile(
    r"\\\((?P<a>.*)\\\)|\\\[(?P<b>.*)\\\]|\{(?P<c>[^{}]*)\}|\*\*(?P<d>.*)\*\*"
    r"|\\(?:text|textbf|mathbf|mathrm|mathit|bf) ?\{(?P<e>[^{}]*)\}"
)
_NOT_MEANT = re.compile(r"(?:\bnot|n['\u2019]t|\bnever|\bor)(?: equal to)?\s+$", re.IGNORECASE)
_LAST_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_^.{/\\])[+-]?(?:\\?\$)?"
    r"(?:\\[dt]?frac\{\d+\}\{\d+\}|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3})?(?:/\d+)?|\.\d+)"
    r"(?:\\?%)?"
)


class Written(NamedTuple):
    """One completion as the functions of the library see it."""

    text: str
    prefill: str
    truncated: bool
    """Whether it ran into the length limit: then only an answer that is closed by a mark counts."""

    @property
    def part(self) -> str | None:
        """What follows the thinking part; see `answer_part`."""
        return answer_part(self.text, self.prefill)


class Number(NamedTuple):
    """An exact value and what stood beside it; `50%` is 50 with a percent sign, never 0.5."""

    value: Fraction
    percent: bool
    unit: str = ""
    """The unit in one spelling (`feet` is `ft`), empty without one."""

    def fits(self, other: Number) -> bool:
        """Whether the units agree; a number without one fits any."""
        return not self.unit or not other.unit or self.unit == other.unit


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a completion in TRL's form: plain text, or a message list whose last content counts."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else ""
    return content if isinstance(content, str) else ""


def written(
    completions: Sequence[Any], prefill: Sequence[str] | None = None, truncated: Sequence[Any] | None = None
) -> list[Written]:
    """Return every completion with its prefill and whether it was cut off; both may be missing as a whole."""
    starts = prefill if prefill is not None else [""] * len(completions)
    cut = truncated if truncated is not None else [False] * len(completions)
    return [
        Written(completion_text(completion), start, bool(flag))
        for completion, start, flag in zip(completions, starts, cut, strict=True)
    ]


def opens_thinking(prefill: str) -> bool:
    """Whether the chat template left a `<think>` open, so that the completion starts inside it."""
    return prefill.rfind("<think>") > prefill.rfind("</think>")


def answer_part(text: str, prefill: str = "") -> str | None:
    """Return what follows the thinking part, or None while a `<think>` is still open at the end.

    `prefill` is what the chat template already wrote; a completion without any tag is its own answer.
    """
    full = prefill + text
    opened, closed = full.rfind("<think>"), full.rfind("</think>")
    if opened > closed:
        return None
    return full[closed + len("</think>") :] if closed >= 0 else full


def boxes(text: str) -> list[str]:
    r"""Return the contents of the complete `\boxed{...}` groups, in the order in which they close."""
    found: list[str] = []
    open_groups: list[tuple[bool, int]] = []
    for token in _BOX_TOKEN.finditer(text):
        mark = token.group()
        if mark.endswith("{") and mark != r"\{":
            open_groups.append((len(mark) > 1, token.end()))
        elif mark == "}" and open_groups:
            is_box, start = open_groups.pop()
            if is_box:
                found.append(text[start : token.start()])
    return found


def last_box(text: str) -> str | None:
    r"""Return the content of the last complete `\boxed{...}`, with a box directly inside it opened as well."""
    found = boxes(text)
    if not found:
        return None
    inner = found[-1].strip()
    for _ in range(MAX_NESTED_BOXES):
        if not inner.startswith("\\boxed") or not inner.endswith("}"):
            break
        nested = boxes(inner)
        if not nested or len(inner) != len("\\boxed{}") + len(nested[-1]):
            break
        inner = nested[-1].strip()
    return inner


def after_hashes(text: str, *, whole_line: bool = False) -> str | None:
    """Return the rest of the line after the last `####` (GSM8K's mark), or None.

    With `whole_line` only if a line break follows it, so that a text that was cut off cannot end in half a number.
    """
    _, mark, rest = text.rpartition("####")
    line, ended, _ = rest.lstrip().partition("\n")
    return line.strip() if mark and (ended or not whole_line) else None


def last_number(text: str) -> str | None:
    """Return the last number of a text as written, signs, fractions and a percent sign included.

    None if it is denied or one of two: `not 81`, `80 or 81`.
    """
    folded = fold(text).replace("{,}", ",")
    last = next(iter(deque(_LAST_NUMBER.finditer(folded), maxlen=1)), None)
    if last is None or _NOT_MEANT.search(folded, max(0, last.start() - 32), last.start()):
        return None
    return last.group()


def tail(part: str) -> str:
    """Return the end of an answer part, where a final answer is looked for."""
    return part.rstrip()[-ANSWER_TAIL:]


def fold(text: str) -> str:
    """Map look-alikes to ASCII: any script's digits, full-width forms, dashes, spaces; drop invisible characters.

    Superscripts and vulgar fractions keep their form, since NFKC would turn `5²` into `52`. Characters that reverse the
    direction of writing stay as well, so that no number is read from a text that shows another one.
    """
    if text.isascii():
        return text
    return "".join(_fold_char(ch) for ch in text.translate(_DASHES).translate(_SLASHES))


def _fold_char(ch: str) -> str:
    if ch < "\x80" or ch in _BIDI:
        return ch
    digit = unicodedata.decimal(ch, None)
    if digit is not None:
        return str(digit)
    category = unicodedata.category(ch)
    if category == "Cf":
        return ""
    if category == "Zs":
        return " "
    return unicodedata.normalize("NFKC", ch) if unicodedata.decomposition(ch).startswith(_FOLDED_FORMS) else ch


def gold_text(value: Any) -> str | None:
    """Return a reference answer as text: strings as they are, numbers in their shortest exact form, else None."""
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, str):
        return value.strip() or None
    is_number = isinstance(value, numbers.Number)
    return str(value) if is_number and value == value else None  # NaN is how tables write a missing value


def reference_answer(value: Any) -> str | None:
    r"""Return the final answer within a reference: the last box, the text after `####`, else all of it."""
    text = gold_text(value)
    if text is None:
        return None
    boxed = last_box(text)
    return boxed if boxed is not None else (after_hashes(text) or text)


def parse_number(text: str) -> Number | None:
    r"""Read a text that is one number and nothing else; None if it is anything more.

    Understood: signs (U+2212 as well), currency, `1,234`, `1 234`, `1{,}234`, decimals, `1e3`, `3/4`, `\frac{3}{4}`,
    `1 1/2`, a percent sign, a unit word, `x = 5`, LaTeX and Markdown wrappers, a trailing dot. Sums, products, chains
    of `=`, lists and alternatives are not one number.
    """
    if len(text) > MAX_NUMBER_CHARS:
        return None
    body = _unwrap(fold(text))
    prefix = _PREFIX.match(body)
    assert prefix is not None, "every part of the prefix is optional"
    if prefix["sign"] and prefix["late"]:
        return None
    negative = "-" in (prefix["sign"], prefix["late"])
    body = body[prefix.end() :].rstrip("$ ")
    percent = body.endswith("%")
    body, unit = _split_unit(body[:-1].rstrip() if percent else body)
    value = _parse_unsigned(body)
    unit = unit or next((_CURRENCIES[ch] for ch in prefix.group() if ch in _CURRENCIES), "")
    return None if value is None else Number(-value if negative else value, percent, unit)


def _unwrap(text: str) -> str:
    """Remove wrappers and spacing commands that do not change a number."""
    body = text.replace("\\$", "$").replace("\\%", "%").replace("{,}", ",").replace("\\ ", " ").replace("~", " ")
    body = re.sub(r"\\[,!;:]", "", body)
    for _ in range(4):
        before = body
        body = re.sub(r"\s+", " ", body).lstrip().rstrip(" .")
        if body.startswith("$") and body.endswith("$"):
            body = body.strip("$")
        if wrapped := _WRAPPED.fullmatch(body):
            body = next(group for group in wrapped.groups() if group is not None)
        if body == before:
            break
    return body


def _split_unit(body: str) -> tuple[str, str]:
    if degrees := _DEGREES.search(body):
        return body[: degrees.start()], "degree"
    unit = _UNIT.search(body)
    if not unit or unit.start() == 0:
        return body, ""
    words = (unit["text"] or unit["word"]).lower().replace(".", " ").split()
    if any(_NOT_A_UNIT.fullmatch(word) for word in words):
        return body, ""
    return body[: unit.start()], " ".join(_unit_word(word) for word in words)


def _unit_word(word: str) -> str:
    singular = word[:-1] if len(word) > 2 and word.endswith("s") else word
    return _SAME_UNIT.get(singular, singular)


def _parse_unsigned(body: str) -> Fraction | None:
    if sum(ch.isdigit() for ch in body) > MAX_DIGITS:
        return None
    if _PLAIN.fullmatch(body):
        return _fraction(body)
    ratio = _FRACTION.fullmatch(body)
    if ratio is None:
        return None
    upper, lower = ratio["a"] or ratio["c"] or ratio["e"], ratio["b"] or ratio["d"] or ratio["f"]
    if not _fraction(lower) or (ratio["whole"] and ratio["sign"]):
        return None
    value = _fraction(upper) / _fraction(lower)
    return Fraction(ratio["whole"] or 0) + (-value if ratio["sign"] == "-" else value)


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").replace(" ", ""))
