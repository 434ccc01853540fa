"""Which engine a run gets, and building it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

_LIBRARIES = (("torch", "lib/*.so*"), ("nvidia", "*/lib/libcublas*"), ("vllm", "**/*.so"), ("triton", "**/*.so"))
"""Packages and patterns below their folders, in the order in which they are needed."""


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


def read_ahead() -> int:
    """Ask the system to read the libraries that an engine needs from disk now, while Python is busy with imports.

    One or two gigabytes on a card, which are otherwise read page by page when a kernel in them is first used; reading
    needs no interpreter. Returns how many files were asked for: 0 where they are not installed or the system has no
    such call.
    """
    if not hasattr(os, "posix_fadvise"):
        return 0
    count = 0
    for package, pattern in _LIBRARIES:
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            for path in Path(folder).glob(pattern):
                try:
                    descriptor = os.open(path, os.O_RDONLY)
                except OSError:
                    continue
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                os.close(descriptor)
                count += 1
    return count
