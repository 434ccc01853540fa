"""A reward that sounds sensible and is not: it pays for long thoughts. See recipes/ramble.yaml."""

from __future__ import annotations

from typing import Any

ENOUGH = 90
"""Tokens for the full mark."""


def long_thoughts(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Pay for every token up to `ENOUGH`, whether the answer is right or wrong."""
    return [min(1.0, len(ids) / ENOUGH) for ids in completion_ids]
