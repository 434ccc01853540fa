"""What a task offers to the loop, and how the one of a config is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ..config import TaskConfig
from ..errors import ConfigError
from ..types import Problem
from .render import Renderer


class Task(Protocol):
    """Problems with their prompts and reference answers."""

    @property
    def name(self) -> str:
        """Name of the task, or of its data set; problem ids begin with it."""
        ...

    @property
    def default_rewards(self) -> tuple[str, ...]:
        """Built-in rewards that score it when `rewards.funcs` is empty."""
        ...

    @property
    def num_problems(self) -> int | None:
        """Training problems of one epoch; None if they are generated without end."""
        ...

    @property
    def dropped(self) -> Mapping[str, int]:
        """Why and how many problems were left out, e.g. `{"prompt too long": 3}`."""
        ...

    def batch(self, step: int, num_prompts: int) -> tuple[Problem, ...]:
        """Return the problems of a step, no two with one id: a pure function of (seed, step).

        A finite task visits every problem once per epoch; a batch may reach into the next epoch.
        """
        ...

    def held_out(self, count: int) -> tuple[Problem, ...]:
        """Return at most `count` problems that are never trained on, the same ones at every call.

        A smaller count gives the beginning of what a larger one gives.
        """
        ...


_ONLY_FOR: Mapping[str, tuple[str, ...]] = {
    "path": ("gsm8k", "dataset", "gym"),
    "dataset_config": ("gsm8k", "dataset"),
    "train_split": ("gsm8k", "dataset"),
    "prompt_column": ("gsm8k", "dataset"),
    "question_column": ("gsm8k", "dataset"),
    "answer_column": ("gsm8k", "dataset"),
    "template": ("gsm8k", "dataset"),
    "difficulty": ("arithmetic", "countdown"),
    "families": ("arithmetic",),
}
"""Settings that only some tasks read."""


def build_task(config: TaskConfig, renderer: Renderer, *, seed: int, eval_size: int) -> Task:
    """Return the task that `config.name` names; `eval_size` problems at most are held out (0: none).

    Raises ConfigError for a setting that this task would ignore, DataError for data that cannot be used.
    """
    _refuse_ignored(config)
    if config.name == "arithmetic":
        from .arithmetic import ArithmeticTask

        return ArithmeticTask(config, renderer, seed=seed)
    if config.name == "countdown":
        from .countdown import countdown_task

        return countdown_task(config, renderer, seed=seed, eval_size=eval_size)
    if config.name == "gym":
        from .gym import gym_task

        return gym_task(config, renderer, seed=seed, eval_size=eval_size)
    if config.name == "gsm8k":
        from .gsm8k import gsm8k_task

        return gsm8k_task(config, renderer, seed=seed, eval_size=eval_size)
    from .rows import dataset_task

    return dataset_task(config, renderer, seed=seed, eval_size=eval_size)


def _refuse_ignored(config: TaskConfig) -> None:
    for field, tasks in _ONLY_FOR.items():
        given, default = getattr(config, field), TaskConfig.model_fields[field].default
        if config.name not in tasks and given != default:
            raise ConfigError(
                f"task.{field}: {given!r} given, which the task `{config.name}` does not read",
                hint=f"remove it, or set task.name to one that does: {', '.join(tasks)}",
            )
