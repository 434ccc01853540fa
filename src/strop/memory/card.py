"""How a card's memory is shared out between rollouts and training.

The two take turns, so what has to fit is the larger of their peaks beside what is always there (weights, adapters and
their optimizer, CUDA's context, the engine's graphs). Where both fit beside each other, the KV cache stays mapped;
otherwise it is given back for training. Numbers are chosen by what they cost in time: of micro-batches and
checkpointed layers the pair with which a step is shortest (pace.py); for rollouts smaller prefill steps first, then
several waves instead of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import Config
from ..errors import PlanError
from .pace import Work, training_seconds
from .shapes import BYTES, GIB, ModelShape

CONTEXT_BYTES = int(0.9 * GIB)
"""CUDA's context, loaded kernels and the libraries' own memory: the card's peak less torch's, 0.65 to 0.9 GiB in three
runs on an H100."""
ENGINE_BYTES = int(0.3 * GIB)
"""The engine's CUDA graphs, block tables and input buffers."""
KV_BLOCK = 16
"""Tokens of a block of the KV cache on a card (vLLM's default)."""
PREFILL_TOKENS = (8192, 4096, 2048, 1024)
"""Tokens of one engine step, the largest that fits; less than 1024 would make prompts slow."""
LOGIT_BYTES = 512 << 20
LOGIT_ROW_STEP = 128
ADAMW_8BIT_BYTES = 2.03
"""Both moments of a value in 8 bits, with their scales (policy/optim.py)."""
STEP_VALUES = 1 << 25
"""Values that AdamW with fp32 moments and masters steps at a time (policy/optim.py); their gradients are fp32."""
COMPACT_STEP = (1 << 22, 33)
"""Values that the other optimizers unpack at a time (policy/compact.py), and bytes of one at the peak."""
NF4_PREFILL_BYTES = 144 << 20
"""A prefill step of more than 256 tokens unpacks 4-bit weights in pieces of this size (engine/vllm_nf4.py)."""
MAX_MICRO_BATCH = 32768
"""Larger micro-batches do not make a card faster."""
RELEASE_S = 0.03
"""Giving the KV cache back and mapping it again, once a step."""
SHORTER = 0.98
"""More checkpointed layers have to make a step at least this much shorter, as an estimate can tell no less."""
FRAGMENTATION = 1.08
"""torch's allocator reserves a little more than training's tensors take."""
KEPT = "as the run began, so that it goes on bit-equal"
HEADROOM = 0.03
"""Share of the memory that is not planned with."""


@dataclass(frozen=True, slots=True)
class CardNumbers:
    """What is derived for a card."""

    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_bytes: int
    release_kv: bool
    micro_batch_tokens: int
    checkpoint_layers: int
    logit_rows: int
    fixed_bytes: int
    rollout_bytes: int
    """Peak of a rollout beside what is fixed, the KV cache included."""
    training_bytes: int
    """Peak of a training step beside what is fixed, without the KV cache."""

    @property
    def peak_bytes(self) -> int:
        """Peak of the process."""
        both = max(self.rollout_bytes, self.training_bytes)
        return self.fixed_bytes + (both if self.release_kv else max(both, self.kv_cache_bytes + self.training_bytes))


