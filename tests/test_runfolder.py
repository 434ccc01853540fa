"""A run folder: one process, one config, whole files, clear refusals."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from strop.config import Config
from strop.config_load import load_config
from strop.errors import RunError
from strop.trainer.checkpoint import write_checkpoint
from strop.trainer.runfolder import open_run_folder

SRC = Path(__file__).parents[1] / "src"


def config(**sections: dict[str, Any]) -> Config:
    return load_config(sections)


def begin(path: Path, settings: Config) -> None:
    """A run that wrote one row of metrics and one checkpoint."""
    with open_run_folder(path, settings, resume=False) as folder:
        folder.write_environment(threads=2)
        folder.metrics_path.write_text('{"step": 1}\n')
        write_checkpoint(folder.path, 1, tensors={"o.safetensors": {"m": torch.zeros(1)}}, state={}, keep=1)


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_new_folder_holds_the_config_and_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    settings = config(run={"max_steps": 7})
    with open_run_folder(tmp_path / "runs" / "first", settings, resume=False) as folder:
        assert (folder.resumed, folder.notices) == (False, ())
        assert load_config(folder.path / "config.resolved.yaml") == settings
        assert folder.write_environment(threads=3) == ()
        folder.write_json("summary.json", {"reward": float("nan"), "k": (1, 2), "text": "Ω"})
    environment = json.loads((folder.path / "environment.json").read_text())
    assert environment["threads"] == 3
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert json.loads((folder.path / "summary.json").read_text()) == {"reward": None, "k": [1, 2], "text": "Ω"}
    for file in folder.path.iterdir():
        assert "hf_very_secret" not in file.read_text()
    assert sorted(os.listdir(folder.path)) == [".lock", "config.resolved.yaml", "environment.json", "summary.json"]


def test_a_folder_with_a_run_is_refused_without_resume(tmp_path: Path) -> None:
    begin(tmp_path / "run", config())
    with pytest.raises(RunError, match=r"not empty: it holds checkpoint-1, config\.resolved\.yaml") as caught:
        open_run_folder(tmp_path / "run", config(), resume=False)
    assert "--resume" in caught.value.hint
    (tmp_path / "foreign").mkdir()
    for number in range(8):
        (tmp_path / "foreign" / f"letter{number}.txt").touch()
    with pytest.raises(RunError, match=r"letter0\.txt.*and 2 more"):
        open_run_folder(tmp_path / "foreign", config(), resume=False)
    with pytest.raises(RunError, match="is not a run folder"):
        open_run_folder(tmp_path / "foreign", config(), resume=True)
    assert len(os.listdir(tmp_path / "foreign")) == 9


def test_a_run_that_failed_while_starting_may_start_again_with_any_config(tmp_path: Path) -> None:
    for resume in (False, False, True):
        settings = config(run={"seed": 5 if resume else 4})
        with open_run_folder(tmp_path / "run", settings, resume=resume) as folder:
            folder.write_json("plan.json", {})
            (folder.path / "verdicts.jsonl").touch()
            folder.write_environment(threads=1)
            assert not folder.resumed
        assert load_config(tmp_path / "run" / "config.resolved.yaml") == settings
    assert len(folder.notices) == 1
    assert "nothing to resume" in folder.notices[0]
    assert "step 0" in folder.notices[0]
    (tmp_path / "run" / "verdicts.jsonl").write_text("{}\n")
    with pytest.raises(RunError, match="not empty"):
        open_run_folder(tmp_path / "run", config(), resume=False)


def test_resume_without_a_checkpoint_says_that_it_starts_at_step_0(tmp_path: Path) -> None:
    with open_run_folder(tmp_path / "run", config(), resume=False) as folder:
        folder.metrics_path.write_text('{"step": 1}\n')
    with open_run_folder(tmp_path / "run", config(), resume=True) as folder:
        assert folder.resumed
        assert len(folder.notices) == 1
        assert "no checkpoint" in folder.notices[0]


def test_a_differing_config_is_refused_with_every_change_and_nothing_is_touched(tmp_path: Path) -> None:
    begin(tmp_path / "run", config())
    stored = (tmp_path / "run" / "config.resolved.yaml").read_bytes()
    other = config(run={"seed": 3, "max_steps": 9}, rollout={"temperature": 0.7}, model={"path": "other"})
    with pytest.raises(RunError) as caught:
        open_run_folder(tmp_path / "run", other, resume=True)
    for change in ("run.seed: 0 -> 3", "rollout.temperature: 1.0 -> 0.7", 'model.path: "demo" -> "other"'):
        assert change in caught.value.message
    assert "max_steps" not in caught.value.message
    assert (tmp_path / "run" / "config.resolved.yaml").read_bytes() == stored
    with open_run_folder(tmp_path / "run", config(), resume=True) as folder:
        assert folder.notices == ()


def test_settings_that_may_change_are_named(tmp_path: Path) -> None:
    begin(tmp_path / "run", config(optim={"lr_scheduler_type": "linear"}))
    run = {"max_steps": 9, "save_steps": 1, "save_total_limit": 5, "report_to": "none", "stall_warning_s": 5.0}
    rewards = {"timeout_s": 2.0, "workers": 2}
    changed = config(
        optim={"lr_scheduler_type": "linear"}, rewards=rewards, run={**run, "rollout_steps": 1, "out": "elsewhere/x"}
    )
    with open_run_folder(tmp_path / "run", changed, resume=True) as folder:
        assert "run.max_steps changed from 100 to 9" in folder.notices
        assert 'run.report_to changed from ["tensorboard"] to ["none"]' in folder.notices
        assert "rewards.workers changed from 1 to 2" in folder.notices
        assert [text for text in folder.notices if "linear decay" in text]
        assert len(folder.notices) == 9
    with open_run_folder(tmp_path / "run", changed, resume=True) as folder:
        assert folder.notices == ()


def test_paths_are_compared_by_the_place_they_lead_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("models/tiny", "moved", "other/tiny"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "score.py").touch()
    monkeypatch.chdir(tmp_path)

    def with_paths(model: str, funcs: str) -> Config:
        return config(model={"path": model}, rewards={"funcs": funcs}, task={"name": "dataset", "path": "data.jsonl"})

    begin(tmp_path / "run", with_paths("models/tiny", "score.py:f"))
    same = with_paths(str(tmp_path / "models/../models/tiny"), str(tmp_path / "score.py:f"))
    with open_run_folder(tmp_path / "run", same, resume=True) as folder:
        assert folder.notices == ()
    with pytest.raises(RunError, match=r"rewards\.funcs.*score\.py:g"):
        open_run_folder(tmp_path / "run", with_paths("models/tiny", "score.py:g"), resume=True)
    with pytest.raises(RunError, match=r"model\.path"):
        open_run_folder(tmp_path / "run", with_paths("other/tiny", "score.py:f"), resume=True)
    (tmp_path / "models/tiny").rename(tmp_path / "moved/tiny")
    with open_run_folder(tmp_path / "run", with_paths("moved/tiny", "score.py:f"), resume=True) as folder:
        assert len(folder.notices) == 1
        assert "model.path moved from" in folder.notices[0]


def test_an_unreadable_stored_config_is_named(tmp_path: Path) -> None:
    begin(tmp_path / "run", config())
    (tmp_path / "run" / "config.resolved.yaml").write_text("run: {max_stepz: 3}\n")
    with pytest.raises(RunError, match="max_stepz"):
        open_run_folder(tmp_path / "run", config(), resume=True)


def test_a_changed_environment_is_named_on_resume(tmp_path: Path) -> None:
    begin(tmp_path / "run", config())
    file = tmp_path / "run" / "environment.json"
    stored = json.loads(file.read_text())
    stored["packages"]["torch"] = "1.0"
    file.write_text(json.dumps(stored))
    with open_run_folder(tmp_path / "run", config(), resume=True) as folder:
        (notice,) = folder.write_environment(threads=4)
        assert notice.startswith(f"threads was 2 and is 4 now; torch was 1.0 and is {torch.__version__} now: ")
        assert folder.write_environment(threads=4) == ()
        file.write_text("garbage")
        (notice,) = folder.write_environment(threads=4)
        assert "not recorded" in notice


@pytest.mark.parametrize("name", ["a\0b", "x" * 65, "my run", "run\n", "é", "..", "/"])
def test_names_that_cannot_be_used(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a folder" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a folder" / "here")
    with pytest.raises(RunError, match=r"NUL|run name") as caught:
        open_run_folder(Path(name), config(), resume=False)
    assert "--out" in caught.value.hint


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300) / "run"):
        with pytest.raises(RunError, match="cannot be used") as caught:
            open_run_folder(path, config(), resume=False)
        assert "run.out" in caught.value.hint
    with file_size_limit(0), pytest.raises(RunError, match="File too large"):
        open_run_folder(tmp_path / "run", config(), resume=False)
    with file_size_limit(200), pytest.raises(RunError, match="File too large"):
        open_run_folder(tmp_path / "run", config(), resume=False)
    with open_run_folder(tmp_path / "run", config(), resume=False) as folder:
        folder.write_json("plan.json", {"a": 1})
        with file_size_limit(5), pytest.raises(RunError, match="File too large"):
            folder.write_json("plan.json", {"a": 2})
        assert json.loads((folder.path / "plan.json").read_text()) == {"a": 1}
        assert sorted(os.listdir(folder.path)) == [".lock", "config.resolved.yaml", "plan.json"]


def test_the_same_process_cannot_open_it_twice_and_close_frees_only_its_own(tmp_path: Path) -> None:
    first = open_run_folder(tmp_path / "run", config(), resume=False)
    with pytest.raises(RunError, match=f"in use by process {os.getpid()} on "):
        open_run_folder(tmp_path / "run", config(), resume=False)
    first.close()
    second = open_run_folder(tmp_path / "run", config(), resume=False)
    first.close()
    with pytest.raises(RunError, match="in use"):
        open_run_folder(tmp_path / "run", config(), resume=False)
    second.close()


HOLDER = """
import os, sys, time
from pathlib import Path
from strop.config import Config
from strop.trainer.runfolder import open_run_folder
folder = open_run_folder(Path(sys.argv[1]), Config(), resume=False)
if os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(RunError, match=f"in use by process {holder.pid} on ") as caught:
                open_run_folder(tmp_path / "run", Config(), resume=True)
            assert "another folder" in caught.value.hint
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            os.kill(child, 0)  # a forked child of the killed run is still alive and must not hold the folder
            open_run_folder(tmp_path / "run", Config(), resume=True).close()
        finally:
            os.kill(child, signal.SIGKILL)
            holder.kill()


def test_leftovers_of_a_killed_process_are_removed_when_it_is_opened(tmp_path: Path) -> None:
    begin(tmp_path / "run", config())
    (tmp_path / "run" / ".checkpoint-2.partial-12").mkdir()
    (tmp_path / "run" / ".checkpoint-2.partial-12" / "state.json").write_text("{")
    (tmp_path / "run" / ".summary.json.partial-12").write_text("{")
    with open_run_folder(tmp_path / "run", config(), resume=True) as folder:
        assert [name for name in os.listdir(folder.path) if name.startswith(".")] == [".lock"]
