"""Runs that learn: the demo as a user starts it and with adapters, and the minimal loop."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from commands import strop

from strop import cli
from strop.monitor.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow

SHORT_DEMO = ["run.max_steps=30", "run.eval_num_problems=60", "run.eval_num_generations=4"]


def check_demo(out: Path, stdout: str) -> None:
    summary = json.loads((out / "summary.json").read_text())
    before, after = summary["eval_before"]["pass@1"], summary["eval_after"]["pass@1"]
    assert 0.25 <= before <= 0.50
    assert summary["eval_before"]["pass@k"] >= 0.7
    assert after >= before + 0.2, stdout
    assert f"accuracy {before:.1%} -> {after:.1%} on 60 held-out problems" in stdout
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(30))
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows if row["optimizer_steps"]) < 1e-4
    assert all(row["clip_ratio/region_mean"] == 0 for row in rows if row["optimizer_steps"])


def test_the_demo_learns(tmp_path: Path) -> None:
    sets = [part for change in SHORT_DEMO for part in ("--set", change)]
    result = strop("demo", "--out", str(tmp_path / "demo"), *sets, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    check_demo(tmp_path / "demo", result.stdout)


def test_the_demo_learns_with_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.demo(lora=True, out=tmp_path / "demo", seed=0, overrides=SHORT_DEMO)
    check_demo(tmp_path / "demo", capsys.readouterr().out)
    assert (tmp_path / "demo" / "checkpoint-30" / "adapter_model.safetensors").exists()


def test_the_minimal_loop_learns() -> None:
    path = ROOT / "examples" / "minimal_loop.py"
    rewards = runpy.run_path(str(path))["main"](18)
    assert sum(rewards[-5:]) - sum(rewards[:5]) > 0.4, rewards
    assert len(path.read_text().splitlines()) < 100
