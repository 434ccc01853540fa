"""The audit passes Strop's own rewards, catches each known fault by a named probe, and says what it could not try."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import exploitable_rewards
import pytest
from typer.testing import CliRunner

from strop import cli, load_config
from strop.errors import RewardError
from strop.rewards.audit import robustness, solvers, texts
from strop.rewards.audit.length import pearson, spearman
from strop.rewards.audit.registry import FAMILIES, Finding
from strop.rewards.audit.report import Report
from strop.rewards.audit.run import all_probes, choose
from strop.trainer.rewards_command import audit_config

BAD = exploitable_rewards.__file__
BOXED = r"{question} Think first, then put the answer in \boxed{{}}."
TAGGED = "{question} Think between <think> tags, then answer between <answer> tags."
SUMS = [
    {"question": f"A shop has {a} apples and gets {b} more. How many are there?", "answer": str(a + b)}
    for a, b in ((313, 45), (1200, 34), (77, 5), (2401, 808), (64, 16), (909, 90), (15, 4), (4000, 321))
]
ALGEBRA = [
    {"question": f"Problem {i}.", "answer": answer}
    for i, answer in enumerate((r"\frac{3}{4}", "x^2+1", r"\sqrt{2}", "(1,2)", "12", r"2\pi", "0.5", "-7"))
]


def dataset(folder: Path, rows: Sequence[Mapping[str, Any]], template: str) -> dict[str, Any]:
    path = folder / "rows.jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, *({**r, "question": f"Held: {r['question']}"} for r in rows)])
    )
    return {
        "name": "dataset", "path": str(path), "eval_split": None, "eval_size": len(rows), "max_prompt_length": 400,
        "template": template,
    }  # fmt: skip


def audit(
    task: Mapping[str, Any],
    funcs: Sequence[str],
    *,
    weights: Sequence[float] = (),
    only: Sequence[str] = (),
    length: int = 700,
    rows: int = 4,
    rewards: Mapping[str, Any] | None = None,
    **options: Any,
) -> Report:
    config = load_config(
        {
            "task": task,
            "rewards": {"funcs": list(funcs), "weights": list(weights), **(rewards or {})},
            "rollout": {"max_completion_length": length, "num_generations": 8},
            "objective": {"scale_rewards": "none"},
        }
    )
    return audit_config(config, rows=rows, only=only, **options)


def by_id(report: Report) -> dict[str, Finding]:
    return {probe.id: finding for probe, finding in report.findings}


def failing(report: Report) -> dict[str, str]:
    return {identity: finding.said for identity, finding in by_id(report).items() if finding.severity == "FAIL"}


# --- our own rewards -------------------------------------------------------------------------------------------------


def test_our_own_rewards_pass_every_probe(tmp_path: Path) -> None:
    funcs = [
        "numeric",
        "think_format",
        "single_box",
        "answer_last",
        "soft_overlong",
        "ngram_repetition",
        "compression_ratio",
    ]
    weights = [1.0, 0.1, 0.1, 0.1, 0.5, 0.2, 0.2]
    report = audit(dataset(tmp_path, SUMS, BOXED), funcs, weights=weights, rows=3, length=300)
    assert failing(report) == {}
    assert not report.failed
    assert len(report.findings) == len(all_probes())
    found = by_id(report)
    assert {i for i, finding in found.items() if finding.severity == "SKIP"} == set()
    assert {i for i, finding in found.items() if finding.severity == "WARN"} <= {"Z9", "Z15", "P2"}
    assert found["P1"].of == found["Z1"].of == 3
    assert found["P1"].max_score == pytest.approx(1.3, abs=0.03)
    assert found["G1"].of == 1000
    assert [function.gated for function in report.functions] == [False, True, True, True, False, False, False]


LIBRARY: dict[str, tuple[Any, str, list[str], list[float], list[str]]] = {
    "math": (
        ALGEBRA[:3],
        BOXED,
        ["math", "think_format"],
        [1.0, 0.1],
        ["Z9", "Z10", "Z11", "Z12", "Z14", "Z17", "P", "X", "R4"],
    ),
    "gsm8k": (SUMS, "{question} End with #### and the answer.", ["gsm8k"], [1.0], ["Z", "P"]),
    "exact": (ALGEBRA, "{question} Reply with the answer and nothing else.", ["exact"], [1.0], ["Z", "P"]),
    "gr3": (SUMS, BOXED, ["numeric", "gr3"], [1.0, 0.5], ["L", "G", "B", "R4"]),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_other_stacks_of_the_library_pass(name: str, tmp_path: Path) -> None:
    rows, template, funcs, weights, only = LIBRARY[name]
    report = audit(dataset(tmp_path, rows, template), funcs, weights=weights, only=[*only, "P1", "R5"], rows=len(rows))
    assert failing(report) == {}
    assert by_id(report)["P1"].severity == "OK"


def test_countdown_passes_and_its_forbidden_forms_are_really_tried() -> None:
    report = audit({"name": "countdown"}, ["countdown"], only=["Z", "P", "D8", "X", "R4"])
    assert failing(report) == {}
    found = by_id(report)
    assert found["P1"].severity == "OK"
    assert found["Z12"].of > 4


CODE = [
    {
        "question": f"Write add{n}(a, b).",
        "test_list": [f"assert add{n}(1, 2) == {3 + n}", f"assert add{n}(0, 0) == {n}"],
        "code": f"def add{n}(a, b):\n    return a + b + {n}",
    }
    for n in range(4)
]
SCHEMA = {"type": "object", "required": ["name", "age"], "additionalProperties": False,
          "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 3}}}  # fmt: skip


def test_answers_that_are_no_text_are_found_for_code_json_and_choices(tmp_path: Path) -> None:
    probes = ["Z1", "Z6", "Z13", "Z14", "P", "X"]
    task = {**dataset(tmp_path, CODE, "{question}"), "answer_column": None}
    code = by_id(audit(task, ["python_tests"], only=[*probes, "D6"], rows=3, length=300))
    assert {i: f.said for i, f in code.items() if f.severity not in ("OK", "SKIP")} == {}
    assert code["P1"].said.startswith("code block")
    task = {**dataset(tmp_path, [{"question": f"{n}. Who?"} for n in range(4)], "{question}"), "answer_column": None}
    options = {"options": {"json_schema": {"schema": SCHEMA}}}
    shape = by_id(audit(task, ["json_schema"], only=probes, rows=3, rewards=options))
    assert {i for i, finding in shape.items() if finding.severity != "OK"} == set()
    choices = [{"question": f"{n}. A or B?", "answer": "AB"[n % 2]} for n in range(8)]
    letters = by_id(audit(dataset(tmp_path, choices, "{question} Answer: A or B"), ["mcq"], only=["Z", "P1"]))
    assert {i: f.said for i, f in letters.items() if f.severity == "FAIL"} == {}
    assert letters["P1"].severity == "OK"


# --- known faults ----------------------------------------------------------------------------------------------------

NUMBERS: dict[str, Any] = {"rows": SUMS, "template": BOXED}
TAGS: dict[str, Any] = {"rows": SUMS, "template": TAGGED}
FAULTS: dict[str, tuple[dict[str, Any], list[str], dict[str, Any], dict[str, str]]] = {
    "periodic_cosine": (NUMBERS, [], {"length": 2400}, {"L1": "rises with length"}),
    "rising_cosine": (NUMBERS, [], {"length": 2400}, {"L2": "rises with length", "L8": "rambles"}),
    "unanchored_format": (TAGS, ["tagged_answer"], {}, {"Z6": "full mark for form", "Z7": "full mark for form"}),
    "tag_count": (TAGS, ["tagged_answer"], {}, {"Z6": "full mark for form", "G7": "as much as a right one"}),
    "batch_wide_length": (NUMBERS, ["numeric"], {}, {"B1": "otherwise beside others"}),
    "group_length_alone": (NUMBERS, [], {}, {"L3": "the long right one no more", "L8": "give up early"}),
    "contains_the_answer": (NUMBERS, [], {}, {"Z9": "counts as right", "Z10": "counts as right", "Z14": "right"}),
    "evaluates_the_answer": (TAGS, [], {}, {"X1": "was run", "D8": "runs code", "Z5": "counts as right"}),
    "forgives_a_missing_reference": (NUMBERS, [], {}, {"R4": "column `answer`"}),
    "noisy": (NUMBERS, [], {}, {"D1": "another value when it is scored again"}),
    "salted": (NUMBERS, [], {}, {"D2": "in another process"}),
    "stalling": (NUMBERS, [], {}, {"R1": "hangs"}),
}  # fmt: skip


@pytest.fixture
def short_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What hangs, hangs as well for less than the two seconds that the audit waits."""
    monkeypatch.setattr(robustness, "HANG_LIMIT_S", 0.4)


