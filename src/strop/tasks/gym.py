"""Data sets of reasoning-gym, from a list of those whose answer can be checked by comparing two texts.

reasoning-gym's own scorers are not used: some run the model's text as code, others pay for any answer. On the list are
the data sets that draw item i from (seed + i) alone, leave the global generators alone, print nothing, and have one
right answer, a whole number or a word, which the question leaves no doubt about.
"""

from __future__ import annotations

import difflib
from typing import Any

from ..config import TaskConfig
from ..errors import ConfigError, DataError
from .generated import Draw, GeneratedTask
from .prompts import BOXED
from .render import Renderer

ALLOWED = (
    "aiw", "base_conversion", "basic_arithmetic", "binary_alternation", "chain_sum", "circuit_logic",
    "color_cube_rotation", "count_bits", "count_primes", "course_schedule", "family_relationships", "figlet_font",
    "game_of_life_halting", "gcd", "isomorphic_strings", "largest_island", "lcm", "leg_counting", "mahjong_puzzle",
    "maze", "needle_haystack", "products", "ransom_note", "rectangle_count", "rotten_oranges", "self_reference",
    "simple_equations", "simple_geometry", "spell_backward", "string_insertion", "string_manipulation", "syllogism",
)  # fmt: skip
"""Vetted with reasoning-gym 0.1.25."""

_NUM_ITEMS = 2**31 - 1


def gym_task(config: TaskConfig, renderer: Renderer, *, seed: int, eval_size: int) -> GeneratedTask:
    """Return the data set `config.path` with reasoning-gym's default settings. A row holds `question` and `answer`.

    Training and held-out problems are told apart by a hash of the question.
    Raises ConfigError for a name off the list, DataError if reasoning-gym is not installed.
    """
    name = config.path
    if name not in ALLOWED:
        near = difflib.get_close_matches(name or "", ALLOWED, n=1)
        given = f"`{name}` is not on the list" if name else "no data set is named"
        raise ConfigError(
            f"task.path: {given} of reasoning-gym data sets whose answers can be checked by comparison"
            + (f"; did you mean `{near[0]}`?" if near else ""),
            hint=f"set task.path to one of: {', '.join(ALLOWED)}",
        )
    items = _items(name)

    def draw(draw_seed: int) -> Draw:
        item = items[draw_seed % _NUM_ITEMS]
        question, answer = item["question"].strip(), item["answer"]
        return Draw(key=question, question=question, row={"question": question, "answer": answer})

    return GeneratedTask(
        f"gym/{name}", draw, ("exact",), config, renderer, seed=seed, eval_size=eval_size, instruction=BOXED
    )


def _items(name: str) -> Any:
    try:
        import reasoning_gym
    except ImportError as e:
        raise DataError(
            f"the task `gym` needs the package reasoning-gym, which cannot be imported: {e}",
            hint="pip install 'strop[gym]'",
        ) from e
    return reasoning_gym.create_dataset(name, seed=0, size=_NUM_ITEMS)
