"""From the config, the model's shape and the machine to every number that nobody should have to choose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import Config
from ..errors import PlanError
from .machine import Machine
from .shapes import BYTES, GIB, ModelShape

CPU_BLOCK_SIZE = 32
"""vLLM's default of 128 tokens per block on a CPU would never cache the short prompts of a small run."""
MIN_BATCHED_TOKENS = 8192
KEPT = "as the run began, so that it goes on bit-equal"
MAX_CPU_MICRO_BATCH_TOKENS = 8192
MAX_MICRO_BATCH_TOKENS = 32768
CUDA_CONTEXT_BYTES = int(0.8 * GIB)
CUDA_ENGINE_BYTES = 1 * GIB
"""vLLM's graphs, its buffers and the workspace of its largest step."""
LOGIT_ROWS = 1024
"""Rows of logits that training holds at a time (policy/logprobs.py) ..."""
LOGIT_COPIES = 4
"""... and how many fp32 tensors of that size exist at its peak."""
ACTIVATION_FACTOR = {"cpu": 2.0, "cuda": 1.1}
"""Training's peak over what autograd keeps: the gradients of a layer, and on a CPU the padded attention of a batch."""


@dataclass(frozen=True, slots=True)
class PlanItem:
    """One number of the plan, and why it is what it is."""

    name: str
    value: Any
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Derived settings of a run. `items` is what is shown to the user and written to plan.json."""

    device: str
    dtype: str
    engine: str
    threads: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_bytes: int
    block_size: int | None
    micro_batch_tokens: int
    items: tuple[PlanItem, ...]

    def lines(self) -> Iterator[str]:
        """Yield one line per number, with its reason."""
        width = max(len(item.name) for item in self.items)
        for item in self.items:
            yield f"{item.name:<{width}}  {item.value!s:<12}  {item.reason}"

    def as_dict(self) -> dict[str, Any]:
        """Return what plan.json holds."""
        return {item.name: {"value": item.value, "reason": item.reason} for item in self.items}

    def promise(self) -> dict[str, Any]:
        """Return the numbers that a bit-equal resume depends on."""
        names = ("dtype", "engine", "threads", "max_num_seqs", "max_num_batched_tokens", "kv_cache_bytes", "block_size",
                 "micro_batch_tokens")  # fmt: skip
        return {"device": self.device, **{name: getattr(self, name) for name in names}}


def make_plan(
    config: Config,
    shape: ModelShape,
    machine: Machine,
    *,
    engine: str,
    engine_reason: str,
    kept: Mapping[str, Any] | None = None,
) -> Plan:
    """Derive the plan. Raises PlanError naming the cheapest change when the run cannot fit.

    `kept` is the `promise` of a run that is resumed: its numbers are taken again where they still fit, since what is
    free now decides them otherwise, and results depend on them.
    """
    items: list[PlanItem] = []
    kept = kept if kept is not None and kept.get("device") == machine.device else {}

    def add(name: str, value: Any, reason: str) -> Any:
        items.append(PlanItem(name, value, reason))
        return value

    add("device", machine.device, machine.name)
    dtype = add("dtype", *_dtype(config, machine))
    add("engine", engine, engine_reason)
    threads = add("threads", *_threads(config, machine, kept))
    max_len = add("max_model_len", *_max_model_len(config, shape))
    budget = _memory_budget(config, machine)
    add("memory_gib", round(budget / GIB, 2), _memory_reason(config, machine))
    fixed = _fixed_bytes(config, shape, dtype)
    add("weights_gib", round(fixed / GIB, 3), _fixed_reason(config, dtype))
    if machine.device == "cuda":
        overhead = _cuda_overhead_bytes(shape)
        add(
            "overhead_gib", round(overhead / GIB, 2), "CUDA context, the engine's graphs and buffers, a chunk of logits"
        )
        fixed += overhead
    seqs, kv_bytes, reason = _kv_cache(config, shape, dtype, budget - fixed, max_len, kept)
    add("max_num_seqs", seqs, reason)
    add("kv_cache_gib", round(kv_bytes / GIB, 4), f"{seqs} sequences of {max_len} tokens in whole blocks")
    batched = max(MIN_BATCHED_TOKENS, max_len)
    add("max_num_batched_tokens", batched, "prompt tokens of one engine step; at least one whole sequence")
    micro = add(
        "micro_batch_tokens", *_micro_batch(config, shape, dtype, machine, budget - fixed - kv_bytes, max_len, kept)
    )
    if config.objective.beta > 0:
        add("reference", *_reference(config, shape, dtype))
    sharing = "once per group" if config.optim.share_prompt else "repeated"
    add("prompt", sharing, "optim.share_prompt: the layers pass keys and values, so a group's prompt runs once")
    return Plan(
        device=machine.device, dtype=dtype, engine=engine, threads=threads, max_model_len=max_len, max_num_seqs=seqs,
        max_num_batched_tokens=batched, kv_cache_bytes=kv_bytes,
        block_size=CPU_BLOCK_SIZE if machine.device == "cpu" else None, micro_batch_tokens=micro, items=tuple(items),
    )  # fmt: skip


def _dtype(config: Config, machine: Machine) -> tuple[str, str]:
    if config.model.dtype != "auto":
        return config.model.dtype, "model.dtype"
    if machine.device == "cpu":
        return "float32", "exact on a CPU, and its fastest type"
    return ("bfloat16", "supported by the card") if machine.supports_bf16 else ("float16", "the card has no bfloat16")


def _threads(config: Config, machine: Machine, kept: Mapping[str, Any]) -> tuple[int, str]:
    if config.run.threads:
        return config.run.threads, "run.threads"
    if kept.get("threads", 0) in range(1, machine.num_cores + 1):
        return kept["threads"], KEPT
    if machine.num_cores <= 2:
        return 1, "with two cores a second thread waits more than it works; the other core scores rewards"
    return max(1, machine.num_cores // 2), f"half of {machine.num_cores} cores; fixed, since results depend on it"


def _max_model_len(config: Config, shape: ModelShape) -> tuple[int, str]:
    prompt = config.task.max_prompt_length
    length = prompt + config.rollout.max_completion_length
    if length > shape.max_positions:
        raise PlanError(
            f"task.max_prompt_length {config.task.max_prompt_length} and rollout.max_completion_length "
            f"{config.rollout.max_completion_length} make {length} tokens, the model has {shape.max_positions} "
            "positions",
            hint=f"rollout.max_completion_length or task.max_prompt_length: together at most {shape.max_positions}",
        )
    return length, "task.max_prompt_length + rollout.max_completion_length"


def _memory_reason(config: Config, machine: Machine) -> str:
    return "run.vram_gib" if machine.device == "cuda" and config.run.vram_gib else "what is free now"


def _memory_budget(config: Config, machine: Machine) -> int:
    if machine.device == "cuda" and config.run.vram_gib:
        wanted = int(config.run.vram_gib * GIB)
        if wanted > machine.memory_bytes:
            raise PlanError(
                f"run.vram_gib is {config.run.vram_gib:g}, {machine.memory_bytes / GIB:.1f} GiB are free on the card",
                hint="run.vram_gib: lower it, or end what else uses the card (see nvidia-smi)",
            )
        return wanted
    return machine.memory_bytes


def _cuda_overhead_bytes(shape: ModelShape) -> int:
    return CUDA_CONTEXT_BYTES + CUDA_ENGINE_BYTES + LOGIT_COPIES * LOGIT_ROWS * shape.vocab_size * 4


def _fixed_bytes(config: Config, shape: ModelShape, dtype: str) -> int:
    weights = shape.num_parameters * BYTES[dtype]
    if config.lora.r:
        training = shape.lora_parameters(config.lora.r) * (4 + 4 + 8)  # master, gradient, two moments
    else:
        masters = 0 if dtype == "float32" else 4
        training = shape.num_parameters * (masters + BYTES[dtype] + 8)
    reference = weights if config.objective.beta > 0 and not config.lora.r else 0
    return weights + training + reference


def _fixed_reason(config: Config, dtype: str) -> str:
    if config.lora.r:
        return f"the base once in {dtype}, rank {config.lora.r} adapters with fp32 masters and AdamW's moments"
    masters = "" if dtype == "float32" else ", fp32 masters"
    return f"all weights once in {dtype}{masters}, gradients, AdamW's moments"


def _kv_cache(
    config: Config, shape: ModelShape, dtype: str, free: int, max_len: int, kept: Mapping[str, Any]
) -> tuple[int, int, str]:
    block = CPU_BLOCK_SIZE
    per_sequence = -(-max_len // block) * block * shape.kv_bytes_per_token(dtype)
    wanted = config.rollout.num_prompts * config.rollout.num_generations
    # Half of what is free: the training phase needs the other half, and on a CPU both live side by side.
    fits = (free // 2) // per_sequence
    if fits < 1:
        need = (2 * per_sequence - free) / GIB
        raise PlanError(
            f"the model and one sequence of {max_len} tokens need {need:.1f} GiB more than there is",
            hint="rollout.max_completion_length: shorten it; or choose a smaller model.path",
        )
    if 0 < kept.get("kv_cache_bytes", 0) <= free and 0 < kept.get("max_num_seqs", 0) <= wanted:
        return kept["max_num_seqs"], kept["kv_cache_bytes"], KEPT
    seqs = min(wanted, fits)
    reason = "all completions of a step at once" if seqs == wanted else f"memory for {fits} of {wanted} completions"
    spare = block * shape.kv_bytes_per_token(dtype) * 2  # vLLM keeps a null block; one more against rounding
    return seqs, seqs * per_sequence + spare, reason


def _micro_batch(
    config: Config,
    shape: ModelShape,
    dtype: str,
    machine: Machine,
    free: int,
    max_len: int,
    kept: Mapping[str, Any],
) -> tuple[int, str]:
    pinned = config.optim.micro_batch_tokens
    if pinned is not None:
        if pinned < max_len:
            raise PlanError(
                f"optim.micro_batch_tokens is {pinned}, the longest prompt and completion have {max_len} tokens",
                hint=f"optim.micro_batch_tokens: at least {max_len}, or null to have it planned",
            )
        return pinned, "optim.micro_batch_tokens"
    cap = MAX_CPU_MICRO_BATCH_TOKENS if machine.device == "cpu" else MAX_MICRO_BATCH_TOKENS
    per_token = int(ACTIVATION_FACTOR[machine.device] * shape.activation_bytes_per_token(dtype))
    fits = int(free * 0.8) // per_token
    if fits < max_len:
        raise PlanError(
            f"training on one sequence of {max_len} tokens needs {max_len * per_token / GIB:.1f} GiB of activations, "
            f"{max(0, free) / GIB:.1f} GiB are left",
            hint="rollout.max_completion_length: shorten it; or choose a smaller model.path",
        )
    if max_len <= kept.get("micro_batch_tokens", 0) <= free // per_token:
        return kept["micro_batch_tokens"], KEPT
    if fits < cap:
        return fits, f"activations of {per_token / 1024:.0f} KiB per token in what is left"
    return max(cap, max_len), "large enough to keep the device busy, small enough to stay in its caches"


def _reference(config: Config, shape: ModelShape, dtype: str) -> tuple[str, str]:
    if not config.lora.r:
        size = shape.num_parameters * BYTES[dtype] / GIB
        return "frozen copy", f"objective.beta > 0 with full fine-tuning: {size:.2f} GiB beside the trained weights"
    if config.lora.init_from:
        return "kept adapter", "objective.beta > 0 and lora.init_from: the starting adapter is the reference"
    return "adapter off", "objective.beta > 0: the base without its adapter is the policy at step 0; no copy"
