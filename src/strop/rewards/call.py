"""How one reward function is called, and what it may return: TRL's convention, lists of equal length.

A function of sample scope is called with lists of one completion, a function of group scope with lists of the whole
group in the order of `sample_index`.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import math
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ..errors import RewardError
from ..types import REWARD_KEYWORDS
from .combine import LARGEST, Outcome

NOT_PASSED = ("prompt", "completion", "completion_ids")
"""Columns that TRL keeps from reward functions, since the keywords above stand for them."""
MAX_REASON_CHARS = 500
MAX_PLANS = 64
"""Sets of columns whose passing is remembered."""
MACHINE_ERRNOS = frozenset(
    {errno.ENOMEM, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EIO}
)
"""Errors that say something of the machine at that moment and nothing of the completion."""


@dataclass(slots=True)  # not frozen: a worker makes one per call, and frozen ones take four times as long to make
class Completion:
    """What the functions need of one rollout, as it travels to a worker. Nobody writes to it."""

    prompt: Any
    completion: Any
    completion_ids: tuple[int, ...]
    prefill: str
    columns: Mapping[str, Any]
    where: str
    """Problem id, for messages."""
    seed: int
    global_step: int
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What is the same for every completion of a run."""

    max_completion_length: int | None = None
    """Most tokens of a completion; None where the caller does not say."""
    max_steps: int | None = None
    """What functions see as `trainer_state.max_steps`."""


