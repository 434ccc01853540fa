"""One optimizer step over the micro-batches of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..config import ObjectiveConfig
from ..errors import MemoryExhaustedError
from ..objective.correction import sampler_correction
from ..objective.losses import policy_loss
from ..objective.measured import Measured, read_all
from ..objective.packing import halved
from ..policy.optim import Optimizer
from ..policy.policy import DeviceBatch, Policy
from ..types import Metric, MicroBatch, StepStats, merge_metrics
from .shortage import IN_A_NEW_RUN

MAX_HALVINGS = 2
"""How often a micro-batch that does not fit is halved; the next one that does not fit ends the run."""
FORGIVEN_AFTER = 50
"""Steps without a shortage after which one fewer counts."""


@dataclass(slots=True)
class MicroBatchLimit:
    """What the card has shown to be too much. A run keeps it, so that later steps begin with what fits."""

    tokens: int | None = None
    """Most tokens of a micro-batch; None: as planned."""
    halvings: int = 0
    quiet: int = 0
    """Steps in a row without a shortage."""
    note: Callable[[str], None] = lambda message: None
    """Told when a micro-batch was halved."""

    def within(self, planned: int) -> int:
        """Return the tokens of a micro-batch to pack."""
        return planned if self.tokens is None else min(planned, self.tokens)

    def halve(self, batches: Sequence[MicroBatch], failed: MicroBatch, reason: str) -> list[MicroBatch]:
        """Return the batches of the step, none larger than half of the one that ran out of memory.

        Raises MemoryExhaustedError when that one cannot be split, or when this happened too often; the half stays the
        limit of a run that is resumed.
        """
        half, splits = max(failed.num_tokens // 2, 1), halved(failed) is not None
        if splits:
            self.tokens = half
        if self.halvings >= MAX_HALVINGS or not splits:
            raise MemoryExhaustedError(
                f"the card has too little memory to train on {failed.num_tokens} tokens at a time "
                f"({self.halvings} smaller micro-batches were tried before): {reason}",
                hint=f"optim.micro_batch_tokens: set it below {failed.num_tokens}; or run.vram_gib: raise it, if "
                f"something else used the card; then go on with --resume. {IN_A_NEW_RUN}",
            )
        self.halvings, self.quiet = self.halvings + 1, 0
        parts: list[MicroBatch] = list(batches)
        while any(b.num_tokens > half and halved(b) is not None for b in parts):
            parts = [p for b in parts for p in ((halved(b) or (b,)) if b.num_tokens > half else (b,))]
        self.note(
            f"the card ran out of memory on a micro-batch of {failed.num_tokens} tokens: the step is made again with "
            f"at most {half}, and so are the next ones (optim.micro_batch_tokens)"
        )
        return parts

    def fitted(self) -> None:
        """Count a step that fitted: after `FORGIVEN_AFTER` in a row one shortage is forgotten, but not its limit."""
        self.quiet += 1
        if self.quiet >= FORGIVEN_AFTER:
            self.halvings, self.quiet = max(0, self.halvings - 1), 0


def update(
    policy: Policy,
    optimizer: Optimizer,
    batches: Sequence[MicroBatch],
    objective: ObjectiveConfig,
    *,
    learning_rate: float,
    max_grad_norm: float,
    on_batch: Callable[[], None] = lambda: None,
    on_step: Callable[[], None] = lambda: None,
    limit: MicroBatchLimit | None = None,
) -> StepStats:
    """Add up the gradients of all micro-batches and make one step; `on_batch` is called after each of them.

    `on_step` is called before the weights change.

    Makes none, and touches neither momentum nor weights, when nothing is left to train on or when the loss or the
    gradient is not finite. When memory runs out, the step is made again in smaller micro-batches, from the start: the
    gradient is then the one of a step that was packed so. Raises MemoryExhaustedError when that does not help.
    """
    if not batches:
        return StepStats({}, stepped=False, skipped_reason="no group has a signal")
    limit = limit or MicroBatchLimit()
    scale = _loss_scale(policy, batches)
    while True:
        optimizer.zero_grad()
        parts: list[dict[str, Measured]] = []
        try:
            _add_gradients(policy, batches, objective, scale, parts, on_batch)
            break
        except torch.OutOfMemoryError as e:
            reason = str(e).split(". ")[0]
        # Outside of the handler, where the failed pass no longer holds its tensors.
        optimizer.zero_grad()
        failed = batches[min(len(parts), len(batches) - 1)]
        parts.clear()
        if policy.device.type == "cuda":
            torch.cuda.empty_cache()
        batches = limit.halve(batches, failed, reason)
    limit.fitted()
    metrics = merge_metrics(read_all(parts))
    norm = optimizer.gradient_norm() / scale
    metrics["grad_norm"] = Metric(norm)
    metrics["learning_rate"] = Metric(learning_rate)
    # Tokens that passed the layers: a shared prompt counts once, a completion's last token not at all.
    metrics["num_trained_tokens"] = Metric(sum(b.num_tokens for b in batches), kind="sum")
    if not (math.isfinite(norm) and math.isfinite(metrics["loss"].value)):
        optimizer.zero_grad()
        reason = f"loss {metrics['loss'].value:g} and gradient norm {norm:g} are not both finite"
        return StepStats(metrics, stepped=False, skipped_reason=reason)
    on_step()
    try:
        # torch.nn.utils.clip_grad_norm_ divides by norm + 1e-6 as well.
        optimizer.step(learning_rate=learning_rate, gradient_scale=min(1.0, max_grad_norm / (norm + 1e-6)) / scale)
    except torch.OutOfMemoryError as e:
        raise MemoryExhaustedError(
            f"the card has too little memory for the optimizer's own step, which may be half made and is not "
            f"saved: {str(e).split('. ')[0]}",
            hint="run.vram_gib: raise it, if something else used the card, and go on with --resume from the last "
            "checkpoint; or start again with optim.name: adamw_8bit, which needs less",
        ) from e
    return StepStats(metrics, stepped=True)


def _loss_scale(policy: Policy, batches: Sequence[MicroBatch]) -> float:
    """Return what the loss is multiplied by, and the gradient divided by again.

    1 except in fp16, whose smallest number is 6e-8: with 50,000 tokens in a step a token's share of the loss is 2e-5,
    and its gradient would vanish on the way down the layers. The power of two that brings the largest share to about 1
    makes it the gradient of one token's log-probability, far from either end of fp16. The adapters' gradients add up in
    fp32. A function of the whole step, so micro-batches do not change it.
    """
    if policy.dtype != torch.float16:
        return 1.0
    share = max(float(b.weights_K.abs().max()) for b in batches if b.num_trained_tokens)
    return 2.0 ** round(-math.log2(share)) if share > 0 and math.isfinite(share) else 1.0


def _add_gradients(
    policy: Policy,
    batches: Sequence[MicroBatch],
    objective: ObjectiveConfig,
    scale: float,
    parts: list[dict[str, Measured]],
    on_batch: Callable[[], None],
) -> None:
    """Run every micro-batch forward and backward; `parts` gets the metrics of each that is done."""
    prepared = [policy.prepare(batch) for batch in batches]
    for batch in prepared:
        parts.append(_backward(policy, batch, objective, scale))
        on_batch()


def _backward(policy: Policy, there: DeviceBatch, objective: ObjectiveConfig, scale: float) -> dict[str, Measured]:
    batch = there.batch
    logprobs_K, entropy_K = policy.forward(there)
    correction = sampler_correction(
        logprobs_K,
        batch.sampler_logprobs_K,
        batch.sequence_K,
        mode=objective.importance_sampling_mode,
        clip_max=objective.importance_sampling_clip_max,
    )
    output = policy_loss(
        logprobs_K,
        # One optimizer step per batch: the policy that is differentiated is the one that sampled.
        old_logprobs_K=logprobs_K.detach(),
        advantages_K=batch.advantages_K,
        weights_K=batch.weights_K,
        correction_K=correction.weights_K,
        loss_type=objective.loss_type,
        epsilon=objective.epsilon,
        epsilon_high=objective.epsilon_high,
        reference_logprobs_K=policy.reference_logprobs(there) if objective.beta > 0 else None,
        beta=objective.beta,
    )
    (output.loss if scale == 1.0 else output.loss * scale).backward()
    entropy = Measured(entropy_K.sum(), float(batch.num_trained_tokens))
    return {**output.metrics, **correction.metrics, "entropy": entropy}
