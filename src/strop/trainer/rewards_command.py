"""`strop rewards check` and `strop rewards audit`: from a config to rows, and from rows to the rewards of the run.

Nothing here loads weights or an engine.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import DataError, RewardError
from ..objective.samples import make_samples
from ..rewards.audit.records import Advantages, Setting
from ..rewards.audit.registry import Probe
from ..rewards.audit.report import Report, print_report
from ..rewards.audit.run import choose, run_audit
from ..rewards.check import CheckResult, run_check
from ..tasks.base import Task, build_task
from ..tasks.render import Renderer
from ..types import Problem, ScoredRollout
from .parts import Prepared, length_shaping, model_path

CHECK_ROWS = 8
WIDTH_OF_A_FILE = 160
"""Columns of the table where it does not go to a terminal."""


def check_config(
    config: Config, *, rows: int = CHECK_ROWS, seed: int = 0, gold: str | None = None, known_good: Path | None = None
) -> CheckResult:
    """Check the rewards of a config on rows of its task. Raises a StropError for what cannot be loaded."""
    setting = open_setting(config, rows=rows, seed=seed, gold=gold, known_good=known_good)
    return run_check(setting)


def audit_config(
    config: Config,
    *,
    rows: int,
    seed: int = 0,
    gold: str | None = None,
    known_good: Path | None = None,
    only: Sequence[str] = (),
    without: Sequence[str] = (),
    on_probe: Callable[[Probe], None] = lambda probe: None,
) -> Report:
    """Audit the rewards of a config. Raises a StropError for what cannot be loaded, or breaks its contract."""
    probes = choose(only, without)
    setting = open_setting(config, rows=rows, seed=seed, gold=gold, known_good=known_good)
    return run_audit(setting, probes, on_probe=on_probe)


def check_before_training(prepared: Prepared, note: Callable[[str], None], say: Callable[[str], None]) -> None:
    """Check the rewards of a run that is about to start; say what was found. Raises RewardError on what stops it."""
    config = prepared.config
    if not config.rewards.check:
        say("reward functions are not checked before step 0 (rewards.check: false)")
        return
    problems = first_problems(prepared.task, config.rollout.num_prompts, CHECK_ROWS)
    setting = make_setting(config, prepared.task, prepared.source, problems)
    result = run_check(setting, starting=True)
    for complaint in result.complaints:
        if complaint.severity == "WARN":
            note(f"check of reward functions: {complaint.message}\n  hint: {complaint.hint}")
    result.raise_if_failed()


def check_report_path(path: Path) -> None:
    """Raise RewardError where a report cannot be written, before the audit takes its time."""
    if path.is_dir() or not path.parent.is_dir():
        raise RewardError(f"--json: `{path}` cannot be written", hint="name a file in a folder that exists")


def show_audit(report: Report, path: Path | None) -> None:
    """Print a report as a table, and write it to `path` as JSON. Raises RewardError where that cannot be written."""
    from rich.console import Console

    wide = not sys.stdout.isatty()
    print_report(report, Console(width=WIDTH_OF_A_FILE if wide else None, soft_wrap=False))
    if path is not None:
        try:
            path.write_text(json.dumps(report.as_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as e:
            raise RewardError(
                f"--json: `{path}` cannot be written: {e}", hint="name a file in a folder that exists"
            ) from e


def open_setting(
    config: Config, *, rows: int, seed: int = 0, gold: str | None = None, known_good: Path | None = None
) -> Setting:
    """Open the tokenizer and the task of a config and take `rows` of its problems, other ones for another seed."""
    from ..policy.load import open_model

    source = open_model(model_path(config), config.model.quantization)
    renderer = Renderer(source.tokenizer, chat_template_kwargs=config.task.chat_template_kwargs)
    task = build_task(config.task, renderer, seed=config.run.seed, eval_size=config.task.eval_size)
    count = rows if task.num_problems is None else min(rows, task.num_problems)
    problems = task.batch(seed, count)
    if gold is not None:
        _check_column(problems, gold)
    known = {} if known_good is None else read_known_good(known_good, problems)
    return make_setting(config, task, source, problems, seed=seed, gold=gold, known_good=known)


def make_setting(
    config: Config,
    task: Task,
    source: Any,
    problems: Sequence[Problem],
    *,
    seed: int = 0,
    gold: str | None = None,
    known_good: dict[str, str] | None = None,
) -> Setting:
    """Return what the check and the audit need to know of a run; `source` is its ModelSource."""

    def encode(text: str) -> Sequence[int]:
        return source.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]

    return Setting(
        config=config.rewards,
        default_funcs=task.default_rewards,
        problems=tuple(problems),
        encode=encode,
        stop_token_id=source.stop_token_ids[0],
        max_completion_length=config.rollout.max_completion_length,
        num_generations=config.rollout.num_generations,
        num_prompts=config.rollout.num_prompts,
        max_steps=config.run.max_steps,
        scale_rewards=config.objective.scale_rewards,
        advantages=advantages_of(config),
        seed=seed,
        gold_column=gold,
        sure_columns=frozenset({"answer"} if config.task.answer_column is not None else ()),
        known_good=known_good or {},
    )


def advantages_of(config: Config) -> Advantages:
    """Return the function from scored groups to the advantages that a run of this config trains with."""
    objective = config.objective

    def advantages(scored_N: Sequence[ScoredRollout], num_generations: int) -> Sequence[float | None]:
        return make_samples(
            scored_N,
            num_generations,
            loss_type=objective.loss_type,
            scale_rewards=objective.scale_rewards,
            max_completion_length=config.rollout.max_completion_length,
            mask_truncated_completions=objective.mask_truncated_completions,
            keep_groups_without_signal=objective.beta > 0,
            shaping=length_shaping(config),
        ).advantages_N

    return advantages


def first_problems(task: Task, num_prompts: int, wanted: int) -> tuple[Problem, ...]:
    """Return the first problems that training will see, at least `wanted` of them where there are so many."""
    found: dict[str, Problem] = {}
    for step in range(-(-wanted // num_prompts)):
        found.update((problem.id, problem) for problem in task.batch(step, num_prompts))
    return tuple(found.values())[:wanted]


def read_known_good(path: Path, problems: Sequence[Problem]) -> dict[str, str]:
    """Read completions that are known to be right: JSON lines with `id` (a problem's) and `completion`.

    Raises DataError for a file that cannot be read, or that knows none of the problems.
    """
    known: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"--known-good: `{path}` cannot be read: {e}", hint="give a file of JSON lines") from e
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line) if line.strip() else None
        except ValueError as e:
            raise DataError(f"{path}:{number}: no JSON: {e}", hint=_KNOWN_GOOD) from e
        if entry is None:
            continue
        identity, text = (entry.get("id"), entry.get("completion")) if isinstance(entry, dict) else (None, None)
        if not isinstance(identity, str) or not isinstance(text, str):
            raise DataError(f"{path}:{number}: `id` and `completion`, both text, are needed", hint=_KNOWN_GOOD)
        known[identity] = text
    ids = {problem.id for problem in problems}
    if not known.keys() & ids:
        raise DataError(
            f"--known-good: `{path}` has completions of {len(known)} problems, none of them tried here",
            hint=f"ids look like {next(iter(ids))}",
        )
    return {identity: text for identity, text in known.items() if identity in ids}


_KNOWN_GOOD = '{"id": "gsm8k/train/17", "completion": "... #### 42"} on each line'


def _check_column(problems: Sequence[Problem], column: str) -> None:
    if not any(column in problem.row for problem in problems):
        known = ", ".join(problems[0].row) or "none"
        raise RewardError(f"--gold names the column `{column}`; rows have {known}", hint="name one of these columns")
