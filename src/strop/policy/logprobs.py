"""Log-probabilities and entropy of chosen tokens from hidden states, without a [K, V] tensor.

Row by row, with z = h W^T / temperature (fp32) and target y:

    logp = z_y - logsumexp(z)        entropy = logsumexp(z) - sum_v softmax(z)_v z_v

The forward pass keeps only what backward needs to recompute a chunk of z: dz = g (onehot(y) - softmax(z)) /
temperature, so dH = dz W and, for a head that is trained, dW = dz^T H. Memory is one chunk of logits.
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK_ROWS = 1024
"""Rows whose logits exist at a time: 1024 x 152k x 4 bytes = 0.6 GiB for Qwen's vocabulary."""


def token_logprobs(
    hidden_KH: torch.Tensor,
    head_weight_VH: torch.Tensor,
    target_ids_K: torch.Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: int = CHUNK_ROWS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (logprobs_K, entropy_K), both fp32; gradients reach `hidden_KH` and a head that requires grad.

    The entropy is a metric and carries no gradient. Logits are computed in the dtype of the inputs and used in fp32,
    as the engine does.
    """
    return _TokenLogprobs.apply(hidden_KH, head_weight_VH, target_ids_K, temperature, chunk_rows)  # type: ignore[no-any-return]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_KH: torch.Tensor,
        weight_VH: torch.Tensor,
        targets_K: torch.Tensor,
        temperature: float,
        rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = hidden_KH.shape[0]
        logprobs_K = torch.empty(count, dtype=torch.float32, device=hidden_KH.device)
        entropy_K = torch.empty_like(logprobs_K)
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            logits = _logits(hidden_KH[part], weight_VH, temperature)
            log_norm = torch.logsumexp(logits, dim=-1)
            logprobs_K[part] = logits.gather(1, targets_K[part, None]).squeeze(1) - log_norm
            probs = torch.exp(logits - log_norm[:, None])
            # 0 * -inf of a masked vocabulary entry would be NaN.
            entropy_K[part] = log_norm - (probs * logits.clamp(min=torch.finfo(torch.float32).min)).sum(-1)
        ctx.save_for_backward(hidden_KH, weight_VH, targets_K)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.mark_non_differentiable(entropy_K)
        return logprobs_K, entropy_K

    @staticmethod
    def backward(ctx: Any, grad_K: torch.Tensor, _entropy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden_KH, weight_VH, targets_K = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_KH) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden_KH.shape[0], ctx.rows):
            part = slice(start, start + ctx.rows)
            hidden = hidden_KH[part]
            dlogits = torch.softmax(_logits(hidden, weight_VH, ctx.temperature), dim=-1).neg_()
            index = targets_K[part, None]
            dlogits.scatter_add_(1, index, torch.ones_like(index, dtype=dlogits.dtype))
            dlogits.mul_(grad_K[part, None] / ctx.temperature)
            dlogits = dlogits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = dlogits @ weight_VH
            if grad_weight is not None:
                grad_weight += dlogits.t() @ hidden
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VH.dtype), None, None, None


def _logits(hidden: torch.Tensor, weight_VH: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.nn.functional.linear(hidden, weight_VH).float() / temperature
