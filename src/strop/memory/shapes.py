"""What a model costs, from its config alone: parameters, keys and values per token, activations per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Read a transformers config of a Llama-like decoder."""
        heads = config.num_attention_heads
        return cls(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab_size=config.vocab_size,
            tied_embeddings=bool(config.tie_word_embeddings),
            max_positions=config.max_position_embeddings,
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

    def activation_bytes_per_token(self, dtype: str) -> int:
        """Tensors that autograd keeps per token without checkpointing.

        Per layer about: 2 norms in and out (4 H), q k v and the attention's output (4 H), gate, up, their product
        and the activation (4 I), the residual sums (2 H).
        """
        per_layer = 10 * self.hidden_size + 4 * self.intermediate_size
        return self.num_layers * per_layer * BYTES[dtype]
