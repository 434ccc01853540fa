"""Packing arithmetic: samples into micro-batches of at most a token budget, a group's prompt stored once.

Order is kept and nothing is drawn, so the result is a function of the samples alone. A group that does not fit into
what is left of a micro-batch is split, and its prompt repeated. How samples are split changes no gradient beyond
float order, because every token already carries its share of the step's loss (`Sample.token_weight`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

from ..types import GroupSpan, MicroBatch, Sample, SequenceSpan


def pack(samples: Sequence[Sample], token_budget: int, *, share_prompt: bool = True) -> list[MicroBatch]:
    """Return micro-batches of at most `token_budget` tokens, in the order of the samples.

    With `share_prompt` a group's prompt is stored once per micro-batch, else once per completion. A single completion
    longer than the budget gets a micro-batch of its own; the plan keeps the budget above that.
    """
    batches: list[MicroBatch] = []
    current: list[tuple[tuple[int, ...], list[Sample]]] = []
    used = 0
    for starts_group, prompt, sample in _with_prompts(samples, share_prompt):
        own = _layer_tokens(sample)
        cost = own + (len(prompt) if starts_group or not current else 0)
        if current and used + cost > token_budget:
            batches.append(_build(current))
            current, used = [], 0
            cost = own + len(prompt)
        if starts_group or not current:
            current.append((prompt, []))
        current[-1][1].append(sample)
        used += cost
    if current:
        batches.append(_build(current))
    return batches


def _with_prompts(samples: Sequence[Sample], share: bool) -> Iterator[tuple[bool, tuple[int, ...], Sample]]:
    for prompt, members in groupby(samples, key=lambda s: s.scored.rollout.problem.prompt_token_ids):
        for i, sample in enumerate(members):
            yield i == 0 or not share, prompt, sample


def _layer_tokens(sample: Sample) -> int:
    """Tokens of a completion that pass the layers: all but the last, which predicts nothing."""
    return sample.scored.rollout.num_completion_tokens - 1


def _build(groups: Sequence[tuple[tuple[int, ...], Sequence[Sample]]]) -> MicroBatch:
    token_ids: list[int] = []
    positions: list[int] = []
    spans: list[GroupSpan] = []
    predictors: list[int] = []
    targets: list[int] = []
    sampler: list[float] = []
    advantages: list[float] = []
    weights: list[float] = []
    sequences: list[int] = []
    num_sequences = 0
    for prompt, members in groups:
        prompt_start = len(token_ids)
        token_ids += prompt
        positions += range(len(prompt))
        completions: list[SequenceSpan] = []
        for sample in members:
            start = len(token_ids)
            completion = sample.scored.rollout.completion_token_ids
            token_ids += completion[:-1]
            positions += range(len(prompt), len(prompt) + len(completion) - 1)
            completions.append(SequenceSpan(start, len(completion) - 1))
            offset = 0
            for segment in sample.scored.rollout.segments[1:]:
                logprobs = segment.logprobs or (0.0,) * len(segment.token_ids)
                rows = zip(segment.token_ids, segment.loss_mask, logprobs, strict=True)
                for j, (token, trained, logprob) in enumerate(rows, start=offset):
                    if not trained:
                        continue
                    # The first token of a completion is predicted by the last token of the shared prompt.
                    predictors.append(start + j - 1 if j else prompt_start + len(prompt) - 1)
                    targets.append(token)
                    sampler.append(logprob)
                    advantages.append(sample.advantage)
                    weights.append(sample.token_weight)
                    sequences.append(num_sequences)
                offset += len(segment.token_ids)
            num_sequences += 1
        spans.append(GroupSpan(prompt_start, len(prompt), tuple(completions)))
    return MicroBatch(
        token_ids_T=torch.tensor(token_ids, dtype=torch.int64),
        position_ids_T=torch.tensor(positions, dtype=torch.int64),
        groups=tuple(spans),
        predictor_K=torch.tensor(predictors, dtype=torch.int64),
        target_ids_K=torch.tensor(targets, dtype=torch.int64),
        sampler_logprobs_K=torch.tensor(sampler, dtype=torch.float32),
        advantages_K=torch.tensor(advantages, dtype=torch.float32),
        weights_K=torch.tensor(weights, dtype=torch.float32),
        sequence_K=torch.tensor(sequences, dtype=torch.int64),
    )
