"""From an entry of `rewards.funcs` to a function that can be called.

An entry is a built-in name, `package.module:function` or `path.py:function`, the last two after `verl:`, `openrlhf:`,
`swift:` or `verifiers:` for a function that was written for one of these. What is named may be a function in TRL's
form, a callable object, a class of such objects, or a function that makes one. Reading an entry imports nothing of the
user's; that happens in the workers' parent only.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from ..errors import RewardError
from ..types import REWARD_FORMS
from .adapters import adapt, stand_in_for_swift
from .call import BoundFunction, Keywords, RunFacts
from .contract import Declaration, declaration_of
from .library import LIBRARY, PRELOADS
from .options import check_kind, check_options, construct, is_factory, nearest

MANY_TOKENS = 1 << 20
"""Stands in for rollout.max_completion_length where only options are looked at."""
FORMS = "a built-in name, `package.module:function` or `path.py:function`"

__all__ = ["FunctionSpec", "Loaded", "check_entries", "load", "load_function", "nearest", "read_entries"]


@dataclass(frozen=True, slots=True)
class FunctionSpec:
    """Where a reward function is found. `name` is unique within a run and names its scores and metrics."""

    name: str
    entry: str
    kind: Literal["builtin", "module", "file"]
    target: str
    """Built-in name, dotted module, or absolute path."""
    attribute: str = ""
    form: str = "trl"
    """Whose convention it is called by: `trl`, or one of REWARD_FORMS."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A function that is ready to be called, and what is known of it."""

    function: BoundFunction
    declaration: Declaration
    version: str
    """What it declares, else a digest of the file that it is written in."""


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


def check_entries(specs: Sequence[FunctionSpec], options: Mapping[str, Mapping[str, Any]], facts: RunFacts) -> None:
    """Check the options of built-in functions, which needs no code of the user's. Raises RewardError."""
    for spec in specs:
        if spec.kind == "builtin":
            given = options.get(spec.name, {})
            check_options(spec.name, given, Keywords(spec.name, LIBRARY[spec.target]).keyword_only)
            _try_options(spec, given, facts)


def _try_options(spec: FunctionSpec, options: Mapping[str, Any], facts: RunFacts) -> None:
    """Call a built-in function on no completions: they all look at their options first. Raises RewardError."""
    func = LIBRARY[spec.target]
    parameters = inspect.signature(func).parameters
    for name, value in options.items():
        check_kind(f"rewards.options.{spec.name}.{name}", value, parameters[name].default)
    named = {name: [] for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD}
    limit = MANY_TOKENS if facts.max_completion_length is None else facts.max_completion_length
    given: dict[str, Any] = {**named, "answer": [], "max_completion_length": limit, "log_extra": None, **options}
    try:
        func(**given)
    except ImportError:
        return  # the launcher says what is missing
    except (TypeError, ValueError, AttributeError) as e:
        shown = ", ".join(f"{name}: {value!r}"[:80] for name, value in options.items())
        raise RewardError(
            f"rewards.options.{spec.name} cannot be used ({shown}): {e}",
            hint=f"give the options of `{spec.name}` values of the kind that docs/rewards.md names",
        ) from e


def _qualified_name(spec: FunctionSpec) -> str:
    if spec.kind == "builtin":
        return spec.name
    return f"{Path(spec.target).stem if spec.kind == 'file' else spec.target}.{spec.attribute}"


def _read_entry(entry: str) -> FunctionSpec:
    if entry in LIBRARY:
        return FunctionSpec(name=entry, entry=entry, kind="builtin", target=entry)
    form, _, rest = entry.partition(":")
    if form in REWARD_FORMS and ":" in rest:
        return replace(_read_place(entry, rest), form=form)
    return _read_place(entry, entry)


def _read_place(entry: str, place: str) -> FunctionSpec:
    target, colon, attribute = place.rpartition(":")
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


def load(spec: FunctionSpec, options: Mapping[str, Any], facts: RunFacts) -> Loaded:
    """Import what a spec names and make it ready to be called. Runs the user's code.

    Raises RewardError if that cannot be done, or for an option that the function does not have.
    """
    found: Any = load_function(spec)
    kept = dict(options)
    if spec.form != "trl":
        func, kept = adapt(spec.form, spec.name, found, options, facts), {}
    elif inspect.isclass(found) or is_factory(spec.name, found):
        func, kept = construct(spec.name, found, options), {}
    else:
        func = found
        check_options(spec.name, options, Keywords(spec.name, func).keyword_only)
    declaration = declaration_of(func)
    return Loaded(
        BoundFunction(spec.name, func, kept, facts=facts, pure=spec.kind == "builtin"),
        declaration,
        declaration.version or _digest(found),
    )


def _digest(found: Any) -> str:
    """Return a digest of the file that a function or an object's class is written in, `unknown` if there is none."""
    for candidate in (inspect.unwrap(found) if callable(found) else found, type(found)):
        try:
            file = inspect.getsourcefile(candidate)
            if file:
                return f"source {hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest()}"
        except (TypeError, OSError):
            continue
    return "unknown"


def load_function(spec: FunctionSpec) -> Callable[..., Any]:
    """Import what a spec names and return it as it is. Runs the user's code.

    Raises RewardError if the module cannot be imported or has no such function, or if it is not callable.
    """
    if spec.kind == "builtin":
        PRELOADS.get(spec.target, lambda: None)()
        return LIBRARY[spec.target]
    if spec.form == "swift":
        stand_in_for_swift()
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
