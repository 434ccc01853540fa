"""`strop doctor`: versions, device, engine, and whether they are a tested pair."""

from __future__ import annotations

from collections.abc import Iterator

from ..engine import vllm_compat
from ..engine.select import resolve_engine
from ..memory.machine import detect_machine
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
    yield f"device: {machine.name}, {machine.memory_bytes / GIB:.1f} GiB free"
    engine, reason = resolve_engine("auto")
    yield f"engine: {engine} ({reason})"
    if engine == "vllm":
        yield vllm_compat.untested_pair(machine.device) or "vLLM and torch are a tested pair"
