"""From a prompt (text or messages) to the token ids that the engine is given, through the model's chat template."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError
from ..types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | tuple[Message, ...]

ROLES = ("system", "user", "assistant", "tool")
_OPENING = re.compile(r"<(?:think|thinking|thought|reasoning)>")
_OPENING_AT_END = re.compile(r"<(?:think|thinking|thought|reasoning)>\s*\Z")
_MARK = "\ue000"
"""A private-use character: stands for the content of a message whose place in a rendering is looked for."""
_TEMPLATE_DATE = datetime(2024, 7, 26)
"""The day that a template is told it is, so that a prompt does not depend on when it is rendered. Templates that write
the date (Llama 3, SmolLM3) fall back to this one themselves where there is no clock."""
_RESERVED = ("chat_template", "conversation", "tokenize", "add_generation_prompt", "continue_final_message",
             "return_dict", "return_tensors", "padding", "truncation", "max_length", "messages")  # fmt: skip


class Renderer:
    """Renders prompts for one tokenizer.

    Raises ConfigError for a chat template argument that the template never reads, since it would be ignored.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._kwargs = dict(chat_template_kwargs or {})
        self._check_kwargs()

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be rendered at all."""
        return bool(self._tokenizer.chat_template)

    @cached_property
    def takes_system(self) -> bool:
        """Whether the chat template has a place for a system message (Gemma's refuses it, others drop it)."""
        try:
            text = self._apply(
                ({"role": "system", "content": _MARK}, {"role": "user", "content": "a"}), generation=True
            )
        except DataError:
            return False
        return _MARK in text

    def render(self, prompt: Prompt) -> tuple[tuple[int, ...], str]:
        """Return the token ids of a prompt and its prefill.

        The prefill is what the template wrote after the assistant's header, so that it belongs to the completion:
        `<think>` and a line break (DeepSeek-R1 distills, Qwen3 thinking models), or the closed, empty
        `<think>...</think>` of Qwen3 with `enable_thinking: false`. Thinking is open exactly when the prefill's last
        tag is an opening one. For plain text it is an opening tag at the very end.

        Raises DataError if the messages are malformed or the template refuses them.
        """
        text = self.text(prompt)
        (token_ids,) = self.token_ids([text], plain=isinstance(prompt, str))
        if not token_ids:
            raise DataError("the prompt has no tokens", hint="remove rows with blank prompts")
        return tuple(token_ids), self._prefill(prompt, text)

    def text(self, prompt: Prompt) -> str:
        """Return the text that is tokenised: messages through the chat template, plain text as it is."""
        return prompt if isinstance(prompt, str) else self._apply(check_messages(prompt), generation=True)

    def token_ids(self, texts: Sequence[str], *, plain: bool) -> list[list[int]]:
        """Tokenise rendered texts in one call.

        `plain` texts get what the tokenizer puts in front by itself (a BOS), unless they begin with it already; a
        template has written its own. Nothing is appended: an EOS would end the prompt before the completion.
        """
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        start = self._start_ids if plain else []
        return [ids if ids[: len(start)] == start else start + ids for ids in encoded]

    def fits(self, texts: Sequence[str], limit: int, *, plain: bool) -> list[bool]:
        """Return for each rendered text whether it has at most `limit` tokens.

        A token stands for at least one character of ASCII text, and at most a BOS and a space are put in front of it:
        texts that are short enough by that count are not tokenised, which is most of the work on a large data set.
        """
        verdicts = [text.isascii() and len(text) + 2 <= limit for text in texts]
        unsure = [i for i, verdict in enumerate(verdicts) if not verdict]
        for i, token_ids in zip(unsure, self.token_ids([texts[i] for i in unsure], plain=plain), strict=True):
            verdicts[i] = len(token_ids) <= limit
        return verdicts

    @cached_property
    def _start_ids(self) -> list[int]:
        """What the tokenizer puts before a text when it adds special tokens."""
        bare = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self._tokenizer("a", add_special_tokens=True)["input_ids"]
        starts = [k for k in range(len(full)) if bare and full[k : k + len(bare)] == bare]
        return full[: starts[0]] if starts else []

    def _apply(self, messages: Sequence[Message], *, generation: bool) -> str:
        from jinja2 import TemplateError

        if not self.has_chat_template:
            raise DataError(
                "the prompt is a conversation, and this model's tokenizer has no chat template",
                hint="take an instruct model, or plain text: a text column and task.conversational: false",
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=generation,
                **{"strftime_now": _TEMPLATE_DATE.strftime, **self._kwargs},
            )
        except (TemplateError, TypeError, ValueError) as e:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"the model's chat template refuses a conversation of {roles}: {e}",
                hint="an instruction can stand in task.template instead of task.system_prompt; "
                "see also task.chat_template_kwargs",
            ) from e
        return str(text)

    def _prefill(self, prompt: Prompt, text: str) -> str:
        if isinstance(prompt, str):
            return _opening_at_end(text)
        header_start = _common_prefix(text, self._apply(prompt, generation=False))
        if header_start == len(text):
            return _opening_at_end(text)
        tag = _OPENING.search(text, header_start)
        start = min(tag.start() if tag else len(text), self._header_end(prompt, text, header_start))
        prefill = text[start:]
        return prefill if prefill.strip() else ""

    def _header_end(self, prompt: Sequence[Message], text: str, header_start: int) -> int:
        """Where the assistant's own text begins in `text`, seen from how the template renders a finished turn."""
        try:
            turn = self._apply([*prompt, {"role": "assistant", "content": _MARK}], generation=False)
        except DataError:
            return len(text)
        end = _common_prefix(text, turn)
        # A finished turn may look different from the header on (other channel, empty thoughts): then it tells nothing.
        return end if end >= header_start and turn.startswith(_MARK, end) else len(text)

    def _check_kwargs(self) -> None:
        template = self._tokenizer.chat_template or ""
        source = template if isinstance(template, str) else "\n".join(template.values())
        for name in self._kwargs:
            if name in _RESERVED:
                raise ConfigError(
                    f"task.chat_template_kwargs: `{name}` is set by Strop", hint=f"remove `{name}` from the mapping"
                )
            if re.search(rf"\b{re.escape(name)}\b", source):
                continue
            near = difflib.get_close_matches(name, re.findall(r"[A-Za-z_]\w+", source), n=1)
            raise ConfigError(
                f"task.chat_template_kwargs: the chat template of this model never reads `{name}`",
                hint=f"did you mean `{near[0]}`?" if near else f"remove `{name}`, or take a model that knows it",
            )


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _opening_at_end(text: str) -> str:
    match = _OPENING_AT_END.search(text)
    return match.group() if match else ""


