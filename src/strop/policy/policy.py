"""The policy: the model that is trained, seen as a function from a micro-batch to log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..types import MicroBatch
from . import attention, lora
from .logprobs import token_logprobs


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

    def __post_init__(self) -> None:
        attention.register()
        self.model.requires_grad_(not self.adapters)
        for adapter in self.adapters.values():
            adapter.lora_A.requires_grad_(True)
            adapter.lora_B.requires_grad_(True)

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Trained parameters by name; a tied weight appears once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.model.parameters()).device

    def forward(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (logprobs_K, entropy_K), fp32, of the trained tokens; `logprobs_K` carries the gradient."""
        hidden_TH = self._hidden(batch)
        hidden_KH = hidden_TH.index_select(0, batch.predictor_K.to(hidden_TH.device))
        head = self.model.get_output_embeddings().weight  # type: ignore[operator]
        targets_K = batch.target_ids_K.to(hidden_TH.device)
        return token_logprobs(hidden_KH, head, targets_K, temperature=self.temperature)

    def reference_logprobs(self, batch: MicroBatch) -> torch.Tensor:
        """Return the [K] log-probabilities of the policy at step 0, without gradient."""
        with torch.no_grad(), self._as_reference():
            return self.forward(batch)[0]

    def _hidden(self, batch: MicroBatch) -> torch.Tensor:
        layout = attention.PackedLayout.build(batch.groups, self.device)
        decoder = self.model.get_decoder()  # type: ignore[operator]
        with attention.packed(self.model.config):
            output = decoder(
                input_ids=batch.token_ids_T[None].to(self.device),
                position_ids=batch.position_ids_T[None].to(self.device),
                use_cache=False,
                strop_layout=layout,
            )
        return output.last_hidden_state[0]  # type: ignore[no-any-return]

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        if self.reference is None:
            # Only right when the adapter began at zero, or nothing was trained yet: `freeze_reference` sees to it.
            with lora.disabled(self.adapters):
                yield
            return
        with _swapped(self.trainable, self.reference):
            yield

    def freeze_reference(self) -> int:
        """Keep the present trained parameters as the reference; return the bytes this takes."""
        self.reference = {name: p.detach().clone() for name, p in self.trainable.items()}
        return sum(t.numel() * t.element_size() for t in self.reference.values())


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
