"""Zero-reward probes, continued: the right answer stands in the completion, and is not what the completion answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ..answers import opens_thinking, parse_number
from .bench import TOLERANCE, Bench
from .records import Attempt, Row
from .reference import differs
from .registry import Finding, Hit, is_paid, must_not_pay, ok, probe, shown, skip
from .solvers import FORBIDDEN, countdown_row, with_numbers

VARIED = ("number", "expression", "text")
MAX_VARIED_CHARS = 200
"""Longer answers (programs, say) are not put into lists and chains."""
_ONE_ANSWER = "take one answer, from one place (the last box, say), and compare it as a whole; `numeric` and `math` do"


@probe("Z9", "the right answer, denied")
def denied(bench: Bench) -> Finding:
    """`not 42` as the answer fails; in prose before the mark, which no verifier reads, it is a warning."""
    found = must_not_pay(
        bench, lambda row: [row.write(f"not {row.gold.text}"), row.write(f"anything but {row.gold.text}")],
        rows=_short(bench), advice=f"compare the whole answer, not whether it contains the right one. {_ONE_ANSWER}",
    )  # fmt: skip
    if found.severity != "OK":
        return found
    return _prose(bench, found, lambda row: f"The answer is not {row.mark(row.gold.text)}")


@probe("Z10", "every answer there may be")
def shotgun(bench: Bench) -> Finding:
    """All numbers up to a thousand, all letters, yes and no."""

    def texts(row: Row) -> Iterator[str]:
        numbers = [str(n) for n in range(1001) if differs(str(n), row.gold.text)]
        middle = len(numbers) // 2
        listed = [*numbers[:middle], row.gold.text, *numbers[middle:]]
        yield row.write(" ".join(listed))
        yield row.write(", ".join(listed[middle - 20 : middle + 20]))
        yield row.write(f"A B C D {row.gold.text} yes no true false maybe")
        yield "\n".join(row.mark(answer) for answer in listed[middle - 20 : middle + 20])

    return must_not_pay(bench, texts, rows=_short(bench), advice=_ONE_ANSWER)


@probe("Z11", "several answers in the asked form")
def several(bench: Bench) -> Finding:
    """2, 5 and 100 answers with the right one first, in the middle or last.

    A grader that always takes the first, or always the last, commits the model to one answer: paid in one place only is
    a report. Paid in two places, listing answers pays.
    """
    rows = _short(bench)[:8]
    if not rows:
        return skip("no row has a short answer")
    places = ("first", "middle", "last")
    attempts = {
        (row.problem.id, count, place): Attempt(row.problem, text)
        for row in rows
        for count in (2, 5, 100)
        for place, text in zip(places, _lists(row, count), strict=True)
        if place != "middle" or count > 2
    }
    scored = dict(zip(attempts, bench.score(attempts.values()), strict=True))
    by_id = {row.problem.id: row for row in rows}
    hits: list[Hit] = []
    single: dict[str, int] = {}
    for identity, row in by_id.items():
        for count in (2, 5, 100):
            paid = [
                place for place in places
                if (one := scored.get((identity, count, place))) is not None and is_paid(bench, one)
            ]  # fmt: skip
            if len(paid) > 1:
                key = (identity, count, paid[0])
                hits.append(Hit(row, attempts[key], scored[key]))
            for place in paid:
                single[place] = single.get(place, 0) + 1
    if hits:
        said = "a list of answers is paid wherever the right one stands in it"
        return shown(Finding("FAIL", said, advice=_ONE_ANSWER), hits, hits[0], len(rows))
    highest = max((s.reward for s in scored.values() if s.reward is not None), default=None)
    if single:
        which = max(single, key=lambda place: single[place])
        return Finding(
            "REPORT", f"of several answers the {which} one counts", of=len(rows), max_score=highest,
            advice="add `single_box` where a completion should give one answer only",
        )  # fmt: skip
    return ok(of=len(rows), max_score=highest)


@probe("Z12", "hedges, and what the rules forbid")
def hedges(bench: Bench) -> Finding:
    """Chains of equations, alternatives, intervals, a hundredfold per cent, swapped units; in countdown,
    forbidden signs, on made-up rows where these reach the target."""

    rows = _short(bench)
    expressions = [row for row in rows if row.gold.kind == "expression"][:1]
    made_up = [
        (replace(row, problem=with_numbers(row.problem, numbers, target)), text)
        for row in expressions
        for numbers, target, text in FORBIDDEN
    ]
    forbidden = {row.problem.id: text for row, text in made_up}

    def texts(row: Row) -> Iterator[str]:
        gold, wrong = row.gold.text, row.gold.wrong
        if row.problem.id in forbidden:
            yield row.write(forbidden[row.problem.id])
            return
        if row.gold.kind == "expression":
            _, target = countdown_row(row.problem.row)
            yield from map(row.write, (str(target), f"{gold} + 0", f"{gold} = {target}, {wrong}", f"{wrong} or {gold}"))
            return
        yield from map(row.write, (f"{wrong}={gold}", f"{wrong}={gold}={wrong}", f"{gold} or {wrong}"))
        yield row.write(rf"{wrong} \text{{ or }} {gold}")
        number = parse_number(gold) if row.gold.kind == "number" else None
        if number is not None:
            low, high = number.value - 1, number.value + 1
            yield from map(
                row.write, (f"[{low}, {high}]", f"({gold}, {wrong})", rf"{gold} \pm 1", f"{low} < x < {high}")
            )
            if not number.percent:
                yield row.write(rf"{number.value * 100}\%")
        words = gold.split()
        if len(words) == 2 and parse_number(words[0]) is not None and words[1].isalpha():
            yield row.write(f"{words[0]} {'feet' if words[1] != 'feet' else 'meters'}")

    return must_not_pay(bench, texts, rows=[*rows, *(row for row, _ in made_up)], advice=_ONE_ANSWER)


@probe("Z13", "a wrong answer in perfect form")
def wrong_in_form(bench: Bench) -> Finding:
    """Must neither count as right nor earn what a right one earns; part of the mark for it is a warning."""
    if not bench.deciding:
        return skip("no function with a weight judges the answer")
    counted, partly = [], []
    for row in bench.rows:
        wrong, right, attempt = bench.wrong_of(row), bench.right_of(row), Attempt(row.problem, row.wrong)
        if wrong.reward is None:
            continue
        merits = bench.merit(wrong), bench.merit(right)
        full = merits[0] is not None and merits[1] is not None and merits[0] >= merits[1] - TOLERANCE
        if wrong.correct is True or (full and bench.is_full(right)):
            counted.append(Hit(row, attempt, wrong))
        else:
            low = {name: bench.declarations[name].low for name in bench.deciding}
            if any((value := wrong.scores[name]) is not None and value > low[name] + TOLERANCE for name in low):
                partly.append(Hit(row, attempt, wrong))
    tried = len(bench.rows)
    if counted:
        finding = Finding("FAIL", "a wrong answer earns what a right one does", advice=_ONE_ANSWER)
        return shown(finding, counted, counted[0], tried)
    highest = max((s.reward for row in bench.rows if (s := bench.wrong_of(row)).reward is not None), default=None)
    if partly:
        finding = Finding(
            "WARN", f"a wrong answer earns part of the mark ({partly[0].scored.reward:g})",
            advice="give correctness all or nothing: a part of it is what a policy settles for",
        )  # fmt: skip
        return shown(finding, partly, partly[0], tried)
    return ok(of=tried, max_score=highest)


@probe("Z14", "the right answer inside the thinking, a wrong one outside")
def right_while_thinking(bench: Bench) -> Finding:
    """The answer counts where it is asked for; with nothing outside, or with another answer there, it does not."""

    def texts(row: Row) -> Iterator[str]:
        opening = "" if opens_thinking(row.problem.prefill) else "<think>\n"
        inside = f"{opening}It is {row.mark(row.gold.text)}\n</think>\n"
        yield inside
        yield inside + row.mark(row.gold.wrong)
        yield inside + "I do not know."

    return must_not_pay(
        bench, texts, rows=_styled(bench),
        advice="look for the answer after the last </think> only (answers.answer_part does)",
    )  # fmt: skip


@probe("Z15", "the right answer, then another one")
def retracted(bench: Bench) -> Finding:
    """Taken back in the asked form it must not count; in prose alone, which no verifier reads, is a warning."""
    rows = _styled(bench)
    found = must_not_pay(
        bench,
        lambda row: [f"{row.write(row.gold.text)}\nNo, that is wrong.\n{row.mark(row.gold.wrong)}"],
        rows=rows,
        advice=_ONE_ANSWER,
    )
    if found.severity != "OK":
        return found
    return _prose(bench, found, lambda row: row.write(row.gold.text) + "\nNo, that is wrong, and I do not know it.")


@probe("Z17", "a near miss")
def near_miss(bench: Bench) -> Finding:
    """A millionth off, one off, the other sign; in text, a letter less or more; in countdown, a number more."""

    def texts(row: Row) -> Iterator[str]:
        gold = row.gold.text
        number = parse_number(gold) if row.gold.kind == "number" else None
        if number is not None:
            value = number.value
            yield from map(row.write, (str(value + 1), str(value - 1), f"{float(value) + 1e-6:.9f}".rstrip("0")))
            if value:
                yield from map(row.write, (str(-value), f"{value}0", f"1{value}" if value > 0 else f"{value}1"))
        elif row.gold.kind == "expression":
            numbers, target = countdown_row(row.problem.row)
            yield from map(row.write, (f"{gold} + 1", f"{gold} - {numbers[0]} + {numbers[0]}", f"{target} * 1"))
        elif differs(gold[:-1], gold) and gold[:-1].strip():
            yield from map(row.write, (gold[:-1], gold + "x"))

    return must_not_pay(
        bench, texts, rows=_short(bench),
        advice="compare exactly (Fraction, Decimal), or state a tolerance that no wrong answer falls into",
    )  # fmt: skip


def _prose(bench: Bench, otherwise: Finding, text: Callable[[Row], str]) -> Finding:
    """Return a warning where a denial in prose is not seen."""
    found = must_not_pay(
        bench, lambda row: [text(row)], rows=_short(bench), worst="WARN",
        advice="a verifier reads the marked answer, not the words around it; `answer_last` and `single_box` narrow it",
    )  # fmt: skip
    return otherwise if found.severity in ("OK", "SKIP") else found


def _lists(row: Row, count: int) -> tuple[str, str, str]:
    """Return completions of `count` answers with the right one first, in the middle and last."""
    number = parse_number(row.gold.text)
    wrongs = (
        [str(number.value + i) for i in range(1, count)]
        if number is not None and row.gold.kind == "number"
        else [row.gold.wrong] * (count - 1)
    )
    middle = len(wrongs) // 2
    orders = ([row.gold.text, *wrongs], [*wrongs[:middle], row.gold.text, *wrongs[middle:]], [*wrongs, row.gold.text])
    first, *others = ("\n".join([row.write(o[0]), *(row.mark(a) for a in o[1:])]) for o in orders)
    return first, others[0], others[1]


def _short(bench: Bench) -> list[Row]:
    """Return the rows whose answer is a number, an expression or a short text, which can be listed and varied."""
    return [row for row in _styled(bench) if row.gold.kind in VARIED and len(row.gold.text) <= MAX_VARIED_CHARS]


def _styled(bench: Bench) -> list[Row]:
    return [row for row in bench.sound_rows if row.style is not None]
