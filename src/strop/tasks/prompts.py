"""How a question becomes a prompt: bare text, or system and user messages."""

from __future__ import annotations

from ..config import TaskConfig
from ..errors import ConfigError
from ..types import Message
from .render import Prompt, Renderer

BOXED = r"Reason step by step, then put the final answer in \boxed{}."
"""Default instruction of tasks whose answer is short and exact."""


def compose(question: str, config: TaskConfig, renderer: Renderer, instruction: str | None = None) -> Prompt:
    """Return the prompt for a question in text form.

    It is a conversation when `task.conversational` is on and the model has a chat template. `task.system_prompt` comes
    first in it. `instruction`, a task's own default, stands in for it as long as the user gave neither a system prompt
    nor a template, and joins the question where the model has no place for a system message.

    Raises ConfigError if a system prompt is set and the prompt cannot be a conversation with one.
    """
    chat = config.conversational and renderer.has_chat_template
    if config.system_prompt:
        if not config.conversational:
            raise _no_place("task.conversational is false")
        return (system_message(config.system_prompt, renderer), *_messages(question))
    if instruction and config.template is None and config.system_prompt is None:
        if not chat:
            return f"{question}\n{instruction}\n"
        if renderer.takes_system:
            return (system_message(instruction, renderer), *_messages(question))
        return _messages(f"{question}\n\n{instruction}")
    return _messages(question) if chat else question


def system_message(text: str, renderer: Renderer) -> Message:
    """Return `task.system_prompt` as a message. Raises ConfigError if the model has no place for one."""
    if not renderer.has_chat_template:
        raise _no_place("this model's tokenizer has no chat template")
    if not renderer.takes_system:
        raise _no_place("this model's chat template has no place for a system message")
    return {"role": "system", "content": text}


def _no_place(reason: str) -> ConfigError:
    return ConfigError(
        f"task.system_prompt is set, but {reason}",
        hint="put its text into task.template, e.g. `{question} Answer with a number.`, and remove task.system_prompt",
    )


def _messages(question: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": question},)