@pytest.mark.usefixtures("short_hangs")
@pytest.mark.parametrize("name", FAULTS)
def test_each_known_fault_is_caught_by_a_named_probe(name: str, tmp_path: Path) -> None:
    data, others, settings, expected = FAULTS[name]
    funcs = [other if other == "numeric" else f"{BAD}:{other}" for other in others] + [f"{BAD}:{name}"]
    report = audit(dataset(tmp_path, data["rows"], data["template"]), funcs, only=list(expected), **settings)
    found = by_id(report)
    for identity, said in expected.items():
        assert found[identity].severity == "FAIL", (identity, found[identity])
        assert said in found[identity].said, found[identity].said
        assert found[identity].advice
    assert report.failed


@pytest.mark.usefixtures("short_hangs")
def test_a_lenient_countdown_is_caught_with_the_expression_that_shows_it() -> None:
    report = audit({"name": "countdown"}, [f"{BAD}:lenient_countdown"], only=["Z12", "Z13", "D8", "P1", "R1"])
    found = by_id(report)
    assert found["P1"].severity == "OK"
    assert found["Z12"].severity == "FAIL"
    shown = found["Z12"].example.split("<answer>")[1].split("</answer>")[0]
    assert "**" in shown or "//" in shown or "." in shown
    assert found["Z13"].severity == "WARN"
    assert "0.1" in found["Z13"].said
    assert found["D8"].severity == "FAIL"
    assert found["R1"].severity == "FAIL"
    assert "9**9**9" in found["R1"].example


