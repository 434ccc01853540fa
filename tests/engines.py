"""A tiny random model on disk, and real engines on it; an engine is built once per test process."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from strop.engine import vllm_compat
from strop.engine.base import Engine, EngineSettings
from strop.engine.transformers_engine import TransformersEngine
from strop.policy import lora
from strop.policy.load import ModelSource, build_on_meta, load_weights, open_model
from strop.policy.policy import Policy
from strop.weights import SharedWeights, alias_parameters

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PAD = 256


@functools.cache
def tiny_model(kind: str = "qwen3") -> Path:
    """Write a two-layer model with random weights and the demo model's tokenizer; return its folder."""
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, Qwen3Config

    from strop.demo.tokenizer import VOCAB_SIZE, build_tokenizer

    tokenizer = build_tokenizer()
    make = {"llama": LlamaConfig, "qwen3": Qwen3Config}[kind]
    config = make(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=kind == "qwen3",
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():  # distributions that are not flat, so that a wrong token shows
            p.add_(0.1 * torch.randn_like(p))
    folder = Path(tempfile.mkdtemp(prefix=f"strop-{kind}-"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    return folder


@dataclass(slots=True)
class Rig:
    """An engine and a policy on the same weights."""

    source: ModelSource
    engine: Engine
    policy: Policy
    weights: SharedWeights

    def restore(self) -> None:
        """Put the initial values back, so that tests do not see each other's updates."""
        for name, value in self.initial.items():
            self.policy.trainable[name].data.copy_(value)
        self.weights.publish()

    initial: dict[str, torch.Tensor]


def decode(source: ModelSource, ids: Sequence[int]) -> str:
    return source.tokenizer.decode(ids, skip_special_tokens=True)


@functools.cache
def rig(engine: str, *, rank: int = 0, kind: str = "qwen3", temperature: float = 1.0, batched: int = 4096) -> Rig:
    torch.set_num_threads(1)
    source = open_model(str(tiny_model(kind)))
    if engine == "vllm":
        vllm_compat.prepare_environment("cpu", 1)
        from strop.engine.vllm_engine import VllmEngine

        settings = EngineSettings(
            source.path, "float32", max_model_len=320, max_num_seqs=128, max_num_batched_tokens=batched,
            kv_cache_bytes=64 << 20, block_size=32, seed=0, lora_rank=rank, lora_target_modules=TARGETS,
        )  # fmt: skip
        built: Engine = VllmEngine(settings, lambda ids: decode(source, ids), device="cpu")
        model = build_on_meta(source, torch.float32)
        alias_parameters(model, built)
    else:
        model = load_weights(source, torch.float32, torch.device("cpu"))
        built = TransformersEngine(model, lambda ids: decode(source, ids), max_num_seqs=24, pad_token_id=PAD)
    adapters = lora.inject(model, r=rank, alpha=32, target_modules=TARGETS, seed=0) if rank else {}
    policy = Policy(model, temperature, adapters)
    weights = SharedWeights(policy, built)
    return Rig(source, built, policy, weights, {n: p.detach().clone() for n, p in policy.trainable.items()})
