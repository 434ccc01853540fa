"""The monitors of a run in progress: what they see of a step, where findings go, and what ends the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import DiagnosisError
from ..monitor.findings import Finding, Monitor, Round
from ..monitor.metrics import MetricsLog
from ..monitor.observe import Observation, observe
from ..monitor.progress import Progress
from ..rewards.combine import make_rules
from ..types import ScoredRollout
from .canary import Canary
from .parts import Parts

DIAGNOSES_FILE = "diagnoses.jsonl"
"""One row for each time that a finding is told or ceases."""

_FROM_METRICS: Mapping[str, str] = {
    "accuracy": "accuracy",
    "length": "completions/mean_length",
    "clipped": "completions/clipped_ratio",
    "unscored": "frac_unscored",
    "zero_std": "frac_reward_zero_std",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "logp_gap": "sampling/sampling_logp_difference/mean",
    "eval": "eval_pass@1",
}
"""Columns of the history that are metrics of the step."""


@dataclass(slots=True)
class Watch:
    """Feeds the monitor, writes `diagnoses.jsonl`, holds the canary."""

    config: Config
    folder: Path
    parts: Parts
    monitor: Monitor
    log: MetricsLog
    canary: Canary | None
    format_functions: frozenset[str]
    gated: frozenset[str]
    """Functions that pay for right completions alone."""
    round: Round | None = None
    halt: Finding | None = None
    """The finding that ends the run once a checkpoint can be written."""

    def see(self, scored_N: Sequence[ScoredRollout], advantages_N: Sequence[float | None]) -> Observation:
        """Observe the rollouts of a step."""
        pool = self.parts.pool
        return observe(
            scored_N, advantages_N, self.config.rollout.num_generations,
            weights=dict(zip(pool.names, pool.weights, strict=True)), format_functions=self.format_functions,
            gated=self.gated,
        )  # fmt: skip

    def follow(self, step: int, seen: Observation, values: Mapping[str, float]) -> Mapping[str, float]:
        """Add the step, whose metrics are `values`, to the history; return the monitored numbers, `monitor/NAME`."""
        scale = math.fsum(abs(weight) for weight in self.parts.pool.weights) or 1.0
        columns = {name: values.get(metric, math.nan) for name, metric in _FROM_METRICS.items()}
        self.round = self.monitor.feed(step, {**columns, **seen.columns, "reward": values["reward"] / scale})
        return self.round.values

    def tell(self, step: int, progress: Progress) -> None:
        """Write and show what the step's round brought. Call it when the step's metrics are written."""
        assert self.round is not None, "a step is followed before it is told"
        for finding in self.round.told:
            self.log.write(step, finding.as_row())
            progress.note(finding.note())
        for name in self.round.ceased:
            self.log.write(step, {"name": name, "level": "ceased", "value": self.round.values.get(f"monitor/{name}")})
            progress.say(f"step {step + 1}: {name} has ceased")
        self.halt = self.round.halt or self.halt

    def remind(self, progress: Progress) -> None:
        """Say what holds when a run is resumed; it is not told again, and does not end the run again."""
        for name, held in self.monitor.held.items():
            text = self.monitor.record[name]["text"]
            progress.note(f"{name} holds since step {held.since + 1}: {text}")

    def keep_canary(self, step: int, scored_N: Sequence[ScoredRollout]) -> None:
        """Keep completions of the first step that is seen without a canary."""
        if self.canary is None and self.config.monitor.canary_steps:
            self.canary = Canary.take(self.folder, step, scored_N, self.config.rollout.num_generations)

    def canary_is_due(self, step: int) -> bool:
        """Whether the canary is checked after `step` steps."""
        every = self.config.monitor.canary_steps
        return self.canary is not None and every > 0 and step % every == 0


def open_watch(config: Config, folder: Path, parts: Parts, log: MetricsLog, state: Mapping[str, Any] | None) -> Watch:
    """Start watching (`state` None), or go on with what `Monitor.as_dict` returned, empty if there is none.

    Waits until the reward functions are loaded.
    """
    canary = None
    if state is not None and config.monitor.canary_steps:
        canary = Canary.read(folder, parts.task, config.rollout.num_prompts)
    declared = parts.pool.declarations()
    return Watch(
        config, folder, parts, Monitor.create(config.monitor, state), log, canary,
        format_functions=frozenset(name for name, d in declared.items() if d.kind == "format"),
        gated=make_rules(parts.pool.names, parts.pool.weights, declared, config.rewards.gated).gated,
    )  # fmt: skip


def stopped_by(finding: Finding, steps: int) -> DiagnosisError:
    """Return the error that ends a run whose user chose `stop`."""
    return DiagnosisError(
        f"stopped after step {steps} by the monitor {finding.name}: {finding.text} (above {finding.act:g}); cause: "
        f"{finding.cause}; a checkpoint is written",
        hint=f"{finding.hint}; --resume goes on as it is",
    )
