"""LoRA in the engine as two matrix products per layer.

vLLM keeps several adapters and looks each token's up: on a card with kernels of its own, about twelve launches a layer,
while launches are what bounds a small model; on a CPU by gathering a copy of the adapter for every token. Here there is
one adapter, it is always on, and all parts of a fused layer (q, k, v; gate, up) are multiplied at once:

    y += (x A^T) B^T      A [parts * R, in] stacked, B [out, parts * R] block-diagonal

The product with A is rounded to the model's dtype before the one with B, as in vLLM's kernels and in the trainer.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import EngineError


def combine(module: Any) -> None:
    """Move the only adapter slot of a wrapped layer into stacked storage; its tensors become views of that.

    Whoever writes into the slot, vLLM or the trainer, writes into what is multiplied.
    """
    parts_a, parts_b = module.lora_a_stacked, module.lora_b_stacked
    if any(t.shape[0] != 1 for t in parts_a):
        raise EngineError(f"vLLM holds {parts_a[0].shape[0]} adapter slots, one is needed to share it with the trainer")
    ranks = [a.shape[2] for a in parts_a]
    sizes = [b.shape[2] for b in parts_b]
    a = parts_a[0].new_zeros(sum(ranks), parts_a[0].shape[3])
    b = parts_b[0].new_zeros(sum(sizes), sum(ranks))
    module.lora_a_stacked = tuple(part[None, None] for part in a.split(ranks))
    rows, columns = b.split(sizes), [0]
    for rank in ranks:
        columns.append(columns[-1] + rank)
    module.lora_b_stacked = tuple(
        part[None, None, :, left:right] for part, left, right in zip(rows, columns[:-1], columns[1:], strict=True)
    )
    module._strop_factors = (a.t(), b.t())


def combine_all(model_runner: Any) -> None:
    """Do so for every adapted layer, and let them use it. Raises EngineError when vLLM's layers have changed."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    if not hasattr(BaseLinearLayerWithLoRA, "_apply_lora_to_output"):
        raise EngineError(
            "vLLM's BaseLinearLayerWithLoRA has no _apply_lora_to_output, which Strop has to change",
            hint="install the tested pair of vLLM and torch; `strop doctor` names it",
        )
    for name, module in model_runner.lora_manager._adapter_manager.modules.items():
        if not isinstance(module, BaseLinearLayerWithLoRA):
            raise EngineError(
                f"vLLM has an adapter on `{name}`, a {type(module).__name__}; only linear layers can have one",
                hint="lora.target_modules: leave it out",
            )
        combine(module)
    BaseLinearLayerWithLoRA._apply_lora_to_output = _apply


def _apply(self: Any, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    a, b = self._strop_factors
    flat = output.view(-1, output.shape[-1])
    flat.addmm_(torch.mm(x.reshape(-1, x.shape[-1]), a), b)
    return output
