"""Penalties for a completion that repeats itself: one on its tokens, one on its text.

Both are 0 for text that does not repeat itself and go down to -0.5. Tokens tell loops exactly; text shows the loops
that tokens hide: counters, changed case, characters without a width, other spacing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from ..errors import RewardError
from .answers import completion_text
from .contract import reward

LOWEST = -0.5
MAX_TOKENS = 1 << 16
MAX_TEXT = 1 << 18
"""Characters at the end of a completion that are compressed."""
MIN_TEXT = 256
"""Shorter texts, normalised, are not judged: natural ones of this length compress as badly as any."""
LOOSE, TIGHT = 0.30, 0.10
"""Ratios between which the penalty grows from nothing to all. Prose and solutions of GSM8K in a row have 0.48 and more
up to `MAX_TEXT`; a dozen sentences said over and over, in any order, have less than 0.2."""

_MATCH = 4
"""Characters that have to agree for a copy."""
_COPY_COST = 3
_DIGITS = re.compile(r"[0-9][0-9.,]*")
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]+")
_SPACES = re.compile(r"\s+")


@reward(kind="repetition", low=LOWEST, high=0.0, version="1")
def ngram_repetition(
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    n: int = 4,
    **_: Any,
) -> list[float | None]:
    """-0.5 times the share of the tokens that are repetition, from -0.5 to 0.

    The share is the larger of two: repeated n-grams among all n-grams (option `n`, 4), and the longest block of tokens
    that occurs twice, overlapping or not, among all tokens. Fewer than 2 n tokens give 0. Raises RewardError for an `n`
    below 1.
    """
    return _token_penalties(completions, completion_ids, n, LOWEST, "ngram_repetition.n")


@reward(kind="repetition", low=-1.0, high=0.0, version="1")
def get_repetition_penalty_reward(
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    ngram_size: int = 4,
    max_penalty: float = LOWEST,
    **_: Any,
) -> list[float | None]:
    """`ngram_repetition` under TRL's name and with its options: `max_penalty` times the share, n-grams of `ngram_size`.

    Raises RewardError for a size below 1 or a penalty outside -1 to 0.
    """
    is_number = isinstance(max_penalty, int | float) and not isinstance(max_penalty, bool)
    if not is_number or not -1 <= max_penalty <= 0:
        raise RewardError(
            f"reward `get_repetition_penalty_reward`: max_penalty is {max_penalty!r}; a number from -1 to 0 is needed",
            hint="set rewards.options.get_repetition_penalty_reward.max_penalty, and the strength with the weight",
        )
    option = "get_repetition_penalty_reward.ngram_size"
    return _token_penalties(completions, completion_ids, ngram_size, float(max_penalty), option)


def _token_penalties(
    completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], n: Any, lowest: float, option: str
) -> list[float | None]:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise RewardError(
            f"reward `{option.partition('.')[0]}`: the size of an n-gram is {n!r}; a whole number above 0 is needed",
            hint=f"set rewards.options.{option} to a few tokens, such as 4",
        )
    pairs = zip(completions, completion_ids, strict=True)
    return [lowest * repeated_share(list(ids)[-MAX_TOKENS:], n) + 0.0 for _, ids in pairs]  # -0.0 becomes 0.0


def repeated_share(ids: Sequence[int], n: int) -> float:
    """Return which share of a list of tokens repeats itself, from 0 to 1; 0 for fewer than 2 n tokens."""
    if len(ids) < 2 * n:
        return 0.0
    total = len(ids) - n + 1
    distinct = len({tuple(ids[i : i + n]) for i in range(total)})
    block = longest_repeat(ids)
    return max(1 - distinct / total, block / len(ids) if block >= n else 0.0)


def longest_repeat(ids: Sequence[int]) -> int:
    """Return the length of the longest block that occurs at two places, which may overlap.

    A suffix automaton (Blumer et al. 1985) is grown token by token; the suffix link of the state of a beginning is the
    longest of its ends that occurred before. O(n) steps.
    """
    following: list[dict[int, int]] = [{}]
    lengths, links = [0], [-1]
    last = longest = 0
    for token in ids:
        state, new = last, len(lengths)
        following.append({})
        lengths.append(lengths[last] + 1)
        links.append(0)
        while state >= 0 and token not in following[state]:
            following[state][token] = new
            state = links[state]
        if state >= 0:
            found = following[state][token]
            if lengths[found] > lengths[state] + 1:
                copy = len(lengths)
                following.append(dict(following[found]))
                lengths.append(lengths[state] + 1)
                links.append(links[found])
                while state >= 0 and following[state].get(token) == found:
                    following[state][token] = copy
                    state = links[state]
                links[found] = copy
                found = copy
            links[new] = found
        last = new
        longest = max(longest, lengths[links[new]])
    return longest


@reward(kind="repetition", low=LOWEST, high=0.0, version="1")
def compression_ratio(completions: Sequence[Any], **_: Any) -> list[float | None]:
    """0 for a text that compresses as natural text does, down to -0.5 for one that is a loop.

    Digits, case, white space and invisible characters are made equal first; then the text is written as characters and
    copies of what came before, at 1 unit and at 3. From a ratio of 0.30 units per character on the penalty grows, and
    at 0.10 it is whole. Texts under 256 characters give 0; of longer ones than 262,144 the end counts.
    """
    return [_text_penalty(completion_text(completion)) for completion in completions]


def _text_penalty(text: str) -> float:
    plain = normalise(text[-MAX_TEXT:])
    if len(plain) < MIN_TEXT:
        return 0.0
    ratio = compressed_size(plain) / len(plain)
    return LOWEST * min(max((LOOSE - ratio) / (LOOSE - TIGHT), 0.0), 1.0) + 0.0


def normalise(text: str) -> str:
    """Return a text in which what varies without saying anything new is equal.

    Numbers become 0, capitals small letters, any white space one space; characters without a width are dropped, and so
    are accents and variation selectors.
    """
    if not text.isascii():
        kept = {ch: _plain(ch) for ch in set(text)}
        text = "".join(kept[ch] for ch in text)
    return _SPACES.sub(" ", _DIGITS.sub("0", _CONTROLS.sub("", text).casefold()))


def _plain(ch: str) -> str:
    if ch < "\x80":
        return ch
    if unicodedata.decimal(ch, None) is not None:
        return "0"
    parts = unicodedata.normalize("NFKD", ch)
    return "".join(part for part in parts if unicodedata.category(part) not in ("Cf", "Mn", "Me", "Cc"))


def compressed_size(text: str) -> int:
    """Return the size of a text as characters (1 each) and copies of earlier text (3 and more), found greedily.

    A copy is looked for at the last place with the same four characters, in the manner of LZ77 (Ziv and Lempel 1977).
    zlib does the same and better, but its output depends on which zlib Python was built with, and a reward must not.
    """
    seen: dict[str, int] = {}
    size = position = 0
    length = len(text)
    while position < length:
        start = text[position : position + _MATCH]
        earlier = seen.get(start)
        seen[start] = position
        if earlier is None or len(start) < _MATCH:
            size += 1
            position += 1
            continue
        copied = _common(text, earlier, position)
        size += _COPY_COST + copied.bit_length() // 8
        position += copied
    return size


def _common(text: str, earlier: int, position: int) -> int:
    """Return how many characters agree from two places on: steps that double while they agree, then halve."""
    limit = len(text) - position
    agreed, step, growing = _MATCH, _MATCH, True
    while step and agreed < limit:
        step = min(step, limit - agreed)
        same = text[earlier + agreed : earlier + agreed + step] == text[position + agreed : position + agreed + step]
        agreed += step * same
        growing = growing and same
        step = 2 * step if growing else step // 2
    return agreed
