"""Tasks made of the rows of a data set: prompt, reference answer, held-out part, and what is dropped."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any

from ..config import TaskConfig
from ..errors import ConfigError, DataError
from ..seeding import derive_seed
from ..types import REWARD_KEYWORDS, Problem
from .data import Rows, Source, open_source
from .order import EpochOrder
from .prompts import compose, system_message
from .readers import Row, is_missing
from .render import Prompt, Renderer, check_messages
from .template import PromptTemplate

_CHUNK = 512
"""Prompts that are tokenised in one call."""


def dataset_task(config: TaskConfig, renderer: Renderer, *, seed: int, eval_size: int) -> RowTask:
    """Return the task over the data set `config.path`.

    Raises ConfigError if no path is given, DataError for data that cannot be used.
    """
    if not config.path:
        raise ConfigError(
            "task.name is `dataset`, and task.path names no data",
            hint="set task.path to a .jsonl, .json, .csv or .parquet file, a folder of them, or a hub id",
        )
    source = open_source(config.path, dataset_config=config.dataset_config)
    rewards = ("math",) if config.answer_column else ()
    return RowTask(source, config, renderer, seed=seed, eval_size=eval_size, default_rewards=rewards)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A row that fits: where it stands, and its rendered prompt to tell duplicates by."""

    index: int
    text: str


