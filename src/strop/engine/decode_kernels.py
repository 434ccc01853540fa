"""What a Llama-like layer does between its products while decoding, as three Triton kernels.

    add_norm         residual += y + (x A^T) B^T,  then an RMS norm of the residual
    add_silu_mul     silu(gate) * up,  both with their part of (x A^T) B^T added
    add_rope_cache   q, k, v with their part added, head norms, rotary positions, k and v into the paged KV cache

Each reads what a product wrote and writes what the next one reads, so that a layer takes four products, attention and
four of these. Sums are in fp32 and rounded to the model's dtype where the trainer's blocks round (`policy/fused.py`):
the product, the sum with the adapter's part, the residual, the normalised value before its weight, silu, the rotated.

Written for the few rows of a decode step: launches and latency decide, not bytes. No atomics: results have one order.
"""

# pyright: reportMissingParameterType=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

SILU_TILE = (16, 64, 4)
"""Rows, columns and warps of a program of `add_silu_mul`."""
ROPE_TILE = (16, 4)
"""Rows and warps of a program of `add_rope_cache`; it has one head."""
NORM_VALUES = 2
"""Values of a row that a thread of `add_norm` holds."""
MAX_FUSED_RANK = 64
"""Above it cuBLAS multiplies by B faster than these kernels, which read B again for every row or tile."""
_RANK_BLOCK = 64


class Product(NamedTuple):
    """The result of a linear layer whose bias and adapter are still to be added."""

    y: torch.Tensor
    """[T, >= N] with any row stride: x W^T in the first N columns."""
    low: torch.Tensor | None
    """[T, parts * R] with any row stride: x A^T; None without an adapter or with its part in `y` already."""
    b_t: torch.Tensor | None
    """[parts * R, N] contiguous, block-diagonal: block i of R rows belongs to part i."""
    bias: torch.Tensor | None = None
    """[N] contiguous."""

    def rank(self, parts: int) -> int:
        """Return R; 0 when there is nothing to add."""
        return 0 if self.low is None else self.low.shape[1] // parts


class Rotary(NamedTuple):
    """How q and k are normalised and rotated."""

    cos_sin: torch.Tensor
    """[positions, D] contiguous: cosines of the D / 2 frequencies, then sines."""
    q_norm: torch.Tensor | None = None
    """[D]: the head norms' weights; both or neither."""
    k_norm: torch.Tensor | None = None
    eps: float = 0.0


@triton.jit
def _add_norm_kernel(
    y, y_stride, bias, low, low_stride, b, residual, weight, out, width, eps,
    ADD: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    at = row * width + cols
    x = tl.load(residual + at, mask=inside, other=0.0)
    if ADD:
        added = tl.load(y + row * y_stride + cols, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            added += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
        for start in range(0, RANK, UNROLL):
            for i in tl.static_range(UNROLL):
                factor = tl.load(low + row * low_stride + start + i).to(tl.float32)
                added += factor * tl.load(b + (start + i) * width + cols, mask=inside, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) + added.to(x.dtype).to(tl.float32)).to(x.dtype)
        tl.store(residual + at, x, mask=inside)
    wide = x.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / width + eps)
    normed = (wide * rstd).to(x.dtype).to(tl.float32)
    w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (normed * w).to(x.dtype), mask=inside)


