"""The `strop` command, in a process of its own as a user starts it or in the test's, which has torch and vLLM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from strop import cli


def strop(*args: str, cwd: Path, timeout: float = 1500) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "strop", *args], cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )


def strop_here(*args: str) -> int:
    """Run the command in this process and return its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["strop", *args])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    code = stopped.value.code
    assert code is None or isinstance(code, int), code
    return code or 0