def test_what_a_function_does_beside_computing_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STROP_TEST_FOLDER", str(tmp_path))
    rows = [{**row, "marks": [3, 1, 2]} for row in SUMS]
    report = audit(dataset(tmp_path, rows, BOXED), [f"{BAD}:meddling", f"{BAD}:noisy"], only=["D5", "D6", "D7", "D8"])
    found = by_id(report)
    assert found["D6"].severity == "FAIL"
    assert "write" in found["D6"].said
    assert "seen.txt" in found["D6"].said
    assert "`meddling` changes its arguments" in found["D7"].said
    assert "`meddling` reads the clock" in found["D8"].said
    assert "`noisy` draws from the global generator of random" in found["D5"].said
    assert "meddling" not in found["D5"].said


OWN = """
def correct(completions, answer, **kwargs):
    texts = [completion[0]["content"] for completion in completions]
    return [float(text.split("</think>")[-1].strip() == gold) for text, gold in zip(texts, answer)]

async def later(completions, answer, **kwargs):
    return correct(completions, answer)

def broken(completions, answer, **kwargs):
    return [answer["gold"]]
"""


@pytest.mark.parametrize("function", ["correct", "later"])
def test_the_function_of_the_readme_passes_also_where_it_is_awaited(function: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    funcs = [f"{tmp_path}/own.py:{function}"]
    report = audit(dataset(tmp_path, SUMS, "{question}"), funcs, only=["P1", "Z1", "Z13", "R4", "D6"], rows=3)
    assert {i: f.said for i, f in by_id(report).items() if f.severity != "OK"} == {}


@pytest.mark.parametrize(("function", "reason"), [("broken", "raised TypeError"), ("numeric", "no function with a")])
def test_rewards_that_score_nothing_do_not_pass(function: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    funcs = [function if function == "numeric" else f"{tmp_path}/own.py:{function}"]
    rows = [{**row, "answer": f"see {row['answer']}"} for row in SUMS]
    report = audit(dataset(tmp_path, rows, BOXED), funcs, only=["Z1", "P1", "R5"], rows=3)
    found = by_id(report)
    assert found["P1"].severity == "FAIL"
    assert reason in found["P1"].said
    assert found["Z1"].severity == "SKIP"
    assert found["R5"].severity == ("OK" if function == "numeric" else "FAIL")


# --- what it says ----------------------------------------------------------------------------------------------------


def test_a_probe_that_cannot_run_is_skipped_with_a_reason(tmp_path: Path) -> None:
    rows = [{"question": row["question"]} for row in SUMS]
    task = {**dataset(tmp_path, rows, BOXED), "answer_column": None}
    (tmp_path / "mine.py").write_text(
        "def f(completions, **kwargs):\n    return [float(len(str(c))) for c in completions]\n"
    )
    report = audit(task, [f"{tmp_path}/mine.py:f"], only=["Z1", "P1", "L1", "G1", "B2", "D1"])
    found = by_id(report)
    for identity in ("Z1", "P1", "L1", "G1"):
        assert found[identity].severity == "SKIP"
        assert "--gold" in found[identity].said
    assert found["B2"].severity == found["D1"].severity == "OK"


def test_known_good_completions_stand_in_where_rows_tell_none(tmp_path: Path) -> None:
    rows = [{"question": row["question"], "sum": row["answer"]} for row in SUMS]
    task = {**dataset(tmp_path, rows, BOXED), "answer_column": None}
    (tmp_path / "mine.py").write_text(
        "def f(completions, sum, **kwargs):\n"
        "    return [float(c[0]['content'] == f'it is: {s}') for c, s in zip(completions, sum)]\n"
    )
    good = tmp_path / "good.jsonl"
    lines = [{"id": f"rows/train/{i}", "completion": f"it is: {row['answer']}"} for i, row in enumerate([*SUMS, *SUMS])]
    good.write_text("".join(json.dumps(line) + "\n" for line in lines))
    mine = [f"{tmp_path}/mine.py:f"]
    report = audit(task, mine, only=["P1", "Z1", "Z13", "Z19"], known_good=good)
    assert {finding.severity for finding in by_id(report).values()} == {"OK"}
    by_column = audit(task, mine, only=["P1"], gold="sum")
    assert by_id(by_column)["P1"].severity == "FAIL"
    assert "no rendering of the reference answer" in by_id(by_column)["P1"].said
    with pytest.raises(RewardError, match="`summ`; rows have question, sum"):
        audit(task, mine, only=["P1"], gold="summ")


def test_the_command_prints_a_table_writes_json_and_exits_1(tmp_path: Path) -> None:
    task = dataset(tmp_path, SUMS, BOXED)
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"task": task, "rewards": {"funcs": [f"{BAD}:contains_the_answer"]}}))
    out = tmp_path / "found.json"
    runner = CliRunner()
    result = runner.invoke(
        cli.app, ["rewards", "audit", str(config), "--only", "Z1,Z9,G4", "--rows", "6", "--json", str(out)]
    )
    assert result.exit_code == 1, result.output
    assert "Z9" in result.output
    assert "hint:" in result.output
    found = json.loads(out.read_text())
    assert found["counts"]["FAIL"] == 1
    assert [probe["id"] for probe in found["probes"]] == ["Z1", "Z9", "G4"]
    z9 = found["probes"][1]
    assert z9["rows"] == z9["of"] == 6
    assert z9["example"]
    assert z9["problem"].startswith("rows/train/")
    fine = runner.invoke(cli.app, ["rewards", "audit", str(config), "--only", "G4", "--set", "rewards.funcs=[numeric]"])
    assert fine.exit_code == 0, fine.output
    wrong = runner.invoke(cli.app, ["rewards", "audit", str(config), "--only", "Z99"])
    assert wrong.exit_code == 2
    assert "Z99" in wrong.output
    nowhere = runner.invoke(cli.app, ["rewards", "audit", str(config), "--json", str(tmp_path / "none" / "found.json")])
    assert nowhere.exit_code == 2
    assert "cannot be written" in nowhere.output
    assert "probe " not in nowhere.output


