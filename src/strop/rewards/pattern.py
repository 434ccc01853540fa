"""The `regex_answer` reward, and the rules for a pattern that runs over what a model wrote."""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections import deque
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from ..errors import RewardError
from .answers import Written, gold_text, written
from .contract import reward

PATTERN_TAIL = 160
"""Characters at the end of the answer part that a pattern is matched against."""
MAX_PATTERN_CHARS = 200
MAX_WAYS = 4 * (PATTERN_TAIL + 1) ** 3
"""Bound on the product of what each repeat of a pattern can match: three open repeats and two optional parts."""

_REFUSED = ("GROUPREF", "GROUPREF_EXISTS", "GROUPREF_IGNORE")


@reward(kind="correctness", version="1")
def regex_answer(
    completions: Sequence[Any],
    answer: Sequence[Any],
    prefill: Sequence[str] | None = None,
    truncated: Sequence[bool] | None = None,
    *,
    pattern: str = "",
    **_: Any,
) -> list[float | None]:
    r"""1.0 where the group of the option `pattern` holds the column `answer`, else 0.0; None where `answer` is missing.

    The last match in the last 160 characters after the thinking part counts; group and answer are compared as text,
    NFKC-normalised and trimmed. In a truncated completion something has to follow the match. Raises RewardError for a
    pattern that is missing, is no regular expression, has not exactly one group, or could take long: see
    `compile_pattern`.
    """
    compiled = compile_pattern(pattern, option="rewards.options.regex_answer.pattern", groups=1)
    return [
        _matched(sample, gold, compiled)
        for sample, gold in zip(written(completions, prefill, truncated), answer, strict=True)
    ]


def _matched(sample: Written, gold_value: Any, compiled: re.Pattern[str]) -> float | None:
    gold = gold_text(gold_value)
    if gold is None:
        return None
    part = sample.part
    if part is None:
        return 0.0
    end = part.rstrip()[-PATTERN_TAIL:]
    last = next(iter(deque(compiled.finditer(end), maxlen=1)), None)
    if last is None or last[1] is None or (sample.truncated and last.end() == len(end)):
        return 0.0
    return float(unicodedata.normalize("NFKC", last[1]).strip() == unicodedata.normalize("NFKC", gold).strip())


def compile_pattern(pattern: str, *, option: str, groups: int | None = None) -> re.Pattern[str]:
    """Return a compiled pattern that takes bounded time on `PATTERN_TAIL` characters.

    Python's engine goes back over every way to match. Refused for that reason are a repeat or alternatives inside a
    repeat (`(a+)*`, `(a|ab)*`), references to groups, and more ways than three open repeats and two optional parts
    have. Raises RewardError with `option` as the setting to change.
    """
    if not isinstance(pattern, str) or not pattern:
        raise _refusal(option, pattern, "a regular expression is needed", r"for example 'Answer: (\S+)\s*\Z'")
    return _compiled(pattern, option, groups)


@lru_cache(maxsize=256)
def _compiled(pattern: str, option: str, groups: int | None) -> re.Pattern[str]:
    if len(pattern) > MAX_PATTERN_CHARS:
        raise _refusal(option, pattern, f"it has {len(pattern)} characters, at most {MAX_PATTERN_CHARS}", "shorten it")
    try:
        compiled = re.compile(pattern)
        tree = importlib.import_module("re._parser").parse(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        raise _refusal(option, pattern, f"it is no regular expression: {e}", "correct it") from e
    if groups is not None and compiled.groups != groups:
        raise _refusal(
            option, pattern, f"it has {compiled.groups} groups, {groups} is needed",
            "write (...) around the answer, and (?:...) for every other group",
        )  # fmt: skip
    ways, problem = _ways(tree, repeated=False)
    if problem or ways > MAX_WAYS:
        raise _refusal(
            option, pattern, problem or "its repeats can match in too many ways",
            "use character classes, one repeat after the other, and at most three of `*`, `+` and `{n,}`",
        )  # fmt: skip
    return compiled


def _refusal(option: str, pattern: Any, problem: str, advice: str) -> RewardError:
    shown = repr(pattern)[:MAX_PATTERN_CHARS]
    return RewardError(f"{option}: {shown} cannot be used: {problem}", hint=f"change {option}: {advice}")


def _ways(tree: Iterable[tuple[Any, Any]], *, repeated: bool) -> tuple[int, str]:
    """Return a bound on the ways in which a parsed pattern can match at one place, and what is wrong with it."""
    ways = 1
    for operator, argument in tree:
        name = str(operator)
        if name in _REFUSED:
            return ways, "it refers to a group"
        inner: list[tuple[int, str]] = []
        if name.endswith("REPEAT"):
            least, most, body = argument
            most = min(int(most), PATTERN_TAIL)
            if repeated and most != least:
                return ways, "a repeat stands inside a repeat"
            ways *= most - least + 1
            inner = [_ways(body, repeated=repeated or most > 1)]
        elif name == "BRANCH":
            if repeated:
                return ways, "alternatives stand inside a repeat"
            ways *= len(argument[1])
            inner = [_ways(branch, repeated=False) for branch in argument[1]]
        elif name == "SUBPATTERN":
            inner = [_ways(argument[3], repeated=repeated)]
        elif name in ("ASSERT", "ASSERT_NOT"):
            inner = [_ways(argument[1], repeated=repeated)]
        elif name == "ATOMIC_GROUP":
            inner = [_ways(argument, repeated=repeated)]
        for count, problem in inner:
            if problem:
                return ways, problem
            ways *= count
    return ways, ""