class Logged:
    """What a function handed to `log_extra` and `log_metric` during one call with `count` completions."""

    __slots__ = ("by_machine", "count", "extras", "metrics")

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self.extras: dict[str, list[Any]] = {}
        self.metrics: list[tuple[str, float]] = []
        self.by_machine = False
        """Whether the call failed for want of memory, disk or processes: another time it might not."""

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Keep one value per completion for the table of rollouts."""
        if not isinstance(values, list | tuple) or len(values) != self.count:
            called = "one completion at a time" if self.count == 1 else "the completions of one group"
            raise RewardError(
                f"log_extra({column!r}, ...) got {_shown(values)}; a list with one value per completion "
                f"({self.count}) is needed",
                hint=f"a function is called with {called}; log as many values as there are completions",
            )
        self.extras[str(column)] = list(values)

    def log_metric(self, name: str, value: float) -> None:
        """Keep a number to be averaged over the step."""
        self.metrics.append((str(name), float(value)))


class Keywords:
    """Which keywords a callable takes, and which it cannot do without."""

    def __init__(self, name: str, func: Callable[..., Any]) -> None:
        """Read the signature. Raises RewardError for parameters that cannot be given by keyword."""
        self._name = name
        self.accepted: frozenset[str] | None = None
        """None: all."""
        self.required: tuple[str, ...] = ()
        self.keyword_only: tuple[str, ...] = ()
        self._required: frozenset[str] = frozenset()
        try:
            parameters = list(inspect.signature(func).parameters.values())
        except (TypeError, ValueError):  # some callables written in C tell nothing
            return
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
        if positional:
            raise RewardError(
                f"reward `{name}` takes {', '.join(positional)} by position only; functions are called with keywords",
                hint="write def reward(completions, **kwargs)",
            )
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.required = tuple(p.name for p in named if p.default is p.empty)
        self._required = frozenset(self.required)
        self.keyword_only = tuple(p.name for p in named if p.kind is p.KEYWORD_ONLY)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            self.accepted = frozenset(p.name for p in named)

    def takes(self, keyword: str) -> bool:
        """Whether the callable can be given this keyword."""
        return self.accepted is None or keyword in self.accepted

    def leave_out_ignored(self, func: Callable[..., Any]) -> None:
        """Take `**_` for what it says: whatever arrives there is ignored, so it need not be given."""
        with contextlib.suppress(TypeError, ValueError):
            parameters = inspect.signature(func).parameters
            if "_" in parameters and parameters["_"].kind is inspect.Parameter.VAR_KEYWORD:
                self.accepted = frozenset(parameters) - {"_"}

    def pick(self, available: Mapping[str, Any], columns: Iterable[str], where: str) -> dict[str, Any]:
        """Return what the callable takes of `available`. Raises RewardError for a keyword that it needs and is not."""
        self.check(available, columns, where)
        return {name: value for name, value in available.items() if self.takes(name)}

    def check(self, available: Mapping[str, Any], columns: Iterable[str], where: str) -> None:
        """Raise RewardError if something that the callable needs is not there."""
        if not available.keys() >= self._required:
            missing = [name for name in self.required if name not in available]
            raise RewardError(
                f"reward `{self._name}` needs the column{'s' * (len(missing) > 1)} {', '.join(missing)}, "
                f"which row {where} does not have; it has {', '.join(sorted(columns)) or 'none'}",
                hint="rename the column of the data set, or take another function in rewards.funcs",
            )


class BoundFunction:
    """A reward function with the keywords that it accepts and the options that it is given."""

    def __init__(
        self,
        name: str,
        func: Callable[..., Any],
        options: Mapping[str, Any] | None = None,
        *,
        facts: RunFacts = RunFacts(),
        pure: bool = False,
    ) -> None:
        """Read the signature. `pure`: one of ours, which draws no random numbers and changes no argument."""
        self.name = name
        self.pure = pure
        self._func = func
        self._keywords = Keywords(name, func)
        self._options = dict(options or {})
        self._facts = facts
        # Keyword-only parameters of ours are options: a column that happens to have such a name is no option.
        own = self._keywords.keyword_only if pure else ()
        self._withheld = frozenset(name for name in own if name not in REWARD_KEYWORDS) | self._options.keys()
        if pure:
            self._keywords.leave_out_ignored(func)
        self._fields = tuple(name for name in REWARD_KEYWORDS if self.takes(name))
        self._passed: dict[tuple[str, ...], tuple[str, ...]] = {}
        """The columns that are given to the function, by the columns that a row has."""

    def __call__(self, completion: Completion, run_async: Callable[[Any], Any]) -> tuple[Outcome, Logged]:
        """Score one completion; see `score`."""
        outcomes, logged = self.score((completion,), run_async)
        return outcomes[0], logged

    def score(
        self,
        completions: Sequence[Completion],
        run_async: Callable[[Any], Any],
        correct: Sequence[bool | None] | None = None,
    ) -> tuple[list[Outcome], Logged]:
        """Score completions in one call. `run_async` waits for what an `async def` function returns.

        `correct` is given to functions of group scope. What the function raises is an Outcome with a failure for each
        completion. Raises RewardError if it breaks the contract: a required column that the row lacks, the wrong number
        of values, or values that are no numbers.
        """
        logged = Logged(len(completions))
        keywords = self._arguments(completions, logged, correct)
        if not self.pure:
            _seed_generators(completions[0].seed)
        try:
            returned = self._func(**keywords)
            if inspect.isawaitable(returned):
                returned = run_async(returned)
        except RewardError:
            raise
        except BaseException as e:  # sys.exit() in a reward function must not end the worker
            logged.by_machine = isinstance(e, MemoryError) or (isinstance(e, OSError) and e.errno in MACHINE_ERRNOS)
            return [Outcome(None, _raised(e))] * len(completions), logged
        return check_values(self.name, returned, len(completions)), logged

    def takes(self, keyword: str) -> bool:
        """Whether the function is given this keyword."""
        return self._keywords.takes(keyword) and keyword not in self._withheld

    def _arguments(
        self, completions: Sequence[Completion], logged: Logged, correct: Sequence[bool | None] | None
    ) -> dict[str, Any]:
        first = completions[0]
        there = tuple(first.columns)
        passed = self._passed.get(there)
        if passed is None:
            passed = tuple(name for name in there if self.takes(name))
            if len(self._passed) < MAX_PLANS:
                self._passed[there] = passed
        given: dict[str, Any] = {name: [c.columns.get(name) for c in completions] for name in passed}
        for name in self._fields:
            match name:
                case "completions":
                    given[name] = [c.completion for c in completions]
                case "prefill":
                    given[name] = [c.prefill for c in completions]
                case "truncated":
                    given[name] = [c.truncated for c in completions]
                case "prompts":
                    given[name] = [c.prompt for c in completions]
                case "completion_ids":
                    given[name] = [list(c.completion_ids) for c in completions]
                case "max_completion_length":
                    given[name] = self._facts.max_completion_length
                case "trainer_state":
                    given[name] = SimpleNamespace(global_step=first.global_step, max_steps=self._facts.max_steps)
                case "log_extra":
                    given[name] = logged.log_extra
                case "log_metric":
                    given[name] = logged.log_metric
                case "correct" if correct is not None:
                    given[name] = list(correct)
                case "correct" if name in self._keywords.required:
                    raise RewardError(
                        f"reward `{self.name}` needs `correct`, which is known only when a whole group has been scored",
                        hint='declare it: @reward(scope="group"), from strop.rewards.contract',
                    )
                case _:
                    pass
        given.update(self._options)
        self._keywords.check(given, first.columns, first.where)
        return given


def check_returned(name: str, returned: Any) -> Outcome:
    """Return the one value of a function as an Outcome; see `check_values`."""
    return check_values(name, returned, 1)[0]


def check_values(name: str, returned: Any, count: int) -> list[Outcome]:
    """Return the values of a function as outcomes; NaN and infinity are failures, None does not apply.

    Booleans count as 0 and 1; NumPy and torch scalars are numbers. Raises RewardError for anything else, or if there
    are not `count` values.
    """
    values = returned
    if type(values) is list and len(values) == count == 1 and type(values[0]) is float and abs(values[0]) <= LARGEST:
        return [Outcome(values[0])]
    if not isinstance(values, list | tuple) and getattr(values, "ndim", 0) == 1 and hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, list | tuple) or len(values) != count:
        called = "one completion at a time" if count == 1 else "the completions of one group"
        raise RewardError(
            f"reward `{name}` returned {_shown(returned)}; a list with one number or None per completion ({count}) is "
            "needed",
            hint=f"return a list as long as `completions` from `{name}`; it is called with {called}",
        )
    return [_outcome(name, value, returned) for value in values]


def _outcome(name: str, value: Any, returned: Any) -> Outcome:
    if value is None:
        return Outcome(None)
    number = value if type(value) is float else _as_float(value)
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
    except Exception:  # whatever an object of the user's raises, it is no number
        return None


def _shown(value: Any) -> str:
    length = f" of length {len(value)}" if isinstance(value, list | tuple | dict | set | str) else ""
    return f"{_text_of(value, repr)[:80]} ({type(value).__name__}{length})"


def _text_of(value: Any, convert: Callable[[Any], str]) -> str:
    """Return the text of an object of the user's, who may have written its conversion, in what can be printed."""
    try:
        text = convert(value)
    except Exception as e:
        text = f"(its text cannot be made: {type(e).__name__})"
    return text[:MAX_REASON_CHARS].encode("utf-8", "backslashreplace").decode()


def _raised(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if len(frames) > 1 else ""
    return f"raised {type(error).__name__}: {_text_of(error, str)}{where}"


def _seed_generators(seed: int) -> None:
    """Seed the global generators per call: a function that draws from them gives the same value on any worker."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    if "torch" in sys.modules:  # the user's functions may have imported it
        sys.modules["torch"].default_generator.manual_seed(seed)
