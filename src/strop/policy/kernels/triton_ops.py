"""The fused elementwise functions in Triton; `torch_ops` says what each one means.

Written here because the frozen base needs less than the library kernels do (no weight gradients, the residual's
gradient in the same pass, products recomputed in place) and because q, k and v lie in one strided buffer.
"""

# pyright: reportMissingParameterType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .torch_ops import GELU_CUBE, GELU_SCALE

_LOGIT_BLOCK = 4096
_GELU_SCALE, _GELU_CUBE = tl.constexpr(GELU_SCALE), tl.constexpr(GELU_CUBE)
SWIGLU_TILE = (32, 128, 4)
"""Rows, columns and warps of a program: of fourteen tilings the fastest forward and backward on an H100, where
it moves 2.2 to 2.4 TB/s of 3.35; (64, 128, 8) was a quarter slower. `bench/training_step.py --tune` measures others."""


@triton.jit
def _rms_norm_kernel(x_ptr, w_ptr, y_ptr, rstd_ptr, width, eps, ROUND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    x = tl.load(x_ptr + row * width + cols, mask=mask, other=0.0)
    wide = x.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / width + eps)
    w = tl.load(w_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    normed = wide * rstd
    if ROUND:
        normed = normed.to(x.dtype).to(tl.float32)
    tl.store(y_ptr + row * width + cols, (normed * w).to(x.dtype), mask=mask)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _rms_norm_backward_kernel(
    g_ptr, x_ptr, rstd_ptr, w_ptr, res_ptr, dx_ptr, width, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    at = row * width + cols
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    rstd = tl.load(rstd_ptr + row)
    w = tl.load(w_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    scaled = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32) * w
    normed = x.to(tl.float32) * rstd
    inner = tl.sum(scaled * normed, axis=0) / width
    dx = rstd * (scaled - normed * inner)
    if RESIDUAL:
        dx += tl.load(res_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, dx.to(x.dtype), mask=mask)


def _row_settings(width: int) -> tuple[int, int]:
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 512))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See `torch_ops.rms_norm`."""
    x = x.contiguous()
    rows, width = x.shape
    y, rstd = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    block, warps = _row_settings(width)
    if rows:
        _rms_norm_kernel[(rows,)](
            x, weight, y, rstd, width, eps, ROUND=weight.dtype == x.dtype, BLOCK=block, num_warps=warps
        )
    return y, rstd


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None
) -> torch.Tensor:
    """See `torch_ops.rms_norm_backward`."""
    grad, x = grad.contiguous(), x.contiguous()
    more = grad if residual is None else residual.contiguous()
    rows, width = x.shape
    dx = torch.empty_like(x)
    block, warps = _row_settings(width)
    if rows:
        _rms_norm_backward_kernel[(rows,)](
            grad, x, rstd, weight, more, dx, width, RESIDUAL=residual is not None, BLOCK=block, num_warps=warps
        )
    return dx


@triton.jit
def _rope_kernel(
    src_ptr, src_token, src_head, out_ptr, out_token, out_head, pre_ptr, pre_token, pre_head, cos_ptr, sin_ptr,
    w_ptr, heads, eps, sign,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, MODE: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """MODE 0: rotate. 1: normalise, then rotate. 2: the backward pass of 1; `pre` is what was normalised."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    col = tl.arange(0, BLOCK_HALF)
    mask = (head < heads)[:, None] & (col < HALF)[None, :]
    c = tl.load(cos_ptr + token * 2 * HALF + col, mask=col < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin_ptr + token * 2 * HALF + col, mask=col < HALF, other=0.0).to(tl.float32)[None, :] * sign
    src = src_ptr + token * src_token + head[:, None] * src_head + col[None, :]
    raw1 = tl.load(src, mask=mask, other=0.0)
    raw2 = tl.load(src + HALF, mask=mask, other=0.0)
    a = raw1.to(tl.float32)
    b = raw2.to(tl.float32)
    if MODE == 1:
        w1 = tl.load(w_ptr + col, mask=col < HALF, other=0.0).to(tl.float32)[None, :]
        w2 = tl.load(w_ptr + HALF + col, mask=col < HALF, other=0.0).to(tl.float32)[None, :]
        rstd = 1.0 / tl.sqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF) + eps)[:, None]
        a = a * rstd
        b = b * rstd
        if ROUND:
            a = a.to(raw1.dtype).to(tl.float32)
            b = b.to(raw1.dtype).to(tl.float32)
        a = (a * w1).to(raw1.dtype).to(tl.float32)
        b = (b * w2).to(raw1.dtype).to(tl.float32)
    first = a * c - b * s
    second = b * c + a * s
    if MODE == 2:
        w1 = tl.load(w_ptr + col, mask=col < HALF, other=0.0).to(tl.float32)[None, :]
        w2 = tl.load(w_ptr + HALF + col, mask=col < HALF, other=0.0).to(tl.float32)[None, :]
        pre = pre_ptr + token * pre_token + head[:, None] * pre_head + col[None, :]
        n1 = tl.load(pre, mask=mask, other=0.0).to(tl.float32)
        n2 = tl.load(pre + HALF, mask=mask, other=0.0).to(tl.float32)
        rstd = 1.0 / tl.sqrt((tl.sum(n1 * n1, axis=1) + tl.sum(n2 * n2, axis=1)) / (2 * HALF) + eps)[:, None]
        n1 = n1 * rstd
        n2 = n2 * rstd
        first = first * w1
        second = second * w2
        inner = ((tl.sum(first * n1, axis=1) + tl.sum(second * n2, axis=1)) / (2 * HALF))[:, None]
        first = rstd * (first - n1 * inner)
        second = rstd * (second - n2 * inner)
    out = out_ptr + token * out_token + head[:, None] * out_head + col[None, :]
    tl.store(out, first.to(raw1.dtype), mask=mask)
    tl.store(out + HALF, second.to(raw1.dtype), mask=mask)


