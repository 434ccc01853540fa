"""What the run may use: device, cores, memory. The only part of the plan that looks at the real machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine a plan is made for."""

    device: Literal["cpu", "cuda"]
    name: str
    num_cores: int
    memory_bytes: int
    """Free memory of the device: RAM on a CPU, VRAM on a card."""
    supports_bf16: bool


def detect_machine() -> Machine:
    """Look at this machine: the first visible CUDA card, else the CPU."""
    import psutil
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return Machine("cuda", torch.cuda.get_device_name(), cores, free, torch.cuda.is_bf16_supported())
    available = min(psutil.virtual_memory().available, _container_memory())
    return Machine("cpu", f"CPU with {cores} cores", cores, available, True)


def _container_memory() -> int:
    """Return what the container's limit leaves free, in bytes; without a limit, more than any machine has."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return 2**63
    return 2**63 if limit == "max" else max(0, int(limit) - int(used))
