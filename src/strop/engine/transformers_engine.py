"""Generation with the trainer's own transformers model, for machines that vLLM does not support.

Slower than vLLM, with the same contract: seeded per request, log-probabilities of the tempered distribution, finished
completions streamed out while others decode. It is the very module that is trained, so nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import MemoryExhaustedError
from ..types import Request, Rollout, Sampling
from .base import AdapterSlot, Progress, make_rollout


@dataclass(slots=True)
class _Row:
    """One running request."""

    request: Request
    generator: torch.Generator | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class TransformersEngine:
    """Batched decoding with a key-value cache. See `Engine` for the contract."""

    name = "transformers"

    def __init__(
        self, model: torch.nn.Module, decode: Callable[[Sequence[int]], str], *, max_num_seqs: int, pad_token_id: int
    ) -> None:
        """Generate with `model`, at most `max_num_seqs` completions at a time."""
        self._model, self._decode = model, decode
        self._max_num_seqs, self._pad = max_num_seqs, pad_token_id

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, policy_version: int, progress: Progress | None = None
    ) -> Iterator[Rollout]:
        """Yield completions as they finish, wave after wave in the given order; see `Engine.generate`.

        Raises MemoryExhaustedError when the card has too little memory for a wave.
        """
        for start in range(0, len(requests), self._max_num_seqs):
            wave = requests[start : start + self._max_num_seqs]
            try:
                yield from self._wave(wave, sampling, policy_version, progress)
            except torch.OutOfMemoryError as e:
                raise MemoryExhaustedError(
                    f"out of GPU memory while generating {len(wave)} completions at a time: {e}",
                    hint=f"rollout.max_num_seqs: below {len(wave)}; or model.engine: vllm, which needs less",
                ) from e

    def _wave(
        self, requests: Sequence[Request], sampling: Sampling, policy_version: int, progress: Progress | None
    ) -> Iterator[Rollout]:
        rows = [_Row(r, _generator(r.seed) if sampling.temperature > 0 else None) for r in requests]
        device = next(self._model.parameters()).device
        ids, mask = self._left_padded([r.request.problem.prompt_token_ids for r in rows], device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache: Any = None
        while rows:
            with torch.no_grad():
                out = self._model(
                    input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                    use_cache=True, logits_to_keep=1,
                )  # fmt: skip
            cache = out.past_key_values
            tokens, logprobs = _sample(out.logits[:, -1].float(), rows, sampling.temperature)
            for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
                row.token_ids.append(token)
                row.logprobs.append(logprob)
            if progress is not None:
                progress(len(rows), len(rows))
            stopped = [r.token_ids[-1] in sampling.stop_token_ids for r in rows]
            going = [not s and len(r.token_ids) < sampling.max_tokens for s, r in zip(stopped, rows, strict=True)]
            for row, stop, goes_on in zip(rows, stopped, going, strict=True):
                if not goes_on:
                    yield make_rollout(
                        row.request, row.token_ids, row.logprobs, text=self._decode(row.token_ids),
                        finish_reason="stop" if stop else "length", policy_version=policy_version,
                    )  # fmt: skip
            keep = torch.tensor([i for i, goes_on in enumerate(going) if goes_on], dtype=torch.int64, device=device)
            if len(keep) < len(rows):
                rows = [r for r, goes_on in zip(rows, going, strict=True) if goes_on]
                cache.batch_select_indices(keep)
                mask, positions = mask[keep], positions[keep]
            ids = torch.tensor([[r.token_ids[-1]] for r in rows], dtype=torch.int64, device=device)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=-1)
            positions = positions[:, -1:] + 1

    def _left_padded(
        self, prompts: Sequence[tuple[int, ...]], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self._pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            mask[i, longest - len(prompt) :] = 1
        return ids.to(device), mask.to(device)

    def reset_prefix_cache(self) -> None:
        """Nothing is cached between calls."""

    def base_views(self) -> Mapping[str, torch.Tensor]:
        """Return the model's own parameters, which the trainer uses as they are."""
        named = [*self._model.named_parameters(remove_duplicate=False), *self._model.named_buffers()]
        return {name: tensor.data for name, tensor in named}

    def adapter_slots(self) -> Mapping[str, AdapterSlot]:
        """Return nothing: the adapter modules are part of the model."""
        return {}

    @property
    def releasable_bytes(self) -> int:
        """0: keys and values live in a rollout alone."""
        return 0

    def release_memory(self) -> None:
        """Nothing is held between rollouts."""

    def restore_memory(self) -> None:
        """See `release_memory`."""

    def close(self) -> None:
        """Nothing to free beyond the model itself."""


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _sample(logits: torch.Tensor, rows: Sequence[_Row], temperature: float) -> tuple[list[int], list[float]]:
    """Draw one token per row; each row's noise comes from its own generator, whatever the batch looks like.

    argmax of p / e with e exponential is a draw from p (the exponential race, a form of Gumbel-max).
    """
    if temperature == 0:
        logprobs = torch.log_softmax(logits, dim=-1)
        picked = logprobs.argmax(-1, keepdim=True)
    else:
        logprobs = torch.log_softmax(logits / temperature, dim=-1)
        noise = torch.stack([torch.empty(logits.shape[-1]).exponential_(generator=r.generator) for r in rows])
        picked = (logprobs - noise.to(logprobs.device).log()).argmax(-1, keepdim=True)
    return picked.squeeze(1).tolist(), logprobs.gather(1, picked).squeeze(1).tolist()
