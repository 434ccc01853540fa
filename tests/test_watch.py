"""What a monitor does to a run: it warns, pauses or stops, loses nothing, and says the same after a resume."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from test_wiring import OPTIMIZER, config, reward_file

from strop import cli, train
from strop.errors import DiagnosisError
from strop.monitor.metrics import deterministic_part, read_metrics
from strop.trainer.checkpoint import read_latest

ROOT = Path(__file__).resolve().parent.parent
SOMETIMES = """
def picky(completions, completion_ids, **kwargs):
    if completion_ids[0][0] % 4 == 0:
        raise ValueError("an odd one")
    return [len(str(completions[0])) / 100]
"""


def given(folder: Path, **monitor: Any) -> dict[str, Any]:
    (folder / "picky.py").write_text(SOMETIMES)
    return {
        **config(rewards={"funcs": [f"{folder}/picky.py:picky"]}, run={"max_steps": 6, "save_steps": 4}),
        "monitor": {"window": 2, **monitor},
    }


def left_behind(out: Path) -> tuple[Any, ...]:
    """Everything of a run that two equal ones have in common."""
    rows = [deterministic_part(row) for row in read_metrics(out / "metrics.jsonl")]
    findings = [{**row, "action": ""} for row in read_metrics(out / "diagnoses.jsonl")]
    checkpoint = read_latest(out)
    assert checkpoint is not None
    tensors = {name: value.tolist() for name, value in checkpoint.tensors(OPTIMIZER).items()}
    return rows, findings, checkpoint.state["monitor"], tensors


@dataclass(frozen=True)
class Whole:
    """A run that was only warned."""

    out: Path
    summary: dict[str, Any]
    printed: str


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder, printed = tmp_path_factory.mktemp("whole"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        summary = train(given(folder), out=folder / "run")
    return Whole(folder / "run", summary, printed.getvalue())


def test_findings_are_told_logged_and_kept(whole: Whole) -> None:
    summary, out = whole.summary, whole.printed
    assert summary["stopped"] == "finished"
    assert "note: step 2: unscored (act, above 0.05): " in out
    assert "  hint: rewards.funcs: " in out
    assert "ceased" not in out
    rows = read_metrics(whole.out / "metrics.jsonl")
    unscored = [row["frac_unscored"] for row in rows]
    assert [row["monitor/unscored"] for row in rows[1:]] == pytest.approx(
        [(a + b) / 2 for a, b in itertools.pairwise(unscored)]
    )
    (first, *_) = [row for row in read_metrics(whole.out / "diagnoses.jsonl") if row["name"] == "unscored"]
    assert (first["step"], first["level"], first["action"]) == (1, "act", "warn")
    assert first["value"] == rows[1]["monitor/unscored"]
    assert {"text", "cause", "hint", "warn", "act"} <= first.keys()
    entry = next(e for e in summary["diagnoses"] if e["name"] == "unscored")
    assert (entry["first_step"], entry["level"]) == (1, "act")


def test_a_paused_run_goes_on_as_if_it_had_not_been(
    whole: Whole, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = given(tmp_path, actions={"unscored": "pause"})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    out = tmp_path / "run"
    with pytest.raises(typer.Exit) as ended:
        cli.train(path, out=out)
    assert ended.value.exit_code == 130
    assert f"paused after step 2; go on with: strop train {out}/config.resolved.yaml --out {out} --resume" in (
        capsys.readouterr().out
    )
    assert json.loads((out / "summary.json").read_text())["stopped"] == "paused"
    assert (out / "checkpoint-2" / "manifest.json").exists()
    cli.train(path, out=out, resume=True)
    assert "note: unscored holds since step 2: " in capsys.readouterr().out
    assert json.loads((out / "summary.json").read_text())["stopped"] == "finished"
    assert left_behind(out) == left_behind(whole.out)


def test_a_stop_is_an_error_with_a_checkpoint(tmp_path: Path) -> None:
    settings = given(tmp_path, actions={"unscored": "stop"})
    with pytest.raises(DiagnosisError, match="stopped after step 2 by the monitor unscored") as error:
        train(settings, out=tmp_path / "run")
    assert "rewards.funcs" in error.value.hint
    assert error.value.exit_code == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stopped"] == "stopped"
    assert read_latest(tmp_path / "run").step == 2  # type: ignore[union-attr]
    settings["monitor"] |= {"action": "pause", "actions": {}, "thresholds": {"unscored": [0.001, 0.01]}, "window": 3}
    assert train(settings, out=tmp_path / "run", resume=True)["stopped"] == "finished"


def test_a_reward_for_length_is_named_and_correctness_alone_is_not(tmp_path: Path) -> None:
    """recipes/ramble.yaml, its first steps: two of its twenty have to be enough."""
    recipe = yaml.safe_load((ROOT / "recipes" / "ramble.yaml").read_text())
    recipe["rewards"]["funcs"] = ["exact", f"{ROOT}/examples/ramble_reward.py:long_thoughts"]
    recipe["rollout"] |= {"num_prompts": 4, "max_completion_length": 64}
    recipe["run"] = {"max_steps": 2, "eval_num_problems": 0, "report_to": ["none"], "threads": 1}
    recipe["model"]["engine"] = "transformers"
    recipe["monitor"] = {"window": 2}
    train(recipe, out=tmp_path / "greedy")
    greedy = {row["name"]: row for row in read_metrics(tmp_path / "greedy" / "diagnoses.jsonl")}
    assert greedy["reward_length_correlation"]["level"] == "act"
    assert greedy["reward_length_correlation"]["value"] > 0.7
    recipe["rewards"] = {"funcs": ["exact"]}
    train(recipe, out=tmp_path / "plain")
    rows = read_metrics(tmp_path / "plain" / "metrics.jsonl")
    assert [row["monitor/reward_length_correlation"] for row in rows] == [0.0, 0.0]
    assert "reward_length_correlation" not in (tmp_path / "plain" / "diagnoses.jsonl").read_text()


DECLARED = """
from strop.rewards.contract import reward

