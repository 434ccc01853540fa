"""Weights that bitsandbytes wrote: one tensor of bytes a layer, with its statistics beside it under longer names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from . import nf4


class PackedError(ValueError):
    """A packed weight is incomplete, damaged, or packed in another way."""


_STATE = ".quant_state.bitsandbytes__nf4"
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", _STATE)


def merged(
    weights: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor, nf4.Nf4 | None]]:
    """Yield (name, tensor, packed) from a checkpoint's tensors in any order; `packed` is None for an ordinary one.

    Nested statistics are unfolded. Raises PackedError for a weight with parts missing or damaged, of another type than
    NF4, or in blocks other than 64.
    """
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights:
        if ".quant_state.bitsandbytes__" in name and _STATE not in name:
            raise PackedError(f"`{name}`: the checkpoint is packed as {name.rsplit('__', 1)[1]}, NF4 is needed")
        part = next((p for p in _PARTS if name.endswith(p)), None)
        if part is None and not (tensor.dtype == torch.uint8 and name.endswith(".weight")):
            yield name, tensor, None
            continue
        weight = name if part is None else name.removesuffix(part)
        parts = waiting.setdefault(weight, {})
        parts[part or ""] = tensor
        try:
            packed = _unpacked_if_whole(parts)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as e:
            what = f"its state has no {e}" if isinstance(e, KeyError) else str(e)
            raise PackedError(f"`{weight}` is packed in a way that cannot be read: {what}") from e
        if packed is not None:
            del waiting[weight]
            yield weight, parts[""], packed
    if waiting:
        name, parts = next(iter(waiting.items()))
        lacking = sorted({"", ".absmax", ".quant_map", _STATE} - parts.keys())
        raise PackedError(f"`{name}` is packed and lacks {lacking or 'its nested statistics'}")


def _unpacked_if_whole(parts: dict[str, torch.Tensor]) -> nf4.Nf4 | None:
    """Return the weight when all of its parts are there. Raises one of many errors for parts that do not fit."""
    if _STATE not in parts:
        return None
    state: dict[str, Any] = json.loads(bytes(parts[_STATE].tolist()).decode())
    nested = {".nested_absmax", ".nested_quant_map"} if "nested_blocksize" in state else set[str]()
    return _unpack(parts, state) if {"", ".absmax", ".quant_map"} | nested <= parts.keys() else None


def _unpack(parts: dict[str, torch.Tensor], state: dict[str, Any]) -> nf4.Nf4:
    if state["blocksize"] != nf4.BLOCK or state["quant_type"] != "nf4":
        raise ValueError(
            f"{state['quant_type']} in blocks of {state['blocksize']}, nf4 in blocks of {nf4.BLOCK} is needed"
        )
    given = parts[".quant_map"].float().flatten()
    # vLLM reads checkpoints with the model's dtype as the default one.
    codes = torch.tensor(nf4.CODES, dtype=torch.float32, device=given.device)
    if given.shape != codes.shape or (given - codes).abs().max() > 1e-6:
        raise ValueError("another code than NF4's")
    rows, columns = state["shape"]
    absmax = parts[".absmax"]
    if "nested_blocksize" in state:
        outer = parts[".nested_absmax"].float().repeat_interleave(int(state["nested_blocksize"]))[: absmax.numel()]
        absmax = parts[".nested_quant_map"].float()[absmax.flatten().int()] * outer + float(state["nested_offset"])
    return nf4.from_bitsandbytes(parts[""], absmax.flatten(), (int(rows), int(columns)))