def test_the_lint_is_part_of_the_audit(tmp_path: Path) -> None:
    task = dataset(tmp_path, SUMS, BOXED)
    report = audit(task, ["kimi"], only=["B2"])
    assert report.failed
    assert "kimi-alone" in {item["id"] for item in report.lint}
    allowed = audit(task, ["kimi"], only=["B2"], rewards={"allow": [item["id"] for item in report.lint]})
    assert not allowed.failed
    assert {item["severity"] for item in allowed.lint} == {"REPORT"}


# --- parts -----------------------------------------------------------------------------------------------------------


def test_probes_are_chosen_by_id_and_family() -> None:
    every = [probe.id for probe in all_probes()]
    assert len(every) == len(set(every)) > 50
    assert every[0] == "Z1"
    assert {probe.family for probe in all_probes()} == set(FAMILIES.values())
    assert [probe.id for probe in choose(["P", "z1"], ["P2"])] == ["Z1", "P1"]
    with pytest.raises(RewardError, match="--skip names `Q`"):
        choose((), ["Q"])


def test_the_page_lists_every_probe() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "audit.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| ([A-Z]\d+) \| (.*?) \| (.*) \|$", page, re.MULTILINE)
    assert listed == [(p.id, p.title, " ".join((p.run.__doc__ or "").split())) for p in all_probes()]


