"""What to change when a run does not fit: the cheapest change with which the plan passes, found by planning with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError

from ..config import Config, EmbeddingPlace
from ..errors import PlanError
from .machine import Machine
from .shapes import GIB

SLIGHT = 0.75
"""A completion of at least this share of the wanted length, and a dial raised by no more than its inverse, are smaller
changes than another kind of training."""
_STEP = 64
_SHORTEST = 128


def changed(config: Config, **settings: Any) -> Config:
    """Return the config with settings changed, e.g. `lora__r=16`."""
    for key, value in settings.items():
        section, name = key.split("__")
        updated = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: updated})
    return config


def cheapest_change(config: Config, machine: Machine, plan: Callable[[Config], Any], *, packs: bool, tied: bool) -> str:
    """Return the hint for a run that `plan` refuses; each change named in it was planned with and fits.

    `packs`: head and embedding can be held in less; `tied`: they are one tensor.
    """

    def fits(candidate: Config) -> bool:
        try:
            plan(Config.model_validate(candidate.model_dump()))  # settings may exclude each other
        except (PlanError, ValidationError):
            return False
        return True

    for candidate, hint in _candidates(config, machine, fits, packs=packs, tied=tied):
        if fits(candidate):
            return hint
    return "model.path: choose a smaller model; shorter completions and 4-bit weights are not enough"


def _candidates(
    config: Config, machine: Machine, fits: Callable[[Config], bool], *, packs: bool, tied: bool
) -> Iterator[tuple[Config, str]]:
    """Yield changes from the cheapest to the dearest."""
    on_card = machine.device == "cuda"
    dial = config.run.vram_gib or 0.0
    enough = _least_dial(config, machine, fits) if on_card and dial else 0.0
    raised = (changed(config, run__vram_gib=enough), f"run.vram_gib: {enough:g} is enough")
    if 0 < enough <= dial / SLIGHT:
        yield raised
    for key in ("optim__micro_batch_tokens", "optim__checkpoint_layers"):
        section, name = key.split("__")
        if getattr(getattr(config, section), name) is not None:
            yield changed(config, **{key: None}), f"{section}.{name}: null, to have it planned"
    length = _longest(config, fits)
    shorter = (changed(config, rollout__max_completion_length=length), f"rollout.max_completion_length: {length}")
    if length >= SLIGHT * config.rollout.max_completion_length:
        yield shorter
    away: EmbeddingPlace = "host" if machine.pins else "nf4"
    others = list(_other_training(config, packs=packs, tied=tied, on_card=on_card, away=away))
    for settings, hint in others:
        yield changed(config, **settings), hint
    if length:
        yield shorter
    if enough:
        yield raised
    for settings, hint in others:
        other = changed(config, **settings)
        if length := _longest(other, fits):
            yield (
                changed(other, rollout__max_completion_length=length),
                f"{hint}, and rollout.max_completion_length: {length}",
            )


def _least_dial(config: Config, machine: Machine, fits: Callable[[Config], bool]) -> float:
    """Return the smallest dial above the present one, in tenths of a GiB, that is enough; 0 when the card has less."""
    low, high = int((config.run.vram_gib or 0) * 10), int(machine.memory_bytes / GIB * 10) + 1
    most = high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(changed(config, run__vram_gib=middle / 10)) else (middle, high)
    return high / 10 if high < most else 0.0


def _other_training(
    config: Config, *, packs: bool, tied: bool, on_card: bool, away: EmbeddingPlace
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield kinds of training that need less: each change by itself, the mildest first, then several together.

    `away` is the input embedding that takes the least of the card.
    """
    changes: list[tuple[dict[str, Any], str]] = []
    if on_card and config.optim.name == "adamw":
        changes.append(({"optim__name": "adamw_8bit"}, "optim.name: adamw_8bit"))
    if not config.lora.r:
        plain = config.optim.master == "fp32"
        changes.append((
            {"lora__r": 16} if plain else {"lora__r": 16, "optim__master": "fp32"},
            "lora.r: 16 trains adapters instead of all weights" + ("" if plain else ", with optim.master: fp32"),
        ))  # fmt: skip
    if on_card and config.model.quantization == "none" and config.lora.r:
        changes.append(({"model__quantization": "nf4"}, "model.quantization: nf4 holds the linear layers in 4 bits"))
    if on_card and packs and not tied and config.model.embedding not in ("host", away):
        changes.append(({"model__embedding": away}, f"model.embedding: {away}"))
    if on_card and packs and config.model.head != "int8":
        changes.append(({"model__head": "int8"}, "model.head: int8"))
    if on_card and config.model.quantization == "none" and not config.lora.r:
        changes.append(({"model__quantization": "nf4"}, "model.quantization: nf4 holds the linear layers in 4 bits"))
    yield from changes
    together: dict[str, Any] = {}
    for count, (settings, _) in enumerate(changes, start=1):
        together |= settings
        if count > 1:
            yield dict(together), ", and ".join(hint for _, hint in changes[:count])


def _longest(config: Config, fits: Callable[[Config], bool]) -> int:
    """Return the longest completion, in steps of 64 tokens, that fits; 0 when not even 128 tokens do."""
    low, high = _SHORTEST // _STEP - 1, (config.rollout.max_completion_length - 1) // _STEP
    while low < high:
        middle = (low + high + 1) // 2
        if fits(changed(config, rollout__max_completion_length=middle * _STEP)):
            low = middle
        else:
            high = middle - 1
    return low * _STEP if low * _STEP >= _SHORTEST else 0