def _launch_rope(
    source: torch.Tensor, out: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, mode: int, sign: float,
    pre: torch.Tensor | None = None, weight: torch.Tensor | None = None, eps: float = 0.0,
) -> None:  # fmt: skip
    tokens, heads, size = source.shape
    if not tokens:
        return
    pre = source if pre is None else pre
    assert source.stride(2) == out.stride(2) == pre.stride(2) == 1, "a head's values must lie side by side"
    half, block_heads = size // 2, min(16, triton.next_power_of_2(heads))
    _rope_kernel[(tokens, triton.cdiv(heads, block_heads))](
        source, source.stride(0), source.stride(1), out, out.stride(0), out.stride(1), pre, pre.stride(0),
        pre.stride(1), cos.contiguous(), sin.contiguous(), cos if weight is None else weight, heads, eps, sign,
        HALF=half, BLOCK_HALF=triton.next_power_of_2(half), BLOCK_HEADS=block_heads, MODE=mode,
        ROUND=weight is not None and weight.dtype == source.dtype, num_warps=2,
    )  # fmt: skip


def rope(source: torch.Tensor, out: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inverse: bool) -> None:
    """See `torch_ops.rope`."""
    _launch_rope(source, out, cos, sin, mode=0, sign=-1.0 if inverse else 1.0)


