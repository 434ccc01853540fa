"""What a model costs, from its config alone: parameters, keys and values per token, activations per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ModelError
from ..types import allowed_rank

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FUSED_MODELS = frozenset({"llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3_text"})
"""Model types that the policy trains as fused blocks on a card (policy/fused.py)."""
PLAIN_TYPES = ", ".join(sorted(FUSED_MODELS))


def _dimension(config: Any, name: str, otherwise: int | None = None) -> int:
    """Return a config's number; `otherwise` where it has none. Raises ModelError."""
    try:
        value = getattr(config, name, None)
    except Exception as e:  # a dimension that differs between layers raises an error of the config's own
        value = type(e).__name__
    value = otherwise if value is None else value
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    found = f"no `{name}`" if value is None else f"`{name}` {value!r}"[:100]
    raise ModelError(
        f"the config of a model of type `{config.model_type}` has {found}; the memory plan needs one positive number "
        "for all layers",
        hint=f"model.path: choose a text decoder built like Llama, such as one of type {PLAIN_TYPES}",
    )


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The dimensions that byte formulas need."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    max_positions: int
    fused: bool = True
    """Whether the policy runs its layers as fused blocks on a card."""
    head_norms: bool = False
    """Whether q and k are normalised per head, as in Qwen3 and Gemma 3."""
    scaled_embedding: bool = False
    """Whether the embedding multiplies its rows, as Gemma's does; such a one is held in 16 bits only."""

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Read a transformers config of a Llama-like decoder.

        Raises ModelError naming a dimension that the config does not have, or has as something else than one number.
        """
        heads = _dimension(config, "num_attention_heads")
        hidden = _dimension(config, "hidden_size")
        return cls(
            num_layers=_dimension(config, "num_hidden_layers"),
            hidden_size=hidden,
            intermediate_size=_dimension(config, "intermediate_size"),
            num_heads=heads,
            num_kv_heads=_dimension(config, "num_key_value_heads", heads),
            head_dim=_dimension(config, "head_dim", hidden // heads),
            vocab_size=_dimension(config, "vocab_size"),
            tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
            max_positions=_dimension(config, "max_position_embeddings"),
            fused=config.model_type in FUSED_MODELS,
            head_norms=config.model_type in ("qwen3", "gemma3_text"),
            scaled_embedding=config.model_type.startswith("gemma"),
        )

    @property
    def linear_parameters(self) -> int:
        """Weights of the layers' linears: q, k, v, o, gate, up, down."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def num_parameters(self) -> int:
        """All weights; norms and biases, well under 0.1 %, are left out."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.linear_parameters + embeddings

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * BYTES[dtype]

    def lora_parameters(self, rank: int) -> int:
        """Adapter weights with all seven linears adapted."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        pairs = [(self.hidden_size, q), (self.hidden_size, kv), (self.hidden_size, kv), (q, self.hidden_size)]
        pairs += [(self.hidden_size, self.intermediate_size)] * 2 + [(self.intermediate_size, self.hidden_size)]
        return self.num_layers * rank * sum(i + o for i, o in pairs)

    def engine_lora_values(self, rank: int) -> int:
        """Values of the engine's adapter as it is multiplied (engine/vllm_lora.py), at the rank that vLLM allows.

        A of all parts of a fused layer stacked, and B block-diagonal over them: q, k, v; o; gate, up; down.
        """
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        fused = ((hidden, 3, q + 2 * kv), (q, 1, hidden), (hidden, 2, 2 * inner), (inner, 1, hidden))
        return self.num_layers * allowed_rank(rank) * sum(parts * (ins + outs) for ins, parts, outs in fused)

    def weight_bytes(self, dtype: str, quantization: str = "none", head: str = "16bit", embedding: str = "card") -> int:
        """All weights as they lie on the device, by the settings of section `model`.

        NF4 (quant/nf4.py) takes 4 bits and an fp16 scale per block of 64 inputs, rows padded to 128 inputs. A matrix of
        the vocabulary in 8 bits takes a byte a value and an fp32 scale a row. A tied embedding is the head.
        """
        linears = self.linear_parameters * BYTES[dtype]
        if quantization == "nf4":
            linears = self.linear_parameters * 17 // 32
        nf4 = self.vocab_size * self.hidden_size * 17 // 32
        plain, int8 = self.vocab_size * self.hidden_size * BYTES[dtype], self.vocab_size * (self.hidden_size + 4)
        heads = int8 if head == "int8" else plain
        if self.tied_embeddings:
            return linears + heads
        return linears + heads + {"card": plain, "int8": int8, "nf4": nf4, "host": 0}[embedding]

    def layer_bytes_kept(self, dtype: str, *, fused: bool = False, lora_rank: int = 0) -> int:
        """What a layer keeps per token for backward.

        Fused blocks (policy/fused.py): two inputs, q k v, the attention's output, gate and up, with head norms q and k
        twice: 2 H + 2 (heads + kv heads) D + 2 I; the adapters' low-rank inputs (7 R); the attention's log-sum-exp in
        fp32. Plain autograd about: 2 norms in and out (4 H), q k v and the attention's output (4 H), gate, up, their
        product and the activation (4 I), the residual sums (2 H).
        """
        if not fused:
            return (10 * self.hidden_size + 4 * self.intermediate_size) * BYTES[dtype]
        heads = (self.num_heads + self.num_kv_heads) * self.head_dim
        values = 2 * (self.hidden_size + heads + self.intermediate_size) + 7 * lora_rank
        return (values + (heads if self.head_norms else 0)) * BYTES[dtype] + 4 * self.num_heads

    def activation_bytes_per_token(
        self, dtype: str, *, checkpointed: int = 0, fused: bool = False, lora_rank: int = 0
    ) -> int:
        """What is kept per token for backward when the first `checkpointed` layers keep their input alone."""
        kept = self.layer_bytes_kept(dtype, fused=fused, lora_rank=lora_rank)
        return checkpointed * self.hidden_size * BYTES[dtype] + (self.num_layers - checkpointed) * kept

    def layer_bytes_per_token(self, dtype: str, *, fused: bool = False, lora_rank: int = 0) -> int:
        """What one layer needs per token while its backward runs: what it keeps, computed again, and its gradients.

        Gradients: the normed input, its and the residual's gradient (3 H), the MLP's product (I), and of the attention
        (3 heads + 4 kv heads) D; plain autograd holds gate, up and their product as well (3 I).
        """
        attention = (3 * self.num_heads + 4 * self.num_kv_heads) * self.head_dim
        gradients = 3 * self.hidden_size + (1 if fused else 3) * self.intermediate_size + attention
        return self.layer_bytes_kept(dtype, fused=fused, lora_rank=lora_rank) + gradients * BYTES[dtype]
