"""The canary: a few completions of the first step, scored again now and then; their verdicts must not change.

A reward that gives another value for the same completion (a clock, a random number, a service, an updated package, a
changed row) makes advantages of noise and a resumed run differ from an uninterrupted one. Nothing in the metrics shows
it, so it is tried out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RewardError, RunError
from ..monitor.files import reason_of, to_json, write_atomically
from ..rewards.pool import RewardPool
from ..rewards.verdicts import VerdictLog
from ..tasks.base import Task
from ..types import FinishReason, Problem, Rollout, ScoredRollout, Segment

COMPLETIONS = 16
"""How many are kept at least, in whole groups, since some functions compare the members of a group."""


class VerdictChangedError(RewardError):
    """A reward function gave a stored completion another verdict than before."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One completion with the verdicts that it got first."""

    rollout: Rollout
    scores: dict[str, float | None]
    failed: tuple[str, ...]
    """Functions that failed on it."""


@dataclass(slots=True)
class Canary:
    """The stored completions of a run; `canary.json` in its folder."""

    folder: Path
    step: int
    """The step that they come from: what functions see as `trainer_state.global_step`, each time."""
    num_generations: int
    kept: tuple[Kept, ...]

    @property
    def path(self) -> Path:
        """Where they are stored."""
        return self.folder / "canary.json"

    @classmethod
    def take(cls, folder: Path, step: int, scored_N: Sequence[ScoredRollout], num_generations: int) -> Canary:
        """Keep whole groups of `step`, those with the most different verdicts first, and write them to the run folder.

        Raises RunError when they cannot be written.
        """
        groups = [scored_N[i : i + num_generations] for i in range(0, len(scored_N), num_generations)]
        groups.sort(key=lambda group: -len({tuple(s.scores.values()) for s in group}))
        chosen = groups[: math.ceil(COMPLETIONS / num_generations)]
        kept = tuple(Kept(s.rollout, dict(s.scores), tuple(sorted(s.failures))) for group in chosen for s in group)
        canary = cls(folder, step, num_generations, kept)
        try:
            write_atomically(canary.path, (to_json(canary.as_dict(), indent=1) + "\n").encode("utf-8", "surrogatepass"))
        except OSError as e:
            raise RunError(
                f"{canary.path} cannot be written: {reason_of(e, folder)}",
                hint="free space there and go on with --resume, or set monitor.canary_steps to 0",
            ) from e
        return canary

    @classmethod
    def read(cls, folder: Path, task: Task, num_prompts: int) -> Canary | None:
        """Read what an earlier process kept; None when there is nothing.

        Raises RunError for a file that is damaged or whose problems are no longer what the task gives.
        """
        path = folder / "canary.json"
        try:
            stored = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
            problems = {p.id: p for p in task.batch(stored["step"], num_prompts)}
            kept = tuple(_kept_from(entry, problems) for entry in stored["completions"])
            return cls(folder, stored["step"], stored["num_generations"], kept)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise RunError(
                f"{path} does not fit this run: {type(e).__name__}: {e}",
                hint="restore the file and the data, or remove it: the next step then keeps other completions",
            ) from e

    def as_dict(self) -> dict[str, Any]:
        """Return the content of `canary.json`."""
        return {
            "step": self.step,
            "num_generations": self.num_generations,
            "completions": [
                {
                    "problem": k.rollout.problem.id,
                    "sample": k.rollout.sample_index,
                    "text": k.rollout.text,
                    "token_ids": list(k.rollout.completion_token_ids),
                    "finish_reason": k.rollout.finish_reason,
                    "policy_version": k.rollout.policy_version,
                    "seed": k.rollout.seed,
                    "scores": k.scores,
                    "failed": list(k.failed),
                }
                for k in self.kept
            ],
        }

    def check(self, pool: RewardPool, *, step: int) -> None:
        """Score the completions again; nothing else may be on its way through the pool. `step` is for the message.

        What functions log meanwhile is dropped. Raises VerdictChangedError for a value that is not the very same
        float, or a failure that was none before or is none now, unless a clock decided it (see `rewards.verdicts`).
        """
        scored = pool.score([k.rollout for k in self.kept], group_size=self.num_generations, global_step=self.step)
        pool.take_extras()
        pool.take_metrics()
        for kept, now in zip(self.kept, scored, strict=True):
            for name in kept.scores:
                before, after = kept.scores[name], now.scores.get(name)
                failed = name in now.failures
                if (before, name in kept.failed) == (after, failed) or self._by_clock(name, kept.rollout):
                    continue
                raise VerdictChangedError(
                    f"reward `{name}` gave completion {kept.rollout.sample_index} of {kept.rollout.problem.id} "
                    f"{_shown(before, name in kept.failed)} at step {self.step + 1}, and gives the same completion "
                    f"{_shown(after, failed)}{': ' + now.failures[name] if failed else ''} now, after step {step}; "
                    "rewards have to depend on the completion and its row alone",
                    hint=f"rewards.funcs: look in `{name}` for a clock, a random number, a service or a package that "
                    "was updated; the completions are in canary.json. monitor.canary_steps: 0 turns the check off",
                )

    def _by_clock(self, name: str, rollout: Rollout) -> bool:
        return VerdictLog(self.folder / "verdicts.jsonl").find(name, rollout) is not None


def _kept_from(entry: dict[str, Any], problems: dict[str, Problem]) -> Kept:
    problem, token_ids = problems[entry["problem"]], tuple(entry["token_ids"])
    prompt = problem.prompt_token_ids
    finish_reason: FinishReason = "length" if entry["finish_reason"] == "length" else "stop"
    rollout = Rollout(
        problem=problem,
        sample_index=entry["sample"],
        segments=(
            Segment("prompt", prompt, (False,) * len(prompt)),
            Segment("sampled", token_ids, (True,) * len(token_ids)),
        ),
        text=entry["text"],
        finish_reason=finish_reason,
        policy_version=entry["policy_version"],
        seed=entry["seed"],
    )
    return Kept(rollout, dict(entry["scores"]), tuple(entry["failed"]))


def _shown(value: float | None, failed: bool) -> str:
    if failed:
        return "no value"
    return "None (does not apply)" if value is None else repr(value)
