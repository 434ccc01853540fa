"""vLLM inside the training process, on the weights that the trainer updates.

Requests go straight to vLLM's engine core and its outputs are taken from there: the layer above it turns token ids into
text, checks stop strings and builds an output object per token and request, none of which a rollout needs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import EngineError, MemoryExhaustedError, ModelError, StropError
from ..quant.bnb import PackedError
from ..types import Request, Rollout, Sampling
from . import vllm_compat, vllm_lora, vllm_weights
from .base import AdapterSlot, EngineSettings, Progress, make_rollout
from .vllm_args import allowed_rank, engine_args

if TYPE_CHECKING:
    import torch

    from .vllm_memory import KvPool
    from .vllm_scheduler import Row

MAX_OUT_OF_MEMORY = 3
"""How often in a run a rollout that ran out of memory is done again with half as many sequences at a time."""


class VllmEngine:
    """The real vLLM, built in this process from a model folder. See `Engine` for the contract."""

    name = "vllm"
    _alive = 0
    _parked: ClassVar[list[Any]] = []
    """Engines closed while another one runs: vLLM's process groups are shared by all of a process, and freeing any
    engine would end them for the others."""

    def __init__(
        self,
        settings: EngineSettings,
        decode: Callable[[Sequence[int]], str],
        *,
        device: str,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Load the model; `decode` turns token ids into text, `note` tells the user what was changed on the way.

        Raises EngineError with what vLLM said, ModelError for a packed checkpoint that is damaged.
        """
        import torch

        self._settings, self._decode, self._device, self._note = settings, decode, device, note
        self._pool: KvPool | None = None
        self._which = settings.runner or vllm_compat.RUNNERS[device]
        vllm_compat.patch(device, self._which, deterministic=settings.deterministic)
        try:
            self._llm = self._build()
        except torch.OutOfMemoryError as e:
            raise MemoryExhaustedError(
                f"the card has too little memory to load `{settings.model_path}` with its KV cache: {e}",
                hint="run.vram_gib: raise it; or rollout.max_num_seqs: decode fewer completions at a time",
            ) from e
        except StropError:
            raise
        except PackedError as e:
            raise ModelError(
                f"the checkpoint `{settings.model_path}` cannot be used: {e}",
                hint="model.path: download it again, or give the 16-bit checkpoint; it is packed while it is read",
            ) from e
        except (ValueError, RuntimeError, ImportError, NotImplementedError) as e:
            raise EngineError(
                f"vLLM cannot load `{settings.model_path}`: {e}",
                hint="set model.engine to transformers if this model or machine is not one vLLM supports",
            ) from e
        client: Any = self._llm.engine_core
        self._core: Any = client.engine_core
        self._scheduler: Any = self._core.scheduler
        self._runner: Any = self._core.model_executor.driver_worker.worker.model_runner
        vllm_compat.assert_runner(self._runner, device, self._which)
        if reason := getattr(self._runner, "not_whole", None):
            note(f"decode steps run slower than they could: {reason}")
        self._adapter_request: Any = None
        self._slot = -1
        if settings.lora_rank:
            from vllm.lora.request import LoRARequest

            if device == "cpu":  # on a card the runner does it before it captures graphs
                vllm_lora.combine_all(self._runner)
            self._slot = vllm_weights.register_adapter(self._runner, allowed_rank(settings.lora_rank))
            # The path is never read: this id is resident already.
            self._adapter_request = LoRARequest("policy", vllm_weights.ADAPTER_ID, "/resident")
        self._count = 0
        self._out_of_memory = 0
        VllmEngine._alive += 1

    def _build(self) -> Any:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        args = EngineArgs(**engine_args(self._settings, self._device))
        if not self._settings.release_kv:
            return LLMEngine.from_engine_args(args)
        from .vllm_memory import KvPool, install

        self._pool = KvPool()
        uninstall = install(self._pool, self._which)
        try:
            return LLMEngine.from_engine_args(args)
        finally:
            uninstall()

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, policy_version: int, progress: Progress | None = None
    ) -> Iterator[Rollout]:
        """Yield completions as they finish; see `Engine.generate`.

        A rollout that runs out of memory is done again with fewer sequences at a time: the same requests, except those
        that were finished. Raises MemoryExhaustedError when that has happened three times.
        """
        import torch

        self._start_drained(requests)
        left = dict(enumerate(requests))
        with _no_garbage_collection():
            while left:
                try:
                    with closing(self._stream(dict(left), sampling, policy_version, progress)) as stream:
                        for number, rollout in stream:
                            del left[number]
                            yield rollout
                except torch.OutOfMemoryError as e:
                    self._shrink(e)

    def _stream(
        self, requests: Mapping[int, Request], sampling: Sampling, policy_version: int, progress: Progress | None
    ) -> Generator[tuple[int, Rollout]]:
        from .vllm_scheduler import Row

        core, sink = self._core, self._scheduler.sink
        waiting: dict[str, int] = {}
        cached: dict[str, int] = {}
        try:
            for number, request in requests.items():
                self._count += 1
                name = str(self._count)
                waiting[name] = number
                sink[name] = Row()
                self._add(name, request, sampling)
            while waiting:
                outputs, executed = core.step_fn()
                core.post_step(executed)
                if progress is not None:
                    progress(len(waiting), len(self._scheduler.running))
                for output in outputs[0].outputs if outputs else ():
                    row = sink[output.request_id]
                    if output.new_token_ids:
                        row.token_ids += output.new_token_ids
                        row.logprobs += output.new_logprobs.logprobs[:, 0].tolist()
                    if output.prefill_stats is not None:
                        cached[output.request_id] = output.prefill_stats.num_cached_tokens
                    if output.finish_reason is not None:
                        number = waiting.pop(output.request_id)
                        del sink[output.request_id]
                        hits, reason = cached.pop(output.request_id, 0), str(output.finish_reason)
                        yield number, self._rollout(requests[number], row, reason, policy_version, hits)
        finally:
            sink.clear()
            if waiting:
                core.abort_requests(list(waiting))

    def _add(self, name: str, request: Request, sampling: Sampling) -> None:
        from vllm.v1.engine import EngineCoreRequest

        core_request = EngineCoreRequest(
            request_id=name,
            prompt_token_ids=list(request.problem.prompt_token_ids),
            mm_features=None,
            sampling_params=self._sampling_params(request, sampling),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=self._adapter_request,
            cache_salt=None,
            data_parallel_rank=None,
        )
        self._core.add_request(*self._core.preprocess_add_request(core_request))

    def _start_drained(self, requests: Sequence[Request]) -> None:
        import torch

        if self._scheduler.has_unfinished_requests():
            raise EngineError("a rollout was started while another one is still running")
        longest = max((len(r.problem.prompt_token_ids) for r in requests), default=0)
        if longest >= self._settings.max_model_len:
            raise EngineError(
                f"a prompt has {longest} tokens, the engine was built for {self._settings.max_model_len} in all",
                hint="task.max_prompt_length and rollout.max_completion_length set that number",
            )
        self.reset_prefix_cache()
        if self._device == "cpu" and requests:
            # vLLM's CPU sampler draws from torch's global generator beside the requests' own.
            torch.manual_seed(requests[0].seed)

    def _sampling_params(self, request: Request, sampling: Sampling) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            seed=request.seed if sampling.temperature > 0 else None,
            logprobs=0,
            detokenize=False,
        )

    def _rollout(self, request: Request, row: Row, finish_reason: str, policy_version: int, hits: int) -> Rollout:
        if finish_reason not in ("stop", "length") or not row.token_ids:
            raise EngineError(
                f"vLLM ended problem `{request.problem.id}` with `{finish_reason}` after {len(row.token_ids)} tokens",
                hint="rollout.max_completion_length and task.max_prompt_length have to fit the model's context",
            )
        if len(row.logprobs) != len(row.token_ids):
            raise EngineError("vLLM's log-probabilities are not those of the sampled tokens")
        return make_rollout(
            request,
            row.token_ids,
            row.logprobs,
            text=self._decode(row.token_ids),
            finish_reason=finish_reason,
            policy_version=policy_version,
            num_cached_tokens=hits,
        )

    def _shrink(self, error: Exception) -> None:
        """Forget what was running and halve what runs at a time; the third time, stop with advice."""
        import torch

        self._out_of_memory += 1
        before = self._scheduler.max_num_running_reqs
        if self._out_of_memory >= MAX_OUT_OF_MEMORY or before == 1:
            raise MemoryExhaustedError(
                f"out of GPU memory while generating, {self._out_of_memory} times in this run; the last time with "
                f"{before} sequences at a time: {error}",
                hint="run.vram_gib: lower it so that the plan leaves more room, or end what else uses the card; "
                "rollout.max_completion_length or rollout.num_generations: lower them",
            ) from error
        on_card = self._device != "cpu"
        if on_card:
            torch.cuda.synchronize()
        if self._core.batch_queue:
            self._core.batch_queue.clear()
        self._runner.execute_model_state = None
        self._drain()
        # Blocks are in the cache since the step was planned, though it was never computed.
        self.reset_prefix_cache()
        gc.collect()
        if on_card:
            torch.cuda.empty_cache()
        self.limit_concurrency(max(1, before // 2))
        self._note(
            f"out of GPU memory while generating: the same completions are generated again, "
            f"{max(1, before // 2)} at a time instead of {before}"
        )

    def limit_concurrency(self, num_seqs: int) -> None:
        """Decode at most `num_seqs` completions at a time from now on, and prefill in smaller pieces on a card."""
        scheduler = self._scheduler
        scheduler.max_num_running_reqs = num_seqs
        if hasattr(scheduler, "max_num_active_reqs"):
            scheduler.max_num_active_reqs = num_seqs
        if self._device != "cpu":
            scheduler.max_num_scheduled_tokens = max(num_seqs, scheduler.max_num_scheduled_tokens // 2)

    def _drain(self) -> None:
        """Step until nothing is under way: vLLM plans a step ahead, and tells its runner of aborts in the next one."""
        while self._core.batch_queue or self._scheduler.has_requests():
            self._core.step_fn()

    def reset_prefix_cache(self) -> None:
        """Forget all cached keys and values; raises EngineError while requests are running."""
        if not self._scheduler.reset_prefix_cache():
            raise EngineError("vLLM refused to reset its prefix cache: requests are still running")

    def base_views(self) -> Mapping[str, torch.Tensor]:
        """Return views of vLLM's parameters by transformers' names."""
        return vllm_weights.parameter_views(self._runner.get_model())

    def adapter_slots(self) -> Mapping[str, AdapterSlot]:
        """Return views of the resident adapter's slot by transformers' module names."""
        if self._slot < 0:
            return {}
        return vllm_weights.adapter_views(self._runner, self._slot, self._settings.lora_rank)

    @property
    def releasable_bytes(self) -> int:
        """Bytes of the KV cache that `release_memory` gives back; 0 where it stays mapped."""
        return self._pool.num_bytes if self._pool is not None else 0

    def release_memory(self) -> None:
        """Unmap the KV cache; nothing where it stays mapped. Raises EngineError while requests are running."""
        if self._pool is None:
            return
        if self._scheduler.has_unfinished_requests():
            raise EngineError("the KV cache was to be released while requests are still running")
        self._drain()
        self.reset_prefix_cache()
        self._pool.release()

    def restore_memory(self) -> None:
        """Map the KV cache again, empty. Raises MemoryExhaustedError when the card has no room for it any more."""
        import torch

        if self._pool is None:
            return
        try:
            self._pool.restore()
        except torch.OutOfMemoryError as e:
            raise MemoryExhaustedError(
                f"the engine does not get its KV cache back after training: {e}",
                hint="run.vram_gib: lower it, or end what else took memory on the card since the start",
            ) from e

    def close(self) -> None:
        """Free the engine, and with the last one of the process vLLM's process groups.

        An engine whose KV cache finds no room any more stays until the process ends: freeing what is not mapped is an
        error of the driver, and raising here would hide what ended the run.
        """
        import torch

        if self._pool is not None and self._pool.released:
            try:
                self._pool.restore()
            except torch.OutOfMemoryError:
                VllmEngine._parked.append(self._llm)
                return
        VllmEngine._alive -= 1
        VllmEngine._parked.append(self._llm)
        if VllmEngine._alive == 0:
            for llm in VllmEngine._parked:
                llm.engine_core.shutdown()
            VllmEngine._parked.clear()
            vllm_compat.forget_kept_errors(VllmEngine.__init__.__code__)
        self._adapter_request = None
        del self._llm, self._core, self._runner, self._scheduler
        gc.collect()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep Python from searching its heap for cycles between two decode steps; a step makes none that matter."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
