"""A decoder's layers as two differentiable blocks each, for models built like Llama, Gemma or Gemma 3.

    attention block   x + o(attention(rope(norm(q, k)), v))   with q, k, v of rms_norm(x)
    MLP block         x + down(silu(gate) * up)               with gate, up of rms_norm(x)

Gemma has gelu in the place of silu and 1 + w in the place of a norm's weight w; Gemma 3 also a norm before each sum.

Each block is one autograd function that saves what it cannot cheaply compute again: its input, q, k, v, the
attention's output and log-sum-exp; its input, gate and up. Norms and the product before `down` are computed again in
backward, where they are needed. That is 2 H + 2 (heads + kv heads) D + 2 I values per token and layer and, with
adapters of rank R, 7 R: about half of what autograd keeps of the plain layers, in a fraction of the kernels. Norms of
the heads add (heads + kv heads) D, norms before the sums 2 H.

The blocks run on the modules that transformers built; nothing of transformers is replaced. `fuse` returns None for any
other architecture, which is then trained as transformers wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from . import attention
from .checkpointing import run_layer
from .kernels import ops_for
from .linears import Factors, Grads, Linears
from .lora import LoraLinear

_LLAMA_TYPES = frozenset({"llama", "qwen2", "qwen3", "mistral"})
_GEMMA_TYPES = frozenset({"gemma", "gemma3_text"})
_SILU = frozenset({"silu", "swish"})
_GELU = frozenset({"gelu_pytorch_tanh"})


@dataclass(frozen=True, slots=True)
class _Row:
    """What all layers share: rotary factors [T, D] by kind of layer, and the layout of the packed row."""

    rotary: Mapping[str | None, tuple[torch.Tensor, torch.Tensor]]
    layout: attention.PackedLayout


class _Norm:
    """An RMS norm of transformers: its weight as it multiplies, and what it gets as a gradient."""

    def __init__(self, module: Any, *, plus_one: bool) -> None:
        self._module, self._plus_one = module, plus_one
        self.eps = float(module.eps if plus_one else module.variance_epsilon)
        self.parameters: list[torch.nn.Parameter] = [module.weight] if module.weight.requires_grad else []

    @property
    def weight(self) -> torch.Tensor:
        """[width]; in fp32 where the norm multiplies before it rounds."""
        weight = self._module.weight.detach()
        return 1.0 + weight.float() if self._plus_one else weight

    def apply(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, width] -> (normalised [T, width], 1 / rms [T])."""
        return ops_for(x.device).rms_norm(x, self.weight, self.eps)  # type: ignore[no-any-return]

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the gradient of x, `residual` added."""
        return ops_for(x.device).rms_norm_backward(grad, x, rstd, self.weight, residual)  # type: ignore[no-any-return]

    def weight_gradients(self, grad: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor) -> Grads:
        """Return the gradients of `parameters`; any shape [..., width], `rstd` [..., 1]."""
        if not self.parameters:
            return []
        normed = x.float() * rstd
        return [(grad.float() * normed).flatten(0, -2).sum(0).to(self._module.weight.dtype)]


def _norms_sums(layer: Any) -> bool:
    """Whether a layer has a norm before each sum."""
    return hasattr(layer, "pre_feedforward_layernorm")


class _Attention:
    """The modules of an attention block, and its numbers."""

    def __init__(self, layer: Any, *, gemma: bool) -> None:
        module = layer.self_attn
        self.norm = _Norm(layer.input_layernorm, plus_one=gemma)
        self.after = _Norm(layer.post_attention_layernorm, plus_one=True) if _norms_sums(layer) else None
        self.qkv = Linears([module.q_proj, module.k_proj, module.v_proj])
        self.output = Linears([module.o_proj])
        self.size = int(module.head_dim)
        self.heads, self.kv_heads, _ = (n // self.size for n in self.qkv.sizes)
        head_norms = [module.q_norm, module.k_norm] if hasattr(module, "q_norm") else []
        self.head_norms = [_Norm(m, plus_one=gemma) for m in head_norms]
        self.scaling = float(module.scaling)
        # Mistral has its window in the config.
        holder = module.config if module.config.model_type == "mistral" else module
        self.window: int | None = getattr(holder, "sliding_window", None)
        self.kind: str | None = module.layer_type if _norms_sums(layer) else None
        norms = [n for n in (self.norm, *self.head_norms, self.after) if n is not None]
        self.parameters = [p for part in (*norms, self.qkv, self.output) for p in part.parameters]

    def views(self, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, (heads + 2 kv heads) D] -> q, k, v as [T, heads, D]."""
        q, k, v = buffer.view(len(buffer), -1, self.size).split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return q, k, v

    def rotated(self, raw: torch.Tensor, row: _Row) -> tuple[torch.Tensor, torch.Tensor]:
        """Return q and k normalised and rotated: in place, or beside `raw` where the norm's backward needs it."""
        ops, (cos, sin) = ops_for(raw.device), row.rotary[self.kind]
        q, k, _ = self.views(raw)
        if not self.head_norms:
            both = raw.view(len(raw), -1, self.size)[:, : self.heads + self.kv_heads]
            ops.rope(both, both, cos, sin, inverse=False)
            return q, k
        out = raw.new_empty(len(raw), self.heads + self.kv_heads, self.size)
        new_q, new_k = out[:, : self.heads], out[:, self.heads :]
        for source, target, norm in zip((q, k), (new_q, new_k), self.head_norms, strict=True):
            ops.norm_rope(source, target, cos, sin, norm.weight, norm.eps)
        return new_q, new_k

    def unrotated(
        self, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, raw: torch.Tensor, row: _Row
    ) -> tuple[torch.Tensor, Grads]:
        """Return (gradient of `raw` [T, ...], gradients of trained head norms)."""
        ops, (cos, sin) = ops_for(raw.device), row.rotary[self.kind]
        grad = torch.empty_like(raw)
        targets, sources = self.views(grad), self.views(raw)
        targets[2].copy_(dv)
        norm_grads: Grads = []
        for i, d in enumerate((dq, dk)):
            if not self.head_norms:
                ops.rope(d, targets[i], cos, sin, inverse=True)
                continue
            norm = self.head_norms[i]
            if norm.parameters:
                straight = torch.empty_like(d)
                ops.rope(d, straight, cos, sin, inverse=True)
                rstd = torch.rsqrt(sources[i].float().pow(2).mean(-1, keepdim=True) + norm.eps)
                norm_grads += norm.weight_gradients(straight, sources[i], rstd)
            ops.norm_rope_backward(d, sources[i], targets[i], cos, sin, norm.weight, norm.eps)
        return grad, norm_grads


