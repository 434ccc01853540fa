"""Correction for the sampler and the trainer giving one token different log-probabilities.

Engine and trainer run the same weights through different kernels, so completions are drawn from a slightly other
distribution than the one that is differentiated. With d_k = trainer logp - sampler logp, the truncated importance
weight (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training") is
min(exp(d_k), cap); the sequence forms take exp(sum of d over the completion); the mask forms set what lies above the
cap to 0 instead. Names follow TRL's `vllm_importance_sampling_mode`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch

from .measured import Measured


@dataclass(frozen=True, slots=True)
class Correction:
    """Weights that multiply the token losses, without gradient, and the metrics of the mismatch."""

    weights_K: torch.Tensor
    metrics: Mapping[str, Measured]


def _truncate(ratio_K: torch.Tensor, cap: float) -> torch.Tensor:
    return ratio_K.clamp(max=cap)


def _mask(ratio_K: torch.Tensor, cap: float) -> torch.Tensor:
    return torch.where(ratio_K > cap, torch.zeros_like(ratio_K), ratio_K)


_MODES: Final[Mapping[str, tuple[bool, Callable[[torch.Tensor, float], torch.Tensor]]]] = {
    "token_truncate": (False, _truncate),
    "token_mask": (False, _mask),
    "sequence_truncate": (True, _truncate),
    "sequence_mask": (True, _mask),
}


def sampler_correction(
    trainer_logprobs_K: torch.Tensor,
    sampler_logprobs_K: torch.Tensor,
    sequence_K: torch.Tensor,
    *,
    mode: str,
    clip_max: float,
) -> Correction:
    """Return weights [K] fp32 and the mismatch metrics; `sequence_K` numbers the completion of each token.

    With mode "none" the weights are 1 and the metrics are still reported.
    """
    with torch.no_grad():
        delta_K = trainer_logprobs_K.detach().float() - sampler_logprobs_K
        per_sequence, limit = _MODES.get(mode, (False, lambda ratio_K, cap: torch.ones_like(ratio_K)))
        if per_sequence and delta_K.numel():
            # As long as there are tokens: the number of completions is not known without waiting for the device.
            sums = torch.zeros_like(delta_K)
            ratio_K = torch.exp(sums.index_add(0, sequence_K, delta_K).index_select(0, sequence_K))
        else:
            ratio_K = torch.exp(delta_K)
        weights_K = limit(ratio_K, clip_max)
        count = float(delta_K.numel())
        gap_K = delta_K.abs()
        metrics = {
            "sampling/sampling_logp_difference/mean": Measured(gap_K.sum(), count),
            "sampling/importance_sampling_ratio/mean": Measured(ratio_K.sum(), count),
            "sampling/importance_sampling_clipped_share": Measured((ratio_K > clip_max).sum(), count),
        }
        if delta_K.numel():
            metrics |= {
                "sampling/sampling_logp_difference/max": Measured(gap_K.max(), kind="max"),
                "sampling/importance_sampling_ratio/min": Measured(ratio_K.min(), kind="min"),
                "sampling/importance_sampling_ratio/max": Measured(ratio_K.max(), kind="max"),
            }
    return Correction(weights_K, metrics)
