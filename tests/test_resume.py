"""kill -9 anywhere, resume, and the run ends bit-equal to one that was never stopped: real runs through real vLLM."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import tiny_model

from strop.monitor.metrics import deterministic_part, read_metrics

HERE = Path(__file__).resolve().parent


def config(rank: int, funcs: str = "share_of_low_bytes") -> dict[str, Any]:
    return {
        "model": {"path": str(tiny_model())},
        "lora": {"r": rank},
        "task": {"name": "arithmetic", "max_prompt_length": 40},
        "rewards": {"funcs": [f"{HERE}/toy_rewards.py:{funcs}"]},
        "rollout": {"num_prompts": 4, "num_generations": 4, "max_completion_length": 24},
        "objective": {"beta": 0.01 if rank == 0 else 0.0},
        "optim": {"learning_rate": 3e-3, "warmup_steps": 2, "lr_scheduler_type": "linear"},
        "run": {
            "max_steps": 6, "save_steps": 2, "eval_num_problems": 3, "eval_num_generations": 2, "rollout_steps": 1,
            "report_to": ["none"],
        },
        "monitor": {"window": 2, "canary_steps": 2},
    }  # fmt: skip


class Runner:
    """Talks to `run_in_fork.py`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "run_in_fork.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def run(
        self,
        cfg: dict[str, Any],
        out: Path,
        *,
        resume: bool = False,
        kill_when: list[Any] | None = None,
        env: dict[str, str] | None = None,
    ) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"config": cfg, "out": str(out), "resume": resume, "kill_when": kill_when, "env": env or {}}
        print(json.dumps(job), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    running = Runner()
    yield running
    running.close()


def final_state(out: Path) -> dict[str, Any]:
    """Everything of a run folder that is not a time."""
    summary = json.loads((out / "summary.json").read_text())
    state = json.loads((out / "checkpoint-6" / "state.json").read_text())
    return {
        "model": {p.name: p.read_bytes() for p in sorted((out / "checkpoint-6").glob("*.safetensors"))},
        "metrics": [deterministic_part(row) for row in read_metrics(out / "metrics.jsonl")],
        "rollouts": {p.name: p.read_bytes() for p in sorted((out / "rollouts").iterdir())},
        "summary": {k: v for k, v in summary.items() if k != "seconds"},
        "state": {k: v for k, v in state.items() if k != "seconds"},
        "diagnoses": (out / "diagnoses.jsonl").read_text(),
        "canary": (out / "canary.json").read_text(),
        "checkpoints": sorted(p.name for p in out.glob("checkpoint-*")),
    }


def assert_bit_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert [row["step"] for row in a["metrics"]] == list(range(6))
    for key in a:
        assert a[key] == b[key], f"{key} differs"


@pytest.fixture(scope="module", params=[0, 8], ids=["full", "lora"])
def straight(
    request: pytest.FixtureRequest, runner: Runner, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Any]:
    out = tmp_path_factory.mktemp("straight") / "run"
    assert runner.run(config(request.param), out) == 0
    result = final_state(out)
    assert result["diagnoses"].count("\n") >= 2, "the monitors have to say something, so that it can differ"
    rewards = [row["reward"] for row in result["metrics"]]
    assert max(rewards[3:]) > rewards[0] + 0.02, f"the toy reward has to rise, so that weights matter: {rewards}"
    return request.param, result


def test_the_same_run_twice_is_bit_equal(straight: tuple[int, Any], runner: Runner, tmp_path: Path) -> None:
    rank, expected = straight
    assert runner.run(config(rank), tmp_path / "run") == 0
    assert_bit_equal(expected, final_state(tmp_path / "run"))


def test_killed_before_the_first_checkpoint_in_a_rollout_and_in_a_checkpoint(
    straight: tuple[int, Any], runner: Runner, tmp_path: Path
) -> None:
    rank, expected = straight
    out = tmp_path / "run"
    kills: list[list[Any]] = [
        ["rows", 1, 0.02],  # before the first checkpoint, in the rollout of the second step
        ["partial", 2],  # in the middle of writing the first checkpoint
        ["rows", 3, 0.05],  # in a rollout after a checkpoint
        ["partial", 6],  # in the middle of the last checkpoint
    ]
    for number, condition in enumerate(kills):
        assert runner.run(config(rank), out, resume=number > 0, kill_when=condition) == -9, condition
        assert not (out / "summary.json").exists()
    with (out / "metrics.jsonl").open("ab") as f:
        f.write(b'{"step": 5, "reward": 0.')  # a torn last line
    assert runner.run(config(rank), out, resume=True) == 0
    assert_bit_equal(expected, final_state(out))


def test_a_4_bit_base_with_8_bit_moments_goes_on_with_the_same_bits(runner: Runner, tmp_path: Path) -> None:
    cfg = config(8)
    cfg["model"]["quantization"] = "nf4"
    cfg["optim"]["name"] = "adamw_8bit"
    assert runner.run(cfg, tmp_path / "straight") == 0
    assert runner.run(cfg, tmp_path / "run", kill_when=["rows", 3, 0.05]) == -9
    assert runner.run(cfg, tmp_path / "run", resume=True) == 0
    assert_bit_equal(final_state(tmp_path / "straight"), final_state(tmp_path / "run"))


def test_killed_while_scoring(runner: Runner, tmp_path: Path) -> None:
    env = {"STROP_TEST_KILL_STEP": "3", "STROP_TEST_KILL_MARKER": str(tmp_path / "killed")}  # the workers inherit it
    cfg = config(0, "kills_the_trainer")
    assert runner.run(cfg, tmp_path / "run", env=env) == -9
    assert (tmp_path / "killed").exists()
    assert runner.run(cfg, tmp_path / "run", resume=True, env=env) == 0
    assert runner.run(cfg, tmp_path / "straight", env=env) == 0
    assert_bit_equal(final_state(tmp_path / "straight"), final_state(tmp_path / "run"))


def test_a_run_folder_of_another_config_is_refused(runner: Runner, tmp_path: Path) -> None:
    cfg = config(0)
    cfg["run"]["max_steps"] = 1
    assert runner.run(cfg, tmp_path / "run") == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    other = copy.deepcopy(cfg)
    other["optim"]["learning_rate"] = 1.0
    assert runner.run(other, tmp_path / "run", resume=True) == 2
    assert runner.run(cfg, tmp_path / "run") == 2  # not empty, and no --resume
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    cfg["run"]["max_steps"] = 2
    assert runner.run(cfg, tmp_path / "run", resume=True) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1]
