"""NF4 as a quantisation method of vLLM, through its public registries; the layout is `quant.nf4`'s.

vLLM's own bitsandbytes method left its core at 0.28 and unpacks every weight in every step. This one registers a config
and a loader, which 0.26 and the newest release have. A layer holds one packed tensor for all its parts, q over k
over v, so that the trainer's views are row slices; a part is quantised on the card as it is read, some thousand rows
at a time, or copied where the checkpoint is packed already (bitsandbytes' form).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ..errors import EngineError
from ..quant import int8, nf4, products
from ..quant.bnb import merged

METHOD = "strop_nf4"
_PIECE = 16 << 20
"""Values of a weight that are quantised at a time; some fifty bytes each are needed for it."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_SETTINGS = ("linear", "kept", "head", "embedding", "random", "most")
_QKV = {"q": 0, "k": 1, "v": 2}


def arguments(
    *, linear: bool, kept: Sequence[str], head: str, embedding: str, random: bool, most: int
) -> dict[str, Any]:
    """Return what EngineArgs needs to load a 16-bit or bitsandbytes checkpoint by this method.

    `linear` asks for NF4 in the linear layers except those in `kept`; `head` is `16bit` or `int8`, `embedding` `card`,
    `host`, `int8` or `nf4`; `random` fills in random weights; `most` tokens are decoded at a time.
    """
    settings = {"quant_method": METHOD, "linear": linear, "kept": list(kept), "head": head, "embedding": embedding,
                "random": random, "most": most}  # fmt: skip

    def override(config: Any) -> Any:
        experts = [name for name in _EXPERTS if getattr(config.get_text_config(), name, None)]
        if linear and experts:
            raise ValueError(f"the model is a mixture of experts ({experts[0]}), which NF4 does not cover")
        config.quantization_config = dict(settings)
        return config

    loader = {} if random else {"load_format": METHOD}
    return {"quantization": METHOD, "hf_overrides": override, **loader}


class StropNf4Config(QuantizationConfig):
    """Which layers are quantised, and how."""

    def __init__(
        self, *, linear: bool, kept: Sequence[str], head: str, embedding: str, random: bool, most: int
    ) -> None:
        super().__init__()
        self.linear, self.kept, self.most = linear, frozenset(kept), most
        self.head, self.embedding, self.random = head, embedding, random

    def get_name(self) -> Any:
        """Return the name in vLLM's registry."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes that activations may have."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest card, as vLLM counts them: Turing."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return nothing: the settings come with the model's config."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> StropNf4Config:
        """Build from what `arguments` put into the model's config."""
        return cls(**{key: config[key] for key in _SETTINGS})

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return a layer's method; None leaves it to vLLM."""
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod() if self.skips(prefix) else Nf4LinearMethod(self.random, self.most)
        if isinstance(layer, ParallelLMHead):
            return Int8Rows(self.random) if self.head == "int8" else None
        if isinstance(layer, VocabParallelEmbedding):
            rows = {"int8": lambda: Int8Rows(self.random), "nf4": lambda: Nf4Rows(self.random), "host": HostRows}
            return rows[self.embedding]() if self.embedding in rows else None
        return None

    def skips(self, name: str) -> bool:
        """Whether a layer stays in 16 bit: it or a part of it is named, in full or by its last or any middle name."""
        if not self.linear:
            return True
        parent, _, last = name.rpartition(".")
        parts = self.packed_modules_mapping.get(last, [last])
        return any(_is_named(f"{parent}.{part}", self.kept) for part in parts)


# Not as a decorator: vLLM's returns the base class to a type checker.
register_quantization_config(METHOD)(StropNf4Config)


def _is_named(path: str, names: frozenset[str]) -> bool:
    components = path.split(".")
    prefixes = {".".join(components[: i + 1]) for i in range(len(components))}
    return not names.isdisjoint({*components, *prefixes})


class Nf4LinearMethod(LinearMethodBase):
    """A linear layer, fused or not, with its weight in NF4."""

    def __init__(self, random: bool, most: int) -> None:
        self._random, self._most = random, most

    def create_weights(
        self, layer: torch.nn.Module, input_size_per_partition: int, output_partition_sizes: list[int],
        input_size: int, output_size: int, params_dtype: torch.dtype, **extra_weight_attrs: Any,
    ) -> None:  # fmt: skip
        """Allocate the packed weight."""
        rows = sum(output_partition_sizes)
        if (input_size, output_size) != (input_size_per_partition, rows):
            raise ValueError("NF4 weights are not cut across cards")
        held, packed = _allocated(layer, rows, input_size)
        held.nf4_missing, held.nf4_dtype = rows, params_dtype

        def load(parameter: torch.nn.Parameter, loaded: torch.Tensor, shard: Any = None) -> None:
            start, size = _rows_of(output_partition_sizes, shard)
            _fill(held.nf4.rows(start, start + size), loaded)
            held.nf4_missing -= size

        packed.weight_loader = load  # type: ignore[attr-defined]

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check that every row was read, and compile the kernels. Raises ValueError when rows are missing."""
        held: Any = layer
        if self._random:
            _randomise(held.nf4)
        elif held.nf4_missing:
            raise ValueError(f"{held.nf4_missing} rows of `{held.prefix}` are not in the checkpoint")
        products.prepare(held.nf4, held.nf4_dtype, held.bias, self._most)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x W^T + bias."""
        held: Any = layer
        return products.linear(x, held.nf4, bias)


