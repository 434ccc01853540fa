"""Models of true shape and random weights for the benches: speed and memory do not depend on values."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

_QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "max_position_embeddings": 32768, "torch_dtype": "bfloat16", "vocab_size": 151936,
    "tie_word_embeddings": True, "eos_token_id": 151645, "bos_token_id": 151643, "initializer_range": 0.02,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _QWEN | {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "qwen2.5-1.5b": _QWEN | {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "qwen2.5-3b": _QWEN | {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2,
    },
    "qwen2.5-7b": _QWEN | {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "qwen3-4b": _QWEN | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960,
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 5e5, "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "vocab_size": 128256,
        "tie_word_embeddings": False, "eos_token_id": 128009, "bos_token_id": 128000, "initializer_range": 0.02,
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}  # fmt: skip
"""Name -> config.json of the published model, as far as it decides sizes."""

PUBLISHED = {
    "Qwen/Qwen2.5-0.5B-Instruct": "qwen2.5-0.5b", "Qwen/Qwen2.5-1.5B-Instruct": "qwen2.5-1.5b",
    "Qwen/Qwen2.5-3B-Instruct": "qwen2.5-3b", "Qwen/Qwen2.5-7B-Instruct": "qwen2.5-7b", "Qwen/Qwen3-4B": "qwen3-4b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
}  # fmt: skip
"""Hub id -> name in CONFIGS."""

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_config(name: str, folder: Path | None = None) -> Path:
    """Write a model folder with nothing but the config; return it."""
    folder = folder or Path(tempfile.mkdtemp(prefix=f"{name}-"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    return folder


def write_model(name: str, folder: Path) -> Path:
    """Write config, random bf16 weights and a tokenizer with a token per byte; return the folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    content = dict(CONFIGS[name])
    config = AutoConfig.for_model(content.pop("model_type"), **content)
    tokenizer = byte_tokenizer(config.vocab_size, config.eos_token_id, config.bos_token_id)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=config.eos_token_id).save_pretrained(folder)
    return folder


def byte_tokenizer(vocab_size: int, eos: int, bos: int) -> Any:
    """Return a tokenizer without merges whose vocabulary is filled up to the model's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letters[i] if i < len(letters) else f"\u0120w{i}": i for i in range(vocab_size) if i not in (eos, bos)}
    vocab |= {"<|im_end|>": eos, "<|endoftext|>": bos}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return fast


def randomise(engine: Any, seed: int = 0) -> None:
    """Fill an engine's weights in place, so that its distributions are not flat: matrices normal, norms 1, biases 0."""
    import torch

    views = engine.base_views()
    device = next(iter(views.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    for name in sorted(views):
        view = views[name]
        if view.ndim == 1:
            view.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            view.normal_(0.0, 0.05 if "embed" in name or "head" in name else 0.02, generator=generator)


def prompts(count: int, tokens: int, seed: int = 0) -> list[Any]:
    """Return problems with random prompts of `tokens` tokens."""
    import random

    from strop.types import Problem

    draw = random.Random(seed)
    return [Problem(f"p{i}", "question", tuple(draw.randrange(100, 50_000) for _ in range(tokens)))
            for i in range(count)]  # fmt: skip


def card_gib() -> float:
    """Return what is used on the card, all processes together, in GiB."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30
