"""How a CPU's memory is shared out: rollouts and training live side by side, and nothing is given back in between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import PlanError
from .card import KEPT, CardNeeds
from .shapes import GIB

CPU_BLOCK_SIZE = 32
"""vLLM's default of 128 tokens per block on a CPU would never cache the short prompts of a small run."""
MIN_BATCHED_TOKENS = 8192
MAX_CPU_MICRO_BATCH_TOKENS = 8192
CPU_ACTIVATION_FACTOR = 2.0
"""Training's peak over what autograd keeps: the gradients of a layer, and the padded attention of a batch."""


@dataclass(frozen=True, slots=True)
class CpuNumbers:
    """What is derived for a CPU; the two choices with their reasons."""

    fixed_bytes: int
    """Weights, what is trained with its optimizer, the reference."""
    max_num_seqs: int
    seqs_reason: str
    kv_cache_bytes: int
    max_num_batched_tokens: int
    micro_batch_tokens: int
    micro_reason: str
    checkpoint_layers: int


def plan_cpu(needs: CardNeeds, budget: int, kept: Mapping[str, Any]) -> CpuNumbers:
    """Derive the numbers for a CPU with `budget` bytes of free memory. Raises PlanError without a hint.

    `kept` are the numbers of a run that is resumed; they are taken where they still fit.
    """
    fixed = needs.weights + needs.trained + needs.reference
    seqs, kv_bytes, seqs_reason = _kv_cache(needs, budget - fixed, kept)
    # Only what is asked for: a CPU's memory is seldom what a run is short of.
    layers = min(needs.config.optim.checkpoint_layers or 0, needs.shape.num_layers)
    micro, micro_reason = _micro_batch(needs, budget - fixed - kv_bytes, layers, kept)
    return CpuNumbers(
        fixed, seqs, seqs_reason, kv_bytes, max(MIN_BATCHED_TOKENS, needs.max_len), micro, micro_reason, layers
    )


def _kv_cache(needs: CardNeeds, free: int, kept: Mapping[str, Any]) -> tuple[int, int, str]:
    token = needs.shape.kv_bytes_per_token(needs.dtype)
    per_sequence = -(-needs.max_len // CPU_BLOCK_SIZE) * CPU_BLOCK_SIZE * token
    wanted = needs.wanted_seqs
    # Half of what is free: the training phase needs the other half, and on a CPU both live side by side.
    fits = (free // 2) // per_sequence
    if fits < 1:
        need = (2 * per_sequence - free) / GIB
        raise PlanError(f"the model and one sequence of {needs.max_len} tokens need {need:.1f} GiB more than there is")
    if 0 < kept.get("kv_cache_bytes", 0) <= free and 0 < kept.get("max_num_seqs", 0) <= wanted:
        return kept["max_num_seqs"], kept["kv_cache_bytes"], KEPT
    seqs = min(wanted, fits)
    reason = "all completions of a step at once" if seqs == needs.completions else (
        "rollout.max_num_seqs" if seqs == wanted else f"memory for {fits} of {needs.completions} completions"
    )  # fmt: skip
    spare = CPU_BLOCK_SIZE * token * 2  # vLLM keeps a null block; one more against rounding
    return seqs, seqs * per_sequence + spare, reason


def _micro_batch(needs: CardNeeds, free: int, layers: int, kept: Mapping[str, Any]) -> tuple[int, str]:
    pinned, max_len = needs.config.optim.micro_batch_tokens, needs.max_len
    per_token = int(CPU_ACTIVATION_FACTOR * needs.shape.activation_bytes_per_token(needs.dtype, checkpointed=layers))
    if pinned is not None:
        if pinned * per_token > free:
            raise PlanError(
                f"training on {pinned} tokens at a time (optim.micro_batch_tokens) needs "
                f"{pinned * per_token / GIB:.1f} GiB of activations, {max(0, free) / GIB:.1f} GiB are left"
            )
        return pinned, "optim.micro_batch_tokens"
    fits = int(free * 0.8) // per_token
    if fits < max_len:
        raise PlanError(
            f"training on one sequence of {max_len} tokens needs {max_len * per_token / GIB:.1f} GiB of activations, "
            f"{max(0, free) / GIB:.1f} GiB are left"
        )
    if max_len <= kept.get("micro_batch_tokens", 0) <= free // per_token:
        return kept["micro_batch_tokens"], KEPT
    if fits < MAX_CPU_MICRO_BATCH_TOKENS:
        return fits, f"activations of {per_token / 1024:.0f} KiB per token in what is left"
    reason = "large enough to keep the cores busy, small enough for their caches"
    return max(MAX_CPU_MICRO_BATCH_TOKENS, max_len), reason
