"""Reward functions written for other trainers, called the way their trainers call them.

verl       `compute_score(data_source, solution_str, ground_truth, extra_info, **options)` -> number, or a dict: `score`
OpenRLHF   `reward_func(queries, prompts, labels, **kwargs)` -> tensor or list, or a dict with `rewards`
ms-swift   a class (`ORM`, `AsyncORM`) whose instances take `(completions, **columns)` and return a list
verifiers  a rubric's function of any of `prompt, completion, answer, state, task, info, parser` -> number; with plural
           names (`completions`, `states`, ...) it scores a group

Each becomes a function in TRL's form. What it raises leaves completions unscored as anywhere else; those trainers count
it as 0 or stop. `async def` functions are awaited. Tensors and NumPy scalars are accepted without importing torch.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

from ..errors import RewardError
from ..types import REWARD_KEYWORDS
from .answers import completion_text
from .call import Keywords, RunFacts
from .contract import Declaration, declaration_of, declare
from .options import check_options, construct

_GROUP_NAMES = frozenset({"prompts", "completions", "answers", "states", "tasks", "infos"})
_VERIFIERS_NAMES = frozenset({"prompt", "completion", "answer", "state", "task", "info", "parser"})

Function = Callable[..., Any]


def adapt(form: str, name: str, func: Any, options: Mapping[str, Any], facts: RunFacts) -> Function:
    """Return a function of another trainer in TRL's form, with `options` already given to it.

    What it declares with `@reward` is kept. Raises RewardError if it is not of the form, or does not take an option.
    """
    make = {"verl": _verl, "openrlhf": _openrlhf, "swift": _swift, "verifiers": _verifiers}[form]
    if form == "swift" and inspect.isclass(func):
        func, options = _swift_instance(name, func, options, facts), {}
    if not callable(func) or inspect.isclass(func):
        raise RewardError(
            f"`{form}:` stands before `{name}`, which is a {type(func).__name__}; a function is needed",
            hint="name the function that the other trainer calls",
        )
    adapted = make(name, func, dict(options))
    group = form == "verifiers" and bool(_GROUP_NAMES & set(inspect.signature(func).parameters))
    own = declaration_of(func)
    return declare(adapted, Declaration(own.kind, "group" if group else own.scope, own.low, own.high, own.version))


def _verl(name: str, func: Function, options: dict[str, Any]) -> Function:
    _check(name, options, Keywords(name, func), {"data_source", "solution_str", "ground_truth", "extra_info"})

    def score(completions: Sequence[Any], log_extra: Function, **columns: Any) -> Any:
        rows = _rows(columns, len(completions))
        returned = [
            func(
                data_source=row.get("data_source", ""),
                solution_str=completion_text(completion),
                ground_truth=_ground_truth(name, row),
                extra_info=dict(row.get("extra_info") or {}),
                **options,
            )
            for completion, row in zip(completions, rows, strict=True)
        ]
        return _after(returned, lambda values: _verl_scores(name, values, log_extra))

    return score


def _verl_scores(name: str, values: list[Any], log_extra: Function) -> list[Any]:
    dicts = [value for value in values if isinstance(value, dict)]
    if any("score" not in value for value in dicts):
        raise RewardError(
            f"`verl:` reward `{name}` returned a dict without `score`; it has {', '.join(map(str, dicts[0]))}",
            hint="return a number, or a dict whose `score` is the reward",
        )
    for key in dict.fromkeys(key for value in dicts for key in value if key != "score"):
        log_extra(f"{name}/{key}", [value.get(key) if isinstance(value, dict) else None for value in values])
    return [value["score"] if isinstance(value, dict) else value for value in values]


def _ground_truth(name: str, row: Mapping[str, Any]) -> Any:
    """Where verl's data keep the reference answer, then where Strop's do."""
    model = row.get("reward_model")
    if isinstance(model, Mapping) and "ground_truth" in model:
        return model["ground_truth"]
    for column in ("ground_truth", "answer"):
        if column in row:
            return row[column]
    raise RewardError(
        f"`verl:` reward `{name}` needs a reference answer; the row has {', '.join(sorted(row)) or 'no column'}",
        hint="task.answer_column: name the column; or give the data reward_model.ground_truth, as verl's have it",
    )


def _openrlhf(name: str, func: Function, options: dict[str, Any]) -> Function:
    _check(name, options, Keywords(name, func), {"queries", "prompts", "labels"})

    def score(
        completions: Sequence[Any], prompts: Sequence[Any], prefill: Sequence[str], log_extra: Function,
        log_metric: Function, **columns: Any,
    ) -> Any:  # fmt: skip
        rows = _rows(columns, len(completions))
        texts = [_prompt_text(prompt) + start for prompt, start in zip(prompts, prefill, strict=True)]
        queries = [text + completion_text(completion) for text, completion in zip(texts, completions, strict=True)]
        labels = [row.get("label", row.get("answer", row.get("labels"))) for row in rows]
        returned = func(queries=queries, prompts=texts, labels=labels, **options)
        return _after([returned], lambda values: _openrlhf_scores(name, values[0], log_extra, log_metric))

    return score


def _openrlhf_scores(name: str, returned: Any, log_extra: Function, log_metric: Function) -> Any:
    if not isinstance(returned, Mapping):
        return _as_list(returned)
    if "rewards" not in returned:
        raise RewardError(
            f"`openrlhf:` reward `{name}` returned a dict without `rewards`; it has {', '.join(map(str, returned))}",
            hint="return a tensor, a list, or a dict whose `rewards` has one value per query",
        )
    if returned.get("scores") is not None:
        log_extra(f"{name}/scores", _as_list(returned["scores"]))
    for key, value in (returned.get("extra_logs") or {}).items():
        for number in _as_list(value):
            log_metric(f"{name}/{key}", number)
    return _as_list(returned["rewards"])


def _prompt_text(prompt: Any) -> str:
    """A prompt as text: the contents of a conversation, a blank line after each."""
    return prompt if isinstance(prompt, str) else "".join(f"{message['content']}\n\n" for message in prompt)


def _swift_instance(name: str, cls: type, options: Mapping[str, Any], facts: RunFacts) -> Function:
    """Make the reward object. Where its constructor takes `args`, they hold the options and the length limit."""
    parameters = inspect.signature(cls).parameters
    if "args" not in parameters:
        return construct(name, cls, options)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    arguments = SimpleNamespace(**{"max_completion_length": facts.max_completion_length, **options})
    named = {key: value for key, value in options.items() if takes_all or key in parameters}
    return construct(name, cls, named | {"args": arguments})


def _swift(name: str, func: Function, options: dict[str, Any]) -> Function:
    keywords = Keywords(name, func)
    _check(name, options, keywords, set())

    def score(
        completions: Sequence[Any], prompts: Sequence[Any], trainer_state: Any, completion_ids: Sequence[Any],
        **columns: Any,
    ) -> Any:  # fmt: skip
        texts = [completion_text(completion) for completion in completions]
        kept = {key: value for key, value in columns.items() if key not in REWARD_KEYWORDS}
        available = kept | {
            "completions": texts,
            "messages": [_conversation(p, text) for p, text in zip(prompts, texts, strict=True)],
            "response_token_ids": completion_ids,
            "trainer_state": trainer_state,
            **options,
        }
        return _after([func(**keywords.pick(available, list(kept), "of the task"))], lambda values: values[0])

    return score


def _conversation(prompt: Any, text: str) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    return [*turns, {"role": "assistant", "content": text}]


def _verifiers(name: str, func: Function, options: dict[str, Any]) -> Function:
    keywords = Keywords(name, func)
    _check(name, options, keywords, _VERIFIERS_NAMES | _GROUP_NAMES)
    is_group = bool(_GROUP_NAMES & set(inspect.signature(func).parameters))

    def score(completions: Sequence[Any], prompts: Sequence[Any], **columns: Any) -> Any:
        rows = _rows(columns, len(completions))
        states = [_state(prompt, done, row) for prompt, done, row in zip(prompts, completions, rows, strict=True)]
        if is_group:
            members = {f"{key}s": [state[key] for state in states] for key in ("prompt", "completion", "answer")}
            members |= {"tasks": [s["task"] for s in states], "infos": [s["info"] for s in states], "states": states}
            given = members | {"parser": PlainParser()} | options
            return _after([func(**keywords.pick(given, list(columns), "of the task"))], lambda values: values[0])
        calls = [
            row | {key: state[key] for key in ("prompt", "completion", "answer", "task", "info")}
            | {"state": state, "parser": PlainParser()} | options
            for row, state in zip(rows, states, strict=True)
        ]  # fmt: skip
        return _after([func(**keywords.pick(call, list(columns), "of the task")) for call in calls], list)

    return score


def _state(prompt: Any, completion: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a rubric sees of a rollout with one turn."""
    info = row.get("info", {})
    return {
        "prompt": prompt, "completion": completion, "answer": row.get("answer", ""), "task": row.get("task", "default"),
        "info": json.loads(info) if isinstance(info, str) else info, "turn": 1, "trajectory": [], "responses": [],
    }  # fmt: skip


