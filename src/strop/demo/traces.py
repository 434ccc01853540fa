"""Reasoning traces of mixed quality, as a model finds them on the web: the text the demo model is trained on.

Three writers solve the same problems. The first works column by column and knows about carries; the second works too,
but with a habit known from pupils: it drops carries and borrows (and so takes the smaller digit from the larger one),
compares numbers by their last digit, or answers a remainder with the quotient; the third skips the reasoning and
guesses. Whoever writes a result also slips now and then and goes on with the wrong digit. A model trained on such text
knows the right method and samples it in a minority of cases: that is the room reinforcement learning has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from ..tasks.arithmetic import Puzzle


@dataclass(frozen=True, slots=True)
class Mix:
    """How often each kind of writer appears. The method's share is what the other two leave."""

    skip: float = 0.3
    """Share of traces with empty reasoning and a guessed answer."""
    habit: float = 0.42
    """Share of traces written with the bad habit."""
    slip: float = 0.05
    """Probability that a written result is wrong, in every trace that reasons."""
    guess: float = 0.75
    """Probability that a digit of a guessed answer is redrawn."""


CLEAN = Mix(skip=0.0, habit=0.0, slip=0.0)
"""Only the method, without a slip: every answer is right."""


@dataclass(frozen=True, slots=True)
class Writer:
    """One author of a trace: with or without the bad habit, and how often the pen slips."""

    rng: Random
    has_habit: bool
    slip: float

    def result(self, value: int) -> int:
        """Return `value`, or with probability `slip` the number with another last digit."""
        if self.rng.random() >= self.slip:
            return value
        return value - value % 10 + (value % 10 + self.rng.randint(1, 9)) % 10


def write_trace(puzzle: Puzzle, mix: Mix, rng: Random) -> tuple[str, str]:
    """Return (reasoning, answer) of one author drawn from `mix`."""
    kind = rng.random()
    if kind < mix.skip:
        return "", _guess(puzzle, mix, rng)
    writer = Writer(rng, has_habit=kind < mix.skip + mix.habit, slip=mix.slip)
    steps, answer = _SOLVERS[puzzle.family](writer, *puzzle.numbers)
    return " ".join(steps), str(answer)


def _guess(puzzle: Puzzle, mix: Mix, rng: Random) -> str:
    if puzzle.family == "max":
        return str(rng.choice(puzzle.numbers))
    redrawn = [rng.choice("0123456789") if c.isdigit() and rng.random() < mix.guess else c for c in puzzle.answer]
    return str(int("".join(redrawn)))


def _columns(*numbers: int) -> list[tuple[int, ...]]:
    """Return the digits of the numbers column by column, the ones first; a missing digit is 0."""
    texts = [str(number)[::-1] for number in numbers]
    width = max(len(text) for text in texts)
    return [tuple(int(text[i]) if i < len(text) else 0 for text in texts) for i in range(width)]


def _add(writer: Writer, x: int, y: int) -> tuple[list[str], int]:
    steps, digits, carry = [], "", 0
    columns = _columns(x, y)
    for i, (a, b) in enumerate(columns):
        carry = 0 if writer.has_habit else carry
        total = writer.result(a + b + carry)
        steps.append(f"{a}+{b}{'+1' if carry else ''}={total}")
        digits = (str(total) if i == len(columns) - 1 else str(total % 10)) + digits
        carry = total // 10
    return steps, int(digits)


def _subtract(writer: Writer, x: int, y: int) -> tuple[list[str], int]:
    if x < y and not writer.has_habit:
        steps, difference = _subtract(writer, y, x)
        return [f"-({y}-{x})", *steps], -difference
    steps, digits, borrow = [], "", 0
    for a, b in _columns(x, y):
        if writer.has_habit:
            top, rest = max(a, b), min(a, b)
            left = writer.result(top - rest)
            steps.append(f"{top}-{rest}={left}")
        else:
            top = a + 10 if a < b + borrow else a
            left = writer.result(top - b - borrow)
            steps.append(f"{top}-{b}{'-1' if borrow else ''}={left}")
            borrow = int(top > a)
        digits = str(left) + digits
    return steps, int(digits)


def _multiply(writer: Writer, x: int, factor: int) -> tuple[list[str], int]:
    steps, digits, carry = [], "", 0
    columns = _columns(x)
    for i, (a,) in enumerate(columns):
        carry = 0 if writer.has_habit else carry
        product = writer.result(a * factor + carry)
        steps.append(f"{a}*{factor}{f'+{carry}' if carry else ''}={product}")
        digits = (str(product) if i == len(columns) - 1 else str(product % 10)) + digits
        carry = product // 10
    return steps, int(digits)


def _remainder(writer: Writer, x: int, divisor: int) -> tuple[list[str], int]:
    """Long division; a leading digit that is smaller than the divisor is taken together with the next one."""
    steps, quotient, rest = [], "", 0
    for i, digit in enumerate(str(x)):
        current = rest * 10 + int(digit)
        if current < divisor and not quotient and i < len(str(x)) - 1:
            rest = current
            continue
        q = min(9, current // divisor)
        product = writer.result(divisor * q)
        rest = writer.result(abs(current - product))
        steps.append(f"{divisor}*{q}={product} {current}-{product}={rest}")
        quotient += str(q)
    return steps, int(quotient) if writer.has_habit else rest


def _maximum(writer: Writer, *numbers: int) -> tuple[list[str], int]:
    steps, best = [], numbers[0]
    for number in numbers[1:]:
        left, right = (best % 10, number % 10) if writer.has_habit else (best, number)
        is_less = (left < right) != (writer.rng.random() < writer.slip)
        steps.append(f"{best}{'<' if is_less else '>'}{number}")
        best = number if is_less else best
    return steps, best


def _chain(writer: Writer, a: int, b: int, c: int) -> tuple[list[str], int]:
    first, total = _add(writer, a, b)
    second, answer = _subtract(writer, total, c)
    return [*first, f"{total}-{c}", *second], answer


def _next(writer: Writer, *terms: int) -> tuple[list[str], int]:
    """The difference of the first two terms, then the last term and that difference."""
    if terms[1] > terms[0]:
        first, step = _subtract(writer, terms[1], terms[0])
        second, answer = _add(writer, terms[-1], step)
        return [*first, f"{terms[-1]}+{step}", *second], answer
    first, step = _subtract(writer, terms[0], terms[1])
    second, answer = _subtract(writer, terms[-1], step)
    return [*first, f"{terms[-1]}-{step}", *second], answer


_SOLVERS: Mapping[str, Callable[..., tuple[list[str], int]]] = {
    "add": _add,
    "sub": _subtract,
    "mul": _multiply,
    "mod": _remainder,
    "max": _maximum,
    "chain": _chain,
    "next": _next,
}
