"""The penalties for repetition, and the ways around them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scores import score

from strop.errors import RewardError
from strop.rewards.repetition import compressed_size, longest_repeat, normalise, repeated_share

RANDOM = random.Random(0)
SAYING = "Let me check this again. "
SENTENCES = (
    "We need to check this again carefully.", "Let me verify the total once more.", "Hold on, consider both parts.",
    "So the value must be computed from the start.", "The result seems right but I should look again.",
    "Then multiply and add the remaining items.",
)  # fmt: skip
PROSE = (
    "Janet has sixteen eggs from her ducks every day. Three of them are eaten at breakfast, and four more go "
    "into the muffins that she bakes for her friends. What is left over she carries to the market in the next "
    "village, where a single egg brings two dollars. To see how much she earns, take the number of eggs that "
    "are laid, subtract what the household uses, and multiply the rest by the price. Sixteen minus three is "
    "thirteen; thirteen minus four leaves nine. Nine eggs at two dollars each give eighteen dollars, which "
    "matches a rough guess: half of the eggs are sold, and half of thirty-two is sixteen, so something a little "
    "above that is what we expect."
)


def ids(text: str) -> list[int]:
    return list(text.encode())


EVASIONS = {
    "plain": SAYING * 40,
    "no spaces": SAYING.replace(" ", "") * 60,
    "one letter": "a" * 1000,
    "zero width": "".join(SAYING[: k % 11] + "\u200b" * (k % 7) + SAYING for k in range(60)),
    "counter": " ".join(map(str, range(400))),
    "numbered steps": " ".join(f"Step {i}: check it again." for i in range(100)),
    "Arabic counter": " ".join("".join(chr(0x660 + int(d)) for d in str(i)) for i in range(400)),
    "changed case": "".join("".join(RANDOM.choice((c.upper(), c.lower())) for c in SAYING) for _ in range(50)),
    "shuffled sentences": " ".join(RANDOM.choice(SENTENCES) for _ in range(60)),
    "sentences in turn": " ".join(SENTENCES[i % 6] for i in range(60)),
    "other spacing": "".join(SAYING.replace(" ", " " * (i % 9 + 1)) + "\n" * (i % 4) for i in range(60)),
    "full width": "".join("".join(chr(ord(c) + 0xFEE0) if c > " " and RANDOM.random() < 0.5 else c for c in SAYING)
                          for _ in range(50)),
    "accents": "".join("".join(c + RANDOM.choice(("", "\u0301", "\u0300")) for c in SAYING) for _ in range(50)),
    "selectors": "".join("".join(c + RANDOM.choice(("", "\ufe0e", "\U000e0100")) for c in SAYING) for _ in range(50)),
    "controls": "".join("".join(c + RANDOM.choice(("", "\x01", "\x02", "\x7f")) for c in SAYING) for _ in range(50)),
    "lines": "x\n" * 500,
    "hexadecimal": " ".join(f"{i:x}" for i in range(600)),
}  # fmt: skip


@pytest.mark.parametrize("name", EVASIONS)
def test_every_way_around_is_seen_in_the_text(name: str) -> None:
    value = score("compression_ratio", EVASIONS[name])
    assert value is not None
    assert -0.5 <= value <= -0.2


@pytest.mark.parametrize(
    "name", ["plain", "no spaces", "one letter", "numbered steps", "shuffled sentences", "sentences in turn", "lines"]
)
def test_loops_are_seen_in_the_tokens(name: str) -> None:
    value = score("ngram_repetition", "", completion_ids=ids(EVASIONS[name]))
    assert value is not None
    assert -0.5 <= value <= -0.3


def test_prose_and_short_texts_cost_nothing() -> None:
    assert score("compression_ratio", PROSE) == 0.0
    assert score("compression_ratio", SAYING * 5) == 0.0
    assert score("ngram_repetition", "", completion_ids=list(range(500))) == 0.0
    assert score("ngram_repetition", "", completion_ids=[1, 1, 1, 1, 1, 1, 1]) == 0.0
    assert str(score("ngram_repetition", "", completion_ids=list(range(50)))) == "0.0"


def test_more_repetition_costs_more() -> None:
    texts = [PROSE + SAYING * count for count in (0, 10, 30, 100, 300)]
    for values in (
        [score("compression_ratio", text) for text in texts],
        [score("ngram_repetition", "", completion_ids=ids(text)) for text in texts],
    ):
        assert values == sorted(values, key=float, reverse=True)
        assert values[-1] != values[0]


def test_tokens_are_counted_by_hand() -> None:
    assert repeated_share([1, 2, 3, 4] * 2, 4) == pytest.approx(0.5)  # a block of 4 among 8
    assert repeated_share([1, 2, 3, 4, 5, 6, 7, 1, 2, 3], 2) == pytest.approx(0.3)
    assert repeated_share([5] * 10, 1) == pytest.approx(0.9)
    assert score("ngram_repetition", "", options={"n": 2}, completion_ids=[5] * 10) == pytest.approx(-0.45)


def test_text_is_measured_by_hand() -> None:
    assert compressed_size("abcdefgh") == 8
    assert compressed_size("abcdabcd") == 4 + 3
    assert compressed_size("a" * 100) == 1 + 3
    assert normalise("Step 12:\t A\u00e9\u200b \uff13,5") == "step 0: ae 0"


def longest_by_search(tokens: Sequence[int]) -> int:
    size = len(tokens)
    blocks = ((i, j, n) for i in range(size) for j in range(i + 1, size) for n in range(1, size - j + 1))
    return max((n for i, j, n in blocks if tokens[i : i + n] == tokens[j : j + n]), default=0)


@given(st.lists(st.integers(0, 2), max_size=24))
def test_the_longest_repeat_is_the_one_that_a_search_finds(tokens: list[int]) -> None:
    assert longest_repeat(tokens) == longest_by_search(tokens)


def test_options_and_the_name_of_trl() -> None:
    tokens = [1, 2, 3, 4] * 25
    options = {"ngram_size": 3, "max_penalty": -1.0}
    assert score("get_repetition_penalty_reward", "", options=options, completion_ids=tokens) == pytest.approx(
        -0.96, abs=0.01
    )
    for name, option, bad in (
        ("ngram_repetition", "n", 0), ("ngram_repetition", "n", 2.0),
        ("get_repetition_penalty_reward", "ngram_size", True),
        ("get_repetition_penalty_reward", "max_penalty", 0.5), ("get_repetition_penalty_reward", "max_penalty", -2),
    ):  # fmt: skip
        with pytest.raises(RewardError) as caught:
            score(name, "", options={option: bad}, completion_ids=tokens)
        assert f"rewards.options.{name}.{option}" in caught.value.hint
