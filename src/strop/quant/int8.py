"""Weights in 8 bits with one scale a row, for the output head and the input embedding.

    W[v, :] = q[v, :] * scale[v]        q int8 in -127..127        scale[v] = max |W[v, :]| / 127, fp32

A product needs the scale only once per output: logits[t, v] = (h[t] . q[v]) * scale[v]. The integers are exact in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PIECE_ROWS = 8192
"""Rows turned into 16 bits at a time by a product."""


@dataclass(frozen=True, slots=True)
class Int8:
    """A quantised weight; both tensors may be views of larger ones."""

    values: torch.Tensor
    """int8 [N, K]."""
    scale: torch.Tensor
    """fp32 [N]."""

    def rows(self, start: int, stop: int) -> Int8:
        """Return a view of some rows."""
        return Int8(self.values[start:stop], self.scale[start:stop])


def quantize(weight_NK: torch.Tensor) -> Int8:
    """Round each row to the nearest of 255 values."""
    wide = weight_NK.float()
    scale = wide.abs().amax(-1) / 127
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    return Int8((wide * inverse[:, None]).round_().to(torch.int8), scale)


def dequantize(weight: Int8, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight [N, K] in `dtype`."""
    return (weight.values.float() * weight.scale[:, None]).to(dtype)


def gather(weight: Int8, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the rows of `index` [...], as [..., K] in `dtype`: an embedding."""
    return (weight.values[index].float() * weight.scale[index][..., None]).to(dtype)


def matmul(x_MK: torch.Tensor, weight: Int8, out: torch.Tensor) -> None:
    """Write x @ W^T, [M, N], to `out`; the weight is never whole in 16 bit."""
    n = weight.values.shape[0]
    for start in range(0, n, PIECE_ROWS):
        part = weight.rows(start, start + PIECE_ROWS)
        torch.mm(x_MK, dequantize(part, x_MK.dtype).t(), out=out[:, start : start + PIECE_ROWS])


def input_gradient(grad_MN: torch.Tensor, weight: Int8, out: torch.Tensor) -> torch.Tensor:
    """Write grad @ W, [M, K], to `out` and return it; summed in fp32."""
    n = weight.values.shape[0]
    wide = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for start in range(0, n, PIECE_ROWS):
        part = weight.rows(start, start + PIECE_ROWS)
        # The integers are exact in 16 bits, so only the scaled gradient is rounded.
        scaled = (grad_MN[:, start : start + PIECE_ROWS] * part.scale).to(grad_MN.dtype)
        wide += scaled @ part.values.to(grad_MN.dtype)
    return out.copy_(wide)
