"""Checkpoints under real faults: kills, full disks, changed bytes, planted files."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from strop.errors import CheckpointError
from strop.trainer import checkpoint as module
from strop.trainer.checkpoint import (
    clean_leftovers,
    find_checkpoints,
    read_checkpoint,
    read_latest,
    write_checkpoint,
)

SRC = Path(__file__).parents[1] / "src"


def write(run: Path, step: int, *, keep: int = 9, size: int = 50, extra: Callable[[Path], None] | None = None) -> Path:
    tensors = {"optimizer.safetensors": {"m": torch.full((size,), float(step)), "n": torch.tensor(step)}}
    return write_checkpoint(run, step, tensors=tensors, state={"step": step, "lr": 0.1}, keep=keep, extra=extra)


def hidden(run: Path) -> list[str]:
    return [p.name for p in run.iterdir() if p.name.startswith(".")]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run_script(code: str, *args: object) -> dict:
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_dtype_and_layout_comes_back_bit_for_bit(tmp_path: Path) -> None:
    nan_payloads = torch.tensor([0x7FC00001, 0x7FA12345, -0x00400001, -0x80000000], dtype=torch.int32)
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    given = {
        "fp32": nan_payloads.view(torch.float32),
        "bf16": torch.tensor([0x7FC1, -0x003F, 1, 0x3F80], dtype=torch.int16).view(torch.bfloat16),
        "fp16": torch.tensor([0x7E01, 0x0001, -1], dtype=torch.int16).view(torch.float16),
        "int64": torch.tensor([2**63 - 1, -(2**63), 0]),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "bool": torch.tensor([[True], [False]]),
        "scalar": torch.tensor(1e-45),
        "empty": torch.empty(0, 3, dtype=torch.bfloat16),
        "transposed": base.T,
        "every_other_column": base[:, ::2],
        "whole": base,
        "row": base[1],
        "expanded": torch.tensor([7.0]).expand(5),
        "parameter": torch.nn.Parameter(base * 0.1),
    }
    write_checkpoint(tmp_path, 3, tensors={"a.safetensors": given, "b.safetensors": {}}, state={}, keep=1)
    found = read_latest(tmp_path)
    assert found is not None
    back = found.tensors("a.safetensors")
    assert back.keys() == given.keys()
    for name, tensor in given.items():
        assert back[name].dtype == tensor.dtype, name
        assert back[name].shape == tensor.shape, name
        assert bits(back[name]) == bits(tensor.detach()), name
    assert found.tensors("b.safetensors") == {}
    with pytest.raises(CheckpointError, match=r"no c\.safetensors; it holds a\.safetensors"):
        found.tensors("c.safetensors")


def test_loaded_tensors_survive_removal_and_can_be_changed(tmp_path: Path) -> None:
    before = tree(write(tmp_path, 1))
    loaded = read_checkpoint(tmp_path / "checkpoint-1").tensors("optimizer.safetensors")["m"]
    loaded.add_(1)
    assert tree(tmp_path / "checkpoint-1") == before
    shutil.rmtree(tmp_path / "checkpoint-1")
    assert loaded.tolist() == [2.0] * 50


def test_manifest_covers_state_tensors_and_what_extra_wrote(tmp_path: Path) -> None:
    def extra(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        (folder / "adapter_config.json").write_text('{"r": 4}')

    state = {"step": 7, "eval_before": {"pass@1": 0.25}, "reward": float("nan"), "big": 2**62 + 1, "text": "Ω"}
    path = write_checkpoint(tmp_path, 7, tensors={"o.safetensors": {}}, state=state, extra=extra, keep=1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"]) == (1, 7)
    assert set(manifest["files"]) == {"state.json", "o.safetensors", "model/config.json", "adapter_config.json"}
    assert manifest["files"]["adapter_config.json"]["size"] == 8
    found = read_latest(tmp_path)
    assert found is not None
    assert (found.step, found.path, found.skipped) == (7, path, ())
    assert found.state["big"] == 2**62 + 1
    assert found.state["reward"] != found.state["reward"]
    assert found.state["text"] == "Ω"
    assert hidden(tmp_path) == []


def test_no_checkpoint_is_none_and_similar_names_do_not_count(tmp_path: Path) -> None:
    assert read_latest(tmp_path / "absent") is None
    for name in ("checkpoint-", "checkpoint-007", "checkpoint-x", "checkpoint-1.bak", ".checkpoint-4.partial-99"):
        (tmp_path / name).mkdir()
    assert find_checkpoints(tmp_path) == []
    assert read_latest(tmp_path) is None
    for step in (2, 10, 9):
        write(tmp_path, step)
    assert find_checkpoints(tmp_path) == [2, 9, 10]


def _break_by_missing_file(path: Path) -> None:
    (path / "state.json").unlink()


def _break_by_truncation(path: Path) -> None:
    os.truncate(path / "optimizer.safetensors", 100)


def _break_by_flipped_byte(path: Path) -> None:
    data = bytearray((path / "optimizer.safetensors").read_bytes())
    data[-3] ^= 1
    (path / "optimizer.safetensors").write_bytes(data)


def _break_by_garbage_manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"\xff\x00" + b"[" * 100_000)


def _break_by_nested_manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"[" * 100_000)


def _break_by_missing_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def _break_by_other_format(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))


def _break_by_outside_name(path: Path) -> None:
    (path.parent / "outside").write_bytes(b"")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../outside"] = {
        "size": 0,
        "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    }
    (path / "manifest.json").write_text(json.dumps(manifest))


def _break_by_linked_folder(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to("elsewhere")


def _break_by_linked_file(path: Path) -> None:
    (path / "state.json").rename(path.parent / "state.json")
    (path / "state.json").symlink_to(path.parent / "state.json")


def _break_by_pipe(path: Path) -> None:
    (path / "state.json").unlink()
    os.mkfifo(path / "state.json")


def _break_by_file_in_place_of_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("")


def _break_by_renaming(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.parent / "checkpoint-1", path)


BREAKS = [
    (_break_by_missing_file, "state.json is missing"),
    (_break_by_truncation, "optimizer.safetensors has 100 bytes"),
    (_break_by_flipped_byte, "content of optimizer.safetensors has changed"),
    (_break_by_garbage_manifest, "manifest.json is not JSON"),
    (_break_by_nested_manifest, "manifest.json is not JSON"),
    (_break_by_missing_manifest, "manifest.json is missing"),
    (_break_by_other_format, "not of format 1"),
    (_break_by_outside_name, "not a file of the folder"),
    (_break_by_linked_folder, "it is a link"),
    (_break_by_linked_file, "state.json is missing"),
    (_break_by_pipe, "state.json is missing"),
    (_break_by_file_in_place_of_folder, "it is a link or a file"),
    (_break_by_renaming, "is of step 1"),
]


@pytest.mark.parametrize(("damage", "reason"), BREAKS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_checkpoint_is_skipped_named_and_replaced(
    tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    damage(path)
    found = read_latest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(found.skipped) == 1
    assert "checkpoint-2 is not usable" in found.skipped[0]
    assert reason in found.skipped[0]
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        read_checkpoint(path)
    write(tmp_path, 2)
    found = read_latest(tmp_path)
    assert found is not None
    assert (found.step, found.skipped) == (2, ())


def test_when_none_verifies_that_is_an_error_naming_each(tmp_path: Path) -> None:
    _break_by_missing_file(write(tmp_path, 1))
    _break_by_flipped_byte(write(tmp_path, 2))
    with pytest.raises(CheckpointError, match=r"checkpoint-2 is not usable.*checkpoint-1 is not usable") as caught:
        read_latest(tmp_path)
    assert caught.value.hint


def test_any_flipped_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    write(tmp_path, 1, size=3)
    path = write(tmp_path, 2, size=3)
    for file in sorted(path.iterdir()):
        original = file.read_bytes()
        for position in range(len(original)):
            changed = bytearray(original)
            changed[position] ^= 0x20
            file.write_bytes(changed)
            found = read_latest(tmp_path)
            assert found is not None
            # A blank between two manifest entries may change and mean the same; anything else has to be noticed.
            if found.step == 2:
                assert file.name == "manifest.json"
                assert json.loads(changed)["files"] == json.loads(original)["files"]
        file.write_bytes(original)


def test_a_planted_pickle_is_never_opened(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    planted = {str(path / name) for name in ("optimizer.pt", "pytorch_model.bin", "state.pkl")}
    for file in planted:
        Path(file).write_bytes(pickle.dumps({"m": Path("x")}))
    touched: list[str] = []
    recording = [True]

    def hook(event: str, args: tuple) -> None:
        if recording and (event.startswith("pickle") or (event == "open" and str(args[0]) in planted)):
            touched.append(f"{event} {args}")

    sys.addaudithook(hook)
    found = read_latest(tmp_path)
    assert found is not None
    found.tensors("optimizer.safetensors")
    recording.clear()
    assert touched == []


def test_the_newest_are_kept_and_broken_ones_do_not_count(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step, keep=2)
    assert find_checkpoints(tmp_path) == [2, 3]
    _break_by_truncation(tmp_path / "checkpoint-3")
    write(tmp_path, 4, keep=2)
    assert find_checkpoints(tmp_path) == [2, 3, 4]
    write(tmp_path, 5, keep=2)
    assert find_checkpoints(tmp_path) == [4, 5]
    assert hidden(tmp_path) == []


def test_a_broken_newer_checkpoint_never_pushes_out_the_one_just_written(tmp_path: Path) -> None:
    write(tmp_path, 2)
    _break_by_flipped_byte(write(tmp_path, 9))
    write(tmp_path, 4, keep=1)
    found = read_latest(tmp_path)
    assert found is not None
    assert found.step == 4
    assert find_checkpoints(tmp_path) == [4, 9]


def test_a_stop_in_the_middle_of_pruning_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)

    def stopped(path: Path) -> None:
        (Path(path) / "optimizer.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(module.shutil, "rmtree", stopped)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert find_checkpoints(tmp_path) == [2]
    assert read_checkpoint(tmp_path / "checkpoint-2").state["step"] == 2
    assert len(hidden(tmp_path)) == 1
    (tmp_path / ".checkpoint-9.partial-1").mkdir()
    (tmp_path / ".plan.json.partial-1").write_text("{")
    (tmp_path / ".lock").write_text("")
    assert len(clean_leftovers(tmp_path)) == 3
    assert hidden(tmp_path) == [".lock"]


def test_a_failed_removal_of_an_old_checkpoint_is_told_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1)

    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(module.shutil, "rmtree", refused)
    write(tmp_path, 2, keep=1)
    assert "cannot be removed: Permission denied" in caplog.text
    assert find_checkpoints(tmp_path) == [2]


def test_a_step_that_is_safe_already_is_not_written_again(tmp_path: Path) -> None:
    before = tree(write(tmp_path, 5))
    inode = (tmp_path / "checkpoint-5").stat().st_ino
    write(tmp_path, 5, size=7)
    assert tree(tmp_path / "checkpoint-5") == before
    assert (tmp_path / "checkpoint-5").stat().st_ino == inode


def test_an_error_of_extra_leaves_no_trace(tmp_path: Path) -> None:
    before = tree(write(tmp_path, 1))

    def disk_full(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device", str(folder / "half"))

    def rust_disk_full(folder: Path) -> None:
        raise Exception("I/O error: No space left on device (os error 28)")

    def bug(folder: Path) -> None:
        raise KeyError("lora_A")

    def link(folder: Path) -> None:
        (folder / "model").symlink_to("/etc")

    for extra, expected, match in (
        (disk_full, CheckpointError, r"step 2 cannot be written .*No space left.*at least [\d,]+ bytes are needed"),
        (rust_disk_full, CheckpointError, r"os error 28.*are free; the checkpoint of step 1 is untouched"),
        (bug, KeyError, "lora_A"),
        (link, CheckpointError, "model of a checkpoint is a link"),
    ):
        with pytest.raises(expected, match=match):
            write(tmp_path, 2, extra=extra)
        assert find_checkpoints(tmp_path) == [1]
        assert hidden(tmp_path) == []
    assert tree(tmp_path / "checkpoint-1") == before


FILE_SIZE_LIMITS = """
import json, os, resource, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from strop.errors import CheckpointError
from strop.trainer.checkpoint import find_checkpoints, read_latest, write_checkpoint
run = Path(sys.argv[1])
weights = {"w": torch.arange(3000, dtype=torch.float32)}
extra = lambda folder: save_file({"a": torch.ones(4000)}, folder / "adapter_model.safetensors")
def write(step):
    write_checkpoint(run, step, tensors={"optimizer.safetensors": weights}, state={"text": "x" * 20000},
                     extra=extra, keep=1)
