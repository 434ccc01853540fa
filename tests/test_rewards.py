"""The loading of reward functions, what they may return, and the weighted sum."""

from __future__ import annotations

import math
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from strop.config import RewardsConfig
from strop.errors import RewardError
from strop.rewards.call import BoundFunction, Completion, check_returned
from strop.rewards.combine import Outcome, combine, make_rules
from strop.rewards.contract import Declaration
from strop.rewards.library import LIBRARY
from strop.rewards.load import load_function, read_entries
from strop.rewards.pool import RewardPool
from strop.types import Problem, Rollout, Segment

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


def test_a_value_whose_square_no_float_holds_is_unscored() -> None:
    item = rollout()
    huge = combine(item, ("a",), (2.0,), {"a": Outcome(9e99)})
    assert huge.reward is None
    assert huge.failures == {"weighted sum": "the weighted sum is 1.8e+100"}
    assert combine(item, ("a",), (1.0,), {"a": Outcome(-9e99)}).reward == -9e99


@pytest.mark.parametrize(
    ("kinds", "weights", "deciding"),
    [
        ("correctness other format", (1, 1, 1), {"correctness"}),
        ("other format", (1, 1), {"other"}),
        ("format length", (1, 1), {"format"}),
        ("other format", (-1, 1), {"format"}),  # what is not wanted does not say what is right
        ("correctness other", (0, 1), {"other"}),
        ("length repetition", (1, 1), set()),
    ],
)
def test_who_says_what_is_right(kinds: str, weights: tuple[float, ...], deciding: set[str]) -> None:
    names = kinds.split()
    rules = make_rules(names, weights, {name: Declaration(kind=name) for name in names})  # type: ignore[arg-type]
    assert set(rules.marks) == deciding


# --- options of built-in functions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("regex_answer", {}, "a regular expression is needed"),
        ("regex_answer", {"pattern": "(a+)+"}, "a repeat stands inside a repeat"),
        ("json_schema", {"schema": {"type": "nope"}}, "cannot use a schema"),
        ("json_schema", {"schema": 3}, "an object is needed"),
        ("reasoning_gym", {"dataset": "chainsum"}, "did you mean `chain_sum`"),
        ("numeric", {"tolerance": "a"}, "a number is needed"),
        ("numeric", {"tolerance": -1}, "at least 0"),
        ("numeric", {"tolerence": 1}, "there is no option"),
        ("mcq", {"first_index": "a"}, "a number is needed"),
        ("script_consistency", {"script": "Latn"}, "there is no script"),
        ("script_consistency", {"script": 3}, "cannot be used"),
        ("soft_overlong", {"cache": 400}, "does not fit"),
        ("soft_overlong", {"cache": "x"}, "cannot be used"),
        ("cosine", {"min_value_wrong": "x"}, "a number is needed"),
        ("l1_max", {}, "a number of tokens is needed"),
        ("ngram_repetition", {"n": 0}, "above 0"),
        ("python_tests", {"unsafe": "yes"}, "true or false"),
        ("python_tests", {"memory_mib": 1.5}, "whole number"),
    ],
)
def test_a_bad_option_is_an_error_before_anything_is_started(
    name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(RewardError, match=message) as error:
        RewardPool(RewardsConfig(funcs=(name,), options={name: options}), default_funcs=(), max_completion_length=128)
    assert error.value.hint


def test_every_built_in_that_needs_no_option_is_taken_without_one() -> None:
    for name in sorted(set(LIBRARY) - {"regex_answer", "l1_max"}):
        pool = RewardPool(RewardsConfig(funcs=(name,)), default_funcs=(), max_completion_length=128)
        assert pool.names == (name,)
