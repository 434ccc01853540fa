"""From the scored rollouts of one step to the numbers that the monitors follow.

Everything is one pass over the completions and linear in their tokens. A right completion is one whose `correct` is
True; where nothing says what is right, the numbers that need it are NaN.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..rewards.answers import after_hashes, answer_part, gold_text, last_box, last_number, tail
from ..types import Rollout, ScoredRollout

TIE = 1e-9
"""Rewards that differ by less are equal, as for advantages."""
MAX_ANSWER_CHARS = 64
"""An answer part that is longer is no answer by itself; its last number is."""
MIN_PROMPTS = 4
"""With fewer prompts in a step nothing can be said about answers to different prompts."""
NGRAM = 4


@dataclass(frozen=True, slots=True)
class Observation:
    """One step as the monitors see it."""

    columns: Mapping[str, float]
    """By the names of `history.COLUMNS`, those that come from rollouts."""
    metrics: Mapping[str, float]
    """What of it is worth a row in `metrics.jsonl`."""


def observe(
    scored_N: Sequence[ScoredRollout],
    advantages_N: Sequence[float | None],
    num_generations: int,
    *,
    weights: Mapping[str, float],
    format_functions: frozenset[str],
    gated: frozenset[str] = frozenset(),
) -> Observation:
    """Observe P groups of G completions in (problem, sample) order.

    `weights` are those of the reward functions by name, `format_functions` the names of those that pay for form,
    `gated` of those that pay for right completions alone.
    """
    size = num_generations
    groups = [_Group(scored_N[i : i + size], advantages_N[i : i + size]) for i in range(0, len(scored_N), size)]
    lengths = {
        right: [float(g.lengths[i]) for g in groups for i, c in enumerate(g.correct) if c is right]
        for right in (True, False)
    }
    repetition = _mean([r for s in scored_N if (r := repeated_share(s.rollout.completion_token_ids)) is not None])
    tied = [not g.differs for g in groups]
    knows = any(s.correct is not None for s in scored_N)
    all_right = [t and all(c is True for c in g.correct) for g, t in zip(groups, tied, strict=True)]
    all_wrong = [t and all(c is False for c in g.correct) for g, t in zip(groups, tied, strict=True)]
    mixed = [g for g in groups if g.is_mixed]
    share = top_answer_share([s.rollout for s in scored_N])
    columns = {
        "all_right": _mean(all_right) if knows else math.nan,
        "all_wrong": _mean(all_wrong) if knows else math.nan,
        "length_correlation": _mean([g.length_correlation() for g in groups if g.differs]),
        "log_length_gap": _mean([g.log_length_gap() for g in mixed]),
        "repetition": repetition,
        "sign_flips": _mean([flip for g in mixed for flip in g.sign_flips()]),
        "format_share": format_share(scored_N, weights, format_functions, gated),
        "answer_share": math.nan if share is None else share,
    }
    metrics = {
        "groups/all_right": columns["all_right"],
        "groups/all_wrong": columns["all_wrong"],
        "completions/mean_length_right": _mean(lengths[True]),
        "completions/mean_length_wrong": _mean(lengths[False]),
        "completions/repetition": repetition,
    }
    return Observation(columns, metrics)


class _Group:
    """The completions of one prompt."""

    __slots__ = ("advantages", "correct", "lengths", "rewards")

    def __init__(self, scored: Sequence[ScoredRollout], advantages: Sequence[float | None]) -> None:
        self.rewards = [s.reward for s in scored]
        self.lengths = [s.rollout.num_completion_tokens for s in scored]
        self.correct = [s.correct for s in scored]
        self.advantages = advantages

    @property
    def differs(self) -> bool:
        """Whether the rewards differ, so that the group has something to teach."""
        known = [r for r in self.rewards if r is not None]
        return len(known) > 1 and max(known) - min(known) > TIE

    @property
    def is_mixed(self) -> bool:
        """Whether it holds right and wrong completions."""
        return True in self.correct and False in self.correct

    def length_correlation(self) -> float:
        """Correlation of reward and length among completions that are equally right; 0 where one does not vary.

        Right answers may well need more words than guesses. What is looked for is pay for words alone, so both sides
        are centred on the mean of the right and of the wrong ones each.
        """
        pairs: dict[bool | None, list[tuple[float, float]]] = {}
        for reward, length, right in zip(self.rewards, self.lengths, self.correct, strict=True):
            if reward is not None:
                pairs.setdefault(right, []).append((reward, float(length)))
        xy = xx = yy = 0.0
        for rows in pairs.values():
            mean_x, mean_y = (math.fsum(column) / len(rows) for column in zip(*rows, strict=True))
            for x, y in rows:
                xy += (x - mean_x) * (y - mean_y)
                xx += (x - mean_x) ** 2
                yy += (y - mean_y) ** 2
        return xy / math.sqrt(xx * yy) if xx > TIE**2 and yy > TIE else 0.0

    def log_length_gap(self) -> float:
        """ln(mean length of the wrong ones / mean length of the right ones)."""
        wrong = [n for n, c in zip(self.lengths, self.correct, strict=True) if c is False]
        right = [n for n, c in zip(self.lengths, self.correct, strict=True) if c is True]
        return math.log(max(1.0, sum(wrong) / len(wrong))) - math.log(max(1.0, sum(right) / len(right)))

    def sign_flips(self) -> list[bool]:
        """For each completion with an advantage: whether it is right and pushed down, or wrong and pushed up."""
        return [
            advantage < 0 if right else advantage > 0
            for advantage, right in zip(self.advantages, self.correct, strict=True)
            if advantage is not None and right is not None
        ]


def repeated_share(token_ids: Sequence[int]) -> float | None:
    """Return the share of 4-grams that occurred before in the same completion; None with fewer than four tokens."""
    count = len(token_ids) - NGRAM + 1
    if count < 1:
        return None
    return 1.0 - len(set(zip(*(token_ids[i:] for i in range(NGRAM)), strict=False))) / count


def format_share(
    scored_N: Sequence[ScoredRollout],
    weights: Mapping[str, float],
    format_functions: frozenset[str],
    gated: frozenset[str] = frozenset(),
) -> float:
    """Return the share of everything that was paid (weight * value, where positive) which was paid for form.

    `gated` functions pay for right completions alone.
    """
    total = form = 0.0
    for scored in scored_N:
        for name, value in scored.scores.items():
            paid = weights.get(name, 0.0) * (value or 0.0)
            is_paid = scored.reward is not None and (name not in gated or bool(scored.correct))
            if is_paid and paid > 0:
                total += paid
                form += paid if name in format_functions else 0.0
    return form / total if total > 0 else math.nan


def top_answer_share(rollouts_N: Sequence[Rollout]) -> float | None:
    """Return how far one answer is given to different prompts: 0 as often as it should be, 1 always.

    The largest (s - b) / (1 - b), with s the share of completions that give an answer and b the share of prompts whose
    reference it is, one prompt's share at least. None with fewer than `MIN_PROMPTS` prompts.
    """
    golds = {r.problem.id: final_answer(gold_text(r.problem.row.get("answer"))) for r in rollouts_N}
    if len(golds) < MIN_PROMPTS:
        return None
    answers = Counter(a for r in rollouts_N if (a := final_answer(r.text, r.problem.prefill)) is not None)
    wanted = Counter(golds.values())
    worst = 0.0
    for answer, count in answers.items():
        base = max(1, wanted[answer]) / len(golds)
        if base < 1:
            worst = max(worst, (count / len(rollouts_N) - base) / (1 - base))
    return worst


def final_answer(text: str | None, prefill: str = "") -> str | None:
    """Return the answer that a completion or a reference ends with: the last box, `####`, a short text, a number."""
    part = None if text is None else answer_part(text, prefill)
    if part is None:
        return None
    end = tail(part)
    found = last_box(end) or after_hashes(end)
    if found is None:
        bare = end.strip()
        found = bare if 0 < len(bare) <= MAX_ANSWER_CHARS else last_number(end)
    return found.strip().casefold() if found and found.strip() else None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
