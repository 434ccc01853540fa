"""A decoder's layers as two differentiable blocks each, for models built like Llama.

    attention block   x + o(attention(rope(norm(q, k)), v))   with q, k, v of rms_norm(x)
    MLP block         x + down(silu(gate) * up)               with gate, up of rms_norm(x)

Each block is one autograd function that saves what it cannot cheaply compute again: its input, q, k, v, the
attention's output and log-sum-exp; its input, gate and up. Norms and the product before `down` are computed again in
backward, where they are needed. That is 2 H + 2 (heads + kv heads) D + 2 I values per token and layer and, with
adapters of rank R, 7 R: about half of what autograd keeps of the plain layers, in a fraction of the kernels.

The blocks run on the modules that transformers built; nothing of transformers is replaced. `fuse` returns None for any
other architecture, which is then trained as transformers wrote it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import attention
from .checkpointing import run_layer
from .kernels import ops_for
from .linears import Grads, Linears, refresh
from .lora import LoraLinear

_MODEL_TYPES = frozenset({"llama", "qwen2", "qwen3", "mistral"})
_SILU = frozenset({"silu", "swish"})


@dataclass(frozen=True, slots=True)
class _Row:
    """What all layers share: rotary factors [T, D] and the layout of the packed row."""

    cos: torch.Tensor
    sin: torch.Tensor
    layout: attention.PackedLayout


class _Attention:
    """The modules of an attention block, and its numbers."""

    def __init__(self, layer: Any) -> None:
        module = layer.self_attn
        self.norm = layer.input_layernorm
        self.qkv = Linears([module.q_proj, module.k_proj, module.v_proj])
        self.output = Linears([module.o_proj])
        self.size = int(module.head_dim)
        self.heads, self.kv_heads, _ = (n // self.size for n in self.qkv.sizes)
        self.head_norms = (module.q_norm, module.k_norm) if hasattr(module, "q_norm") else None
        self.scaling = float(module.scaling)
        # Mistral has its window in the config.
        window = getattr(module, "sliding_window", None)
        self.window = (
            getattr(module.config, "sliding_window", None) if module.config.model_type == "mistral" else window
        )
        norms = [self.norm.weight, *(n.weight for n in self.head_norms or ())]
        self.norm_parameters = [w for w in norms if w.requires_grad]
        self.parameters = [*self.norm_parameters, *self.qkv.parameters, *self.output.parameters]

    def views(self, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, (heads + 2 kv heads) D] -> q, k, v as [T, heads, D]."""
        q, k, v = buffer.view(len(buffer), -1, self.size).split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return q, k, v

    def rotated(self, raw: torch.Tensor, row: _Row) -> tuple[torch.Tensor, torch.Tensor]:
        """Return q and k normalised and rotated: in place, or beside `raw` where the norm's backward needs it."""
        ops = ops_for(raw.device)
        q, k, _ = self.views(raw)
        if self.head_norms is None:
            both = raw.view(len(raw), -1, self.size)[:, : self.heads + self.kv_heads]
            ops.rope(both, both, row.cos, row.sin, inverse=False)
            return q, k
        out = raw.new_empty(len(raw), self.heads + self.kv_heads, self.size)
        new_q, new_k = out[:, : self.heads], out[:, self.heads :]
        for source, target, norm in zip((q, k), (new_q, new_k), self.head_norms, strict=True):
            ops.norm_rope(source, target, row.cos, row.sin, norm.weight.detach(), norm.variance_epsilon)
        return new_q, new_k

    def unrotated(self, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, raw: torch.Tensor, row: _Row) -> Any:
        """Return (gradient of `raw` [T, ...], gradients of trained head norms)."""
        ops = ops_for(raw.device)
        grad = torch.empty_like(raw)
        targets, sources = self.views(grad), self.views(raw)
        targets[2].copy_(dv)
        norm_grads: Grads = []
        for i, d in enumerate((dq, dk)):
            if self.head_norms is None:
                ops.rope(d, targets[i], row.cos, row.sin, inverse=True)
                continue
            norm = self.head_norms[i]
            weight, eps = norm.weight.detach(), norm.variance_epsilon
            if norm.weight.requires_grad:
                straight = torch.empty_like(d)
                ops.rope(d, straight, row.cos, row.sin, inverse=True)
                wide = sources[i].float()
                normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
                norm_grads.append((straight.float() * normed).sum((0, 1)).to(weight.dtype))
            ops.norm_rope_backward(d, sources[i], targets[i], row.cos, row.sin, weight, eps)
        return grad, norm_grads


