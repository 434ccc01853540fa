"""The seams on a CUDA card: ragged attention, vLLM on the trainer's bf16 weights under CUDA graphs, a short run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engines import TARGETS, Rig, tiny_model
from records import random_samples
from test_engines import generate, nudge, problems, sampler_logprobs, sampling, trainer_logprobs

from strop.engine import vllm_compat
from strop.engine.base import EngineSettings
from strop.objective.packing import pack
from strop.policy import lora
from strop.policy.attention import PackedLayout, packed_attention
from strop.policy.load import build_on_meta, open_model
from strop.policy.policy import Policy
from strop.seeding import rollout_requests
from strop.trainer.parts import move_buffers
from strop.weights import SharedWeights, alias_parameters

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def card() -> Iterator[Rig]:
    vllm_compat.prepare_environment("cuda", 4)
    from strop.engine.vllm_engine import VllmEngine

    source = open_model(str(tiny_model()))
    settings = EngineSettings(
        source.path, "bfloat16", max_model_len=320, max_num_seqs=64, max_num_batched_tokens=4096,
        kv_cache_bytes=256 << 20, block_size=None, seed=0, lora_rank=8, lora_target_modules=TARGETS,
    )  # fmt: skip
    engine = VllmEngine(settings, lambda ids: source.tokenizer.decode(ids, skip_special_tokens=True), device="cuda")
    model = build_on_meta(source, torch.bfloat16)
    alias_parameters(model, engine)
    move_buffers(model, torch.device("cuda"))
    adapters = lora.inject(model, r=8, alpha=32, target_modules=TARGETS, seed=0)
    policy = Policy(model, 1.0, adapters)
    weights = SharedWeights(policy, engine)
    yield Rig(source, engine, policy, weights, {n: p.detach().clone() for n, p in policy.trainable.items()})
    engine.close()


@pytest.fixture
def rig_(card: Rig) -> Iterator[Rig]:
    yield card
    card.restore()


@pytest.mark.parametrize("window", [None, 7])
def test_ragged_attention_is_the_dense_one_forward_and_backward(window: int | None) -> None:
    torch.manual_seed(0)
    samples = random_samples(0, vocab=50, prompts=[37, 5], lengths=[[1, 64, 20], [90, 3]])
    batch = pack(samples, 10**6)[0]
    shapes = [(1, 6, batch.num_tokens, 64), (1, 2, batch.num_tokens, 64), (1, 2, batch.num_tokens, 64)]
    values = [torch.randn(shape).bfloat16() for shape in shapes]
    weight = torch.randn(1, batch.num_tokens, 6, 64)
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        layout = PackedLayout.build(batch.groups, device)
        q, k, v = (x.to(device, dtype).requires_grad_() for x in values)
        out = packed_attention(q, k, v, layout, scaling=None, sliding_window=window)
        (out.float() * weight.to(device)).sum().backward()
        assert ("split" in vars(layout)) == (device == "cuda")
        results.append([x.detach().float().cpu() for x in (out, q.grad, k.grad, v.grad)])
    for exact, ours in zip(*results, strict=True):
        assert (ours - exact).norm() / exact.norm() < 1e-2


def test_engine_and_trainer_agree_in_bf16_on_one_copy(rig_: Rig) -> None:
    nudge(rig_)
    rig_.weights.publish()
    rollouts = generate(rig_, rollout_requests(problems(8), 4, run_seed=0, step=0))
    gap = (trainer_logprobs(rig_, rollouts).cpu() - sampler_logprobs(rollouts)).abs()
    print(f"|logp difference| over {gap.numel()} tokens: mean {gap.mean():.2e}, max {gap.max():.2e}")
    assert gap.numel() > 200
    assert gap.mean() < 0.02
    assert rig_.weights.unshared_bytes() == 0


def test_stale_keys_and_values_are_never_used(rig_: Rig) -> None:
    requests = rollout_requests(problems(4), 4, run_seed=0, step=0)
    cached = generate(rig_, requests)
    assert sum(r.num_cached_tokens for r in cached) > 0
    before = trainer_logprobs(rig_, cached)
    nudge(rig_, 0.1)
    rig_.weights.publish()
    assert (trainer_logprobs(rig_, cached) - before).abs().mean() > 0.1  # so old keys and values would show
    fresh = generate(rig_, requests)
    assert all(r.num_cached_tokens == 0 for r in fresh if r.sample_index == 0)
    assert (trainer_logprobs(rig_, fresh).cpu() - sampler_logprobs(fresh)).abs().mean() < 0.02


def test_the_same_seeds_draw_the_same_completions(rig_: Rig) -> None:
    requests = rollout_requests(problems(6), 4, run_seed=0, step=3)
    whole, again = generate(rig_, requests), generate(rig_, requests)
    assert [r.completion_token_ids for r in whole] == [r.completion_token_ids for r in again]
    assert len({r.completion_token_ids for r in whole[:4]}) == 4


def test_a_rollout_can_be_stopped_between_two_scheduled_steps(rig_: Rig) -> None:
    requests = rollout_requests(problems(4), 4, run_seed=0, step=0)
    running: list[int] = []
    stream = rig_.engine.generate(
        requests, sampling(rig_, 200), policy_version=0, progress=lambda count, new: running.append(count)
    )
    next(stream)
    stream.close()  # vLLM schedules a step ahead: one is still on the card
    rig_.weights.publish()
    rollouts = generate(rig_, requests)
    assert len(rollouts) == 16
    assert (trainer_logprobs(rig_, rollouts).cpu() - sampler_logprobs(rollouts)).abs().mean() < 0.02


@pytest.mark.parametrize("flag", [[], ["--lora"]], ids=["full", "lora"])
def test_the_demo_runs_on_the_card(flag: list[str], tmp_path: Path) -> None:
    out = tmp_path / "demo"
    changes = ("run.max_steps=3", "run.save_steps=2", "run.eval_num_problems=8")
    result = subprocess.run(
        [sys.executable, "-m", "strop", "demo", *flag, "--out", str(out), *(x for c in changes for x in ("--set", c))],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["optimizer_steps"] == 1 for row in rows)
    assert max(row["sampling/sampling_logp_difference/mean"] for row in rows) < 0.02
    assert (out / "checkpoint-3" / "manifest.json").is_file()


def test_two_runs_in_one_process_and_a_failed_start_between_them(tmp_path: Path) -> None:
    """The first engine's memory is free again, and what failed leaves nothing behind."""
    code = """
import sys
from pathlib import Path
import torch, yaml
from strop import train
from strop.errors import StropError

config = yaml.safe_load(Path(sys.argv[1]).read_text())
config.setdefault("run", {}).update(max_steps=2, save_steps=100, eval_num_problems=0, vram_gib=5, report_to="none")
out = Path(sys.argv[2])
free = []
for name in ("first", "second"):
    train(config, out=out / name)
    torch.cuda.empty_cache()
    free.append(torch.cuda.mem_get_info()[0])
    try:
        train(config | {"model": config.get("model", {}) | {"path": str(out / "nothing")}}, out=out / "failed")
    except StropError:
        pass
print("free", *free)
assert free[0] - free[1] < 256 << 20, free
"""
    recipe = Path(__file__).parent.parent / "recipes" / "demo-lora.yaml"
    result = subprocess.run(
        [sys.executable, "-c", code, str(recipe), str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    for name in ("first", "second"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["optimizer_steps"] for row in rows] == [1, 1]
        assert max(row["sampling/sampling_logp_difference/mean"] for row in rows) < 0.02