def norm_rope(
    source: torch.Tensor, out: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    """See `torch_ops.norm_rope`."""
    _launch_rope(source, out, cos, sin, mode=1, sign=1.0, weight=weight, eps=eps)


def norm_rope_backward(
    grad: torch.Tensor, source: torch.Tensor, out: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    weight: torch.Tensor, eps: float,
) -> None:  # fmt: skip
    """See `torch_ops.norm_rope_backward`."""
    _launch_rope(grad, out, cos, sin, mode=2, sign=-1.0, pre=source, weight=weight, eps=eps)


@triton.jit
def _low_rank(
    low_ptr, low_width, b_ptr, b_row, b_col, rows, row_mask, cols, col_mask, RANK: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Return low [rows, R] times b [R, cols] in fp32; b is read with the strides given."""
    r = tl.arange(0, BLOCK_R)
    low = tl.load(
        low_ptr + rows[:, None] * low_width + r[None, :], mask=row_mask[:, None] & (r < RANK)[None, :], other=0.0
    )
    b = tl.load(
        b_ptr + r[:, None] * b_row + cols[None, :] * b_col, mask=(r < RANK)[:, None] & col_mask[None, :], other=0.0
    )
    return tl.dot(low, b, input_precision="ieee")


# Numbers that differ from batch to batch: else a multiple of 16 among them would be compiled for in the midst of a run.
@triton.jit(do_not_specialize=["height"])
def _swiglu_kernel(
    gu_ptr, m_ptr, low_ptr, b_ptr, grad_low_ptr, a_ptr, height, width,
    BACKWARD: tl.constexpr, GELU: tl.constexpr, RANK: tl.constexpr, GRAD_RANK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_GRAD_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < height
    col_mask = cols < width
    mask = row_mask[:, None] & col_mask[None, :]
    gate_at = gu_ptr + rows[:, None] * 2 * width + cols[None, :]
    raw = tl.load(gate_at, mask=mask, other=0.0)
    gate = raw.to(tl.float32)
    up = tl.load(gate_at + width, mask=mask, other=0.0).to(tl.float32)
    if RANK > 0:
        gate += _low_rank(low_ptr, 2 * RANK, b_ptr, 1, 2 * RANK, rows, row_mask, cols, col_mask, RANK, BLOCK_R)
        up_b = b_ptr + width * 2 * RANK + RANK
        up_low = low_ptr + RANK
        up += _low_rank(up_low, 2 * RANK, up_b, 1, 2 * RANK, rows, row_mask, cols, col_mask, RANK, BLOCK_R)
        gate = gate.to(raw.dtype).to(tl.float32)
        up = up.to(raw.dtype).to(tl.float32)
    inner = gate
    if GELU:
        inner = _GELU_SCALE * (gate + _GELU_CUBE * gate * gate * gate)
    sigmoid = tl.sigmoid(inner)
    active = gate * sigmoid
    m_at = m_ptr + rows[:, None] * width + cols[None, :]
    if BACKWARD:
        grad = tl.load(m_at, mask=mask, other=0.0).to(tl.float32)
        if GRAD_RANK > 0:
            grad += _low_rank(
                grad_low_ptr, GRAD_RANK, a_ptr, width, 1, rows, row_mask, cols, col_mask, GRAD_RANK, BLOCK_GRAD_R
            )
            grad = grad.to(raw.dtype).to(tl.float32)
        slope = active * (1.0 - sigmoid)
        if GELU:
            slope = slope * _GELU_SCALE * (1.0 + 3.0 * _GELU_CUBE * gate * gate)
        tl.store(gate_at, (grad * up * (sigmoid + slope)).to(raw.dtype), mask=mask)
        tl.store(gate_at + width, (grad * active).to(raw.dtype), mask=mask)
    tl.store(m_at, (active.to(raw.dtype).to(tl.float32) * up).to(raw.dtype), mask=mask)


def swiglu(
    gate_up: torch.Tensor, low: torch.Tensor | None = None, b: torch.Tensor | None = None, *, gelu: bool = False
) -> torch.Tensor:
    """See `torch_ops.swiglu`."""
    product = torch.empty(gate_up.shape[0], gate_up.shape[1] // 2, dtype=gate_up.dtype, device=gate_up.device)
    _launch_swiglu(gate_up, product, low, b, None, None, backward=False, gelu=gelu)
    return product


def swiglu_backward_(
    gate_up: torch.Tensor, grad: torch.Tensor, low: torch.Tensor | None = None, b: torch.Tensor | None = None,
    grad_low: torch.Tensor | None = None, a: torch.Tensor | None = None, *, gelu: bool = False,
) -> None:  # fmt: skip
    """See `torch_ops.swiglu_backward_`."""
    _launch_swiglu(gate_up, grad, low, b, grad_low, a, backward=True, gelu=gelu)


def _launch_swiglu(
    gate_up: torch.Tensor, product: torch.Tensor, low: torch.Tensor | None, b: torch.Tensor | None,
    grad_low: torch.Tensor | None, a: torch.Tensor | None, *, backward: bool, gelu: bool,
) -> None:  # fmt: skip
    given = [x for x in (gate_up, product, low, b, grad_low, a) if x is not None]
    assert all(x.is_contiguous() for x in given), "swiglu works on contiguous buffers"
    height, width = product.shape
    if not height:
        return
    rank = 0 if low is None or b is None else low.shape[1] // 2
    grad_rank = 0 if grad_low is None or a is None else grad_low.shape[1]
    block_m, block_n, warps = SWIGLU_TILE
    # Where there is no adapter, any pointer does: it is not read.
    low, b, grad_low, a = (product if x is None else x for x in (low, b, grad_low, a))
    _swiglu_kernel[(triton.cdiv(height, block_m), triton.cdiv(width, block_n))](
        gate_up, product, low, b, grad_low, a, height, width, BACKWARD=backward, GELU=gelu, RANK=rank,
        GRAD_RANK=grad_rank, BLOCK_R=max(16, triton.next_power_of_2(rank)),
        BLOCK_GRAD_R=max(16, triton.next_power_of_2(grad_rank)), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps,
    )  # fmt: skip


# What begins in the middle of a row is aligned by chance: a second variant would be compiled in the middle of a run.
@triton.jit(do_not_specialize=["lse_head", "other_lse_head"], do_not_specialize_on_alignment=["lse_ptr"])
def _merge_kernel(
    out_ptr, out_token, lse_ptr, lse_head, other_ptr, other_token, other_lse_ptr, other_lse_head, heads,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    col = tl.arange(0, BLOCK_SIZE)
    there = head < heads
    mask = there[:, None] & (col < SIZE)[None, :]
    mine = tl.load(lse_ptr + head * lse_head + token, mask=there, other=0.0)
    theirs = tl.load(other_lse_ptr + head * other_lse_head + token, mask=there, other=0.0)
    top = tl.maximum(mine, theirs)
    merged = top + tl.log(tl.exp(mine - top) + tl.exp(theirs - top))
    at = out_ptr + token * out_token + head[:, None] * SIZE + col[None, :]
    a = tl.load(at, mask=mask, other=0.0)
    b = tl.load(other_ptr + token * other_token + head[:, None] * SIZE + col[None, :], mask=mask, other=0.0)
    value = a.to(tl.float32) * tl.exp(mine - merged)[:, None] + b.to(tl.float32) * tl.exp(theirs - merged)[:, None]
    tl.store(at, value.to(a.dtype), mask=mask)
    tl.store(lse_ptr + head * lse_head + token, merged, mask=there)


def merge_attention_(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> None:
    """See `torch_ops.merge_attention_`."""
    tokens, heads, size = out.shape
    if not tokens:
        return
    assert out.stride()[1:] == other.stride()[1:] == (size, 1), "heads must lie side by side"
    assert lse.stride(1) == other_lse.stride(1) == 1, "lse must be [heads, tokens]"
    block_heads = min(16, triton.next_power_of_2(heads))
    _merge_kernel[(tokens, triton.cdiv(heads, block_heads))](
        out, out.stride(0), lse, lse.stride(0), other, other.stride(0), other_lse, other_lse.stride(0), heads,
        SIZE=size, BLOCK_SIZE=triton.next_power_of_2(size), BLOCK_HEADS=block_heads, num_warps=2,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["target_ptr"])
def _logit_kernel(
    z_ptr, z_row, target_ptr, logp_ptr, entropy_ptr, vocab, inverse_temperature,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = z_ptr + row * z_row
    lanes = tl.arange(0, BLOCK)
    target = tl.load(target_ptr + row)
    target_logit = tl.load(base + target).to(tl.float32) * inverse_temperature
    top = target_logit
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, vocab, BLOCK):
        cols = start + lanes
        z = tl.load(base + cols, mask=cols < vocab, other=-float("inf")).to(tl.float32) * inverse_temperature
        new_top = tl.maximum(top, tl.max(z, axis=0))
        # As long as all logits were -inf, their difference would be NaN.
        safe = tl.where(new_top == -float("inf"), 0.0, new_top)
        shrink = tl.exp(top - safe)
        p = tl.exp(z - safe)
        total = total * shrink + p
        weighted = weighted * shrink + tl.where(p > 0.0, p * z, 0.0)
        top = new_top
    mass = tl.sum(total, axis=0)
    log_norm = top + tl.log(mass)
    tl.store(logp_ptr + row, target_logit - log_norm)
    tl.store(entropy_ptr + row, log_norm - tl.sum(weighted, axis=0) / mass)
    if GRADIENT:
        for start in range(0, vocab, BLOCK):
            cols = start + lanes
            raw = tl.load(base + cols, mask=cols < vocab, other=-float("inf"))
            p = tl.exp(raw.to(tl.float32) * inverse_temperature - log_norm)
            grad = (tl.where(cols == target, 1.0, 0.0) - p) * inverse_temperature
            tl.store(base + cols, grad.to(raw.dtype), mask=cols < vocab)


def logit_stats(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float, *, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `torch_ops.logit_stats`."""
    assert logits.stride(1) == 1, "a row of logits must lie side by side"
    rows, vocab = logits.shape
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    entropy = torch.empty_like(logprobs)
    if rows:
        _logit_kernel[(rows,)](
            logits, logits.stride(0), targets, logprobs, entropy, vocab, 1.0 / temperature, GRADIENT=gradient,
            BLOCK=min(_LOGIT_BLOCK, triton.next_power_of_2(vocab)), num_warps=8,
        )  # fmt: skip
    return logprobs, entropy
