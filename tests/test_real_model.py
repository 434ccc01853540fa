r"""SmolLM2-135M-Instruct on GSM8K: its own tokenizer, chat template and stop tokens, with `\boxed{}` answers.

Needs the model as a folder in STROP_SMOLLM2 and GSM8K in the shared data; skipped without them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from records import scored

from strop import load_config
from strop.objective.packing import pack
from strop.seeding import rollout_requests
from strop.trainer.parts import build, make_pool, prepare
from strop.types import Sample

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_engine_and_trainer_agree_on_every_token_of_a_real_model(shared_dir: Path) -> None:
    model, data = os.environ.get("STROP_SMOLLM2"), shared_dir / "data" / "gsm8k"
    if not model or not data.is_dir():
        pytest.skip("set STROP_SMOLLM2 to a folder with SmolLM2-135M-Instruct")
    config = load_config(
        ROOT / "recipes" / "gsm8k-smollm2-135m-cpu.yaml",
        [f"model.path={model}", f"task.path={data}", "rollout.max_completion_length=48"],
    )
    prepared = prepare(config)
    problems = prepared.task.batch(0, 3)
    prompt = prepared.source.tokenizer.decode(problems[0].prompt_token_ids)
    assert prompt.startswith("<|im_start|>system\nReason step by step")
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert set(prepared.source.stop_token_ids) == {0, 2}
    with make_pool(config, prepared.task.default_rewards) as pool, build(prepared, pool, print) as parts:
        torch.manual_seed(0)
        with torch.no_grad():
            for adapter in parts.policy.adapters.values():
                adapter.lora_B.add_(0.02 * torch.randn_like(adapter.lora_B))
        parts.weights.publish()
        assert parts.weights.unshared_bytes() == 0
        requests = rollout_requests(problems, 2, run_seed=0, step=0)
        rollouts = list(parts.engine.generate(requests, parts.sampling, policy_version=0))
        samples = [Sample(scored(r, 1.0), 1.0, 1.0) for r in rollouts]
        sampler = torch.tensor([x for r in rollouts for x in r.segments[1].logprobs or ()])
        with torch.no_grad():
            trainer = torch.cat([parts.policy.forward(b)[0] for b in pack(samples, 2000)])
    gap = (trainer - sampler).abs().max()
    print(f"largest log-probability difference over {len(sampler)} tokens: {gap:.2e}")
    assert len(sampler) >= 100
    assert gap < 2e-4
