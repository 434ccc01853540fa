"""The training step on a CUDA card: Triton functions, fused blocks, flash attention, and a real shortage of memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from records import random_samples
from test_policy import TARGETS
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen3Config

from strop.config import ObjectiveConfig
from strop.objective.packing import pack
from strop.policy import lora
from strop.policy.attention import PackedLayout, attend, attend_backward
from strop.policy.compact import CompactAdamW
from strop.policy.kernels import torch_ops
from strop.policy.optim import MasterAdamW
from strop.policy.policy import Policy, check_packed_forward
from strop.trainer.update import MicroBatchLimit, update
from strop.types import MicroBatch

pytestmark = [pytest.mark.gpu]

VOCAB = 3_000
SIZE = {
    "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "eos_token_id": 1, "pad_token_id": 0,
    "bos_token_id": None,
}  # fmt: skip


GEMMA_LAYERS = ["sliding_attention", "sliding_attention", "full_attention"]


def net(kind: str) -> torch.nn.Module:
    """Return a model with weights that bf16 holds exactly, so that every dtype starts from the same."""
    torch.manual_seed(0)
    makes = {
        "qwen2": lambda: Qwen2Config(**SIZE),
        "qwen3": lambda: Qwen3Config(**SIZE, head_dim=64),
        "gemma3": lambda: Gemma3TextConfig(**SIZE, head_dim=64, sliding_window=30, layer_types=GEMMA_LAYERS),
    }
    config = makes[kind]()
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()


def policy(kind: str, dtype: torch.dtype, *, fuse: bool, checkpointed: int = 0) -> Policy:
    built = copy.deepcopy(net(kind)).to("cuda", dtype)
    adapters = lora.inject(built, r=16, alpha=32, target_modules=TARGETS, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for a in adapters.values():
            a.lora_B.normal_(std=0.05)
    return Policy(built, 0.9, adapters, fuse=fuse, checkpoint_layers=checkpointed)


def batch(lengths: list[list[int]] | None = None) -> MicroBatch:
    lengths = lengths or [[1, 64, 200], [90, 3], [1, 1]]  # a group without anything behind its prompt is among them
    return pack(random_samples(0, vocab=VOCAB, prompts=[37, 5, 70], lengths=lengths), 10**6)[0]


def results(p: Policy, b: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    p.model.zero_grad()
    logp, _ = p.forward(b)
    (logp * b.advantages_K.cuda()).sum().backward()
    return logp.detach(), {n: q.grad.clone() for n, q in p.trainable.items()}


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_blocks_are_as_exact_as_the_plain_layers(kind: str, dtype: torch.dtype) -> None:
    b = batch()
    exact = results(policy(kind, torch.float32, fuse=False), b)
    plain = results(policy(kind, dtype, fuse=False), b)
    fused = policy(kind, dtype, fuse=True)
    assert fused.fused is not None
    check_packed_forward(fused)
    ours = results(fused, b)
    assert (ours[0] - exact[0]).abs().mean() < 1.3 * (plain[0] - exact[0]).abs().mean() + 1e-4
    for name, truth in exact[1].items():
        error, reference = ((g[1][name] - truth).norm() / truth.norm() for g in (ours, plain))
        assert error < 1.3 * reference + 2e-3, name


def test_checkpointed_layers_give_the_same_result_on_a_card() -> None:
    b = batch()
    whole, all_of_it = (results(policy("qwen3", torch.bfloat16, fuse=True, checkpointed=n), b) for n in (0, 3))
    assert torch.equal(whole[0], all_of_it[0])
    # FlashAttention's backward adds up in any order, which moves roundings to bf16: by far less than bf16 is off by.
    for name, gradient in whole[1].items():
        assert (all_of_it[1][name] - gradient).norm() < 1e-2 * gradient.norm(), name


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("lengths", [[[1, 64, 20], [90, 3], [5]], [[1, 1], [1], [30, 1]], [[1], [1], [1]]])
def test_flash_attention_is_the_dense_one(window: int | None, lengths: list[list[int]]) -> None:
    b = batch(lengths)
    torch.manual_seed(0)
    values = [torch.randn(b.num_tokens, heads, 64) for heads in (6, 2, 2, 6)]
    found = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        layout = PackedLayout.build(b.groups, device)
        q, k, v, grad = (x.to(device, dtype) for x in values)
        out, saved = attend(q, k, v, layout, None, window)
        back = attend_backward(grad, q, k, v, out, saved, layout, None, window)
        found.append([x.float().cpu() for x in (out, *back)])
    for exact, ours in zip(*found, strict=True):
        assert (ours - exact).norm() / exact.norm() < 1e-2


def test_triton_functions_are_the_plain_ones() -> None:
    from strop.policy.kernels import triton_ops

    g = torch.Generator("cuda").manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device="cuda").bfloat16()

    gate_up, low, b, product = rand(77, 2 * 640), rand(77, 24), torch.zeros(1280, 24, device="cuda"), rand(77, 640)
    b[:640, :12], b[640:, 12:] = rand(640, 12) / 4, rand(640, 12) / 4
    b, grad_low, a = b.bfloat16(), rand(77, 20), rand(20, 640) / 4
    logits, targets = rand(33, 50_001) * 3, torch.randint(0, 50_001, (33,), generator=g, device="cuda")
    logits[:, 7] = -torch.inf

    def run(ops: Any) -> list[torch.Tensor]:
        x, y, z = gate_up.clone(), product.clone(), logits.clone()
        forward = ops.swiglu(gate_up, low, b)
        ops.swiglu_backward_(x, y, low, b, grad_low, a)
        stats = ops.logit_stats(z, targets.clamp(min=8), 0.8, gradient=True)
        return [forward, x, y, z, *stats]

    for ours, plain in zip(run(triton_ops), run(torch_ops), strict=True):
        assert not ours.isnan().any()
        assert (ours.float() - plain.float()).norm() <= 2e-2 * plain.float().norm()


@pytest.mark.parametrize("eight_bit", [False, True])
def test_the_compact_optimizer_follows_the_other_on_a_card(eight_bit: bool) -> None:
    moved = []
    for make in (MasterAdamW, CompactAdamW):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(64, 129, device="cuda"))
        start = p.detach().clone()
        more = {} if make is MasterAdamW else {"eight_bit": eight_bit, "compensated": False}
        optimizer = make({"w": p}, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, **more)
        for t in range(20):
            p.grad = torch.sin(p.detach() * 3 + t)
            optimizer.step(learning_rate=0.01, gradient_scale=0.5)
        moved.append(p.detach() - start)
    assert (moved[0] - moved[1]).norm() < (0.05 if eight_bit else 1e-4) * moved[0].norm()


def test_a_real_shortage_of_memory_halves_the_micro_batch() -> None:
    samples = random_samples(0, vocab=VOCAB, prompts=[64] * 4, lengths=[[700] * 8] * 4)
    notes: list[str] = []
    norms = []
    for tight in (False, True):
        torch.cuda.empty_cache()
        p = policy("qwen2", torch.bfloat16, fuse=True)
        optimizer = MasterAdamW(p.trainable, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
        # 22,600 tokens keep 350 MB in three layers and 135 MB of logits: half of them fit.
        if tight:
            room = torch.cuda.memory_reserved() + (370 << 20)
            torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
        try:
            stats = update(
                p, optimizer, pack(samples, 10**6), ObjectiveConfig(), learning_rate=1e-3, max_grad_norm=1e9,
                limit=MicroBatchLimit(note=notes.append),
            )  # fmt: skip
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert stats.stepped
        norms.append(stats.metrics["grad_norm"].value)
    assert notes
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)
