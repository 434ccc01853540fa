"""Parameters of reward functions from `rewards.options`, checked before they are used."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

from ..errors import RewardError
from ..types import REWARD_KEYWORDS
from .call import Keywords

Function = Callable[..., Any]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean `x`?" for the nearest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else ""


def check_names(setting: str, given: Iterable[str], names: Iterable[str]) -> None:
    """Raise RewardError for a name in a setting that is no function of the run."""
    known = list(names)
    for name in given:
        if name not in known:
            raise RewardError(
                f"{setting} names `{name}`, which is no function of this run",
                hint=nearest(name, known) or f"rewards.funcs has {', '.join(known)}",
            )


def check_options(name: str, options: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise RewardError for an option that is not among the known ones."""
    names = sorted(set(known) - set(REWARD_KEYWORDS))
    for option in options:
        if option not in names:
            raise RewardError(
                f"rewards.options.{name}: there is no option `{option}`",
                hint=nearest(option, names) or f"`{name}` has {', '.join(names) or 'no options'}",
            )


def check_kind(setting: str, value: Any, default: Any) -> None:
    """Raise RewardError for a value that is no switch where the default is one, or no number where it is a number."""
    if isinstance(default, bool):
        fits, needed = isinstance(value, bool), "true or false"
    else:
        fits = not isinstance(default, Real) or (isinstance(value, Real) and not isinstance(value, bool))
        needed = "a number"
    if not fits:
        raise RewardError(f"{setting} is {value!r}; {needed} is needed", hint=f"the default is {default!r}")


def is_factory(name: str, func: Function) -> bool:
    """Whether a callable takes nothing that a reward function is given: then it makes one, as TRL's `get_...` do."""
    keywords = Keywords(name, func)
    return keywords.accepted is not None and not keywords.accepted & set(REWARD_KEYWORDS)


def construct(name: str, factory: Function, options: Mapping[str, Any]) -> Function:
    """Call a class or a factory with the options of a function. Raises RewardError where that gives no function."""
    keywords = Keywords(name, factory)
    if keywords.accepted is not None:
        check_options(name, options, keywords.accepted)
    lacking = [key for key in keywords.required if key not in options]
    if lacking:
        raise RewardError(
            f"`{name}` takes no `completions`, so it is called once to make a reward function, and for that it needs "
            f"{', '.join(lacking)}",
            hint=f"rewards.options.{name}: give {', '.join(lacking)}; or let the function take `completions`",
        )
    try:
        made = factory(**options)
    except Exception as e:
        raise RewardError(
            f"`{name}` did not make a reward function: {type(e).__name__}: {e}", hint=f"look at rewards.options.{name}"
        ) from e
    if not callable(made):
        raise RewardError(
            f"`{name}` makes a {type(made).__name__}, which cannot be called; a function is needed",
            hint="give the class a __call__(self, completions, **kwargs), or name another function",
        )
    return made
