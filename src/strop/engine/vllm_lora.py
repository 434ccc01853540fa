"""LoRA in the engine as two matrix products per layer, or as a part of the layer's own.

vLLM keeps several adapters and looks each token's up: on a card with kernels of its own, about twelve launches a layer,
while launches are what bounds a small model; on a CPU by gathering a copy of the adapter for every token. Here there is
one adapter, it is always on, and all parts of a fused layer (q, k, v; gate, up) are multiplied at once:

    y += (x A^T) B^T      A [parts * R, in] stacked, B [out, parts * R] block-diagonal

The product with A is rounded to the model's dtype before the one with B, as in vLLM's kernels and in the trainer.

On a card a 16-bit weight is moved into one tensor with A below it, [out + parts * R, in], so that one product gives
x W^T and x A^T side by side (`vllm_decode.py`). The layer's weight is the first rows of that tensor, and nothing is
held twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import EngineError
from ..quant import products
from ..quant.nf4 import Nf4

ALIGNED = 8
"""Values in 16 bytes: rows of a product begin where kernels and cuBLAS read them fastest."""
_HELD_BACK = 64 << 20
"""Freed bytes that torch's allocator may keep while weights are moved, before they go back to the card."""


@dataclass(frozen=True, slots=True)
class Factors:
    """A layer's adapter as it is multiplied; vLLM's slots and the trainer's are views of it."""

    a: torch.Tensor
    """[parts * R, in]"""
    b_t: torch.Tensor
    """[parts * R, out], row block i only in the columns of part i."""
    ranks: tuple[int, ...]
    """R of each part."""
    stacked: torch.Tensor | None
    """[out + parts * R + padding, in]: the base weight, then `a`, then zeros; None where the weight lies elsewhere."""


def combine(module: Any, *, with_base: bool) -> int:
    """Move the only adapter slot of a wrapped layer into stacked storage; its tensors become views of that.

    Whoever writes into the slot, vLLM or the trainer, writes into what is multiplied. `with_base` moves the base weight
    [out, in] too: the parameter stays the same object, its data becomes a view. Returns the bytes freed.
    """
    parts_a, parts_b = module.lora_a_stacked, module.lora_b_stacked
    if any(t.shape[0] != 1 for t in parts_a):
        raise EngineError(f"vLLM holds {parts_a[0].shape[0]} adapter slots, one is needed to share it with the trainer")
    ranks, sizes = [a.shape[2] for a in parts_a], [b.shape[2] for b in parts_b]
    rows, width = sum(ranks), parts_a[0].shape[3]
    stacked, freed = None, 0
    if with_base:
        weight = module.base_layer.weight
        base = weight.data
        outs = base.shape[0]
        stacked = base.new_zeros(outs + rows + -(outs + rows) % ALIGNED, width)
        stacked[:outs].copy_(base)
        weight.data, freed = stacked[:outs], base.nbytes
        a = stacked[outs : outs + rows]
    else:
        a = parts_a[0].new_zeros(rows, width)
    b_t = parts_b[0].new_zeros(rows, sum(sizes))
    module.lora_a_stacked = tuple(part[None, None] for part in a.split(ranks))
    row, column, views = 0, 0, []
    for rank, size in zip(ranks, sizes, strict=True):
        views.append(b_t[row : row + rank, column : column + size].t()[None, None])
        row, column = row + rank, column + size
    module.lora_b_stacked = tuple(views)
    module.strop_factors = Factors(a, b_t, tuple(ranks), stacked)
    return freed


def combine_all(model_runner: Any) -> None:
    """Do so for every adapted layer, and let them use it. Raises EngineError when vLLM's layers have changed."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    if not hasattr(BaseLinearLayerWithLoRA, "_apply_lora_to_output"):
        raise EngineError(
            "vLLM's BaseLinearLayerWithLoRA has no _apply_lora_to_output, which Strop has to change",
            hint="install the tested pair of vLLM and torch; `strop doctor` names it",
        )
    freed = 0
    for name, module in _modules(model_runner).items():
        if not isinstance(module, BaseLinearLayerWithLoRA):
            raise EngineError(
                f"vLLM has an adapter on `{name}`, a {type(module).__name__}; only linear layers can have one",
                hint="lora.target_modules: leave it out",
            )
        freed += combine(module, with_base=_is_plain_on_card(module))
        if freed > _HELD_BACK:
            # What a layer leaves is a little too small for the next one, so it would only add up.
            torch.cuda.empty_cache()
            freed = 0
    if freed:
        torch.cuda.empty_cache()
    BaseLinearLayerWithLoRA._apply_lora_to_output = _apply


def _modules(model_runner: Any) -> dict[str, Any]:
    return model_runner.lora_manager._adapter_manager.modules


def _is_plain_on_card(module: Any) -> bool:
    """Whether a layer's base is one 16-bit weight on a card, in the dtype of its adapter."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    base, a = module.base_layer, module.lora_a_stacked[0]
    weight = getattr(base, "weight", None)
    outs = sum(part.shape[2] for part in module.lora_b_stacked)
    return (
        type(base.quant_method) is UnquantizedLinearMethod
        and weight is not None
        and weight.is_cuda
        and weight.dtype in (torch.bfloat16, torch.float16)
        and weight.dtype == a.dtype
        and weight.is_contiguous()
        and tuple(weight.shape) == (outs, a.shape[3])
    )


@contextmanager
def random_adapter(model_runner: Any) -> Iterator[None]:
    """Fill every slot with values that change each layer's result by about a half, and with zeros afterwards.

    For comparisons, where an adapter of zeros would hide what is wrong with B. torch's generators are left alone.
    """
    modules = _modules(model_runner).values()
    try:
        for number, module in enumerate(modules):
            factors: Factors = module.strop_factors
            generator = torch.Generator(factors.a.device).manual_seed(number)
            width, deviation = factors.a.shape[1], _deviation(module.base_layer)
            for a, b in zip(module.lora_a_stacked, module.lora_b_stacked, strict=True):
                a.normal_(0.0, 1 / math.sqrt(width), generator=generator)
                # For inputs of size 1 the base gives deviation * sqrt(width), and x A^T has size 1.
                b.normal_(0.0, 0.5 * deviation * math.sqrt(width / a.shape[2]), generator=generator)
        yield
    finally:
        for module in modules:
            module.strop_factors.a.zero_()
            module.strop_factors.b_t.zero_()


def _deviation(base: Any) -> float:
    """Return the standard deviation of a weight, from its first rows."""
    packed: Nf4 | None = getattr(base, "nf4", None)
    rows = base.weight.data[:64] if packed is None else products.dequantized(packed.rows(0, 64), torch.bfloat16)
    return float(rows.float().std())


def _apply(self: Any, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    factors: Factors = self.strop_factors
    flat = output.view(-1, output.shape[-1])
    flat.addmm_(torch.mm(x.reshape(-1, x.shape[-1]), factors.a.t()), factors.b_t)
    return output
