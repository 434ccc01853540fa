"""Building what a run is made of, in the order that lets a mistake show before anything slow is loaded."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..engine.base import Engine, EngineSettings
from ..engine.select import read_ahead, resolve_engine
from ..errors import ConfigError, PlanError
from ..memory.advice import changed
from ..memory.machine import Machine, detect_machine
from ..memory.plan import Plan, make_plan
from ..memory.probe import can_pin
from ..memory.shapes import BYTES, GIB, ModelShape
from ..objective.shaping import PolarityBonus
from ..rewards.pool import RewardPool, say_on_stderr
from ..tasks.base import Task, build_task
from ..tasks.render import Renderer
from ..types import Sampling

if TYPE_CHECKING:
    import torch

    from ..memory.dial import VramDial
    from ..policy.load import ModelSource
    from ..policy.policy import Policy
    from ..weights import SharedWeights


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known before any weight is read: model, task and plan fit together."""

    config: Config
    source: ModelSource
    task: Task
    plan: Plan
    machine: Machine
    kept: Mapping[str, Any] | None = None
    """The planned numbers of the run that is resumed (`Plan.promise`)."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that a step or an evaluation needs."""

    config: Config
    source: ModelSource
    task: Task
    plan: Plan
    policy: Policy
    engine: Engine
    weights: SharedWeights
    pool: RewardPool
    dial: VramDial | None = None
    """The cap on the card's memory; None on a CPU."""

    @contextmanager
    def training_memory(self) -> Iterator[None]:
        """Give the memory of the engine's KV cache to training inside the block, where the plan says so."""
        self.engine.release_memory()
        if self.dial is not None:
            self.dial.training(self.engine.releasable_bytes)
        with deterministic_kernels(self.config.run.deterministic and self.plan.device == "cuda"):
            yield
        if self.dial is not None:
            self.dial.rollouts()
        self.engine.restore_memory()

    @property
    def sampling(self) -> Sampling:
        """How training rollouts are drawn."""
        rollout = self.config.rollout
        return Sampling(rollout.max_completion_length, self.source.stop_token_ids, rollout.temperature)


def model_path(config: Config) -> str:
    """Return the folder or hub id to load; `demo` is the model that ships with Strop."""
    if config.model.path != "demo":
        return os.path.expanduser(config.model.path)
    from .. import demo

    return str(demo.model_path())


def prepare(config: Config, kept: Mapping[str, Any] | None = None) -> Prepared:
    """Open model and task and derive the plan. Raises a StropError when they do not fit together or the machine.

    `kept` are the planned numbers of the run that is resumed (`Plan.promise`).
    """
    from ..policy.load import open_model
    from ..policy.lora import check_adapter_folder

    engine, reason = resolve_engine(config.model.engine)
    if engine == "vllm":
        read_ahead()
    if config.lora.init_from:
        check_adapter_folder(config.lora.init_from)
    source = open_model(model_path(config), config.model.quantization)
    renderer = Renderer(source.tokenizer, chat_template_kwargs=config.task.chat_template_kwargs)
    task = build_task(config.task, renderer, seed=config.run.seed, eval_size=config.task.eval_size)
    shape = ModelShape.from_config(source.config)
    machine = detect_machine()
    plan = make_plan(config, shape, machine, engine=engine, engine_reason=reason, kept=kept)
    available = task.num_problems
    if available is not None and config.rollout.num_prompts > available:
        raise ConfigError(
            f"rollout.num_prompts is {config.rollout.num_prompts}, the task has {available} problems",
            hint=f"rollout.num_prompts: at most {available}, or give the task more problems",
        )
    return Prepared(config, source, task, plan, machine, kept)