class _AttentionBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, block: _Attention, row: _Row, *_parameters: torch.Tensor) -> torch.Tensor:
        ops = ops_for(x.device)
        normed, _ = ops.rms_norm(x, block.norm.weight.detach(), block.norm.variance_epsilon)
        raw, low = block.qkv.forward(normed)
        q, k = block.rotated(raw, row)
        v = block.views(raw)[2]
        out, saved = attention.attend(q, k, v, row.layout, block.scaling, block.window)
        y, out_low = block.output.forward(out.reshape(len(x), -1), residual=x)
        # Without head norms q and k are views of `raw`, which is then kept once.
        rotated = () if block.head_norms is None else (q, k)
        ctx.save_for_backward(x, raw, low, out, out_low, *saved, *rotated)
        ctx.block, ctx.row, ctx.num_saved = block, row, len(saved)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        block: _Attention = ctx.block
        row: _Row = ctx.row
        x, raw, low, out, out_low, *rest = ctx.saved_tensors
        saved = tuple(rest[: ctx.num_saved])
        q, k = rest[ctx.num_saved :] if block.head_norms is not None else block.views(raw)[:2]
        v = block.views(raw)[2]
        grad = grad.contiguous()
        dout, out_grads = block.output.backward(grad, out.reshape(len(x), -1), out_low)
        assert dout is not None
        dq, dk, dv = attention.attend_backward(
            dout.view(out.shape), q, k, v, out, saved, row.layout, block.scaling, block.window
        )
        del dout
        draw, norm_grads = block.unrotated(dq, dk, dv, raw, row)
        del dq, dk, dv
        dx, qkv_grads, outer = _through_norm(ctx, block.norm, block.qkv, draw, x, low, grad)
        return (dx, None, None, *outer, *norm_grads, *qkv_grads, *out_grads)


class _Mlp:
    """The modules of an MLP block."""

    def __init__(self, layer: Any) -> None:
        self.norm = layer.post_attention_layernorm
        self.gate_up = Linears([layer.mlp.gate_proj, layer.mlp.up_proj])
        self.down = Linears([layer.mlp.down_proj])
        norms = [self.norm.weight] if self.norm.weight.requires_grad else []
        self.parameters = [*norms, *self.gate_up.parameters, *self.down.parameters]


class _MlpBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, block: _Mlp, *_parameters: torch.Tensor) -> torch.Tensor:
        ops = ops_for(x.device)
        normed, _ = ops.rms_norm(x, block.norm.weight.detach(), block.norm.variance_epsilon)
        # The adapters' part of gate and up is added where they are read, twice, and never written.
        b = block.gate_up.pair()
        gate_up, low = block.gate_up.forward(normed, add_adapters=b is None)
        product = ops.swiglu(gate_up) if b is None else ops.swiglu(gate_up, low, b)
        y, down_low = block.down.forward(product, residual=x)
        ctx.save_for_backward(x, gate_up, low, down_low)
        ctx.block = block
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        block: _Mlp = ctx.block
        x, gate_up, low, down_low = ctx.saved_tensors
        grad = grad.contiguous()
        grad_low = block.down.low_gradient(grad, down_low)
        a, b = block.down.single(), block.gate_up.pair()
        product = block.down.input_gradient(grad, grad_low if a is None else None)
        # Both buffers are used up here: gate_up becomes its gradient, the gradient of the product the product.
        ops_for(x.device).swiglu_backward_(
            gate_up, product, low if b is not None else None, b, grad_low if a is not None else None, a
        )
        down_grads = block.down.parameter_gradients(grad, product, down_low, grad_low)
        del product
        dx, gate_up_grads, outer = _through_norm(ctx, block.norm, block.gate_up, gate_up, x, low, grad)
        return (dx, None, *outer, *gate_up_grads, *down_grads)


