"""Runs that ran out of memory, and runs of an earlier version, go on from their checkpoints."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_wiring import OPTIMIZER, config, reward_file

from strop import train
from strop.errors import CheckpointError, MemoryExhaustedError, RunError
from strop.trainer import session as session_module
from strop.trainer import update as update_module
from strop.trainer.checkpoint import read_checkpoint, read_latest, write_checkpoint
from strop.trainer.evaluate_run import evaluate_target
from strop.weights import SharedWeights


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


def test_the_third_shortage_leaves_a_checkpoint_that_goes_on_with_smaller_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The card runs short in step 3 of a run whose next checkpoint would be at step 5."""
    out = tmp_path / "run"
    given = config(run={"max_steps": 5, "save_steps": 5}, rollout={"num_generations": 8})
    original, done, failed = update_module._backward, [], []

    def backward(policy: Any, there: Any, *args: Any) -> Any:
        size = there.batch.num_tokens
        if len(done) >= 2 and size > (failed[-1] // 3 if failed else 0):
            failed.append(size)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        done.append(size)
        return original(policy, there, *args)

    with monkeypatch.context() as short:
        short.setattr(update_module, "_backward", backward)
        with pytest.raises(MemoryExhaustedError, match="at a time"):
            train(given, out=out)
    assert len(failed) == 3
    assert "checkpoint-2 holds everything up to step 2" in capsys.readouterr().out
    assert json.loads((out / "summary.json").read_text())["stopped"] == "failed"
    limit = read_checkpoint(out / "checkpoint-2").state["micro_batch_limit"]
    assert limit == failed[-1] // 2
    with monkeypatch.context() as short:
        sizes = out_of_memory_beyond(10_000, short)
        assert train(given, out=out, resume=True)["steps"] == 5
    assert f"at most {limit} tokens long" in capsys.readouterr().out
    assert max(sizes) <= max(limit, 28)  # or a single completion with its prompt
    assert max(done) > 100


def fail(*args: Any, **more: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("strop.policy.policy.check_packed_forward", "loaded: CUDA out of memory$"),
        ("strop.policy.lora.inject", "loaded: CUDA out of memory$"),
        ("strop.trainer.opening.make_optimizer", "optimizer's state was allocated: CUDA out of memory$"),
    ],
)
def test_a_shortage_at_the_start_says_what_was_being_done(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(name, fail)
    with pytest.raises(MemoryExhaustedError) as error:
        train(config(lora={"r": 4}), out=tmp_path / "run")
    assert re.search(message, error.value.message)
    assert "run.vram_gib" in error.value.hint


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("strop.policy.optim.MasterAdamW._step_piece", "the optimizer's own step"),
        ("strop.weights.SharedWeights.publish", "took over the new weights"),
        ("strop.engine.transformers_engine.TransformersEngine.restore_memory", "while training"),
    ],
)
def test_no_checkpoint_is_written_of_weights_that_belong_to_no_step(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shortage comes in the first step; the weights are published once before it."""
    out, original = tmp_path / "run", SharedWeights.publish
    calls: list[SharedWeights] = []

    def publish(weights: SharedWeights) -> int:
        calls.append(weights)
        return original(weights) if len(calls) < 2 else fail()

    monkeypatch.setattr(name, publish if name.endswith("publish") else fail)
    with pytest.raises(MemoryExhaustedError, match=said):
        train(config(run={"max_steps": 2}), out=out)
    assert "the weights have changed since the last whole step" in capsys.readouterr().out
    assert read_latest(out) is None


def test_a_shortage_is_told_even_where_no_checkpoint_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr("strop.engine.transformers_engine.TransformersEngine.generate", fail)

    def full(*args: Any, **more: Any) -> None:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(session_module, "write_checkpoint", full)
    with pytest.raises(MemoryExhaustedError, match="completions were generated"):
        train(config(), out=out)
    assert "could be written after the shortage: the disk is full" in capsys.readouterr().out


def test_the_third_shortage_right_behind_a_save_goes_on_smaller_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of the step before is there already and stays as it is; what was learned stands beside it."""
    out = tmp_path / "run"
    given = config(run={"max_steps": 3, "save_steps": 1}, rollout={"num_generations": 8})
    train(config(run={"max_steps": 1, "save_steps": 1}, rollout={"num_generations": 8}), out=out)
    tried: list[int] = []
    for _ in range(4):
        with monkeypatch.context() as short:
            out_of_memory_beyond(35, short)
            try:
                summary = train(given, out=out, resume=True)
                break
            except MemoryExhaustedError:
                tried.append(json.loads((out / "micro_batch_limit.json").read_text())["micro_batch_tokens"])
    else:
        raise AssertionError(f"every resumed run ended in the same way: {tried}")
    assert summary["steps"] == 3
    assert tried
    assert tried == sorted(tried, reverse=True)
    (out / "micro_batch_limit.json").write_text("{")
    with pytest.raises(RunError, match=r"micro_batch_limit.json.* cannot be read") as error:
        train(config(run={"max_steps": 4, "save_steps": 1}, rollout={"num_generations": 8}), out=out, resume=True)
    assert "remove it" in error.value.hint


@pytest.mark.parametrize("stepped", [True, False])
def test_an_evaluation_between_steps_without_memory_ends_the_run_behind_a_whole_step(
    stepped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    # Where all get the same, no step changes the weights.
    rewards = {} if stepped else {"funcs": [reward_file(tmp_path, "return [1.0] * len(completions)")], "check": False}
    given = config(run={"max_steps": 4, "eval_steps": 2, "save_steps": 4, "eval_num_problems": 2}, rewards=rewards)
    original, calls = session_module.evaluate, []

    def second_time(*args: Any, **more: Any) -> Any:
        calls.append(1)
        return fail() if len(calls) == 2 else original(*args, **more)

    monkeypatch.setattr(session_module, "evaluate", second_time)
    with pytest.raises(MemoryExhaustedError, match="during an evaluation") as error:
        train(given, out=out)
    assert "--resume" in error.value.hint
    newest = read_latest(out)
    assert newest is not None
    assert newest.step == 2
    assert train(given, out=out, resume=True)["steps"] == 4
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]


def test_a_last_evaluation_without_memory_leaves_a_summary_and_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    original, calls = session_module.evaluate, []

    def last_time(*args: Any, **more: Any) -> Any:
        calls.append(1)
        return fail() if len(calls) == 2 else original(*args, **more)

    monkeypatch.setattr(session_module, "evaluate", last_time)
    with pytest.raises(MemoryExhaustedError, match="during an evaluation"):
        train(config(run={"max_steps": 2, "eval_num_problems": 2}), out=out)
    assert "checkpoint-2 holds everything" in capsys.readouterr().out
    assert json.loads((out / "summary.json").read_text())["stopped"] == "failed"


def test_a_shortage_while_a_checkpoint_is_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, original, calls = tmp_path / "run", SharedWeights.publish, []
    train(config(run={"max_steps": 1}), out=out)

    def second(weights: SharedWeights) -> int:
        calls.append(1)
        return original(weights) if len(calls) % 2 else fail()

    monkeypatch.setattr(SharedWeights, "publish", second)
    with pytest.raises(MemoryExhaustedError, match="a checkpoint was read"):
        train(config(run={"max_steps": 2}), out=out, resume=True)
    with pytest.raises(MemoryExhaustedError, match="a checkpoint was read"):
        evaluate_target(out, ["run.eval_num_problems=2"])


def test_moments_of_an_earlier_coding_are_no_matter_to_an_evaluation(tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = config(run={"max_steps": 1, "eval_num_problems": 2}, optim={"name": "adamw_8bit"})
    after = train(given, out=out)["eval_after"]
    newest = read_latest(out)
    assert newest is not None
    old = {name.replace("exp_avg_sq_root", "exp_avg_sq"): value for name, value in newest.tensors(OPTIMIZER).items()}
    shutil.rmtree(newest.path)
    write_checkpoint(out, 1, tensors={OPTIMIZER: old}, state=newest.state, keep=1)
    found = evaluate_target(out, [])
    assert found.pass_at_1 == after["pass@1"]
    with pytest.raises(CheckpointError, match="8-bit moments"):
        train(config(run={"max_steps": 2, "eval_num_problems": 2}, optim={"name": "adamw_8bit"}), out=out, resume=True)
