"""The command as a user runs it: Ctrl-C loses nothing, mistakes are named, what cannot be scored is no 0."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import strop, strop_here
from engines import tiny_model

from strop import StropError, cli, load_config, train
from strop.monitor.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
TOY = f"{ROOT}/tests/toy_rewards.py"
pytestmark = pytest.mark.slow


def write_config(folder: Path, text: str = "", **changes: str) -> Path:
    path = folder / "run.yaml"
    values = {"model": str(tiny_model()), "funcs": f"{TOY}:share_of_low_bytes", "steps": "3", **changes}
    path.write_text(
        f"""
model: {{path: {values["model"]}}}
lora: {{r: 0}}
task: {{name: arithmetic, max_prompt_length: 40}}
rewards: {{funcs: ["{values["funcs"]}"]}}
rollout: {{num_prompts: 4, num_generations: 4, max_completion_length: 24}}
run: {{max_steps: {values["steps"]}, eval_num_problems: 2, report_to: [tensorboard]}}
{text}"""
    )
    return path


def test_ctrl_c_finishes_the_step_writes_a_checkpoint_and_exits_130(tmp_path: Path) -> None:
    config = write_config(tmp_path, steps="500")
    out = tmp_path / "run"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "strop", "train", str(config), "--out", str(out)], cwd=tmp_path, stdout=log,
            stderr=log,
            start_new_session=True,
        )  # fmt: skip
    rows = out / "metrics.jsonl"
    deadline = time.monotonic() + 900
    while not (rows.exists() and rows.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    assert process.wait(timeout=300) == 130, (tmp_path / "log").read_text()
    done = len(read_metrics(rows))
    assert (out / f"checkpoint-{done}" / "manifest.json").exists()
    assert json.loads((out / "summary.json").read_text())["stopped"] == "interrupted"
    assert "--resume" in (tmp_path / "log").read_text()
    assert strop_here("train", str(config), "--out", str(out), "--resume", "--set", f"run.max_steps={done + 1}") == 0
    assert [row["step"] for row in read_metrics(rows)] == list(range(done + 1))


MISTAKES = {
    "no-config": (["model.path=empty"], "has no config.json"),
    "no-weights": (["model.path=weightless"], "has no weights"),
    "no-model": (["model.path=./nowhere"], "does not exist"),
    "too-long": (["rollout.max_completion_length=600"], "the model has 512"),
    "small-budget": (["optim.micro_batch_tokens=10"], "the longest prompt and completion"),
    "no-function": ([f"rewards.funcs={TOY}:share_of_low_byte"], "share_of_low_byte"),
    "no-target": (["lora.r=8", "lora.target_modules=[q_prj]"], "q_prj"),
    "no-adapter": (["lora.r=8", "lora.init_from=empty"], "adapter_model.safetensors"),
    "no-file": (["task.name=dataset", "task.path=nothing.jsonl"], "nothing.jsonl"),
    "empty-file": (["task.name=dataset", "task.path=empty.jsonl", "task.eval_split=null"], "empty.jsonl"),
    "no-column": (["task.name=dataset", "task.path=rows.jsonl", "task.eval_split=null"], "the columns are qestion"),
}


@pytest.mark.parametrize(("changes", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_with_a_hint(
    changes: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("empty.jsonl").touch()
    Path("rows.jsonl").write_text('{"qestion": "1+1=", "answer": "2"}\n' * 40)
    shutil.copytree(tiny_model(), "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    config = load_config(write_config(tmp_path), changes)
    with pytest.raises(StropError) as error:
        train(config, out=tmp_path / "run")
    assert said in error.value.message
    assert error.value.hint


@pytest.mark.parametrize(
    ("args", "said"),
    [(["rollout.num_generatons=4"], "rollout.num_generations"), (["model.path=./nowhere"], "does not exist")],
    ids=["misspelt", "no-model"],
)
def test_the_command_prints_message_and_hint_and_no_traceback(args: list[str], said: str, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    result = strop("train", str(config), "--out", "run", *(x for a in args for x in ("--set", a)), cwd=tmp_path)
    assert result.returncode == 2, result.stdout + result.stderr
    assert said in result.stderr
    assert result.stderr.startswith("error: ")
    assert "\nhint: " in result.stderr
    assert "Traceback" not in result.stderr


REWARDS = """
def two(completions, **kwargs):
    return [1.0, 2.0]

def nan(completions, **kwargs):
    return [float("nan")]

def sometimes(completions, **kwargs):
    text = completions[0][0]["content"]
    if len(text) % 3 == 0:
        raise ValueError("cannot read this")
    return [None if len(text) % 3 == 1 else len(text) / 100]
"""


def test_a_reward_that_breaks_its_contract_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(REWARDS)
    with pytest.raises(StropError, match="two") as error:
        train(load_config(write_config(tmp_path, funcs=f"{tmp_path}/bad.py:two")), out=tmp_path / "run")
    assert "2" in error.value.message
    assert error.value.hint


@pytest.mark.parametrize("function", ["nan", "sometimes"])
def test_what_cannot_be_scored_is_unscored_and_never_0(
    function: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.py").write_text(REWARDS)
    config = write_config(tmp_path, funcs=f"{tmp_path}/bad.py:{function}")
    train(load_config(config, ["run.eval_num_problems=0", "rewards.check=false"]), out=tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    if function == "nan":
        assert all(row["frac_unscored"] == 1 and row["optimizer_steps"] == 0 and row["reward"] is None for row in rows)
    else:
        assert all(0 < row["frac_unscored"] < 1 for row in rows)
        assert "cannot read this" in capsys.readouterr().out


def test_a_setting_without_set_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["strop", "train", "mine.yaml", "run.max_steps=3"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: `run.max_steps=3` stands alone")
    assert "hint: --set run.max_steps=3" in said
