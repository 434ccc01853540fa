"""From a completion to its answer part, its boxes and its number."""

from __future__ import annotations

import math
from datetime import date
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from strop.rewards.answers import (
    after_hashes,
    answer_part,
    gold_text,
    last_box,
    last_number,
    parse_number,
    reference_answer,
)


@pytest.mark.parametrize(
    ("text", "prefill", "part"),
    [
        ("<think>a</think> b", "", " b"),
        ("a</think> b", "<think>\n", " b"),
        ("a", "<think>\n", None),
        ("<think>a", "", None),
        ("<think>a</think> 5 <think> more", "", None),
        ("a</think>b</think>c", "", "c"),
        ("b", "<think>\n\n</think>\n\n", "\n\nb"),
        ("no tags", "", "no tags"),
        ("", "", ""),
    ],
)
def test_answer_part(text: str, prefill: str, part: str | None) -> None:
    assert answer_part(text, prefill) == part


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\boxed{81} 82}", r"\boxed{81} 82"),
        (r"\boxed{7} and then \boxed{8", "7"),
        (r"{ \boxed {3}", "3"),
        (r"\boxed{}", ""),
        ("none", None),
    ],
)
def test_last_box(text: str, content: str | None) -> None:
    assert last_box(text) == content


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", 72), ("1,234", 1234), ("1{,}234", 1234), ("1 234 567", 1234567), (r"1\,234", 1234), ("$5", 5),
        (r"\$5.50", Fraction(11, 2)), ("-$5", -5), ("$-5", -5), ("\u22125", -5), ("3/4", Fraction(3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)), (r"-\dfrac34", Fraction(-3, 4)), (r"\frac{-3}{4}", Fraction(-3, 4)),
        ("1 1/2", Fraction(3, 2)), ("18.", 18), ("18.0", 18), (".5", Fraction(1, 2)), ("1e3", 1000), ("$18$", 18),
        (r"\(18\)", 18), ("**18**", 18), (r"\text{18}", 18), ("x = 5", 5), ("18 dollars", 18), (r"18\text{ cm}", 18),
        (r"90^\circ", 90), ("\uff11\uff12", 12), ("\u0661\u0662", 12), ("1\u200b2", 12),
    ],
)  # fmt: skip
def test_numbers_are_read_exactly(text: str, value: Fraction | int) -> None:
    number = parse_number(text)
    assert number is not None
    assert number.value == value


@pytest.mark.parametrize(
    "text",
    [
        "", "81 or 82", "82=80=81", "81, 82", "1,8", "2+2", "2*2", "--5", "+-5", "5\u00b2", "\u00bd", "1/0", "x",
        "81 million",
        r"81\text{ or }", "81 and 82", "0x10", "1e9999", "1e999999999", "9**9", "9^9", "5!", "1_000", "nan", "inf",
        "9" * 65, "1" * 100_000, "\u202e18", "18\x00", "\ud800", "5xy", "3/-4", "1 81/1 2",
    ],
)  # fmt: skip
def test_what_is_not_one_number_is_refused(text: str) -> None:
    assert parse_number(text) is None


def test_percent_is_a_unit_and_not_a_factor() -> None:
    number = parse_number(r"50\%")
    assert number is not None
    assert number == (50, True, "")
    assert parse_number("50") == (50, False, "")


def test_units_agree_where_both_are_given() -> None:
    def fits(first: str, second: str) -> bool:
        one, other = parse_number(first), parse_number(second)
        assert one is not None
        assert other is not None
        return one.fits(other)

    assert fits("5 feet", r"5\text{ ft}")
    assert fits("5 meters", "5")
    assert fits("$5", "5 dollars")
    assert fits("90^\\circ", "90 degrees")
    assert not fits("5 feet", "5 meters")
    assert not fits("€5", "5 dollars")


def test_a_mark_at_the_end_of_a_cut_text_is_no_answer() -> None:
    assert after_hashes("a\n#### 7") == "7"
    assert after_hashes("a\n#### 7", whole_line=True) is None
    assert after_hashes("a\n#### 7\nso", whole_line=True) == "7"
    assert after_hashes("a\n####\n 7 \nso", whole_line=True) == "7"
    assert after_hashes("none") is None


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("so 5 apples and 18 pears.", "18"), ("it is $1,234.50!", "$1,234.50"), ("x-5", "5"), ("= -5", "-5"),
        ("3/4", "3/4"), ("3.", "3"), ("about 50%.", "50%"), ("a 1{,}234 b", "1,234"), ("x2 only", None),
        (r"\frac{1}{2}", r"\frac{1}{2}"), ("none", None), ("7 x^2", "7"),
        ("it is not 81", None), ("it isn't 81", None), ("80 or 81", None), ("not equal to 81", None),
        ("80 and 81", "81"), ("for 81", "81"),
    ],
)  # fmt: skip
def test_last_number(text: str, last: str | None) -> None:
    assert last_number(text) == last


def test_reference_answers_of_every_kind() -> None:
    assert [gold_text(v) for v in (72, 0.1, Fraction(3, 4), Decimal("1.50"), np.int64(7), np.float64(0.5), " a ")] == [
        "72", "0.1", "3/4", "1.50", "7", "0.5", "a",
    ]  # fmt: skip
    assert [gold_text(v) for v in (None, "", math.nan, [1], np.array([1]), {"a": 1}, b"1", date(2026, 1, 1))] == [
        None
    ] * 8
    assert reference_answer("48/2 = <<48/2=24>>24\n#### 1,072") == "1,072"
    assert reference_answer(r"We get \boxed{1}. Hence \boxed{\frac12}.") == r"\frac12"
