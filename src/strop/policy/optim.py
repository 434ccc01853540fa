"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with fp32 masters, gradient clipping and a guard."""

# The multi-tensor functions are torch's own and have no public name.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from ..config import OptimConfig
from .compact import CompactAdamW


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
        # Norms and biases are not decayed, as everywhere.
        decayed = [m for m in self._masters.values() if m.ndim >= 2]
        others = [m for m in self._masters.values() if m.ndim < 2]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        # On a card one kernel for many tensors; on a CPU plain arithmetic, tensor by tensor.
        self._fused = all(m.device.type == "cuda" for m in self._masters.values())
        self._adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=self._fused or None
        )

    def gradient_norm(self) -> float:
        """Return the 2-norm over all gradients, in fp32."""
        grads = [p.grad for p in self._parameters.values() if p.grad is not None]
        norms = torch._foreach_norm(grads, 2, dtype=torch.float32) if grads else []
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0

    def step(self, *, learning_rate: float, gradient_scale: float) -> None:
        """Scale the gradients, make one AdamW step and write the result into the parameters in place."""
        grads = []
        for name, p in self._parameters.items():
            master = self._masters[name]
            if p.grad is None:
                continue
            if master is not p:
                master.grad = p.grad.float()
            grads.append(master.grad)
        if grads:
            torch._foreach_mul_(grads, gradient_scale)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        with torch.no_grad():
            for name, p in self._parameters.items():
                if self._masters[name] is not p:
                    p.copy_(self._masters[name])
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for name, p in self._parameters.items():
            p.grad = None
            self._masters[name].grad = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return masters, both moments and step counts by parameter name: all that a resumed run needs."""
        state = {}
        for name, master in self._masters.items():
            state[f"master.{name}"] = master.detach()
            for key, value in self._adamw.state.get(master, {}).items():
                state[f"{key}.{name}"] = value
        return state

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned, into the same storage; the parameters follow their masters."""
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(state[f"master.{name}"])
                if self._masters[name] is not self._parameters[name]:
                    self._parameters[name].copy_(master)
                if f"exp_avg.{name}" not in state:
                    continue
                self._adamw.state[master] = {
                    "step": state[f"step.{name}"].to(master.device if self._fused else "cpu", copy=True),
                    "exp_avg": state[f"exp_avg.{name}"].to(master.device, copy=True),
                    "exp_avg_sq": state[f"exp_avg_sq.{name}"].to(master.device, copy=True),
                }
