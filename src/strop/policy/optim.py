"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with fp32 masters, gradient clipping and a guard."""

# The multi-tensor functions are torch's own and have no public name.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch.optim.adamw import adamw

from ..config import OptimConfig
from .compact import CompactAdamW, Part, cut

PIECE = 1 << 25
"""Values that are stepped at a time: their gradients in fp32 are 128 MiB, and smaller pieces leave a card waiting."""


class Optimizer(Protocol):
    """What a training step and a checkpoint need of an optimizer."""

    def gradient_norm(self) -> float:
        """Return the 2-norm over all gradients, in fp32."""
        ...

    def step(self, *, learning_rate: float, gradient_scale: float) -> None:
        """Scale the gradients, make one step and write the result into the parameters in place."""
        ...

    def zero_grad(self) -> None:
        """Drop all gradients."""
        ...

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return all that a resumed run needs, without copies."""
        ...

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned, into the same storage."""
        ...


def make_optimizer(parameters: Mapping[str, torch.nn.Parameter], settings: OptimConfig) -> Optimizer:
    """Return the optimizer that `optim.name` and `optim.master` ask for."""
    betas = (settings.adam_beta1, settings.adam_beta2)
    eps, decay = settings.adam_epsilon, settings.weight_decay
    if settings.name == "adamw" and settings.master == "fp32":
        return MasterAdamW(parameters, betas=betas, eps=eps, weight_decay=decay)
    return CompactAdamW(
        parameters, betas=betas, eps=eps, weight_decay=decay, eight_bit=settings.name == "adamw_8bit",
        compensated=settings.master == "kahan",
    )  # fmt: skip


@torch.no_grad()
def load_weights(parameters: Mapping[str, torch.nn.Parameter], state: Mapping[str, torch.Tensor]) -> None:
    """Restore the parameters alone from what an optimizer's `state_dict` returned, whatever its moments."""
    for name, p in parameters.items():
        stored = state.get(f"master.{name}")
        p.copy_(state[f"parameter.{name}"] if stored is None else stored)


class MasterAdamW:
    """torch's AdamW on fp32 masters.

    A parameter in fp32 is its own master, so with full fine-tuning in fp32 the engine's storage is what the optimizer
    updates. A 16-bit parameter gets an fp32 copy, which is rounded into the parameter after each step: at a learning
    rate of 1e-5 most updates are below half a bf16 unit and would be lost otherwise.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self._parameters = dict(parameters)
        self._masters = {
            name: p if p.dtype == torch.float32 else torch.nn.Parameter(p.detach().float())
            for name, p in self._parameters.items()
        }
        self._betas, self._eps = betas, eps
        masters = {name: master.detach() for name, master in self._masters.items()}
        self._first = {name: torch.zeros_like(master) for name, master in masters.items()}
        self._second = {name: torch.zeros_like(master) for name, master in masters.items()}
        # On a card one kernel for many tensors; on a CPU plain arithmetic, tensor by tensor.
        self._fused = all(m.device.type == "cuda" for m in masters.values())
        self._counts = {
            name: torch.zeros((), dtype=torch.float32, device=m.device if self._fused else "cpu")
            for name, m in masters.items()
        }
        # Norms and biases are not decayed, as everywhere.
        kinds = (([(n, m.numel()) for n, m in masters.items() if m.ndim >= 2], weight_decay),
                 ([(n, m.numel()) for n, m in masters.items() if m.ndim < 2], 0.0))  # fmt: skip
        self._pieces = [(parts, decay) for sizes, decay in kinds for parts in cut(sizes, PIECE)]

    def gradient_norm(self) -> float:
        """Return the 2-norm over all gradients, in fp32."""
        grads = [p.grad for p in self._parameters.values() if p.grad is not None]
        norms = torch._foreach_norm(grads, 2, dtype=torch.float32) if grads else []
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0

    @torch.no_grad()
    def step(self, *, learning_rate: float, gradient_scale: float) -> None:
        """Scale the gradients, make one AdamW step and write the result into the parameters in place.

        A parameter without a gradient is left alone. A step takes the fp32 gradients of one piece beside what is there
        already. Where not even these fit, some weights have made the step and others have not.
        """
        for parts, decay in self._pieces:
            there = [part for part in parts if self._parameters[part[0]].grad is not None]
            if there:
                self._step_piece(there, decay, learning_rate, gradient_scale)
        counts = [self._counts[name] for name, p in self._parameters.items() if p.grad is not None]
        if counts:
            torch._foreach_add_(counts, 1)
        self.zero_grad()

    def _step_piece(self, parts: list[Part], decay: float, learning_rate: float, scale: float) -> None:
        masters = [_values(self._masters[part[0]], part) for part in parts]
        # `float` copies 16-bit gradients alone; those in fp32 are scaled in place.
        gradients = [_values(self._gradient(part[0]), part).float() for part in parts]
        torch._foreach_mul_(gradients, scale)
        # Copies: each call counts a step, and a parameter may lie in several pieces.
        counts = torch._foreach_add([self._counts[part[0]] for part in parts], 0)
        adamw(
            masters, gradients, [_values(self._first[part[0]], part) for part in parts],
            [_values(self._second[part[0]], part) for part in parts], [], list(counts),
            fused=self._fused, amsgrad=False, beta1=self._betas[0], beta2=self._betas[1], lr=learning_rate,
            weight_decay=decay, eps=self._eps, maximize=False,
        )  # fmt: skip
        for part, master in zip(parts, masters, strict=True):
            p = self._parameters[part[0]]
            if self._masters[part[0]] is not p:
                _values(p, part).copy_(master)

    def _gradient(self, name: str) -> torch.Tensor:
        gradient = self._parameters[name].grad
        assert gradient is not None, f"{name} has no gradient"
        return gradient.contiguous()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for p in self._parameters.values():
            p.grad = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return masters, both moments and step counts by parameter name: all that a resumed run needs."""
        state = {f"master.{name}": master.detach() for name, master in self._masters.items()}
        for kind, values in (("step", self._counts), ("exp_avg", self._first), ("exp_avg_sq", self._second)):
            state |= {f"{kind}.{name}": value for name, value in values.items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned, into the same storage; the parameters follow their masters."""
        for name, target in self.state_dict().items():
            # An earlier version wrote nothing but the master of a parameter that had made no step.
            if name in state or name.startswith("master."):
                target.copy_(state[name])
            else:
                target.zero_()
        for name, master in self._masters.items():
            if master is not self._parameters[name]:
                self._parameters[name].copy_(master)


def _values(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    """Return a view of a part's values of a tensor: all of them in its own shape, some of them flat."""
    _, start, end = part
    return tensor if end - start == tensor.numel() else tensor.detach().view(-1)[start:end]