class _AttentionBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, block: _Attention, row: _Row, *_parameters: torch.Tensor) -> torch.Tensor:
        raw, low = block.qkv.forward(block.norm.apply(x)[0])
        q, k = block.rotated(raw, row)
        v = block.views(raw)[2]
        out, saved = attention.attend(q, k, v, row.layout, block.scaling, block.window)
        y, out_low, projected = _sum(x, block.output, out.reshape(len(x), -1), block.after)
        # Without head norms q and k are views of `raw`, which is then kept once.
        rotated = (q, k) if block.head_norms else ()
        ctx.save_for_backward(x, raw, low, out, out_low, projected, *saved, *rotated)
        ctx.block, ctx.row, ctx.num_saved = block, row, len(saved)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        block: _Attention = ctx.block
        row: _Row = ctx.row
        x, raw, low, out, out_low, projected, *rest = ctx.saved_tensors
        saved = tuple(rest[: ctx.num_saved])
        q, k = rest[ctx.num_saved :] if block.head_norms else block.views(raw)[:2]
        v = block.views(raw)[2]
        grad = grad.contiguous()
        summand, after_grads = _before_norm(grad, projected, block.after)
        dout, out_grads = block.output.backward(summand, out.reshape(len(x), -1), out_low)
        assert dout is not None
        dq, dk, dv = attention.attend_backward(
            dout.view(out.shape), q, k, v, out, saved, row.layout, block.scaling, block.window
        )
        del dout
        draw, head_grads = block.unrotated(dq, dk, dv, raw, row)
        del dq, dk, dv
        dx, qkv_grads, norm_grads = _through_norm(ctx, block.norm, block.qkv, draw, x, low, grad)
        return (dx, None, None, *norm_grads, *head_grads, *after_grads, *qkv_grads, *out_grads)


