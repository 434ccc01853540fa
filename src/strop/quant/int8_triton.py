"""A Triton kernel for products with rows of 8 bits.

y[M, N] = (x[M, K] @ q[N, K]^T) * scale[N]      fp32 accumulation, scaled once at the end
"""

# pyright: reportMissingParameterType=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .int8 import Int8


@triton.jit(do_not_specialize=["M"])
def _matmul_kernel(x_ptr, q_ptr, scale_ptr, y_ptr, M, N, K, stride_x, BM: tl.constexpr, BN: tl.constexpr,
                   BK: tl.constexpr, EVEN_K: tl.constexpr):  # fmt: skip
    # Tokens first: programs that share rows run together, so the weight passes the cache once.
    tile_m, tile_n = tl.program_id(0), tl.program_id(1)
    rows = tile_n * BN + tl.arange(0, BN)
    tokens = tile_m * BM + tl.arange(0, BM)
    row_ok, token_ok = rows < N, tokens < M
    inner = tl.arange(0, BK)
    q_ptrs = q_ptr + rows.to(tl.int64)[:, None] * K + inner[None, :]
    x_ptrs = x_ptr + tokens[:, None] * stride_x + inner[None, :]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for k in tl.range(0, K, BK, num_stages=4):
        if EVEN_K:
            q = tl.load(q_ptrs + k, mask=row_ok[:, None], other=0)
            x = tl.load(x_ptrs + k, mask=token_ok[:, None], other=0.0)
        else:
            ok = k + inner < K
            q = tl.load(q_ptrs + k, mask=row_ok[:, None] & ok[None, :], other=0)
            x = tl.load(x_ptrs + k, mask=token_ok[:, None] & ok[None, :], other=0.0)
        acc = tl.dot(q.to(x_ptr.dtype.element_ty), tl.trans(x), acc)
    acc *= tl.load(scale_ptr + rows, mask=row_ok, other=0.0)[:, None]
    y_ptrs = y_ptr + tokens[None, :].to(tl.int64) * N + rows[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=row_ok[:, None] & token_ok[None, :])


def matmul(x_MK: torch.Tensor, weight: Int8, out: torch.Tensor) -> None:
    """Write x @ W^T, [M, N] in x's dtype (bf16 or fp16), to `out`, which is contiguous."""
    m, k = x_MK.shape
    n = weight.values.shape[0]
    bm = 16 if m <= 16 else 64 if m <= 64 else 128
    grid = (triton.cdiv(m, bm), triton.cdiv(n, 128))
    _matmul_kernel[grid](
        x_MK, weight.values, weight.scale, out, m, n, k, x_MK.stride(0), BM=bm, BN=128, BK=64, EVEN_K=k % 64 == 0,
        num_warps=8 if bm == 128 else 4,
    )  # fmt: skip