def _allocated(layer: Any, rows: int, columns: int) -> tuple[Any, torch.nn.Parameter]:
    """Give a layer an NF4 weight of zeros, `layer.nf4`; return the layer and the parameter that vLLM loads into.

    Rows that no checkpoint has, as those that pad a vocabulary, stay zeros.
    """
    groups = nf4.groups_of(columns)
    packed = torch.nn.Parameter(torch.zeros(rows, nf4.BLOCK * groups, dtype=torch.uint8), requires_grad=False)
    layer.register_parameter("weight", packed)
    layer.register_buffer("weight_absmax", torch.zeros(rows, 2 * groups, dtype=torch.float16), persistent=False)
    layer.nf4 = nf4.Nf4(packed.data, layer.weight_absmax, columns)
    return layer, packed


def _randomise(weight: nf4.Nf4) -> None:
    """Fill in codes and scales of no meaning, for measuring without a checkpoint."""
    weight.packed.random_(0, 256)
    weight.absmax.uniform_(0.0, 0.05)


def _rows_of(sizes: Sequence[int], shard: Any) -> tuple[int, int]:
    """Return (first row, rows) of a shard: vLLM names q, k and v, numbers others, gives none or a tuple for many."""
    if shard is None:
        return 0, sum(sizes)
    numbers: Any = shard if isinstance(shard, tuple) else (_QKV.get(shard, shard),)
    return sum(sizes[: numbers[0]]), sum(sizes[i] for i in numbers)


