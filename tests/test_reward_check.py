"""The check before step 0: what stops a run, what is only said, and that nothing slow is loaded before."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from engines import tiny_model
from tokenizers_for_tests import CHATML, QWEN3_THINKING, char_tokenizer
from typer.testing import CliRunner

from strop import cli, load_config, train
from strop.config import RewardsConfig
from strop.errors import RewardError
from strop.rewards.audit.bench import Setting
from strop.rewards.check import CheckResult, run_check
from strop.rewards.library import LIBRARY
from strop.tasks.render import Renderer
from strop.trainer.rewards_command import check_config, first_problems
from strop.types import Problem

FUNCTIONS = r"""
from strop.rewards.contract import reward

def text(c):
    return c if isinstance(c, str) else c[-1]["content"]

def answer_of(c):
    return text(c).split("</think>")[-1].strip()

def fair(completions, answer, **kwargs):
    return [float(answer_of(c) == a) for c, a in zip(completions, answer)]

@reward(kind="correctness")
def never(completions, answer, **kwargs):
    return [0.25 if answer_of(c) else 0.0 for c in completions]

@reward(kind="correctness")
def seldom(completions, answer, **kwargs):
    return [float(answer_of(c) == a and a != "3") for c, a in zip(completions, answer)]

@reward(kind="correctness")
def always(completions, **kwargs):
    return [1.0 for c in completions]

def nothing(completions, **kwargs):
    return [0.0 for c in completions]

def half(completions, **kwargs):
    return [0.5 for c in completions]

def greedy(completions, **kwargs):
    return [len(text(c)) / 100 for c in completions]

def two(completions, **kwargs):
    return [1.0, 2.0]

def lacks(completions, reference, **kwargs):
    return [1.0 for c in completions]

def picky(completions, answer, **kwargs):
    if answer[0] == "3":
        raise ValueError("no threes")
    return fair(completions, answer)

def sleeps(completions, **kwargs):
    import time
    time.sleep(60)

def strict_spaces(completions, answer, **kwargs):
    return [float(text(c).split("</think>")[-1].lstrip() == a) for c, a in zip(completions, answer)]

def broken(completions, answer, **kwargs):
    return [{}[a] for a in answer]

def first_word(completions, answer, **kwargs):
    return [float(answer_of(c).split()[-1] == a) for c, a in zip(completions, answer)]

def tagged(completions, answer, **kwargs):
    found = [text(c).split("<result>")[-1].split("</result>")[0].strip() for c in completions]
    return [2.0 * (f == a) for f, a in zip(found, answer)]

def strict_form(completions, **kwargs):
    import re
    form = r"^<way>\n.*?\n</way>\n<result>\n.*?\n</result>\n$"
    return [0.5 * bool(re.match(form, text(c))) for c in completions]

def talks(completions, answer, **kwargs):
    print("-" * 20, completions, flush=True)
    return fair(completions, answer)

@reward(kind="format")
def wants_opening_tag(completions, **kwargs):
    return [float(text(c).startswith("<think>") and "</think>" in text(c)) for c in completions]