class RowTask:
    """Problems from the rows of a data set, in an order that follows from (seed, epoch).

    Each training row is checked, rendered and measured once at the start; a batch renders its own rows again, so only
    the rows themselves stay in memory. `Problem.row` holds every column but the prompt column, and `answer`: the value
    of `task.answer_column`. A training row with the very prompt of a held-out one is dropped.

    `finish` may change the columns of a row; a ValueError that it raises is reported with the row's place.
    """

    def __init__(
        self,
        source: Source,
        config: TaskConfig,
        renderer: Renderer,
        *,
        seed: int,
        eval_size: int,
        default_rewards: tuple[str, ...],
        finish: Callable[[Row], Row] | None = None,
        instruction: str | None = None,
    ) -> None:
        self.default_rewards = default_rewards
        self._config, self._renderer, self._seed = config, renderer, seed
        self._finish, self._instruction = finish, instruction
        self._template = PromptTemplate(config.template) if config.template is not None else None
        self._dropped: dict[str, int] = {}
        if config.eval_split == config.train_split:
            raise ConfigError(
                f"task.train_split and task.eval_split are both `{config.train_split}`",
                hint="set task.eval_split to null to hold out task.eval_size of its rows",
            )
        train = source.read(config.train_split, "task.train_split")
        self.name = train.name
        self._train = train
        fitting = list(self._fitting(train, range(len(train)), "prompt too long"))
        if config.eval_split is None:
            self._eval, held = train, self._hold_out(fitting, eval_size)
        elif eval_size:
            self._eval = source.read(config.eval_split, "task.eval_split")
            order = _shuffled(len(self._eval), "held out") if config.shuffle else range(len(self._eval))
            held = list(islice(self._fitting(self._eval, order, "held-out prompt too long"), eval_size))
        else:
            self._eval, held = train, []
        self._held = [entry.index for entry in held]
        self._training = self._without(fitting, held)
        self._order = EpochOrder(len(self._training), seed=seed, shuffle=config.shuffle)

    @property
    def num_problems(self) -> int | None:
        """Training rows of one epoch, without those that were dropped or held out."""
        return len(self._training)

    @property
    def dropped(self) -> Mapping[str, int]:
        """Rows left out, by reason."""
        return dict(self._dropped)

    def batch(self, step: int, num_prompts: int) -> tuple[Problem, ...]:
        """Return the problems at positions [step * num_prompts, (step + 1) * num_prompts) of the endless order.

        Raises DataError if a step asks for more problems than there are.
        """
        if num_prompts > len(self._training):
            raise DataError(
                f"a step asks for {num_prompts} different problems, `{self.name}` has {len(self._training)}",
                hint=f"set rollout.num_prompts to at most {len(self._training)}, and rollout.num_generations higher",
            )
        positions = self._order.window(step, num_prompts)
        return tuple(self._problem(self._train, self._training[position]) for position in positions)

    def held_out(self, count: int) -> tuple[Problem, ...]:
        """Return the first `count` held-out problems, or all of them if there are fewer."""
        return tuple(self._problem(self._eval, index) for index in self._held[:count])

    def _fitting(self, rows: Rows, indices: Iterable[int], reason: str) -> Iterator[_Entry]:
        """Check and render rows in the order given; yield those within `max_prompt_length`, count the others."""
        pending = iter(indices)
        while chunk := list(islice(pending, _CHUNK)):
            prompts = [self._prompt(rows, index) for index in chunk]
            texts = [self._text(rows, index, prompt) for index, prompt in zip(chunk, prompts, strict=True)]
            for index, text, fits in zip(chunk, texts, self._fits(prompts, texts), strict=True):
                self._columns(rows, index)
                if fits:
                    yield _Entry(index, text)
                else:
                    self._dropped[reason] = self._dropped.get(reason, 0) + 1

    def _fits(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[bool]:
        verdicts = [False] * len(texts)
        for plain in (True, False):
            places = [i for i, prompt in enumerate(prompts) if isinstance(prompt, str) == plain]
            some = self._renderer.fits([texts[i] for i in places], self._config.max_prompt_length, plain=plain)
            for i, verdict in zip(places, some, strict=True):
                verdicts[i] = verdict
        return verdicts

    def _hold_out(self, fitting: Sequence[_Entry], eval_size: int) -> list[_Entry]:
        """Take `eval_size` entries off the training rows, chosen by the seed."""
        if fitting and eval_size >= len(fitting):
            raise DataError(
                f"`{self.name}` has {len(fitting)} usable rows; with {eval_size} held out none is left to train on",
                hint="set task.eval_size to a part of the rows, or task.eval_split to a split of its own",
            )
        return [fitting[i] for i in _shuffled(len(fitting), "held out", self._seed)[:eval_size]]

    def _without(self, fitting: Sequence[_Entry], held: Sequence[_Entry]) -> list[int]:
        if not fitting:
            raise DataError(
                f"`{self.name}`: all {len(self._train)} prompts have more than {self._config.max_prompt_length} tokens",
                hint="raise task.max_prompt_length",
            )
        taken = {entry.index for entry in held} if self._eval is self._train else set()
        texts = {entry.text for entry in held}
        left = [entry.index for entry in fitting if entry.text not in texts]
        doubles = len(fitting) - len(left) - len(taken)
        if doubles:
            self._dropped["prompt is held out"] = doubles
        if not left:
            raise DataError(
                f"`{self.name}`: every training prompt is held out as well",
                hint="task.eval_split has to hold other problems than task.train_split",
            )
        return left

    def _problem(self, rows: Rows, index: int) -> Problem:
        prompt = self._prompt(rows, index)
        token_ids, prefill = self._renderer.render(prompt)
        return Problem(rows.problem_id(index), prompt, token_ids, self._columns(rows, index), prefill)

    def _text(self, rows: Rows, index: int, prompt: Prompt) -> str:
        with _at(rows, index):
            return self._renderer.text(prompt)

    def _prompt(self, rows: Rows, index: int) -> Prompt:
        row, config = rows[index], self._config
        with _at(rows, index):
            if self._template is not None:
                return compose(self._template.fill(row), config, self._renderer, self._instruction)
            as_question = config.prompt_column not in row and config.question_column in row
            setting = "task.question_column" if as_question else "task.prompt_column"
            column = config.question_column if as_question else config.prompt_column
            value = _value(row, column, setting)
            if isinstance(value, str):
                return compose(value, config, self._renderer, self._instruction)
            if as_question or not isinstance(value, list | tuple):
                needed = "text" if as_question else "text or a list of messages"
                raise DataError(
                    f"column `{column}` is a {type(value).__name__}, {needed} is needed",
                    hint=f"{setting} names the column",
                )
            messages = check_messages(value)
            if not config.system_prompt:
                return messages
            if messages[0]["role"] == "system":
                raise DataError(
                    "the row has a system message of its own, and task.system_prompt is set",
                    hint="remove task.system_prompt",
                )
            return (system_message(config.system_prompt, self._renderer), *messages)

    def _columns(self, rows: Rows, index: int) -> Row:
        """The columns that reward functions see."""
        row = {column: value for column, value in rows[index].items() if column != self._config.prompt_column}
        with _at(rows, index):
            for column in REWARD_KEYWORDS:
                if column in row:
                    raise DataError(
                        f"the column `{column}` has a name that reward functions receive something else under",
                        hint="rename the column",
                    )
            if self._config.answer_column:
                row["answer"] = _value(rows[index], self._config.answer_column, "task.answer_column")
            try:
                return self._finish(row) if self._finish else row
            except DataError:
                raise
            except ValueError as e:
                raise DataError(str(e), hint="task.answer_column names the column with the reference answer") from e


@contextmanager
def _at(rows: Rows, index: int) -> Iterator[None]:
    """Put the place of a row before the message of a DataError raised inside."""
    try:
        yield
    except DataError as e:
        raise DataError(f"{rows.where(index)}: {e.message}", hint=e.hint) from e


def _value(row: Row, column: str, setting: str) -> Any:
    if column not in row:
        near = difflib.get_close_matches(column, row, n=1)
        raise DataError(
            f"no column `{column}`; the columns are {', '.join(map(str, row)) or 'none'}",
            hint=f"set {setting} to {f'`{near[0]}`' if near else 'one of them'}",
        )
    if is_missing(row[column]):
        raise DataError(f"column `{column}` is empty ({row[column]!r})", hint=f"remove the row, or change {setting}")
    return row[column]


def _shuffled(size: int, *parts: int | str) -> list[int]:
    order = list(range(size))
    Random(derive_seed("rows", *parts)).shuffle(order)
    return order
