"""The built-in rewards, the parsing under them, the loading of user functions and the weighted sum."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import time
from datetime import date
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.errors import RewardError
from strop.rewards.answers import answer_part, gold_text, last_box, last_number, parse_number, reference_answer
from strop.rewards.call import BoundFunction, Completion, check_returned
from strop.rewards.combine import Outcome, combine
from strop.rewards.library import LIBRARY, countdown, exact, numeric, think_format
from strop.rewards.load import load_function, read_entries
from strop.rewards.symbolic import math_reward, preload, within_budget
from strop.types import Problem, Rollout, Segment

SHARED = Path(os.environ.get("STROP_SHARED", Path(__file__).parents[2] / "shared"))
GSM8K = SHARED / "data" / "gsm8k"


def score(name: str, text: str, prefill: str = "", **row: object) -> float | None:
    return LIBRARY[name](completions=[text], prefill=[prefill], **{k: [v] for k, v in row.items()})[0]


# --- answers -----------------------------------------------------------------------------------------------------


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
    assert number == (50, True)


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("so 5 apples and 18 pears.", "18"), ("it is $1,234.50!", "$1,234.50"), ("x-5", "5"), ("= -5", "-5"),
        ("3/4", "3/4"), ("3.", "3"), ("about 50%.", "50%"), ("a 1{,}234 b", "1,234"), ("x2 only", None),
        (r"\frac{1}{2}", r"\frac{1}{2}"), ("none", None), ("7 x^2", "7"),
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


# --- numeric, exact, math ----------------------------------------------------------------------------------------


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


BOMBS = [
    "9**9**9", "9^{9^9}", "10^{10^{10}}", "1.0x10^{4e8}", r"9^{9^9} \bmod 100", "9^9^9", "((9!)!)!", "100000000!",
    "100!!", r"x^{1 1 1 1 1 1 1 1 1}", r"((((9^{99})^{99})^{99})^{99})", "(a+b+c+d)^{64}", 
    r"\sum_{i=1}^{1000000000} i^i",
    r"\int_0^1 \sin(x^x) dx", r"\binom{1000000}{500000}", "(" * 44 + "x" + ")" * 44, "{" * 10_000 + "x" + "}" * 10_000,
    r"\sin" * 60 + " x", "9" * 1_000_000, "1e999999999", "x" * 1_000_000, r"\boxed{" * 5_000, r"\boxed{1}" * 5_000,
    "x^(9^(9^9))", "\ud800", "\x00", "$" * 100_000, "1," * 100_000, r"2^{10 \cdot 10 \cdot 10 \cdot 10}",
    r"\log(\pi-e)\sin(12^{20} x)", r"9^{99}\sqrt[5]{x}\log(\sqrt[5]{3})", r"\sin(200 x)",
    r"\sqrt{a}-x+2 \cdot \log(99) \cdot 3 \cdot 123456789",
]  # fmt: skip


@pytest.mark.parametrize("name", ["numeric", "math", "exact", "countdown", "think_format"])
def test_no_bomb_takes_long(name: str) -> None:
    preload()
    rows = [{"answer": r"x^2+\sqrt{2}"}, {"answer": "81"}]
    allowed = {"think_format": (0.0, 1.0), "numeric": (0.0, None)}.get(name, (0.0,))
    for bomb in BOMBS:
        for text in (bomb, rf"<think>a</think>\boxed{{{bomb}}}", f"<answer>{bomb}</answer>"):
            for row in rows:
                start = time.perf_counter()
                result = score(name, text, **row, target=3, numbers=[1, 2])
                assert result in allowed, bomb[:40]
                assert time.perf_counter() - start < 2.0, bomb[:40]


def test_budget_grows_with_the_reference_only() -> None:
    assert within_budget("5! x", "120 x!")
    assert not within_budget("5! x", "120 x")
    assert within_budget(r"e^{100} x", r"x e^{100}")
    assert not within_budget(r"(x+1)^{100}", "x")
    assert within_budget(r"2^{20} x", "x")
    assert not within_budget(r"\sin(200 x)", "x")
    assert within_budget(r"\sin(200 x)", r"x \sin(200 x)")


@pytest.mark.skipif(not GSM8K.is_dir(), reason="needs the GSM8K files of the shared data folder")
def test_every_sampled_gsm8k_answer_is_accepted_and_its_neighbour_is_not() -> None:
    rows = [json.loads(line) for file in ("train", "test") for line in (GSM8K / f"{file}.jsonl").open(encoding="utf-8")]
    rows = rows[::17]
    golds = [row["answer"].split("####")[1].strip() for row in rows]
    boxed = [rf"<think>so</think>The answer is \boxed{{{gold}}}." for gold in golds]
    references = [row["answer"] for row in rows]
    assert len(rows) > 500
    assert numeric(boxed, answer=references) == [1.0] * len(rows)
    assert math_reward(boxed, answer=references) == [1.0] * len(rows)
    values = [float(gold.replace(",", "")) for gold in golds]
    shifted = [float(value == following) for value, following in itertools.pairwise(values)]
    assert numeric(boxed[:-1], answer=references[1:]) == shifted
    assert math_reward(boxed[:-1], answer=references[1:]) == shifted


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


# --- countdown, think_format -------------------------------------------------------------------------------------


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


# --- loading -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine_helper.py").write_text("BONUS = 0.5\n")
    (tmp_path / "mine.py").write_text(
        "from mine_helper import BONUS\n"
        "def length(completions, **kwargs):\n    return [BONUS for _ in completions]\n"
        "class Scorer:\n    def __call__(self, completions, **kwargs):\n        return [2.0 for _ in completions]\n"
        "scorer = Scorer()\n"
        "LIMIT = 3\n"
    )
    return tmp_path


@pytest.mark.parametrize("entry", ["mine.py:length", "mine:length", "./mine.py:length"])
def test_user_functions_load_from_file_and_module(folder: Path, entry: str) -> None:
    (spec,) = read_entries([entry])
    assert spec.name == "length"
    assert load_function(spec)(completions=["a"]) == [0.5]


@pytest.mark.parametrize(
    ("entry", "message", "hint"),
    [
        ("numerik", "`numerik` is not a built-in name", "did you mean `numeric`"),
        ("xyz", "`xyz` is not a built-in name", "built in: numeric, exact"),
        ("mine.py", "`mine.py` is not", "`mine.py:function`"),
        ("my_lib.rewards.custom", "is not a built-in name", "`my_lib.rewards:custom`"),
        ("mnie.py:length", "the file `mnie.py` of `mnie.py:length` does not exist", "did you mean `mine.py`"),
        ("nowhere/a.py:f", "does not exist", "no .py file"),
        ("mine.py:1x", "cannot be a function's name", "give a built-in name"),
        ("a-b:f", "`a-b` in `a-b:f` is neither a module nor a .py file", "give a built-in name"),
        ("", "is not a built-in name", "built in"),
    ],
)
def test_entries_that_cannot_be_read(folder: Path, entry: str, message: str, hint: str) -> None:
    with pytest.raises(RewardError) as caught:
        read_entries([entry])
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("entry", "message", "hint"),
    [
        ("mine.py:lenght", "has no function `lenght`", "did you mean `length`"),
        ("mine.py:LIMIT", "is a int, which cannot be called", "name a function"),
        ("minne:length", "there is no module `minne`", "did you mean `mine`"),
        ("broken.py:f", "SyntaxError", "fix that line"),
        ("needs.py:f", "No module named 'not_installed_here' (", "install what it imports"),
        ("needs:f", "No module named 'not_installed_here'", "install what it imports"),
        ("exits.py:f", "SystemExit", "fix that line"),
    ],
)
def test_functions_that_cannot_be_loaded(folder: Path, entry: str, message: str, hint: str) -> None:
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "needs.py").write_text("import not_installed_here\n")
    (folder / "exits.py").write_text("import sys\nsys.exit(1)\n")
    (spec,) = read_entries([entry])
    with pytest.raises(RewardError) as caught:
        load_function(spec)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_names_are_unique(folder: Path) -> None:
    (folder / "other.py").write_text("")
    (folder / "sub").mkdir()
    (folder / "sub" / "mine.py").write_text("")
    names = [spec.name for spec in read_entries(["mine.py:f", "other.py:f", "math", "pkg.mod:g"])]
    assert names == ["mine.f", "other.f", "math", "g"]
    assert [s.name for s in read_entries(["mine.py:f", "sub/mine.py:f"])] == ["mine.py:f", "sub/mine.py:f"]
    with pytest.raises(RewardError, match="lists `math` twice"):
        read_entries(["math", "math"])


# --- calling and combining ---------------------------------------------------------------------------------------


def completion(**columns: object) -> Completion:
    return Completion("p", "text", (1, 2), "<think>\n", columns, "task/0", seed=3, global_step=7)


def test_a_function_gets_the_keywords_it_names() -> None:
    seen: dict[str, object] = {}

    def named(completions: list[str], answer: list[str], prefill: list[str], *, log_metric: object) -> list[float]:
        seen.update(completions=completions, answer=answer, prefill=prefill, log_metric=log_metric)
        return [1.0]

    def everything(**kwargs: object) -> list[float]:
        seen.update(kwargs)
        return [1.0]

    BoundFunction("named", named)(completion(answer="3", other=1), lambda x: x)
    assert {k: v for k, v in seen.items() if k != "log_metric"} == {
        "completions": ["text"], "answer": ["3"], "prefill": ["<think>\n"],
    }  # fmt: skip
    BoundFunction("everything", everything)(completion(answer="3", other=1), lambda x: x)
    assert seen["other"] == [1]
    assert seen["completion_ids"] == [[1, 2]]
    assert seen["trainer_state"].global_step == 7  # type: ignore[attr-defined]
    with pytest.raises(RewardError, match=r"`named` needs the column answer, which row task/0 .* it has other"):
        BoundFunction("named", named)(completion(other=1), lambda x: x)
    with pytest.raises(RewardError, match="by position only"):
        BoundFunction("f", lambda completions, /: [1.0])


@pytest.mark.parametrize(
    ("returned", "value"),
    [
        ([1], 1.0), ((0.25,), 0.25), ([True], 1.0), ([None], None), (np.array([0.5], dtype=np.float32), 0.5),
        ([np.float64(0.5)], 0.5), ([np.array(2)], 2.0), ([Decimal("0.5")], 0.5), ([Fraction(1, 2)], 0.5),
    ],
)  # fmt: skip
def test_values_that_count(returned: object, value: float | None) -> None:
    assert check_returned("f", returned) == Outcome(value)


@pytest.mark.parametrize("returned", [[math.nan], [math.inf], [-math.inf], [10**400], np.array([np.nan])])
def test_values_that_are_failures(returned: object) -> None:
    outcome = check_returned("f", returned)
    assert outcome.value is None
    assert outcome.failure.startswith("returned")


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        ([1.0, 2.0], "[1.0, 2.0] (list of length 2)"), ([], "[] (list of length 0)"), (1.0, "1.0 (float)"),
        (None, "None (NoneType)"), (["1"], "its value is a str"), ("1", "'1' (str of length 1)"), ({"f": 1}, "(dict"),
        ([[1.0]], "its value is a list"), ([1j], "its value is a complex"),
        ([np.array([1.0])], "its value is a ndarray"),
        ([np.str_("1")], "its value is a str"),
    ],
)  # fmt: skip
def test_values_that_stop_the_run(returned: object, shown: str) -> None:
    with pytest.raises(RewardError) as caught:
        check_returned("my_reward", returned)
    assert "`my_reward` returned" in caught.value.message
    assert shown in caught.value.message
    assert "my_reward" in caught.value.hint


def rollout() -> Rollout:
    segments = (Segment("prompt", (1,), (False,)), Segment("sampled", (2,), (True,), (-0.5,)))
    return Rollout(Problem("t/0", "p", (1,)), 0, segments, "text", "stop", 0, 5)


FAILED = Outcome(None, "raised ValueError: no")


@pytest.mark.parametrize(
    ("weights", "outcomes", "reward"),
    [
        ((1.0, 0.5), (Outcome(1.0), Outcome(-1.0)), 0.5),
        ((1.0, 0.5), (Outcome(None), Outcome(1.0)), 0.5),
        ((1.0, 0.5), (Outcome(None), Outcome(None)), None),
        ((1.0, 0.5), (Outcome(1.0), FAILED), None),
        ((1.0, 0.0), (Outcome(1.0), FAILED), 1.0),
        ((1.0, 0.0), (Outcome(None), Outcome(1.0)), None),
        ((1.0, 0.0), (Outcome(0.0), Outcome(9.0)), 0.0),
        ((-2.0, 1.0), (Outcome(1.0), Outcome(0.5)), -1.5),
    ],
)
def test_weighted_sum(weights: tuple[float, float], outcomes: tuple[Outcome, Outcome], reward: float | None) -> None:
    scored = combine(rollout(), ("a", "b"), weights, dict(zip("ab", outcomes, strict=True)))
    assert scored.reward == reward
    assert scored.scores == {"a": outcomes[0].value, "b": outcomes[1].value}
    assert scored.failures == {n: o.failure for n, o in zip("ab", outcomes, strict=True) if o.failure}


def test_a_sum_that_overflows_is_unscored() -> None:
    scored = combine(rollout(), ("a",), (1e10,), {"a": Outcome(1e300)})
    assert scored.reward is None
    assert "inf" in scored.failures["weighted sum"]


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


def test_a_value_whose_square_no_float_holds_is_unscored() -> None:
    item = rollout()
    huge = combine(item, ("a",), (2.0,), {"a": Outcome(9e99)})
    assert huge.reward is None
    assert huge.failures == {"weighted sum": "the weighted sum is 1.8e+100"}
    assert combine(item, ("a",), (1.0,), {"a": Outcome(-9e99)}).reward == -9e99
