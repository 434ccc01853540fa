"""A decode step through the layers of a Llama-like vLLM model in about half as many kernels as vLLM's modules take.

A step of a small model is bound by the number of its kernels, some four microseconds each. Per layer these are four
products, attention and four kernels that do all that lies between them (`decode_kernels.py`):

    q, k, v product | + adapter, bias, head norms, rotary, into the KV cache | attention | o product |
    + adapter, residual, norm | gate, up product | + adapter, silu | down product | + adapter, residual, the next norm

The modules' own weights, adapters and KV cache are used as they lie, and vLLM's attention as it is. A model is taken
when its modules run code that is known here, by identity of their `forward` functions, so that a model which only looks
alike (scaled residuals, another order) is not. What is known is Llama, Qwen2, Qwen3 and Mistral without windows.

Written against 0.26.
"""

# The types of 0.26, whose attention on a card is another than that of the vLLM that a CPU has:
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import vllm.envs as envs
from vllm.forward_context import get_forward_context
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models import llama, mistral, qwen2, qwen3
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from ..quant import products
from ..quant.nf4 import Nf4
from .decode_kernels import MAX_FUSED_RANK, Product, Rotary, add_norm, add_rope_cache, add_silu_mul
from .vllm_lora import ALIGNED, Factors
from .vllm_nf4 import Nf4LinearMethod

DTYPES = (torch.bfloat16, torch.float16)
HEAD_SIZES = (32, 64, 96, 128, 256)
"""Of attention: those that the kernels are tested with."""

_MODELS = (llama.LlamaForCausalLM, qwen2.Qwen2ForCausalLM, qwen3.Qwen3ForCausalLM)
_DECODERS = (llama.LlamaModel, qwen2.Qwen2Model, mistral.MistralModel)
_LAYERS = (llama.LlamaDecoderLayer, qwen2.Qwen2DecoderLayer, qwen3.Qwen3DecoderLayer, mistral.MistralDecoderLayer)
_ATTENTIONS = (llama.LlamaAttention, qwen2.Qwen2Attention, qwen3.Qwen3Attention, mistral.MistralAttention)
_MLPS = (llama.LlamaMLP, qwen2.Qwen2MLP, mistral.MistralMLP)


class _UnknownError(Exception):
    """The model has something that is not known here; says what."""


@dataclass(frozen=True, slots=True)
class _Linear:
    """A linear layer of vLLM with its adapter."""

    weight: torch.Tensor | Nf4
    """[N, K], or [N + parts * R + padding, K] with A below the weight."""
    outs: int
    """N."""
    bias: torch.Tensor | None
    factors: Factors | None

    def __call__(self, x: torch.Tensor) -> Product:
        """[T, K] -> the product, with bias and adapter still to be added."""
        factors, low = self.factors, None
        if isinstance(self.weight, Nf4):
            y, bias = products.linear(x, self.weight, self.bias), None
        else:
            y, bias = torch.nn.functional.linear(x, self.weight), self.bias
        if factors is not None:
            rank = factors.a.shape[0]
            below = factors.stacked is not None
            low = y[:, self.outs : self.outs + rank] if below else torch.mm(x, factors.a.t())
            if factors.ranks[0] > MAX_FUSED_RANK:
                y[:, : self.outs].addmm_(low, factors.b_t)
                low = None
        return Product(y, low, None if factors is None else factors.b_t, bias)


