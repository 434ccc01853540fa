"""What the run may use: device, cores, memory. The only part of the plan that looks at the real machine."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .pace import card_flops
from .probe import CardProcess, card_uuid, look_at_card
from .shapes import GIB

VISIBLE_BYTES = GIB // 2
"""Another process on the card is worth a line from here on."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine a plan is made for."""

    device: Literal["cpu", "cuda"]
    name: str
    num_cores: int
    memory_bytes: int
    """Free memory of the device: RAM on a CPU, VRAM on a card before this process has taken any."""
    supports_bf16: bool
    total_bytes: int = 0
    """All memory of a card; 0 where unknown."""
    processes: tuple[CardProcess, ...] = ()
    """Who else holds memory of the card, as far as the driver says."""
    flops: float = 0.0
    """A card's peak for 16-bit products in FLOP/s; 0 where unknown."""
    pins: bool = True
    """Whether a gigabyte of host memory can be pinned for the card."""

    @property
    def others(self) -> str:
        """Processes that hold much of the card, or that the driver does not say it of, in words."""
        return ", ".join(str(p) for p in self.processes if p.memory_bytes is None or p.memory_bytes >= VISIBLE_BYTES)

    def without_others(self) -> Machine:
        """Return the machine as it would be with this process alone on the card."""
        sizes = [p.memory_bytes for p in self.processes]
        held = sum(s for s in sizes if s is not None)
        # Where the driver is silent, all that is not free is theirs.
        free = self.total_bytes if None in sizes else min(self.total_bytes, self.memory_bytes + held)
        return replace(self, memory_bytes=max(free, self.memory_bytes), processes=())


def detect_machine() -> Machine:
    """Look at this machine: the first visible CUDA card, else the CPU."""
    import psutil
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    if torch.cuda.is_available():
        # In this order: to ask CUDA itself for its free memory makes a context, which takes half a gigabyte of it.
        properties = torch.cuda.get_device_properties(0)
        use = look_at_card(card_uuid())
        free, total = torch.cuda.mem_get_info() if use is None else (use.free_bytes, use.total_bytes)
        others = use.processes if use is not None else ()
        bf16, flops = computes_bf16(properties), card_flops(properties)
        pins = "microsoft" not in platform.release().lower()  # WSL has little of it
        return Machine("cuda", properties.name, cores, free, bf16, total, others, flops, pins)
    available = min(psutil.virtual_memory().available, _container_memory())
    return Machine("cpu", f"CPU with {cores} cores", cores, available, True)


def computes_bf16(properties: Any) -> bool:
    """Whether a card has bfloat16 itself, by torch's device properties: from capability 8.0 on.

    torch's own question says yes for Turing as well, which emulates it and which vLLM refuses, and may make a context.
    """
    return bool(properties.major >= 8)


def _container_memory() -> int:
    """Return what the container's limit leaves free, in bytes; without a limit, more than any machine has."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return 2**63
    return 2**63 if limit == "max" else max(0, int(limit) - int(used))
