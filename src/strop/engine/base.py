"""The narrow contract between the loop and whatever generates completions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from ..config import EmbeddingPlace, HeadFormat
from ..types import FinishReason, Request, Rollout, Sampling, Segment

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an engine is built from; the numbers come from the plan."""

    model_path: str
    dtype: str
    max_model_len: int
    """Longest prompt plus completion, in tokens."""
    max_num_seqs: int
    """Completions decoded at a time."""
    max_num_batched_tokens: int
    """Tokens in one engine step; at least one whole sequence, since prompts are not prefilled in pieces on a CPU."""
    kv_cache_bytes: int
    block_size: int | None
    """Tokens per KV block; None leaves it to the engine."""
    seed: int
    lora_rank: int
    """0: no adapter."""
    lora_target_modules: tuple[str, ...]
    runner: Literal["v1", "v2"] | None = None
    """vLLM's model runner; None: the one that is chosen for the device."""
    release_kv: bool = False
    """Keep the KV cache in memory that `release_memory` gives back."""
    deterministic: bool = False
    """Only kernels that give the same bits each time, on a card."""
    load_format: str | None = None
    """vLLM's `load_format`; None leaves it to vLLM, `dummy` makes random weights."""
    quantization: Literal["none", "nf4"] = "none"
    """How the linear layers' weights are held."""
    kept_modules: tuple[str, ...] = ()
    """Modules whose weights stay in 16 bit under `nf4`."""
    head: HeadFormat = "16bit"
    """How the output head is held."""
    embedding: EmbeddingPlace = "card"
    """How and where the input embedding is held."""


@dataclass(frozen=True, slots=True)
class AdapterSlot:
    """Where the engine reads one layer's adapter from; written in place, never replaced."""

    a_RH: torch.Tensor
    """[R, in]."""
    b_HR: torch.Tensor
    """[out, R]; holds B already scaled by alpha / R."""


class Engine(Protocol):
    """Generates completions from the weights that the trainer updates."""

    name: str

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, policy_version: int, progress: Progress | None = None
    ) -> Iterator[Rollout]:
        """Yield each completion as it finishes, in no fixed order, while others still decode.

        Starts on a drained engine with an empty prefix cache and adds all requests in the given order before the
        first step. Closing the iterator aborts what has not finished. `progress` is called after each engine step.
        """
        ...

    def reset_prefix_cache(self) -> None:
        """Forget all cached keys and values. Raises EngineError when requests are still running."""
        ...

    def base_views(self) -> Mapping[str, torch.Tensor]:
        """Return the engine's own storage by transformers' parameter name; views, never copies."""
        ...

    def adapter_slots(self) -> Mapping[str, AdapterSlot]:
        """Return the resident adapter's storage by transformers' module name; empty without an adapter."""
        ...

    @property
    def releasable_bytes(self) -> int:
        """Bytes that `release_memory` gives back."""
        ...

    def release_memory(self) -> None:
        """Give the KV cache's memory back for the training phase."""
        ...

    def restore_memory(self) -> None:
        """Map the KV cache again."""
        ...

    def close(self) -> None:
        """Free everything; the engine is unusable afterwards."""
        ...


class Progress(Protocol):
    """Called by an engine after each of its steps."""

    def __call__(self, unfinished: int, running: int) -> None:
        """Tell how many requests are not finished, and how many of them are being decoded now."""
        ...


def make_rollout(
    request: Request,
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    *,
    text: str,
    finish_reason: FinishReason,
    policy_version: int,
    num_cached_tokens: int = 0,
) -> Rollout:
    """Assemble the two segments of a single-turn rollout; every sampled token is trained on."""
    prompt = request.problem.prompt_token_ids
    return Rollout(
        problem=request.problem,
        sample_index=request.sample_index,
        segments=(
            Segment("prompt", prompt, (False,) * len(prompt)),
            Segment("sampled", tuple(token_ids), (True,) * len(token_ids), tuple(logprobs)),
        ),
        text=text,
        finish_reason=finish_reason,
        policy_version=policy_version,
        seed=request.seed,
        num_cached_tokens=num_cached_tokens,
    )
