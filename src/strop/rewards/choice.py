"""The `mcq` reward: one letter of a multiple-choice question, and only one."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from .answers import MAX_ANSWER_CHARS, Written, boxes, fold, gold_text, tail, written
from .contract import reward

MAX_CHOICES = 26
MAX_CHOICE_CHARS = 2000

_LABEL = re.compile(r"[A-Z]|[0-9]{1,2}")
_LETTER = re.compile(r"[(\[]? ?([A-Za-z]|[0-9]{1,2}) ?[)\]]?[.:]?")
_LETTER_AND_TEXT = re.compile(r"[(\[]? ?([A-Za-z]|[0-9]{1,2}) ?[)\].:] ?(?:[-:] ?)?(.+)")
_WRAPPER = re.compile(r"\\(?:text|textbf|mathbf|mathrm|mbox) ?\{([^{}]*)\}|\$(.*)\$")
_ANSWER_LINE = re.compile(
    r"^[ \t>*_#-]*(?:the )?(?:final |correct |best )?(?:answer|choice|option|final)(?: is)?"
    r"[ \t*_]*[: \t][ \t*_]*(?P<given>[^\s*_].*)$",
    re.IGNORECASE | re.MULTILINE,
)


@reward(kind="correctness", version="1")
def mcq(
    completions: Sequence[Any],
    answer: Sequence[Any],
    choices: Sequence[Any] | None = None,
    prefill: Sequence[str] | None = None,
    truncated: Sequence[bool] | None = None,
    *,
    first_index: int = 0,
    **_: Any,
) -> list[float | None]:
    r"""1.0 where the completion commits to the one right choice, else 0.0; None where `answer` names no choice.

    `answer` is a letter, the text of a choice, or an index that counts from the option `first_index` (0). `choices` is
    a list of texts, or `{"text": [...], "label": [...]}` with letters or numbers as labels; with it, letters end at the
    last choice and the text of a choice may stand beside or instead of its letter. The choice is read from `\boxed{C}`,
    from lines `Answer: C`, or is all of the answer. Every box and every such line has to name the same choice: `A or B`
    and one line per letter are wrong. Of a truncated completion only closed boxes count.
    """
    listed = choices if choices is not None else [None] * len(completions)
    return [
        _mcq(sample, gold, _options(texts), first_index)
        for sample, gold, texts in zip(written(completions, prefill, truncated), answer, listed, strict=True)
    ]


def _options(choices: Any) -> dict[str, str]:
    """Return letter -> text, in order; without choices every letter, with an empty text."""
    found, labels = choices, None
    if isinstance(choices, Mapping):
        found, labels = choices.get("text"), choices.get("label")
    found, labels = _listed(found), _listed(labels)
    if not isinstance(found, list | tuple) or not found:
        return dict.fromkeys(string.ascii_uppercase, "")
    texts = [_plain(str(text)[:MAX_CHOICE_CHARS]).casefold() for text in found[:MAX_CHOICES]]
    names = [str(label).strip().upper() for label in labels] if isinstance(labels, list | tuple) else []
    if len(names) != len(texts) or len(set(names)) != len(names) or not all(map(_LABEL.fullmatch, names)):
        names = list(string.ascii_uppercase)
    return dict(zip(names, texts, strict=False))


def _listed(values: Any) -> Any:
    return values.tolist() if hasattr(values, "tolist") else values


def _mcq(sample: Written, gold_value: Any, options: Mapping[str, str], first_index: int) -> float | None:
    gold = _gold_letter(gold_value, options, first_index)
    if gold is None:
        return None
    part = sample.part
    if part is None:
        return 0.0
    end = tail(part)
    given = boxes(end)
    if not sample.truncated:
        given += [match["given"] for match in _ANSWER_LINE.finditer(end) if "\\boxed" not in match["given"]]
        given = given or [end]
    return float({_letter(text, options) for text in given} == {gold})


def _gold_letter(value: Any, options: Mapping[str, str], first_index: int) -> str | None:
    text = gold_text(value)
    if text is None:
        return None
    is_index = re.fullmatch(r"[0-9]{1,3}", text) is not None and text not in options
    named = None if is_index and not isinstance(value, str) else _letter(text, options)
    if named is None and is_index and 0 <= (place := int(text) - first_index) < len(options):
        return list(options)[place]
    return named


def _letter(given: str, options: Mapping[str, str]) -> str | None:
    """Return the choice that a text names, None if it names none, another than its own text says, or several."""
    if len(given) > MAX_CHOICE_CHARS + MAX_ANSWER_CHARS:
        return None
    text = _plain(given)
    if (letter := _LETTER.fullmatch(text)) and letter[1].upper() in options:
        return letter[1].upper()
    folded = text.casefold().rstrip(".")
    same = [name for name, choice in options.items() if choice and choice.rstrip(".") == folded]
    if len(same) == 1:
        return same[0]
    both = _LETTER_AND_TEXT.fullmatch(text)
    if both and (name := both[1].upper()) in options and options[name]:
        return name if options[name].rstrip(".") == both[2].casefold().rstrip(".") else None
    return None


def _plain(text: str) -> str:
    """Return a text on one line, without look-alikes and the wrappers of LaTeX and Markdown."""
    plain = " ".join(fold(text).split()).strip("*_ ")
    for _ in range(3):
        wrapped = _WRAPPER.fullmatch(plain.rstrip("."))
        if wrapped is None:
            break
        plain = next(group for group in wrapped.groups() if group is not None).strip("*_ ")
    return plain