def _fill(target: nf4.Nf4, loaded: torch.Tensor) -> None:
    """Copy a packed shard, or quantise one a few thousand rows at a time."""
    ready: nf4.Nf4 | None = getattr(loaded, "strop_nf4", None)
    shape = (target.out_features, target.in_features)
    given = (ready.out_features, ready.in_features) if ready is not None else tuple(loaded.shape)
    if given != shape:
        raise ValueError(f"a weight of shape {given} was read where {shape} is needed")
    if ready is not None:
        target.packed.copy_(ready.packed)
        target.absmax.copy_(ready.absmax)
        return
    if not loaded.is_floating_point():
        raise ValueError(f"a weight is stored as {loaded.dtype}, 16 or 32 bit floats or NF4 are needed")
    step = max(1, _PIECE // target.in_features)
    for start in range(0, target.out_features, step):
        piece = nf4.quantize(loaded[start : start + step].to(target.packed.device))
        target.packed[start : start + step] = piece.packed
        target.absmax[start : start + step] = piece.absmax


class Int8Rows(QuantizeMethodBase):
    """An output head or input embedding in 8 bits; tied, they are one tensor."""

    def __init__(self, random: bool) -> None:
        self._random = random

    def create_weights(self, layer: torch.nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> None:
        """Allocate values and scales; `weight_args` are vLLM's (columns, [rows], columns, rows)."""
        columns, (rows,) = weight_args[0], weight_args[1]
        values = torch.nn.Parameter(torch.zeros(rows, columns, dtype=torch.int8), requires_grad=False)
        layer.register_parameter("weight", values)
        layer.register_buffer("weight_scale", torch.zeros(rows, dtype=torch.float32), persistent=False)
        held: Any = layer
        held.int8 = int8.Int8(values.data, held.weight_scale)
        self._dtype: torch.dtype = extra_weight_attrs["params_dtype"]

        def load(parameter: torch.nn.Parameter, loaded: torch.Tensor) -> None:
            step = max(1, _PIECE // columns)
            for start in range(0, len(loaded), step):
                piece = int8.quantize(loaded[start : start + step].to(values.device))
                held.int8.values[start : start + len(piece.scale)] = piece.values
                held.int8.scale[start : start + len(piece.scale)] = piece.scale

        values.weight_loader = load  # type: ignore[attr-defined]

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Fill random weights, where they were asked for."""
        held: Any = layer
        if self._random:
            held.int8.values.random_(-127, 128)
            held.int8.scale.fill_(1e-3)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits x W^T."""
        held: Any = layer
        y = products.linear_int8(x, held.int8)
        return y if bias is None else y + bias

    def embedding(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the rows of the token ids `args[0]`."""
        held: Any = layer
        return int8.gather(held.int8, args[0], self._dtype)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """Let a head use the embedding's tensors."""
        source: Any = embed_tokens
        head: Any = layer
        if not hasattr(source, "int8"):
            raise ValueError("the output head is tied to the embedding; both have to be int8, or neither")
        head.weight, head.weight_scale, head.int8 = source.weight, source.weight_scale, source.int8
        return head


class Nf4Rows(QuantizeMethodBase):
    """An input embedding in NF4."""

    def __init__(self, random: bool) -> None:
        self._random = random

    def create_weights(self, layer: torch.nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> None:
        """Allocate codes and scales; `weight_args` are vLLM's (columns, [rows], columns, rows)."""
        columns, (rows,) = weight_args[0], weight_args[1]
        held, packed = _allocated(layer, rows, columns)
        self._dtype: torch.dtype = extra_weight_attrs["params_dtype"]

        def load(parameter: torch.nn.Parameter, loaded: torch.Tensor) -> None:
            _fill(held.nf4.rows(0, len(loaded)), loaded)

        packed.weight_loader = load  # type: ignore[attr-defined]

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Fill random weights, where they were asked for."""
        held: Any = layer
        if self._random:
            _randomise(held.nf4)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Raise ValueError: an output head is held in 8 bits at least."""
        raise ValueError("an input embedding in 4 bits gives no logits")

    def embedding(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the rows of the token ids `args[0]`."""
        held: Any = layer
        return products.embedded(held.nf4, args[0], self._dtype)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """Raise ValueError: a head is held in 8 bits at least."""
        raise ValueError("the output head is tied to the embedding, which cannot be in 4 bits then")


class HostRows(UnquantizedEmbeddingMethod):
    """An input embedding in pinned host memory, read by the card row by row through its own address space."""

    def create_weights(self, layer: torch.nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> None:  # type: ignore[override]
        """Allocate the rows; on a CPU this is an ordinary embedding. Raises EngineError where nothing can be pinned."""
        if torch.empty(0).device.type != "cuda":
            super().create_weights(layer, *weight_args, **extra_weight_attrs)
            return
        from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

        columns, (rows,) = weight_args[0], weight_args[1]
        try:
            # The card's view keeps no reference to it, the layer has to.
            host = torch.zeros(rows, columns, dtype=extra_weight_attrs["params_dtype"], device="cpu", pin_memory=True)
        except RuntimeError as e:
            raise EngineError(
                f"no host memory can be pinned for the input embedding of {rows} rows of {columns}: {e}",
                hint="model.embedding: int8 or nf4 hold it on the card; `strop plan` says whether that fits",
            ) from e
        held: Any = layer
        held.host_rows = host
        held.weight = torch.nn.Parameter(get_accelerator_view_from_cpu_tensor(host), requires_grad=False)

        def load(parameter: torch.nn.Parameter, loaded: torch.Tensor) -> None:
            host[: len(loaded)].copy_(loaded)

        held.weight.weight_loader = load  # type: ignore[attr-defined]

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: Any) -> Any:
        """Raise ValueError: a head in host memory would be read whole for every token."""
        raise ValueError("the output head is tied to the embedding, which cannot lie in host memory then")


@register_model_loader(METHOD)
class Nf4Loader(DefaultModelLoader):
    """vLLM's own loader, with the several tensors of a packed weight joined into one."""

    def __init__(self, load_config: Any) -> None:
        plain = copy.copy(load_config)
        plain.load_format = "auto"
        super().__init__(plain)

    def get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Any:
        """Yield (name, tensor); a packed weight's tensor carries its `Nf4`, or is unpacked where its layer is kept."""
        config: StropNf4Config | None = getattr(model, "quant_config", None)
        mapping: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
        return _ready(super().get_all_weights(model_config, model), _kept_plain(config, mapping), model_config.dtype)


def _kept_plain(config: StropNf4Config | None, mapping: Mapping[str, list[str]]) -> Callable[[str], bool]:
    fused = {part: name for name, parts in mapping.items() for part in parts}

    def is_plain(name: str) -> bool:
        parent, _, last = name.removesuffix(".weight").rpartition(".")
        return config is not None and config.skips(f"{parent}.{fused.get(last, last)}")

    return is_plain


def _ready(
    weights: Iterator[tuple[str, torch.Tensor]], is_plain: Callable[[str], bool], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor, packed in merged(weights):
        if packed is None:
            yield name, tensor
        elif is_plain(name):
            yield name, nf4.dequantize(packed, dtype)
        else:
            tensor.strop_nf4 = packed  # type: ignore[attr-defined]
            yield name, tensor
