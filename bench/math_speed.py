"""Verifications per second of the `math` reward and of math-verify alone, on the same completions in one run.

python bench/math_speed.py [--seconds 2]

Completions of some two hundred words whose answer is right but written differently, wrong, or the text of the
reference. References are numbers, or formulas: radicals, polynomials, tuples, sets, intervals, equations. In the first
lines every reference is used once, so neither gains from what it remembers. In the last, eight completions share a
reference as in a run, two of them exact, two right, four wrong; `math` parses it once.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from math_verify import parse, verify

from strop.rewards.library import LIBRARY
from strop.rewards.symbolic import preload

TEMPLATES = (
    # reference, right but written differently, wrong; a, b and c are different whole numbers
    ("{a}", "{a}.0", "{b}"),
    ("1{a}00", "1{a}00.00", "1{b}00"),
    (r"\frac{{{a}}}{{1000}}", "{a}/1000", r"\frac{{{b}}}{{1000}}"),
    ("-{a}", "-{a}.", "{a}"),
    (r"{a}\sqrt{{3}}", r"\sqrt{{3}} \cdot {a}", r"{b}\sqrt{{3}}"),
    (r"\frac{{{a}\sqrt{{2}}}}{{2}}", r"\frac{{{a}}}{{\sqrt{{2}}}}", r"\frac{{{b}\sqrt{{2}}}}{{2}}"),
    ("x^2+{a}x+{b}", "{b}+{a}x+x^2", "x^2+{a}x-{b}"),
    ("{a}x-{b}y", "-{b}y+{a}x", "{a}x+{b}y"),
    (r"\frac{{\pi}}{{{a}}}", r"\pi/{a}", r"\frac{{\pi}}{{{b}}}"),
    ("({a},{b})", "({a}.0, {b})", "({b},{a})"),
    (r"\{{{a},{b},{c}\}}", r"\{{{c},{b},{a}\}}", r"\{{{a},{b}\}}"),
    (r"(-\infty,{a}]", r"(-\infty, {a}.0]", r"(-\infty,{b}]"),
    ("x={a}y", "{a}y", "{b}y"),
    (r"\frac{{x+{a}}}{{x-{b}}}", "(x+{a})/(x-{b})", r"\frac{{x-{a}}}{{x+{b}}}"),
    ("{a}+{b}i", "{b}i+{a}", "{a}-{b}i"),
)
NUMBERS = 4
"""Templates whose reference is a number; they come first."""
WORDS = "we take the first part and add what is left to it so that both sides agree with the condition above " * 5

Case = tuple[str, str]
"""(completion, reference)."""


def case(template: tuple[str, str, str], column: int, number: int, other: int = 1) -> Case:
    """Return a case with numbers of its own, so that no cache has seen it."""
    values = {"a": number, "b": number + other, "c": number + other + 1}
    answer, gold = template[column].format(**values), template[0].format(a=number, b=number + 1, c=number + 2)
    return rf"<think>{WORDS}</think>{WORDS} The answer is \boxed{{{answer}}}.", gold


def batches(kind: str, column: int) -> Iterator[list[Case]]:
    """Yield batches without end; `column` is 0 for exact, 1 for right, 2 for wrong answers; groups have all three."""
    templates = {"numbers": TEMPLATES[:NUMBERS], "formulas": TEMPLATES[NUMBERS:]}.get(kind, TEMPLATES)
    for number in itertools.count(101, 7):
        if kind == "groups of 8":
            columns = ((0, 1), (0, 1), (1, 1), (1, 1), (2, 2), (2, 3), (2, 4), (2, 5))
            yield [case(template, column, number, other) for template in templates for column, other in columns]
        else:
            yield [case(template, column, number) for template in templates]


def ours(case: Case) -> bool:
    return LIBRARY["math"](completions=[case[0]], answer=[case[1]]) == [1.0]


def theirs(case: Case) -> bool:
    gold = parse(f"${case[1]}$", parsing_timeout=0)
    return bool(verify(gold, parse(case[0], parsing_timeout=0), timeout_seconds=0))


def rate(check: Callable[[Case], bool], kind: str, column: int, seconds: float) -> tuple[float, float]:
    """Return verifications per second of CPU time, and the share that is said to be right."""
    right = count = 0
    spent = 0.0
    for number, batch in enumerate(batches(kind, column)):
        start = time.process_time()
        found = sum(map(check, batch))
        if number:  # the first one warms up
            spent += time.process_time() - start
            count += len(batch)
            right += found
        if spent > seconds:
            break
    return count / spent, right / count


def main(seconds: float) -> None:
    logging.disable(logging.WARNING)
    preload()
    print(f"{'completions':<24}{'math':>12}{'math-verify':>14}{'ratio':>8}   share said to be right")
    lines = [(kind, column) for kind in ("numbers", "formulas") for column in range(3)]
    for kind, column in [*lines, ("groups of 8", 0)]:
        mine, my_right = rate(ours, kind, column, seconds)
        other, other_right = rate(theirs, kind, column, seconds)
        name = kind if kind.startswith("groups") else f"{kind}, {('exact match', 'right', 'wrong')[column]}"
        print(f"{name:<24}{mine:>10,.0f}/s{other:>12,.0f}/s{mine / other:>8.1f}   {my_right:.3f} and {other_right:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=2.0)
    main(parser.parse_args().seconds)
