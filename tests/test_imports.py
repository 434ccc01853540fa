"""Which part may import which, read from the source, and what the command imports before it has something to do."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src"
PACKAGE = SOURCE / "strop"

TIERS: tuple[frozenset[str], ...] = (
    frozenset({"types", "errors"}),
    frozenset({"config", "config_load", "recipes_dir", "seeding", "quant"}),
    frozenset({"tasks", "rewards", "objective", "policy", "engine", "memory", "demo"}),
    frozenset({"weights", "monitor", "distributed"}),
    frozenset({"trainer"}),
    frozenset({"cli", "__init__", "__main__"}),
)
"""Parts of the package, lowest first. A part imports from lower tiers and from itself."""

SIDEWAYS = frozenset({("config_load", "config"), ("demo", "tasks"), ("__main__", "cli"), ("cli", "__init__")})
"""(who, whom): the imports within one tier that are meant."""

ONLY_IN = {"vllm": {"engine"}, "peft": {"policy"}, "bitsandbytes": {"policy"}}
"""Packages that one part alone may import."""

NEVER_IN = {
    "rewards": {"torch", "vllm", "transformers"},
    "tasks": {"torch", "vllm"},
    "objective": {"vllm", "transformers"},
}
"""What a part must not import, so that it stays light or pure."""

HEAVY = (
    "torch",
    "vllm",
    "transformers",
    "peft",
    "datasets",
    "pyarrow",
    "pandas",
    "sympy",
    "math_verify",
    "tensorboard",
)

Import = tuple[str, int, bool]
"""Module, line, whether it is for the type checker only."""


def part_of(module: str) -> str:
    """`strop.tasks.gym` -> `tasks`; the package itself is `__init__`."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def module_name(path: Path, source: Path) -> str:
    names = path.relative_to(source).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" and len(names) > 2 else names)


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def package_of(path: Path, source: Path) -> list[str]:
    return list(path.relative_to(source).parent.parts)


def imports_of(path: Path, source: Path = SOURCE) -> list[Import]:
    """Every module that a file imports, anywhere in it, relative imports and `import_module("name")` included."""
    return list(_walk(ast.parse(path.read_text(encoding="utf-8")), package_of(path, source), False))


def _walk(node: ast.AST, package: list[str], typing_only: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from ((alias.name, node.lineno, typing_only) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else []
        stem = ".".join([*base, *([node.module] if node.module else [])])
        # `from . import x` and `from strop import x` name parts; deeper names do not change the part.
        yield from (
            (f"{stem}.{alias.name}" if stem == "strop" else stem, node.lineno, typing_only) for alias in node.names
        )
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            yield node.args[0].value, node.lineno, typing_only
    if isinstance(node, ast.If) and is_type_checking(node.test):
        for child in node.body:
            yield from _walk(child, package, True)
        for child in node.orelse:
            yield from _walk(child, package, typing_only)
        return
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, package, typing_only)


def tier_of(part: str) -> int | None:
    return next((index for index, tier in enumerate(TIERS) if part in tier), None)


def violations(path: Path, source: Path = SOURCE) -> list[str]:
    """What a file imports that it must not, one sentence each."""
    who = part_of(module_name(path, source))
    found: list[str] = []
    own = tier_of(who)
    if own is None:
        return [f"{path.name}: `{who}` has no tier; add it to TIERS"]
    for module, line, typing_only in imports_of(path, source):
        where, top = f"{path.relative_to(source)}:{line}", module.split(".")[0]
        if top == "strop":
            whom = part_of(module)
            other = tier_of(whom)
            if other is None:
                # `from strop import name` of something that `__init__` offers.
                whom, other = "__init__", tier_of("__init__")
            assert other is not None
            if whom != who and other >= own and (who, whom) not in SIDEWAYS:
                found.append(f"{where}: `{who}` imports `{whom}`, which is not below it")
        if top in ONLY_IN and who not in ONLY_IN[top]:
            found.append(f"{where}: `{top}` belongs to {', '.join(ONLY_IN[top])} alone")
        if top in NEVER_IN.get(who, ()) and not typing_only:
            found.append(f"{where}: `{who}` must not import `{top}`")
    return found


def test_imports_point_downwards() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert files
    assert [line for path in files for line in violations(path)] == []


@pytest.mark.parametrize(
    ("file", "code", "complaint"),
    [
        ("types.py", "from .config import Config", "`types` imports `config`"),
        ("rewards/pool.py", "from ..tasks import load", "`rewards` imports `tasks`"),
        ("engine/core.py", "def f():\n    from strop.policy.lora import x", "`engine` imports `policy`"),
        ("monitor/view.py", "from ..weights import W", "`monitor` imports `weights`"),
        ("weights.py", "import strop.trainer.loop", "`weights` imports `trainer`"),
        ("tasks/gym.py", "from .. import cli", "`tasks` imports `cli`"),
        ("trainer/loop.py", "from strop import train", "`trainer` imports `__init__`"),
        ("trainer/loop.py", "import vllm.config", "`vllm` belongs to engine"),
        ("policy/x.py", "import importlib\nimportlib.import_module('vllm')", "`vllm` belongs to engine"),
        ("engine/lora.py", "from peft import LoraConfig", "`peft` belongs to policy"),
        ("rewards/x.py", "import torch.nn", "`rewards` must not import `torch`"),
        (
            "rewards/x.py",
            "if not TYPE_CHECKING:\n    pass\nelse:\n    import torch",
            "`rewards` must not import `torch`",
        ),
        ("other.py", "", "has no tier"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, code: str, complaint: str) -> None:
    path = tmp_path / "strop" / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    found = violations(path, tmp_path)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("rewards/x.py", "if TYPE_CHECKING:\n    import torch"),
        ("rewards/x.py", "from . import pool\nfrom ..types import Rollout\nimport torchless"),
        ("demo/x.py", "from ..tasks.arithmetic import solve"),
        ("config_load.py", "from .config import Config\nfrom .errors import ConfigError"),
        ("__init__.py", "def train():\n    from .trainer.loop import run"),
        ("cli.py", "from . import __version__"),
        ("__main__.py", "from strop.cli import app"),
        ("engine/vllm_engine.py", "def f():\n    import vllm"),
    ],
)
def test_a_right_import_passes(tmp_path: Path, file: str, code: str) -> None:
    path = tmp_path / "strop" / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert violations(path, tmp_path) == []


def loaded_after(code: str) -> list[str]:
    """Which of HEAVY a fresh interpreter has loaded after running the code."""
    report = f"\nimport json, sys\nprint('\\n' + json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_help_loads_nothing_heavy() -> None:
    code = (
        "from strop.cli import app\ntry:\n    app(['--help'])\nexcept SystemExit as e:\n    assert not e.code, e.code"
    )
    assert loaded_after(code) == []


def test_settings_and_library_door_load_nothing_heavy() -> None:
    assert loaded_after("import strop, strop.types\nfrom strop.config_load import load_config\nload_config()") == []


def test_heavy_modules_would_be_seen() -> None:
    assert loaded_after("import pyarrow") == ["pyarrow"]