def add_norm(
    product: Product | None, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, warps: int | None = None
) -> torch.Tensor:
    """Add a product to `residual` [T, N] in place and return rms_norm(residual) * weight [T, N].

    Without a product the residual is only normalised. `weight` is [N] in the residual's dtype.
    """
    rows, width = residual.shape
    assert residual.is_contiguous(), "the residual is written in place, row after row"
    out = torch.empty_like(residual)
    block = triton.next_power_of_2(width)
    rank = 0 if product is None else product.rank(1)
    y = residual if product is None else product.y
    _check(product)
    _add_norm_kernel[(rows,)](
        y, y.stride(0), *_pointers(product, residual), residual, weight, out, width, eps,
        ADD=product is not None, BIAS=product is not None and product.bias is not None, RANK=rank,
        UNROLL=math.gcd(rank, 16) or 1, BLOCK=block,
        num_warps=warps or min(16, max(1, block // (32 * NORM_VALUES))),
    )  # fmt: skip
    return out


@triton.jit
def _summed(
    y, y_stride, bias, low, low_stride, b, b_stride, rows, row_mask, cols, col_mask,
    BIAS: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Return y + bias + low B^T of a tile, in fp32 and rounded once to y's dtype."""
    raw = tl.load(y + rows[:, None] * y_stride + cols[None, :], mask=row_mask[:, None] & col_mask[None, :], other=0.0)
    total = raw.to(tl.float32)
    if BIAS:
        total += tl.load(bias + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    for start in tl.static_range(0, RANK, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        left = tl.load(
            low + rows[:, None] * low_stride + r[None, :], mask=row_mask[:, None] & (r < RANK)[None, :], other=0.0
        )
        right = tl.load(
            b + r[:, None] * b_stride + cols[None, :], mask=(r < RANK)[:, None] & col_mask[None, :], other=0.0
        )
        total += tl.dot(left, right, input_precision="ieee")
    return total.to(raw.dtype)


# The number of rows differs from graph to graph: it must not be compiled for.
@triton.jit(do_not_specialize=["height"])
def _add_silu_mul_kernel(
    y, y_stride, bias, low, low_stride, b, out, height, width,
    BIAS: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col_mask = cols < width
    row_mask = rows < height
    raw = _summed(y, y_stride, bias, low, low_stride, b, 2 * width, rows, row_mask, cols, col_mask, BIAS, RANK, BLOCK_R)
    up = _summed(
        y + width, y_stride, bias + width, low + RANK, low_stride, b + (RANK * 2 + 1) * width, 2 * width,
        rows, row_mask, cols, col_mask, BIAS, RANK, BLOCK_R,
    )  # fmt: skip
    gate = raw.to(tl.float32)
    active = (gate * tl.sigmoid(gate)).to(raw.dtype).to(tl.float32)
    at = out + rows[:, None] * width + cols[None, :]
    tl.store(at, (active * up.to(tl.float32)).to(raw.dtype), mask=row_mask[:, None] & col_mask[None, :])


def add_silu_mul(product: Product, width: int, *, tile: tuple[int, int, int] | None = None) -> torch.Tensor:
    """Return silu(gate) * up [T, width] of a product whose N columns are gate and up, `width` each."""
    rows, columns, warps = tile or SILU_TILE
    y, rank = product.y, product.rank(2)
    _check(product)
    out = y.new_empty(y.shape[0], width)
    _add_silu_mul_kernel[(triton.cdiv(width, columns), triton.cdiv(y.shape[0], rows))](
        y, y.stride(0), *_pointers(product, y), out, y.shape[0], width,
        BIAS=product.bias is not None, RANK=rank, BLOCK_R=_rank_block(rank), BLOCK_M=rows, BLOCK_N=columns,
        num_warps=warps,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["height"])
def _add_rope_cache_kernel(
    y, y_stride, bias, low, low_stride, b, q_norm, k_norm, eps, cos_sin, positions, slots,
    cache, block_stride, head_stride, token_stride, out, height,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    rows = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < height
    half = tl.arange(0, BLOCK_HALF)
    half_mask = half < HALF
    width = (HEADS + 2 * KV_HEADS) * 2 * HALF
    # 0: a head of q, 1: of k, 2: of v.
    part = (head >= HEADS).to(tl.int32) + (head >= HEADS + KV_HEADS).to(tl.int32)
    left = head * 2 * HALF + half
    low += part * RANK
    b += part * RANK * width
    first = _summed(y, y_stride, bias, low, low_stride, b, width, rows, row_mask, left, half_mask, BIAS, RANK, BLOCK_R)
    second = _summed(
        y, y_stride, bias, low, low_stride, b, width, rows, row_mask, left + HALF, half_mask, BIAS, RANK, BLOCK_R
    )
    if part < 2:
        a = first.to(tl.float32)
        c = second.to(tl.float32)
        if NORM:
            if part == 0:
                w1 = tl.load(q_norm + half, mask=half_mask, other=0.0).to(tl.float32)
                w2 = tl.load(q_norm + HALF + half, mask=half_mask, other=0.0).to(tl.float32)
            else:
                w1 = tl.load(k_norm + half, mask=half_mask, other=0.0).to(tl.float32)
                w2 = tl.load(k_norm + HALF + half, mask=half_mask, other=0.0).to(tl.float32)
            rstd = (1.0 / tl.sqrt((tl.sum(a * a, axis=1) + tl.sum(c * c, axis=1)) / (2 * HALF) + eps))[:, None]
            a = ((a * rstd).to(y.dtype.element_ty).to(tl.float32) * w1[None, :]).to(y.dtype.element_ty).to(tl.float32)
            c = ((c * rstd).to(y.dtype.element_ty).to(tl.float32) * w2[None, :]).to(y.dtype.element_ty).to(tl.float32)
        place = tl.load(positions + rows, mask=row_mask, other=0).to(tl.int64)
        turn = cos_sin + place[:, None] * 2 * HALF + half[None, :]
        both = row_mask[:, None] & half_mask[None, :]
        cos = tl.load(turn, mask=both, other=0.0).to(tl.float32)
        sin = tl.load(turn + HALF, mask=both, other=0.0).to(tl.float32)
        first = (a * cos - c * sin).to(y.dtype.element_ty)
        second = (c * cos + a * sin).to(y.dtype.element_ty)
    if part == 0:
        at = out + rows[:, None] * (HEADS * 2 * HALF) + left[None, :]
        keep = row_mask[:, None] & half_mask[None, :]
        tl.store(at, first, mask=keep)
        tl.store(at + HALF, second, mask=keep)
    else:
        slot = tl.load(slots + rows, mask=row_mask, other=-1).to(tl.int64)
        index = head - HEADS - (part - 1) * KV_HEADS
        token = slot // BLOCK_TOKENS * block_stride + slot % BLOCK_TOKENS * token_stride
        at = cache + token[:, None] + index * head_stride + (part - 1) * 2 * HALF + half[None, :]
        keep = (slot >= 0)[:, None] & half_mask[None, :]
        tl.store(at, first, mask=keep)
        tl.store(at + HALF, second, mask=keep)


def add_rope_cache(
    product: Product, heads: int, rotary: Rotary, positions: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor,
    *, tile: tuple[int, int] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Finish q, k and v of a product with N = (heads + 2 kv heads) D columns; return q [T, heads, D].

    `cache` [blocks, kv heads, tokens of a block, 2 D] with any strides but the last is vLLM's paged KV cache of one
    layer, keys before values. Row t goes to slot `slots[t]` (block * tokens + place), nowhere where that is negative.
    `positions` and `slots` are [T], of any integer dtype. Rotation is that of halves (GPT-NeoX) over all of a head.
    """
    rows, warps = tile or ROPE_TILE
    y, rank = product.y, product.rank(3)
    kv_heads, tokens, size = cache.shape[1], cache.shape[2], cache.shape[3] // 2
    _check(product)
    assert cache.stride(3) == 1, "a token's keys and values must lie side by side"
    assert rotary.cos_sin.is_contiguous(), "the rotary table is read by position"
    assert rotary.cos_sin.shape[1] == size, "all of a head must be rotated"
    has_norms = rotary.q_norm is not None and rotary.k_norm is not None
    out = y.new_empty(y.shape[0], heads, size)
    _add_rope_cache_kernel[(heads + 2 * kv_heads, triton.cdiv(y.shape[0], rows))](
        y, y.stride(0), *_pointers(product, y), rotary.q_norm if has_norms else y,
        rotary.k_norm if has_norms else y, rotary.eps, rotary.cos_sin, positions, slots,
        cache, cache.stride(0), cache.stride(1), cache.stride(2), out, y.shape[0],
        HEADS=heads, KV_HEADS=kv_heads, HALF=size // 2, BLOCK_HALF=triton.next_power_of_2(size // 2),
        BLOCK_TOKENS=tokens, NORM=has_norms, BIAS=product.bias is not None, RANK=rank, BLOCK_R=_rank_block(rank),
        BLOCK_M=rows, num_warps=warps,
    )  # fmt: skip
    return out


def _rank_block(rank: int) -> int:
    """Return how many rows of B^T a product takes at a time: at least what the card's matrix units take."""
    return min(_RANK_BLOCK, max(16, triton.next_power_of_2(rank)))


def _check(product: Product | None) -> None:
    if product is None:
        return
    tensors = (product.y, product.low)
    assert all(t is None or t.stride(1) == 1 for t in tensors), "a row's values must lie side by side"
    assert product.b_t is None or product.b_t.is_contiguous(), "B is read row by row"


def _pointers(product: Product | None, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Return (bias, low, its row stride, B); `other` in the place of what there is not, which is never read."""
    if product is None:
        return other, other, 0, other
    bias = product.bias if product.bias is not None else other
    if product.low is None or product.b_t is None:
        return bias, other, 0, other
    return bias, product.low, product.low.stride(0), product.b_t
