"""Tasks without rows: every problem is drawn from a seed that follows from (run seed, problem number)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import TaskConfig
from ..errors import DataError
from ..seeding import derive_seed
from ..types import Problem
from .prompts import compose
from .render import Renderer

HELD_OUT_SHARE = 8
"""One instance in this many is held out, chosen by a hash of what makes it the same problem."""
MAX_TRIES = 1000
"""Draws that may be rejected in a row before the space of problems counts as exhausted."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One problem as it comes from a generator."""

    key: str
    """Two problems with the same key are the same problem."""
    question: str
    row: Mapping[str, Any]


class GeneratedTask:
    """Problem i of a run is the first draw from the seeds (task, run seed, i, try) that belongs to the training side.

    Held-out problems do not depend on the run's seed, so runs can be compared; a hash of the key keeps them apart from
    training problems of any seed.
    """

    num_problems: int | None = None

    def __init__(
        self,
        name: str,
        draw: Callable[[int], Draw],
        default_rewards: tuple[str, ...],
        config: TaskConfig,
        renderer: Renderer,
        *,
        seed: int,
        eval_size: int,
        instruction: str | None = None,
    ) -> None:
        self.name = name
        self.default_rewards = default_rewards
        self._draw, self._instruction = draw, instruction
        self._config, self._renderer = config, renderer
        self._seed, self._eval_size = seed, eval_size
        self._too_long: set[tuple[str, int]] = set()
        self._held_out: list[Problem] = []
        self._held_out_source = self._find_held_out()

    @property
    def dropped(self) -> Mapping[str, int]:
        """Draws that were replaced because of their length, among the problems asked for so far."""
        return {"prompt too long": len(self._too_long)} if self._too_long else {}

    def batch(self, step: int, num_prompts: int) -> tuple[Problem, ...]:
        """Return problems step * num_prompts onwards. Raises DataError if nearly every draw is too long."""
        first = step * num_prompts
        return tuple(self._training_problem(i) for i in range(first, first + num_prompts))

    def held_out(self, count: int) -> tuple[Problem, ...]:
        """Return up to min(count, eval_size) distinct problems; fewer only if no more are found."""
        wanted = min(count, self._eval_size)
        while len(self._held_out) < wanted and (problem := next(self._held_out_source, None)):
            self._held_out.append(problem)
        return tuple(self._held_out[:wanted])

    def _find_held_out(self) -> Iterator[Problem]:
        """Yield distinct held-out problems; ends after MAX_TRIES draws in a row without a new one."""
        seen: set[str] = set()
        index = rejected = 0
        while rejected < MAX_TRIES:
            draw = self._draw(derive_seed(self.name, "held out", index))
            problem = None
            if self._is_held_out(draw) and draw.key not in seen:
                seen.add(draw.key)
                problem = self._problem(f"{self.name}/test/{index}", draw, attempt=0)
            index, rejected = index + 1, rejected + 1
            if problem is not None:
                rejected = 0
                yield problem

    def _training_problem(self, index: int) -> Problem:
        for attempt in range(MAX_TRIES):
            draw = self._draw(derive_seed(self.name, "train", self._seed, index, attempt))
            if self._is_held_out(draw):
                continue
            problem = self._problem(f"{self.name}/train/{index}", draw, attempt)
            if problem is not None:
                return problem
        raise DataError(
            f"task `{self.name}`: none of {MAX_TRIES} draws gave a training problem with at most "
            f"{self._config.max_prompt_length} prompt tokens",
            hint="raise task.max_prompt_length, or take another task",
        )

    def _is_held_out(self, draw: Draw) -> bool:
        return derive_seed("held out", self.name, draw.key) % HELD_OUT_SHARE == 0

    def _problem(self, problem_id: str, draw: Draw, attempt: int) -> Problem | None:
        prompt = compose(draw.question, self._config, self._renderer, self._instruction)
        token_ids, prefill = self._renderer.render(prompt)
        if len(token_ids) > self._config.max_prompt_length:
            self._too_long.add((problem_id, attempt))
            return None
        return Problem(id=problem_id, prompt=prompt, prompt_token_ids=token_ids, row=draw.row, prefill=prefill)