"""


def setting(
    folder: Path, funcs: Sequence[str], rows: Sequence[Mapping[str, Any]] | None = None, template: str = CHATML,
    prompt: str = "", **config: Any,
) -> Setting:  # fmt: skip
    """A run on rows with small answers, without any model."""
    (folder / "mine.py").write_text(FUNCTIONS)
    tokenizer = char_tokenizer(template)
    renderer = Renderer(tokenizer)
    problems = []
    for i, row in enumerate(rows if rows is not None else [{"answer": str(n)} for n in range(1, 7)]):
        messages = ({"role": "user", "content": f"{prompt}{i}+1="},)
        ids, prefill = renderer.render(messages)
        problems.append(Problem(f"sums/train/{i}", messages, ids, row, prefill))
    entries = tuple(name if name in LIBRARY else f"{folder}/mine.py:{name}" for name in funcs)
    return Setting(
        config=RewardsConfig(funcs=entries, timeout_s=1.0, **config),
        default_funcs=(),
        problems=tuple(problems),
        encode=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        stop_token_id=3,
        max_completion_length=200,
        num_generations=4,
    )


def said(result: CheckResult, severity: str) -> list[str]:
    return [complaint.message for complaint in result.complaints if complaint.severity == severity]


def test_a_fair_reward_passes(tmp_path: Path) -> None:
    result = run_check(setting(tmp_path, ["fair", "think_format"], weights=(1.0, 0.1)))
    assert not result.failed
    assert said(result, "WARN") == []
    assert len(result.passed) == 3
    assert "6 rows" in result.passed[0]
    result.raise_if_failed()


def test_a_correctness_function_that_refuses_every_reference_answer_stops_the_run(tmp_path: Path) -> None:
    result = run_check(setting(tmp_path, ["never"]))
    (failure,) = said(result, "FAIL")
    assert "`never` gives the reference answer '1' 0.25 on 6 of 6 rows; its maximum, 1, is needed" in failure
    assert "tried: boxed, answer tag, hashes, answer line, bare," in failure
    assert "each with prose, think, no reasoning" in failure
    assert "row sums/train/0" in failure
    with pytest.raises(RewardError, match="the check of reward functions failed") as error:
        result.raise_if_failed()
    assert "rewards.check: false" in error.value.hint


def test_one_refused_reference_answer_is_said_and_does_not_stop(tmp_path: Path) -> None:
    result = run_check(setting(tmp_path, ["seldom"]))
    assert not result.failed
    (warning,) = said(result, "WARN")
    assert "0 on 1 of 6 rows" in warning
    assert "row sums/train/2" in warning


def test_a_correctness_function_that_pays_for_nothing_stops_the_run(tmp_path: Path) -> None:
    result = run_check(setting(tmp_path, ["always"]))
    assert result.failed
    assert "an empty completion earns 1, as much as the right answer" in said(result, "FAIL")[0]


@pytest.mark.parametrize(
    ("function", "stops", "message"),
    [
        ("nothing", False, "right answers among them, get 0"),
        ("half", False, "right answers among them, get 0.5"),
        ("two", True, "reward `two` returned [1.0, 2.0]"),
        (
            "lacks",
            True,
            "reward `lacks` needs the column reference, which row sums/train/0 does not have; it has answer",
        ),
        ("broken", True, "and 5 other rows cannot be scored, whatever the completion: `broken` raised KeyError"),
    ],
)
def test_constants_contracts_and_columns(function: str, stops: bool, message: str, tmp_path: Path) -> None:
    """A constant fails the command; it may come from a form of answers that is not known, and stops no run."""
    given = setting(tmp_path, [function])
    starting = run_check(given, starting=True)
    assert starting.failed == stops
    assert message in " ".join(said(starting, "FAIL" if stops else "WARN"))
    assert run_check(given).failed


def test_a_function_that_fails_on_empty_completions_alone_is_checked_all_the_same(tmp_path: Path) -> None:
    result = run_check(setting(tmp_path, ["first_word"]))
    assert not result.failed
    (warning,) = said(result, "WARN")
    assert warning.startswith("an empty completion cannot be scored: `first_word` raised IndexError")
    assert any("earn more than wrong ones on 6 rows" in line for line in result.passed)


def test_rewards_as_gsm8k_notebooks_have_them_are_understood(tmp_path: Path) -> None:
    """Several functions that declare nothing, tags that only the prompt names, a form that ends with a line break."""
    prompt = "Answer like this:\n<way>\n...\n</way>\n<result>\n...\n</result>\n"
    result = run_check(setting(tmp_path, ["tagged", "strict_form"], prompt=prompt), starting=True)
    assert not result.failed
    assert "right answers earn more than wrong ones on 6 rows (<way> and <result> on lines and a line break)" in (
        result.passed
    )
    (warning,) = said(result, "WARN")
    assert warning.startswith("no completion counts as right")
    assert "the right answer gets `strict_form` 0.5." in warning
    assert '@reward(kind="correctness", high=...)' in result.complaints[0].hint


def test_what_functions_print_about_made_up_completions_is_dropped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert not run_check(setting(tmp_path, ["talks"])).failed
    assert capfd.readouterr() == ("", "")
    given = setting(tmp_path, ["talks"])
    (tmp_path / "mine.py").write_text('import os\nprint("last words", flush=True)\nos._exit(3)\n')
    with pytest.raises(RewardError):
        run_check(given)
    assert "last words" in capfd.readouterr().err


@pytest.mark.parametrize(("script", "word"), [("Cyrillic", "\u0434\u0430"), ("Chinese", "\u662f")])
def test_answers_and_prompts_in_other_scripts_are_no_alarm(script: str, word: str, tmp_path: Path) -> None:
    rows = [{"answer": word * n} for n in range(1, 5)]
    options = {"script_consistency": {"script": script}}
    result = run_check(setting(tmp_path, ["exact", "script_consistency"], rows=rows, options=options))
    assert said(result, "FAIL") == said(result, "WARN") == []


def test_a_reward_that_is_no_verdict_starts(tmp_path: Path) -> None:
    result = run_check(setting(tmp_path, ["greedy"]))
    assert not result.failed
    assert "the reference answer '1' earns 0.5, and a wrong answer 0.5, on 6 of 6 rows" in said(result, "WARN")[0]
    without_gold = run_check(setting(tmp_path, ["greedy"], rows=[{"topic": "a"}, {"topic": "b"}]))
    assert not without_gold.failed
    assert any("no completion is known to be right" in line for line in without_gold.passed)


def test_rows_that_cannot_be_scored_are_named_and_the_others_checked(tmp_path: Path) -> None:
    result = run_check(setting(tmp_path, ["picky"]))
    assert not result.failed
    (warning,) = said(result, "WARN")
    assert warning.startswith(
        "row sums/train/2 cannot be scored, whatever the completion: `picky` raised ValueError: no threes"
    )
    assert "right answers earn more than wrong ones on 5 rows" in " ".join(result.passed)


def test_a_function_that_hangs_is_named_and_does_not_hold_up_the_start(tmp_path: Path) -> None:
    begin = time.monotonic()
    result = run_check(setting(tmp_path, ["sleeps"], rows=[{"answer": str(n)} for n in range(40)]))
    assert time.monotonic() - begin < 20
    (warning,) = said(result, "WARN")
    assert "cannot be scored, whatever the completion: `sleeps` ran past the limit of 1 s" in warning
    assert not result.failed


def test_white_space_that_is_refused_is_a_warning_and_a_strict_function_a_note(tmp_path: Path) -> None:
    assert "line break at the end" in said(run_check(setting(tmp_path, ["strict_spaces"])), "WARN")[0]
    strict = run_check(setting(tmp_path, ["exact"]))
    assert said(strict, "WARN") == []
    assert len(said(strict, "NOTE")) == 1


def test_a_prefilled_thinking_tag_is_recognised_or_the_function_named(tmp_path: Path) -> None:
    fine = run_check(setting(tmp_path, ["numeric", "think_format"], template=QWEN3_THINKING))
    assert not fine.failed
    assert any("prefilled <think> is recognised" in line for line in fine.passed)
    blind = run_check(setting(tmp_path, ["numeric", "wants_opening_tag"], template=QWEN3_THINKING))
    assert blind.failed
    assert "wants_opening_tag still asks for <think> in the completion" in " ".join(said(blind, "FAIL"))
    assert run_check(setting(tmp_path, ["numeric", "wants_opening_tag"])).failed is False


def test_the_lint_is_part_of_the_check(tmp_path: Path) -> None:
    result = run_check(setting(tmp_path, ["kimi"]))
    assert any("kimi-alone" in message for message in said(result, "FAIL"))


# --- in a run --------------------------------------------------------------------------------------------------------


def run_config(folder: Path, function: str, **rewards: Any) -> dict[str, Any]:
    (folder / "mine.py").write_text(FUNCTIONS)
    return {
        "model": {"path": str(tiny_model()), "engine": "transformers"},
        "lora": {"r": 0},
        "task": {"name": "arithmetic", "max_prompt_length": 40},
        "rewards": {"funcs": [f"{folder}/mine.py:{function}"], **rewards},
        "rollout": {"num_prompts": 2, "num_generations": 2, "max_completion_length": 8},
        "run": {"max_steps": 1, "eval_num_problems": 0, "report_to": ["none"], "threads": 1},
    }


def test_a_run_stops_before_step_0_and_can_be_told_not_to_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RewardError, match="`never` gives the reference answer") as error:
        train(run_config(tmp_path, "never"), out=tmp_path / "run")
    assert "row arithmetic/train/" in error.value.message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    summary = train(run_config(tmp_path, "never", check=False), out=tmp_path / "again")
    assert summary["steps"] == 1
    assert "reward functions are not checked before step 0 (rewards.check: false)" in capsys.readouterr().out


def test_what_does_not_stop_a_run_is_said_when_it_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = train(run_config(tmp_path, "half"), out=tmp_path / "run")
    assert summary["steps"] == 1
    out = capsys.readouterr().out
    assert "note: check of reward functions: all " in out
    assert "\n  hint: look at what the functions return" in out
    assert not (tmp_path / "run" / "verdicts.jsonl").exists()


def test_the_first_problems_of_training_are_checked() -> None:
    class Task:
        def batch(self, step: int, num_prompts: int) -> tuple[Problem, ...]:
            return tuple(Problem(f"t/{(step * num_prompts + i) % 5}", "q", (1,)) for i in range(num_prompts))

    task: Any = Task()
    assert [p.id for p in first_problems(task, 2, 3)] == ["t/0", "t/1", "t/2"]
    assert [p.id for p in first_problems(task, 3, 8)] == [f"t/{i}" for i in range(5)]


@pytest.mark.parametrize("recipe", ["demo", "demo-lora"])
def test_the_demo_recipes_pass(recipe: str) -> None:
    root = Path(__file__).resolve().parent.parent
    result = check_config(load_config(root / "recipes" / f"{recipe}.yaml"))
    assert [c for c in result.complaints if c.severity != "NOTE"] == []


def test_the_command_exits_1_on_a_failure_and_2_on_a_mistake(tmp_path: Path) -> None:
    runner = CliRunner()
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"rewards": {"funcs": [f"{tmp_path}/mine.py:nothing"]}}))
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    failed = runner.invoke(cli.app, ["rewards", "check", str(config), "--rows", "3"])
    assert failed.exit_code == 1, failed.output
    assert "FAIL  all " in failed.output
    fine = runner.invoke(cli.app, ["rewards", "check", str(config), "--set", "rewards.funcs=[exact]"])
    assert fine.exit_code == 0, fine.output
    assert "ok    right answers get the maximum" in fine.output
    missing = runner.invoke(cli.app, ["rewards", "check", str(config), "--set", "rewards.funcs=[exat]"])
    assert missing.exit_code == 2, missing.output
    assert "exact" in missing.output
