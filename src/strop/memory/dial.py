"""Keeping the process under `run.vram_gib`, whatever is allocated: the cap of torch's allocator, moved between phases.

torch counts what it has reserved, and refuses an allocation beyond its cap. Two things stand between that count and the
card's: memory that torch does not know of (CUDA context, loaded kernels, library workspaces), which is measured and
taken off; and the KV cache, which torch still counts after the engine has unmapped it, so that the cap is raised by
those bytes while training and lowered again before they are mapped.
"""

from __future__ import annotations

import torch

from .probe import card_uuid, look_at_card

SETTLING_PHASES = 6
"""Phases during which bytes beside torch are measured again: kernels are loaded when they are first used."""
UNSETTLED_BYTES = 160 << 20
"""Kept free meanwhile for what is not loaded yet: one run on an H100 went 0.16 GiB over its dial without it."""
LATE_BYTES = 64 << 20
"""Kept free afterwards, for what is loaded later still: a 7B model under 7.0 GiB peaked at 7.01 without it."""


class VramDial:
    """The cap of this process on one card."""

    def __init__(self, cap_bytes: int, *, free_bytes: int) -> None:
        """Cap the process at `cap_bytes`; `free_bytes` were free on the card before this process used it."""
        self._cap = cap_bytes
        self._total = torch.cuda.mem_get_info()[1]
        self._free_before = free_bytes
        self._beside = 0
        self._phases = 0
        self.rollouts()

    def rollouts(self) -> None:
        """Cap for rollouts, with the KV cache mapped."""
        self._limit(released=0)

    def training(self, released: int) -> None:
        """Cap for training while `released` bytes of the KV cache are unmapped."""
        self._limit(released)

    def _limit(self, released: int) -> None:
        if self._phases < SETTLING_PHASES:
            self._phases += 1
            self._beside = max(self._beside, self._held(released) - (torch.cuda.memory_reserved() - released))
        unsettled = UNSETTLED_BYTES if self._phases < SETTLING_PHASES else LATE_BYTES
        allowed = min(self._total, max(0, self._cap - self._beside - unsettled) + released)
        torch.cuda.set_per_process_memory_fraction(allowed / self._total)

    def _held(self, released: int) -> int:
        """Return what this process holds on the card: its own as the driver counts it, else what is free no longer.

        torch goes on counting the `released` bytes of the KV cache, the driver does not.
        """
        use = look_at_card(card_uuid())
        gone = self._free_before - torch.cuda.mem_get_info()[0]
        # Another process may have come or gone meanwhile. A number that cannot be ours is one of another's processes.
        own = use.own_bytes if use is not None else None
        return own if own is not None and own >= torch.cuda.memory_allocated() - released else gone