@reward(kind="correctness")
def even(completion_ids, **kwargs):
    return [float(ids[0] % 2 == 0) for ids in completion_ids]

@reward(kind="format")
def form(completions, **kwargs):
    return [0.25] * len(completions)
"""


@pytest.mark.parametrize("gated", [True, False])
def test_the_history_holds_what_the_metrics_say(gated: bool, tmp_path: Path) -> None:
    (tmp_path / "declared.py").write_text(DECLARED)
    funcs = [f"{tmp_path}/declared.py:{name}" for name in ("even", "form")]
    rewards = {"funcs": funcs, "weights": [1.0, 3.0], "check": False, **({} if gated else {"gated": []})}
    settings = config(
        rewards=rewards, run={"max_steps": 4, "eval_steps": 1, "eval_num_problems": 2, "eval_num_generations": 2}
    )
    train(settings, out=tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    checkpoint = read_latest(tmp_path / "run")
    assert checkpoint is not None
    columns = checkpoint.state["monitor"]["history"]["columns"]
    same = {
        "accuracy": "accuracy", "length": "completions/mean_length", "clipped": "completions/clipped_ratio",
        "unscored": "frac_unscored", "zero_std": "frac_reward_zero_std", "entropy": "entropy", "grad_norm": "grad_norm",
        "logp_gap": "sampling/sampling_logp_difference/mean", "eval": "eval_pass@1", "all_right": "groups/all_right",
        "all_wrong": "groups/all_wrong", "repetition": "completions/repetition",
    }  # fmt: skip
    for column, metric in same.items():
        assert columns[column] == [row.get(metric) for row in rows], column
    assert all(value is not None for value in columns["eval"][:3])  # the last step is evaluated after training
    assert columns["reward"] == pytest.approx([row["reward"] / 4 for row in rows])
    right = [row["rewards/even/mean"] for row in rows]
    assert 0 < min(right) < 1
    paid = [0.75 * (r if gated else 1) for r in right]
    assert columns["format_share"] == pytest.approx([f / (r + f) for f, r in zip(paid, right, strict=True)])


def test_a_monitor_waits_for_a_step_that_was_finite(tmp_path: Path) -> None:
    """No checkpoint is written of a step that was not, so a run that ended there would lose steps."""
    body = "s = trainer_state.global_step; return [(1e40 if s == 1 else 1) * len(str(c)) for c in completions]"
    settings = config(
        rewards={"funcs": [reward_file(tmp_path, body)], "check": False},
        objective={"scale_rewards": "none"},
        run={"max_steps": 5, "save_steps": 50},
    )
    settings["monitor"] = {
        "window": 2, "action": "warn", "actions": {"truncated": "pause"}, "thresholds": {"truncated": [0.0, 0.0]}
    }  # fmt: skip
    summary = train(settings, out=tmp_path / "run")
    assert [row["nonfinite_steps"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 0]
    (found,) = [r for r in read_metrics(tmp_path / "run" / "diagnoses.jsonl") if r["name"] == "truncated"]
    assert (found["step"], found["action"]) == (1, "pause")
    assert (summary["stopped"], summary["steps"]) == ("paused", 3)
    assert read_latest(tmp_path / "run").step == 3  # type: ignore[union-attr]


EARLY = """
def early(completions, trainer_state, **kwargs):
    return [float(trainer_state.global_step < 8)] * len(completions)
