"""From the config, the model's shape and the machine to every number that nobody should have to choose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import Config, EmbeddingPlace, HeadFormat
from ..errors import PlanError
from .advice import changed, cheapest_change
from .card import KEPT, CardNeeds, CardNumbers, plan_card
from .cpu import CPU_BLOCK_SIZE, plan_cpu
from .machine import Machine
from .shapes import BYTES, GIB, ModelShape
from .vocabulary import can_pack, check_vocabulary, vocabulary_ways


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
    memory_bytes: int = 0
    """What the process may use: RAM, or memory of the card."""
    release_kv: bool = False
    """Give the KV cache's memory back for training."""
    checkpoint_layers: int = 0
    logit_rows: int | None = None
    """Rows of logits that training holds at a time; None leaves it to the policy."""
    head: HeadFormat = "16bit"
    embedding: EmbeddingPlace = "card"

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
                 "micro_batch_tokens", "release_kv", "checkpoint_layers", "logit_rows", "head",
                 "embedding")  # fmt: skip
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
    kept = kept if kept is not None and kept.get("device") == machine.device else {}
    check_vocabulary(config, shape, engine)

    def plan(candidate: Config, on: Machine = machine) -> Plan:
        """Take the first way to hold head and embedding that fits."""
        ways = list(vocabulary_ways(candidate, shape, on, engine=engine, kept=kept or {}))
        for head, embedding in ways:
            held = changed(candidate, model__head=head, model__embedding=embedding)
            try:
                return _Planning(held, shape, on, engine, engine_reason, kept or {}).plan(asked=candidate)
            except PlanError:
                if (head, embedding) == ways[-1]:
                    raise
        raise AssertionError("there is always a way")

    try:
        return plan(config)
    except PlanError as e:
        if e.hint:
            raise
        packs, tied = can_pack(engine, config, shape), shape.tied_embeddings
        hint = cheapest_change(config, machine, plan, packs=packs, tied=tied)
        if machine.others and "run.vram_gib" not in hint:
            try:
                plan(changed(config, run__vram_gib=None), machine.without_others())
            except PlanError:
                pass
            else:
                dial = ", with run.vram_gib: null" if config.run.vram_gib else ""
                hint = f"{hint}; or end what else uses the card{dial}: {machine.others}"
        raise PlanError(e.message, hint=hint) from None


