"""The policy: the model that is trained, seen as a function from a micro-batch to log-probabilities."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import ModelError
from ..types import GroupSpan, MicroBatch, SequenceSpan
from . import attention, lora
from .checkpointing import checkpointed
from .fused import FusedDecoder, fuse
from .logprobs import token_logprobs


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """A micro-batch on the policy's device, with the layout that its attention needs."""

    batch: MicroBatch
    layout: attention.PackedLayout


@dataclass(slots=True)
class Policy:
    """A transformers decoder with either all weights trained, or adapters beside a frozen base."""

    model: torch.nn.Module
    temperature: float
    """Logits are divided by it, as the sampler does."""
    adapters: dict[str, lora.LoraLinear] = field(default_factory=dict)
    """By full module name; empty for full fine-tuning."""
    reference: Mapping[str, torch.Tensor] | None = None
    """Frozen copies by parameter name where the policy at step 0 is not the adapter-free base."""
    checkpoint_layers: int = 0
    """Leading layers that keep only their input and run again in backward."""
    logit_rows: int | None = None
    """Rows of logits that exist at a time; None: as many as `logprobs.LOGIT_BYTES` holds."""
    fuse: bool | None = None
    """Run the layers as fused blocks where the architecture allows it (`fused.py`); None: on CUDA."""
    fused: FusedDecoder | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        attention.register()
        self.model.requires_grad_(not self.adapters)
        for adapter in self.adapters.values():
            adapter.lora_A.requires_grad_(True)
            adapter.lora_B.requires_grad_(True)
        if self.fuse or (self.fuse is None and self.device.type == "cuda"):
            self.fused = fuse(self.model)

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Trained parameters by name; a tied weight appears once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def device(self) -> torch.device:
        """Where the layers' weights lie; an input embedding may lie in host memory."""
        return self.model.get_output_embeddings().weight.device  # type: ignore[operator, no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's weights, and so of activations and their gradients."""
        return self.model.get_output_embeddings().weight.dtype  # type: ignore[operator, no-any-return]

    def prepare(self, batch: MicroBatch) -> DeviceBatch:
        """Move a micro-batch to the device: one transfer for its integers and one for its numbers.

        Done for a whole step before the first kernel, since a copy from ordinary memory waits for the ones before it.
        """
        names = {
            torch.int64: ("token_ids_T", "position_ids_T", "predictor_K", "target_ids_K", "sequence_K"),
            torch.float32: ("sampler_logprobs_K", "advantages_K", "weights_K"),
        }
        moved: dict[str, torch.Tensor] = {}
        for group in names.values():
            values = [getattr(batch, name) for name in group]
            joined = torch.cat(values).to(self.device)
            moved |= dict(zip(group, joined.split([len(v) for v in values]), strict=True))
        return DeviceBatch(replace(batch, **moved), attention.PackedLayout.build(batch.groups, self.device))

    def forward(self, batch: MicroBatch | DeviceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (logprobs_K, entropy_K), fp32, of the trained tokens; `logprobs_K` carries the gradient."""
        there = batch if isinstance(batch, DeviceBatch) else self.prepare(batch)
        head = self.model.get_output_embeddings().weight  # type: ignore[operator]
        return token_logprobs(
            self._hidden(there), head, there.batch.target_ids_K, temperature=self.temperature, rows=self.logit_rows
        )

    def reference_logprobs(self, batch: MicroBatch | DeviceBatch) -> torch.Tensor:
        """Return the [K] log-probabilities of the policy at step 0, without gradient."""
        with torch.no_grad(), self._as_reference():
            return self.forward(batch)[0]

    def _hidden(self, there: DeviceBatch) -> torch.Tensor:
        """Return the hidden states [K, H] that the trained tokens are predicted from."""
        batch, layout = there.batch, there.layout
        if self.fused is not None:
            hidden_TH = self.fused.forward(batch.token_ids_T, batch.position_ids_T, layout, self.checkpoint_layers)
            return self.fused.final_norm(hidden_TH.index_select(0, batch.predictor_K))
        decoder = self.model.get_decoder()  # type: ignore[operator]
        config = self.model.config
        around = functools.partial(attention.packed, config)
        with around(), checkpointed(decoder.layers, self.checkpoint_layers, around):
            output = decoder(
                input_ids=batch.token_ids_T[None],
                position_ids=batch.position_ids_T[None],
                use_cache=False,
                strop_layout=layout,
            )
        return output.last_hidden_state[0].index_select(0, batch.predictor_K)  # type: ignore[no-any-return]

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        if self.reference is None:
            # Only right when the adapter began at zero, or nothing was trained yet: `freeze_reference` sees to it.
            with lora.disabled(self.adapters):
                yield
            return
        with _swapped(self.trainable, self.reference):
            yield

    def freeze_reference(self) -> None:
        """Keep copies of the present trained parameters as the reference."""
        self.reference = {name: p.detach().clone() for name, p in self.trainable.items()}


CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}
"""Largest difference in nats that rounding explains, by the dtype that the model computes in."""


def check_packed_forward(policy: Policy) -> None:
    """Compare the packed log-probabilities with the model's own logits on a group of two short sequences.

    An architecture may scale its logits, add a bias to its head or use attention sinks; whatever the packed pass left
    out would train another policy than the one that samples. Raises ModelError with the largest difference.
    """
    config: Any = policy.model.config
    vocab: int = config.vocab_size
    ids = torch.arange(1, 25).mul(2654435761).remainder(min(vocab, 20_000))
    prompt, first, second = ids[:8], ids[8:17], ids[17:24]
    batch = _two_completions(prompt, first, second)
    with torch.no_grad():
        packed_K = policy.forward(batch)[0].cpu()
        plain = []
        for completion in (first, second):
            sequence = torch.cat([prompt, completion])[None].to(policy.device)
            logits = policy.model(input_ids=sequence, use_cache=False).logits[0, len(prompt) - 1 : -1].float().cpu()
            logprobs = torch.log_softmax(logits / policy.temperature, dim=-1)
            plain.append(logprobs.gather(1, completion[:, None]).squeeze(1))
    gap = float((packed_K - torch.cat(plain)).abs().max())
    # Not that of the first parameter: beside a packed base it can be an adapter's fp32.
    if not gap <= CHECK_TOLERANCE[config.dtype]:
        raise ModelError(
            f"models of type `{config.model_type}` compute their logits in a way that the packed pass does not follow: "
            f"log-probabilities differ by up to {gap:.3g}",
            hint="model.path: choose a Llama, Qwen2, Qwen3, Mistral or Gemma3 model",
        )


def _two_completions(prompt: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> MicroBatch:
    """Pack two completions of one prompt; all their tokens are trained."""
    p, m, n = len(prompt), len(first), len(second)
    count = m + n
    return MicroBatch(
        token_ids_T=torch.cat([prompt, first[:-1], second[:-1]]),
        position_ids_T=torch.cat([torch.arange(p + m - 1), torch.arange(p, p + n - 1)]),
        groups=(GroupSpan(0, p, (SequenceSpan(p, m - 1), SequenceSpan(p + m - 1, n - 1))),),
        predictor_K=torch.cat(
            [torch.arange(p - 1, p + m - 1), torch.tensor([p - 1]), torch.arange(p + m - 1, p + count - 2)]
        ),
        target_ids_K=torch.cat([first, second]),
        sampler_logprobs_K=torch.zeros(count),
        advantages_K=torch.zeros(count),
        weights_K=torch.zeros(count),
        sequence_K=torch.cat([torch.zeros(m, dtype=torch.int64), torch.ones(n, dtype=torch.int64)]),
    )


@contextmanager
def _swapped(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Point parameters at other storage inside the block; their own storage, shared with the engine, is untouched."""
    own = {name: p.data for name, p in parameters.items()}
    for name, p in parameters.items():
        p.data = values[name]
    try:
        yield
    finally:
        for name, p in parameters.items():
            p.data = own[name]
