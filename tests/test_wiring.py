"""Settings reach the maths: real runs compared with the same step made by hand, and with what they leave on disk."""

from __future__ import annotations

import functools
import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from engines import PAD, decode, tiny_model
from toy_rewards import share_of_low_bytes

from strop import load_config, train
from strop.engine.transformers_engine import TransformersEngine
from strop.errors import DivergenceError
from strop.monitor.metrics import read_metrics
from strop.objective.packing import pack
from strop.objective.samples import make_samples
from strop.policy import lora
from strop.policy.load import load_weights
from strop.policy.optim import MasterAdamW
from strop.policy.policy import Policy
from strop.seeding import derive_seed, rollout_requests
from strop.trainer.checkpoint import read_checkpoint, read_latest, write_checkpoint
from strop.trainer.parts import build, make_pool, prepare
from strop.trainer.update import update
from strop.types import Sampling, ScoredRollout

HERE = Path(__file__).resolve().parent
TOY = f"{HERE}/toy_rewards.py:share_of_low_bytes"
OPTIMIZER = "optimizer.safetensors"
EXTRA_STOPS = tuple(range(60, 90))


@functools.cache
def stopping_model() -> Path:
    """The tiny model, with so many stop tokens that some completions end by themselves. Its tokenizer's own end token
    is not among those that generation_config.json names."""
    folder = Path(tempfile.mkdtemp(prefix="strop-stops-")) / "model"
    shutil.copytree(tiny_model(), folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": list(EXTRA_STOPS)}))
    return folder


def config(**sections: Mapping[str, Any]) -> dict[str, Any]:
    """One step of 3 problems x 4 completions x at most 12 tokens, with an optimizer whose step shows the gradient's
    size: its epsilon is of that size."""
    base: dict[str, dict[str, Any]] = {
        "model": {"path": str(stopping_model()), "engine": "transformers"},
        "lora": {"r": 0},
        "task": {"name": "arithmetic", "max_prompt_length": 40},
        "rewards": {"funcs": [TOY]},
        "rollout": {"num_prompts": 3, "num_generations": 4, "max_completion_length": 12},
        "optim": {"learning_rate": 1e-2, "adam_epsilon": 1e-2, "max_grad_norm": 100.0},
        "run": {"max_steps": 1, "eval_num_problems": 0, "rollout_steps": 1, "report_to": ["none"], "threads": 1},
    }
    return {name: {**base.get(name, {}), **sections.get(name, {})} for name in (*base, "objective")}


def reward_file(folder: Path, body: str) -> str:
    path = folder / "rewards.py"
    path.write_text(f"import time\ndef f(completions, prompts, trainer_state, **kwargs):\n    {body}\n")
    return f"{path}:f"


def rollouts(out: Path, step: int) -> list[dict[str, Any]]:
    return pq.read_table(out / "rollouts" / f"step_{step:05d}.parquet").to_pylist()


@dataclass(frozen=True)
class ByHand:
    """What one step leaves behind."""

    optimizer: dict[str, torch.Tensor]
    prompt_lengths: list[int]
    scored: list[ScoredRollout]
    advantages: list[float]
    start: dict[str, torch.Tensor]


def step_by_hand(given: dict[str, Any]) -> ByHand:
    """Make the first step of a run without the loop: every setting is handed to the maths here, one by one."""
    checked = load_config(given)
    prepared = prepare(checked)
    source, objective, optim = prepared.source, checked.objective, checked.optim
    torch.set_num_threads(1)
    policy = Policy(load_weights(source, torch.float32, torch.device("cpu")), checked.rollout.temperature)
    start = {name: p.detach().clone() for name, p in policy.trainable.items()}
    engine = TransformersEngine(policy.model, lambda ids: decode(source, ids), max_num_seqs=12, pad_token_id=PAD)
    problems = prepared.task.batch(0, 3)
    requests = rollout_requests(problems, 4, run_seed=checked.run.seed, step=0)
    sampling = Sampling(12, source.stop_token_ids, checked.rollout.temperature)
    done = {
        (r.problem.id, r.sample_index): r
        for r in engine.generate(requests, sampling, policy_version=0)
    }  # fmt: skip
    scored = []
    for request in requests:
        rollout = done[request.problem.id, request.sample_index]
        reward = share_of_low_bytes([rollout.text])[0]
        scored.append(ScoredRollout(rollout, reward, {"reward": reward}))
    batch = make_samples(
        scored, 4, loss_type=objective.loss_type, scale_rewards=objective.scale_rewards, max_completion_length=12,
        mask_truncated_completions=objective.mask_truncated_completions, keep_groups_without_signal=False,
    )  # fmt: skip
    optimizer = MasterAdamW(
        policy.trainable, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_epsilon,
        weight_decay=optim.weight_decay,
    )  # fmt: skip
    update(
        policy, optimizer, pack(batch.samples, 100_000), objective, max_grad_norm=optim.max_grad_norm,
        learning_rate=optim.learning_rate / max(1, optim.warmup_steps),
    )  # fmt: skip
    state = {name: value.clone() for name, value in optimizer.state_dict().items()}
    advantages = [math.nan if a is None else a for a in batch.advantages_N]
    return ByHand(state, [len(p.prompt_token_ids) for p in problems], scored, advantages, start)


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """The largest relative difference between two optimizer states: of the weights' changes and of each moment."""
    assert a.keys() == b.keys()
    worst = 0.0
    for prefix in ("master.", "exp_avg.", "exp_avg_sq."):
        names = [name for name in a if name.startswith(prefix)]
        origin = {n: start[n.removeprefix("master.")] if prefix == "master." else torch.zeros(()) for n in names}
        x, y = (torch.cat([(state[n] - origin[n]).flatten() for n in names]) for state in (a, b))
        worst = max(worst, float((x - y).norm() / torch.maximum(x.norm(), y.norm())))
    return worst


@functools.cache
def plain_step() -> ByHand:
    return step_by_hand(config())


SETTINGS = {
    "nothing": {},
    "loss_type-grpo": {"objective": {"loss_type": "grpo"}},
    "loss_type-dr_grpo": {"objective": {"loss_type": "dr_grpo"}},
    "scale_rewards-none": {"objective": {"scale_rewards": "none"}},
    "scale_rewards-batch": {"objective": {"scale_rewards": "batch"}},
    "mask_truncated": {"objective": {"mask_truncated_completions": True}},
    "temperature": {"rollout": {"temperature": 0.6}},
    "learning_rate": {"optim": {"learning_rate": 3e-2}},
    "warmup": {"optim": {"warmup_steps": 4}},
    "weight_decay": {"optim": {"weight_decay": 0.9}},
    "beta1": {"optim": {"adam_beta1": 0.5}},
    "beta2": {"optim": {"adam_beta2": 0.9}},
    "epsilon": {"optim": {"adam_epsilon": 1e-3}},
    "max_grad_norm": {"optim": {"max_grad_norm": 0.03}},
    "seed": {"run": {"seed": 7}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_makes_the_step_that_is_made_by_hand(name: str, tmp_path: Path) -> None:
    given = config(**SETTINGS[name])
    expected = step_by_hand(given)
    train(given, out=tmp_path / "run")
    stored = rollouts(tmp_path / "run", 0)
    assert [row["completion"] for row in stored] == [s.rollout.text for s in expected.scored]
    assert [row["advantage"] for row in stored] == pytest.approx(expected.advantages, nan_ok=True)
    truncated = [row["truncated"] for row in stored]
    assert 1 < sum(truncated) < len(truncated) - 1
    state = read_latest(tmp_path / "run").tensors(OPTIMIZER)  # type: ignore[union-attr]
    assert difference(state, expected.optimizer, expected.start) < 1e-4
    if name != "nothing":  # else the comparison above would not see that the setting is ignored
        assert difference(expected.optimizer, plain_step().optimizer, expected.start) > 1e-2


@pytest.mark.parametrize("share", [True, False])
def test_share_prompt_says_how_often_a_prompt_passes_the_layers(share: bool, tmp_path: Path) -> None:
    train(config(optim={"share_prompt": share}), out=tmp_path / "run")
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    by_hand = plain_step()
    completions = sum(s.rollout.num_completion_tokens - 1 for s in by_hand.scored)
    prompts = sum(by_hand.prompt_lengths) * (1 if share else 4)
    assert row["num_trained_tokens"] == completions + prompts


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_groups_without_signal_are_trained_on_when_there_is_a_kl_term(beta: float, tmp_path: Path) -> None:
    funcs = [reward_file(tmp_path, "return [0.5] * len(completions)")]
    train(config(rewards={"funcs": funcs}, objective={"beta": beta}), out=tmp_path / "run")
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert row["frac_reward_zero_std"] == 1
    assert row["optimizer_steps"] == (beta > 0)
    assert row.get("num_trained_tokens", 0) == (
        sum(plain_step().prompt_lengths) + sum(s.rollout.num_completion_tokens - 1 for s in plain_step().scored)
        if beta > 0
        else 0
    )


def two_rows(folder: Path) -> dict[str, Any]:
    """A task with two training rows, so that every step has the same problems, and two held-out ones."""
    data = folder / "data"
    data.mkdir()
    for split, numbers in (("train", (1, 2)), ("test", (8, 9))):
        lines = [json.dumps({"question": f"{split} {n}+{n}=", "answer": str(2 * n)}) for n in numbers]
        (data / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return {"name": "dataset", "path": str(data), "max_prompt_length": 40}


def test_steps_have_their_own_seeds_version_and_learning_rate(tmp_path: Path) -> None:
    given = config(
        task=two_rows(tmp_path),
        rollout={"num_prompts": 2, "temperature": 0.6},
        # So small that both steps sample from the same policy: other completions come from other seeds alone.
        optim={"learning_rate": 1e-9, "warmup_steps": 2, "lr_scheduler_type": "linear"},
        run={"max_steps": 4, "seed": 3},
    )
    train(given, out=tmp_path / "run")
    steps = [rollouts(tmp_path / "run", step) for step in range(4)]
    assert len({row["problem_id"] for rows in steps for row in rows}) == 2
    for step, rows in enumerate(steps):
        for row in rows:
            assert row["seed"] == derive_seed("train", 3, step, row["problem_id"], row["sample_index"])
            assert row["policy_version"] == step
    by_problem = [{(r["problem_id"], r["sample_index"]): r["completion"] for r in rows} for rows in steps]
    assert sum(by_problem[0][key] != by_problem[1][key] for key in by_problem[0]) >= 6
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["learning_rate"] for row in metrics] == pytest.approx([0.5e-9, 1e-9, 1e-9, 0.5e-9])
    assert max(row["sampling/sampling_logp_difference/max"] for row in metrics) < 1e-4


def adapter(folder: Path) -> Path:
    """A PEFT adapter that does something."""
    source = prepare(load_config(config())).source
    model = load_weights(source, torch.float32, torch.device("cpu"))
    adapters = lora.inject(model, r=4, alpha=8, target_modules=["q_proj", "up_proj"], seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for one in adapters.values():
            one.lora_B.normal_(std=0.3)
    folder.mkdir()
    lora.save_adapter(adapters, folder, base_model="base")
    return folder


@pytest.mark.parametrize("kind", ["full", "lora", "lora-from-adapter"])
def test_the_reference_of_the_kl_term_is_the_policy_at_step_0(kind: str, tmp_path: Path) -> None:
    section: dict[str, Any] = {"r": 0}
    if kind != "full":
        section = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "up_proj"]}
    if kind == "lora-from-adapter":
        section["init_from"] = str(adapter(tmp_path / "adapter"))
    given = config(lora=section, objective={"beta": 0.1}, run={"max_steps": 2})
    train(given, out=tmp_path / "run")
    first, second = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert second["kl"] > 1e-5
    texts = [row["completion"] for row in rollouts(tmp_path / "run", 0)]
    untouched = [s.rollout.text for s in plain_step().scored]
    assert (texts == untouched) == (kind != "lora-from-adapter")
    if kind != "full":
        saved = json.loads((tmp_path / "run" / "checkpoint-2" / "adapter_config.json").read_text())
        assert (saved["r"], saved["lora_alpha"]) == (4, 8)
        assert sorted(saved["target_modules"]) == ["q_proj", "up_proj"]


def test_a_run_on_vllm_holds_the_base_once_under_its_adapter() -> None:
    prepared = prepare(load_config(config(model={"engine": "vllm"}, lora={"r": 8})))
    with build(prepared, make_pool(prepared.config, ()), print) as parts:
        assert parts.engine.name == "vllm"
        assert parts.weights.unshared_bytes() == 0
        # Once within the trainer as well: every base weight is one of the engine's, at the engine's address.
        views = {name: view.data_ptr() for name, view in parts.engine.base_views().items()}
        parameters = parts.policy.model.named_parameters()
        own = {name.replace(".base.", "."): p.data_ptr() for name, p in parameters if "lora" not in name}
        assert len(own) > 20
        assert [name for name in own if own[name] != views[name]] == []


def test_a_clocks_verdict_is_logged_and_leaves_the_completion_unscored(tmp_path: Path) -> None:
    body = "time.sleep(30 if 'train 1' in str(prompts) else 0); return [len(str(c)) for c in completions]"
    given = config(
        task=two_rows(tmp_path),
        rewards={"funcs": [reward_file(tmp_path, body)], "timeout_s": 0.3},
        rollout={"num_prompts": 2, "num_generations": 2},
    )
    train(given, out=tmp_path / "run")
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert row["frac_unscored"] == 0.5
    slept = [r for r in rollouts(tmp_path / "run", 0) if "train 1" in r["prompt"]]
    assert [r["reward"] for r in slept] == [None, None]
    lines = [json.loads(line) for line in (tmp_path / "run" / "verdicts.jsonl").read_text().splitlines()]
    assert sorted(line["seed"] for line in lines) == sorted(r["seed"] for r in slept)
    assert all("0.3 s" in line["reason"] for line in lines)


def test_three_steps_that_are_not_finite_stop_the_run_and_keep_the_last_good_weights(tmp_path: Path) -> None:
    """Advantages of 1e35 are finite; the gradient's norm is not, in fp32."""
    body = "return [len(str(c)) * (1e35 if trainer_state.global_step else 1.0) for c in completions]"
    given = config(
        task=two_rows(tmp_path),
        rewards={"funcs": [reward_file(tmp_path, body)]},
        rollout={"num_prompts": 2},
        objective={"scale_rewards": "none"},
        run={"max_steps": 6, "save_steps": 1, "save_total_limit": 5},
    )
    with pytest.raises(DivergenceError) as error:
        train(given, out=tmp_path / "run")
    assert "optim.learning_rate" in error.value.hint
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["nonfinite_steps"] for row in rows] == [0, 1, 2, 3]
    assert [row["optimizer_steps"] for row in rows] == [1, 0, 0, 0]
    good = read_checkpoint(tmp_path / "run" / "checkpoint-1").tensors(OPTIMIZER)
    newest = read_latest(tmp_path / "run")
    assert newest is not None
    latest = newest.tensors(OPTIMIZER)
    assert all(torch.equal(good[name], latest[name]) and bool(torch.isfinite(good[name]).all()) for name in good)


@pytest.mark.parametrize(("planned", "fits"), [(4321, True), (10**15, False)])
def test_a_resumed_run_goes_on_with_weights_and_plan_and_drops_what_lies_beyond_its_checkpoint(
    planned: int, fits: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train(config(run={"max_steps": 2}), out=out)
    stray = out / "rollouts" / "step_00007.parquet"
    shutil.copy(out / "rollouts" / "step_00001.parquet", stray)
    # The same checkpoint as it would be from a machine whose memory gave one number of the plan another value.
    old = read_latest(out)
    assert old is not None
    state = {**old.state, "promise": {**old.state["promise"], "micro_batch_tokens": planned}}
    tensors = {OPTIMIZER: old.tensors(OPTIMIZER)}
    shutil.rmtree(old.path)
    write_checkpoint(out, 2, tensors=tensors, state=state, keep=1)
    capsys.readouterr()

    train(config(run={"max_steps": 3}), out=out, resume=True)

    assert not stray.exists()
    assert sorted(p.name for p in (out / "rollouts").iterdir()) == [f"step_{i:05d}.parquet" for i in range(3)]
    plan = json.loads((out / "plan.json").read_text())
    assert (plan["micro_batch_tokens"]["value"] == planned) == fits
    notes = [line for line in capsys.readouterr().out.splitlines() if "not bit-equal" in line]
    assert len(notes) == (0 if fits else 1)
    assert all("micro_batch_tokens" in note and str(planned) in note for note in notes)
    if fits:
        train(config(run={"max_steps": 3}), out=tmp_path / "straight")
        states = [read_checkpoint(run / "checkpoint-3").tensors(OPTIMIZER) for run in (out, tmp_path / "straight")]
        assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_checkpoint_of_a_full_run_is_a_model_that_stops_and_computes_the_same(engine: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    given = config(model={"path": str(stopping_model()), "engine": engine}, run={"max_steps": 2})
    train(given, out=tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint-2"
    source = prepare(load_config(given)).source
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stops = GenerationConfig.from_pretrained(folder).eos_token_id
    assert sorted(stops) == sorted({*EXTRA_STOPS, tokenizer.eos_token_id}) == sorted(source.stop_token_ids)

    by_hand = step_by_hand(config())
    policy = Policy(load_weights(source, torch.float32, torch.device("cpu")), 1.0)
    optimizer = MasterAdamW(policy.trainable, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    optimizer.load_state_dict(read_checkpoint(folder).tensors(OPTIMIZER))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    samples = make_samples(
        by_hand.scored, 4, loss_type="dapo", scale_rewards="none", max_completion_length=12,
        mask_truncated_completions=False, keep_groups_without_signal=True,
    ).samples  # fmt: skip
    with torch.no_grad():
        ours = torch.cat([policy.forward(b)[0] for b in pack(samples, 100_000)])
        theirs = []
        for sample in samples:
            rollout = sample.scored.rollout
            ids = torch.tensor([rollout.problem.prompt_token_ids + rollout.completion_token_ids])
            logp = torch.log_softmax(loaded(input_ids=ids).logits[0, :-1].float(), -1).gather(1, ids[0, 1:, None])
            theirs.append(logp[-rollout.num_completion_tokens :, 0])
    assert (ours - torch.cat(theirs)).abs().max() < 2e-5
    # And a run can begin with it, the optimizer's file beside the model's or not.
    again = config(model={"path": str(folder), "engine": engine}, run={"max_steps": 1})
    assert train(again, out=tmp_path / "again")["steps"] == 1
    untrained = torch.tensor([x for s in by_hand.scored for x in s.rollout.segments[1].logprobs or ()])
    assert (ours - untrained).abs().max() > 1e-3
