"""The built-in rewards that compare one answer with one reference, and those for the form."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from scores import score

from strop.errors import RewardError
from strop.rewards.contract import declaration_of
from strop.rewards.correctness import exact, numeric
from strop.rewards.countdown import countdown
from strop.rewards.formats import think_format
from strop.rewards.gym import SCORERS
from strop.rewards.library import LIBRARY


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        (r"<think>\boxed{1}</think> so \boxed{72}", "72", 1.0),
        (r"<think>72</think> \boxed{71}", "72", 0.0),
        (r"<think>it is \boxed{72}", "72", 0.0),
        ("steps\n#### 72\nbye 5", "72", 1.0),
        ("#### 18 #### 99", "18", 0.0),
        ("the answer is 18.", 18, 1.0),
        (r"\boxed{81}, sorry, \boxed{82}", "81", 0.0),
        (r"\boxed{}72", "72", 0.0),
        (r"\boxed{0.75}", "3/4", 1.0),
        (r"\boxed{0.333}", "1/3", 0.0),
        (r"\boxed{50}", "50%", 1.0),
        (r"\boxed{0.5}", "50%", 0.0),
        ("", "72", 0.0),
        (r"\boxed{72}" + "x" * 2100, "72", 0.0),
        (r"\boxed{72}", "not a number", None),
        (r"\boxed{72}", None, None),
    ],
)
def test_numeric(text: str, answer: object, expected: float | None) -> None:
    assert score("numeric", text, answer=answer) == expected


HEDGES = [
    ("82=80=81", "81"), (r"8100\%", "81"), ("2+2", "4"), (r"\sum_{k=1}^{10}k", "55"), ("81 or 82", "81"),
    (r"81 \text{ or } 82", "81"), ("80, 81, 82", "81"), ("[80, 82]", "81"), (r"\pm 81", "81"), ("81^1", "81"),
    (r"\sqrt{16}", "4"), ("not 81", "81"), (r"80 < x < 82", "81"), ("0..1000", "5"), (r"81 \cdot 1", "81"),
]  # fmt: skip


@pytest.mark.parametrize(("hedge", "answer"), HEDGES)
@pytest.mark.parametrize("name", ["numeric", "math"])
def test_hedges_are_refused(name: str, hedge: str, answer: str) -> None:
    assert score(name, rf"\boxed{{{hedge}}}", answer=answer) == 0.0
    assert score(name, rf"\boxed{{{answer}}}", answer=answer) == 1.0


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("<think>no</think>\n Paris ", "Paris", 1.0),
        (r"It is \boxed{Paris}.", "Paris", 1.0),
        (r"\boxed{Rome} or \boxed{Paris}", "Paris", 0.0),
        ("It is Paris", "Paris", 0.0),
        ("paris", "Paris", 0.0),
        ("\uff21", "A", 1.0),
        ("<think>Paris", "Paris", 0.0),
        ("7", 7, 1.0),
        ("x" * 1_000_000, "Paris", 0.0),
        ("Paris", None, None),
    ],
)
def test_exact(text: str, answer: object, expected: float | None) -> None:
    assert score("exact", text, answer=answer) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>1+2</think><answer>(1+2)*3</answer>", 1.0),
        ("<think>1+2</think> (1 + 2) \u00d7 3 ", 1.0),
        ("<answer>1</answer> <answer>3*(2+1)</answer>", 1.0),
        ("<answer>9</answer>", 0.0),
        ("<answer>(1+2)*3*1</answer>", 0.0),
        ("<answer>(1+2)*3+0</answer>", 0.0),
        ("<answer>3**2*1</answer>", 0.0),
        ("<answer>3//1*(2+1)</answer>", 0.0),
        ("<answer>3/.5+2+1</answer>", 0.0),
        ("<answer>+(1+2)*3</answer>", 0.0),
        ("<answer>__import__('os')</answer>", 0.0),
        ("<answer>3/(2-1-1)</answer>", 0.0),
        ("<answer></answer>", 0.0),
        ("<think>(1+2)*3", 0.0),
        ("<answer>(1+2)*3", 0.0),
    ],
)
def test_countdown(text: str, expected: float) -> None:
    assert score("countdown", text, target=9, numbers=[1, 2, 3]) == expected


def test_countdown_is_exact_and_needs_its_row() -> None:
    assert score("countdown", "<answer>8/(3-8/3)</answer>", target="24", nums=np.array([3, 3, 8, 8])) == 1.0
    assert score("countdown", "1", target=None, numbers=[1]) is None
    assert score("countdown", "1", target=1, numbers=None) is None
    assert score("countdown", "1", target=1, numbers=["a"]) is None


@pytest.mark.parametrize(
    ("text", "prefill", "expected"),
    [
        ("<think>a</think>b", "", 1.0),
        ("\n<think>\na\n</think>\n\nb", "", 1.0),
        ("a</think>b", "<think>\n", 1.0),
        ("<think>a</think>b", "<think>\n", 0.0),
        ("a</think>b", "", 0.0),
        ("x<think>a</think>b", "", 0.0),
        ("<think> \u200b\n</think>b", "", 0.0),
        ("<think>a</think> \n", "", 0.0),
        ("<think>a</think>b</think>c", "", 0.0),
        ("<think>a<think>b</think>c", "", 0.0),
        ("<think>a", "", 0.0),
        ("</think>a<think>b", "", 0.0),
    ],
)
def test_think_format(text: str, prefill: str, expected: float) -> None:
    assert score("think_format", text, prefill) == expected


def test_built_ins_take_message_lists_and_batches() -> None:
    messages = [[{"role": "assistant", "content": text}] for text in (r"\boxed{3}", r"\boxed{4}")]
    assert numeric(messages, answer=["3", "3"]) == [1.0, 0.0]
    assert exact(messages, answer=["3", "3"]) == [1.0, 0.0]
    assert LIBRARY["accuracy_reward"](messages, solution=["3", "4"]) == [1.0, 1.0]
    assert think_format(completions=messages) == [0.0, 0.0]
    assert countdown(messages, target=[3, 3], numbers=[[3], [3]]) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{4}", 1.0),
        (r"\boxed{\frac{1}{2}} as said", 1.0),
        ("so 4", 0.0),
        (r"\boxed{4} or \boxed{5}", 0.0),
        (r"\boxed{}", 0.0),
        (r"\boxed{ }", 0.0),
        (r"\boxed{4", 0.0),
        (r"<think>\boxed{1}</think>\boxed{2}", 1.0),
        (r"<think>\boxed{1}", 0.0),
        (r"<think>x</think>\boxed{2} \boxed", 0.0),
    ],
)
def test_single_box_takes_exactly_one_box_with_content(text: str, expected: float) -> None:
    assert LIBRARY["single_box"](completions=[text]) == [expected]


@pytest.mark.parametrize(
    ("text", "expected", "when_cut"),
    [
        (r"\boxed{72}", 1.0, 1.0),
        ("steps\n#### 72", 1.0, 0.0),
        ("#### 72\nso", 1.0, 1.0),
        (r"#### \boxed{72}", 1.0, 1.0),
        (r"\boxed{72} #### 73", 0.0, 1.0),
        (r"\boxed{73} and #### 72", 0.0, 0.0),
        ("#### 18 #### 72", 1.0, 0.0),
        ("#### 72 apples", 1.0, 0.0),
        ("the answer is 72", 0.0, 0.0),
        (r"\boxed{72}" + "x" * 301, 0.0, 0.0),
        (r"<think>\boxed{72}", 0.0, 0.0),
        ("#### 7,2", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_gsm8k(text: str, expected: float, when_cut: float) -> None:
    assert score("gsm8k", text, answer="a\n#### 72") == expected
    assert score("gsm8k", text, truncated=True, answer="72") == when_cut
    assert score("gsm8k", text, answer="none") is None


def test_a_truncated_completion_hits_nothing_by_luck() -> None:
    for name in ("numeric", "exact"):
        assert score(name, "7", truncated=True, answer="7") == 0.0
        assert score(name, r"so \boxed{7} and", truncated=True, answer="7") == 1.0
    assert score("numeric", "#### 7", truncated=True, answer="7") == 0.0
    assert score("numeric", "#### 7\nso", truncated=True, answer="7") == 1.0
    assert score("countdown", "(1+2)*3", truncated=True, target=9, numbers=[1, 2, 3]) == 0.0
    assert score("countdown", "<answer>(1+2)*3</answer>", truncated=True, target=9, numbers=[1, 2, 3]) == 1.0


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({"tolerance": 0.5}, "72.5", 1.0), ({"tolerance": 0.5}, "72.51", 0.0), ({"tolerance": 0}, "72.0001", 0.0),
        ({"relative_tolerance": 0.01}, "72.72", 1.0), ({"relative_tolerance": 0.01}, "72.73", 0.0),
        ({"tolerance": 1, "relative_tolerance": 0.01}, "73", 1.0),
    ],
)  # fmt: skip
def test_numeric_within_a_declared_tolerance(options: dict[str, float], text: str, expected: float) -> None:
    assert score("numeric", text, options=options, answer="72") == expected


@pytest.mark.parametrize("value", [-1, "0.1", True, float("nan"), float("inf"), None])
def test_a_tolerance_is_a_number_above_zero(value: object) -> None:
    with pytest.raises(RewardError, match=r"tolerance is .*a number of at least 0") as caught:
        score("numeric", "72", options={"tolerance": value}, answer="72")
    assert "rewards.options.numeric.tolerance" in caught.value.hint


CITIES = ["Rome", "Paris", "Oslo", "Bern"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{B}", 1.0), (r"\boxed{(B)}", 1.0), (r"\boxed{\text{(B)}}", 1.0), (r"\boxed{b}", 1.0),
        (r"$\boxed{\textbf{(B)}}$", 1.0), (r"\boxed{B. Paris}", 1.0), (r"\boxed{Paris}", 1.0),
        ("Answer: B", 1.0), ("**Answer:** (B)", 1.0), ("**Answer: B**", 1.0),
        ("so\nThe correct answer is B: Paris\n", 1.0),
        (r"Answer: \boxed{B}", 1.0), ("B", 1.0), ("(B).", 1.0), ("\uff22", 1.0), ("Answer: B\nAnswer: B", 1.0),
        (r"\boxed{B. Rome}", 0.0), (r"\boxed{A}", 0.0), (r"\boxed{E}", 0.0), ("A B C D", 0.0), ("A or B", 0.0),
        (r"\boxed{A, B}", 0.0), (r"\boxed{A}\boxed{B}", 0.0), (r"\boxed{B}\boxed{A}", 0.0), ("B, C", 0.0),
        ("Answer: A\nAnswer: B", 0.0), ("Answer: A\nAnswer: B\nAnswer: C\nAnswer: D", 0.0),
        ("Answer: A\n\\boxed{B}", 0.0), ("Answer: B\n\nFinal: C", 0.0), ("Final: B", 1.0),
        ("Because", 0.0), ("I think it is B", 0.0), ("The answer is B because A is wrong", 0.0), ("", 0.0),
        (r"<think>\boxed{B}", 0.0), (r"<think>\boxed{B}</think>\boxed{C}", 0.0),
    ],
)  # fmt: skip
def test_mcq(text: str, expected: float) -> None:
    assert score("mcq", text, answer="B", choices=CITIES) == expected
    assert score("mcq", text, answer=1, choices=np.array(CITIES)) == expected
    assert score("mcq", text, answer="Paris", choices={"text": CITIES, "label": list("ABCD")}) == expected


def test_mcq_references_of_every_kind() -> None:
    assert score("mcq", r"\boxed{B}", answer="(b)") == 1.0
    assert score("mcq", r"\boxed{B}", answer="1") == 1.0
    assert score("mcq", r"\boxed{B}", answer=2, options={"first_index": 1}) == 1.0
    numbered = {"text": CITIES, "label": ["1", "2", "3", "4"]}
    assert score("mcq", r"\boxed{2}", answer="2", choices=numbered) == 1.0
    assert score("mcq", r"\boxed{Paris}", answer="2", choices=numbered) == 1.0
    assert score("mcq", r"\boxed{B}", answer="2", choices=["1", "2", "3"]) == 1.0
    assert score("mcq", r"\boxed{C}", answer=2, choices=["1", "2", "3"]) == 1.0
    for gold in ("Z", "", None, 9, -1, "Madrid"):
        assert score("mcq", r"\boxed{B}", answer=gold, choices=CITIES) is None
    assert score("mcq", "Answer: B", truncated=True, answer="B") == 0.0
    assert score("mcq", r"\boxed{B} is", truncated=True, answer="B") == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{5}", 1.0), (r"so $\boxed{5}$.", 1.0), (r"**\(\boxed{\frac{1}{2}}\)**" + "\n\n", 1.0),
        (r"\boxed{\boxed{5}}", 1.0), (r"\boxed{4} no, \boxed{5}", 1.0), ("so\n#### 72\n", 1.0),
        ("<answer>5</answer>", 1.0),
        (r"\boxed{5} and more", 0.0), (r"\boxed{5}" + "\n" * 40, 0.0), (r"\boxed{5}" + "\u200b", 0.0),
        (r"\boxed{5", 0.0),
        (r"\boxed{}", 0.0), (r"\boxed{5}\boxed{", 0.0), ("5", 0.0), ("", 0.0), ("#### 72\nAs I said, it is 72.", 0.0),
        ("#### " + "x" * 99, 0.0), ("<answer></answer>", 0.0), ("<answer>5</answer> ok", 0.0),
        (r"<think>\boxed{5}", 0.0),
        (r"\boxed{" + "x" * 300 + "}", 0.0), ("</answer>", 0.0),
    ],
)  # fmt: skip
def test_answer_last(text: str, expected: float) -> None:
    assert score("answer_last", text) == expected
    assert score("answer_last", text, truncated=True) == 0.0


@pytest.mark.parametrize(
    ("text", "script", "expected"),
    [
        ("Hello, world", "Latin", 1.0), ("\u041f\u0440\u0438\u0432\u0435\u0442", "Latin", 0.0),
        ("\u041f\u0440\u0438\u0432\u0435\u0442", "Cyrillic", 1.0), ("Hello \u043c\u0438\u0440", "Latin", 0.0),
        ("H\u0435llo", "Latin", 0.0), ("\uff28\uff49", "Latin", 1.0),
        ("\u7b54\u6848\u662f $x+1$, \\boxed{5}", "Chinese", 1.0),
        ("\u3053\u308c\u306f\u7b54\u3048", "Japanese", 1.0), ("\u3053\u308c\u306f\u7b54\u3048", "Han", 0.0),
        ("a \u03b1", ["Latin", "Greek"], 1.0), ("\U00010400\U00010401", "Latin", 0.0), ("12 + 3", "Latin", 0.0),
        ("", "Latin", 0.0),
        ("$\u7b54\u6848$ Hi", "Latin", 0.0), ("<think>\u7b54\u6848\u662f</think>", "Chinese", 1.0),
    ],
)  # fmt: skip
def test_script_consistency(text: str, script: str | list[str], expected: float) -> None:
    assert score("script_consistency", text, options={"script": script}) == expected


def test_script_consistency_counts_a_share_of_letters() -> None:
    text = "a" * 9 + "\u0436"
    assert score("script_consistency", text, options={"threshold": 0.9}) == 1.0
    assert score("script_consistency", text, options={"threshold": 0.91}) == 0.0
    for options in ({"script": "Klingon"}, {"script": []}, {"threshold": 2}, {"threshold": True}):
        with pytest.raises(RewardError) as caught:
            score("script_consistency", "x", options=options)
        assert "rewards.options.script_consistency." in caught.value.hint


def test_think_format_sees_through_blank_signs() -> None:
    for blank in ("\u2800", "\u3164", "\u200b", "\x00", "\u00a0"):
        assert score("think_format", f"<think>{blank}</think>x") == 0.0
        assert score("single_box", rf"\boxed{{{blank}}}") == 0.0


def test_every_built_in_declares_itself() -> None:
    assert all(declaration_of(function).version for function in LIBRARY.values())
    kinds = {name: declaration_of(LIBRARY[name]).kind for name in LIBRARY}
    assert {name for name, kind in kinds.items() if kind == "correctness"} == {
        "numeric", "exact", "gsm8k", "mcq", "math", "countdown", "regex_answer", "json_schema", "reasoning_gym",
        "python_tests", "accuracy_reward", "reasoning_accuracy_reward",
    }  # fmt: skip
    assert LIBRARY["accuracy_reward"] is LIBRARY["math"]
    assert LIBRARY["think_format_reward"] is LIBRARY["think_format"]


def test_the_page_on_the_library_names_everything() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "reward-library.md").read_text(encoding="utf-8")
    assert [name for name in LIBRARY if f"`{name}`" not in page] == []
    scorers = page.partition("<!-- begin scorers -->")[2].partition("<!-- end scorers -->")[0]
    plain, _, with_metadata = scorers.partition("With the metadata")
    assert set(re.findall(r"`(\w+)`", plain)) == {name for name, metadata in SCORERS.items() if not metadata}
    assert set(re.findall(r"`(\w+)`", with_metadata)) == {name for name, metadata in SCORERS.items() if metadata}
