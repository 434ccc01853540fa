"""Settings that have to stand before torch and vLLM are imported, and fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONG = ("test_end_to_end", "test_resume", "test_command", "test_docs")
"""Files that take longest; two processes are done at the same time if these are not left to the end."""
GIB_PER_PROCESS = 3
"""Twice what was seen: 3 GiB for two processes of tests with their engines and the commands that they start."""

# One thread: a small machine runs its tests beside other work, and results then depend on no scheduler.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
# The engine lives in the test's process, where its model can be reached.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with real models and data that are too large for the repository; the test is skipped without it."""
    folder = Path(os.environ.get("STROP_SHARED") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}; set STROP_SHARED to one that holds models/ and data/")
    return folder


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Say what `-n auto` is: two processes, or none beside pytest's where cores, memory or a card are not for two."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    has_card = Path("/dev/nvidiactl").exists()  # a plan takes the memory that is free on it
    return 0 if has_card or (os.cpu_count() or 1) < 2 or memory < 2 * GIB_PER_PROCESS * 2**30 else 2


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start with the longest files if several processes share them; skip tests marked `gpu` where there is no card."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA card"))