class PlainParser:
    """The parser that a rubric has by default: the answer is the text of the last assistant message."""

    def parse(self, text: str) -> str:
        """Return the text."""
        return text

    def parse_answer(self, completion: Any) -> str | None:
        """Return the answer of a completion, text or messages."""
        return self.parse(completion_text(completion))

    def get_assistant_messages(self, completion: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
        """Return the assistant's turns."""
        return [message for message in completion if message["role"] == "assistant"]


def _check(name: str, options: Mapping[str, Any], keywords: Keywords, given: Iterable[str]) -> None:
    """Options of such a function are the parameters that its trainer does not give."""
    known = options if keywords.accepted is None else keywords.accepted
    check_options(name, options, set(known) - set(given))


def _rows(columns: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Turn columns into rows, without what is no column of the data."""
    kept = {name: values for name, values in columns.items() if name not in REWARD_KEYWORDS}
    return [{name: values[i] for name, values in kept.items()} for i in range(count)]


def _after(returned: list[Any], finish: Callable[[list[Any]], Any]) -> Any:
    """Return `finish` of what calls returned, or an awaitable of it if one of them has to be awaited."""
    if not any(inspect.isawaitable(value) for value in returned):
        return finish(returned)

    async def wait() -> Any:
        return finish([await value if inspect.isawaitable(value) else value for value in returned])

    return wait()


def _as_list(values: Any) -> Any:
    """A tensor or array as a list; one number as a list of it."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    return values if isinstance(values, list | tuple) else [values]


class _Orm:
    """What ms-swift's base classes of reward functions do."""

    def __init__(self, args: Any = None, **_: Any) -> None:
        self.args = args


def stand_in_for_swift() -> None:
    """Where ms-swift is not installed, offer the names that its plugin files import: two base classes and a table."""
    if "swift" in sys.modules or importlib.util.find_spec("swift") is not None:
        return
    content = {"ORM": type("ORM", (_Orm,), {}), "AsyncORM": type("AsyncORM", (_Orm,), {}), "orms": {}, "__path__": []}
    for name in ("swift", "swift.plugin", "swift.plugin.orm", "swift.rewards", "swift.rewards.orm"):
        sys.modules[name] = ModuleType(name, "Stands in for ms-swift, which is not installed.")
        vars(sys.modules[name]).update(content)
