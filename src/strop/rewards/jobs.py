"""What the pool keeps of a completion on its way: its results, its group, and the work that is made of them."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import RewardError
from ..types import REWARD_KEYWORDS, Rollout
from .call import NOT_PASSED
from .combine import Outcome
from .wire import encode_work


@dataclass(slots=True, eq=False)
class Member:
    """One rollout and what is known of it so far."""

    rollout: Rollout
    completion: bytes
    """The pickled fields of a Completion."""
    group: Group
    outcomes: dict[str, Outcome] = field(default_factory=dict[str, Outcome])
    """By the function's name."""
    extras: dict[str, Any] = field(default_factory=dict[str, Any])
    metrics: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])


@dataclass(slots=True, eq=False)
class Group:
    """The completions of one problem that were sampled from one policy in one batch."""

    size: int | None
    """How many there will be; None: whatever is there when the batch ends."""
    phases: deque[tuple[int, ...]]
    """Functions of group scope that are still to be called, those that others build on first."""
    members: list[Member] = field(default_factory=list[Member])
    open_jobs: int = 0

    @property
    def is_full(self) -> bool:
        """Whether all announced members are there."""
        return self.size is not None and len(self.members) >= self.size

    def in_order(self) -> tuple[Member, ...]:
        """Return the members by sample index, whatever order they finished in."""
        return tuple(sorted(self.members, key=lambda member: member.rollout.sample_index))


@dataclass(slots=True, eq=False)
class Job:
    """A completion, or a group, that functions have yet to score."""

    number: int
    members: tuple[Member, ...]
    group: Group
    remaining: deque[int]
    """Functions that have not answered yet, in order."""
    correct: tuple[bool | None, ...] | None = None
    dropped: bool = False
    """Nobody waits for it any more."""
    suspicion: int = 0
    """How often the process that starts the workers died while this ran."""

    def encoded(self) -> bytes:
        """Return the message that asks a worker for what remains."""
        return encode_work(self.number, self.remaining, self.correct, [member.completion for member in self.members])


def pickled(
    rollout: Rollout, global_step: int, options: Mapping[str, Mapping[str, Any]], *, with_ids: bool = True
) -> bytes:
    """Return the fields of the Completion that functions are shown of a rollout, in the order of that record.

    `with_ids` False: no function asks for token ids, and they would be most of the message. Raises RewardError for a
    column whose name or value cannot be given to a function.
    """
    problem = rollout.problem
    columns = {name: value for name, value in problem.row.items() if name not in NOT_PASSED}
    _check_columns(columns, problem.id, options)
    prompt = problem.prompt
    fields = (
        prompt if isinstance(prompt, str) else [dict(message) for message in prompt],
        rollout.completion,
        _token_ids(rollout) if with_ids else (),
        problem.prefill,
        columns,
        problem.id,
        rollout.seed,
        global_step,
        rollout.is_truncated,
    )
    try:
        return pickle.dumps(fields, 5)
    except Exception as e:  # pickling runs code of whatever the row holds
        bad = [name for name, value in columns.items() if not _can_pickle(value)]
        raise RewardError(
            f"row {problem.id}: the column {', '.join(bad)} cannot be sent to the reward worker: {e}",
            hint="keep to text, numbers, lists, dates and bytes in the columns of the data set",
        ) from e


def _token_ids(rollout: Rollout) -> tuple[int, ...]:
    _, *rest = rollout.segments
    return rest[0].token_ids if len(rest) == 1 else rollout.completion_token_ids


def _check_columns(columns: Mapping[str, Any], where: str, options: Mapping[str, Mapping[str, Any]]) -> None:
    for name in REWARD_KEYWORDS:
        if name in columns:
            raise RewardError(
                f"row {where} has a column `{name}`, a name under which functions receive something else",
                hint=f"rename the column `{name}` of the data set",
            )
    for function, given in options.items():
        for name in given:
            if name in columns:
                raise RewardError(
                    f"row {where} has a column `{name}`, and rewards.options.{function} sets `{name}` as well",
                    hint=f"rename the column `{name}` of the data set, or leave the option out",
                )


def _can_pickle(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        return False
    return True
