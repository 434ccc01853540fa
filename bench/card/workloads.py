"""The workloads that contenders run on one card, and the shapes of their models."""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
          "tie_word_embeddings", "vocab_size")  # fmt: skip
_PUBLISHED: dict[str, dict[str, Any]] = runpy.run_path(str(Path(__file__).parent.parent / "shapes.py"))["CONFIGS"]

SHAPES: dict[str, dict[str, Any]] = {
    name.removeprefix("qwen2.5-"): {size: config[size] for size in _SIZES}
    for name, config in _PUBLISHED.items()
    if name.startswith("qwen2.5-")
}
"""Qwen2.5's sizes as arguments of transformers' Qwen2Config, by 0.5b, 1.5b, 3b and 7b."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One race: everyone trains the same model on the same prompts with the same numbers of tokens."""

    id: str
    title: str
    shape: str | None
    """Key of SHAPES for random weights; None: a real model is needed (L1)."""
    num_prompts: int
    num_generations: int
    prompt_tokens: int
    completion_tokens: int
    quantization: str
    """`none` (bf16) or `nf4`; always rank-16 adapters on all seven linears."""
    vram_gib: float
    mean_completion: int | None = None
    """Mean length where lengths vary: the random model then ends a completion with this expectation."""
    smallest: bool = False
    """Strop's settings for the smallest card: int8 head, embedding in host memory (one that is tied to the head: in
    int8 with it), 8-bit optimizer state."""
    peers: bool = True
    """Whether others can be given the same."""


WORKLOADS = {
    w.id: w
    for w in (
        Workload("L1", "GSM8K, a real 0.5B model, bf16 LoRA", None, 16, 8, 400, 400, "none", 24),
        Workload("L1-NF4", "L1 with NF4 QLoRA", None, 16, 8, 400, 400, "nf4", 24),
        Workload("L1-W6", "L1 under W6's settings", None, 16, 8, 400, 400, "nf4", 7.0, smallest=True, peers=False),
        Workload("W1", "1.5B bf16 LoRA", "1.5b", 8, 8, 256, 1024, "none", 24),
        Workload("W2", "7B NF4 QLoRA", "7b", 4, 8, 256, 1024, "nf4", 24),
        Workload("W3", "1.5B NF4 QLoRA, as small as possible", "1.5b", 2, 8, 256, 1024, "nf4", 4.5),
        Workload("W4", "1.5B bf16 LoRA, long shared prompt", "1.5b", 4, 8, 2048, 512, "none", 24),
        Workload("W5", "1.5B bf16 LoRA, mixed lengths", "1.5b", 8, 16, 256, 1024, "none", 24, mean_completion=400),
        Workload("W6", "7B NF4 QLoRA on an 8 GB card", "7b", 2, 8, 256, 1024, "nf4", 7.0, smallest=True),
    )
}
"""W1 to W6 have random weights: speed and memory do not depend on values."""


def linear_parameters(shape: str) -> int:
    """Weights of the linears of all layers and of the output head: what a token is multiplied with."""
    return linear_parameters_of(SHAPES[shape])


def linear_parameters_of(config: Mapping[str, Any]) -> int:
    """The same by a model's config.json. Raises KeyError where it names its sizes otherwise than Qwen and Llama do."""
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    attention = hidden * head_dim * (2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"])
    return layers * (attention + 3 * hidden * inner) + config["vocab_size"] * hidden
