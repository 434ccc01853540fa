"""What a reward function declares about itself: its kind, its scope, its range, its version."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Kind = Literal["correctness", "format", "length", "repetition", "other"]
Scope = Literal["sample", "group"]

_ATTRIBUTE = "__strop_reward__"
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Declaration:
    """The contract of one reward function."""

    kind: Kind = "other"
    """`correctness` decides what counts as a right answer; without any such function those of kind `other` do, and
    without those the ones of kind `format`."""
    scope: Scope = "sample"
    """`sample`: called with lists of one, as completions finish. `group`: once per group, when it is complete."""
    low: float = 0.0
    """Least value."""
    high: float = 1.0
    """Largest value; a completion is right when every correctness function that applies reaches it."""
    version: str = ""
    """Changes whenever a verdict could; stored in the checkpoint. Empty: a digest of the function's source."""


def reward(
    *, kind: Kind = "other", scope: Scope = "sample", low: float = 0.0, high: float = 1.0, version: str = ""
) -> Callable[[F], F]:
    """Declare a reward function: `@reward(kind="length", scope="group")`. Without it, `Declaration()` holds."""
    declaration = Declaration(kind=kind, scope=scope, low=low, high=high, version=version)

    return lambda func: declare(func, declaration)


def declare(func: F, declaration: Declaration) -> F:
    """Attach a declaration to a function and return the function."""
    setattr(func, _ATTRIBUTE, declaration)
    return func


def declaration_of(func: Callable[..., Any]) -> Declaration:
    """Return what a function declares about itself."""
    found = getattr(func, _ATTRIBUTE, None)
    return found if isinstance(found, Declaration) else Declaration()
