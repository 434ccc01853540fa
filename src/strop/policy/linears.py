"""Frozen linear layers with the same input, and their adapters, as one product forward and backward.

For q, k, v (or gate and up) of one input x, with W the weights stacked, A the adapters' A stacked and B their scaled B
on the diagonal of a block matrix:

    y = x W^T + b + (x A^T) B^T          x [T, in]   A [sum R, in]   B [sum out, sum R]

Backward, from dy [T, sum out]:   dA = (dy B)^T x    dB = dy^T (x A^T)    dx = dy W + (dy B) A

so that a layer saves x and x A^T alone, and q, k, v take as few kernels as one layer would. A weight that is trained
itself gets dW = dy^T x. Where the engine keeps the stacked weight in one tensor, as vLLM does, it is used as it lies.
"""

# The multi-tensor functions are torch's own and have no public name.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from .lora import LoraLinear

Grads = list[torch.Tensor | None]
MAX_FUSED_RANK = 64
"""Above it the adapters' products are worth a kernel of their own."""


class Linears:
    """The layers of one input. Works below autograd: `fused.py` calls it inside its functions."""

    def __init__(self, members: Sequence[torch.nn.Module]) -> None:
        self.adapters = [m if isinstance(m, LoraLinear) else None for m in members]
        self.bases = [m.base if isinstance(m, LoraLinear) else m for m in members]
        self.sizes = [int(base.out_features) for base in self.bases]  # type: ignore[arg-type]
        self.parameters: list[torch.nn.Parameter] = []
        for adapter, base in zip(self.adapters, self.bases, strict=True):
            self.parameters += [adapter.lora_A, adapter.lora_B] if adapter else []
            self.parameters += [p for p in base.parameters() if p.requires_grad]
        self._stacked = self._find_stacked()
        self._bias = _cat_or_none([getattr(base, "bias", None) for base in self.bases])
        self._ranks = [a.lora_A.shape[0] if a else 0 for a in self.adapters]
        self._blocks = self._find_blocks()
        self._a: torch.Tensor | None = None
        self._b: torch.Tensor | None = None

    def _find_stacked(self) -> torch.Tensor | None:
        """Return the members' weights as one tensor where they lie one after the other and are frozen."""
        if any(not isinstance(b, torch.nn.Linear) or b.weight.requires_grad for b in self.bases):
            return None  # a trained weight may be swapped for the reference's
        weights = [b.weight.detach() for b in self.bases if isinstance(b, torch.nn.Linear)]
        if len({getattr(b, "bias", None) is None for b in self.bases}) > 1:
            return None
        first = weights[0]
        after = first.data_ptr()
        for w in weights:
            if not w.is_contiguous() or w.data_ptr() != after or w.dtype != first.dtype:
                return None
            after += w.numel() * w.element_size()
        rows = sum(self.sizes)
        if (first.storage_offset() + rows * first.shape[1]) * first.element_size() > first.untyped_storage().nbytes():
            return None  # neighbours by chance, of two storages
        return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))

    @property
    def enabled(self) -> bool:
        """Whether any adapter takes part."""
        return any(a is not None and a.enabled for a in self.adapters)

    def factors(self, dtype: torch.dtype) -> list[tuple[LoraLinear, torch.Tensor, torch.Tensor]]:
        """Return each adapter with the places of A and of the scaled B in the factors that the products use."""
        present = [a for a in self.adapters if a is not None]
        if not present:
            return []
        if self._a is None or self._b is None or self._a.dtype != dtype:
            like = present[0].lora_A.detach()
            self._a = like.new_zeros(sum(self._ranks), like.shape[1], dtype=dtype)
            self._b = like.new_zeros(sum(self.sizes), sum(self._ranks), dtype=dtype)
        a, b = self._a, self._b
        return [(adapter, a[cols], b[rows, cols]) for adapter, rows, cols in self._blocks]

    def _find_blocks(self) -> list[tuple[LoraLinear, slice, slice]]:
        """Return each adapter with its rows of y and its columns of x A^T."""
        found, row, col = [], 0, 0
        for adapter, size, rank in zip(self.adapters, self.sizes, self._ranks, strict=True):
            if adapter is not None:
                found.append((adapter, slice(row, row + size), slice(col, col + rank)))
            row, col = row + size, col + rank
        return found

    def pair(self) -> torch.Tensor | None:
        """Return B [sum out, 2 R] of two layers with adapters of one rank that is low enough to be added on the way."""
        a, b = self._ranks if len(self._ranks) == 2 else (0, -1)
        return self._b if self.enabled and a == b and a <= MAX_FUSED_RANK else None

    def single(self) -> torch.Tensor | None:
        """Return A [R, in] of one layer with an adapter of a rank that is low enough to be added on the way."""
        return self._a if self.enabled and len(self._ranks) == 1 and self._ranks[0] <= MAX_FUSED_RANK else None

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, *, add_adapters: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[T, in] -> ([T, sum out], x A^T or None); `residual` is added to the result of a single layer.

        Without `add_adapters` their part is left to the caller: y lacks (x A^T) B^T.
        """
        if self._stacked is not None:
            y = _product(x, self._stacked, self._bias, residual)
        elif len(self.bases) == 1:
            y = _product(x, _weight(self.bases[0]), getattr(self.bases[0], "bias", None), residual)
        else:
            y = x.new_empty(x.shape[0], sum(self.sizes))
            for part, base in zip(y.split(self.sizes, dim=1), self.bases, strict=True):
                bias, weight = getattr(base, "bias", None), _weight(base)
                if bias is None:
                    torch.mm(x, weight.t(), out=part)
                else:
                    torch.addmm(bias, x, weight.t(), out=part)
        if not self.enabled:
            return y, None
        assert self._a is not None, "the adapters' factors were not refreshed"
        assert self._b is not None, "the adapters' factors were not refreshed"
        low = x @ self._a.t()
        return (y.addmm_(low, self._b.t()) if add_adapters else y), low

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, low: torch.Tensor | None, *, need_input: bool = True
    ) -> tuple[torch.Tensor | None, Grads]:
        """Return (gradient of x, gradients of `parameters` in their order) from dy [T, sum out]."""
        grad_low = self.low_gradient(grad, low)
        grads = self.parameter_gradients(grad, x, low, grad_low)
        return (self.input_gradient(grad, grad_low) if need_input else None), grads

    def low_gradient(self, grad: torch.Tensor, low: torch.Tensor | None) -> torch.Tensor | None:
        """Return dy B [T, sum R], which both gradients below need; None without an adapter."""
        return None if low is None or self._b is None else grad @ self._b

    def parameter_gradients(
        self, grad: torch.Tensor, x: torch.Tensor, low: torch.Tensor | None, grad_low: torch.Tensor | None
    ) -> Grads:
        """Return the gradients of `parameters` in their order; A and B get theirs in fp32."""
        grad_a = grad_b = None
        if low is not None and grad_low is not None:
            grad_a = _product_fp32(grad_low.t(), x)
            # B's factor is its master times the scale.
            grad_b = _product_fp32(grad.t(), low).mul_(self._blocks[0][0].scale)
        grads: Grads = []
        row = col = 0
        for adapter, base, size, rank in zip(self.adapters, self.bases, self.sizes, self._ranks, strict=True):
            rows, cols = slice(row, row + size), slice(col, col + rank)
            if adapter is not None:
                grads += [None, None] if grad_a is None or grad_b is None else [grad_a[cols], grad_b[rows, cols]]
            for p in base.parameters():
                if p.requires_grad:
                    grads.append(grad[:, rows].t() @ x if p.ndim == 2 else grad[:, rows].sum(0))
            row, col = row + size, col + rank
        return grads

    def input_gradient(self, grad: torch.Tensor, grad_low: torch.Tensor | None) -> torch.Tensor:
        """Return the gradient of x [T, in]."""
        if self._stacked is not None:
            dx = grad @ self._stacked
        else:
            parts = grad.split(self.sizes, dim=1)
            dx = parts[0] @ _weight(self.bases[0])
            for part, base in zip(parts[1:], self.bases[1:], strict=True):
                dx.addmm_(part, _weight(base))
        if grad_low is not None and self._a is not None:
            dx.addmm_(grad_low, self._a)
        return dx


def _weight(base: torch.nn.Module) -> torch.Tensor:
    """Return a layer's weight [out, in]; a packed one is unpacked for this product only."""
    if isinstance(base, torch.nn.Linear):
        return base.weight.detach()
    return base.dequantized()  # type: ignore[operator, no-any-return]


