"""The bench's side of the lab: orders, deadlines, and what came back."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...types import Problem, Rollout
from ..call import NOT_PASSED, Completion, RunFacts
from ..load import read_entries
from .bench import Bench
from .lab import Order
from .records import Attempt

TASKS = ("values", "repeat", "lists", "purity", "columns", "threads", "latency", "growth")
NUM_ROWS = 4
TASK_LIMIT_S = 40.0
MAX_COLUMNS = 6
ABSENT = (("None", None), ("empty", ""), ("blank", "  "), ("NaN", float("nan")))
"""What a table holds where there is nothing."""


class Laboratory:
    """Runs the lab once for all probes that need it, and again under other circumstances."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._results: dict[str, Any] | None = None
        self.trouble = ""
        """Why later tasks have no result, or an empty string."""
        self.damaged: list[tuple[str, str, Problem]] = []
        """(column, damage, problem) in the order of the lab's rows."""

    def result(self, task: str) -> Any:
        """Return the result of a task, or None if it did not come to an end; then `trouble` says why."""
        if self._results is None:
            self._results, self.trouble = self.run(self._order([t for t in TASKS if t in self._bench.lab_tasks]))
        return self._results.get(task)

    def run(self, order: Order, environment: Mapping[str, str] | None = None) -> tuple[dict[str, Any], str]:
        """Run one process to its end or to its deadline; return results by task, and trouble."""
        with tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as inbox:
            inbox.write(pickle.dumps(order))
            inbox.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "strop.rewards.audit.lab"],
                stdin=inbox, stdout=subprocess.PIPE, stderr=log,
                env=lab_environment() | dict(environment or {}), start_new_session=True,
            )  # fmt: skip
            try:
                output, _ = process.communicate(timeout=TASK_LIMIT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
            results = {}
            for line in output.decode("utf-8", "replace").splitlines():
                report = json.loads(line)
                results[report["task"]] = report["result"]
            missing = [task for task in order.tasks if task not in results]
            if not missing:
                return results, ""
            log.seek(0)
            last = log.read().decode("utf-8", "replace").strip().splitlines()[-1:]
            how = "did not end" if process.returncode == -signal.SIGKILL else f"ended with code {process.returncode}"
            return results, f"the process {how} in `{missing[0]}` {' '.join(last)}".strip()

    def order(self, *tasks: str) -> Order:
        """Return an order for these tasks."""
        return self._order(tasks)

    def _order(self, tasks: Sequence[str]) -> Order:
        bench, setting = self._bench, self._bench.setting
        attempts = [list(_attempts(bench, index)) for index in range(min(NUM_ROWS, len(setting.problems)))]
        scored = bench.score_groups(attempts)
        damaged = list(_damaged_rows(bench))
        self.damaged = [(column, damage, problem) for column, damage, problem in damaged]
        return Order(
            specs=read_entries(setting.config.funcs or setting.default_funcs),
            options=dict(setting.config.options),
            facts=RunFacts(setting.max_completion_length, setting.max_steps),
            sys_path=tuple(folder for folder in sys.path if folder),
            groups=tuple(tuple(completion_of(bench.rollout(a, i)) for i, a in enumerate(group)) for group in attempts),
            correct=tuple(tuple(one.correct for one in group) for group in scored),
            tasks=tuple(tasks),
            rows=tuple(
                (column, damage, tuple(completion_of(bench.rollout(a)) for a in damaged_attempts(bench, problem)))
                for column, damage, problem in damaged
            ),
        )


def _attempts(bench: Bench, index: int) -> list[Attempt]:
    """Return completions of one problem that send a function through its branches; as many for every problem."""
    problem = bench.setting.problems[index]
    row = next((row for row in bench.rows if row.problem.id == problem.id), None)
    right, wrong = (row.right, row.wrong) if row else ("a", r"\boxed{b}")
    formula = row.write(r"\frac{x+1}{2} + 3*4") if row else r"\boxed{\frac{x+1}{2} + 3*4}"
    return [
        Attempt(problem, right), Attempt(problem, wrong), Attempt(problem, ""), Attempt(problem, formula),
        Attempt(problem, bench.filler(20, index), truncated=True),
        Attempt(problem, f"{bench.filler(10, index)} {right}"),
    ]  # fmt: skip


def damaged_attempts(bench: Bench, problem: Problem) -> list[Attempt]:
    """Return what is tried on a damaged row: the right answer, nothing, and words."""
    row = next((row for row in bench.rows if row.problem.id == problem.id), None)
    texts = [row.right if row else r"\boxed{1}", "", r"\boxed{}", "nan", "None", bench.filler(20)]
    return [Attempt(problem, text) for text in texts]


def _damaged_rows(bench: Bench) -> list[tuple[str, str, Problem]]:
    """Return a problem for each column and way of damaging it."""
    problem = bench.setting.problems[0]
    found = []
    for column in list(problem.row)[:MAX_COLUMNS]:
        sure = column in bench.setting.sure_columns
        for damage, value in (*(() if sure else ABSENT), ("a list", []), ("without an answer", "see the figure")):
            found.append((column, damage, replace(problem, row={**problem.row, column: value})))
        if sure:
            continue
        rest = {name: value for name, value in problem.row.items() if name != column}
        found.append((column, "missing", replace(problem, row=rest)))
    return found


def completion_of(rollout: Rollout) -> Completion:
    """Return what functions are told about a rollout."""
    problem = rollout.problem
    prompt = problem.prompt if isinstance(problem.prompt, str) else [dict(message) for message in problem.prompt]
    return Completion(
        prompt=prompt,
        completion=rollout.completion,
        completion_ids=rollout.completion_token_ids,
        prefill=problem.prefill,
        columns={name: value for name, value in problem.row.items() if name not in NOT_PASSED},
        where=problem.id,
        seed=rollout.seed,
        global_step=0,
        truncated=rollout.is_truncated,
    )


def lab_environment() -> dict[str, str]:
    """Return this process's environment with `strop` importable and hashes of strings fixed."""
    root = Path(__file__).resolve().parents[3]
    known = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join([*known, str(root)])}
