"""The built-in rewards by name: pure functions of the completion and its row, in TRL's signature.

No clock, no random numbers, no state: the same text, token ids and row give the same float in every process. Each takes
lists of any equal length. None means that the reward does not apply to that row. Options are keyword-only arguments,
set with `rewards.options.<name>`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .choice import mcq
from .code import python_tests
from .correctness import exact, gsm8k, numeric
from .countdown import countdown
from .formats import answer_last, script_consistency, single_box, think_format
from .gym import preload_gym, reasoning_gym
from .length import (
    cosine,
    get_cosine_scaled_reward,
    get_soft_overlong_punishment,
    gr3,
    kimi,
    l1_max,
    lead,
    soft_overlong,
    truncation,
)
from .pattern import regex_answer
from .repetition import compression_ratio, get_repetition_penalty_reward, ngram_repetition
from .structured import json_schema, preload_jsonschema
from .symbolic import math_reward, preload, reasoning_accuracy_reward

LIBRARY: Mapping[str, Callable[..., list[float | None]]] = {
    # correctness
    "numeric": numeric,
    "exact": exact,
    "gsm8k": gsm8k,
    "mcq": mcq,
    "math": math_reward,
    "countdown": countdown,
    "regex_answer": regex_answer,
    "json_schema": json_schema,
    "reasoning_gym": reasoning_gym,
    "python_tests": python_tests,
    # format
    "think_format": think_format,
    "single_box": single_box,
    "answer_last": answer_last,
    "script_consistency": script_consistency,
    # length
    "soft_overlong": soft_overlong,
    "gr3": gr3,
    "lead": lead,
    "kimi": kimi,
    "l1_max": l1_max,
    "cosine": cosine,
    "truncation": truncation,
    # repetition
    "ngram_repetition": ngram_repetition,
    "compression_ratio": compression_ratio,
    # TRL's names
    "accuracy_reward": math_reward,
    "reasoning_accuracy_reward": reasoning_accuracy_reward,
    "think_format_reward": think_format,
    "get_repetition_penalty_reward": get_repetition_penalty_reward,
    "get_soft_overlong_punishment": get_soft_overlong_punishment,
    "get_cosine_scaled_reward": get_cosine_scaled_reward,
}
"""Names for `rewards.funcs`."""

PRELOADS: Mapping[str, Callable[[], None]] = {
    "math": preload,
    "accuracy_reward": preload,
    "reasoning_accuracy_reward": preload,
    "json_schema": preload_jsonschema,
    "reasoning_gym": preload_gym,
}
"""What a worker does before it takes work, so that an import's time is in no completion's limit."""
