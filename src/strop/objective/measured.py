"""Metrics of a micro-batch that are still on the device: reading one there would stop the device until it is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..types import Metric


@dataclass(frozen=True, slots=True)
class Measured:
    """A `Metric` whose total is a scalar tensor."""

    total: torch.Tensor
    count: float = 1.0
    kind: Literal["mean", "sum", "min", "max"] = "mean"

    @property
    def value(self) -> float:
        """The number to show; waits for the device."""
        return Metric(float(self.total), self.count, self.kind).value


def read_all(parts: Sequence[Mapping[str, Measured]]) -> list[dict[str, Metric]]:
    """Return the metrics of all micro-batches as numbers, with one transfer."""
    totals = [m.total.detach().float() for part in parts for m in part.values()]
    values = iter(torch.stack(totals).tolist() if totals else [])
    return [{name: Metric(next(values), m.count, m.kind) for name, m in part.items()} for part in parts]
