"""From an entry of `rewards.funcs` to a callable.

An entry is a built-in name, `package.module:function` or `path.py:function`. Reading an entry imports nothing of the
user's; that happens in the workers only.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from ..errors import RewardError
from .library import LIBRARY, PRELOADS

FORMS = "a built-in name, `package.module:function` or `path.py:function`"


@dataclass(frozen=True, slots=True)
class FunctionSpec:
    """Where a reward function is found. `name` is unique within a run and names its scores and metrics."""

    name: str
    entry: str
    kind: Literal["builtin", "module", "file"]
    target: str
    """Built-in name, dotted module, or absolute path."""
    attribute: str = ""


def read_entries(entries: Sequence[str]) -> tuple[FunctionSpec, ...]:
    """Read the entries of `rewards.funcs`; files are looked for relative to the current directory.

    Two functions of the same name are told apart by their file or module. Raises RewardError for an unknown built-in, a
    missing file, an entry of no known form or one that is listed twice, with the nearest names.
    """
    specs = [_read_entry(entry.strip()) for entry in entries]
    for spec in specs:
        if sum(other.entry == spec.entry for other in specs) > 1:
            raise RewardError(
                f"rewards.funcs lists `{spec.entry}` twice", hint="list it once and give it a larger weight"
            )
    for name_of in (_qualified_name, lambda spec: spec.entry):
        names = [spec.name for spec in specs]
        specs = [s if names.count(s.name) == 1 else replace(s, name=name_of(s)) for s in specs]
    return tuple(specs)


def _qualified_name(spec: FunctionSpec) -> str:
    if spec.kind == "builtin":
        return spec.name
    return f"{Path(spec.target).stem if spec.kind == 'file' else spec.target}.{spec.attribute}"


def _read_entry(entry: str) -> FunctionSpec:
    if entry in LIBRARY:
        return FunctionSpec(name=entry, entry=entry, kind="builtin", target=entry)
    target, colon, attribute = entry.rpartition(":")
    if not colon or not target or not attribute:
        raise RewardError(f"rewards.funcs: `{entry}` is not {FORMS}", hint=_entry_hint(entry))
    if not all(part.isidentifier() for part in attribute.split(".")):
        raise RewardError(
            f"rewards.funcs: `{attribute}` in `{entry}` cannot be a function's name", hint=f"give {FORMS}"
        )
    if not target.endswith(".py"):
        if not all(part.isidentifier() for part in target.split(".")):
            raise RewardError(
                f"rewards.funcs: `{target}` in `{entry}` is neither a module nor a .py file", hint=f"give {FORMS}"
            )
        return FunctionSpec(name=attribute, entry=entry, kind="module", target=target, attribute=attribute)
    path = Path(target).expanduser().absolute()
    if not path.is_file():
        here = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        near = nearest(path.name, here) or f"{path.parent} holds {', '.join(here[:8]) or 'no .py file'}"
        raise RewardError(f"rewards.funcs: the file `{target}` of `{entry}` does not exist", hint=near)
    return FunctionSpec(name=attribute, entry=entry, kind="file", target=str(path), attribute=attribute)


def _entry_hint(entry: str) -> str:
    bare = entry.strip(":")
    if bare.endswith(".py"):
        return f"name the function as well: `{bare}:function`"
    close = nearest(entry, LIBRARY)
    if not close and "." in bare:
        module, _, function = bare.rpartition(".")
        return f"separate module and function by a colon: `{module}:{function}`"
    return close or f"built in: {', '.join(LIBRARY)}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean `x`?" for the nearest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else ""


def load_function(spec: FunctionSpec) -> Callable[..., Any]:
    """Import what a spec names and return it. Runs the user's code.

    Raises RewardError if the module cannot be imported or has no such function, or if it is not callable.
    """
    if spec.kind == "builtin":
        PRELOADS.get(spec.target, lambda: None)()
        return LIBRARY[spec.target]
    module = _import_module(spec) if spec.kind == "module" else _import_file(spec)
    found: Any = module
    for part in spec.attribute.split("."):
        if not hasattr(found, part):
            names = [n for n in dir(found) if not n.startswith("_") and callable(getattr(found, n, None))]
            raise RewardError(
                f"rewards.funcs: `{spec.target}` has no function `{part}` (entry `{spec.entry}`)",
                hint=nearest(part, names) or f"it has: {', '.join(names[:12]) or 'no function'}",
            )
        found = getattr(found, part)
    if inspect.isclass(found):
        raise RewardError(
            f"rewards.funcs: `{spec.entry}` is a class; a function or an instance is needed",
            hint=f"write `reward = {spec.attribute}()` in the file and name `reward`",
        )
    if not callable(found):
        raise RewardError(
            f"rewards.funcs: `{spec.entry}` is a {type(found).__name__}, which cannot be called; a function is needed",
            hint="name a function that takes `completions` and returns a list of numbers",
        )
    return found


def _import_module(spec: FunctionSpec) -> ModuleType:
    _importable(os.getcwd())
    try:
        return importlib.import_module(spec.target)
    except ModuleNotFoundError as e:
        missing = e.name or ""
        if not (spec.target == missing or spec.target.startswith(f"{missing}.")):
            raise _import_error(spec, e) from e
        here = [
            p.stem if p.suffix == ".py" else p.name for p in Path.cwd().iterdir() if p.suffix == ".py" or p.is_dir()
        ]
        near = (
            nearest(missing.rpartition(".")[2], here) or f"modules are looked for in {os.getcwd()} and the environment"
        )
        raise RewardError(f"rewards.funcs: there is no module `{missing}` (entry `{spec.entry}`)", hint=near) from e
    except BaseException as e:  # whatever the user's module does on import is its load error
        raise _import_error(spec, e) from e


def _import_file(spec: FunctionSpec) -> ModuleType:
    digest = hashlib.blake2b(os.fsencode(spec.target), digest_size=4).hexdigest()
    name = f"strop_rewards_{Path(spec.target).stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    _importable(str(Path(spec.target).parent))
    found = importlib.util.spec_from_file_location(name, spec.target)
    assert found is not None, "a .py path always has a spec"
    assert found.loader is not None, "a .py path always has a source loader"
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except BaseException as e:  # whatever the user's file does on import is its load error
        raise _import_error(spec, e) from e
    return module


def _importable(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _import_error(spec: FunctionSpec, error: BaseException) -> RewardError:
    if isinstance(error, SyntaxError):
        where = f"{error.filename}, line {error.lineno}"
    else:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
        own = [f for f in frames if f.filename == spec.target] or frames[-1:]
        where = f"{own[-1].filename}, line {own[-1].lineno}"
    return RewardError(
        f"rewards.funcs: `{spec.target}` cannot be imported: {type(error).__name__}: {error} ({where})",
        hint="fix that line, or install what it imports into the environment that runs strop",
    )
