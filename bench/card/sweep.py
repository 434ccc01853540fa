"""The race before the race: a peer's fastest micro-batch, with and without checkpointing, in the memory it may take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

MICRO_BATCHES = (16, 32, 64)
STEPS = 6

Row = dict[str, Any]


def sweep(run: Callable[[int, int], Row], limit_gib: float) -> list[Row]:
    """Try each (micro-batch, checkpointing) by `run` and return the rows.

    A larger micro-batch than one that went over the limit, or out of memory, is not tried. Any other failure ends the
    sweep: it says that this contender cannot run at all.
    """
    rows: list[Row] = []
    for checkpointing in (1, 0):
        for micro_batch in MICRO_BATCHES:
            row = run(micro_batch, checkpointing)
            rows.append(row)
            if "failed" in row and not row.get("out_of_memory"):
                return rows
            if not fits(row, limit_gib):
                break
    return rows


def fits(row: Row, limit_gib: float) -> bool:
    """Whether a run came to its end under the limit."""
    return "failed" not in row and row.get("peak_gib") is not None and row["peak_gib"] <= limit_gib


def best(rows: Sequence[Row], limit_gib: float) -> Row | None:
    """Return the row with the fastest step under the limit; None when there is none."""
    fitting = [row for row in rows if fits(row, limit_gib) and row.get("step_s")]
    return min(fitting, key=lambda row: row["step_s"]) if fitting else None
