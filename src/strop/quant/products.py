"""Products with a quantised weight, by the fastest way the device has."""

from __future__ import annotations

import torch

from . import int8, nf4

FUSED_TOKENS = 128
"""Up to this many tokens the kernel that reads 4-bit weights directly is faster than unpacking them first."""
PIECE = 72 << 20
"""Values unpacked at a time: a gate or up projection of a 7B model whole, a fused one of them in two pieces."""


def linear(x: torch.Tensor, weight: nf4.Nf4, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x @ W^T + bias, [..., N] from [..., K]; without autograd (`policy.nf4` has the gradient)."""
    flat = x.reshape(-1, weight.in_features)
    if has_kernels(x) and flat.shape[0] <= FUSED_TOKENS:
        from . import nf4_triton

        y = nf4_triton.matmul(flat, weight, bias)
    else:
        y = _unpacked(flat, weight, bias)
    return y.view(*x.shape[:-1], weight.out_features)


def _unpacked(x: torch.Tensor, weight: nf4.Nf4, bias: torch.Tensor | None) -> torch.Tensor:
    """Unpack each row of the weight once and leave the product to the device's library."""
    rows = max(1, PIECE // weight.in_features)
    if weight.out_features <= rows:
        return torch.nn.functional.linear(x, dequantized(weight, x.dtype), bias)
    y = x.new_empty(x.shape[0], weight.out_features)
    for start in range(0, weight.out_features, rows):
        part = weight.rows(start, start + rows)
        out = y[:, start : start + rows]
        torch.mm(x, dequantized(part, x.dtype).t(), out=out)
        if bias is not None:
            out += bias[start : start + rows]
    return y


def input_gradient(grad: torch.Tensor, weight: nf4.Nf4) -> torch.Tensor:
    """Return grad @ W, [..., K] from [..., N]."""
    flat = grad.reshape(-1, weight.out_features)
    rows = max(1, PIECE // weight.in_features)
    dx = flat[:, :rows] @ dequantized(weight.rows(0, rows), grad.dtype)
    for start in range(rows, weight.out_features, rows):
        part = weight.rows(start, start + rows)
        dx.addmm_(flat[:, start : start + rows], dequantized(part, grad.dtype))
    return dx.view(*grad.shape[:-1], weight.in_features)


def dequantized(weight: nf4.Nf4, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight [N, K] in `dtype`, a new tensor."""
    if weight.packed.is_cuda and dtype != torch.float32:
        from . import nf4_triton

        return nf4_triton.dequantize(weight, dtype)
    return nf4.dequantize(weight, dtype)


def embedded(weight: nf4.Nf4, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the rows of `index` [...], as [..., K] in `dtype`: an embedding in 4 bits."""
    return dequantized(nf4.gather(weight, index), dtype).view(*index.shape, weight.in_features)


def has_kernels(x: torch.Tensor) -> bool:
    """Whether products with `x` can use the Triton kernels."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


_PREPARED: set[tuple[int, int, torch.dtype, bool]] = set()


def prepare(weight: nf4.Nf4, dtype: torch.dtype, bias: torch.Tensor | None, most: int) -> None:
    """Compile the kernels for a weight's shape and up to `most` tokens, and allocate what they keep.

    Neither can be done inside a CUDA graph.
    """
    key = (weight.out_features, weight.in_features, dtype, bias is not None)
    if key in _PREPARED or not weight.packed.is_cuda or dtype == torch.float32:
        return
    _PREPARED.add(key)
    steps = (16, 32, 64, FUSED_TOKENS, FUSED_TOKENS + 1)
    # One step more than fits, since `most` lies inside it.
    for tokens in steps[: 1 + sum(step < most for step in steps)]:
        linear(torch.zeros(tokens, weight.in_features, dtype=dtype, device=weight.packed.device), weight, bias)


def linear_int8(x: torch.Tensor, weight: int8.Int8, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return x @ W^T, [..., N] from [..., K], without autograd; written to `out` [rows, N] where it is given."""
    flat = x.reshape(-1, x.shape[-1])
    y = flat.new_empty(flat.shape[0], weight.values.shape[0]) if out is None else out
    if has_kernels(x):
        from . import int8_triton

        int8_triton.matmul(flat, weight, y)
    else:
        int8.matmul(flat, weight, y)
    return y.view(*x.shape[:-1], -1)