@dataclass(frozen=True, slots=True)
class _Norm:
    """An RMS norm of vLLM."""

    weight: torch.Tensor
    eps: float

    def __call__(self, product: Product | None, residual: torch.Tensor) -> torch.Tensor:
        """Add a product to `residual` [T, H] in place; return it normalised."""
        return add_norm(product, residual, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class _Layer:
    """A decoder layer of vLLM."""

    qkv: _Linear
    rotary: Rotary
    attention: Any
    output: _Linear
    after: _Norm
    gate_up: _Linear
    width: int
    """Of gate, and of up."""
    down: _Linear

    def __call__(self, x: torch.Tensor, residual: torch.Tensor, positions: torch.Tensor, following: _Norm) -> Any:
        """Add the layer to `residual` in place; return it normalised for what comes next."""
        attention, context = self.attention, get_forward_context()
        name = attention.layer_name
        q = add_rope_cache(
            self.qkv(x), attention.num_heads, self.rotary, positions, context.slot_mapping[name], attention.kv_cache
        )
        out = torch.empty_like(q)
        # Decoding reads keys and values from the cache alone; q stands in for the arguments that it ignores.
        attention.impl.forward(attention, q, q, q, attention.kv_cache, context.attn_metadata[name], output=out)
        x = self.after(self.output(out.view(x.shape[0], -1)), residual)
        return following(self.down(add_silu_mul(self.gate_up(x), self.width)), residual)


class DecodeModel:
    """The decoder of a vLLM model, for steps in which each request has one token. See `build`."""

    def __init__(self, embed: Any, layers: list[_Layer], norms: list[_Norm]) -> None:
        """`norms` are those before each layer and the last one."""
        self._embed, self._layers, self._norms = embed, layers, norms

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the hidden states [T, H] after the last norm, from tokens and positions [T].

        To be called inside vLLM's forward context, whose metadata and slots must be those of a decode step.
        """
        residual = self._embed(input_ids)
        x = self._norms[0](None, residual)
        for layer, following in zip(self._layers, self._norms[1:], strict=True):
            x = layer(x, residual, positions, following)
        return x

    def apart(self, decoder: Any, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return how far our layers are from the modules of vLLM's `decoder` on the same inputs, [layers, T] in fp32.

        Each layer gets what vLLM's modules made of the layers before it, so that rounding does not add up with depth
        and one wrong layer shows. Of a row it is |difference of the residuals, beyond a rounding| / |what the layer
        adds|, or |difference of the next norm's outputs| / |its output| where that is more. Ours run first: what they
        fail to write into the KV cache is not there yet. To be called as `__call__` is.
        """
        eps = torch.finfo(self._norms[0].weight.dtype).eps
        modules = list(decoder.layers)
        found = []
        hidden, residual = self._embed(input_ids), None
        for i, (module, layer) in enumerate(zip(modules, self._layers, strict=True)):
            before = hidden.clone() if residual is None else hidden + residual
            ours, following = before.clone(), self._norms[i + 1]
            ours_normed = layer(self._norms[i](None, ours), ours, positions, following)
            hidden, residual = module(positions, hidden, residual)
            theirs = hidden + residual
            norm = modules[i + 1].input_layernorm if i + 1 < len(modules) else decoder.norm
            theirs_normed = norm(theirs.clone()).float()
            wide = theirs.float()
            beyond = ((ours.float() - wide).abs() - eps * wide.abs()).clamp(min=0.0)
            added = (wide - before.float()).norm(dim=-1).clamp(min=1e-6)
            normed = (ours_normed.float() - theirs_normed).norm(dim=-1) / theirs_normed.norm(dim=-1).clamp(min=1e-6)
            found.append(torch.maximum(beyond.norm(dim=-1) / added, normed))
        return torch.stack(found)


def build(runner: Any) -> DecodeModel | str:
    """Return the model of vLLM's second runner as a DecodeModel, or why it cannot be one.

    To be called when weights, adapters and KV cache are in place.
    """
    try:
        model, dtype = runner.model, runner.dtype
        _expect(not envs.VLLM_BATCH_INVARIANT, "VLLM_BATCH_INVARIANT is set")
        _expect(dtype in DTYPES, f"the model's dtype is {dtype}")
        _runs(model, _MODELS)
        decoder = model.model
        _runs(decoder, _DECODERS)
        embed = decoder.embed_tokens
        # A model may scale them on the way; layers compared one by one would not show it.
        embeds = any(type(decoder).embed_input_ids is c.embed_input_ids for c in _DECODERS)
        _expect(embeds, f"a {type(decoder).__name__} embeds tokens in a way that is not known here")
        _expect(type(embed) is VocabParallelEmbedding and embed.tp_size == 1, "the input embedding is not a plain one")
        layers = list(decoder.layers)
        norms = [_norm(n, dtype) for n in (*(layer.input_layernorm for layer in layers), decoder.norm)]
        return DecodeModel(embed, [_layer(layer, dtype) for layer in layers], norms)
    except _UnknownError as e:
        return str(e)


def _expect(known: bool, otherwise: str) -> None:
    if not known:
        raise _UnknownError(otherwise)


def _runs(module: Any, known: tuple[type, ...]) -> None:
    """Expect that a module's forward function is that of a known class."""
    forward = type(module).forward
    _expect(any(forward is c.forward for c in known), f"a {type(module).__name__} computes what is not known here")


def _layer(layer: Any, dtype: torch.dtype) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    _runs(layer, _LAYERS)
    _runs(attention, _ATTENTIONS)
    _runs(mlp, _MLPS)
    # Mistral's variants.
    _expect(getattr(layer, "ada_rms_norm_t_cond", None) is None, "a layer is conditioned on time")
    _expect(not getattr(attention, "do_llama_4_scaling", False), "queries are scaled by their position")
    _expect(type(mlp.act_fn) is SiluAndMul, f"the activation is {type(mlp.act_fn).__name__}")
    inner = attention.attn
    _check_attention(inner, dtype)
    size, heads, kv_heads = inner.head_size, inner.num_heads, inner.num_kv_heads
    _expect(size in HEAD_SIZES, f"heads have {size} values")
    gate_up = _linear(mlp.gate_up_proj, MergedColumnParallelLinear, 2, dtype)
    return _Layer(
        qkv=_linear(attention.qkv_proj, QKVParallelLinear, 3, dtype, [heads * size, kv_heads * size, kv_heads * size]),
        rotary=_rotary(attention, size, dtype),
        attention=inner,
        output=_linear(attention.o_proj, RowParallelLinear, 1, dtype),
        after=_norm(layer.post_attention_layernorm, dtype),
        gate_up=gate_up,
        width=gate_up.outs // 2,
        down=_linear(mlp.down_proj, RowParallelLinear, 1, dtype),
    )


def _norm(module: Any, dtype: torch.dtype) -> _Norm:
    _expect(type(module) is RMSNorm and module.variance_size_override is None, "a norm is not a plain RMS norm")
    _expect(module.has_weight and module.weight.dtype == dtype, "a norm's weight has another dtype than the model")
    return _Norm(module.weight.data, float(module.variance_epsilon))


def _rotary(attention: Any, size: int, dtype: torch.dtype) -> Rotary:
    module = attention.rotary_emb
    # Kinds of scaling differ in the table alone, unless they have a forward function of their own.
    plain = getattr(type(module), "forward_cuda", None) is RotaryEmbedding.forward_cuda
    _expect(plain and not module.use_flashinfer, f"positions are rotated by a {type(module).__name__}")
    _expect(module.is_neox_style and module.rotary_dim == module.head_size == size, "heads are rotated in part")
    table = module._match_cos_sin_cache_dtype(torch.empty(0, dtype=dtype, device=module.cos_sin_cache.device))
    # Qwen2's attention has an option for head norms, Qwen3's always has them, Llama's never.
    if not getattr(attention, "qk_norm", hasattr(attention, "q_norm")):
        return Rotary(table)
    q, k = _norm(attention.q_norm, dtype), _norm(attention.k_norm, dtype)
    _expect(q.eps == k.eps, "the heads' norms have two epsilons")
    return Rotary(table, q.weight, k.weight, q.eps)


def _check_attention(inner: Any, dtype: torch.dtype) -> None:
    """Expect FlashAttention over all of the past, with keys and values in the model's dtype."""
    impl = inner.impl
    _expect(type(inner) is Attention, f"attention is a {type(inner).__name__}")
    _expect(type(impl) is FlashAttentionImpl, f"attention runs by a {type(impl).__name__}")
    _expect(inner.attn_type == AttentionType.DECODER, f"attention is of type {inner.attn_type}")
    _expect(impl.alibi_slopes is None and not impl.logits_soft_cap and impl.sinks is None, "attention has extras")
    _expect(tuple(impl.sliding_window) == (-1, -1), "attention has a window")
    _expect(impl.dcp_world_size == 1 and inner.kv_sharing_target_layer_name is None, "the KV cache is shared or split")
    _expect(inner.query_quant is None and not inner.calculate_kv_scales, "queries or keys are quantised")
    cache = inner.kv_cache
    _expect(isinstance(cache, torch.Tensor) and cache.ndim == 4 and cache.dtype == dtype, "the KV cache is quantised")
    shape = (inner.num_kv_heads, 2 * inner.head_size)
    _expect((cache.shape[1], cache.shape[3]) == shape and cache.stride(3) == 1, "the KV cache lies in another way")


def _linear(module: Any, kind: type, parts: int, dtype: torch.dtype, sizes: list[int] | None = None) -> _Linear:
    """Return a linear layer of `parts` parts, wrapped for LoRA or not; `sizes` are what their rows must be."""
    wrapped = isinstance(module, BaseLinearLayerWithLoRA)
    base: Any = module.base_layer if wrapped else module
    plain = type(base) is kind and base.tp_size == 1 and not base.skip_bias_add
    _expect(plain, f"a {type(base).__name__} is not plain")
    weight = _weight(base, dtype)
    outs = weight.out_features if isinstance(weight, Nf4) else weight.shape[0]
    _expect(sizes is None or sum(sizes) == outs, "q, k and v have other sizes than attention")
    bias = base.bias
    _expect(bias is None or (bias.dtype == dtype and bias.is_contiguous()), "a bias has another dtype than the model")
    bias = None if bias is None else bias.data
    if not wrapped:
        return _Linear(weight, outs, bias, None)
    factors: Factors | None = getattr(module, "strop_factors", None)
    if factors is None:
        raise _UnknownError("an adapter does not lie in one tensor")
    plain = len(factors.ranks) == parts and len(set(factors.ranks)) == 1 and factors.a.dtype == dtype
    _expect(plain and outs == factors.b_t.shape[1], "an adapter has other parts than its layer")
    _expect(sizes is None or sizes == [b.shape[2] for b in module.lora_b_stacked], "q, k and v have other adapters")
    return _Linear(weight if factors.stacked is None else factors.stacked, outs, bias, factors)


def _weight(base: Any, dtype: torch.dtype) -> torch.Tensor | Nf4:
    method = type(base.quant_method)
    if method is Nf4LinearMethod:
        return base.nf4
    _expect(method is UnquantizedLinearMethod, f"weights are held by a {method.__name__}")
    weight = base.weight.data
    _expect(weight.dtype == dtype, "a weight has another dtype than the model")
    _expect(weight.shape[0] % ALIGNED == 0, f"a layer has {weight.shape[0]} outputs, no multiple of {ALIGNED}")
    return weight