def test_countdown_is_solved_missed_and_cheated() -> None:
    value = solvers.solve([3, 5, 7], 26)
    assert value is not None
    assert eval(value) == 26
    assert solvers.solve([2, 2], 99) is None
    wrong = solvers.wrong_expression([3, 5, 7], 15)
    assert eval(wrong) != 15
    for numbers, target, text in solvers.FORBIDDEN:
        assert solvers.solve(numbers, target) is None
        assert abs(eval(text) - target) < 1e-5


def test_correlations_are_those_of_the_definition() -> None:
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert pearson([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [5, 5, 5, 5]) == 0
    assert spearman([1, 2, 3], [1, 1, 2]) == pytest.approx(0.866, abs=1e-3)


def test_the_payloads_would_work_where_they_are_run(tmp_path: Path) -> None:
    """Else the security probes pass because nothing could happen."""
    import pickle
    import subprocess
    import sys

    run: dict[str, list[str]] = {
        "import in an expression": ["-c", "eval(input())"],
        "attribute walk": ["-c", "import os; eval(input())"],
        "exec of a text": ["-c", "eval(input())"],
        "statement": ["-c", "import sys; exec(sys.stdin.read())"],
        "lambda that is called": ["-c", "eval(input())"],
        "format field and f-string": ["-c", "eval('f' + repr(input()))"],
    }
    for number, (name, command) in enumerate(run.items()):
        marker = tmp_path / str(number)
        text = texts.CODE_FORMS[name](marker)
        subprocess.run([sys.executable, *command], input=text, text=True, check=False, capture_output=True)
        assert marker.is_dir(), name
    shell = tmp_path / "shell"
    subprocess.run(["sh", "-c", f"echo {texts.CODE_FORMS['shell'](shell)}"], check=False, capture_output=True)
    assert shell.is_dir()
    assert len(texts.CODE_FORMS) == len(run) + 1
    pickle.loads(texts.DATA_FORMS["pickle"](tmp_path / "pickle").encode())
    assert (tmp_path / "pickle").is_dir()
