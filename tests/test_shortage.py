"""Runs that ran out of memory, and runs of an earlier version, go on from their checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_wiring import OPTIMIZER, config

from strop import train
from strop.errors import MemoryExhaustedError
from strop.trainer import update as update_module
from strop.trainer.checkpoint import read_checkpoint, read_latest, write_checkpoint


def test_a_checkpoint_without_the_newer_numbers_of_the_plan_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train(config(run={"max_steps": 1}), out=out)
    old = read_latest(out)
    assert old is not None
    newer = ("release_kv", "checkpoint_layers", "logit_rows", "head", "embedding")
    promise = {k: v for k, v in old.state["promise"].items() if k not in newer}
    state = {k: v for k, v in old.state.items() if k not in ("monitor", "reward_versions")} | {"promise": promise}
    tensors = {OPTIMIZER: old.tensors(OPTIMIZER)}
    shutil.rmtree(old.path)
    write_checkpoint(out, 1, tensors=tensors, state=state, keep=1)
    capsys.readouterr()
    assert train(config(run={"max_steps": 2}), out=out, resume=True)["steps"] == 2
    said = capsys.readouterr().out
    assert "resumed at step 1" in said
    assert "not bit-equal" not in said


def out_of_memory_beyond(tokens: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let training fail as torch does on micro-batches of more tokens; return the sizes of those that did not fail."""
    original, done = update_module._backward, []

    def backward(policy: Any, there: Any, *args: Any) -> Any:
        if there.batch.num_tokens > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        done.append(there.batch.num_tokens)
        return original(policy, there, *args)

    monkeypatch.setattr(update_module, "_backward", backward)
    return done


def test_what_did_not_fit_is_kept_over_a_resume_and_the_advice_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"save_steps": 1, "save_total_limit": 5}
    straight, out = tmp_path / "straight", tmp_path / "run"
    with monkeypatch.context() as short:
        out_of_memory_beyond(100, short)
        train(config(run=run | {"max_steps": 3}), out=straight)
        train(config(run=run | {"max_steps": 1}), out=out)
    kept = json.loads((out / "checkpoint-1" / "state.json").read_text())["micro_batch_limit"]
    assert kept <= 100
    with monkeypatch.context() as short:
        done = out_of_memory_beyond(10_000, short)
        train(config(run=run | {"max_steps": 3}), out=out, resume=True)
        assert max(done) <= kept
    assert f"at most {kept} tokens long" in capsys.readouterr().out
    states = [read_checkpoint(folder / "checkpoint-3").tensors(OPTIMIZER) for folder in (out, straight)]
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []

    with monkeypatch.context() as short:
        out_of_memory_beyond(0, short)
        with pytest.raises(MemoryExhaustedError) as error:
            train(config(run=run | {"max_steps": 4}), out=out, resume=True)
        assert "optim.micro_batch_tokens" in error.value.hint
        assert "--resume" in error.value.hint
    with monkeypatch.context() as short:
        out_of_memory_beyond(54, short)
        smaller = config(run=run | {"max_steps": 4}, optim={"micro_batch_tokens": 52})
        assert train(smaller, out=out, resume=True)["steps"] == 4
