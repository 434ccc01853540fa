"""NF4 on a CUDA card: the kernels against torch, one packed copy for vLLM under CUDA graphs and the trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from engines import Rig, tiny_model
from test_engines import generate, nudge, problems, sampler_logprobs, trainer_logprobs
from test_nf4 import batch_of, packed_checkpoint, quantised_rig

from strop.policy.nf4 import quantised_tensors
from strop.policy.policy import check_packed_forward
from strop.quant import int8, nf4, products
from strop.seeding import rollout_requests

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(2048, 1536), (130, 192), (1536, 8960)])
def test_the_kernels_compute_what_torch_computes(n: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = nf4.quantize(torch.randn(n, k, device="cuda") * 0.03)
    plain = nf4.dequantize(weight, dtype)
    assert torch.equal(products.dequantized(weight, dtype), plain)
    bias = torch.randn(n, device="cuda", dtype=dtype)
    rows = int8.quantize(torch.randn(n, k, device="cuda"))
    for m in (1, 33, 100, 300):
        x = torch.randn(m, k, device="cuda", dtype=dtype)
        exact = x.float() @ plain.float().t() + bias.float()
        y = products.linear(x, weight, bias)
        assert (y.float() - exact).norm() < 4e-3 * exact.norm(), m
        assert torch.equal(y, products.linear(x, weight, bias))
        exact = x.float() @ int8.dequantize(rows, torch.float32).t()
        assert (products.linear_int8(x, rows).float() - exact).norm() < 4e-3 * exact.norm(), m


RIGS: dict[str, Callable[[], Rig]] = {
    "qwen3": functools.cache(lambda: quantised_rig(tiny_model("qwen3"), device="cuda")),
    "qwen3-int8": functools.cache(lambda: quantised_rig(tiny_model("qwen3"), head="int8", device="cuda")),
    "llama-nf4": functools.cache(
        lambda: quantised_rig(tiny_model("llama"), head="int8", embedding="nf4", device="cuda")
    ),
    "llama-host": functools.cache(
        lambda: quantised_rig(tiny_model("llama"), head="int8", embedding="host", device="cuda")
    ),
}


def test_a_checkpoint_of_bitsandbytes_is_taken_as_it_is() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    folder = packed_checkpoint(bnb, "llama", kept=("lm_head", "model.layers.1"), nested=True)
    check_parity("llama-bnb", quantised_rig(folder, device="cuda"))


@pytest.mark.parametrize("kind", RIGS)
def test_engine_and_trainer_agree_on_one_packed_copy(kind: str) -> None:
    check_parity(kind, RIGS[kind]())


def check_parity(kind: str, built: Rig) -> None:
    """Log-probabilities agree in bf16 after the adapters moved, no byte is held twice, and gradients arrive."""
    check_packed_forward(built.policy)
    nudge(built)
    built.weights.publish()
    rollouts = generate(built, rollout_requests(problems(8), 4, run_seed=0, step=0))
    gap = (trainer_logprobs(built, rollouts).cpu() - sampler_logprobs(rollouts)).abs()
    print(f"{kind}: |logp difference| over {gap.numel()} tokens: mean {gap.mean():.2e}, max {gap.max():.2e}")
    assert gap.numel() > 200
    assert gap.mean() < 0.02
    assert built.weights.unshared_bytes() == 0
    assert quantised_tensors(built.policy.model)
    logprobs, _ = built.policy.forward(batch_of(rollouts))
    logprobs.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in built.policy.trainable.values())