write(1)
before = {p.name: p.read_bytes() for p in (run / "checkpoint-1").iterdir()}
out = []
for limit in (0, 1, 7, 100, 8191, 12080, 12100, 16000, 16071, 19000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write(2)
        out.append("written")
    except CheckpointError as e:
        out.append([e.message, e.hint])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert find_checkpoints(run) == [1] and sorted(os.listdir(run)) == ["checkpoint-1"], os.listdir(run)
assert {p.name: p.read_bytes() for p in (run / "checkpoint-1").iterdir()} == before
write(2)
print(json.dumps({"out": out, "latest": read_latest(run).step, "steps": find_checkpoints(run)}))
"""


def test_a_file_size_limit_at_any_byte_leaves_older_checkpoints_untouched(tmp_path: Path) -> None:
    result = run_script(FILE_SIZE_LIMITS, tmp_path)
    assert "written" not in result["out"]
    for message, hint in result["out"]:
        assert "File too large" in message
        assert "--resume" in hint
        assert "the checkpoint of step 1 is untouched" in message
    assert (result["latest"], result["steps"]) == (2, [2])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=512k", "strop-test", str(folder)]
    if shutil.which("mount") is None or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_what_is_there_and_frees_what_was_begun(small_disk: Path) -> None:
    before = tree(write(small_disk, 1, size=50_000))
    (small_disk / "ballast").write_bytes(b"x" * 150_000)
    with pytest.raises(CheckpointError, match=r"No space left.*200,\d{3} bytes are needed and [\d,]+ are free"):
        write(small_disk, 2, size=50_000, keep=1)
    assert tree(small_disk / "checkpoint-1") == before
    assert hidden(small_disk) == []
    (small_disk / "ballast").unlink()
    write(small_disk, 2, size=50_000, keep=1)
    assert find_checkpoints(small_disk) == [2]


def test_a_read_only_disk_is_reported(small_disk: Path) -> None:
    write(small_disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        write(small_disk, 2)
    found = read_latest(small_disk)
    assert found is not None
    assert found.step == 1
    with pytest.raises(CheckpointError, match="absent"):
        write(small_disk / "absent", 2)


KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from strop.trainer.checkpoint import clean_leftovers, read_latest, write_checkpoint
torch.set_num_threads(1)
run, rng = Path(sys.argv[1]), random.Random(5)
def write(step):
    def extra(folder):
        (folder / "adapter_config.json").write_text(str(step))
    tensors = {"a.safetensors": {"m": torch.full((20000,), float(step))}, "b.safetensors": {"n": torch.tensor(step)}}
    write_checkpoint(run, step, tensors=tensors, state={"step": step}, extra=extra, keep=2)
leftovers, torn, reached = 0, 0, 0
for _ in range(16):
    r, w = os.pipe()
    child = os.fork()
    if child == 0:
        leftovers = clean_leftovers(run)
        found = read_latest(run)
        step = found.step if found else 0
        while True:
            step += 1
            write(step)
            os.write(w, step.to_bytes(4, "little"))
    os.close(w)
    os.read(r, 4)
    time.sleep(rng.random() * 0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    acknowledged = os.read(r, 1 << 20)
    last = int.from_bytes(acknowledged[-4:], "little") if acknowledged else 0
    os.close(r)
    torn += any(name.startswith(".") for name in os.listdir(run))
    found = read_latest(run)
    assert found.skipped == (), found.skipped
    assert found.step >= max(last, reached + 1), (found.step, last, reached)
    assert found.state == {"step": found.step}
    assert found.tensors("a.safetensors")["m"].tolist() == [float(found.step)] * 20000
    assert int(found.tensors("b.safetensors")["n"]) == found.step
    assert (found.path / "adapter_config.json").read_text() == str(found.step)
    reached = found.step
clean_leftovers(run)
print(json.dumps({"torn": torn, "reached": reached, "left": sorted(os.listdir(run))}))
"""


def test_kill_9_at_random_moments_always_leaves_the_newest_finished_checkpoint(tmp_path: Path) -> None:
    result = run_script(KILLS, tmp_path)
    assert result["reached"] >= 16
    assert result["torn"] >= 1, "no kill fell into a write, so nothing was tested"
    newest = f"checkpoint-{result['reached']}"
    assert newest in result["left"]
    assert all(name.startswith("checkpoint-") for name in result["left"])
