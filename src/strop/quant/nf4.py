"""NF4 weights (Dettmers et al. 2023, arXiv 2305.14314, appendix E) as engine and trainer share them.

A weight [N, K] is cut along K into blocks of 64. A block keeps its largest magnitude, in fp16, and for each value the
nearest of 16 codes in 4 bits: 4.25 bits a weight. Two codes share a byte, and the two are 64 inputs apart:

    group g of 128 inputs = 64 bytes;  byte j = code[128 g + j] << 4 | code[128 g + 64 + j]

so that each half of a byte tile meets a contiguous run of inputs and one block's scale. bitsandbytes pairs neighbours;
`from_bitsandbytes` moves the halves, the codes stay the same. Rows are contiguous, so the parts of a fused layer are
row slices. The last group of a row is padded with zeros.

The weight in a dtype is round(code * absmax), with code and absmax rounded to the dtype before. The kernel that
multiplies and the one that unpacks do the same, so engine and trainer see one weight. In bf16 it is within 1.2 % of
bitsandbytes' (0.26 % of its norm), where the 4 bits themselves are off by 9.2 % of the norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK = 64
"""Inputs that share one scale."""
GROUP = 128
"""Inputs that share 64 bytes."""

CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution, scaled to [-1, 1]; zero is exact."""


@dataclass(frozen=True, slots=True)
class Nf4:
    """A quantised weight; both tensors may be views of larger ones."""

    packed: torch.Tensor
    """uint8 [N, 64 * groups]."""
    absmax: torch.Tensor
    """fp16 [N, 2 * groups]."""
    in_features: int
    """K; the last group is padded where K is no multiple of 128."""

    @property
    def out_features(self) -> int:
        """N."""
        return self.packed.shape[0]

    def rows(self, start: int, stop: int) -> Nf4:
        """Return a view of some rows."""
        return Nf4(self.packed[start:stop], self.absmax[start:stop], self.in_features)


def groups_of(in_features: int) -> int:
    """Return how many groups of 128 a row has, the last one padded."""
    return -(-in_features // GROUP)


def quantize(weight_NK: torch.Tensor) -> Nf4:
    """Quantise a weight on the device it lies on; the codes are those of bitsandbytes' `quantize_4bit` (nf4, 64)."""
    n, k = weight_NK.shape
    blocks = _padded(weight_NK.float()).view(n, -1, BLOCK)
    absmax = blocks.abs().amax(-1)
    scaled = blocks * torch.where(absmax > 0, 1.0 / absmax, 0.0)[..., None]
    edges = torch.tensor(CODES, dtype=torch.float64, device=weight_NK.device)
    edges = ((edges[1:] + edges[:-1]) / 2).float()
    return _pack(torch.bucketize(scaled, edges, out_int32=True).to(torch.uint8), absmax, k)


def gather(weight: Nf4, index: torch.Tensor) -> Nf4:
    """Return the rows of `index` [...] one after the other, flattened, still packed."""
    flat = index.reshape(-1)
    return Nf4(weight.packed[flat], weight.absmax[flat], weight.in_features)


def from_bitsandbytes(packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int]) -> Nf4:
    """Repack bitsandbytes' bytes (uint8, N * K / 2 of them, the first of two in the high half) and fp32 scales.

    Raises ValueError when a block reaches over the end of a row, or when there are too few or too many bytes or scales.
    """
    n, k = shape
    if k % BLOCK:
        raise ValueError(f"{k} inputs in blocks of {BLOCK} across rows; a multiple of {BLOCK} is needed")
    if packed.numel() * 2 != n * k or absmax.numel() * BLOCK != n * k:
        raise ValueError(f"{packed.numel()} bytes and {absmax.numel()} scales for a weight of shape {shape}")
    pairs = packed.reshape(-1, 1)
    codes = torch.cat([pairs >> 4, pairs & 15], dim=1).view(n, k)
    blocks = _padded(codes, CODES.index(0.0)).view(n, -1, BLOCK)
    return _pack(blocks, _padded(absmax.view(n, -1), multiple=2), k)


def _padded(rows: torch.Tensor, value: int = 0, *, multiple: int = GROUP) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % multiple), value=value)


def _pack(codes: torch.Tensor, absmax: torch.Tensor, in_features: int) -> Nf4:
    """Pack codes, uint8 [N, 2 * groups, 64] below 16, and scales [N, 2 * groups]."""
    packed = (codes[:, 0::2] << 4) | codes[:, 1::2]
    return Nf4(packed.flatten(1).contiguous(), absmax.to(torch.float16).contiguous(), in_features)


def dequantize(weight: Nf4, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight [N, K] in `dtype`, computed by torch's own operators."""
    n = weight.out_features
    table = torch.tensor(CODES, dtype=torch.float32, device=weight.packed.device).to(dtype)
    halves = torch.stack([weight.packed >> 4, weight.packed & 15], dim=1)  # [N, 2, 64 * groups]
    blocks = halves.view(n, 2, -1, BLOCK).transpose(1, 2).reshape(n, -1, BLOCK)
    values = table[blocks.int()] * weight.absmax.to(dtype)[..., None]
    return values.view(n, -1)[:, : weight.in_features]