@dataclass(frozen=True, slots=True)
class CardNeeds:
    """Byte counts of a run on a card, as functions of what is chosen."""

    config: Config
    shape: ModelShape
    dtype: str
    max_len: int
    flops: float = 0.0
    """The card's peak in FLOP/s; 0 where unknown."""

    @property
    def fixed(self) -> int:
        """Weights, what is trained with its optimizer, the reference, context and graphs."""
        return self.weights + self.trained + self.reference + CONTEXT_BYTES + ENGINE_BYTES

    @property
    def weights(self) -> int:
        """The base: once, or twice where the trainer is told to load a copy of its own."""
        model = self.config.model
        once = self.shape.weight_bytes(self.dtype, model.quantization, model.head, model.embedding)
        return once * (2 if model.share_weights == "copy" else 1)

    @property
    def trained(self) -> int:
        """Masters, gradients and moments; of adapters also the 16-bit copies of trainer (fused factors) and engine."""
        optim = self.config.optim
        moments = ADAMW_8BIT_BYTES if optim.name == "adamw_8bit" else 8
        if self.config.lora.r:
            trainer = self.shape.lora_parameters(self.config.lora.r) * (4 + 4 + moments + 2 * BYTES[self.dtype])
            return int(trainer + self.shape.engine_lora_values(self.config.lora.r) * BYTES[self.dtype])
        masters = 0 if self.dtype == "float32" else {"fp32": 4, "kahan": 2}[optim.master]
        return int(self.shape.num_parameters * (masters + BYTES[self.dtype] + moments))

    @property
    def gradients(self) -> int:
        """Part of `trained`; there are none while completions are generated."""
        rank = self.config.lora.r
        return self.shape.lora_parameters(rank) * 4 if rank else self.shape.num_parameters * BYTES[self.dtype]

    @property
    def reference(self) -> int:
        """A frozen copy, for full fine-tuning with a KL term."""
        return self.weights if self.config.objective.beta > 0 and not self.config.lora.r else 0

    @property
    def completions(self) -> int:
        """Completions of a step."""
        return self.config.rollout.num_prompts * self.config.rollout.num_generations

    @property
    def wanted_seqs(self) -> int:
        """Completions to decode at a time where memory is no matter."""
        return min(self.completions, self.config.rollout.max_num_seqs or self.completions)

    def kv_bytes(self, seqs: int) -> int:
        """KV cache for `seqs` completions at a time at their full length; a group's prompt is held once."""
        rollout = self.config.rollout
        prompt_blocks = -(-self.config.task.max_prompt_length // KV_BLOCK)
        own_blocks = -(-rollout.max_completion_length // KV_BLOCK) + 1
        groups = min(rollout.num_prompts, -(-seqs // rollout.num_generations) + 1)
        blocks = groups * prompt_blocks + seqs * own_blocks + 2  # vLLM's null block, and one against rounding
        return blocks * KV_BLOCK * self.shape.kv_bytes_per_token(self.dtype)

    def rollout(self, seqs: int, batched: int, kv: int) -> int:
        """Peak of a rollout beside `fixed`: its KV cache and workspace, in the place of gradients."""
        return kv + self.rollout_workspace(seqs, batched) - self.gradients

    def rollout_workspace(self, seqs: int, batched: int) -> int:
        """A prefill step's activations in one layer, and the logits of a decode step with the sampler's copy."""
        s = self.shape
        unpacked = NF4_PREFILL_BYTES if self.config.model.quantization == "nf4" else 0
        activations = batched * (4 * s.hidden_size + 3 * s.intermediate_size) * BYTES[self.dtype]
        return activations + unpacked + seqs * s.vocab_size * 6

    def logits(self, rows: int) -> int:
        """A chunk of logits, overwritten by its gradient."""
        return rows * self.shape.vocab_size * BYTES[self.dtype]

    def training(self, tokens: int, checkpointed: int, rows: int) -> int:
        """Peak of forward, backward and the optimizer's step with micro-batches of `tokens` tokens."""
        backward = max(int(FRAGMENTATION * tokens * each) + more for each, more in self._moments(checkpointed))
        return max(backward + self.logits(rows) + self.unpacked(rows), self.stepping)

    def fitting_tokens(self, room: int, checkpointed: int, rows: int) -> int:
        """Most tokens of a micro-batch with which `training` takes no more than `room` bytes; 0 where none do."""
        if room < self.stepping:
            return 0
        left = room - self.logits(rows) - self.unpacked(rows)
        return max(0, min(int((left - more) / FRAGMENTATION) // each for each, more in self._moments(checkpointed)))

    def _moments(self, checkpointed: int) -> tuple[tuple[int, int], ...]:
        """(bytes per token, further bytes) at each moment of backward that may be its peak.

        With all weights trained the head comes first: its gradient adds up in fp32 and is then rounded (policy/
        logprobs.py). A tied one waits for the embedding's share while the layers run, whose block makes its gradients
        beside those that are there.
        """
        s, in_layer, size = self.shape, self.bytes_per_token(checkpointed), BYTES[self.dtype]
        if self.config.lora.r:
            return ((in_layer, 0),)
        layer = s.layer_bytes_per_token(self.dtype, fused=s.fused)
        head = s.vocab_size * s.hidden_size
        attention = s.linear_parameters // s.num_layers - 3 * s.hidden_size * s.intermediate_size
        block = max(attention, 3 * s.hidden_size * s.intermediate_size)
        waiting = head if s.tied_embeddings else 0
        return (in_layer - layer, head * (4 + size)), (in_layer, (block + waiting) * size)

    @property
    def stepping(self) -> int:
        """What the optimizer's step takes when nothing of backward is there any more, beside `trained`."""
        optim, rank = self.config.optim, self.config.lora.r
        count = self.shape.lora_parameters(rank) if rank else self.shape.num_parameters
        if optim.name == "adamw_8bit" or optim.master == "kahan":
            return COMPACT_STEP[1] * min(count, COMPACT_STEP[0])
        return 0 if rank or self.dtype == "float32" else 4 * min(count, STEP_VALUES)

    def unpacked(self, rows: int) -> int:
        """Weights in few bits that training unpacks: the largest linear at a time, the head in pieces of 8192 rows."""
        s, model = self.shape, self.config.model
        size = s.hidden_size * s.intermediate_size * BYTES[self.dtype] if model.quantization == "nf4" else 0
        return size + (s.hidden_size * (8192 * BYTES[self.dtype] + 4 * rows) if model.head == "int8" else 0)

    def bytes_per_token(self, checkpointed: int) -> int:
        """What a packed token takes at the peak: what is kept, one layer at work, and hidden states at both ends."""
        s, rank = self.shape, self.config.lora.r
        kept = s.activation_bytes_per_token(self.dtype, checkpointed=checkpointed, fused=s.fused, lora_rank=rank)
        layer = s.layer_bytes_per_token(self.dtype, fused=s.fused, lora_rank=rank)
        return kept + layer + 4 * s.hidden_size * BYTES[self.dtype]

    @property
    def step_tokens(self) -> int:
        """Most packed tokens of a step."""
        rollout, prompt = self.config.rollout, self.config.task.max_prompt_length
        prompts = rollout.num_prompts if self.config.optim.share_prompt else self.completions
        return prompts * prompt + self.completions * rollout.max_completion_length

    @property
    def work(self) -> Work:
        """A step at its longest."""
        rollout, share = self.config.rollout, self.config.optim.share_prompt
        return Work(
            rollout.num_prompts, rollout.num_generations, self.config.task.max_prompt_length,
            rollout.max_completion_length, share,
        )  # fmt: skip


def plan_card(needs: CardNeeds, budget: int, kept: Mapping[str, Any]) -> CardNumbers:
    """Derive the numbers for a card. Raises PlanError without a hint; the caller looks for the cheapest change.

    `kept` are the numbers of a run that is resumed; they are taken where they still fit.
    """
    fixed = needs.fixed
    room = int(budget * (1 - HEADROOM)) - fixed
    if (again := _kept(needs, room, kept)) is not None:
        return again
    batched, seqs = _rollout(needs, room)
    kv = needs.kv_bytes(seqs)
    release = False
    beside, alone = _training(needs, room - kv), _training(needs, room)
    if alone is None:
        raise _too_little(needs, room, budget)
    release = beside is None or alone.seconds + RELEASE_S < beside.seconds
    training = alone if beside is None or release else beside
    return CardNumbers(
        max_num_seqs=seqs,
        max_num_batched_tokens=batched,
        kv_cache_bytes=kv,
        release_kv=release,
        micro_batch_tokens=training.micro_batch_tokens,
        checkpoint_layers=training.checkpoint_layers,
        logit_rows=training.logit_rows,
        fixed_bytes=fixed,
        rollout_bytes=needs.rollout(seqs, batched, kv),
        training_bytes=training.num_bytes,
    )


def _too_little(needs: CardNeeds, room: int, budget: int) -> PlanError:
    optim, num_layers = needs.config.optim, needs.shape.num_layers
    tokens = optim.micro_batch_tokens or needs.max_len
    layers = num_layers if optim.checkpoint_layers is None else min(optim.checkpoint_layers, num_layers)
    short = needs.training(tokens, layers, LOGIT_ROW_STEP) - room
    return PlanError(
        f"training on {tokens} tokens at a time needs {_tenths(short)} GiB more than there is "
        f"({budget / GIB:.1f} GiB, of which {needs.fixed / GIB:.1f} are weights, optimizer, CUDA and the engine)"
    )


def _tenths(num_bytes: int) -> str:
    """Return GiB with one decimal, rounded up: what is missing is never 0.0."""
    return f"{max(1, math.ceil(10 * num_bytes / GIB)) / 10:.1f}"


def _rollout(needs: CardNeeds, room: int) -> tuple[int, int]:
    """Return (tokens of an engine step, completions at a time): as many at a time as fit, then the largest step."""
    wanted = needs.wanted_seqs
    best = (0, 0)
    for batched in PREFILL_TOKENS:
        seqs = _most(wanted, lambda n, b=batched: needs.rollout(n, max(b, n), needs.kv_bytes(n)) <= room)
        if seqs > best[1]:
            best = (max(batched, seqs), seqs)
    if not best[1]:
        least = needs.rollout(1, PREFILL_TOKENS[-1], needs.kv_bytes(1))
        raise PlanError(
            f"generating one sequence of {needs.max_len} tokens needs {_tenths(least - room)} GiB more than there is"
        )
    waves = -(-wanted // best[1])
    return best[0], -(-wanted // waves)  # waves of equal size


def _most(limit: int, fits: Any) -> int:
    """Return the largest n <= limit with fits(n), 0 if none; what fits for n fits for less."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


@dataclass(frozen=True, slots=True)
class _Training:
    micro_batch_tokens: int
    checkpoint_layers: int
    logit_rows: int
    num_bytes: int
    seconds: float


def _training(needs: CardNeeds, room: int) -> _Training | None:
    """Return the fastest micro-batch and checkpointed layers in `room` bytes; None when one sequence does not fit."""
    rows = min(LOGIT_BYTES, room // 8) // needs.logits(LOGIT_ROW_STEP) * LOGIT_ROW_STEP
    return _fastest(needs, room, max(LOGIT_ROW_STEP, rows)) or _fastest(needs, room, LOGIT_ROW_STEP)


def _fastest(needs: CardNeeds, room: int, rows: int) -> _Training | None:
    optim, layers = needs.config.optim, needs.shape.num_layers
    most = max(needs.max_len, min(needs.step_tokens, MAX_MICRO_BATCH))
    pinned = None if optim.checkpoint_layers is None else min(optim.checkpoint_layers, layers)
    packed = needs.config.model.quantization == "nf4"
    best: _Training | None = None
    for count in range(layers + 1) if pinned is None else (pinned,):
        fitting = needs.fitting_tokens(room, count, rows)
        tokens = optim.micro_batch_tokens or min(most, fitting)
        if not needs.max_len <= tokens <= fitting:
            continue
        seconds = training_seconds(needs.shape, needs.flops, needs.work, tokens, count, packed=packed)
        if best is None or seconds < SHORTER * best.seconds:
            best = _Training(tokens, count, rows, needs.training(tokens, count, rows), seconds)
    return best


def _kept(needs: CardNeeds, room: int, kept: Mapping[str, Any]) -> CardNumbers | None:
    names = ("max_num_seqs", "max_num_batched_tokens", "kv_cache_bytes", "release_kv", "micro_batch_tokens",
             "checkpoint_layers", "logit_rows")  # fmt: skip
    if any(kept.get(name) is None for name in names):
        return None
    values = {name: kept[name] for name in names}
    # What is pinned now wins: a run that ran out of memory is resumed with smaller numbers.
    optim = needs.config.optim
    if optim.micro_batch_tokens is not None:
        values["micro_batch_tokens"] = optim.micro_batch_tokens
    if optim.checkpoint_layers is not None:
        values["checkpoint_layers"] = min(optim.checkpoint_layers, needs.shape.num_layers)
    numbers = CardNumbers(
        **values,
        fixed_bytes=needs.fixed,
        rollout_bytes=needs.rollout(
            kept["max_num_seqs"], kept["max_num_batched_tokens"], kept["kv_cache_bytes"]
        ),
        training_bytes=needs.training(values["micro_batch_tokens"], values["checkpoint_layers"], kept["logit_rows"]),
    )  # fmt: skip
    fits = numbers.peak_bytes <= needs.fixed + room and numbers.micro_batch_tokens >= needs.max_len
    return numbers if fits and numbers.max_num_seqs <= needs.wanted_seqs else None
