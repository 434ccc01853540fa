"""The rewards for patterns, JSON schemas and data sets of reasoning-gym, and what they refuse to work with."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest
from scores import score

from strop.errors import RewardError
from strop.rewards.gym import SCORERS
from strop.rewards.pattern import PATTERN_TAIL, compile_pattern

NUMBER = {"pattern": r"Answer:\s*(-?\d+(?:\.\d+)?)"}


@pytest.mark.parametrize(
    ("text", "expected", "when_cut"),
    [
        ("Answer: 72", 1.0, 0.0), ("Answer: 72 apples", 1.0, 1.0), ("Answer: 1 Answer: 72.", 1.0, 1.0),
        ("Answer: 72 Answer: 1.", 0.0, 0.0), ("Answer: 721.", 0.0, 0.0), ("72", 0.0, 0.0), ("", 0.0, 0.0),
        ("<think>Answer: 72", 0.0, 0.0), ("<think>Answer: 1</think>Answer: 72.", 1.0, 1.0),
        ("Answer: 72" + " so" * PATTERN_TAIL, 0.0, 0.0),
    ],
)  # fmt: skip
def test_regex_answer(text: str, expected: float, when_cut: float) -> None:
    assert score("regex_answer", text, options=NUMBER, answer="72") == expected
    assert score("regex_answer", text, truncated=True, options=NUMBER, answer=72) == when_cut
    assert score("regex_answer", text, options=NUMBER, answer=None) is None


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("", "is needed"), (5, "is needed"), (["(a)"], "is needed"), (None, "is needed"),
        ("(a", "no regular expression"),
        ("a", "it has 0 groups, 1 is needed"), ("(a)(b)", "it has 2 groups"), ("x" * 201, "at most 200"),
        ("(a+)*b", "a repeat stands inside a repeat"), ("(?:a?){30}(b)", "a repeat stands inside"),
        ("(?:(?:a|b)+c)*(d)", "inside a repeat"), ("(?:a|ab)*(c)", "alternatives stand inside a repeat"),
        (r"(a)\1", "refers to a group"), (r"(?P<x>a)(?P=x)", "refers to a group"),
        (r"\s*\s*\s*\s*(x)", "too many ways"), ("(a{0,99})" + "b{0,99}" * 4, "too many ways"),
    ],
)  # fmt: skip
def test_patterns_that_are_refused(pattern: Any, problem: str) -> None:
    with pytest.raises(RewardError) as caught:
        score("regex_answer", "x", options={"pattern": pattern}, answer="72")
    assert problem in caught.value.message
    assert "rewards.options.regex_answer.pattern" in caught.value.hint


@pytest.mark.parametrize(
    "pattern", [r"\s?\s?\s*\s*\s*(x)", r".*\s*.*(x)", r"(?:\w{3},)+(\d{3})", r"(?>a+)a*(b)", r"(\d++)"]
)
def test_a_pattern_that_is_taken_ends(pattern: str) -> None:
    compiled = compile_pattern(pattern, option="x")
    for text in (" " * PATTERN_TAIL, "a" * PATTERN_TAIL, "abc," * 50):
        start = time.process_time()
        list(compiled.finditer(text))
        assert time.process_time() - start < 15


SCHEMA = {
    "type": "object",
    "properties": {"answer": {"const": 42}, "id": {"type": "string"}, "why": {"$ref": "#/$defs/text"}},
    "required": ["answer"],
    "additionalProperties": False,
    "$defs": {"text": {"type": "string", "pattern": "^[a-z ]*$"}},
}


@pytest.mark.parametrize(
    ("text", "expected", "when_cut"),
    [
        ('{"answer": 42}', 1.0, 0.0), ('<think>hm</think>\n{"answer": 42.0, "why": "so"}\n', 1.0, 0.0),
        ('so\n```json\n{"answer": 42}\n```\nas said', 1.0, 1.0), ('```\n{"answer": 42}\n```', 1.0, 1.0),
        ('{"answer": 43}', 0.0, 0.0), ('{"answer": 42, "answer": 42}', 0.0, 0.0), ('{"answer": 42} so', 0.0, 0.0),
        ('{"answer": 42, "why": "NO"}', 0.0, 0.0), ('{"answer": 42, "more": 1}', 0.0, 0.0), ("42", 0.0, 0.0),
        ('{"answer": 42, "why": "' + "a" * 300 + '"}', 0.0, 0.0), ('{"answer": NaN}', 0.0, 0.0), ("", 0.0, 0.0),
        ('```json\n{"answer": 42}\n```\n```json\n{"answer": 42}\n```', 0.0, 0.0), ("{'answer': 42}", 0.0, 0.0),
        ('{"answer": 42' + " " * 20_000 + "}", 0.0, 0.0), ("[" * 5000 + "]" * 5000, 0.0, 0.0),
        ("[" * 40 + "]" * 40, 0.0, 0.0),
        ("9" * 5000, 0.0, 0.0), ("1e999", 0.0, 0.0), ("[" + "1," * 1500 + "1]", 0.0, 0.0),
        ('<think>{"answer": 42}', 0.0, 0.0),
    ],
)  # fmt: skip
def test_json_schema(text: str, expected: float, when_cut: float) -> None:
    assert score("json_schema", text, options={"schema": SCHEMA}) == expected
    assert score("json_schema", text, truncated=True, json_schema=json.dumps(SCHEMA)) == when_cut


def test_a_schema_of_the_row_comes_before_the_option() -> None:
    assert score("json_schema", "[1]", options={"schema": SCHEMA}, json_schema={"type": "array"}) == 1.0
    assert score("json_schema", "[1]", options={"schema": SCHEMA}, json_schema=None) == 0.0
    assert score("json_schema", "[1]", json_schema=None) is None
    assert score("json_schema", "[1, 1]", json_schema={"uniqueItems": True}) == 0.0
    assert score("json_schema", '{"$ref": 1}', json_schema={"properties": {"$ref": {"type": "integer"}}}) == 1.0


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"$ref": "https://example.org/schema"}, "does not lead to a definition of its own"),
        ({"$ref": "file:///etc/passwd"}, "does not lead"), ({"$ref": "#/$defs/no"}, "leads nowhere"),
        ({"$ref": "#"}, "own"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}}, "leads back to itself"),
        ({"$dynamicRef": "#a"}, "`$dynamicRef`"), ({"$id": "https://example.org"}, "`$id`"),
        ({"type": "objekt"}, "objekt"),
        ({"$defs": {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(15)} | {"a15": {}},
          "$ref": "#/$defs/a0"}, "more than 2000 parts"),
        ([], "a list"), (5, "a int"), ("{", "not JSON"), ({"pattern": "(a+)*"}, "a repeat stands inside a repeat"),
        ({"patternProperties": {"(a+)*": {}}}, "a repeat stands inside"), ("x" * 60_000, "at most 50000"),
        (json.loads('{"not":' * 40 + "{}" + "}" * 40), "more than 32 levels"),
        ({"const": {1, 2}}, "cannot be written as JSON"),
    ],
)  # fmt: skip
def test_schemas_that_are_refused(schema: Any, problem: str) -> None:
    with pytest.raises(RewardError) as caught:
        score("json_schema", "[1]", json_schema=schema)
    assert problem in caught.value.message
    assert "rewards.options.json_schema.schema" in caught.value.hint


def test_json_schema_wants_a_schema() -> None:
    with pytest.raises(RewardError, match="has no schema") as caught:
        score("json_schema", "[1]", answer="x")
    assert "rewards.options.json_schema.schema" in caught.value.hint


def test_reasoning_gym_pays_for_right_answers_alone() -> None:
    gym = pytest.importorskip("reasoning_gym", reason="the extra `gym` is not installed")
    probes = ["", " ", "1e999999999", "9**9**9", "nan", "inf", "None", "True", "[]", "{}", "[[]]", "0", "(" * 400,
              "9" * 5000,
              "\ud800", "\0", "A,B,C", "__import__('os').system('true')", "x" * 9000]  # fmt: skip
    for name, needs_metadata in SCORERS.items():
        items = gym.create_dataset(name, seed=3, size=2)
        state = random.getstate()
        for number in range(2):
            item = items[number]
            row = {"answer": item["answer"], "metadata": json.dumps(item["metadata"], default=_plain)}
            gold = item["answer"]
            for right in (gold, rf"so \boxed{{{gold}}}", f"<answer>{gold}</answer>"):
                assert score("reasoning_gym", right, **row) == 1.0, name
            around = [form.format(gold) for form in ("{} spam", "not {}", "{} or 5", "it is {}", "{0}{0}", "<think>{}")]
            for wrong in (*around, *(probe for probe in probes if probe != gold)):
                assert score("reasoning_gym", wrong, **row) == 0.0, (name, wrong)
            assert score("reasoning_gym", gold, truncated=True, **row) == 0.0
            if not needs_metadata:
                assert score("reasoning_gym", gold, options={"dataset": name}, answer=gold) == 1.0, name
        assert random.getstate() == state, name


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"dataset": "puzzle24"}, "`puzzle24` is not on the list"),
        ({"dataset": "chain_sums"}, "did you mean `chain_sum`?"),
        ({}, "no data set is named"), ({"dataset": "sudoku"}, "needs the column `metadata`"),
    ],
)  # fmt: skip
def test_reasoning_gym_refuses_other_data_sets(options: dict[str, str], problem: str) -> None:
    with pytest.raises(RewardError) as caught:
        score("reasoning_gym", "12", options=options, answer="12")
    assert problem in caught.value.message
    if options.get("dataset") in (None, "sudoku"):  # a name that is none is refused whatever the row says
        assert score("reasoning_gym", "12", options=options, answer=None) is None


def test_no_scorer_on_the_list_evaluates_text() -> None:
    """What the data sets that were left out do shows in the source of their scorers."""
    pytest.importorskip("reasoning_gym", reason="the extra `gym` is not installed")
    import inspect

    from reasoning_gym.factory import DATASETS

    for name in SCORERS:
        source = inspect.getsource(DATASETS[name][0].score_answer)
        assert not any(word in source for word in ("eval(", "exec(", "parse_expr", "sympify", "random", "Fraction(")), (
            name
        )
