"""How one reward function is called, and what it may return: TRL's convention with lists of length one."""

from __future__ import annotations

import inspect
import math
import os
import random
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ..errors import RewardError
from .combine import LARGEST, Outcome

NOT_PASSED = ("prompt", "completion", "completion_ids")
"""Columns that TRL keeps from reward functions, since the keywords above stand for them."""
MAX_REASON_CHARS = 500


@dataclass(frozen=True, slots=True)
class Completion:
    """What the functions need of one rollout, as it travels to a worker."""

    prompt: Any
    completion: Any
    completion_ids: tuple[int, ...]
    prefill: str
    columns: Mapping[str, Any]
    where: str
    """Problem id, for messages."""
    seed: int
    global_step: int


@dataclass(slots=True)
class Logged:
    """What a function handed to `log_extra` and `log_metric` during one call."""

    extras: dict[str, Any] = field(default_factory=dict)
    metrics: list[tuple[str, float]] = field(default_factory=list)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Keep one value per completion for the table of rollouts."""
        if not isinstance(values, list | tuple) or len(values) != 1:
            raise RewardError(
                f"log_extra({column!r}, ...) got {_shown(values)}; a list with one value per completion (1) is needed",
                hint="a function is called with one completion at a time; log as many values as there are completions",
            )
        self.extras[str(column)] = values[0]

    def log_metric(self, name: str, value: float) -> None:
        """Keep a number to be averaged over the step."""
        self.metrics.append((str(name), float(value)))


class BoundFunction:
    """A reward function with the keywords that it accepts."""

    def __init__(self, name: str, func: Callable[..., Any]) -> None:
        self.name = name
        self._func = func
        self._accepted, self._required = _keywords(name, func)

    def __call__(self, completion: Completion, run_async: Callable[[Any], Any]) -> tuple[Outcome, Logged]:
        """Score one completion. `run_async` waits for what an `async def` function returns.

        What the function raises is an Outcome with a failure. Raises RewardError if it breaks the contract: a required
        column that the row lacks, the wrong number of values, or values that are no numbers.
        """
        logged = Logged()
        keywords = self._arguments(completion, logged)
        _seed_generators(completion.seed)
        try:
            returned = self._func(**keywords)
            if inspect.isawaitable(returned):
                returned = run_async(returned)
        except RewardError:
            raise
        except BaseException as e:  # sys.exit() in a reward function must not end the worker
            return Outcome(None, _raised(e)), logged
        return check_returned(self.name, returned), logged

    def _arguments(self, completion: Completion, logged: Logged) -> dict[str, Any]:
        columns = {name: [value] for name, value in completion.columns.items()}
        available = columns | {
            "prompts": [completion.prompt],
            "completions": [completion.completion],
            "completion_ids": [list(completion.completion_ids)],
            "prefill": [completion.prefill],
            "trainer_state": SimpleNamespace(global_step=completion.global_step),
            "log_extra": logged.log_extra,
            "log_metric": logged.log_metric,
        }
        missing = [name for name in self._required if name not in available]
        if missing:
            raise RewardError(
                f"reward `{self.name}` needs the column{'s' * (len(missing) > 1)} {', '.join(missing)}, "
                f"which row {completion.where} does not have; it has {', '.join(sorted(columns)) or 'none'}",
                hint="rename the column of the data set, or take another function in rewards.funcs",
            )
        if self._accepted is None:
            return available
        return {name: value for name, value in available.items() if name in self._accepted}


def _keywords(name: str, func: Callable[..., Any]) -> tuple[frozenset[str] | None, tuple[str, ...]]:
    """Return the keywords that a function accepts (None: all) and those that it cannot do without."""
    try:
        parameters = inspect.signature(func).parameters.values()
    except (TypeError, ValueError):  # some callables written in C tell nothing
        return None, ()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if positional:
        raise RewardError(
            f"reward `{name}` takes {', '.join(positional)} by position only; functions are called with keywords",
            hint="write def reward(completions, **kwargs)",
        )
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = tuple(p.name for p in named if p.default is p.empty)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return None if takes_all else frozenset(p.name for p in named), required


def check_returned(name: str, returned: Any) -> Outcome:
    """Return the one value of a function as an Outcome; NaN and infinity are failures, None does not apply.

    Booleans count as 0 and 1; NumPy and torch scalars are numbers. Raises RewardError for anything else.
    """
    values = returned
    if not isinstance(values, list | tuple) and getattr(values, "ndim", 0) == 1 and hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, list | tuple) or len(values) != 1:
        raise RewardError(
            f"reward `{name}` returned {_shown(returned)}; a list with one number or None per completion (1) is needed",
            hint=f"return a list as long as `completions` from `{name}`; it is called with one completion at a time",
        )
    value = values[0]
    if value is None:
        return Outcome(None)
    number = _as_float(value)
    if number is None:
        raise RewardError(
            f"reward `{name}` returned {_shown(returned)}; its value is a {type(value).__name__}, "
            "a number or None is needed",
            hint=f"return a list of float or None from `{name}`",
        )
    return Outcome(number) if abs(number) <= LARGEST else Outcome(None, f"returned {number:g}")


def _as_float(value: Any) -> float | None:
    """Return a scalar of any library as a float, None for what is no number."""
    if isinstance(value, str | bytes) or not hasattr(value, "__float__") or len(getattr(value, "shape", ())) != 0:
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        return None


def _shown(value: Any) -> str:
    length = f" of length {len(value)}" if isinstance(value, list | tuple | dict | set | str) else ""
    return f"{repr(value)[:80]} ({type(value).__name__}{length})"


def _raised(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if len(frames) > 1 else ""
    return f"raised {type(error).__name__}: {str(error)[:MAX_REASON_CHARS]}{where}"


def _seed_generators(seed: int) -> None:
    """Seed the global generators per completion: a function that draws from them gives the same value on any worker."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
