"""One optimizer step over the micro-batches of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..config import ObjectiveConfig
from ..objective.correction import sampler_correction
from ..objective.losses import policy_loss
from ..policy.optim import MasterAdamW
from ..policy.policy import Policy
from ..types import Metric, Metrics, MicroBatch, StepStats, merge_metrics


def update(
    policy: Policy,
    optimizer: MasterAdamW,
    batches: Sequence[MicroBatch],
    objective: ObjectiveConfig,
    *,
    learning_rate: float,
    max_grad_norm: float,
    on_batch: Callable[[], None] = lambda: None,
) -> StepStats:
    """Add up the gradients of all micro-batches and make one step; `on_batch` is called after each of them.

    Makes none, and touches neither momentum nor weights, when nothing is left to train on or when the loss or the
    gradient is not finite.
    """
    if not batches:
        return StepStats({}, stepped=False, skipped_reason="no group has a signal")
    optimizer.zero_grad()
    parts = []
    for batch in batches:
        parts.append(_backward(policy, batch, objective))
        on_batch()
    metrics = merge_metrics(parts)
    norm = optimizer.gradient_norm()
    metrics["grad_norm"] = Metric(norm)
    metrics["learning_rate"] = Metric(learning_rate)
    # Tokens that passed the layers: a shared prompt counts once, a completion's last token not at all.
    metrics["num_trained_tokens"] = Metric(sum(b.num_tokens for b in batches), kind="sum")
    if not (math.isfinite(norm) and math.isfinite(metrics["loss"].value)):
        optimizer.zero_grad()
        reason = f"loss {metrics['loss'].value:g} and gradient norm {norm:g} are not both finite"
        return StepStats(metrics, stepped=False, skipped_reason=reason)
    # torch.nn.utils.clip_grad_norm_ divides by norm + 1e-6 as well.
    optimizer.step(learning_rate=learning_rate, gradient_scale=min(1.0, max_grad_norm / (norm + 1e-6)))
    return StepStats(metrics, stepped=True)


def _backward(policy: Policy, batch: MicroBatch, objective: ObjectiveConfig) -> Metrics:
    logprobs_K, entropy_K = policy.forward(batch)
    device = logprobs_K.device
    correction = sampler_correction(
        logprobs_K,
        batch.sampler_logprobs_K.to(device),
        batch.sequence_K.to(device),
        mode=objective.importance_sampling_mode,
        clip_max=objective.importance_sampling_clip_max,
    )
    output = policy_loss(
        logprobs_K,
        # One optimizer step per batch: the policy that is differentiated is the one that sampled.
        old_logprobs_K=logprobs_K.detach(),
        advantages_K=batch.advantages_K.to(device),
        weights_K=batch.weights_K.to(device),
        correction_K=correction.weights_K,
        loss_type=objective.loss_type,
        epsilon=objective.epsilon,
        epsilon_high=objective.epsilon_high,
        reference_logprobs_K=policy.reference_logprobs(batch) if objective.beta > 0 else None,
        beta=objective.beta,
    )
    output.loss.backward()
    entropy = Metric(float(entropy_K.sum()), float(batch.num_trained_tokens))
    return {**output.metrics, **correction.metrics, "entropy": entropy}
