"""GSM8K, grade-school word problems (Cobbe et al., 2021, arXiv:2110.14168)."""

from __future__ import annotations

import re

from ..config import TaskConfig
from .data import open_source
from .prompts import BOXED
from .readers import Row
from .render import Renderer
from .rows import RowTask

HUB_ID, HUB_CONFIG = "openai/gsm8k", "main"
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def gsm8k_task(config: TaskConfig, renderer: Renderer, *, seed: int, eval_size: int) -> RowTask:
    """Return GSM8K from `config.path` (a folder or file in its format), or from the hub if there is none.

    In a row, `answer` is the final number as text without commas, and `solution` what the data set calls answer.
    """
    path = config.path or HUB_ID
    dataset_config = config.dataset_config or (HUB_CONFIG if path == HUB_ID else None)
    return RowTask(
        open_source(path, name="gsm8k", dataset_config=dataset_config),
        config,
        renderer,
        seed=seed,
        eval_size=eval_size,
        default_rewards=("numeric",),
        finish=_finish,
        instruction=BOXED,
    )


def _finish(row: Row) -> Row:
    solution = row.get("answer")
    return row | {"answer": final_number(solution), "solution": solution}


def final_number(solution: object) -> str:
    """Return the number after the last `####` of a solution, without commas and currency.

    Raises ValueError if the solution is not text or does not end so.
    """
    if not isinstance(solution, str):
        raise ValueError(f"the answer is a {type(solution).__name__}, text that ends in `#### 42` is needed")
    _, mark, end = solution.rpartition("####")
    number = end.strip().replace(",", "").replace("$", "")
    if not mark or not _NUMBER.fullmatch(number):
        raise ValueError(f"the answer ends in {solution[-30:]!r}; `#### 42` is needed")
    return number
