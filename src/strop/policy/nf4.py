"""The trainer's layers on quantised weights: views of the engine's tensors, in the place of transformers' own layers.

    Nf4Linear       y = x W^T + b         W unpacked once forward and once backward, kept in neither
    Int8Embedding, Nf4Embedding   row of W              Int8Head   logits = h W^T

Weights are frozen, so the only gradient is that of the input, dx = dy W, and nothing is saved for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..config import EmbeddingPlace, HeadFormat, ModelConfig
from ..errors import ModelError
from ..quant import int8, products
from ..quant.int8 import Int8
from ..quant.nf4 import Nf4, quantize
from .load import ModelSource, load_weights


class Nf4Linear(torch.nn.Module):
    """A frozen linear layer whose weight is in NF4."""

    packed: torch.Tensor
    absmax: torch.Tensor

    def __init__(self, weight: Nf4, bias: torch.nn.Parameter | None, compute_dtype: torch.dtype) -> None:
        """Hold views of `weight`'s tensors; `bias` [N] may still be on meta."""
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.compute_dtype = compute_dtype
        self.register_buffer("packed", weight.packed, persistent=False)
        self.register_buffer("absmax", weight.absmax, persistent=False)
        self.bias = bias

    @property
    def quantized(self) -> Nf4:
        """The weight as it is stored."""
        return Nf4(self.packed, self.absmax, self.in_features)

    def dequantized(self) -> torch.Tensor:
        """Return the weight [N, K] in the compute dtype, a new tensor at each call."""
        return products.dequantized(self.quantized, self.compute_dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        return _Product.apply(x, self)  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Nf4Linear) -> torch.Tensor:
        ctx.layer = layer
        return products.linear(x, layer.quantized, layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        layer: Nf4Linear = ctx.layer
        return products.input_gradient(grad, layer.quantized), None


class Nf4Embedding(torch.nn.Module):
    """A frozen input embedding in NF4."""

    packed: torch.Tensor
    absmax: torch.Tensor

    def __init__(self, weight: Nf4, compute_dtype: torch.dtype) -> None:
        """Hold views of `weight`'s tensors."""
        super().__init__()
        self.in_features, self.compute_dtype = weight.in_features, compute_dtype
        self.register_buffer("packed", weight.packed, persistent=False)
        self.register_buffer("absmax", weight.absmax, persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] -> [..., H]."""
        return products.embedded(Nf4(self.packed, self.absmax, self.in_features), ids, self.compute_dtype)


class _Int8Rows(torch.nn.Module):
    """Frozen rows in 8 bits."""

    values: torch.Tensor
    scale: torch.Tensor

    def __init__(self, weight: Int8, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("values", weight.values, persistent=False)
        self.register_buffer("scale", weight.scale, persistent=False)
        self.compute_dtype = compute_dtype


class Int8Embedding(_Int8Rows):
    """A frozen input embedding in 8 bits."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] -> [..., H]."""
        return int8.gather(Int8(self.values, self.scale), ids, self.compute_dtype)


class Int8Head(_Int8Rows):
    """A frozen output head in 8 bits."""

    @property
    def weight(self) -> HeadRows:
        """What the chunked log-probabilities multiply with instead of a tensor."""
        return HeadRows(Int8(self.values, self.scale), self.compute_dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., H] -> logits [..., V]; without gradient."""
        return products.linear_int8(hidden.detach(), Int8(self.values, self.scale))


class HeadRows:
    """A quantised head with what code about heads asks a tensor for: shape, dtype, device, and both products."""

    requires_grad = False

    def __init__(self, rows: Int8, dtype: torch.dtype) -> None:
        self.rows, self.dtype = rows, dtype
        self.shape, self.device = rows.values.shape, rows.values.device

    def logits(self, hidden_KH: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write hidden W^T, [K, V], to `out` and return it."""
        return products.linear_int8(hidden_KH, self.rows, out=out)

    def input_gradient(self, grad_KV: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write grad W, [K, H], to `out` and return it."""
        return int8.input_gradient(grad_KV, self.rows, out)


def held_as(source: ModelSource, settings: ModelConfig) -> tuple[HeadFormat, EmbeddingPlace]:
    """Return how (output head, input embedding) are held: of a tied model they are one tensor. `auto`: in 16 bits.

    Raises ModelError for a combination that a tied model cannot have.
    """
    head: HeadFormat = "16bit" if settings.head == "auto" else settings.head
    embedding: EmbeddingPlace = "card" if settings.embedding == "auto" else settings.embedding
    if not source.config.get_text_config().tie_word_embeddings or (head, embedding) == ("16bit", "card"):
        return head, embedding
    if head == "16bit" or embedding in ("host", "nf4"):
        raise ModelError(
            f"model `{source.path}` uses one tensor for embedding and output head; model.embedding {embedding} cannot "
            f"be had with model.head {head}",
            hint="model.head: int8 holds both in 8 bits; model.embedding: card",
        )
    return "int8", "int8"


def load_model(source: ModelSource, settings: ModelConfig, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """Load the model with its own weights for the transformers engine, packed as `settings` ask.

    The 16-bit weights pass through host memory; a layer at a time is packed on the device. Raises ModelError for what
    only vLLM's engine holds.
    """
    packed = {"NF4 checkpoints": source.packed, "model.head int8": settings.head == "int8",
              "model.embedding": settings.embedding not in ("auto", "card")}  # fmt: skip
    refused = [name for name, asked in packed.items() if asked]
    if refused:
        raise ModelError(
            f"{refused[0]} {'are' if refused[0].endswith('s') else 'is'} not there with the transformers engine, nor "
            "in a copy of the trainer's own",
            hint="model.engine: vllm with model.share_weights: require; or a 16-bit checkpoint, model.head 16bit and "
            "model.embedding card",
        )
    if settings.quantization == "none":
        return load_weights(source, dtype, device)
    model: Any = load_weights(source, dtype, torch.device("cpu"))
    head = model.get_output_embeddings()
    for name, plain in list(model.named_modules()):
        if isinstance(plain, torch.nn.Linear) and plain is not head:
            _replace(model, name, Nf4Linear(quantize(plain.weight.detach().to(device)), plain.bias, dtype))
    return model.to(device)  # type: ignore[no-any-return]


def adopt(model: torch.nn.Module, views: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Put layers on the engine's quantised tensors into a model that was built on meta.

    `views` has `NAME.packed` and `NAME.absmax` for NF4, `NAME.values` and `NAME.scale` for 8 bits. Raises ModelError
    for a layer that is of another kind or shape in the model.
    """
    tied = _tied_head(model)
    done: set[str] = set()
    for key in views:
        name, _, leaf = key.rpartition(".")
        if leaf == "packed":
            _replace(model, name, _nf4_layer(model, name, views, dtype))
        elif leaf == "values":
            weight = Int8(views[key], views[f"{name}.scale"])
            names = [name, tied] if tied and _is_embedding(model, name) else [name]
            for each in (n for n in names if n not in done):
                _replace(model, each, _int8_layer(model, each, weight, dtype))
                done.add(each)


def quantised_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return the tensors that hold a model's quantised weights, statistics included."""
    layers = [m for m in model.modules() if isinstance(m, Nf4Linear | Nf4Embedding | Int8Embedding | Int8Head)]
    return [buffer for layer in layers for buffer in layer.buffers(recurse=False)]


def _nf4_layer(
    model: torch.nn.Module, name: str, views: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> torch.nn.Module:
    plain = _module(model, name)
    packed, absmax = views[f"{name}.packed"], views[f"{name}.absmax"]
    # A subclass may scale its rows, as Gemma's does.
    if type(plain) is torch.nn.Embedding and packed.shape[0] == plain.num_embeddings:
        return Nf4Embedding(Nf4(packed, absmax, plain.embedding_dim), dtype)
    if not isinstance(plain, torch.nn.Linear) or packed.shape[0] != plain.out_features:
        raise _mismatch(name, packed, plain)
    return Nf4Linear(Nf4(packed, absmax, plain.in_features), plain.bias, dtype)


def _int8_layer(model: torch.nn.Module, name: str, weight: Int8, dtype: torch.dtype) -> torch.nn.Module:
    plain: Any = _module(model, name)
    # A subclass may scale its rows, as Gemma's does.
    if type(plain) not in (torch.nn.Embedding, torch.nn.Linear) or plain.weight.shape != weight.values.shape:
        raise _mismatch(name, weight.values, plain)
    return Int8Embedding(weight, dtype) if isinstance(plain, torch.nn.Embedding) else Int8Head(weight, dtype)


def _module(model: torch.nn.Module, name: str) -> torch.nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _mismatch(name: str, tensor: torch.Tensor, plain: torch.nn.Module | None) -> ModelError:
    return ModelError(
        f"the engine has `{name}` quantised, {tuple(tensor.shape)}; the trainer has {plain or 'nothing'} there",
        hint="model.quantization none, model.head 16bit and model.embedding card train this model",
    )


def _replace(model: torch.nn.Module, name: str, layer: torch.nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def _tied_head(model: Any) -> str | None:
    """Return the output head's name where it shares the embedding's weight."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not model.config.get_text_config().tie_word_embeddings or head is embedding:
        return None
    return next(name for name, module in model.named_modules() if module is head)


def _is_embedding(model: Any, name: str) -> bool:
    return model.get_submodule(name) is model.get_input_embeddings()
