"""Rules that hold for every file of the project: sizes, recipes, declared dependencies, nothing of one machine."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from strop.config import Config
from strop.config_load import load_config

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "src").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 100
MAX_LOOP_LINES = 60
MODEL_BYTES = 6 * 2**20

FOLDERS = ("src", "tests", "recipes", "examples", "bench", "docs", "scripts")
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".json", ".jsonl", ".txt", ".sh", ".jinja", ""}
MACHINE_PATH = re.compile(r"(?<![\w.~/])/(?:work|root|opt|mnt|home/\w+|Users/\w+)/[\w.-]+")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def num_lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def text_files() -> list[Path]:
    top = [path for path in ROOT.iterdir() if path.is_file()]
    below = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    return [path for path in sorted([*top, *below]) if path.suffix in TEXT and "__pycache__" not in path.parts]


def test_files_are_short() -> None:
    assert MODULES
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    too_long = [
        f"{relative(path)}:{function.lineno} {function.name}: {num_lines(function)} lines"
        for path in MODULES
        for function in functions(path)
        if num_lines(function) > MAX_FUNCTION_LINES
    ]
    assert too_long == []


def test_the_training_loop_fits_on_one_screen() -> None:
    loops = [
        node
        for node in ast.walk(ast.parse((ROOT / "src/strop/trainer/loop.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.For | ast.While)
    ]
    assert loops, "trainer/loop.py holds no loop"
    assert max(num_lines(loop) for loop in loops) <= MAX_LOOP_LINES


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_recipe_loads(path: Path) -> None:
    config = load_config(path)
    assert config != Config(), "a recipe that sets nothing teaches nothing"


def test_the_demo_model_is_small() -> None:
    folder = ROOT / "src/strop/demo/model"
    assert (folder / "config.json").is_file()
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= MODEL_BYTES


def project_table() -> dict[str, dict]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def distribution_name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def test_every_import_is_declared() -> None:
    project = project_table()
    extras = project["optional-dependencies"]
    groups = [project["dependencies"], extras["cpu"], extras["cuda"], extras["gym"]]
    declared = {distribution_name(requirement) for group in groups for requirement in group}
    provided_by = importlib.metadata.packages_distributions()
    known = {name.replace("-", "_") for name in declared} | {"yaml", "strop"}
    undeclared: list[str] = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            for top in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - known:
                if not declared & {d.lower().replace("_", "-") for d in provided_by.get(top, ())}:
                    undeclared.append(f"{relative(path)}: {top}")
    assert undeclared == []


def test_every_dependency_has_a_reason() -> None:
    project = project_table()
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    decisions = (ROOT / "docs/decisions.md").read_text(encoding="utf-8")
    names = {distribution_name(requirement) for group in groups for requirement in group}
    assert {name for name in names if f"`{name}`" not in decisions} == set()


def test_no_path_of_one_machine() -> None:
    hits = [
        f"{relative(path)}: {match.group()}"
        for path in text_files()
        for match in MACHINE_PATH.finditer(path.read_text(encoding="utf-8"))
    ]
    assert hits == []


def test_a_path_of_one_machine_would_be_found() -> None:
    found = MACHINE_PATH.findall("see " + "/".join(["", "home", "ann", "models"]) + " or ~/models, ./work/x, a/opt/b")
    assert found == ["/".join(["", "home", "ann", "models"])]


def test_no_work_left_over() -> None:
    marker = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    hits = [relative(path) for path in text_files() if marker.search(path.read_text(encoding="utf-8"))]
    assert hits == []
