"""The frozen records that travel through a step, each richer than the one before.

    Problem -> Request -> Rollout -> ScoredRollout -> Sample -> MicroBatch -> StepStats

Letters that end tensor and list names give their shape:

    P problems   G generations per problem   N = P * G rollouts   T tokens of a packed batch
    K trained tokens of a packed batch       H hidden size        V vocabulary   R rank of an adapter

Log-probabilities are fp32 and taken after division by the sampling temperature. No record is written in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Message = Mapping[str, str]
"""One chat turn: {"role": ..., "content": ...}."""

REWARD_KEYWORDS = (
    "prompts", "completions", "completion_ids", "prefill", "truncated", "max_completion_length", "correct",
    "trainer_state", "log_extra", "log_metric",
)  # fmt: skip
"""Keywords that Strop gives to a reward function; a data set has no column of such a name."""

REWARD_FORMS = ("verl", "openrlhf", "swift", "verifiers")
"""What may stand before an entry of `rewards.funcs`, as in `verl:path.py:compute_score`: whose convention it is."""

ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM allows for max_lora_rank."""


def allowed_rank(rank: int) -> int:
    """Return the smallest rank that vLLM allows and that holds `rank`; its buffers have all of it."""
    return next(r for r in ENGINE_RANKS if r >= rank)


