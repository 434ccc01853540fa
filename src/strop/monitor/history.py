"""What the last steps looked like, column by column, and the few numbers that diagnoses take from it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

SPAN = 5
"""Windows that are kept."""
TREND = 2.5
"""Windows over which a rise is measured: 50 steps with the default window of 20."""

COLUMNS = (
    "reward", "accuracy", "length", "clipped", "unscored", "zero_std", "all_right", "all_wrong", "length_correlation",
    "log_length_gap", "repetition", "sign_flips", "format_share", "answer_share", "entropy", "grad_norm", "logp_gap",
    "eval",
)  # fmt: skip
"""What is observed of a step; `observe.py` says how. NaN: there was nothing to observe."""
_BEST = ("accuracy",)


@dataclass(slots=True)
class History:
    """The last `SPAN * window` observations of each column, oldest first, and the first number that each ever had."""

    window: int
    columns: dict[str, deque[float]] = field(default_factory=dict[str, "deque[float]"])
    first: dict[str, float] = field(default_factory=dict[str, float])
    steps: int = 0
    """Observations ever made, forgotten ones included."""
    best: dict[str, tuple[float, float]] = field(default_factory=dict[str, "tuple[float, float]"])
    """Of the columns in `_BEST`: mean and variance of the best window that ended before the last one began."""

    def __post_init__(self) -> None:
        size = SPAN * self.window
        self.columns = {name: deque(self.columns.get(name, ()), maxlen=size) for name in COLUMNS}

    def add(self, observation: Mapping[str, float]) -> None:
        """Append one step; a column that is not in `observation` gets NaN."""
        for name, column in self.columns.items():
            value = observation.get(name, math.nan)
            column.append(value)
            if math.isfinite(value):
                self.first.setdefault(name, value)
        self.steps += 1
        for name in _BEST:
            known, size = self._known(name), self.window
            latest = len(known) - size  # where a window ends that the last one does not reach into
            for end in range(latest if name in self.best else size, latest + 1):
                if end >= size:
                    found = _mean_and_variance(known[end - size : end])
                    self.best[name] = max(found, self.best.get(name, found))

    def last(self, name: str) -> float | None:
        """Return the newest value; None when the last step had none."""
        column = self.columns[name]
        return column[-1] if column and math.isfinite(column[-1]) else None

    def mean(self, name: str) -> float | None:
        """Return the mean over the last `window` steps; None when more than half of them had no value."""
        return _mean(self._window(name))

    def rise(self, name: str) -> float | None:
        """Return how much the mean of a window rose over `TREND` windows, counting only what lies above 0.

        While there are fewer steps, over those that there are, two windows at least; else None.
        """
        column = list(self.columns[name])[-int(TREND * self.window) :]
        if len(column) < 2 * self.window:
            return None
        before, after = _mean(column[: self.window]), _mean(column[-self.window :])
        return None if before is None or after is None else max(0.0, after) - max(0.0, before)

    def fall(self, name: str, deviations: float) -> tuple[float, float] | None:
        """Return (mean of the last window, mean of the best window of the run before it); None where there is none.

        The best counts as the last one where the two are less than `deviations` standard errors apart, by how much
        steps differ inside the two windows, or from their neighbours among all that are kept where that is more: a
        variance of one window is too small by chance in some of the many that are compared.
        """
        known = self._known(name)
        if name not in self.best or self.mean(name) is None or len(known) < self.window:
            return None
        now, spread = _mean_and_variance(known[-self.window :])
        best, best_spread = self.best[name]
        neighbours = math.fsum((b - a) ** 2 for a, b in pairwise(known)) / (len(known) - 1)
        error = math.sqrt(max(spread + best_spread, neighbours) / self.window)
        return (now, best if best - now > deviations * error else now)

    def span(self, name: str) -> int:
        """Return the steps between the first and the last value that are kept; 0 without two."""
        there = [i for i, v in enumerate(self.columns[name]) if math.isfinite(v)]
        return there[-1] - there[0] if there else 0

    def slope(self, name: str, points: int) -> float | None:
        """Return the rise per step of a straight line (least squares) through all kept values.

        None with fewer than `points` values, of which two are needed in any case.
        """
        values = [(i, v) for i, v in enumerate(self.columns[name]) if math.isfinite(v)]
        if len(values) < max(2, points):
            return None
        mean_x, mean_y = (math.fsum(column) / len(values) for column in zip(*values, strict=True))
        spread = math.fsum((x - mean_x) ** 2 for x, _ in values)
        return math.fsum((x - mean_x) * (y - mean_y) for x, y in values) / spread

    def outlier(self, name: str) -> float | None:
        """Return how many standard deviations the logarithm of the newest value lies above that of all kept ones.

        The deviation counts as 0.1 at least. None with less than one window before it.
        """
        *before, now = self.columns[name] or (math.nan,)
        logs = [math.log(v) for v in before if math.isfinite(v) and v > 0]
        if len(logs) < self.window or not math.isfinite(now) or now <= 0:
            return None
        mean = math.fsum(logs) / len(logs)
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in logs) / len(logs))
        return (math.log(now) - mean) / max(deviation, 0.1)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON form: NaN becomes null, every other float comes back as it was."""
        columns = {name: [v if math.isfinite(v) else None for v in column] for name, column in self.columns.items()}
        best = {name: list(pair) for name, pair in self.best.items()}
        return {"steps": self.steps, "window": self.window, "first": self.first, "best": best, "columns": columns}

    @classmethod
    def from_dict(cls, window: int, stored: Mapping[str, Any]) -> History:
        """Inverse of `as_dict`; `window` may have changed, and a best window of another length is forgotten then."""
        columns = {
            name: deque(math.nan if v is None else float(v) for v in column)
            for name, column in stored["columns"].items()
        }
        found = stored.get("best", {}) if stored.get("window", window) == window else {}
        best = {name: (float(mean), float(spread)) for name, (mean, spread) in found.items()}
        return cls(window, columns, dict(stored["first"]), stored["steps"], best)

    def _known(self, name: str) -> list[float]:
        return [v for v in self.columns[name] if math.isfinite(v)]

    def _window(self, name: str) -> list[float]:
        return list(self.columns[name])[-self.window :]


def _mean_and_variance(values: Sequence[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)


def _mean(values: Sequence[float]) -> float | None:
    known = [v for v in values if math.isfinite(v)]
    return math.fsum(known) / len(known) if known and 2 * len(known) >= len(values) else None
