"""The built-in task: short arithmetic problems of several families, generated from (seed, problem number).

`difficulty` is the number of digits of the operands. Whether a problem belongs to training or to the held-out set is
decided by a hash of the problem itself, so the two are disjoint for every seed and any number of steps. The demo model
was pretrained on problems of the training side only.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from ..config import TaskConfig
from ..errors import ConfigError
from ..seeding import derive_seed
from .generated import HELD_OUT_SHARE, Draw, GeneratedTask
from .render import Renderer

_COMMUTING: Mapping[str, int] = {"add": 2, "chain": 2, "max": 3}
"""How many of a family's first numbers may change places without making another problem."""


@dataclass(frozen=True, slots=True)
class Puzzle:
    """One arithmetic problem without any rendering."""

    family: str
    text: str
    numbers: tuple[int, ...]
    answer: str

    @property
    def key(self) -> str:
        """Two puzzles with the same key count as one problem: `47+85=` and `85+47=` do."""
        commuting = _COMMUTING.get(self.family, 0)
        numbers = (*sorted(self.numbers[:commuting]), *self.numbers[commuting:])
        return f"{self.family} {' '.join(map(str, numbers))}"

    @property
    def is_held_out(self) -> bool:
        """Which side of the split the problem is on."""
        return _is_held_out(self.key)


def _is_held_out(key: str) -> bool:
    return derive_seed("arithmetic/split", key) % HELD_OUT_SHARE == 0


class ArithmeticTask(GeneratedTask):
    """Problems of `config.families` (all if empty) at `config.difficulty`; a row holds `answer` and `family`.

    Raises:
        ConfigError: a family is unknown.
    """

    def __init__(self, config: TaskConfig, renderer: Renderer, *, seed: int) -> None:
        families = check_families(config.families)

        def draw(draw_seed: int) -> Draw:
            rng = Random(derive_seed("arithmetic", config.difficulty, draw_seed))
            puzzle = FAMILIES[rng.choice(families)](rng, config.difficulty)
            return Draw(puzzle.key, puzzle.text, {"answer": puzzle.answer, "family": puzzle.family})

        super().__init__("arithmetic", draw, ("exact",), config, renderer, seed=seed, eval_size=config.eval_size)

    def _is_held_out(self, draw: Draw) -> bool:
        return _is_held_out(draw.key)


def _operand(rng: Random, digits: int) -> int:
    low = 10 ** (digits - 1)
    return rng.randint(low, 10 * low - 1)


def _add(rng: Random, digits: int) -> Puzzle:
    a, b = _operand(rng, digits), _operand(rng, digits)
    return Puzzle("add", f"{a}+{b}=", (a, b), str(a + b))


def _sub(rng: Random, digits: int) -> Puzzle:
    a, b = _operand(rng, digits), _operand(rng, digits)
    return Puzzle("sub", f"{a}-{b}=", (a, b), str(a - b))


def _mul(rng: Random, digits: int) -> Puzzle:
    a, k = _operand(rng, digits), rng.randint(2, 9)
    return Puzzle("mul", f"{a}*{k}=", (a, k), str(a * k))


def _mod(rng: Random, digits: int) -> Puzzle:
    a, k = _operand(rng, digits), rng.randint(2, 9)
    return Puzzle("mod", f"{a}%{k}=", (a, k), str(a % k))


def _max(rng: Random, digits: int) -> Puzzle:
    low = 10 ** (digits - 1)
    numbers = tuple(rng.sample(range(low, 10 * low), 3))
    return Puzzle("max", f"max({','.join(map(str, numbers))})=", numbers, str(max(numbers)))


def _chain(rng: Random, digits: int) -> Puzzle:
    a, b, c = (_operand(rng, digits) for _ in range(3))
    return Puzzle("chain", f"{a}+{b}-{c}=", (a, b, c), str(a + b - c))


def _next(rng: Random, digits: int) -> Puzzle:
    """Four terms of an evenly spaced sequence, rising or falling; the fifth is asked for."""
    start = _operand(rng, digits)
    step = rng.randint(2, 9) if digits < 3 else _operand(rng, digits - 1)
    terms = [start + i * step for i in range(5)]
    if rng.random() < 0.5:
        terms.reverse()
    return Puzzle("next", f"{','.join(map(str, terms[:4]))},?", tuple(terms[:4]), str(terms[4]))


FAMILIES: Mapping[str, Callable[[Random, int], Puzzle]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "mod": _mod,
    "max": _max,
    "chain": _chain,
    "next": _next,
}
"""Name of each family and how one of its problems is drawn at a number of digits."""


def check_families(families: Sequence[str]) -> tuple[str, ...]:
    """Return the families in the order given, without repeats; all of them if none is given.

    Raises:
        ConfigError: a name is unknown.
    """
    for name in families:
        if name not in FAMILIES:
            near = difflib.get_close_matches(name, FAMILIES, n=1, cutoff=0.4)
            meant = f", did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"task.families: {name!r} is no family of the arithmetic task{meant}",
                hint=f"task.families takes some of: {', '.join(FAMILIES)}; leave it empty for all",
            )
    return tuple(dict.fromkeys(families)) or tuple(FAMILIES)