def _through_norm(
    ctx: Any, norm: Any, linears: Linears, grad: torch.Tensor, x: torch.Tensor, low: torch.Tensor | None,
    residual: torch.Tensor,
) -> tuple[torch.Tensor | None, Grads, Grads]:  # fmt: skip
    """Go back through linear layers and the norm before them: (gradient of x, of the layers, of the norm's weight)."""
    ops = ops_for(x.device)
    weight = norm.weight.detach()
    normed, rstd = ops.rms_norm(x, weight, norm.variance_epsilon)
    trained = norm.weight.requires_grad
    dnormed, grads = linears.backward(grad, normed, low, need_input=ctx.needs_input_grad[0] or trained)
    if dnormed is None:  # the first layer of a frozen base: nothing before it learns
        return None, grads, []
    outer: Grads = [(dnormed.float() * (x.float() * rstd[:, None])).sum(0).to(weight.dtype)] if trained else []
    if not ctx.needs_input_grad[0]:
        return None, grads, outer
    return ops.rms_norm_backward(dnormed, x, rstd, weight, residual), grads, outer


class _NormBlock(torch.autograd.Function):
    """The norm before the output head; saves its input alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return ops_for(x.device).rms_norm(x, weight.detach(), eps)[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        ops = ops_for(x.device)
        _, rstd = ops.rms_norm(x, weight.detach(), ctx.eps)
        trained = ctx.needs_input_grad[1]
        dweight = (grad.float() * (x.float() * rstd[:, None])).sum(0).to(weight.dtype) if trained else None
        return ops.rms_norm_backward(grad, x, rstd, weight.detach(), None), dweight, None


class FusedDecoder:
    """Runs a decoder's own modules through the blocks; see `fuse`."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._layers = [(_Attention(layer), _Mlp(layer)) for layer in decoder.layers]
        self._linears = [g for a, m in self._layers for g in (a.qkv, a.output, m.gate_up, m.down)]

    def forward(
        self, token_ids_T: torch.Tensor, position_ids_T: torch.Tensor, layout: attention.PackedLayout, checkpointed: int
    ) -> torch.Tensor:
        """Return the hidden states [T, H] before the last norm; the first `checkpointed` layers keep their input."""
        x = self._decoder.embed_tokens(token_ids_T)
        cos, sin = self._decoder.rotary_emb(x[None], position_ids_T[None])
        row = _Row(cos[0], sin[0], layout)
        refresh(self._linears, x.dtype)
        for i, (attend, mlp) in enumerate(self._layers):
            x = run_layer(_layer, x, attend, mlp, row, checkpoint=i < checkpointed)
        return x

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the norm before the output head to [rows, H]."""
        norm = self._decoder.norm
        return _NormBlock.apply(hidden, norm.weight, norm.variance_epsilon)  # type: ignore[no-any-return]


def _layer(x: torch.Tensor, attend: _Attention, mlp: _Mlp, row: _Row) -> torch.Tensor:
    x = _AttentionBlock.apply(x, attend, row, *attend.parameters)  # type: ignore[assignment]
    return _MlpBlock.apply(x, mlp, *mlp.parameters)  # type: ignore[no-any-return]


def fuse(model: Any) -> FusedDecoder | None:
    """Return the fused form of a Llama, Qwen2, Qwen3 or Mistral model, None for any other.

    To be called when adapters are in place and it is settled what is trained.
    """
    decoder = model.get_decoder()
    if getattr(model.config, "model_type", None) not in _MODEL_TYPES or not all(map(_fits, decoder.layers)):
        return None
    return FusedDecoder(decoder)


def _fits(layer: Any) -> bool:
    """Whether a layer holds the modules that the blocks know, and no others that compute."""
    attn, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    names = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    if attn is None or mlp is None or {name for name, _ in layer.named_children()} != names:
        return False
    parts = {"q_proj", "k_proj", "v_proj", "o_proj"}
    children = {name for name, _ in attn.named_children()}
    activation = getattr(getattr(mlp, "config", None), "hidden_act", None)
    return (
        children in (parts, parts | {"q_norm", "k_norm"})
        and {name for name, _ in mlp.named_children()} == {"gate_proj", "up_proj", "down_proj", "act_fn"}
        and activation in _SILU
        and all(
            _usable(m) for m in (*(getattr(attn, p) for p in sorted(parts)), mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )
    )


def _usable(module: Any) -> bool:
    base = module.base if isinstance(module, LoraLinear) else module
    return isinstance(base, torch.nn.Linear) or hasattr(base, "dequantized")