class _Mlp:
    """The modules of an MLP block."""

    def __init__(self, layer: Any, *, gemma: bool) -> None:
        four = _norms_sums(layer)
        before = layer.pre_feedforward_layernorm if four else layer.post_attention_layernorm
        self.norm = _Norm(before, plus_one=gemma)
        self.after = _Norm(layer.post_feedforward_layernorm, plus_one=True) if four else None
        self.gelu = gemma
        self.gate_up = Linears([layer.mlp.gate_proj, layer.mlp.up_proj])
        self.down = Linears([layer.mlp.down_proj])
        norms = [n for n in (self.norm, self.after) if n is not None]
        self.parameters = [p for part in (*norms, self.gate_up, self.down) for p in part.parameters]


class _MlpBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, block: _Mlp, *_parameters: torch.Tensor) -> torch.Tensor:
        # The adapters' part of gate and up is added where they are read, twice, and never written.
        b = block.gate_up.pair()
        gate_up, low = block.gate_up.forward(block.norm.apply(x)[0], add_adapters=b is None)
        product = ops_for(x.device).swiglu(gate_up, None if b is None else low, b, gelu=block.gelu)
        y, down_low, projected = _sum(x, block.down, product, block.after)
        ctx.save_for_backward(x, gate_up, low, down_low, projected)
        ctx.block = block
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        block: _Mlp = ctx.block
        x, gate_up, low, down_low, projected = ctx.saved_tensors
        grad = grad.contiguous()
        summand, after_grads = _before_norm(grad, projected, block.after)
        grad_low = block.down.low_gradient(summand, down_low)
        a, b = block.down.single(), block.gate_up.pair()
        product = block.down.input_gradient(summand, grad_low if a is None else None)
        # Both buffers are used up here: gate_up becomes its gradient, the gradient of the product the product.
        ops_for(x.device).swiglu_backward_(
            gate_up, product, None if b is None else low, b, None if a is None else grad_low, a, gelu=block.gelu
        )
        down_grads = block.down.parameter_gradients(summand, product, down_low, grad_low)
        del product, summand
        dx, gate_up_grads, norm_grads = _through_norm(ctx, block.norm, block.gate_up, gate_up, x, low, grad)
        return (dx, None, *norm_grads, *after_grads, *gate_up_grads, *down_grads)


