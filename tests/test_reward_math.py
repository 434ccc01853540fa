"""The `math` reward: exact paths, hedges, and the budgets that stand for a clock."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scores import score

from strop.errors import RewardError
from strop.rewards.budget import gold_within_budget, within_budget
from strop.rewards.symbolic import math_reward


@pytest.mark.parametrize(
    ("given_answer", "gold", "expected"),
    [
        (r"2\sqrt{3}", r"$2\sqrt{3}$", 1.0),
        (r"\sqrt{12}", r"2\sqrt{3}", 1.0),
        (r"\sqrt{13}", r"2\sqrt{3}", 0.0),
        ("1+x", "x+1", 1.0),
        (r"\dfrac{\pi}{2}", r"\frac{\pi}{2}", 1.0),
        (r"y=\sqrt{2}", r"\sqrt{2}", 1.0),
        (r"\sqrt{3}=\sqrt{2}", r"\sqrt{2}", 0.0),
        (r"\sqrt{2} \text{ or } \sqrt{3}", r"\sqrt{2}", 0.0),
        (r"(1, 2)", "(1,2)", 1.0),
        (r"\text{(C)}", "(C)", 1.0),
        ("blue", "blue", 1.0),
        ("lube", "blue", 0.0),
        (r"\frac{1}{2}", "0.5", 1.0),
        ("1.414213562373095", r"\sqrt{2}", 0.0),
        (r"\max(\sqrt{2},\sqrt{3})", r"\sqrt{2}", 0.0),
        (r"\sqrt{2};\sqrt{3}", r"\sqrt{2}", 0.0),
        (r"\{\sqrt{2},\sqrt{3}\}", r"\sqrt{2}", 0.0),
        (r"\sqrt{3} \to \sqrt{2}", r"\sqrt{2}", 0.0),
        (r"\sqrt{2} \ne \sqrt{3}", r"\sqrt{2}", 0.0),
        (r"2\sin(\pi/4)", r"\sqrt{2}", 0.0),
        ("x<5 or x<6", "x<5", 0.0),
        ("(2,1)", "(1,2)", 0.0),
        ("[1,2]", "(1,2)", 0.0),
        (r"\{2,1\}", r"\{1,2\}", 1.0),
        ("2+x+1", "x+3", 1.0),
        ("5 meters", "5 feet", 0.0),
        ("not 5", "5", 0.0),
        ("81\\%", "0.81", 0.0),
        (r"\sum_{k=1}^{n} k", r"\sum_{k=1}^{n}k", 1.0),
        (r"\frac{n(n+1)}{2}", r"\sum_{k=1}^{n}k", 0.0),
        ("anything", None, None),
        ("5", r"\begin{", None),
        ("$", "$", None),
    ],
)
def test_math(given_answer: str, gold: str | None, expected: float | None) -> None:
    assert score("math", rf"<think>hm</think> The answer is \boxed{{{given_answer}}}.", answer=gold) == expected


def test_math_takes_the_first_reference_column_and_wants_one() -> None:
    assert math_reward([r"\boxed{3}"], solution=[r"so $x$ is \boxed{3}"]) == [1.0]
    assert math_reward([r"\boxed{3}", r"\boxed{3}"], answer=["3", None], ground_truth=["4", "4"]) == [1.0, 0.0]
    with pytest.raises(RewardError, match=r"needs a column `answer`, `solution` or `ground_truth`.*\['question'\]"):
        math_reward([r"\boxed{3}"], question=["?"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("$x+1$", 1.0), ("so it is $2$, no, $x + 1$.", 1.0), ("x+1", 1.0), ("#### x+1", 1.0), ("1", 0.0)],
)
def test_math_without_a_box(text: str, expected: float) -> None:
    assert score("math", text, answer="x+1") == expected


def test_budget_grows_with_the_reference_only() -> None:
    assert within_budget("5! x", "120 x!")
    assert not within_budget("5! x", "120 x")
    assert within_budget(r"e^{100} x", r"x e^{100}")
    assert not within_budget(r"e^{100} e^{100} x", r"x e^{100}")
    assert not within_budget(r"(x+1)^{100}", "x")
    assert not within_budget(r"(x+1)^{100}", "(x+1)^{100}")
    assert within_budget(r"2^{20} x", "x")
    assert within_budget(r"\sin(2 x)", r"2 \sin(x)")
    assert not within_budget(r"\sin(2 x)", "x")
    assert not within_budget(r"\sin(200 x)", r"x \sin(200 x)")
    assert not within_budget("9^9^9", r"\log_2 x")
    assert not within_budget("definitely", "x")


@pytest.mark.parametrize(
    "gold",
    ["9^{9^9} x", r"\sum_{k=1}^{n} k^2", r"\int_0^1 x dx", r"\lim_{x \to 0} x", "(x+1)^{1000}",
    r"\sin(64 x)", "x^{x^x}",
     "9999! x", "(" * 44 + "x" + ")" * 44, "9" * 99 + "x", r"\binom{99999}{5} x"],
)  # fmt: skip
def test_a_reference_over_the_budget_is_compared_as_text(gold: str) -> None:
    assert not gold_within_budget(gold)
    assert score("math", rf"\boxed{{{gold}}}", answer=gold) == 1.0
    for answer in (r"\sum_{i=1}^{1000000000} i^i", "x", r"\int_0^1 x^{20} \sin x dx", "9^{9^9}", r"\boxed{" * 20):
        assert score("math", rf"\boxed{{{answer}}}", answer=gold) == 0.0


COSTLY = [
    (r"\binom{n}{2}", r"\binom{99999999}{4999999}"), (r"\int_0^1 x dx", r"\int_0^1 x^{20} \sin x dx"),
    (r"\log_2 x", "9^9^9"), ("2^{1000} x", "(x+y)^{1000}"), ("e^{1000x}", r"\sin(8 x)"), (r"\sin x", r"\sin(64 x)"),
    (r"x^{20}\sin x", r"\sin(32 x)"), ("n!", r"(x+\sqrt{2}+\sqrt{3}+\sqrt{5}+\pi)^{20}"), ("100! x", "(20!)!"),
    (r"e^{20 x}\sin x", "(x+y+z)^{9}"), (r"\tan x+\log x", "approximately 81"), ("2^{1000}x", "(2^{1000})^{1000}"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), COSTLY)
def test_what_a_reference_uses_opens_no_door(gold: str, answer: str) -> None:
    """Each of these pairs kept math-verify busy for more than eight seconds without its clock."""
    assert not within_budget(answer, gold)
    assert score("math", rf"\boxed{{{answer}}}", answer=gold) == 0.0


def test_a_truncated_completion_needs_a_closed_mark() -> None:
    for text, expected in ((r"\boxed{x+1} so", 1.0), ("#### x+1\nso", 1.0), ("#### x+1", 0.0), ("$x+1$", 0.0)):
        assert score("math", text, truncated=True, answer="x+1") == expected
    assert score("math", "it is 81", truncated=True, answer="81") == 0.0
    assert score("math", "it is 81", answer="81") == 1.0


def test_reasoning_accuracy_wants_the_end_of_a_thinking_part() -> None:
    for text, expected in ((r"a</think>\boxed{5}", 1.0), (r"\boxed{5}", 0.0), (r"\boxed{5}</think>6", 0.0)):
        assert score("reasoning_accuracy_reward", text, "<think>\n", solution="5") == expected
    options = {"reasoning_delimiters": ["[/T]"]}
    assert score("reasoning_accuracy_reward", r"a[/T]\boxed{5}", options=options, solution="5") == 1.0
    assert score("reasoning_accuracy_reward", "a", solution=None) is None


@given(st.text(max_size=300), st.text(max_size=60), st.sampled_from(["", "<think>\n", "<think></think>"]))
@settings(max_examples=80, deadline=None)
def test_no_text_raises(text: str, gold: str, prefill: str) -> None:
    for name in ("numeric", "math", "exact", "think_format"):
        for completion in (text, rf"\boxed{{{text}}}"):
            assert score(name, completion, prefill, answer=gold) in (0.0, 1.0, None)


MATHS = st.text(alphabet=r"0123456789.,+-*/^=!%(){}[]\ xyfracsqtpi_", max_size=60)


@given(MATHS, st.sampled_from(["81", "x+1", r"\sqrt{2}", "(1,2)", r"\frac{\pi}{2}"]))
@settings(max_examples=80, deadline=None)
def test_no_formula_raises(text: str, gold: str) -> None:
    assert score("math", rf"\boxed{{{text}}}", answer=gold) in (0.0, 1.0)
    assert score("numeric", text, answer=gold) in (0.0, 1.0, None)
    assert score("countdown", text, target=3, numbers=[1, 2]) in (0.0, 1.0)
