"""The arguments that vLLM is built with, each with its reason."""

from __future__ import annotations

from typing import Any

from ..types import allowed_rank
from .base import EngineSettings


def engine_args(settings: EngineSettings, device: str) -> dict[str, Any]:
    """Return keyword arguments of vLLM's EngineArgs for `settings` on `cpu` or `cuda`."""
    s = settings
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
    if s.load_format is not None:
        args["load_format"] = s.load_format
    if s.quantization != "none" or s.head != "16bit" or s.embedding != "card":
        from . import vllm_nf4

        args |= vllm_nf4.arguments(
            linear=s.quantization == "nf4", kept=s.kept_modules, head=s.head, embedding=s.embedding,
            random=s.load_format == "dummy", most=s.max_num_seqs,
        )  # fmt: skip
    args |= _on_cpu() if device == "cpu" else _on_card(s)
    if s.lora_rank:
        args |= {
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": allowed_rank(s.lora_rank),
            # Named, so that vLLM leaves the embedding and the head unwrapped.
            "lora_target_modules": list(s.lora_target_modules),
        }
    return args


def _on_cpu() -> dict[str, Any]:
    return {
        "enforce_eager": True,
        # vLLM 0.32 raises "CPU Generator does not use offset" when a seeded request is prefilled in pieces.
        "enable_chunked_prefill": False,
        "scheduler_cls": "strop.engine.vllm_scheduler.RolloutScheduler",
    }


def _on_card(s: EngineSettings) -> dict[str, Any]:
    return {
        # The KV cache has its bytes, so this share of the card reserves nothing; but vLLM does not start when less
        # than that is free, and its default of 92 % is more than a card with a desktop on it has.
        "gpu_memory_utilization": 0.01,
        # CUDA graphs for decoding without Inductor: most of the speed for a fraction of the start-up.
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": graph_sizes(s.max_num_seqs),
            # The adapter is always on, so graphs without it would never be replayed.
            "cudagraph_specialize_lora": False,
        },
        "async_scheduling": True,
        "scheduler_cls": "strop.engine.vllm_scheduler.AsyncRolloutScheduler",
    }


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Return the batch sizes to capture CUDA graphs for; a batch is padded to the next one.

    Few, since each costs a third of a second at start-up: a decode step reads the same weights for 33 rows as for 64.
    """
    sizes = [1, 4, 16, *(32 * i for i in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32))]
    return [*(s for s in sizes if s < max_num_seqs), max_num_seqs]