def _product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> torch.Tensor:
    if residual is None:
        return torch.nn.functional.linear(x, weight, bias)
    # The residual is added before the sum is rounded.
    y = torch.addmm(residual, x, weight.t())
    return y if bias is None else y.add_(bias)


def _product_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b in fp32, without rounding to 16 bits in between where torch can do that."""
    if a.dtype != torch.float32 and _widens(a.device, a.dtype):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).float()


@functools.cache
def _widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of 16-bit matrices can be had in fp32: on CUDA, since torch 2.8."""
    if device.type != "cuda":
        return False
    try:
        one = torch.ones(16, 16, device=device, dtype=dtype)
        return torch.mm(one, one, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError):
        return False


def _cat_or_none(biases: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Return the biases of stacked, frozen layers as one."""
    present = [b for b in biases if b is not None]
    if len(present) != len(biases):
        return None
    return torch.cat([b.detach() for b in present])


class Factors:
    """Rounds the masters of all adapters into the factors of the products, to the values that `LoraLinear` uses."""

    def __init__(self, groups: Sequence[Linears], dtype: torch.dtype) -> None:
        places = [place for linears in groups for place in linears.factors(dtype)]
        self._scale = places[0][0].scale if places else 1.0
        self._masters: tuple[list[torch.Tensor], list[torch.Tensor]]
        self._masters = [adapter.lora_A for adapter, _, _ in places], [adapter.lora_B for adapter, _, _ in places]
        self._rounded = [a for _, a, _ in places], [b for _, _, b in places]

    @torch.no_grad()
    def refresh(self) -> None:
        """To be called at the start of each pass: whatever changed a master, a step or a reference, then shows."""
        if self._masters[0]:
            torch._foreach_copy_(self._rounded[0], self._masters[0])
            torch._foreach_copy_(self._rounded[1], list(torch._foreach_mul(self._masters[1], self._scale)))
