"""Where vLLM keeps its weights and adapters, under the names that transformers gives them.

vLLM fuses q/k/v and gate/up into one tensor each; the parts are row slices, so every view is contiguous. What is
fused comes from the model's own `packed_modules_mapping`, how it is cut from the layer's `output_sizes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..errors import EngineError
from .base import AdapterSlot

ADAPTER_ID = 1


def parameter_views(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a view for every parameter of vLLM's model, by transformers' parameter name."""
    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    views: dict[str, torch.Tensor] = {}
    for full_name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, leaf = full_name.rpartition(".")
        module = model.get_submodule(path)
        name = path.removesuffix(".base_layer")
        parent, _, last = name.rpartition(".")
        if leaf == "weight" and (hasattr(module, "nf4") or hasattr(module, "int8")):
            views |= _quantised_views(name, module, packed.get(last))
        elif last in packed:
            for part, view in _row_slices(full_name, parameter.data, module, packed[last]):
                views[f"{parent}.{part}.{leaf}"] = view
        elif hasattr(module, "org_vocab_size"):  # the vocabulary is padded to a multiple of 64
            views[f"{name}.{leaf}"] = parameter.data[: module.org_vocab_size]
        else:
            views[f"{name}.{leaf}"] = parameter.data
    return views


def _quantised_views(name: str, module: Any, parts: list[str] | None) -> dict[str, torch.Tensor]:
    """Return both tensors of a quantised weight by part: `packed` and `absmax`, or `values` and `scale`."""
    if hasattr(module, "int8"):
        rows = module.int8.rows(0, module.org_vocab_size)
        return {f"{name}.values": rows.values, f"{name}.scale": rows.scale}
    parent = name.rpartition(".")[0]
    views = {}
    for leaf in ("packed", "absmax"):
        tensor: torch.Tensor = getattr(module.nf4, leaf)[: getattr(module, "org_vocab_size", None)]
        if parts is None:
            views[f"{name}.{leaf}"] = tensor
            continue
        for part, view in _row_slices(name, tensor, module, parts):
            views[f"{parent}.{part}.{leaf}"] = view
    return views


def _row_slices(name: str, tensor: torch.Tensor, module: Any, parts: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    if len(parts) == 1:  # fused in transformers' model as well
        yield parts[0], tensor
        return
    sizes = [int(size) for size in module.output_sizes]
    if len(sizes) != len(parts) or sum(sizes) != tensor.shape[0]:
        raise EngineError(
            f"vLLM's `{name}` has {tensor.shape[0]} rows for parts {parts} of sizes {sizes}; they cannot be shared",
            hint="set model.engine to transformers",
        )
    yield from zip(parts, tensor.split(sizes), strict=True)


def register_adapter(model_runner: Any, rank: int) -> int:
    """Make one adapter of zeros resident and pinned; return its slot.

    It is never read from disk and never registered again: the trainer writes into the slot in place.
    """
    manager = model_runner.lora_manager._adapter_manager
    dummy = manager.create_dummy_lora(ADAPTER_ID, rank, model_runner.lora_manager.embedding_modules)
    manager.add_adapter(dummy)
    manager.activate_adapter(ADAPTER_ID)
    manager.pin_adapter(ADAPTER_ID)
    return int(manager.lora_index_to_id.index(ADAPTER_ID))


def adapter_views(model_runner: Any, slot: int, rank: int) -> dict[str, AdapterSlot]:
    """Return the slot's A and B of every adapted layer, by transformers' module name; views of vLLM's storage."""
    manager = model_runner.lora_manager._adapter_manager
    packed: Mapping[str, list[str]] = manager.packed_modules_mapping
    slots = {}
    for name, module in manager.modules.items():
        parent, _, last = name.rpartition(".")
        parts = packed.get(last, [last])
        for part, a, b in zip(parts, module.lora_a_stacked, module.lora_b_stacked, strict=True):
            slots[f"{parent}.{part}"] = AdapterSlot(a_RH=a[slot, 0, :rank], b_HR=b[slot, 0, :, :rank])
    return slots
