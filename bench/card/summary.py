"""From a contender's events to the columns of its row."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from peaks import peak_tflops
from workloads import SHAPES, Workload, linear_parameters

REQUIRED = ("workload", "contender", "step_s", "first_step_s", "ready_s", "peak_gib", "card", "commit", "versions")
"""Every row has these; null where one has no meaning or is not known."""
PHASES = ("generate_s", "publish_s", "prepare_s", "train_s")
"""What a peer's step event may hold, see peer.py."""

Event = dict[str, Any]


def complete(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with all required columns."""
    return dict.fromkeys(REQUIRED) | row


def summarise(
    work: Workload, events: Sequence[Event], started: float, card: str, parameters: int | None = None
) -> dict[str, Any]:
    """Turn a contender's events into the columns of its row.

    `started` is the time of the command; `parameters` the weights that a token is multiplied with, where the workload
    has no shape of its own. `mfu_6n` = 6 x parameters x tokens per second of training / peak.
    """
    by_name: dict[str, list[Event]] = {}
    for event in events:
        by_name.setdefault(event["event"], []).append(event)
    row: dict[str, Any] = {}
    if "ready" in by_name:
        row["ready_s"] = round(by_name["ready"][0]["time"] - started, 1)
    timed = by_name.get("step", [])
    steps = [event["seconds"] for event in timed]
    row |= _from_steps(timed)
    for event in by_name.get("metrics", []):
        steps = [metrics["step_time"] for metrics in event["rows"]]
        row |= _from_metrics(event)
    if steps:
        later = steps[1:] or steps
        row |= {
            "first_step_s": round(steps[0], 2), "step_s": round(statistics.median(later), 3),
            "step_s_min": round(min(later), 3), "step_s_max": round(max(later), 3), "steps": len(steps),
        }  # fmt: skip
    evaluations = by_name.get("held_out", [])
    if timed:
        between = sum(event.get("seconds", 0.0) for event in evaluations if event["time"] <= timed[0]["time"])
        row["first_step_finished_s"] = round(timed[0]["time"] - started - between, 1)
    for event in by_name.get("logged", []):
        row |= _from_log(event)
    for event in evaluations:
        row[f"held_out_{event['when']}"] = {k: event[k] for k in ("greedy", "sampled", "seconds") if k in event}
    if work.shape is None:
        row |= _learning(timed)
    if parameters is None and work.shape in SHAPES:
        parameters = linear_parameters(work.shape)
    peak, trained = peak_tflops(card), row.get("trained_tokens_per_s")
    known = parameters and trained and peak
    row["mfu_6n"] = round(6 * parameters * trained / (peak * 1e12), 3) if known else None  # type: ignore[operator]
    return row


def _learning(timed: Sequence[Event]) -> dict[str, Any]:
    """Accuracy over wall time: seconds since training began, and the mean reward of each step."""
    known = [event for event in timed if "since" in event]
    return {
        "trained_s": round(known[-1]["since"], 1) if known else None,
        "curve": [[round(event["since"], 2), event.get("reward")] for event in known],
    }


def _from_steps(timed: Sequence[Event]) -> dict[str, Any]:
    """What a peer's steps say of its phases: medians over the steps after the first."""
    later = timed[1:] or timed
    row: dict[str, Any] = {name: found for name in PHASES if (found := _median(later, name)) is not None}
    for column, tokens, seconds in (
        ("rollout_tokens_per_s", "generated_tokens", "generate_s"),
        ("trained_tokens_per_s", "trained_tokens", "train_s"),
    ):
        rates = [e[tokens] / e[seconds] for e in later if e.get(tokens) and e.get(seconds, 0.0) > 0]
        row |= {column: statistics.median(rates)} if rates else {}
    return row


def _from_log(event: Event) -> dict[str, Any]:
    gaps = event.get("logp_difference") or []
    return {
        **({"logp_difference": statistics.mean(gaps)} if gaps else {}),
        "mean_length": round(statistics.mean(event["lengths"]), 1) if event.get("lengths") else None,
        "rewards": event.get("rewards"),
    }


def _from_metrics(event: Event) -> dict[str, Any]:
    """What Strop's own metrics say: medians over the steps after the first."""
    rows = event["rows"][1:] or event["rows"]
    if not rows:
        return {"plan": event["plan"]}
    return {
        "generate_s": _median(rows, "time/generate_s"), "train_s": _median(rows, "time/train_s"),
        "publish_s": _median(rows, "time/publish_s"), "rollout_tokens_per_s": _median(rows, "tokens/generated_per_s"),
        "trained_tokens_per_s": _median(rows, "tokens/trained_per_s"),
        "logp_difference": _median(rows, "sampling/sampling_logp_difference/mean"),
        "mean_length": _median(rows, "completions/mean_length"),
        "rewards": [row.get("reward") for row in event["rows"]],
        "own_peak_gib": rows[-1].get("memory/peak_gib"), "beside_gib": rows[-1].get("memory/beside_gib"),
        "alloc_retries": rows[-1].get("memory/alloc_retries"), "plan": event["plan"],
        "phases_s": {name[5:-2]: _median(rows, name) for name in rows[-1] if name.startswith("time/")},
    }  # fmt: skip


def _median(rows: Sequence[Event], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return statistics.median(values) if values else None