FinishReason = Literal["stop", "length"]
SegmentKind = Literal["prompt", "sampled", "environment"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of a task, rendered and tokenised."""

    id: str
    """Stable across runs and machines, e.g. `gsm8k/train/17`."""
    prompt: str | tuple[Message, ...]
    """What the row says: plain text, or the messages of a conversation (then completions are messages as well)."""
    prompt_token_ids: tuple[int, ...]
    """What the engine is given: the prompt through the chat template when it is a conversation."""
    row: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Every column of the row except `prompt`; reward functions receive them as keyword arguments."""
    prefill: str = ""
    """Text that the chat template already put at the start of the completion, e.g. `<think>` and a line break."""

    @property
    def is_conversational(self) -> bool:
        """Whether the prompt is a list of messages."""
        return not isinstance(self.prompt, str)


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to be sampled."""

    problem: Problem
    sample_index: int
    """g in 0..G-1 within the problem's group."""
    seed: int
    """63 bits; see `seeding`."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn. Training allows temperature alone, so that processed log-probabilities are exact."""

    max_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float = 1.0
    """0 means greedy; log-probabilities are then those of the unscaled distribution."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of one sequence with one origin. All lists have the segment's length."""

    kind: SegmentKind
    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    """True where the token is trained on."""
    logprobs: tuple[float, ...] | None = None
    """The sampler's log-probability of each token; None where nothing was sampled."""

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        assert len(self.loss_mask) == n, f"{len(self.loss_mask)} mask entries for {n} tokens"
        assert self.logprobs is None or len(self.logprobs) == n, f"{len(self.logprobs or ())} logprobs for {n} tokens"
        assert self.kind == "sampled" or not any(self.loss_mask), f"a {self.kind} segment cannot be trained on"


@dataclass(frozen=True, slots=True)
class Rollout:
    """One finished completion. Single-turn is the case of two segments: prompt, sampled."""

    problem: Problem
    sample_index: int
    segments: tuple[Segment, ...]
    text: str
    """The completion decoded without special tokens; `<think>` tags are kept."""
    finish_reason: FinishReason
    policy_version: int
    """Number of published updates when it was sampled."""
    seed: int
    num_cached_tokens: int = 0
    """Prompt tokens that the engine found in its prefix cache."""

    @property
    def completion_token_ids(self) -> tuple[int, ...]:
        """Every token after the prompt, the stop token included."""
        if len(self.segments) == 2:  # single-turn: the tuple itself, which thousands of tokens are not copied for
            return self.segments[1].token_ids
        return tuple(chain.from_iterable(s.token_ids for s in self.segments[1:]))

    @property
    def num_completion_tokens(self) -> int:
        """Length of `completion_token_ids`."""
        return sum(len(s.token_ids) for s in self.segments[1:])

    @property
    def is_truncated(self) -> bool:
        """Whether the completion ran into its token limit instead of stopping by itself."""
        return self.finish_reason == "length"

    @property
    def completion(self) -> str | list[Message]:
        """The completion as reward functions see it: a message list exactly when the prompt is conversational."""
        if self.problem.is_conversational:
            return [{"role": "assistant", "content": self.text}]
        return self.text


@dataclass(frozen=True, slots=True)
class ScoredRollout:
    """A rollout with its rewards. `reward` None means unscored: no advantage, no gradient, counted and shown."""

    rollout: Rollout
    reward: float | None
    """Weighted sum over the functions that apply; None if one failed or none applies."""
    scores: Mapping[str, float | None]
    """Raw value of each function by name; None where it does not apply or failed."""
    failures: Mapping[str, str] = field(default_factory=dict[str, str])
    """Name of each function that raised, ran out of time or gave NaN, with the reason."""
    correct: bool | None = None
    """Whether every weighted correctness function that applies reached its declared maximum; None if none applies or
    one failed."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A scored rollout with its advantage and its share of the step's loss."""

    scored: ScoredRollout
    advantage: float
    token_weight: float
    """What each trained token of this completion counts: 1 / denominator of the whole optimizer step."""


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """Where one completion lies in a packed batch: tokens [start, start + length), after the group's prompt."""

    start: int
    length: int


@dataclass(frozen=True, slots=True)
class GroupSpan:
    """Where one group lies in a packed batch: its prompt once, then its completions."""

    prompt_start: int
    prompt_length: int
    completions: tuple[SequenceSpan, ...]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Packed token sequences for one forward and backward pass.

    The last token of a sequence predicts nothing and is left out, so T counts only tokens that pass the layers.
    """

    token_ids_T: torch.Tensor
    """[T] int64."""
    position_ids_T: torch.Tensor
    """[T] int64, the position of each token in its own sequence."""
    groups: tuple[GroupSpan, ...]
    predictor_K: torch.Tensor
    """[K] int64: index into T of the token whose hidden state predicts trained token k."""
    target_ids_K: torch.Tensor
    """[K] int64."""
    sampler_logprobs_K: torch.Tensor
    """[K] fp32."""
    advantages_K: torch.Tensor
    """[K] fp32."""
    weights_K: torch.Tensor
    """[K] fp32: the token's share of the step's loss."""
    sequence_K: torch.Tensor
    """[K] int64: which completion of this batch the token belongs to."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.token_ids_T.shape[0])

    @property
    def num_trained_tokens(self) -> int:
        """K."""
        return int(self.target_ids_K.shape[0])


@dataclass(frozen=True, slots=True)
class Metric:
    """A value that can be merged across micro-batches and ranks: mean = total / count, or an extreme."""

    total: float
    count: float = 1.0
    kind: Literal["mean", "sum", "min", "max"] = "mean"

    def merge(self, other: Metric) -> Metric:
        """Combine two parts of the same metric."""
        assert self.kind == other.kind, f"cannot merge {self.kind} with {other.kind}"
        if self.kind in ("min", "max"):
            pick = min if self.kind == "min" else max
            return Metric(pick(self.total, other.total), 1.0, self.kind)
        return Metric(self.total + other.total, self.count + other.count, self.kind)

    @property
    def value(self) -> float:
        """The number to show; NaN for a mean over nothing."""
        if self.kind != "mean":
            return self.total
        return self.total / self.count if self.count else float("nan")


Metrics = Mapping[str, Metric]


def merge_metrics(parts: Sequence[Metrics]) -> dict[str, Metric]:
    """Merge metrics by name, in order of first appearance."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name].merge(metric) if name in merged else metric
    return merged


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one optimizer step did."""

    metrics: Metrics
    """Loss, ratios, entropy, gradient norm …, under TRL's names where TRL has them."""
    stepped: bool
    """False when nothing was left to train on, or when the gradient was not finite."""
    skipped_reason: str = ""
