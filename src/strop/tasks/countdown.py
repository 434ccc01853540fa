"""Countdown: reach a target with given numbers, each used exactly once."""

from __future__ import annotations

import json
from random import Random

from ..config import TaskConfig
from ..seeding import derive_seed
from .generated import Draw, GeneratedTask
from .render import Renderer


def countdown_task(config: TaskConfig, renderer: Renderer, *, seed: int, eval_size: int) -> GeneratedTask:
    """Return the task at `config.difficulty` d: d + 1 numbers up to 10 d + 9, and a target that can be reached.

    A row holds `numbers` (list of int), `target` (int) and `solution`, one expression that reaches it.
    """
    return GeneratedTask(
        "countdown",
        lambda draw_seed: draw_countdown(draw_seed, config.difficulty),
        ("countdown",),
        config,
        renderer,
        seed=seed,
        eval_size=eval_size,
    )


def draw_countdown(seed: int, difficulty: int) -> Draw:
    """Draw numbers and combine them at random, all steps in positive whole numbers, until the result is a fair target.

    Fair: 10 to 99 (to 999 from difficulty 4), and not one of the numbers.
    """
    largest, highest = 10 * difficulty + 9, 99 if difficulty < 4 else 999
    rng = Random(derive_seed("countdown", difficulty, seed))
    while True:
        numbers = [rng.randint(1, largest) for _ in range(difficulty + 1)]
        target, solution = _combine(rng, numbers)
        if 10 <= target <= highest and target not in numbers:
            break
    listed = ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"
    return Draw(
        key=json.dumps([sorted(numbers), target]),
        question=f"Use each of the numbers {listed} exactly once, with + - * / and parentheses, to reach {target}. "
        "Think first, then give the expression in tags, like this: <answer>(1 + 2) * 3</answer>.",
        row={"numbers": numbers, "target": target, "solution": solution},
    )


def _combine(rng: Random, numbers: list[int]) -> tuple[int, str]:
    """Join two random terms until one is left; return its value and expression."""
    terms = [(value, str(value)) for value in numbers]
    while len(terms) > 1:
        (a, left), (b, right) = (terms.pop(rng.randrange(len(terms))) for _ in range(2))
        options = [(a + b, "+"), (a * b, "*")]
        if a > b:
            options.append((a - b, "-"))
        if b > 1 and a % b == 0:
            options.append((a // b, "/"))
        value, sign = options[rng.randrange(len(options))]
        terms.append((value, f"({left} {sign} {right})"))
    value, expression = terms[0]
    return value, expression[1:-1]
