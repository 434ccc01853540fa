"""From the history of a run to findings: what is told, when it is told again, and what is done about it.

A finding is told when it begins to hold, when it grows from `warn` to `act`, and every `SPAN` windows while it holds.
It ceases once its number is back at nine tenths of the warn threshold, so that a number on the threshold is told once.
The action follows when it reaches `act`, once until it ceases: a run that was paused and is resumed goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..config import DiagnosisName, MonitorAction, MonitorConfig
from .diagnoses import CATALOGUE
from .history import SPAN, History

EASING = 0.9
"""A finding ceases at this share of its warn threshold."""

Level = Literal["warn", "act"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One diagnosis that holds, as it is told."""

    step: int
    """The step after which it was found, counted from 0."""
    name: DiagnosisName
    level: Level
    value: float
    warn: float
    act: float
    action: MonitorAction
    """What follows: `warn` unless the act threshold was reached just now and the user chose otherwise."""
    text: str
    cause: str
    hint: str

    def note(self) -> str:
        """Return the lines for a person; steps count from 1 there."""
        reached = f"{self.level}, above {self.act if self.level == 'act' else self.warn:g}"
        return f"step {self.step + 1}: {self.name} ({reached}): {self.text}\n  cause: {self.cause}\n  hint: {self.hint}"

    def as_row(self) -> dict[str, Any]:
        """Return the row of `diagnoses.jsonl`."""
        return asdict(self)


@dataclass(slots=True)
class Held:
    """A finding that holds."""

    since: int
    told: int
    level: Level
    acted: bool


@dataclass(frozen=True, slots=True)
class Round:
    """What one step brought."""

    values: Mapping[str, float]
    """`monitor/NAME` to its number, for every diagnosis whose number is known."""
    told: tuple[Finding, ...]
    ceased: tuple[str, ...]

    @property
    def halt(self) -> Finding | None:
        """The finding that ends the run, one that stops it before one that pauses it."""
        order = {"stop": 0, "pause": 1}
        ends = [f for f in self.told if f.action in order]
        return min(ends, key=lambda f: order[f.action]) if ends else None


@dataclass(slots=True)
class Monitor:
    """Follows one run. Two monitors of equal settings that see equal observations come to equal findings."""

    config: MonitorConfig
    history: History
    held: dict[DiagnosisName, Held] = field(default_factory=dict[DiagnosisName, Held])
    record: dict[str, dict[str, Any]] = field(default_factory=dict[str, "dict[str, Any]"])
    """Every diagnosis that ever held: its first step, worst level and the text of it, for `summary.json`."""

    @classmethod
    def create(cls, config: MonitorConfig, stored: Mapping[str, Any] | None = None) -> Monitor:
        """Start with an empty history, or go on from what `as_dict` returned."""
        if not stored:
            return cls(config, History(config.window))
        held = {name: Held(**values) for name, values in stored["held"].items() if name in CATALOGUE}
        record = {name: dict(entry) for name, entry in stored["record"].items()}
        return cls(config, History.from_dict(config.window, stored["history"]), held, record)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON form, which a checkpoint keeps."""
        held = {name: asdict(entry) for name, entry in self.held.items()}
        return {"history": self.history.as_dict(), "held": held, "record": self.record}

    def score(self) -> float | None:
        """Return how good the policy is: mean accuracy of the last window, reward where there never is an accuracy.

        None before there is a window, and where most of its steps have no number.
        """
        if self.history.steps < self.history.window:
            return None
        return self.history.mean("accuracy" if "accuracy" in self.history.first else "reward")

    def summary(self) -> list[dict[str, Any]]:
        """Return what `summary.json` says: every diagnosis that held, and whether it still does."""
        return [{"name": name, **entry, "holds": name in self.held} for name, entry in self.record.items()]

    def feed(self, step: int, observation: Mapping[str, float]) -> Round:
        """Add the observation of `step` and return what follows from it."""
        self.history.add(observation)
        values: dict[str, float] = {}
        told: list[Finding] = []
        ceased: list[str] = []
        for name in CATALOGUE:
            value = CATALOGUE[name].measure(self.history)
            if value is not None:
                values[f"monitor/{name}"] = value
            finding = self._judge(name, step, value)
            if finding is not None:
                told.append(finding)
            elif name in self.held and self._eased(name, value):
                del self.held[name]
                if value is not None:
                    ceased.append(name)
        return Round(values, tuple(told), tuple(ceased))

    def thresholds(self, name: DiagnosisName) -> tuple[float, float]:
        """Return (warn, act) of a diagnosis: the user's or the default."""
        entry = CATALOGUE[name]
        warn, act = self.config.thresholds.get(name, (entry.warn, entry.act))
        return warn, act

    def _judge(self, name: DiagnosisName, step: int, value: float | None) -> Finding | None:
        """Return the finding if there is something to tell, and keep what is held up to date."""
        choice = self.config.actions.get(name, self.config.action)
        entry, (warn, act) = CATALOGUE[name], self.thresholds(name)
        enough = self.history.steps >= entry.windows * self.config.window
        if choice == "off" or value is None or value <= warn or not enough:
            return None
        level: Level = "act" if value > act else "warn"
        before = self.held.get(name)
        acts = level == "act" and not (before and before.acted)
        grown = before is None or (level == "act" and before.level == "warn")
        if not grown and not acts and before is not None and step - before.told < SPAN * self.config.window:
            return None
        acted = level == "act" or (before is not None and before.acted)
        worst: Level = "act" if acted else "warn"
        self.held[name] = Held(before.since if before else step, step, worst, acted)
        finding = Finding(
            step, name, level, value, warn, act, choice if acts else "warn", entry.says(self.history, value),
            entry.cause, entry.hint,
        )  # fmt: skip
        self._remember(finding)
        return finding

    def _remember(self, finding: Finding) -> None:
        known = self.record.get(finding.name)
        if known is None or (finding.level == "act" and known["level"] == "warn"):
            first = finding.step if known is None else known["first_step"]
            self.record[finding.name] = {"first_step": first, "level": finding.level, "text": finding.text}

    def _eased(self, name: DiagnosisName, value: float | None) -> bool:
        """Whether a finding that holds is over; a number that is not known any more ends it as well, without a word."""
        return value is None or value <= EASING * self.thresholds(name)[0]