def check_messages(value: Any) -> tuple[Message, ...]:
    """Return messages as plain dicts without the keys whose value is None (tables fill them in).

    Raises DataError naming the message (counted from 1) unless every message has a known role and text as content,
    at least one is from the user, and the last is not from the assistant.
    """
    if not isinstance(value, list | tuple) or not value:
        shown = "an empty list" if value == [] or value == () else f"a {type(value).__name__}"
        raise DataError(f"the prompt is {shown}; text or a list of messages is needed", hint=_MESSAGE_HINT)
    messages = tuple(_check_message(i, message) for i, message in enumerate(value, 1))
    if not any(message["role"] == "user" for message in messages):
        raise DataError("the messages hold no user turn; at least one is needed", hint=_MESSAGE_HINT)
    if messages[-1]["role"] == "assistant":
        raise DataError(
            "the last message is from the assistant; a prompt has to end with what the model answers to",
            hint="leave the reference completion out of the prompt column",
        )
    return messages


_MESSAGE_HINT = 'a conversation looks like [{"role": "user", "content": "2+2?"}]; task.prompt_column names its column'


def _check_message(number: int, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"message {number} is a {type(message).__name__}, not an object", hint=_MESSAGE_HINT)
    kept = {key: text for key, text in message.items() if text is not None}
    if kept.get("role") not in ROLES:
        raise DataError(
            f"message {number} has the role {kept.get('role')!r}; known are {', '.join(ROLES)}", hint=_MESSAGE_HINT
        )
    if "content" not in kept:
        raise DataError(f"message {number} has no content", hint=_MESSAGE_HINT)
    for key, text in kept.items():
        if not isinstance(text, str):
            raise DataError(
                f"message {number}: `{key}` is a {type(text).__name__}; only text is supported", hint=_MESSAGE_HINT
            )
    return kept