def without_pinned_memory(prepared: Prepared, note: Callable[[str], None]) -> Prepared:
    """Plan again where the input embedding is to lie in pinned host memory and none can be had; else change nothing.

    To be called before anything is loaded, and not for a plan alone: asking makes a CUDA context. Raises PlanError when
    nothing else fits or `model.embedding` asks for host memory; its hint names settings that were planned with.
    """
    config, plan = prepared.config, prepared.plan
    shape = ModelShape.from_config(prepared.source.config)
    size = shape.vocab_size * shape.hidden_size * BYTES[plan.dtype]
    if plan.device != "cuda" or plan.embedding != "host" or can_pin(size):
        return prepared
    why = f"the input embedding, {size / GIB:.1f} GiB, finds no host memory that can be pinned"
    machine, engine = replace(prepared.machine, pins=False), resolve_engine(config.model.engine)

    def planned(candidate: Config) -> Plan:
        return make_plan(
            candidate, shape, machine, engine=engine[0], engine_reason=engine[1], kept=prepared.kept
        )  # fmt: skip

    if config.model.embedding == "host" and prepared.kept:
        raise PlanError(why, hint="end what else locks memory; or begin again in --out ANOTHER_FOLDER with "
                        "model.embedding: auto, which a resumed run cannot change")  # fmt: skip
    if config.model.embedding == "host":
        try:
            other = planned(changed(config, model__embedding="auto"))
        except PlanError as e:
            raise PlanError(why, hint=f"model.embedding: auto, and {e.hint}") from e
        raise PlanError(why, hint=f"model.embedding: auto; it will be held on the card, as {other.embedding}")
    try:
        other = planned(config)
    except PlanError as e:
        raise PlanError(f"{why}, and beside it {e.message}", hint=e.hint) from e
    note(
        f"{why}; planned again with model.embedding {other.embedding} and model.head {other.head}: "
        f"{other.max_num_seqs} completions at a time, micro-batches of {other.micro_batch_tokens} tokens"
    )
    if prepared.kept and (other.embedding, other.head) != (plan.embedding, plan.head):
        note(
            "embedding or head are rounded now, so log-probabilities are no longer quite those that the run began with"
        )
    return replace(prepared, plan=other, machine=machine)


def length_shaping(config: Config) -> PolarityBonus | None:
    """Return what a run does to advantages for length's sake; None for nothing."""
    rewards = config.rewards
    if rewards.length_shaping == "none":
        return None
    return PolarityBonus(rewards.length_shaping_weight, rewards.length_shaping_from)


def make_pool(
    config: Config,
    task_rewards: tuple[str, ...],
    verdict_log: Path | None = None,
    note: Callable[[str], None] = say_on_stderr,
) -> RewardPool:
    """Return the run's reward pool, not started yet; `note` takes what its processes have to say."""
    return RewardPool(
        config.rewards,
        default_funcs=task_rewards,
        verdict_log=verdict_log,
        max_completion_length=config.rollout.max_completion_length,
        max_steps=config.run.max_steps,
        note=note,
    )


@contextmanager
def build(prepared: Prepared, pool: RewardPool, note: Callable[[str], None]) -> Iterator[Parts]:
    """Load the model once, for engine and trainer both, and yield the parts; free them at the end.

    `pool` has been started, so that its workers import the reward functions meanwhile. `Parts.plan` is another one than
    `prepared.plan` where no host memory can be pinned (`without_pinned_memory`).
    """
    import torch

    torch.set_num_threads(prepared.plan.threads)
    if prepared.config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or torch refuses matrix products
    prepared = without_pinned_memory(prepared, note)
    before = sys.exception()
    with ExitStack() as stack:
        try:
            parts = _assembled(prepared, pool, note, stack)
        except Exception as e:
            stack.close()
            _forget_frames(e, before)
            raise
        yield parts


def _assembled(prepared: Prepared, pool: RewardPool, note: Callable[[str], None], stack: ExitStack) -> Parts:
    """Load and connect everything; `stack` frees it."""
    from ..policy import lora
    from ..policy.policy import Policy, check_packed_forward
    from ..weights import SharedWeights

    config, plan = prepared.config, prepared.plan
    dial = _dial(prepared)
    if dial is not None:
        stack.callback(dial.close)
    adapters = {}
    model, engine = _model_and_engine(prepared, note, stack)
    if dial is not None:
        dial.rollouts()  # with what loading has put on the card beside torch
    if config.lora.r:
        adapters = lora.inject(
            model, r=config.lora.r, alpha=config.lora.alpha, target_modules=config.lora.target_modules,
            seed=config.run.seed,
        )  # fmt: skip
        if config.lora.init_from:
            lora.load_adapter(adapters, Path(config.lora.init_from))
    policy = Policy(
        model, config.rollout.temperature, adapters, checkpoint_layers=plan.checkpoint_layers,
        logit_rows=plan.logit_rows,
    )  # fmt: skip
    if config.objective.beta > 0 and (not adapters or config.lora.init_from):
        policy.freeze_reference()
    check_packed_forward(policy)
    weights = SharedWeights(policy, engine)
    return Parts(config, prepared.source, prepared.task, plan, policy, engine, weights, pool, dial)


