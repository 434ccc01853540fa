"""A model folder of a true shape with random weights, and prompts of an exact number of tokens.

python bench/card/random_model.py 1.5b FOLDER [--mean-completion 400]

The tokenizer has one token per byte, so a prompt of n lower-case letters has n tokens. With `--mean-completion` the
model ends each completion after that many tokens on average: dimension 0 of the residual stream is held constant
(nothing writes to it), and the end token's row of the head reads it.
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path
from typing import Any

from workloads import SHAPES

END, BOS = 151645, 151643
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def make_model(shape: str, folder: Path, *, mean_completion: int | None = None, seed: int = 0) -> None:
    """Write config, tokenizer and bf16 weights; a folder that is complete is left as it is."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save_pretrained(folder)
    config = Qwen2Config(
        max_position_embeddings=32768, rope_theta=1e6, eos_token_id=END, bos_token_id=BOS, pad_token_id=BOS,
        architectures=["Qwen2ForCausalLM"], dtype="bfloat16", **SHAPES[shape],
    )  # fmt: skip
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    if mean_completion is not None:
        _end_after(model, mean_completion)
    model.generation_config.eos_token_id = END
    model.save_pretrained(folder)


def make_tokenizer() -> Any:
    """Return a byte-level tokenizer without merges that fills Qwen2.5's vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for i in range(len(vocab), BOS):
        vocab[f"\u0120w{i}"] = i
    vocab |= {"<|endoftext|>": BOS, "<|im_start|>": BOS + 1, "<|im_end|>": END}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left",
        model_max_length=32768,
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast


def _end_after(model: Any, mean: int) -> None:
    """Give the end token a probability of about 1 / mean everywhere."""
    import torch

    decoder, hidden = model.model, model.config.hidden_size
    with torch.no_grad():
        # Alone in its size, so that the final norm leaves about sqrt(hidden) of it, whatever the layers add.
        decoder.embed_tokens.weight[:, 0] = 8.0
        for layer in decoder.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        head = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
        model.lm_head.weight = head
        head[:, 0] = 0.0
        ids = torch.randint(0, BOS, (4, 256), device=head.device)
        out = decoder(input_ids=ids, use_cache=False).last_hidden_state.float()
        head[END] = 0.0
        others = torch.logsumexp((out[:, -32:].reshape(-1, hidden).to(head.dtype) @ head.t()).float(), dim=-1).mean()
        wanted = float(others) - math.log(mean)
        head[END, 0] = wanted / float(out[..., 0].mean())


def prompts(count: int, tokens: int, seed: int = 0) -> list[str]:
    """Return texts of exactly `tokens` tokens of `make_tokenizer`'s tokenizer."""
    draw = random.Random(seed)
    return ["".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(tokens)) for _ in range(count)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mean-completion", type=int)
    given = parser.parse_args()
    make_model(given.shape, given.folder, mean_completion=given.mean_completion)
