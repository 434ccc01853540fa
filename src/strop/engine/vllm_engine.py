"""vLLM inside the training process, on the weights that the trainer updates."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import EngineError
from ..types import Request, Rollout, Sampling
from . import vllm_compat, vllm_weights
from .base import AdapterSlot, EngineSettings, Progress, make_rollout

if TYPE_CHECKING:
    import torch

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM allows for max_lora_rank; its kernels run over all of it, so the smallest that fits is taken."""


class VllmEngine:
    """The real vLLM, built in this process from a model folder. See `Engine` for the contract."""

    name = "vllm"
    _alive = 0
    _parked: ClassVar[list[Any]] = []
    """Engines closed while another one runs: vLLM's process groups are shared by all of a process, and freeing any
    engine would end them for the others."""

    def __init__(self, settings: EngineSettings, decode: Callable[[Sequence[int]], str], *, device: str) -> None:
        """Load the model; `decode` turns token ids into text. Raises EngineError with what vLLM said."""
        self._settings, self._decode, self._device = settings, decode, device
        vllm_compat.patch(device)
        try:
            from vllm.engine.arg_utils import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine

            self._llm = LLMEngine.from_engine_args(EngineArgs(**self._engine_args()))
        except (ValueError, RuntimeError, ImportError, NotImplementedError) as e:
            raise EngineError(
                f"vLLM cannot load `{settings.model_path}`: {e}",
                hint="set model.engine to transformers if this model or machine is not one vLLM supports",
            ) from e
        client: Any = self._llm.engine_core
        core = client.engine_core
        self._scheduler = core.scheduler
        self._runner = core.model_executor.driver_worker.worker.model_runner
        self._assert_runner()
        self._adapter_request: Any = None
        self._slot = -1
        if settings.lora_rank:
            from vllm.lora.request import LoRARequest

            self._slot = vllm_weights.register_adapter(self._runner, self._allowed_rank())
            # The path is never read: this id is resident already.
            self._adapter_request = LoRARequest("policy", vllm_weights.ADAPTER_ID, "/resident")
        self._count = 0
        VllmEngine._alive += 1

    def _engine_args(self) -> dict[str, Any]:
        s = self._settings
        args: dict[str, Any] = {
            "model": s.model_path,
            "skip_tokenizer_init": True,
            "dtype": s.dtype,
            "max_model_len": s.max_model_len,
            "max_num_seqs": s.max_num_seqs,
            "max_num_batched_tokens": s.max_num_batched_tokens,
            "kv_cache_memory_bytes": s.kv_cache_bytes,
            "enable_prefix_caching": True,
            # After temperature: what the token was drawn with, and what the trainer computes.
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "seed": s.seed % 2**31,
        }
        if s.block_size is not None:
            args["block_size"] = s.block_size
        if self._device == "cpu":
            args["enforce_eager"] = True
            # vLLM 0.32 raises "CPU Generator does not use offset" when a seeded request is prefilled in pieces.
            args["enable_chunked_prefill"] = False
        else:
            # The KV cache has its bytes, so this share of the card reserves nothing; but vLLM does not start when less
            # than that is free, and its default of 92 % is more than a card with a desktop on it has.
            args["gpu_memory_utilization"] = 0.01
            # CUDA graphs for decoding without Inductor: most of the speed for a fraction of the start-up.
            args["compilation_config"] = {
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": _graph_sizes(s.max_num_seqs),
                # The adapter is always on, so graphs without it would never be replayed.
                "cudagraph_specialize_lora": False,
            }
        if s.lora_rank:
            args |= {
                "enable_lora": True,
                "max_loras": 1,
                "max_lora_rank": self._allowed_rank(),
                # Named, so that vLLM leaves the embedding and the head unwrapped.
                "lora_target_modules": list(s.lora_target_modules),
            }
        return args

    def _allowed_rank(self) -> int:
        return next(r for r in _RANKS if r >= self._settings.lora_rank)

    def _assert_runner(self) -> None:
        # V2's classes have the same names in modules of other names.
        expected = {"cpu": "vllm.v1.worker.cpu_model_runner", "cuda": "vllm.v1.worker.gpu_model_runner"}[self._device]
        runner = type(self._runner)
        if runner.__module__ != expected:
            raise EngineError(
                f"vLLM runs {runner.__module__}.{runner.__name__}, its V1 runner {expected} is needed",
                hint="unset VLLM_USE_V2_MODEL_RUNNER",
            )

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, policy_version: int, progress: Progress | None = None
    ) -> Iterator[Rollout]:
        """Yield completions as they finish; see `Engine.generate`."""
        self._start_drained(requests)
        waiting = {}
        for request in requests:
            self._count += 1
            waiting[str(self._count)] = request
            self._llm.add_request(
                str(self._count),
                {"prompt_token_ids": list(request.problem.prompt_token_ids)},
                self._sampling_params(request, sampling),
                lora_request=self._adapter_request,
            )
        try:
            while waiting:
                outputs = self._llm.step()
                if progress is not None:
                    progress(len(waiting), len(self._scheduler.running))
                for output in outputs:
                    if output.finished:
                        yield self._rollout(waiting.pop(output.request_id), output, policy_version)
        finally:
            if waiting:
                self._llm.abort_request(list(waiting))

    def _start_drained(self, requests: Sequence[Request]) -> None:
        import torch

        if self._llm.has_unfinished_requests():
            raise EngineError("a rollout was started while another one is still running")
        self.reset_prefix_cache()
        if self._device == "cpu" and requests:
            # vLLM's CPU sampler draws from torch's global generator beside the requests' own.
            torch.manual_seed(requests[0].seed)

    def _sampling_params(self, request: Request, sampling: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            seed=request.seed if sampling.temperature > 0 else None,
            logprobs=0,
            # One list per completion instead of one dictionary per token.
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _rollout(self, request: Request, output: Any, policy_version: int) -> Rollout:
        completion = output.outputs[0]
        token_ids = list(completion.token_ids)
        if completion.finish_reason not in ("stop", "length") or not token_ids:
            raise EngineError(
                f"vLLM ended problem `{request.problem.id}` with `{completion.finish_reason}` "
                f"after {len(token_ids)} tokens",
                hint="rollout.max_completion_length and task.max_prompt_length have to fit the model's context",
            )
        logprobs = completion.logprobs.logprobs
        ids = completion.logprobs.token_ids
        if list(ids) != token_ids:
            raise EngineError("vLLM's log-probabilities are not those of the sampled tokens")
        return make_rollout(
            request,
            token_ids,
            logprobs,
            text=self._decode(token_ids),
            finish_reason=completion.finish_reason,
            policy_version=policy_version,
            num_cached_tokens=output.num_cached_tokens or 0,
        )

    def reset_prefix_cache(self) -> None:
        """Forget all cached keys and values; raises EngineError while requests are running."""
        if not self._llm.reset_prefix_cache():
            raise EngineError("vLLM refused to reset its prefix cache: requests are still running")

    def base_views(self) -> Mapping[str, torch.Tensor]:
        """Return views of vLLM's parameters by transformers' names."""
        return vllm_weights.parameter_views(self._runner.get_model())

    def adapter_slots(self) -> Mapping[str, AdapterSlot]:
        """Return views of the resident adapter's slot by transformers' module names."""
        if self._slot < 0:
            return {}
        return vllm_weights.adapter_views(self._runner, self._slot, self._settings.lora_rank)

    def release_memory(self) -> None:
        """Keep the KV cache mapped; the plan counts its bytes beside those of training."""

    def restore_memory(self) -> None:
        """See `release_memory`."""

    def close(self) -> None:
        """Free the engine, and with the last one of the process vLLM's process groups."""
        VllmEngine._alive -= 1
        VllmEngine._parked.append(self._llm)
        if VllmEngine._alive == 0:
            for llm in VllmEngine._parked:
                llm.engine_core.shutdown()
            VllmEngine._parked.clear()
        self._adapter_request = None
        del self._llm, self._runner, self._scheduler
        gc.collect()


def _graph_sizes(max_num_seqs: int) -> list[int]:
    """Return the batch sizes to capture CUDA graphs for; a batch is padded to the next one, by a quarter at most."""
    sizes, size = [1, 2, 4], 8
    while size < max_num_seqs:
        sizes.append(size)
        size += max(8, size // 4 // 8 * 8)
    return [*(s for s in sizes if s < max_num_seqs), max_num_seqs]
