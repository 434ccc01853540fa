"""Completions whose worth is known: the reference answer of a row in the form that a run asks for, and a wrong one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...types import Problem
from ..answers import gold_text, opens_thinking, parse_number, reference_answer
from ..scripts import script_of
from .solvers import WRONG_PROGRAM, countdown_row, json_answers, program_of, schema_of, solve, wrong_expression

THOUGHT = "I work it out."
_THOUGHTS: Mapping[str, str] = {
    "Arabic": "\u0623\u062d\u0633\u0628 \u0630\u0644\u0643.",
    "Chinese": "\u6211\u6765\u8ba1\u7b97\u3002",
    "Cyrillic": "\u042f \u0440\u0435\u0448\u0430\u044e \u044d\u0442\u043e.",
    "Devanagari": "\u092e\u0948\u0902 \u0939\u0932 \u0915\u0930\u0924\u093e \u0939\u0942\u0901\u0964",
    "Greek": "\u03a4\u03bf \u03bb\u03cd\u03bd\u03c9.",
    "Han": "\u6211\u6765\u8ba1\u7b97\u3002",
    "Hangul": "\uacc4\uc0b0\ud574 \ubcf8\ub2e4.",
    "Hebrew": "\u05d0\u05e0\u05d9 \u05e4\u05d5\u05ea\u05e8.",
    "Hiragana": "\u8a08\u7b97\u3057\u307e\u3059\u3002",
    "Japanese": "\u8a08\u7b97\u3057\u307e\u3059\u3002",
    "Katakana": "\u8a08\u7b97\u3057\u307e\u3059\u3002",
    "Korean": "\uacc4\uc0b0\ud574 \ubcf8\ub2e4.",
    "Thai": "\u0e09\u0e31\u0e19\u0e04\u0e34\u0e14.",
}
"""The same in other scripts, by the names of `scripts.SCRIPTS`."""
GOLD_COLUMNS = ("answer", "solution", "ground_truth")
MAX_GOLD_CHARS = 2000

Reasoning = Literal["tags", "think", "prose", "none"]
GoldKind = Literal["number", "expression", "text", "program", "json", "completion"]

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
_TAGS = re.compile(r"<([a-z][\w-]*)>(\s*).*?</\1>", re.DOTALL | re.IGNORECASE)
"""A pair of tags in a prompt, and whether it stands on lines of its own."""


@dataclass(frozen=True, slots=True)
class Style:
    """How an answer is put into a completion."""

    name: str
    before: str
    after: str
    reasoning: Reasoning
    opening: str = "<think>\n"
    closing: str = "\n</think>\n"
    """What stands around the reasoning, where it is in tags."""
    thought: str = THOUGHT

    def write(self, answer: str, prefill: str, thought: str | None = None) -> str:
        """Return a completion with this answer; `prefill` is what the chat template already wrote."""
        thought = self.thought if thought is None else thought
        end = f"{self.before}{answer}{self.after}"
        if self.reasoning == "none" or (self.reasoning == "prose" and not thought):
            return end
        if self.reasoning == "prose":
            return f"{thought}\n{end}"
        opening = "" if opens_thinking(prefill) else self.opening
        return f"{opening}{thought}{self.closing}{end}"


@dataclass(frozen=True, slots=True)
class Gold:
    """A right answer of a row, and a wrong one of the same kind."""

    text: str
    wrong: str
    kind: GoldKind
    """`completion`: the text is a whole known-good completion, in no style of ours."""


def styles_for(problem: Problem, script: str | None = None) -> list[Style]:
    """Return the styles in which an answer may be expected, those that the prompt names first.

    Reasoning is written in `script`, a name of `scripts.SCRIPTS`; by default in that of most letters of the prompt.
    """
    said = problem.prompt if isinstance(problem.prompt, str) else "\n".join(m["content"] for m in problem.prompt)
    shown = [] if opens_thinking(problem.prefill) else _shown_tags(said)
    forms = sorted(_FORMS, key=lambda name: _FORMS[name][2] not in said)
    if opens_thinking(problem.prefill):
        modes: tuple[Reasoning, ...] = ("think",)
    elif "<think>" in said:
        modes = ("think", "prose", "none")
    else:
        modes = ("prose", "think", "none")
    listed = shown + [
        Style(f"{form}, {'no' if mode == 'none' else mode} reasoning", *_FORMS[form][:2], mode)
        for form in forms
        for mode in modes
    ]
    thought = _THOUGHTS.get(script or _script_of_most(said), THOUGHT)
    return [replace(style, thought=thought) for style in listed]


def _script_of_most(text: str) -> str:
    counts = Counter(script for ch in text if (script := script_of(ch)) is not None)
    return counts.most_common(1)[0][0] if counts else ""


def _shown_tags(said: str) -> list[Style]:
    """Return the styles of a prompt that shows two pairs of tags, the last for the answer, the one before for the way.

    Patterns for such forms differ in the line breaks that they ask for, so each pair is tried on lines of its own and
    in one line, those of the prompt first.
    """
    pairs = [(match[1], "\n" in match[2]) for match in _TAGS.finditer(said)]
    if len(pairs) < 2 or pairs[-2][0] == pairs[-1][0]:
        return []
    (way, _), (answer, on_lines) = pairs[-2:]
    styles = [
        Style(f"<{way}> and <{answer}>{name}", f"<{answer}>{gap}", f"{gap}</{answer}>{end}", "tags",
              f"<{way}>{gap}", f"{gap}</{way}>\n")
        for name, gap, end in ((" on lines", "\n", ""), (" on lines and a line break", "\n", "\n"), ("", "", ""))
    ]  # fmt: skip
    return styles if on_lines else [styles[2], *styles[:2]]


def golds_of(
    problems: Sequence[Problem], column: str | None, known: Mapping[str, str], schema: Any = None
) -> list[Gold | None]:
    """Return a right and a wrong answer for each problem; None where the row tells no right one.

    `column` names the column with right answers; by default it is the usual one, and countdown, code and JSON rows have
    ways of their own. `known` are whole completions by problem id, which take precedence. `schema` is that of
    `json_schema` where rows have none.
    """
    texts = [known.get(p.id) or _gold_text(p.row, column, schema) for p in problems]
    return [
        None if text is None else _gold(problem, text, texts, whole=problem.id in known, schema=schema)
        for problem, text in zip(problems, texts, strict=True)
    ]


def _gold_text(row: Mapping[str, Any], column: str | None, schema: Any) -> str | None:
    if column is not None:
        return gold_text(row.get(column))
    numbers, target = countdown_row(row)
    if numbers and target is not None:
        given = row.get("solution")
        return given if isinstance(given, str) else solve(numbers, target)
    program = program_of(row)
    if program is not None:
        return program
    described = schema_of(row, schema)
    if described is not None:
        pair = json_answers(described)
        return None if pair is None else pair[0]
    for name in GOLD_COLUMNS:
        text = reference_answer(row.get(name))
        if text is not None:
            return text if len(text) <= MAX_GOLD_CHARS else None
    return None


def _gold(problem: Problem, text: str, others: Sequence[str | None], *, whole: bool, schema: Any) -> Gold:
    another = next((o for o in others if o is not None and differs(o, text)), None)
    if whole:
        return Gold(text, another or "", "completion")
    numbers, target = countdown_row(problem.row)
    if numbers and target is not None:
        return Gold(text, wrong_expression(numbers, target), "expression")
    if program_of(problem.row) is not None:
        return Gold(text, WRONG_PROGRAM, "program")
    described = schema_of(problem.row, schema)
    pair = None if described is None else json_answers(described)
    if pair is not None:
        return Gold(text, pair[1], "json")
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