class _Planning:
    """Collects numbers and reasons on the way to a Plan."""

    def __init__(
        self, config: Config, shape: ModelShape, machine: Machine, engine: str, reason: str, kept: Mapping[str, Any]
    ) -> None:
        self.config, self.shape, self.machine, self.kept = config, shape, machine, kept
        self.items: list[PlanItem] = []
        self.engine = self.add("engine", engine, reason)

    def add(self, name: str, value: Any, reason: str) -> Any:
        self.items.append(PlanItem(name, value, reason))
        return value

    def plan(self, *, asked: Config) -> Plan:
        """Return the plan; `asked` is the config as the user wrote it."""
        config, shape, machine = self.config, self.shape, self.machine
        self.items.insert(0, PlanItem("device", machine.device, machine.name))
        dtype = self.add("dtype", *_dtype(config, machine))
        if config.optim.master == "kahan" and dtype == "float32":
            raise PlanError(
                "optim.master is kahan and the weights are in float32, which are their own masters; it is for 16 bits",
                hint="optim.master: fp32; or model.dtype: bfloat16",
            )
        threads = self.add("threads", *_threads(config, machine, self.kept))
        max_len = self.add("max_model_len", *_max_model_len(config, shape))
        if (config.optim.micro_batch_tokens or max_len) < max_len:
            raise PlanError(
                f"optim.micro_batch_tokens is {config.optim.micro_batch_tokens}, the longest prompt and completion "
                f"have {max_len} tokens",
                hint=f"optim.micro_batch_tokens: at least {max_len}, or null to have it planned",
            )
        budget = _memory_budget(config, machine)
        self.add("memory_gib", round(budget / GIB, 2), _memory_reason(config, machine))
        common = {
            "device": machine.device, "dtype": dtype, "engine": self.engine, "threads": threads,
            "max_model_len": max_len, "memory_bytes": budget,
        }  # fmt: skip
        rest = self._card(dtype, max_len, budget) if machine.device == "cuda" else self._cpu(dtype, max_len, budget)
        if config.objective.beta > 0:
            self.add("reference", *_reference(config, shape, dtype))
        sharing = "once per group" if config.optim.share_prompt else "repeated"
        self.add(
            "prompt", sharing, "optim.share_prompt: the layers pass keys and values, so a group's prompt runs once"
        )
        held: dict[str, Any] = {"head": config.model.head, "embedding": config.model.embedding}
        for name, value in held.items():
            if getattr(asked.model, name) == "auto" and value not in ("16bit", "card"):
                self.add(name, value, f"model.{name}: in 16 bits on the card, the run would not fit")
        return Plan(**common, **rest, **held, items=tuple(self.items))

    def _cpu(self, dtype: str, max_len: int, budget: int) -> dict[str, Any]:
        needs = CardNeeds(self.config, self.shape, dtype, max_len)
        n = plan_cpu(needs, budget, self.kept)
        trained = _trained_reason(needs)
        self.add("weights_gib", round(n.fixed_bytes / GIB, 3), f"{_weights_reason(needs)}; {trained}")
        self.add("max_num_seqs", n.max_num_seqs, n.seqs_reason)
        kv_reason = f"{n.max_num_seqs} sequences of {max_len} tokens in whole blocks"
        self.add("kv_cache_gib", round(n.kv_cache_bytes / GIB, 4), kv_reason)
        batched_reason = "prompt tokens of one engine step; at least one whole sequence"
        self.add("max_num_batched_tokens", n.max_num_batched_tokens, batched_reason)
        self.add("micro_batch_tokens", n.micro_batch_tokens, n.micro_reason)
        if self.config.optim.checkpoint_layers is not None:
            self.add("checkpoint_layers", n.checkpoint_layers, _pinned_layers(needs))
        names = ("max_num_seqs", "kv_cache_bytes", "max_num_batched_tokens", "micro_batch_tokens", "checkpoint_layers")
        return {"block_size": CPU_BLOCK_SIZE, **{name: getattr(n, name) for name in names}}

    def _card(self, dtype: str, max_len: int, budget: int) -> dict[str, Any]:
        needs = CardNeeds(self.config, self.shape, dtype, max_len, self.machine.flops)
        numbers = plan_card(needs, budget, self.kept)
        for item in card_items(needs, numbers, kept=numbers.max_num_seqs == self.kept.get("max_num_seqs")):
            self.add(*item)
        names = ("max_num_seqs", "max_num_batched_tokens", "kv_cache_bytes", "release_kv", "micro_batch_tokens",
                 "checkpoint_layers", "logit_rows")  # fmt: skip
        return {"block_size": None, **{name: getattr(numbers, name) for name in names}}


