"""Weights that bitsandbytes wrote: one tensor of bytes a layer, with its statistics beside it under longer names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

import torch

from . import nf4

_STATE = ".quant_state.bitsandbytes__nf4"
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", _STATE)


def merged(
    weights: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor, nf4.Nf4 | None]]:
    """Yield (name, tensor, packed) from a checkpoint's tensors in any order; `packed` is None for an ordinary one.

    Nested statistics are unfolded. Raises ValueError for a weight with parts missing, of another type than NF4, or in
    blocks other than 64.
    """
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights:
        if ".quant_state.bitsandbytes__" in name and _STATE not in name:
            raise ValueError(f"`{name}`: the checkpoint is packed as {name.rsplit('__', 1)[1]}, NF4 is needed")
        part = next((p for p in _PARTS if name.endswith(p)), None)
        if part is None and not (tensor.dtype == torch.uint8 and name.endswith(".weight")):
            yield name, tensor, None
            continue
        weight = name if part is None else name.removesuffix(part)
        parts = waiting.setdefault(weight, {})
        parts[part or ""] = tensor
        state = _state(parts)
        if state is not None and _needed(state) <= parts.keys():
            del waiting[weight]
            try:
                packed = _unpack(weight, parts, state)
            except (KeyError, IndexError, TypeError, RuntimeError) as e:
                what = f"no {e}" if isinstance(e, KeyError) else str(e)
                raise ValueError(f"the parts of `{weight}` do not fit together ({what}); the file is damaged") from e
            yield weight, parts[""], packed
    if waiting:
        name, parts = next(iter(waiting.items()))
        lacking = sorted({"", ".absmax", ".quant_map", _STATE} - parts.keys())
        raise ValueError(f"`{name}` is packed and lacks {lacking or 'its nested statistics'}")


def _state(parts: dict[str, torch.Tensor]) -> dict[str, object] | None:
    if _STATE not in parts:
        return None
    return json.loads(bytes(parts[_STATE].tolist()).decode())  # type: ignore[no-any-return]


def _needed(state: dict[str, object]) -> set[str]:
    nested = {".nested_absmax", ".nested_quant_map"} if "nested_blocksize" in state else set[str]()
    return {"", ".absmax", ".quant_map"} | nested


def _unpack(name: str, parts: dict[str, torch.Tensor], state: dict[str, object]) -> nf4.Nf4:
    if state["blocksize"] != nf4.BLOCK or state["quant_type"] != "nf4":
        raise ValueError(
            f"`{name}` is packed as {state['quant_type']} in blocks of {state['blocksize']}, "
            f"nf4 in blocks of {nf4.BLOCK} is needed"
        )
    given = parts[".quant_map"].float().flatten()
    if given.shape != (len(nf4.CODES),) or (given - torch.tensor(nf4.CODES)).abs().max() > 1e-6:
        raise ValueError(f"`{name}` is packed with another code than NF4's")
    rows, columns = state["shape"]  # type: ignore[misc]
    absmax = parts[".absmax"]
    if "nested_blocksize" in state:
        size = int(state["nested_blocksize"])  # type: ignore[call-overload]
        outer = parts[".nested_absmax"].float().repeat_interleave(size)[: absmax.numel()]
        absmax = parts[".nested_quant_map"].float()[absmax.flatten().int()] * outer + float(state["nested_offset"])  # type: ignore[arg-type]
    return nf4.from_bitsandbytes(parts[""], absmax.flatten(), (int(rows), int(columns)))
