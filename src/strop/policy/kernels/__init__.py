"""Elementwise work of a decoder layer, fused: one set of functions, in Triton on CUDA and in plain torch elsewhere.

Both sets have the same names and meanings (`torch_ops` is the readable one) and are compared by tests. They take and
return plain tensors and know nothing of autograd; `policy/fused.py` builds differentiable blocks of them. Triton comes
with torch on CUDA and is imported at first use.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch


@functools.cache
def _load(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def ops_for(device: torch.device) -> ModuleType:
    """Return the set for tensors on `device`: `triton_ops` or `torch_ops`."""
    return _load("triton_ops" if device.type == "cuda" else "torch_ops")
