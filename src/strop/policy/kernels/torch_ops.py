"""The fused elementwise functions in plain torch: what they mean, and what runs where there is no Triton.

Shapes: T tokens, H hidden size, I intermediate size, D head size, V vocabulary. Sums and exponentials are taken in
fp32 whatever the dtype of the tensors. A name that ends in `_` writes into its arguments.
"""

from __future__ import annotations

import math

import torch

GELU_SCALE = 2 * math.sqrt(2 / math.pi)
GELU_CUBE = 0.044715


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, H] -> (weight * x / rms(x), 1 / rms(x) [T] fp32).

    With a weight of the dtype of x the quotient is rounded before it is multiplied, as in Llama; with an fp32 weight
    the product alone is, as in Gemma.
    """
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    return _weighted(wide * rstd[:, None], weight, x.dtype), rstd


def _weighted(normed: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight * normed.to(dtype) if weight.dtype == dtype else (weight * normed).to(dtype)


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None
) -> torch.Tensor:
    """Gradient of x [T, H] where x may also go on as a residual with the gradient `residual`.

    With n = x / rms and g = grad * weight: (g - n mean(g n)) / rms + residual.
    """
    scaled, normed = grad.float() * weight.float(), x.float() * rstd[:, None]
    dx = rstd[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return (dx if residual is None else dx + residual.float()).to(x.dtype)


def rope(source: torch.Tensor, out: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inverse: bool) -> None:
    """Rotate [T, heads, D] into `out`, which may be `source`; cos and sin are [T, D], both halves of D alike.

    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin); the inverse, which is also the backward pass, turns the other way.
    """
    out.copy_(_rotate(source.float(), cos, sin, inverse))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> torch.Tensor:
    half = x.shape[-1] // 2
    c, s = cos[:, None, :half].float(), sin[:, None, :half].float()
    s = -s if inverse else s
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1)


def norm_rope(
    source: torch.Tensor, out: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    """Normalise each head of [T, heads, D] as `rms_norm` does, rotate into `out`."""
    wide = source.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    out.copy_(_rotate(_weighted(wide * rstd, weight, source.dtype).float(), cos, sin, False))


def norm_rope_backward(
    grad: torch.Tensor, source: torch.Tensor, out: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    weight: torch.Tensor, eps: float,
) -> None:  # fmt: skip
    """Write the gradient of `source` of `norm_rope` into `out`, all [T, heads, D]."""
    wide = source.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    scaled, normed = _rotate(grad.float(), cos, sin, True) * weight.float(), wide * rstd
    out.copy_(rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True)))


def swiglu(
    gate_up: torch.Tensor, low: torch.Tensor | None = None, b: torch.Tensor | None = None, *, gelu: bool = False
) -> torch.Tensor:
    """[T, 2 I], gate beside up -> silu(gate) * up [T, I]; with `gelu` its tanh form takes the place of silu.

    With `low` [T, 2 R] and `b` [2 I, 2 R], whose blocks off the diagonal are zero, low b^T is added to both first: the
    adapters' part, which is not written back.
    """
    gate, up = _adapted(gate_up, low, b).chunk(2, dim=-1)
    if gelu:
        return torch.nn.functional.gelu(gate, approximate="tanh") * up
    return torch.nn.functional.silu(gate) * up


def _adapted(x: torch.Tensor, low: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor:
    return x if low is None or b is None else torch.addmm(x, low, b.t())


def swiglu_backward_(
    gate_up: torch.Tensor, grad: torch.Tensor, low: torch.Tensor | None = None, b: torch.Tensor | None = None,
    grad_low: torch.Tensor | None = None, a: torch.Tensor | None = None, *, gelu: bool = False,
) -> None:  # fmt: skip
    """Turn [T, 2 I] into its gradient, and the gradient of the product [T, I] into the product itself.

    `low` and `b` as above; grad_low [T, R] a [R, I], the next layer's adapter's part, is added to the gradient first.
    Either activation is g s(u) with the logistic function s, u = g for silu and 2 sqrt(2 / pi) (g + 0.044715 g^3) for
    gelu (Hendrycks & Gimpel 2016, arXiv 1606.08415), and so its derivative s + g s (1 - s) u'.
    """
    wide = grad.float() if grad_low is None or a is None else torch.addmm(grad, grad_low, a).float()
    gate, up = (x.float() for x in _adapted(gate_up, low, b).chunk(2, dim=-1))
    inner = GELU_SCALE * (gate + GELU_CUBE * gate**3) if gelu else gate
    slope = GELU_SCALE * (1 + 3 * GELU_CUBE * gate**2) if gelu else 1.0
    sigmoid = torch.sigmoid(inner)
    active = gate * sigmoid
    product = active.to(grad.dtype) * up.to(grad.dtype)
    gate_up.copy_(torch.cat([wide * up * (sigmoid + active * (1 - sigmoid) * slope), wide * active], dim=-1))
    grad.copy_(product)  # last: in fp32 `wide` may be `grad` itself


def merge_attention_(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> None:
    """Merge attention over two sets of keys into `out` [T, heads, D] and `lse` [heads, T] (log-sum-exp of scores).

    out = sum of e^(lse_i - lse) out_i with lse = log sum e^lse_i (Dao et al. 2022, arXiv 2205.14135, section 3.1).
    """
    merged = torch.logaddexp(lse, other_lse)
    mine, theirs = ((part - merged).exp().t()[..., None] for part in (lse, other_lse))
    out.copy_(out.float() * mine + other.float() * theirs)
    lse.copy_(merged)


def logit_stats(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float, *, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (log-probability of the target, entropy), fp32 [rows], of logits [rows, V] / temperature.

    With `gradient` the logits are overwritten by d log-probability / d logits = (onehot - softmax) / temperature.
    """
    z = logits.float() / temperature
    log_norm = torch.logsumexp(z, dim=-1)
    logprobs = z.gather(1, targets[:, None]).squeeze(1) - log_norm
    probs = torch.exp(z - log_norm[:, None])
    # 0 * -inf of a masked vocabulary entry would be NaN.
    entropy = log_norm - (probs * z.clamp(min=torch.finfo(torch.float32).min)).sum(-1)
    if gradient:
        probs.neg_().scatter_add_(1, targets[:, None], torch.ones_like(probs[:, :1]))
        logits.copy_(probs.div_(temperature))
    return logprobs, entropy
