"""Builders of small records for tests."""

from __future__ import annotations

import random
from collections.abc import Sequence

from strop.types import Problem, Rollout, Sample, ScoredRollout, Segment


def rollout(
    prompt: Sequence[int],
    completion: Sequence[int],
    *,
    logprobs: Sequence[float] | None = None,
    problem_id: str = "p",
    sample_index: int = 0,
    truncated: bool = False,
    loss_mask: Sequence[bool] | None = None,
) -> Rollout:
    values = tuple(logprobs) if logprobs is not None else (-1.0,) * len(completion)
    mask = tuple(loss_mask) if loss_mask is not None else (True,) * len(completion)
    return Rollout(
        problem=Problem(problem_id, "question", tuple(prompt)),
        sample_index=sample_index,
        segments=(
            Segment("prompt", tuple(prompt), (False,) * len(prompt)),
            Segment("sampled", tuple(completion), mask, values),
        ),
        text="text",
        finish_reason="length" if truncated else "stop",
        policy_version=0,
        seed=1,
    )


def scored(item: Rollout, reward: float | None, **scores: float | None) -> ScoredRollout:
    return ScoredRollout(item, reward, scores or {"reward": reward})


def sample(item: Rollout, advantage: float = 1.0, token_weight: float = 1.0) -> Sample:
    return Sample(scored(item, 1.0), advantage, token_weight)


def random_samples(
    seed: int, *, vocab: int, prompts: Sequence[int], lengths: Sequence[Sequence[int]], weight: float = 0.01
) -> list[Sample]:
    """Samples with random tokens, log-probabilities and advantages: lengths[p][g] tokens after prompts[p] tokens."""
    draw = random.Random(seed)
    result = []
    for p, (prompt_length, group) in enumerate(zip(prompts, lengths, strict=True)):
        prompt = [draw.randrange(2, vocab) for _ in range(prompt_length)]
        for g, n in enumerate(group):
            completion = [draw.randrange(2, vocab) for _ in range(n)]
            item = rollout(
                prompt, completion, problem_id=f"p{p}", sample_index=g, logprobs=[-3 * draw.random() for _ in range(n)]
            )
            result.append(sample(item, draw.uniform(-2, 2), weight))
    return result
