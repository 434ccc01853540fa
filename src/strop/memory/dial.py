"""Keeping the process under `run.vram_gib`, whatever is allocated: the cap of torch's allocator, moved between phases.

torch counts what it has reserved, and refuses an allocation beyond its cap. Two things stand between that count and the
card's: memory that torch does not know of (CUDA context, loaded kernels, library workspaces), which is measured and
taken off; and the KV cache, which torch still counts after the engine has unmapped it, so that the cap is raised by
those bytes while training and lowered again before they are mapped. The same holds for the process' peak: of each phase
it is torch's own, less what was unmapped, and what lies beside torch.
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
    """The cap of this process on one card, and its peak."""

    def __init__(self, cap_bytes: int, *, free_bytes: int) -> None:
        """Cap the process at `cap_bytes`; `free_bytes` were free on the card before this process used it."""
        self._cap = cap_bytes
        self._total = torch.cuda.mem_get_info()[1]
        self._free_before = free_bytes
        self._beside = 0
        self._phases = 0
        self._released = 0
        self._peak = 0
        # Older releases of torch cannot tell; nothing else of ours sets it.
        getter = getattr(torch.cuda, "get_per_process_memory_fraction", None)
        self._fraction_before = float(getter()) if getter is not None else 1.0
        self._begin_phase(released=0)  # what came before, as an earlier run of this process, is no part of the peak

    def rollouts(self) -> None:
        """Cap for rollouts, with the KV cache mapped; call it before it is mapped again."""
        self._end_phase()
        if self._released:
            # As the engine does before it maps the cache: what training left is no part of a rollout's peak.
            torch.cuda.empty_cache()
        self._begin_phase(released=0)

    def training(self, released: int) -> None:
        """Cap for training while `released` bytes of the KV cache are unmapped."""
        self._end_phase()
        self._begin_phase(released)

    def close(self) -> None:
        """Take the cap off: whoever called goes on with what it allowed itself before."""
        torch.cuda.set_per_process_memory_fraction(self._fraction_before)

    @property
    def peak_bytes(self) -> int:
        """The most that this process has held on the card since the dial was made.

        What torch had reserved at the peaks of its phases, without what was unmapped then, and what lies beside torch
        as it was measured in the first phases: later kernels, some tens of MB, are not in it.
        """
        return max(self._peak, torch.cuda.max_memory_reserved() - self._released) + self._beside

    @property
    def beside_bytes(self) -> int:
        """What this process holds beside torch: context, kernels, libraries; the most that was measured."""
        return self._beside

    @property
    def retries(self) -> int:
        """How often torch's allocator gave back what it had cached to stay under the cap, which stops the card."""
        return int(torch.cuda.memory_stats().get("num_alloc_retries", 0))

    def _end_phase(self) -> None:
        self._peak = max(self._peak, torch.cuda.max_memory_reserved() - self._released)

    def _begin_phase(self, released: int) -> None:
        self._released = released
        torch.cuda.reset_peak_memory_stats()
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
