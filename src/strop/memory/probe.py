"""Who holds the memory of a card, asked of the driver's management library (NVML): no CUDA context is made for it.

The library comes with every NVIDIA driver; its C interface is called directly, since the Python package for it is no
dependency of ours. Where it is missing, `look_at_card` returns None and the caller does with less.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

from .shapes import GIB

_UNKNOWN = 2**64 - 1
"""NVML_VALUE_NOT_AVAILABLE."""
_MOST_PROCESSES = 128


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class _Process(ctypes.Structure):
    _fields_ = [
        ("pid", ctypes.c_uint), ("used", ctypes.c_ulonglong), ("instance", ctypes.c_uint), ("compute", ctypes.c_uint),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class CardProcess:
    """Another process with memory on the card."""

    pid: int
    name: str
    memory_bytes: int | None
    """None where the driver does not say (Windows, some containers)."""

    def __str__(self) -> str:
        size = "memory" if self.memory_bytes is None else f"{self.memory_bytes / GIB:.1f} GiB"
        return f"{self.name} (pid {self.pid}) holds {size}"


@dataclass(frozen=True, slots=True)
class CardUse:
    """Memory of a card at one moment."""

    total_bytes: int
    free_bytes: int
    processes: tuple[CardProcess, ...]
    """Without this one; those of other containers may be missing."""
    own_bytes: int | None = None
    """What this process holds; None where the driver does not say (Windows, containers with numbers of their own)."""


def look_at_card(uuid: str) -> CardUse | None:
    """Return the use of the card `GPU-...`; None where NVML is missing or does not know it."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    try:
        card = ctypes.c_void_p()
        if nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(card)) != 0:
            return None
        memory = _Memory()
        if nvml.nvmlDeviceGetMemoryInfo(card, ctypes.byref(memory)) != 0:
            return None
        found = _processes(nvml, card)
        own = found.pop(os.getpid(), None)
        others = sorted(found.values(), key=lambda p: -(p.memory_bytes or 0))
        return CardUse(memory.total, memory.free, tuple(others), own.memory_bytes if own else None)
    finally:
        nvml.nvmlShutdown()


def can_pin(num_bytes: int) -> bool:
    """Whether so much host memory can be locked for a card; torch keeps it for the next tensor of that size."""
    import torch

    try:
        torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return False
    return True


def card_uuid() -> str:
    """Return the name that NVML knows CUDA's first card by; makes no CUDA context."""
    import torch

    uuid = str(torch.cuda.get_device_properties(0).uuid)
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def _processes(nvml: ctypes.CDLL, card: ctypes.c_void_p) -> dict[int, CardProcess]:
    found: dict[int, CardProcess] = {}
    for kind in ("Compute", "Graphics"):
        ask = getattr(nvml, f"nvmlDeviceGet{kind}RunningProcesses_v3", None)
        count, table = ctypes.c_uint(_MOST_PROCESSES), (_Process * _MOST_PROCESSES)()
        if ask is None or ask(card, ctypes.byref(count), table) != 0:
            continue
        for entry in table[: count.value]:
            size = None if entry.used == _UNKNOWN else int(entry.used)
            found[entry.pid] = CardProcess(entry.pid, _name(entry.pid), size)
    return found


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "a process"
