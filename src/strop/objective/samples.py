"""From scored rollouts to the samples that are trained on: advantages, the step's denominator, dropped groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..types import Metric, Sample, ScoredRollout
from .advantages import GroupAdvantages, Scale, group_advantages
from .losses import LOSSES, StepCounts
from .shaping import PolarityBonus, polarity_bonus


@dataclass(frozen=True, slots=True)
class SampleBatch:
    """What is left to train on, and what was counted before anything was dropped."""

    samples: tuple[Sample, ...]
    advantages_N: tuple[float | None, ...]
    """Of all rollouts, in their order; None where there is none."""
    counts: StepCounts
    metrics: Mapping[str, Metric]


def num_trained_tokens(scored: ScoredRollout) -> int:
    """Tokens of a completion that the loss mask keeps."""
    return sum(sum(segment.loss_mask) for segment in scored.rollout.segments)


def make_samples(
    scored_N: Sequence[ScoredRollout],
    num_generations: int,
    *,
    loss_type: str,
    scale_rewards: Scale,
    max_completion_length: int,
    mask_truncated_completions: bool,
    keep_groups_without_signal: bool,
    shaping: PolarityBonus | None = None,
) -> SampleBatch:
    """Turn P groups of G scored rollouts, in (problem, sample) order, into samples.

    A truncated completion that is masked leaves the loss and the denominators, but its reward stays in means and
    deviations, as in TRL: it is true information about the policy. Denominators are counted over all scored, unmasked
    completions before groups without signal are dropped; these are kept only where another term of the loss (beta)
    needs their tokens. `shaping` acts on the advantages last.
    """
    trained_N = [
        s.reward is not None
        and num_trained_tokens(s) > 0
        and not (mask_truncated_completions and s.rollout.is_truncated)
        for s in scored_N
    ]
    rewards_N = [s.reward for s in scored_N]
    result = group_advantages(rewards_N, num_generations, scale=scale_rewards)
    advantages_N, metrics = result.advantages_N, _metrics(scored_N, result)
    if shaping is not None:
        shaped = polarity_bonus(advantages_N, scored_N, num_generations, shaping)
        advantages_N, metrics = shaped.advantages_N, metrics | dict(shaped.metrics)
    counts = StepCounts(
        num_completions=sum(trained_N),
        num_tokens=sum(num_trained_tokens(s) for s, kept in zip(scored_N, trained_N, strict=True) if kept),
        max_completion_length=max_completion_length,
    )
    weight = LOSSES[loss_type].token_weight
    samples = []
    for i, (scored, advantage) in enumerate(zip(scored_N, advantages_N, strict=True)):
        wanted = keep_groups_without_signal or result.has_signal_P[i // num_generations]
        if trained_N[i] and advantage is not None and wanted:
            samples.append(Sample(scored, advantage, weight(num_trained_tokens(scored), counts)))
    return SampleBatch(tuple(samples), advantages_N, counts, metrics)


def _metrics(scored_N: Sequence[ScoredRollout], groups: GroupAdvantages) -> dict[str, Metric]:
    rewards = [s.reward for s in scored_N if s.reward is not None]
    lengths = [s.rollout.num_completion_tokens for s in scored_N]
    terminated = [n for n, s in zip(lengths, scored_N, strict=True) if not s.rollout.is_truncated]
    stds = [std for std in groups.group_std_P if not math.isnan(std)]
    count = len(scored_N)
    metrics = {
        "reward": Metric(math.fsum(rewards), len(rewards)),
        "reward_std": Metric(math.fsum(stds), len(stds)),
        "frac_reward_zero_std": Metric(sum(not s for s in groups.has_signal_P), len(groups.has_signal_P)),
        "frac_unscored": Metric(count - len(rewards), count),
        "completions/mean_length": Metric(sum(lengths), count),
        "completions/min_length": Metric(min(lengths), kind="min"),
        "completions/max_length": Metric(max(lengths), kind="max"),
        "completions/mean_terminated_length": Metric(sum(terminated), len(terminated)),
        "completions/min_terminated_length": Metric(min(terminated, default=0), kind="min"),
        "completions/max_terminated_length": Metric(max(terminated, default=0), kind="max"),
        "completions/clipped_ratio": Metric(count - len(terminated), count),
    }
    for name in scored_N[0].scores:
        values = [v for s in scored_N if (v := s.scores[name]) is not None]
        metrics[f"rewards/{name}/mean"] = Metric(math.fsum(values), len(values))
        mean = math.fsum(values) / len(values) if values else math.nan
        spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0
        metrics[f"rewards/{name}/std"] = Metric(spread)
    return metrics
