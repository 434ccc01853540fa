"""Is a card right before it is fast: Triton functions against plain torch, fused layers against plain ones and fp32.

Run by `training_step.py --kernels`, `--check` and `--tune`.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable
from typing import Any

import torch

from strop.objective.packing import pack
from strop.policy.kernels import torch_ops
from strop.types import MicroBatch


def check(device: str) -> None:
    """Fused blocks and plain layers, both in 16 bits, against plain layers in fp32: log-probabilities and gradients."""
    from training_step import make_samples

    model, work = ("1.5b", "W5") if device == "cuda" else ("tiny", "tiny")
    layers = 4 if device == "cuda" else 2
    samples = make_samples(work, 3_000, padded=False)
    samples = samples[:12] + samples[16:22]  # two groups
    batch = pack(samples, 10**9)[0]
    exact = gradients(model, layers, torch.float32, True, batch, device)
    dtypes = (torch.bfloat16, torch.float16) if device == "cuda" else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        for plain in (True, False):
            for checkpoint in (0, 2) if not plain else (0,):
                ours = gradients(model, layers, dtype, plain, batch, device, checkpoint)
                gap = (ours[0] - exact[0]).abs()
                errors = sorted(
                    (float((ours[1][n] - g).norm() / g.norm()), n) for n, g in exact[1].items() if float(g.norm())
                )
                middle, (worst, where) = errors[len(errors) // 2][0], errors[-1]
                print(
                    f"{dtype!s:<15} {'plain' if plain else 'fused'} checkpointed {checkpoint}: |dlogp| mean "
                    f"{float(gap.mean()):.2e} max {float(gap.max()):.2e}, entropy "
                    f"{float((ours[2] - exact[2]).abs().max()):.1e}, gradients off by {middle:.2e} (median), "
                    f"{worst:.2e} ({where})",
                    flush=True,
                )


def gradients(
    model: str, layers: int, dtype: torch.dtype, plain: bool, batch: MicroBatch, device: str, checkpoint: int = 0
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    from training_step import Setup, build, make_policy, stack

    net = build(model, layers, torch.bfloat16, device).to(dtype)  # the same rounded weights for all
    if dtype != torch.bfloat16:
        for layer in net.model.layers:
            stack([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj])
            stack([layer.mlp.gate_proj, layer.mlp.up_proj])
    policy = make_policy(net, Setup(model, "", 0, plain=plain, checkpoint=checkpoint))
    logp, entropy = policy.forward(batch)
    (logp * batch.advantages_K.to(logp.device) / batch.num_trained_tokens * 1024).sum().backward()
    return logp.detach(), {n: p.grad.float() for n, p in policy.trainable.items()}, entropy


def kernels(device: str) -> None:
    """Compare every Triton function with its plain form on the card, in bf16 and fp32."""
    from strop.policy.kernels import triton_ops

    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        for name, run in kernel_cases(dtype, device).items():
            try:
                ours, plain = run(triton_ops), run(torch_ops)
                errors = [
                    float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(ours, plain, strict=True)
                ]
                verdict = "ok" if max(errors) < limit else "WRONG"
                print(f"{dtype!s:<15} {name:<20} {', '.join(f'{e:.1e}' for e in errors)}  {verdict}", flush=True)
            except Exception:
                print(f"{dtype!s:<15} {name:<20} FAILED")
                traceback.print_exc()


def kernel_cases(dtype: torch.dtype, device: str) -> dict[str, Callable[[Any], list[torch.Tensor]]]:
    g = torch.Generator(device=device).manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device).to(dtype)

    t, hidden, heads, size, vocab = 777, 1536, 16, 128, 151_936
    x, w, grad, res = rand(t, hidden), rand(hidden), rand(t, hidden), rand(t, hidden)
    buffer, head_w, head_grad = rand(t, heads, size), rand(size), rand(t, 12, size)
    angle = torch.rand(t, size // 2, generator=g, device=device).repeat(1, 2) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    gate_up, product = rand(t, 2 * 8960), rand(t, 8960)
    out, other = rand(t, 12, size), rand(t, 12, size)
    lse, other_lse = rand(12, t + 5).float(), rand(12, t).float()
    low, grad_low, a, b = rand(t, 32), rand(t, 16), rand(16, 8960) / 4, torch.zeros(17_920, 32, device=device)
    b[:8960, :16], b[8960:, 16:] = rand(8960, 16) / 4, rand(8960, 16) / 4
    b = b.to(dtype)
    logits, targets = rand(96, vocab) * 3, torch.randint(0, vocab, (96,), generator=g, device=device)

    def rope(ops: Any, inverse: bool) -> list[torch.Tensor]:
        b = buffer.clone()
        ops.rope(b[:, :14], b[:, :14], cos, sin, inverse=inverse)
        return [b]

    def norm_rope(ops: Any) -> list[torch.Tensor]:
        b, c = torch.zeros_like(buffer), torch.zeros_like(buffer)
        ops.norm_rope(buffer[:, :12], b[:, :12], cos, sin, head_w, 1e-6)
        ops.norm_rope_backward(head_grad, buffer[:, :12], c[:, :12], cos, sin, head_w, 1e-6)
        return [b, c]

    def swiglu_backward(ops: Any, *adapters: torch.Tensor) -> list[torch.Tensor]:
        x, y = gate_up.clone(), product.clone()
        ops.swiglu_backward_(x, y, *adapters)
        return [x, y]

    def merge(ops: Any) -> list[torch.Tensor]:
        a, b = out.clone(), lse.clone()
        ops.merge_attention_(a, b[:, 5:], other, other_lse)
        return [a, b]

    def stats(ops: Any) -> list[torch.Tensor]:
        z = logits.clone()
        logp, entropy = ops.logit_stats(z, targets, 0.8, gradient=True)
        return [logp, entropy, z]

    return {
        "rms_norm": lambda ops: list(ops.rms_norm(x, w, 1e-6)),
        "rms_norm_backward": lambda ops: [ops.rms_norm_backward(grad, x, torch_ops.rms_norm(x, w, 1e-6)[1], w, res)],
        "rope": lambda ops: rope(ops, False),
        "rope inverse": lambda ops: rope(ops, True),
        "norm_rope": norm_rope,
        "swiglu": lambda ops: [ops.swiglu(gate_up)],
        "swiglu, adapters": lambda ops: [ops.swiglu(gate_up, low, b)],
        "swiglu_backward": swiglu_backward,
        "swiglu_backward, ad.": lambda ops: swiglu_backward(ops, low, b, grad_low, a),
        "merge_attention": merge,
        "logit_stats": stats,
    }


TILES = ((32, 64, 4), (32, 64, 2), (32, 64, 8), (64, 64, 4), (64, 64, 8), (64, 32, 4), (128, 32, 4), (128, 64, 8),
         (16, 64, 2), (16, 64, 4), (16, 128, 4), (32, 128, 4), (32, 128, 8), (64, 128, 8))  # fmt: skip


def tune(tokens: int = 16_000, width: int = 8_960, rank: int = 16) -> None:
    """Time the gated product with adapters, forward and backward, in several tilings, against its memory traffic."""
    from strop.policy.kernels import triton_ops

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    gate_up, product = rand(tokens, 2 * width), rand(tokens, width)
    low, b, grad_low, a = rand(tokens, 2 * rank), rand(2 * width, 2 * rank), rand(tokens, rank), rand(rank, width)
    before = triton_ops.SWIGLU_TILE
    try:
        for tile in TILES:
            triton_ops.SWIGLU_TILE = tile
            forward = timed(lambda: triton_ops.swiglu(gate_up, low, b))
            backward = timed(lambda: triton_ops.swiglu_backward_(gate_up, product, low, b, grad_low, a))
            gigabytes = tokens * width * 2 / 1e9
            print(
                f"{tile!s:<14} forward {forward * 1e3:.3f} ms, {3 * gigabytes / forward:,.0f} GB/s; "
                f"backward {backward * 1e3:.3f} ms, {6 * gigabytes / backward:,.0f} GB/s",
                flush=True,
            )
    finally:
        triton_ops.SWIGLU_TILE = before


def timed(run: Callable[[], object], repeats: int = 10) -> float:
    """Return the median seconds of a call on the card."""
    run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return sorted(x.elapsed_time(y) for x, y in itertools.pairwise(events))[repeats // 2] / 1e3
