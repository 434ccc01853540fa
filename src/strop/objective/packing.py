"""Packing arithmetic: samples into micro-batches of at most a token budget, a group's prompt stored once.

Order is kept and nothing is drawn, so the result is a function of the samples alone. A group may be split, and then its
prompt is computed in both micro-batches; where to cut is what makes the fewest tokens and micro-batches in all. How
samples are split changes no gradient beyond float order, because every token already carries its share of the step's
loss (`Sample.token_weight`).

Within a micro-batch all prompts lie first, then all completions: the keys of the prompts and the queries of the
completions are then two slices, and attention between them copies neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress, groupby, pairwise
from typing import NamedTuple

import numpy as np
import torch

from ..types import GroupSpan, MicroBatch, Sample, SequenceSpan

MICRO_BATCH_TOKENS = 256
"""What a micro-batch costs beside its tokens, in tokens: launching its kernels, unpacking weights in few bits."""


class _Item(NamedTuple):
    starts: bool
    """Whether a prompt comes with it wherever it lies: it is the first of its group, or prompts are not shared."""
    prompt: tuple[int, ...]
    sample: Sample


def pack(samples: Sequence[Sample], token_budget: int, *, share_prompt: bool = True) -> list[MicroBatch]:
    """Return micro-batches of at most `token_budget` tokens, in the order of the samples.

    With `share_prompt` a group's prompt is stored once per micro-batch, else once per completion. A single completion
    longer than the budget gets a micro-batch of its own; the plan keeps the budget above that.
    """
    items = list(_with_prompts(samples, share_prompt))
    batches: list[MicroBatch] = []
    for first, end in pairwise(_cuts(items, token_budget)):
        groups: list[tuple[tuple[int, ...], list[Sample]]] = []
        for item in items[first:end]:
            if item.starts or not groups:
                groups.append((item.prompt, []))
            groups[-1][1].append(item.sample)
        batches.append(_build(groups))
    return batches


def _cuts(items: Sequence[_Item], token_budget: int) -> list[int]:
    """Return where micro-batches begin and end, 0 first: of all cuts in order those that cost least.

    Dynamic programming over the last micro-batch: the least cost up to `end` is that up to its first item, plus it.
    """
    # Of each item: its tokens, and those of the prompt that come on top where a micro-batch begins with it.
    sizes = [_layer_tokens(i.sample) + (len(i.prompt) if i.starts else 0) for i in items]
    repeated = [0 if i.starts else len(i.prompt) for i in items]
    costs, begins = [0], [0]
    for end in range(1, len(items) + 1):
        tokens, least, best = 0, -1, end - 1
        for first in range(end - 1, -1, -1):
            tokens += sizes[first]
            held = tokens + repeated[first]
            if held > token_budget and first < end - 1:
                break
            cost = costs[first] + held + MICRO_BATCH_TOKENS
            if least < 0 or cost < least:
                least, best = cost, first
        costs.append(least)
        begins.append(best)
    cuts = [len(items)]
    while cuts[-1]:
        cuts.append(begins[cuts[-1]])
    return cuts[::-1]


def _with_prompts(samples: Sequence[Sample], share: bool) -> Iterator[_Item]:
    for prompt, members in groupby(samples, key=lambda s: s.scored.rollout.problem.prompt_token_ids):
        for i, sample in enumerate(members):
            yield _Item(i == 0 or not share, prompt, sample)


def _layer_tokens(sample: Sample) -> int:
    """Tokens of a completion that pass the layers: all but the last, which predicts nothing."""
    return sample.scored.rollout.num_completion_tokens - 1


def _build(groups: Sequence[tuple[tuple[int, ...], Sequence[Sample]]]) -> MicroBatch:
    """Lay out samples, whole lists at a time: a loop over tokens takes a good part of what training on them takes."""
    token_ids: list[int] = []
    positions: list[int] = []
    spans: list[GroupSpan] = []
    predictors: list[int] = []
    targets: list[int] = []
    sampler: list[float] = []
    counts: list[int] = []  # trained tokens of each completion
    prompt_starts: list[int] = []
    for prompt, _ in groups:
        prompt_starts.append(len(token_ids))
        token_ids += prompt
        positions += range(len(prompt))
    for prompt_start, (prompt, members) in zip(prompt_starts, groups, strict=True):
        completions: list[SequenceSpan] = []
        for sample in members:
            start = len(token_ids)
            completion = sample.scored.rollout.completion_token_ids
            token_ids += completion[:-1]
            positions += range(len(prompt), len(prompt) + len(completion) - 1)
            completions.append(SequenceSpan(start, len(completion) - 1))
            # The first token of a completion is predicted by the last token of the shared prompt.
            before = [prompt_start + len(prompt) - 1, *range(start, start + len(completion) - 1)]
            mask = [trained for segment in sample.scored.rollout.segments[1:] for trained in segment.loss_mask]
            predictors += compress(before, mask)
            targets += compress(completion, mask)
            for segment in sample.scored.rollout.segments[1:]:
                sampler += compress(segment.logprobs or (0.0,) * len(segment.token_ids), segment.loss_mask)
            counts.append(sum(mask))
        spans.append(GroupSpan(prompt_start, len(prompt), tuple(completions)))
    samples = [sample for _, members in groups for sample in members]
    return MicroBatch(
        token_ids_T=_tensor(token_ids, np.int64),
        position_ids_T=_tensor(positions, np.int64),
        groups=tuple(spans),
        predictor_K=_tensor(predictors, np.int64),
        target_ids_K=_tensor(targets, np.int64),
        sampler_logprobs_K=_tensor(sampler, np.float32),
        advantages_K=_tensor([s.advantage for s in samples], np.float32, counts),
        weights_K=_tensor([s.token_weight for s in samples], np.float32, counts),
        sequence_K=_tensor(list(range(len(samples))), np.int64, counts),
    )


def _tensor(values: Sequence[float], kind: type[np.generic], counts: Sequence[int] | None = None) -> torch.Tensor:
    """Return the values, each as often as `counts` says.

    By numpy: it reads a list three times as fast as torch, whose `repeat_interleave` shares even a short one out to all
    threads.
    """
    array = np.array(values, dtype=kind)
    return torch.from_numpy(array if counts is None else np.repeat(array, counts))


def halved(batch: MicroBatch) -> tuple[MicroBatch, MicroBatch] | None:
    """Split a micro-batch between two completions, with about half of the tokens each; None when it has only one.

    Both parts hold the prompts that they need. Completions, tokens and weights are the same as before.
    """
    lengths = [span.length for group in batch.groups for span in group.completions]
    if len(lengths) < 2:
        return None
    cut, seen = 1, lengths[0]
    while cut < len(lengths) - 1 and seen + lengths[cut] <= sum(lengths) / 2:
        seen += lengths[cut]
        cut += 1
    return _part(batch, 0, cut), _part(batch, cut, len(lengths))


def _part(batch: MicroBatch, first: int, end: int) -> MicroBatch:
    """Return completions `first` to `end` of a batch, numbered through all groups, as a batch of their own."""
    kept: list[tuple[GroupSpan, list[SequenceSpan]]] = []
    number = 0
    for group in batch.groups:
        spans = [s for i, s in enumerate(group.completions, start=number) if first <= i < end]
        number += len(group.completions)
        if spans:
            kept.append((group, spans))
    taken = [range(group.prompt_start, group.prompt_start + group.prompt_length) for group, _ in kept]
    taken += [range(span.start, span.start + span.length) for _, spans in kept for span in spans]
    source = torch.tensor([i for part in taken for i in part], dtype=torch.int64)
    new_place = torch.full((batch.num_tokens,), -1)
    new_place[source] = torch.arange(len(source))
    prompt_at, span_at = 0, sum(group.prompt_length for group, _ in kept)
    groups: list[GroupSpan] = []
    for group, spans in kept:
        moved: list[SequenceSpan] = []
        for span in spans:
            moved.append(SequenceSpan(span_at, span.length))
            span_at += span.length
        groups.append(GroupSpan(prompt_at, group.prompt_length, tuple(moved)))
        prompt_at += group.prompt_length
    chosen = (batch.sequence_K >= first) & (batch.sequence_K < end)
    return MicroBatch(
        token_ids_T=batch.token_ids_T[source],
        position_ids_T=batch.position_ids_T[source],
        groups=tuple(groups),
        predictor_K=new_place[batch.predictor_K[chosen]],
        target_ids_K=batch.target_ids_K[chosen],
        sampler_logprobs_K=batch.sampler_logprobs_K[chosen],
        advantages_K=batch.advantages_K[chosen],
        weights_K=batch.weights_K[chosen],
        sequence_K=batch.sequence_K[chosen] - first,
    )
