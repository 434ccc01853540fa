"""Log-probabilities and entropy of chosen tokens from hidden states, without a [K, V] tensor.

Row by row, with z = h W^T / temperature (fp32) and target y:

    logp = z_y - logsumexp(z)        entropy = logsumexp(z) - sum_v softmax(z)_v z_v

Logits exist for a chunk of rows at a time, in the dtype of the weights as in the engine.

- A frozen head: dlogp/dh = (onehot(y) - softmax(z)) W / temperature is linear in the gradient that arrives later, one
  number per row. So it is computed in the forward pass, while the chunk's logits are there, and only multiplied in
  backward: two products with the head per step instead of three, and K x H values kept.
- A head that is trained: the hidden states are kept, and backward computes a chunk of logits again:
  dz = g (onehot(y) - softmax(z)) / temperature, dH = dz W, dW = dz^T H. dW adds up in fp32 and is then rounded: with W
  in 16 bits that takes 6 V H bytes, all in all.

In 16 bits onehot - softmax is rounded once per entry (relative error 2^-9 in bf16, 2^-12 in fp16), as autograd would
round dz; 1 - p of a likely target is taken in fp32 before that, so nothing cancels.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from .kernels import ops_for

LOGIT_BYTES = 512 << 20
"""What a chunk of logits may take, temporaries included."""
_ROW_STEP = 128
_GRADIENT_ROWS = 8192
"""Rows of a trained head whose share of the gradient is made at a time, before it is added up in fp32."""


class PackedHead(Protocol):
    """A frozen head [V, H] whose weight is packed, with both products that are needed of it; see `nf4.HeadRows`."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool

    def logits(self, hidden_KH: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write hidden W^T to `out` [K, V] and return it."""
        ...

    def input_gradient(self, grad_KV: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write grad W to `out` [K, H] and return it."""
        ...


def chunk_rows(vocab: int, dtype: torch.dtype, device: torch.device, budget: int = LOGIT_BYTES) -> int:
    """Return how many rows of logits fit into `budget` bytes, in steps that matrix products like.

    On CUDA a row is V values of the weights' dtype, which the gradient overwrites; elsewhere three fp32 rows beside it.
    """
    per_row = vocab * (dtype.itemsize if device.type == "cuda" else dtype.itemsize + 12)
    return max(_ROW_STEP, budget // per_row // _ROW_STEP * _ROW_STEP)


def token_logprobs(
    hidden_KH: torch.Tensor,
    head_weight_VH: torch.Tensor | PackedHead,
    target_ids_K: torch.Tensor,
    *,
    temperature: float = 1.0,
    rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (logprobs_K, entropy_K), both fp32; gradients reach `hidden_KH` and a head that requires grad.

    The entropy is a metric and carries no gradient. `rows` of logits exist at a time; None: as `chunk_rows` says.
    """
    rows = rows or chunk_rows(head_weight_VH.shape[0], head_weight_VH.dtype, hidden_KH.device)
    trained = head_weight_VH.requires_grad and torch.is_grad_enabled()
    function = _TrainedHead if trained else _FrozenHead
    return function.apply(hidden_KH, head_weight_VH, target_ids_K, temperature, rows)  # type: ignore[no-any-return]


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_KH: torch.Tensor,
        head: torch.Tensor | PackedHead,
        targets_K: torch.Tensor,
        temperature: float,
        rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = ctx.needs_input_grad[0]
        gradient_KH = torch.empty_like(hidden_KH) if wanted else None
        logprobs_K, entropy_K = _empty_results(hidden_KH)
        ops = ops_for(hidden_KH.device)
        count = hidden_KH.shape[0]
        buffer = hidden_KH.new_empty(min(rows, count), head.shape[0])
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            logits = _logits(hidden_KH[part], head, buffer[: part.stop - start])
            logprobs_K[part], entropy_K[part] = ops.logit_stats(logits, targets_K[part], temperature, gradient=wanted)
            if gradient_KH is not None:
                _input_gradient(logits, head, gradient_KH[part])
        ctx.save_for_backward(gradient_KH)
        ctx.mark_non_differentiable(entropy_K)
        return logprobs_K, entropy_K

    @staticmethod
    def backward(ctx: Any, grad_K: torch.Tensor, _entropy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (gradient_KH,) = ctx.saved_tensors
        # In place: the product is taken in fp32 and rounded once, without a second [K, H] tensor.
        return gradient_KH.mul_(grad_K[:, None]), None, None, None, None


class _TrainedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_KH: torch.Tensor,
        weight_VH: torch.Tensor,
        targets_K: torch.Tensor,
        temperature: float,
        rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs_K, entropy_K = _empty_results(hidden_KH)
        ops = ops_for(hidden_KH.device)
        for start in range(0, hidden_KH.shape[0], rows):
            part = slice(start, start + rows)
            logits = hidden_KH[part] @ weight_VH.t()
            logprobs_K[part], entropy_K[part] = ops.logit_stats(logits, targets_K[part], temperature, gradient=False)
        ctx.save_for_backward(hidden_KH, weight_VH, targets_K)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.mark_non_differentiable(entropy_K)
        return logprobs_K, entropy_K

    @staticmethod
    def backward(ctx: Any, grad_K: torch.Tensor, _entropy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden_KH, weight_VH, targets_K = ctx.saved_tensors
        ops = ops_for(hidden_KH.device)
        grad_hidden = torch.empty_like(hidden_KH) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32)
        for start in range(0, hidden_KH.shape[0], ctx.rows):
            part = slice(start, start + ctx.rows)
            hidden = hidden_KH[part]
            dlogits = hidden @ weight_VH.t()
            ops.logit_stats(dlogits, targets_K[part], ctx.temperature, gradient=True)
            dlogits.mul_(grad_K[part, None])
            if grad_hidden is not None:
                grad_hidden[part] = dlogits @ weight_VH
            for first in range(0, len(grad_weight), _GRADIENT_ROWS):
                words = slice(first, first + _GRADIENT_ROWS)
                grad_weight[words] += dlogits[:, words].t() @ hidden
        return grad_hidden, grad_weight.to(weight_VH.dtype), None, None, None


def _empty_results(hidden_KH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs_K = torch.empty(hidden_KH.shape[0], dtype=torch.float32, device=hidden_KH.device)
    return logprobs_K, torch.empty_like(logprobs_K)


def _logits(hidden: torch.Tensor, head: torch.Tensor | PackedHead, out: torch.Tensor) -> torch.Tensor:
    return torch.mm(hidden, head.t(), out=out) if isinstance(head, torch.Tensor) else head.logits(hidden, out)


def _input_gradient(grad: torch.Tensor, head: torch.Tensor | PackedHead, out: torch.Tensor) -> None:
    if isinstance(head, torch.Tensor):
        torch.mm(grad, head, out=out)
    else:
        head.input_gradient(grad, out)
