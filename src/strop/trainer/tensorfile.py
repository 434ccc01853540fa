"""Writing a safetensors file one tensor at a time.

The library's own writer wants all tensors in host memory at once, which for the optimizer state of a full fine-tuning
is as much again as the state itself. Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON
header, the data).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_DTYPES: Mapping[str, str] = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
}


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, int | str]:
    """Write dense tensors of any device, layout or shared storage, synced; return {"size": bytes, "sha256": hex}.

    Every bit is kept, NaN payloads included; a tensor that is a view is stored as what it shows. Raises OSError.
    """
    # Widest dtypes first keep every tensor aligned to its element size, as the format's readers like it.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, dict[str, object]] = {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _dtype(name, tensor), "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as f:
        for head in (len(encoded).to_bytes(8, "little"), encoded):
            digest.update(head)
            f.write(head)
        for name in order:
            data = _bytes_of(tensors[name])
            digest.update(data)
            f.write(data)
        f.flush()
        os.fsync(f.fileno())
    return {"size": 8 + len(encoded) + offset, "sha256": digest.hexdigest()}


def tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the size of the tensors' data in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _dtype(name: str, tensor: torch.Tensor) -> str:
    assert str(tensor.dtype) in _DTYPES, f"{name} is {tensor.dtype}, which safetensors cannot hold"
    return _DTYPES[str(tensor.dtype)]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
