"""The cap and the peak of a process, on a card that only counts: torch's reserved bytes, the KV cache, and the rest."""

from __future__ import annotations

import pytest
import torch

from strop.memory import dial as dial_module
from strop.memory.dial import LATE_BYTES, SETTLING_PHASES, UNSETTLED_BYTES, VramDial

GIB = 1 << 30
TOTAL = 24 * GIB
CONTEXT = GIB // 2


class Card:
    """What torch and the driver count while a process reserves, returns and unmaps memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept = self.cached = self.kv = self.unmapped = 0
        self.fraction, self.peak_of_torch, self.peak_of_driver = 0.5, 0, 0
        functions = {
            "mem_get_info": lambda: (TOTAL - self.held, TOTAL),
            "memory_reserved": lambda: self.reserved,
            "memory_allocated": lambda: self.kept + self.kv,
            "max_memory_reserved": lambda: self.peak_of_torch,
            "reset_peak_memory_stats": self.reset,
            "empty_cache": lambda: self.set(cached=0),
            "get_per_process_memory_fraction": lambda: self.fraction,
            "set_per_process_memory_fraction": lambda fraction: setattr(self, "fraction", fraction),
        }
        for name, function in functions.items():
            monkeypatch.setattr(torch.cuda, name, function, raising=False)
        monkeypatch.setattr(dial_module, "card_uuid", lambda: "GPU-0")
        monkeypatch.setattr(dial_module, "look_at_card", lambda uuid: None)

    @property
    def reserved(self) -> int:
        return self.kept + self.cached + self.kv

    @property
    def held(self) -> int:
        return CONTEXT + self.reserved - self.unmapped

    def reset(self) -> None:
        self.peak_of_torch = self.reserved

    def set(self, **values: int) -> None:
        for name, value in values.items():
            setattr(self, name, value)
        self.peak_of_torch = max(self.peak_of_torch, self.reserved)
        self.peak_of_driver = max(self.peak_of_driver, self.held)


def steps(card: Card, dial: VramDial, *, kv: int, released: bool, rollout: int, training: int, count: int = 4) -> None:
    """Make steps as the loop does: rollout, KV cache away, training, KV cache back."""
    card.set(kv=kv)
    for _ in range(count):
        card.set(cached=rollout)
        card.set(unmapped=kv if released else 0)
        dial.training(kv if released else 0)
        card.set(cached=max(card.cached, training))
        dial.rollouts()
        if released:
            card.set(cached=0)  # the engine empties the cache before it maps
            card.set(unmapped=0)


@pytest.mark.parametrize(
    ("kv", "released", "rollout", "training"),
    [(10, True, 1, 9), (10, True, 1, 14), (4, False, 1, 9), (10, True, 3, 2)],
)
def test_the_peak_is_what_the_driver_counted(
    kv: int, released: bool, rollout: int, training: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card(monkeypatch)
    dial = VramDial(20 * GIB, free_bytes=TOTAL)
    card.set(kept=3 * GIB)
    dial.rollouts()
    steps(card, dial, kv=kv * GIB, released=released, rollout=rollout * GIB, training=training * GIB)
    assert dial.peak_bytes == card.peak_of_driver
    before = dial.peak_bytes
    steps(card, dial, kv=kv * GIB, released=released, rollout=GIB // 2, training=GIB // 2)
    assert dial.peak_bytes == before


def test_the_cap_moves_with_the_kv_cache_and_ends_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    dial = VramDial(12 * GIB, free_bytes=TOTAL)
    assert card.fraction * TOTAL == pytest.approx(12 * GIB - CONTEXT - UNSETTLED_BYTES)
    card.set(kept=3 * GIB)
    steps(card, dial, kv=5 * GIB, released=True, rollout=GIB, training=6 * GIB, count=SETTLING_PHASES)
    assert card.fraction * TOTAL == pytest.approx(12 * GIB - CONTEXT - LATE_BYTES)
    card.set(unmapped=5 * GIB)
    dial.training(5 * GIB)
    assert card.fraction * TOTAL == pytest.approx(17 * GIB - CONTEXT - LATE_BYTES)
    dial.close()
    assert card.fraction == 0.5


def test_a_torch_that_cannot_tell_its_cap_is_left_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction")
    dial = VramDial(12 * GIB, free_bytes=TOTAL)
    assert card.fraction < 1
    dial.close()
    assert card.fraction == 1.0


def test_the_peak_of_a_second_run_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    first = VramDial(20 * GIB, free_bytes=TOTAL)
    steps(card, first, kv=0, released=False, rollout=GIB, training=12 * GIB)
    assert first.peak_bytes == 12 * GIB + CONTEXT
    card.set(kept=0, cached=0, kv=0)
    second = VramDial(4 * GIB, free_bytes=TOTAL)
    steps(card, second, kv=0, released=False, rollout=GIB, training=2 * GIB)
    assert second.peak_bytes == 2 * GIB + CONTEXT