def _forget_frames(error: BaseException, before: BaseException | None) -> None:
    """Drop the local variables of the calls that failed, and give what they held back to the card.

    A notebook keeps the last error and, through its traceback, a model that fills the card for the next start. `before`
    is what the caller was handling already; it stays as it is.
    """
    import torch

    chain: BaseException | None = error
    while chain is not None and chain is not before:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _dial(prepared: Prepared) -> VramDial | None:
    if prepared.plan.device != "cuda":
        return None
    from ..memory.dial import VramDial

    return VramDial(prepared.plan.memory_bytes, free_bytes=prepared.machine.memory_bytes)


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Let torch use only kernels that give the same bits each time inside the block; raises where it has none."""
    import torch

    if not wanted:
        yield
        return
    torch.use_deterministic_algorithms(True)
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False  # nothing is read that was not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _model_and_engine(
    prepared: Prepared, note: Callable[[str], None], stack: ExitStack
) -> tuple[torch.nn.Module, Engine]:
    """Load the weights; the engine is closed by `stack`, also when something fails between here and the caller."""
    import torch

    from ..policy import lora
    from ..policy.load import build_on_meta, torch_dtype
    from ..policy.nf4 import held_as, load_model
    from ..weights import alias_parameters

    source, plan, config = prepared.source, prepared.plan, prepared.config
    dtype = torch_dtype(plan.dtype)
    model_settings = config.model.model_copy(update={"head": plan.head, "embedding": plan.embedding})

    def decode(token_ids: object) -> str:
        return source.tokenizer.decode(token_ids, skip_special_tokens=True)  # type: ignore[no-any-return]

    if plan.engine == "transformers":
        from ..engine.transformers_engine import TransformersEngine

        model = load_model(source, model_settings, dtype, torch.device(plan.device))
        pad = source.tokenizer.pad_token_id
        pad = source.stop_token_ids[0] if pad is None else pad
        plain = TransformersEngine(model, decode, max_num_seqs=plan.max_num_seqs, pad_token_id=pad)
        stack.callback(plain.close)
        return model, plain

    from ..engine import vllm_compat

    untested = vllm_compat.untested_pair(plan.device)
    if untested:
        note(untested)
    vllm_compat.prepare_environment(plan.device, plan.threads)
    from ..engine.vllm_engine import VllmEngine

    head, embedding = held_as(source, model_settings)
    settings = EngineSettings(
        model_path=source.path, dtype=plan.dtype, max_model_len=plan.max_model_len, max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens, kv_cache_bytes=plan.kv_cache_bytes,
        block_size=plan.block_size, seed=config.run.seed, lora_rank=config.lora.r,
        lora_target_modules=config.lora.target_modules, quantization=config.model.quantization,
        kept_modules=source.kept_modules, head=head, embedding=embedding, release_kv=plan.release_kv,
        deterministic=config.run.deterministic,
    )  # fmt: skip
    model = build_on_meta(source, dtype)
    if config.lora.r:  # a wrong name shows before anything slow is loaded
        lora.find_targets(model, config.lora.target_modules)
    engine = VllmEngine(settings, decode, device=plan.device, note=note)
    stack.callback(engine.close)
    if config.model.share_weights == "copy":
        note("the trainer holds the weights a second time (model.share_weights)")
        return load_model(source, model_settings, dtype, torch.device(plan.device)), engine
    alias_parameters(model, engine)
    move_buffers(model, torch.device(plan.device))
    return model, engine


def move_buffers(model: torch.nn.Module, device: torch.device) -> None:
    """Move what is computed rather than loaded (rotary frequencies); parameters stay the engine's own storage."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
