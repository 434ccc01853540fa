"""`strop doctor`: versions, device, engine, and whether they are a tested pair."""

from __future__ import annotations

from collections.abc import Iterator

from ..engine import vllm_compat
from ..engine.select import resolve_engine
from ..memory.machine import Machine, detect_machine
from ..memory.shapes import GIB
from .runfolder import environment


def report() -> Iterator[str]:
    """Yield what a bug report needs, a line each."""
    machine = detect_machine()
    for key, value in environment(threads=0).items():
        if isinstance(value, dict):
            yield from (f"{name} {version}" for name, version in value.items())
        elif key != "threads":
            yield f"{key}: {value}"
    yield from _device(machine)
    engine, reason = resolve_engine("auto")
    yield f"engine: {engine} ({reason})"
    if engine == "vllm":
        yield vllm_compat.untested_pair(machine.device) or "vLLM and torch are a tested pair"
        yield f"model runner: {vllm_compat.RUNNERS[machine.device]}"


def _device(machine: Machine) -> Iterator[str]:
    total = f" of {machine.total_bytes / GIB:.1f}" if machine.total_bytes else ""
    yield f"device: {machine.name}, {machine.memory_bytes / GIB:.1f}{total} GiB free"
    yield from (f"on the card: {process}" for process in machine.processes)