def card_items(needs: CardNeeds, numbers: CardNumbers, *, kept: bool) -> Iterator[tuple[str, Any, str]]:
    """Yield (name, value, reason) for what is shown of a card's numbers."""
    n, config, layers = numbers, needs.config, needs.shape.num_layers

    def gib(value: int) -> float:
        return round(value / GIB, 2)

    yield "weights_gib", gib(needs.weights), _weights_reason(needs)
    yield "trained_gib", gib(needs.trained), _trained_reason(needs)
    yield (
        "overhead_gib",
        gib(n.fixed_bytes - needs.weights - needs.trained - needs.reference),
        ("CUDA's context and kernels, the engine's graphs and buffers"),
    )
    waves = -(-needs.completions // n.max_num_seqs)
    pinned = n.max_num_seqs == config.rollout.max_num_seqs
    why = "rollout.max_num_seqs" if pinned else "the KV cache of more does not fit"
    reason = f"{needs.completions} completions in {waves} waves: {why}"
    reason = "all completions of a step at once" if waves == 1 else reason
    yield "max_num_seqs", n.max_num_seqs, KEPT if kept else reason
    yield (
        "kv_cache_gib",
        gib(n.kv_cache_bytes),
        (f"{n.max_num_seqs} completions of {config.rollout.max_completion_length} tokens, a group's prompt held once"),
    )
    yield (
        "kv_cache",
        "released" if n.release_kv else "stays mapped",
        (
            "given back for training and mapped again: beside it a step would take longer, or training not fit"
            if n.release_kv
            else "it fits beside training"
        ),
    )
    yield "max_num_batched_tokens", n.max_num_batched_tokens, "tokens of one engine step; longer prompts go in pieces"
    yield "micro_batch_tokens", n.micro_batch_tokens, _micro_reason(needs, n, kept)
    yield "checkpoint_layers", n.checkpoint_layers, _checkpoint_reason(needs, n, layers)
    yield "logit_rows", n.logit_rows, f"a chunk of {needs.logits(n.logit_rows) / 2**20:.0f} MiB of logits"
    yield "rollout_peak_gib", gib(n.fixed_bytes + n.rollout_bytes), "with the KV cache, a prefill step and its logits"
    held = 0 if n.release_kv else n.kv_cache_bytes
    yield (
        "training_peak_gib",
        gib(n.fixed_bytes + n.training_bytes + held),
        (
            "activations of a micro-batch, one layer's gradients, a chunk of logits"
            + ("" if config.lora.r else ", the head's gradient in fp32")
            + ("" if n.release_kv else ", beside the KV cache")
        ),
    )


def _trained_reason(needs: CardNeeds) -> str:
    optim, rank = needs.config.optim, needs.config.lora.r
    masters = "rounding errors, " if optim.master == "kahan" else "fp32 masters, "
    trained = f"rank {rank} adapters: fp32 masters, " if rank else "all weights: " + (
        "" if needs.dtype == "float32" else masters
    )  # fmt: skip
    return f"{trained}gradients, AdamW's moments{' in 8 bits' if optim.name == 'adamw_8bit' else ''}"


def _weights_reason(needs: CardNeeds) -> str:
    model, shape = needs.config.model, needs.shape
    times = "twice (model.share_weights)" if model.share_weights == "copy" else "once"
    linears = "linears in 4 bits" if model.quantization == "nf4" else f"linears in {needs.dtype}"
    head = "in 8 bits" if model.head == "int8" else f"in {needs.dtype}"
    if shape.tied_embeddings:
        return f"the base {times}: {linears}, embedding and head are one, {head}"
    where = {"card": f"in {needs.dtype}", "int8": "in 8 bits", "nf4": "in 4 bits", "host": "in host memory"}[
        model.embedding
    ]
    return f"the base {times}: {linears}, head {head}, embedding {where}"


def _micro_reason(needs: CardNeeds, numbers: CardNumbers, kept: bool) -> str:
    if needs.config.optim.micro_batch_tokens:
        return "optim.micro_batch_tokens"
    if kept:
        return KEPT
    per_token = needs.bytes_per_token(numbers.checkpoint_layers) / 1024
    if numbers.micro_batch_tokens >= needs.step_tokens:
        return f"a whole step, at {per_token:.0f} KiB per token"
    return f"{per_token:.0f} KiB of activations per token"


def _checkpoint_reason(needs: CardNeeds, numbers: CardNumbers, layers: int) -> str:
    if needs.config.optim.checkpoint_layers is not None:
        return _pinned_layers(needs)
    if not numbers.checkpoint_layers:
        return f"all {layers} layers' activations fit"
    return f"of {layers} layers keep only their input and run again in backward, for micro-batches of this size"


def _pinned_layers(needs: CardNeeds) -> str:
    asked, layers = needs.config.optim.checkpoint_layers or 0, needs.shape.num_layers
    return "optim.checkpoint_layers" + (f" is {asked}, the model has {layers} layers" if asked > layers else "")


def _dtype(config: Config, machine: Machine) -> tuple[str, str]:
    if config.model.dtype == "bfloat16" and not machine.supports_bf16:
        raise PlanError(
            f"model.dtype is bfloat16, which {machine.name} does not compute with", hint="model.dtype: auto, or float16"
        )
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
    if machine.device == "cuda" and config.run.vram_gib:
        return "run.vram_gib: the whole process, engine and trainer"
    if config.run.vram_gib:
        return "what is free now; run.vram_gib is for a card and not used here"
    return f"what is free now; {machine.others}" if machine.others else "what is free now"


def _memory_budget(config: Config, machine: Machine) -> int:
    if machine.device != "cuda" or not config.run.vram_gib:
        return machine.memory_bytes
    wanted = int(config.run.vram_gib * GIB)
    if wanted > machine.memory_bytes:
        free = machine.memory_bytes / GIB
        others = "; ".join(map(str, machine.processes[:3])) or "no other process is visible from here"
        raise PlanError(
            f"run.vram_gib is {config.run.vram_gib:g}, {free:.1f} GiB are free on the card ({others})",
            hint=f"run.vram_gib: at most {int(free * 10) / 10:g}, or null for that; or end what else uses the card",
        )
    return wanted


def _reference(config: Config, shape: ModelShape, dtype: str) -> tuple[str, str]:
    if not config.lora.r:
        size = shape.num_parameters * BYTES[dtype] / GIB
        return "frozen copy", f"objective.beta > 0 with full fine-tuning: {size:.2f} GiB beside the trained weights"
    if config.lora.init_from:
        return "kept adapter", "objective.beta > 0 and lora.init_from: the starting adapter is the reference"
    return "adapter off", "objective.beta > 0: the base without its adapter is the policy at step 0; no copy"
