"""Strop: GRPO on one consumer GPU, with vLLM embedded in the training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Config", "StropError", "load_config", "train"]

if TYPE_CHECKING:
    from .config import Config
    from .config_load import load_config
    from .errors import StropError
    from .trainer.loop import train


def __getattr__(name: str) -> Any:
    """Import public names when they are first used: `import strop` loads neither torch nor vLLM."""
    import importlib

    homes = {
        "Config": "config", "StropError": "errors", "load_config": "config_load", "train": "trainer.loop",
    }  # fmt: skip
    if name in homes:
        return getattr(importlib.import_module(f".{homes[name]}", __name__), name)
    raise AttributeError(f"module `strop` has no attribute `{name}`")
