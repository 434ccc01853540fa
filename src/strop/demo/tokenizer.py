"""The demo model's tokenizer: one token per byte, so that every text, digit and operator survives a round trip.

Ids 0..255 are the byte values themselves. Then come the pad token, the end of a turn (which is also the end of
sequence), one token per chat role, and `<think>` and `</think>`, which are ordinary tokens: decoding with
`skip_special_tokens=True` keeps them. The rest up to `VOCAB_SIZE` is reserved, so that model, tokenizer and an engine
that pads its vocabulary to multiples of 64 all agree on one size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 320
MAX_LENGTH = 512
PAD, END, SYSTEM, USER, ASSISTANT = range(256, 261)
THINK, END_THINK = 261, 262
SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
TAG_TOKENS = ("<think>", "</think>")

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ('system', 'user', 'assistant') -%}"
    "{{- raise_exception('unknown role ' ~ message['role'] ~ '; system, user and assistant are known') -}}"
    "{%- endif -%}"
    "{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def encode_prompt(question: str) -> list[int]:
    """Return the ids of a one-turn conversation up to the assistant's turn, as the chat template gives them."""
    return [USER, *question.encode(), END, ASSISTANT]


def encode_completion(reasoning: str, answer: str) -> list[int]:
    """Return the ids of `<think>reasoning</think>answer` and the end of the turn."""
    return [THINK, *reasoning.encode(), END_THINK, *answer.encode(), END]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer with its chat template, ready for `save_pretrained`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    reserved = [f"<|reserved_{i}|>" for i in range(VOCAB_SIZE - 256 - len(SPECIAL_TOKENS) - len(TAG_TOKENS))]
    core = Tokenizer(models.BPE(vocab={char: byte for byte, char in _byte_alphabet().items()}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS]
        + [AddedToken(text, special=False, normalized=False) for text in TAG_TOKENS]
        + [AddedToken(text, special=True, normalized=False) for text in reserved]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        model_max_length=MAX_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _byte_alphabet() -> dict[int, str]:
    """Return the printable character that the byte-level pre-tokenizer writes for each byte (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(256 + index) for index, byte in enumerate(others)}
