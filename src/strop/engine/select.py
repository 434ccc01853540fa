"""Which engine a run gets, and building it."""

from __future__ import annotations

import importlib.util


def resolve_engine(wanted: str) -> tuple[str, str]:
    """Return (engine, reason) for the setting `auto`, `vllm` or `transformers`.

    Raises EngineError when vLLM is asked for and not installed.
    """
    from ..errors import EngineError

    installed = importlib.util.find_spec("vllm") is not None
    if wanted == "vllm" and not installed:
        raise EngineError(
            "model.engine is vllm, and vLLM is not installed",
            hint="pip install 'strop[cpu]' or 'strop[cuda]', or set model.engine to transformers",
        )
    if wanted != "auto":
        return wanted, "model.engine"
    if installed:
        return "vllm", "installed; it decodes many times faster"
    return "transformers", "vLLM is not installed; generation will be slow"
