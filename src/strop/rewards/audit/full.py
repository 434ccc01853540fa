"""Full-reward probes: what is right must earn the maximum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ...types import ScoredRollout
from ..answers import parse_number
from .bench import Bench
from .records import Attempt, Row
from .registry import Finding, Hit, ok, probe, shown, skip

MAX_LISTED = 6


@probe("P1", "the right answer in the asked form")
def right(bench: Bench) -> Finding:
    """Every form that was tried is named where none reaches the maximum."""
    hits = [
        Hit(row, Attempt(row.problem, row.right), bench.right_of(row))
        for row in bench.rows
        if bench.right_of(row).correct is not True and not bench.is_full(bench.right_of(row))
    ]
    highest = max((s.reward for row in bench.rows if (s := bench.right_of(row)).reward is not None), default=None)
    if not hits:
        return ok(_form(bench), of=len(bench.rows), max_score=highest)
    unscored = [hit for hit in hits if hit.scored.reward is None]
    if len(unscored) == len(hits):
        best = hits[0]
        why = "; ".join(best.scored.failures.values()) or "no function with a weight applies to the row"
        said = f"the right answer {best.row.gold.text[:60]!r} is unscored: {why}"
        advice = "mend the function for such rows, or the column that it reads"
    else:
        best = next(hit for hit in hits if hit.scored.reward is not None)
        said = f"no rendering of the reference answer {best.row.gold.text[:60]!r} reaches the maximum; "
        said += f"tried: {bench.forms_tried}"
        advice = "check the reference answer and what the function takes for an answer; --gold names another column"
    judged = bench.names_of("correctness")
    severity = "FAIL" if judged or not bench.sound_rows else "WARN"
    return shown(Finding(severity, said, advice=advice, max_score=highest), hits, best, len(bench.rows))


@probe("P2", "harmless variants of the right answer")
def variants(bench: Bench) -> Finding:
    """Refused white space fails; other refused spellings are a warning: they lose signal and cannot be exploited."""
    tried: list[tuple[str, Row, Attempt]] = []
    for row in bench.sound_rows:
        tried += [(name, row, Attempt(row.problem, text)) for name, text in spellings(row)]
    if not tried:
        return skip("no row whose right answer is paid")
    scored = bench.score(attempt for _, _, attempt in tried)
    refused = [
        (name, Hit(row, attempt, one))
        for (name, row, attempt), one in zip(tried, scored, strict=True)
        if not still_right(bench, row, one)
    ]
    highest = max((one.reward for one in scored if one.reward is not None), default=None)
    kinds = len({name for name, _, _ in tried})
    if not refused:
        return ok(f"{kinds} variants", of=len(bench.sound_rows), max_score=highest)
    counts = Counter(name for name, _ in refused)
    basic = [(name, hit) for name, hit in refused if name in BASIC]
    listed = ", ".join(f"{name} ({count})" for name, count in counts.most_common(MAX_LISTED))
    if len(counts) > MAX_LISTED:
        listed += f" and {len(counts) - MAX_LISTED} more"
    finding = Finding(
        "FAIL" if basic else "WARN", f"{len(counts)} of {kinds} variants are refused: {listed}", max_score=highest,
        advice="normalise before comparing; `numeric` and `math` read these spellings where the answer is a number",
    )  # fmt: skip
    return shown(finding, [hit for _, hit in refused], (basic or refused)[0][1], len(bench.sound_rows))


BASIC = ("line break at the end", "spaces around the completion")
"""Variants that no verifier has a reason to refuse."""


def spellings(row: Row) -> Iterator[tuple[str, str]]:
    """Yield harmless variants of a row's right completion: (name, completion)."""
    yield from _around(row)
    gold = row.gold.text
    if row.style is None or row.gold.kind not in ("number", "text", "expression") or "\n" in gold:
        return
    if row.gold.kind == "expression":
        yield "no spaces", row.write(gold.replace(" ", ""))
        yield "wide spaces", row.write(gold.replace(" ", "  "))
        yield "signs of print", row.write(gold.replace("*", "\u00d7").replace("/", "\u00f7").replace("-", "\u2212"))
        yield "parentheses around all", row.write(f"({gold})")
        return
    yield "spaces around the answer", row.write(f" {gold} ")
    yield "dot after the answer", row.write(f"{gold}.")
    yield "dollar signs around the answer", row.write(f"${gold}$")
    number = parse_number(gold) if row.gold.kind == "number" else None
    if number is None:
        if gold.replace(" ", "").isalpha():
            yield "text command", row.write(rf"\text{{{gold}}}")
        return
    value = number.value
    sign = "-" if value < 0 else ""
    if not number.percent:
        yield "full-width digits", row.write(gold.translate({ord("0") + i: 0xFF10 + i for i in range(10)}))
        yield "thin space of LaTeX", row.write(rf"\,{gold}")
        yield "bold", row.write(rf"\mathbf{{{gold}}}")
        yield "name before the answer", row.write(f"x = {gold}")
    if value.denominator == 1 and gold.lstrip("+-").isdigit():
        yield "decimal point and zero", row.write(f"{gold}.0")
        yield "two decimals of zero", row.write(f"{gold}.00")
        yield "plus sign" if value > 0 else "sign of print", row.write(f"+{gold}" if value > 0 else f"\u2212{gold[1:]}")
        if abs(value) >= 1000:
            yield "commas between thousands", row.write(f"{sign}{abs(int(value)):,}")
            yield "LaTeX commas between thousands", row.write(f"{sign}{abs(int(value)):,}".replace(",", "{,}"))
            yield "spaces between thousands", row.write(f"{sign}{abs(int(value)):,}".replace(",", " "))
    elif value.denominator != 1 and "/" not in gold and "\\" not in gold:
        yield "zero at the end", row.write(f"{gold}0")
    if value.denominator != 1 and ("/" in gold or "frac" in gold) and not number.percent:
        top, bottom = abs(value.numerator), value.denominator
        yield "slash fraction", row.write(f"{sign}{top}/{bottom}")
        yield "LaTeX fraction", row.write(rf"{sign}\frac{{{top}}}{{{bottom}}}")
        yield "display fraction", row.write(rf"{sign}\dfrac{{{top}}}{{{bottom}}}")


def _around(row: Row) -> Iterator[tuple[str, str]]:
    yield "line break at the end", f"{row.right}\n"
    yield "spaces around the completion", f"{'' if row.problem.prefill else ' '}{row.right}  \n\n"
    yield "Windows line breaks", row.right.replace("\n", "\r\n")


def still_right(bench: Bench, row: Row, scored: ScoredRollout) -> bool:
    """Whether a variant is as right as the original; what it earns for its form is not compared.

    Where the original does not count as right, since nothing says what is, the variant has to earn more than halfway
    from the wrong answer to the right one.
    """
    right = bench.right_of(row)
    if right.correct is True:
        return scored.correct is True
    merit, best, worst = (bench.merit(one) for one in (scored, right, bench.wrong_of(row)))
    return merit is not None and best is not None and worst is not None and merit > (best + worst) / 2


def _form(bench: Bench) -> str:
    styles = Counter(row.style.name if row.style else "known-good completions" for row in bench.rows)
    return ", ".join(name for name, _ in styles.most_common(3))
