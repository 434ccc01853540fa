"""The `reasoning_gym` reward: that package's own scorers, from a list of those that are safe to call, made binary."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..errors import RewardError
from .answers import Written, boxes, gold_text, written
from .contract import reward

MAX_GYM_ANSWER_CHARS = 8_192

SCORERS: Mapping[str, bool] = {
    **dict.fromkeys(
        (
            "ab", "acre", "aiw", "arc_1d", "base_conversion", "basic_arithmetic", "bf", "binary_alternation",
            "caesar_cipher", "chain_sum", "circuit_logic", "color_cube_rotation", "count_bits", "count_primes",
            "course_schedule", "decimal_chain_sum", "dice", "emoji_mystery", "family_relationships", "gcd",
            "isomorphic_strings", "largest_island", "lcm", "leg_counting", "letter_counting", "mahjong_puzzle",
            "manipulate_matrix", "maze", "modulo_grid", "needle_haystack", "number_filtering", "number_sequence",
            "path_star", "products", "ransom_note", "rectangle_count", "rotate_matrix", "rotten_oranges",
            "self_reference", "sentence_reordering", "simple_equations", "simple_geometry", "string_manipulation",
            "string_splitting", "string_synthesis", "syllogism", "tsumego", "word_sequence_reversal", "zebra_puzzles",
        ),
        False,
    ),
    **dict.fromkeys(
        (
            "cryptarithm", "futoshiki", "group_anagrams", "jugs", "mini_sudoku", "palindrome_generation",
            "palindrome_partitioning", "shortest_path", "sudoku", "tower_of_hanoi", "word_ladder",
        ),
        True,
    ),
}  # fmt: skip
"""Data sets of reasoning-gym 0.1.25, and whether the scorer reads the metadata of the item.

Their scorers run no text as code, end at once on any text up to the limit, draw no random numbers, change nothing, and
give the full mark to right answers only. Off the list, among others: `countdown`, `puzzle24`, the integrations,
`polynomial_multiplication`, `binary_matrix`, `n_queens`, `spiral_matrix`, `string_insertion` (they evaluate the
answer), `coin_flip`, `power_function` (they hang on `1e999999999`), `game_of_life_halting` and `complex_arithmetic`
(any answer, `nan`), `calendar_arithmetic`, `number_sorting`, `number_format`, `decimal_arithmetic` (near misses),
`game_of_life`, `gsm_symbolic`, `kakurasu`, `knights_knaves`, `survo`, `word_sorting`, `figlet_font`, `letter_jumble`,
`spell_backward` (a right answer with anything around it).
"""

_TAGGED = re.compile(r"<answer>(?P<given>(?:(?!<answer>).)*)</answer>\s*\Z", re.DOTALL)


@reward(kind="correctness", version="1")
def reasoning_gym(
    completions: Sequence[Any],
    answer: Sequence[Any],
    metadata: Sequence[Any] | None = None,
    prefill: Sequence[str] | None = None,
    truncated: Sequence[bool] | None = None,
    *,
    dataset: str = "",
    **_: Any,
) -> list[float | None]:
    r"""1.0 where reasoning-gym gives the full mark, else 0.0: no partial credit; None where `answer` is missing.

    The answer is the content of the only `\boxed{}` after the thinking part, else of an `<answer>` that ends it, else
    all of it; of a truncated completion only the first two, and at most 8,192 characters. The data set is the option
    `dataset`, else `source_dataset` in the column `metadata`. Raises RewardError if it is none of `SCORERS`, or needs
    the metadata that reasoning-gym gave with the item (a mapping or JSON text) and the row has none.
    """
    if dataset:
        _check_name(dataset)
    given = metadata if metadata is not None else [None] * len(completions)
    return [
        _scored(sample, gold, _mapping(details), dataset)
        for sample, gold, details in zip(written(completions, prefill, truncated), answer, given, strict=True)
    ]


def preload_gym() -> None:
    """Import reasoning-gym. Raises RewardError if it is not installed."""
    try:
        import reasoning_gym as package
    except ImportError as e:
        raise RewardError(
            f"reward `reasoning_gym` needs reasoning-gym, which cannot be imported: {e}",
            hint="pip install 'strop[gym]'",
        ) from e
    del package


def _scored(sample: Written, gold_value: Any, metadata: Mapping[str, Any], dataset: str) -> float | None:
    gold = gold_value if isinstance(gold_value, str) else gold_text(gold_value)
    if not gold:
        return None
    name = dataset or metadata.get("source_dataset")
    score = _scorer(name, bool(metadata))
    part = sample.part
    given = None if part is None else _given(part, sample.truncated)
    if given is None or len(given) > MAX_GYM_ANSWER_CHARS:
        return 0.0
    # Exactly 1: a sum of partial credits can come out a rounding error above it.
    return float(score(given, {"question": "", "answer": gold, "metadata": dict(metadata)}) == 1.0)


def _given(part: str, truncated: bool) -> str | None:
    end = part.rstrip()[-2 * MAX_GYM_ANSWER_CHARS :]
    boxed = boxes(end)
    if len(boxed) == 1 and end.count("\\boxed") == 1:
        return boxed[0].strip()
    start = end.rfind("<answer>")
    if start >= 0 and (tagged := _TAGGED.match(end, start)):
        return tagged["given"].strip()
    return None if truncated else part.strip()


def _mapping(value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, Mapping) else {}


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name not in SCORERS:
        near = difflib.get_close_matches(str(name), SCORERS, n=1)
        given = f"`{name}` is not on the list of data sets with a safe scorer" if name else "no data set is named"
        raise RewardError(
            f"reward `reasoning_gym`: {given}" + (f"; did you mean `{near[0]}`?" if near else ""),
            hint=f"set rewards.options.reasoning_gym.dataset to one of {', '.join(SCORERS)}; for another data set with "
            "one right answer take `exact`",
        )


def _scorer(name: Any, has_metadata: bool) -> Callable[[str, Any], float]:
    _check_name(name)
    if SCORERS[name] and not has_metadata:
        raise RewardError(
            f"reward `reasoning_gym`: the scorer of `{name}` needs the column `metadata`, which a row does not have",
            hint="keep the column `metadata` of reasoning-gym's items in the data set",
        )
    return _load_scorer(name)


@lru_cache(maxsize=128)
def _load_scorer(name: str) -> Callable[[str, Any], float]:
    from reasoning_gym.factory import get_score_answer_fn

    found: Any = get_score_answer_fn(name)
    return found
