"""The table of policy losses. A loss is a weight per token and a surrogate per token; nothing else branches on it.

With ratio rho = exp(logp - old_logp), advantage A, clip bounds 1 - epsilon and 1 + epsilon_high, sampler correction c
(see `correction.py`) and k3 = exp(ref - logp) - (ref - logp) - 1 (Schulman 2020, "Approximating KL divergence"):

    token loss = -min(rho A, clip(rho) A) * c + beta * k3          loss = sum over tokens of weight * token loss

The weight is one over the loss's denominator, counted over the whole optimizer step before the first backward pass:

    grpo      1 / (N |o_i|)         mean over completions of the mean over tokens   (arXiv 2402.03300)
    dapo      1 / total tokens      mean over all tokens                            (arXiv 2503.14476, eq. 8)
    dr_grpo   1 / (N L_max)         constant, no length bias                        (arXiv 2503.20783, section 3.2)

N counts the scored, unmasked completions of the step, |o_i| the trained tokens of one, L_max the completion limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .measured import Measured


@dataclass(frozen=True, slots=True)
class StepCounts:
    """What denominators are made of, counted over the whole optimizer step and all ranks."""

    num_completions: int
    num_tokens: int
    max_completion_length: int


@dataclass(frozen=True, slots=True)
class Loss:
    """One row of the table."""

    token_weight: Callable[[int, StepCounts], float]
    """(trained tokens of the completion, counts of the step) -> weight of each of its tokens."""
    surrogate: Callable[[torch.Tensor, torch.Tensor, float, float], torch.Tensor]
    """(ratio_K, advantages_K, low, high) -> token loss_K."""


def clipped_surrogate(ratio_K: torch.Tensor, advantages_K: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """PPO's pessimistic surrogate, negated: -min(rho A, clip(rho, low, high) A) (arXiv 1707.06347, eq. 7)."""
    return -torch.minimum(ratio_K * advantages_K, ratio_K.clamp(low, high) * advantages_K)


LOSSES: Mapping[str, Loss] = {
    "grpo": Loss(lambda n, c: 1.0 / (c.num_completions * n), clipped_surrogate),
    "dapo": Loss(lambda n, c: 1.0 / c.num_tokens, clipped_surrogate),
    "dr_grpo": Loss(lambda n, c: 1.0 / (c.num_completions * c.max_completion_length), clipped_surrogate),
}


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A micro-batch's part of the step's loss, and its metrics."""

    loss: torch.Tensor
    """Scalar fp32; the parts of all micro-batches add up to the loss of the step."""
    metrics: Mapping[str, Measured]


def policy_loss(
    logprobs_K: torch.Tensor,
    *,
    old_logprobs_K: torch.Tensor,
    advantages_K: torch.Tensor,
    weights_K: torch.Tensor,
    correction_K: torch.Tensor,
    loss_type: str,
    epsilon: float,
    epsilon_high: float | None = None,
    reference_logprobs_K: torch.Tensor | None = None,
    beta: float = 0.0,
) -> LossOutput:
    """Return the weighted sum over trained tokens; all inputs are [K] fp32, only `logprobs_K` carries a gradient.

    `old_logprobs_K` is `logprobs_K.detach()` when the step is on-policy. `reference_logprobs_K` is needed when
    beta > 0.
    """
    low, high = 1.0 - epsilon, 1.0 + (epsilon if epsilon_high is None else epsilon_high)
    ratio_K = torch.exp(logprobs_K - old_logprobs_K)
    token_loss_K = LOSSES[loss_type].surrogate(ratio_K, advantages_K, low, high) * correction_K
    count = float(logprobs_K.shape[0])
    with torch.no_grad():
        clipped_low = ((ratio_K < low) & (advantages_K < 0)).sum()
        clipped_high = ((ratio_K > high) & (advantages_K > 0)).sum()
    metrics = {
        "clip_ratio/low_mean": Measured(clipped_low, count),
        "clip_ratio/high_mean": Measured(clipped_high, count),
        "clip_ratio/region_mean": Measured(clipped_low + clipped_high, count),
        "clip_ratio/low_min": Measured(clipped_low / count, kind="min"),
        "clip_ratio/high_max": Measured(clipped_high / count, kind="max"),
    }
    if beta > 0.0:
        assert reference_logprobs_K is not None, "beta > 0 needs the reference's log-probabilities"
        kl_K = k3(logprobs_K, reference_logprobs_K)
        token_loss_K = token_loss_K + beta * kl_K
        metrics["kl"] = Measured(kl_K.detach().sum(), count)
    loss = (token_loss_K * weights_K).sum()
    metrics["loss"] = Measured(loss.detach(), kind="sum")
    return LossOutput(loss, metrics)


def k3(logprobs_K: torch.Tensor, reference_logprobs_K: torch.Tensor) -> torch.Tensor:
    """Unbiased, non-negative estimate of KL(policy || reference) per token: exp(d) - d - 1 with d = ref - logp."""
    delta_K = reference_logprobs_K - logprobs_K
    return torch.exp(delta_K) - delta_K - 1.0