def _sum(
    x: torch.Tensor, linear: Linears, inner: torch.Tensor, after: _Norm | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return (x + linear(inner), its low-rank input, None), with a norm before the sum (.., .., its input)."""
    if after is None:
        y, low = linear.forward(inner, residual=x)
        return y, low, None
    projected, low = linear.forward(inner)
    return x + after.apply(projected)[0], low, projected


def _before_norm(grad: torch.Tensor, projected: torch.Tensor | None, after: _Norm | None) -> tuple[torch.Tensor, Grads]:
    """Return the gradient of a block's last linear layer, and of the norm between it and the sum."""
    if after is None or projected is None:
        return grad, []
    rstd = after.apply(projected)[1]
    return after.backward(grad, projected, rstd, None), after.weight_gradients(grad, projected, rstd[:, None])


def _through_norm(
    ctx: Any, norm: _Norm, linears: Linears, grad: torch.Tensor, x: torch.Tensor, low: torch.Tensor | None,
    residual: torch.Tensor,
) -> tuple[torch.Tensor | None, Grads, Grads]:  # fmt: skip
    """Go back through linear layers and the norm before them: (gradient of x, of the layers, of the norm's weight)."""
    normed, rstd = norm.apply(x)
    wanted = ctx.needs_input_grad[0]
    dnormed, grads = linears.backward(grad, normed, low, need_input=wanted or bool(norm.parameters))
    if dnormed is None:  # the first layer of a frozen base: nothing before it learns
        return None, grads, []
    outer = norm.weight_gradients(dnormed, x, rstd[:, None])
    return (norm.backward(dnormed, x, rstd, residual) if wanted else None), grads, outer


class _NormBlock(torch.autograd.Function):
    """The norm before the output head; saves its input alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: _Norm, *_parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.norm = norm
        return norm.apply(x)[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        norm: _Norm = ctx.norm
        (x,) = ctx.saved_tensors
        rstd = norm.apply(x)[1]
        return (norm.backward(grad, x, rstd, None), None, *norm.weight_gradients(grad, x, rstd[:, None]))


class FusedDecoder:
    """Runs a decoder's own modules through the blocks; see `fuse`."""

    def __init__(self, decoder: Any, *, gemma: bool) -> None:
        self._decoder = decoder
        self._layers = [(_Attention(layer, gemma=gemma), _Mlp(layer, gemma=gemma)) for layer in decoder.layers]
        linears = [g for a, m in self._layers for g in (a.qkv, a.output, m.gate_up, m.down)]
        self._factors = Factors(linears, decoder.norm.weight.dtype)
        self._norm = _Norm(decoder.norm, plus_one=gemma)

    def forward(
        self, token_ids_T: torch.Tensor, position_ids_T: torch.Tensor, layout: attention.PackedLayout, checkpointed: int
    ) -> torch.Tensor:
        """Return the hidden states [T, H] before the last norm; the first `checkpointed` layers keep their input."""
        x = self._decoder.embed_tokens(token_ids_T)
        rotary = {}
        for kind in sorted({a.kind for a, _ in self._layers}, key=str):
            # Gemma 3 has other frequencies in layers with a window.
            named = () if kind is None else (kind,)
            cos, sin = self._decoder.rotary_emb(x[None], position_ids_T[None], *named)
            rotary[kind] = (cos[0], sin[0])
        row = _Row(rotary, layout)
        self._factors.refresh()
        for i, (attend, mlp) in enumerate(self._layers):
            x = run_layer(_layer, x, attend, mlp, row, checkpoint=i < checkpointed)
        return x

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the norm before the output head to [rows, H]."""
        return _NormBlock.apply(hidden, self._norm, *self._norm.parameters)  # type: ignore[no-any-return]


def _layer(x: torch.Tensor, attend: _Attention, mlp: _Mlp, row: _Row) -> torch.Tensor:
    x = _AttentionBlock.apply(x, attend, row, *attend.parameters)  # type: ignore[assignment]
    return _MlpBlock.apply(x, mlp, *mlp.parameters)  # type: ignore[no-any-return]


def fuse(model: Any) -> FusedDecoder | None:
    """Return the fused form of a Llama, Qwen2, Qwen3, Mistral, Gemma or Gemma 3 model, None for any other.

    To be called when adapters are in place and it is settled what is trained.
    """
    decoder, kind = model.get_decoder(), getattr(model.config, "model_type", None)
    gemma = kind in _GEMMA_TYPES
    if not (gemma or kind in _LLAMA_TYPES) or not all(_fits(layer, gemma=gemma) for layer in decoder.layers):
        return None
    return FusedDecoder(decoder, gemma=gemma)


def _fits(layer: Any, *, gemma: bool) -> bool:
    """Whether a layer holds the modules that the blocks know, and no others that compute."""
    attn, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    names = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    names |= {"pre_feedforward_layernorm", "post_feedforward_layernorm"} if _norms_sums(layer) else set()
    if attn is None or mlp is None or {name for name, _ in layer.named_children()} != names:
        return False
    config = getattr(mlp, "config", None)
    activation = getattr(config, "hidden_activation" if _norms_sums(layer) else "hidden_act", None)
    changes = ("attn_logit_softcapping", "use_bidirectional_attention") if gemma else ()
    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    head_norms = {"q_norm", "k_norm"}
    return (
        {name for name, _ in attn.named_children()} - head_norms == set(projections)
        and {name for name, _ in mlp.named_children()} == {"gate_proj", "up_proj", "down_proj", "act_fn"}
        and activation in (_GELU if gemma else _SILU)
        and not any(getattr(config, name, None) for name in changes)
        and all(_usable(getattr(attn, name)) for name in projections)
        and all(_usable(m) for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    )


def _usable(module: Any) -> bool:
    base = module.base if isinstance(module, LoraLinear) else module
    return isinstance(base, torch.nn.Linear) or hasattr(base, "dequantized")
