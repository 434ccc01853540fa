"""Rows as text: the race, what was learnt, what peers tried before, and training without each idea."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

RACE = (
    "workload", "contender", "seed", "ready_s", "first_step_s", "first_step_finished_s", "step_s", "step_s_min",
    "step_s_max", "peak_gib", "generate_s", "train_s", "rollout_tokens_per_s", "trained_tokens_per_s", "mfu_6n",
    "logp_difference",
)  # fmt: skip
LEARNING = ("workload", "contender", "seed", "steps", "trained_s", "greedy_before", "greedy_after", "sampled_before",
            "sampled_after", "first_steps", "last_steps")  # fmt: skip
SWEEP = ("workload", "contender", "micro_batch", "checkpointing", "step_s", "step_s_min", "step_s_max", "peak_gib")
ABLATION = ("workload", "step_s", "step_s_min", "step_s_max", "torch_reserved_gib", "micro_batch_tokens",
            "trained_tokens_per_s", "mfu")  # fmt: skip
SHORT = {
    "first_step_s": "first", "first_step_finished_s": "start+step",
    "micro_batch": "micro-batch", "checkpointing": "checkpoint", "trained_tokens_per_s": "train tok/s",
    "rollout_tokens_per_s": "gen. tok/s", "logp_difference": "|dlogp|", "micro_batch_tokens": "tokens",
    "torch_reserved_gib": "torch GiB",
}  # fmt: skip
MEAN_OF = 10
"""Steps whose mean reward stands for the accuracy at the beginning and at the end."""

Row = dict[str, Any]


def table(rows: Sequence[Row]) -> str:
    """Return all rows as a text: one line each, in up to four tables."""
    swept = [row for row in rows if row.get("sweep")]
    ablation = [row for row in rows if "variant" in row]
    race = [row for row in rows if not row.get("sweep") and "variant" not in row]
    learnt = [_learning(row) for row in race if row.get("curve")]
    parts = [_lines("", RACE, race)]
    parts += [_lines(f"accuracy, and the mean reward of the first and last {MEAN_OF} steps", LEARNING, learnt)]
    parts += [_lines("peers' settings, tried for a few steps", SWEEP, swept)]
    parts += [_lines("the training phase alone, without each idea", ABLATION, ablation)]
    return "\n\n".join(filter(None, parts))


def _learning(row: Row) -> Row:
    rewards = [reward for _, reward in row["curve"] if reward is not None]
    found = {f"{kind}_{when}": (row.get(f"held_out_{when}") or {}).get(kind)
             for kind in ("greedy", "sampled") for when in ("before", "after")}  # fmt: skip
    if rewards:
        found |= {"first_steps": statistics.mean(rewards[:MEAN_OF]), "last_steps": statistics.mean(rewards[-MEAN_OF:])}
    return row | found


def _lines(title: str, columns: Sequence[str], rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    heads = [SHORT.get(column, column) for column in columns]
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines = [
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in [heads, *cells]
    ]
    marked = [lines[0], *("  ".join([line, *_marks(row)]) for line, row in zip(lines[1:], rows, strict=True))]
    return "\n".join([*([f"{title}:"] if title else []), *marked])


def _marks(row: Row) -> list[str]:
    failed = "OUT OF MEMORY" if row.get("out_of_memory") else "FAILED" if "failed" in row else ""
    return [mark for mark in (row.get("variant", ""), failed) if mark]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
