"""Completions whose worth is known: the reference answer of a row in the form that a run asks for, and a wrong one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import permutations, product
from typing import Any, Literal

from ...types import Problem
from ..answers import gold_text, opens_thinking, parse_number, reference_answer

THOUGHT = "I work it out."
GOLD_COLUMNS = ("answer", "solution", "ground_truth")
MAX_SOLVED_NUMBERS = 5
"""Countdown problems with more numbers are not solved by search."""
MAX_GOLD_CHARS = 2000

Reasoning = Literal["think", "prose", "none"]
GoldKind = Literal["number", "expression", "text", "completion"]

_FORMS: Mapping[str, tuple[str, str, str]] = {
    "boxed": ("\\boxed{", "}", "\\boxed"),
    "answer tag": ("<answer>", "</answer>", "<answer>"),
    "hashes": ("#### ", "", "####"),
    "answer line": ("Answer: ", "", "Answer:"),
    "bare": ("", "", "\0"),
    "sentence": ("The answer is ", ".", "The answer is"),
    "tag on lines": ("<answer>\n", "\n</answer>", "<answer>\n"),
    "code block": ("```python\n", "\n```", "```"),
    "json block": ("```json\n", "\n```", "JSON"),
}
"""What stands before and after an answer, and what a prompt that asks for this form contains."""


@dataclass(frozen=True, slots=True)
class Style:
    """How an answer is put into a completion."""

    name: str
    before: str
    after: str
    reasoning: Reasoning

    def write(self, answer: str, prefill: str, thought: str = THOUGHT) -> str:
        """Return a completion with this answer; `prefill` is what the chat template already wrote."""
        end = f"{self.before}{answer}{self.after}"
        if self.reasoning == "none" or (self.reasoning == "prose" and not thought):
            return end
        if self.reasoning == "prose":
            return f"{thought}\n{end}"
        opening = "" if opens_thinking(prefill) else "<think>\n"
        return f"{opening}{thought}\n</think>\n{end}"


@dataclass(frozen=True, slots=True)
class Gold:
    """A right answer of a row, and a wrong one of the same kind."""

    text: str
    wrong: str
    kind: GoldKind
    """`completion`: the text is a whole known-good completion, in no style of ours."""


def styles_for(problem: Problem) -> list[Style]:
    """Return the styles in which an answer may be expected, those that the prompt names first."""
    said = problem.prompt if isinstance(problem.prompt, str) else "\n".join(m["content"] for m in problem.prompt)
    forms = sorted(_FORMS, key=lambda name: _FORMS[name][2] not in said)
    if opens_thinking(problem.prefill):
        modes: tuple[Reasoning, ...] = ("think",)
    elif "<think>" in said:
        modes = ("think", "prose", "none")
    else:
        modes = ("prose", "think", "none")
    return [
        Style(f"{form}, {'no' if mode == 'none' else mode} reasoning", *_FORMS[form][:2], mode)
        for form in forms
        for mode in modes
    ]


def golds_of(
    problems: Sequence[Problem], column: str | None, known: Mapping[str, str]
) -> list[Gold | None]:
    """Return a right and a wrong answer for each problem; None where the row tells no right one.

    `column` names the column with right answers (default: the usual ones, or a search for countdown rows); `known` are
    whole completions by problem id, which take precedence.
    """
    texts = [known.get(p.id) or _gold_text(p.row, column) for p in problems]
    return [
        None if text is None else _gold(problem, text, texts, whole=problem.id in known)
        for problem, text in zip(problems, texts, strict=True)
    ]


def _gold_text(row: Mapping[str, Any], column: str | None) -> str | None:
    if column is not None:
        return gold_text(row.get(column))
    numbers, target = countdown_row(row)
    if numbers and target is not None:
        given = row.get("solution")
        return given if isinstance(given, str) else solve(numbers, target)
    for name in GOLD_COLUMNS:
        text = reference_answer(row.get(name))
        if text is not None:
            return text if len(text) <= MAX_GOLD_CHARS else None
    return None


def _gold(problem: Problem, text: str, others: Sequence[str | None], *, whole: bool) -> Gold:
    another = next((o for o in others if o is not None and differs(o, text)), None)
    if whole:
        return Gold(text, another or "", "completion")
    numbers, target = countdown_row(problem.row)
    if numbers and target is not None:
        return Gold(text, wrong_expression(numbers, target), "expression")
    number = parse_number(text)
    if number is not None:
        return Gold(text, str(number.value + 1), "number")
    if len(text) == 1 and text in "ABCDEFGH":
        return Gold(text, "B" if text != "B" else "A", "text")
    return Gold(text, another or f"not {text}, but another", "text")


def differs(one: str, other: str) -> bool:
    """Whether two answers are different for sure: by value where both are numbers, else by their letters and digits."""
    a, b = parse_number(one), parse_number(other)
    if a is not None and b is not None:
        return a.value != b.value
    return _letters(one) != _letters(other)


def _letters(text: str) -> str:
    return "".join(ch for ch in text.casefold() if ch.isalnum())


def countdown_row(row: Mapping[str, Any]) -> tuple[list[int], int | None]:
    """Return numbers and target of a countdown row, or ([], None)."""
    pool = row.get("numbers", row.get("nums"))
    listed = pool.tolist() if hasattr(pool, "tolist") else pool
    target = row.get("target")
    if not isinstance(listed, list | tuple) or isinstance(target, bool):
        return [], None
    try:
        return [int(n) for n in listed], int(target)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return [], None


_STEPS: Mapping[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
}  # fmt: skip


def solve(numbers: Sequence[int], target: int) -> str | None:
    """Return an expression with + - * / that uses each number once and equals the target; None if none is found."""
    if len(numbers) > MAX_SOLVED_NUMBERS:
        return None
    found = _search([(Fraction(n), str(n)) for n in numbers], Fraction(target))
    return None if found is None else found.removeprefix("(").removesuffix(")") if len(numbers) > 1 else found


def _search(terms: list[tuple[Fraction, str]], target: Fraction) -> str | None:
    if len(terms) == 1:
        return terms[0][1] if terms[0][0] == target else None
    for i, j in permutations(range(len(terms)), 2):
        (a, left), (b, right) = terms[i], terms[j]
        rest = [term for k, term in enumerate(terms) if k not in (i, j)]
        for sign, step in _STEPS.items():
            if (sign in "+*" and i > j) or (sign == "/" and not b):
                continue
            found = _search([*rest, (step(a, b), f"({left} {sign} {right})")], target)
            if found is not None:
                return found
    return None


def wrong_expression(numbers: Sequence[int], target: int) -> str:
    """Return an expression that obeys the rules of countdown and misses the target."""
    for signs in product("+*-", repeat=len(numbers) - 1):
        value, text = Fraction(numbers[0]), str(numbers[0])
        for sign, number in zip(signs, numbers[1:], strict=True):
            value, text = _STEPS[sign](value, Fraction(number)), f"({text} {sign} {number})"
        if value != target:
            return text.removeprefix("(").removesuffix(")") if len(numbers) > 1 else text
    return f"{numbers[0]} + 1"


FORBIDDEN: Sequence[tuple[tuple[int, ...], int, str]] = (
    ((2, 3, 1), 9, "2**3+1"), ((5, 0, 7), 8, "5**0+7"), ((7, 2, 1), 4, "7//2+1"), ((2, 5), 4, "2/.5"),
    ((17, 9), 17, "17.000009"), ((1, 2, 3), 9, "12-3"), ((2, 3, 4), 4, "(2,3,4)[2]"), ((8, 3), 5, "8-3 #"),
)  # fmt: skip
"""(numbers, target, expression that reaches it by what countdown does not allow, and by nothing that it does allow)."""


def with_numbers(problem: Problem, numbers: Sequence[int], target: int) -> Problem:
    """Return a countdown problem with other numbers; the rest of its row stays."""
    pool = "numbers" if "numbers" in problem.row else "nums"
    row = {**problem.row, pool: list(numbers), "target": target}
    return replace(problem, id=f"{problem.id} with {list(numbers)} and {target}", row=row)
