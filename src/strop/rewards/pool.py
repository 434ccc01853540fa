"""Scores rollouts in worker processes while others still decode.

The pool runs in the trainer's thread: `pump` is called from the decode loop, never waits for a function, reads what is
finished, enforces the limits and hands work out. A worker past its limit is killed and replaced; its completion is
unscored, never 0. A group is scored as a whole when all its members are there and their own functions are done.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from ..errors import RewardError, StropError
from ..types import Rollout, ScoredRollout
from .call import RunFacts
from .combine import Outcome, combine, is_correct, make_rules
from .contract import Declaration
from .crew import Crew, Limits
from .jobs import Group, Job, Member, pickled
from .load import check_entries, read_entries
from .options import check_names
from .verdicts import VerdictLog
from .wire import Report, Setup

if TYPE_CHECKING:
    from ..config import RewardsConfig


def say_on_stderr(text: str) -> None:
    """Print a note where the caller offers no better place."""
    print(f"note: {text}", file=sys.stderr)


class RewardPool:
    """Worker processes with the reward functions of a run; a context manager that kills them on exit.

    Create and close it in a thread that outlives it: on Linux the processes die with the thread that started them.
    """

    def __init__(
        self,
        config: RewardsConfig,
        *,
        default_funcs: Sequence[str],
        verdict_log: Path | None = None,
        output: Path | None = None,
        max_completion_length: int | None = None,
        max_steps: int | None = None,
        note: Callable[[str], None] = say_on_stderr,
        hash_seed: int = 0,
    ) -> None:
        """Read the entries and the verdict log; starts nothing and imports no user code.

        `default_funcs` stands in for an empty `rewards.funcs`. What functions print is appended to `output`, or goes to
        standard error. `max_completion_length` and `max_steps` are what functions may ask for. `hash_seed` is the
        workers' PYTHONHASHSEED. Raises RewardError for an entry, an option or a name that cannot be used, RunError for
        an unreadable log.
        """
        self._specs = read_entries(config.funcs or default_funcs)
        if not self._specs:
            raise RewardError("there is no reward function", hint="name one in rewards.funcs, for example numeric")
        if config.weights and len(config.weights) != len(self._specs):
            raise RewardError(
                f"rewards.weights has {len(config.weights)} values for {len(self._specs)} functions",
                hint="give rewards.weights one value per function, or leave it out",
            )
        self.names: tuple[str, ...] = tuple(spec.name for spec in self._specs)
        self.weights: tuple[float, ...] = config.weights or (1.0,) * len(self._specs)
        check_names("rewards.options", config.options, self.names)
        check_names("rewards.gated", config.gated or (), self.names)
        facts, folders = RunFacts(max_completion_length, max_steps), tuple(folder for folder in sys.path if folder)
        check_entries(self._specs, config.options, facts)
        self._gated, self._options = config.gated, config.options
        setup = Setup(self._specs, folders, config.options, facts, int(config.memory_gib * 2**30))
        self._crew = Crew(setup, Limits(config.workers, config.timeout_s), self, hash_seed)
        self._note = note
        self._verdicts = VerdictLog(verdict_log)
        self._output_path = output
        self._output: IO[bytes] | None = None
        self._files = ExitStack()
        self._members: list[Member] = []
        self._groups: dict[tuple[str, int, int], Group] = {}
        self._jobs: dict[int, Job] = {}
        self._next_number = 0
        self._closing = False
        self._declared: dict[str, Declaration] | None = None
        self._versions: dict[str, str] = {}
        self._with_ids = True
        self._rules = make_rules((), (), {})
        self._sample_functions: tuple[int, ...] = ()
        self._phases: tuple[tuple[int, ...], ...] = ()
        self._extras: dict[str, list[Any]] = {}
        self._metrics: dict[str, list[float]] = {}
        self._error: StropError | None = None

    def __enter__(self) -> RewardPool:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start loading the functions and return at once (see `wait_ready`)."""
        if self._output_path is not None and self._output is None:
            self._output_path.parent.mkdir(parents=True, exist_ok=True)
            self._output = self._files.enter_context(self._output_path.open("ab"))
        self._crew.start(self._output)

    def wait_ready(self) -> None:
        """Block until every function is loaded and every worker runs. Raises RewardError if one cannot be loaded."""
        self.start()
        while not self._crew.is_ready:
            self._turn(block=True)

    def declarations(self) -> dict[str, Declaration]:
        """Return what each function declares, by name; waits until they are loaded. Raises as `wait_ready`."""
        self._raise_error()
        while self._declared is None:
            self.start()
            self._turn(block=True)
        return dict(self._declared)

    def versions(self) -> dict[str, str]:
        """Return the version of each function, by name; waits until they are loaded. Raises as `wait_ready`.

        It is what a function declares, else a digest of the file that it is written in, else `unknown`.
        """
        self.declarations()
        return dict(self._versions)

    def submit(self, rollout: Rollout, *, group_size: int | None = None, global_step: int | None = None) -> None:
        """Queue a finished rollout; `pump` and `collect` do the work.

        `group_size` completions of one problem and one policy version form a group; None: all that are submitted until
        `collect`. Given, functions of group scope run as soon as a group is complete. `global_step` is what functions
        see as `trainer_state.global_step`; by default the rollout's policy version. Raises RewardError for a column
        whose name or value cannot be given to a function.
        """
        self._raise_error()
        self.start()
        step = rollout.policy_version if global_step is None else global_step
        completion = pickled(rollout, step, self._options, with_ids=self._with_ids)
        key = (rollout.problem.id, rollout.policy_version, step)
        group = self._groups.get(key)
        if group is None or group.is_full:
            group = self._groups[key] = Group(group_size, deque(self._phases))
        member = Member(rollout, completion, group)
        group.members.append(member)
        self._members.append(member)
        if self._declared is not None:
            self._admit(member)

    def pump(self) -> None:
        """Read results, enforce limits and hand out work without waiting. Raises RewardError on a broken contract."""
        self._turn(block=False)

    def collect(self) -> list[ScoredRollout]:
        """Block until everything submitted is scored; return it in the order of submission and forget it.

        Raises RewardError if a group lacks members that a function of group scope waits for.
        """
        self._turn(block=False)
        while self._members and self._declared is None:
            self._turn(block=True)
        self._close_groups()
        while self._jobs:
            self._turn(block=True)
        members, self._members, self._closing = self._members, [], False
        self._groups.clear()
        self._keep_logged(members)
        return [combine(m.rollout, self.names, self.weights, m.outcomes, self._rules) for m in members]

    def score(
        self, rollouts: Iterable[Rollout], *, group_size: int | None = None, global_step: int | None = None
    ) -> list[ScoredRollout]:
        """Score rollouts as they arrive; if their iterator raises, those that were submitted are dropped."""
        try:
            for rollout in rollouts:
                self.submit(rollout, group_size=group_size, global_step=global_step)
                self.pump()
            return self.collect()
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Forget everything that was submitted and not collected."""
        for job in self._jobs.values():
            job.dropped = True
            self._crew.forget(job)
        for table in (self._jobs, self._crew.pending, self._members, self._groups):
            table.clear()
        self._closing = False

    def take_metrics(self) -> dict[str, list[float]]:
        """Return what functions gave to `log_metric` for the rollouts of the last `collect`, in order; forget it."""
        taken, self._metrics = self._metrics, {}
        return taken

    def take_extras(self) -> dict[str, list[Any]]:
        """Return the columns given to `log_extra`, aligned with the last `collect` (None where absent); forget them."""
        taken, self._extras = self._extras, {}
        return taken

    def close(self) -> None:
        """Kill the workers and what they started. Safe to call twice."""
        self.discard()
        self._crew.close()
        self._files.close()
        self._output = None

    # --- completions and groups -------------------------------------------------------------------------------------

    def learn(self, ready: Mapping[str, Any]) -> None:
        """Take in what is known of the functions once they are loaded, and admit what was submitted before."""
        first = self._declared is None
        self._declared = {n: Declaration(*d) for n, d in zip(self.names, ready["declared"], strict=True)}
        self._versions = dict(zip(self.names, ready["versions"], strict=True))
        self._with_ids = bool(ready["with_ids"])
        if not first:
            return
        self._rules = make_rules(self.names, self.weights, self._declared, self._gated)
        if self._gated and not self._rules.marks:
            raise RewardError(
                f"rewards.gated holds {', '.join(self._gated)}, and no other function decides what is right",
                hint="rewards.gated: leave out the function that checks the answer",
            )
        for text in ready["notes"]:
            self._note(text)
        grouped = [i for i, name in enumerate(self.names) if self._declared[name].scope == "group"]
        self._sample_functions = tuple(i for i in range(len(self.names)) if i not in grouped)
        deciding = tuple(i for i in grouped if self.names[i] in self._rules.marks)
        others = tuple(i for i in grouped if i not in deciding)
        self._phases = tuple(phase for phase in (deciding, others) if phase)
        for group in dict.fromkeys(member.group for member in self._members):
            group.phases = deque(self._phases)
        for member in self._members:
            self._admit(member)

    def _admit(self, member: Member) -> None:
        self._open(Job(self._next_number, (member,), member.group, deque(self._sample_functions)))

    def _open(self, job: Job) -> None:
        """Queue a job, without the functions whose verdict an earlier run has logged for it."""
        self._next_number += 1
        job.group.open_jobs += 1
        self._jobs[job.number] = job
        for index in tuple(job.remaining) if len(self._verdicts) else ():
            known = (self._verdicts.find(self.names[index], member.rollout) for member in job.members)
            reason = next((found for found in known if found is not None), None)
            if reason is not None:
                job.remaining.remove(index)
                for member in job.members:
                    member.outcomes[self.names[index]] = Outcome(None, reason)
        if job.remaining:
            self._crew.pending.append(job)
        else:
            self._finish(job)

    def _settle(self, job: Job, function: int, outcomes: Sequence[Outcome]) -> None:
        job.remaining.remove(function)
        for member, outcome in zip(job.members, outcomes, strict=True):
            member.outcomes[self.names[function]] = outcome
        if not job.remaining:
            self._finish(job)

    def _finish(self, job: Job) -> None:
        self._crew.forget(job)
        if self._jobs.pop(job.number, None) is not None:
            job.group.open_jobs -= 1
            self._advance(job.group)

    def _advance(self, group: Group) -> None:
        """Call the next functions of group scope once all members and what they build on are there."""
        if group.phases and not group.open_jobs and (group.is_full or self._closing):
            members = group.in_order()
            correct = tuple(is_correct(self._rules, member.outcomes) for member in members)
            self._open(Job(self._next_number, members, group, deque(group.phases.popleft()), correct))

    def _close_groups(self) -> None:
        for group in dict.fromkeys(member.group for member in self._members) if self._phases else ():
            if group.size is not None and not group.is_full:
                names = ", ".join(self.names[index] for phase in self._phases for index in phase)
                raise RewardError(
                    f"problem {group.members[0].rollout.problem.id} has {len(group.members)} of {group.size} "
                    f"completions, and {names} scores whole groups",
                    hint="submit all completions of a group before `collect`, or give no `group_size`",
                )
            self._closing = True
            self._advance(group)

    def _keep_logged(self, members: Sequence[Member]) -> None:
        self._extras, self._metrics = {}, {}
        for row, member in enumerate(members):
            for column, value in member.extras.items():
                self._extras.setdefault(column, [None] * len(members))[row] = value
            for name, value in member.metrics:
                self._metrics.setdefault(name, []).append(value)

    def take(self, job: Job, report: Report) -> None:
        """Keep what a function said of a job; the processes call this, not the trainer."""
        for column, values in report.extras.items():
            for member, value in zip(job.members, values, strict=True):
                member.extras[column] = value
        job.members[0].metrics.extend(report.metrics)
        if report.by_machine:
            self._log(job, report.function, report.outcomes[0].failure)
        self._settle(job, report.function, report.outcomes)

    def take_value(self, job: Job, function: int, value: float | None) -> None:
        """The same for one completion, its value and nothing else."""
        job.remaining.popleft()
        job.members[0].outcomes[self.names[function]] = Outcome(value)
        if not job.remaining:
            self._finish(job)

    def blame(self, job: Job, function: int, reason: str) -> None:
        """Leave what a job was running unscored, for every completion of it; called by the processes."""
        self._log(job, function, reason)
        self._settle(job, function, [Outcome(None, reason)] * len(job.members))

    def _log(self, job: Job, function: int, reason: str) -> None:
        """Put a verdict that says something of the machine on disk, before it is used."""
        self._verdicts.add(self.names[function], [member.rollout for member in job.members], reason)

    def _turn(self, *, block: bool) -> None:
        """Let the processes go on. What it raises once, it raises ever after."""
        self._raise_error()
        try:
            self._crew.turn(block=block)
        except StropError as e:
            self._error = e
            raise

    def _raise_error(self) -> None:
        if self._error is not None:
            raise type(self._error)(self._error.message, hint=self._error.hint)
