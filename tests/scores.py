"""One completion scored by one built-in reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from strop.rewards.library import LIBRARY


def score(
    name: str,
    text: str,
    prefill: str = "",
    *,
    truncated: bool = False,
    options: Mapping[str, Any] | None = None,
    **row: object,
) -> float | None:
    columns = {column: [value] for column, value in row.items()}
    return LIBRARY[name](
        completions=[text], prefill=[prefill], truncated=[truncated], **columns, **(options or {})
    )[0]  # fmt: skip