"""


def falling(folder: Path, **run: Any) -> dict[str, Any]:
    """Every completion is right in the first eight steps, none later."""
    (folder / "early.py").write_text(EARLY)
    run = {"max_steps": 12, "save_steps": 1, "save_total_limit": 2, **run}
    return {**config(rewards={"funcs": [f"{folder}/early.py:early"]}, run=run), "monitor": {"window": 4}}


def kept(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("checkpoint-*"))


def test_the_best_checkpoint_is_kept_and_a_fall_is_told(tmp_path: Path) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        summary = train(falling(tmp_path), out=tmp_path / "run")
    assert kept(tmp_path / "run") == ["checkpoint-11", "checkpoint-12", "checkpoint-4"]
    assert summary["best"] == {"checkpoint": "checkpoint-4", "score": 1.0}
    assert "best checkpoint: checkpoint-4, 1.000 on average over its last 4 steps" in printed.getvalue()
    told = "note: step 12: accuracy_falls (act, above 0.4): 0% of completions are right, 100% were in the best 4 steps"
    assert told in printed.getvalue()


def test_the_best_checkpoint_is_known_after_a_resume(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(falling(tmp_path, max_steps=10), out=out)
    assert kept(out) == ["checkpoint-10", "checkpoint-4", "checkpoint-9"]
    summary = train(falling(tmp_path), out=out, resume=True)
    assert kept(out) == ["checkpoint-11", "checkpoint-12", "checkpoint-4"]
    assert summary["best"]["checkpoint"] == "checkpoint-4"
    assert train(falling(tmp_path, save_best=False, max_steps=13), out=out, resume=True)["best"] is None
    assert kept(out) == ["checkpoint-12", "checkpoint-13"]


def test_a_best_checkpoint_that_is_gone_or_broken_leaves_its_place(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(falling(tmp_path, max_steps=10), out=out)
    (out / "checkpoint-4" / "optimizer.safetensors").write_bytes(b"cut off")
    summary = train(falling(tmp_path), out=out, resume=True)
    assert summary["best"] == {"checkpoint": "checkpoint-11", "score": 0.25}
    assert kept(out) == ["checkpoint-11", "checkpoint-12"]
