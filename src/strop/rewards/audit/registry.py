"""Probes by id, what they find, and how most judge: only a right answer may earn more than a wrong one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ...types import ScoredRollout
from .bench import TOLERANCE, Bench
from .records import Attempt, Row

Severity = Literal["FAIL", "WARN", "REPORT", "SKIP", "OK"]
SEVERITIES: tuple[Severity, ...] = ("FAIL", "WARN", "REPORT", "SKIP", "OK")

FORM_ROWS = 2
CHANCE_SHARE = 0.2
"""Texts that can hit a right answer by luck (the question's last number) fail from this share of rows on."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one probe found."""

    severity: Severity
    said: str
    """What was seen, or why the probe could not run."""
    rows: int = 0
    """Rows on which it was seen."""
    of: int = 0
    """Rows that were tried."""
    max_score: float | None = None
    """Highest reward among the probe's completions; None where nothing was scored."""
    example: str = ""
    """A completion that shows it."""
    problem: str = ""
    """Id of its row."""
    advice: str = ""
    """What to change."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A probe of the audit."""

    id: str
    family: str
    title: str
    run: Callable[[Bench], Finding]
    needs_gold: bool
    task: str
    """What it needs of the lab; empty for nothing."""


PROBES: dict[str, Probe] = {}
"""Every probe by id, in the order of the report."""

FAMILIES = {
    "Z": "zero-reward", "P": "full-reward", "L": "length", "G": "group", "B": "batch", "R": "robustness",
    "D": "determinism", "X": "security",
}  # fmt: skip


def probe(
    identity: str, title: str, *, needs_gold: bool = True, task: str = ""
) -> Callable[[Callable[[Bench], Finding]], Callable[[Bench], Finding]]:
    """Register a probe. One that `needs_gold` is skipped where no row has a completion that is known to be right."""

    def register(run: Callable[[Bench], Finding]) -> Callable[[Bench], Finding]:
        assert identity not in PROBES, f"probe {identity} is there twice"
        PROBES[identity] = Probe(identity, FAMILIES[identity[0]], title, run, needs_gold, task)
        return run

    return register


def ok(said: str = "", *, of: int = 0, max_score: float | None = None) -> Finding:
    """Return a finding of nothing."""
    return Finding("OK", said, of=of, max_score=max_score)


def skip(reason: str) -> Finding:
    """Return the finding of a probe that could not run."""
    return Finding("SKIP", reason)


@dataclass(frozen=True, slots=True)
class Hit:
    """A completion that earned what it should not, or did not earn what it should."""

    row: Row
    attempt: Attempt
    scored: ScoredRollout


def must_not_pay(
    bench: Bench,
    texts: Callable[[Row], Iterable[str]],
    *,
    advice: str,
    rows: Sequence[Row] | None = None,
    chance: bool = False,
    worst: Severity = "FAIL",
    truncated: bool = False,
) -> Finding:
    """Score texts that are no right answer: none may count as right or earn more than a wrong answer in the right form.

    Length and repetition terms are left out of the comparison. With `chance`, hits on few rows are only a warning.
    """
    rows = bench.sound_rows if rows is None else rows
    attempts = [(row, Attempt(row.problem, text, truncated)) for row in rows for text in dict.fromkeys(texts(row))]
    if not attempts:
        return skip("no row has an answer that this can be tried with")
    scored = bench.score(attempt for _, attempt in attempts)
    hits = [Hit(row, attempt, one) for (row, attempt), one in zip(attempts, scored, strict=True) if is_paid(bench, one)]
    tried = len({row.problem.id for row, _ in attempts})
    rewards = [one.reward for one in scored if one.reward is not None]
    highest = max(rewards, default=None)
    if not hits:
        return ok(of=tried, max_score=highest)
    few = chance and len({hit.row.problem.id for hit in hits}) < CHANCE_SHARE * tried
    best = max(hits, key=lambda hit: hit.scored.reward or 0.0)
    said = f"earns {best.scored.reward:g}; a wrong answer earns {bench.floor:g}"
    if best.scored.correct:
        said = f"counts as right (reward {best.scored.reward:g})"
    return shown(Finding("WARN" if few else worst, said, advice=advice, max_score=highest), hits, best, tried)


def keeps_form(bench: Bench, texts: Sequence[str], *, advice: str, thinking: bool = False) -> Finding | None:
    """Return a failure where a function that judges the form alone gives its full mark to one of these texts.

    It judges the form if it is of kind `format`, or of kind `other` and gives right and wrong answers the same; with
    `thinking`, only functions that ask for a thinking part are held to it.
    """
    rows = bench.sound_rows[:FORM_ROWS]
    hits: list[Hit] = []
    names: list[str] = []
    for name in bench.names_of("format", "other"):
        marks = [(bench.right_of(row).scores[name], bench.wrong_of(row).scores[name]) for row in rows]
        if any(right is None or right != wrong for right, wrong in marks):
            continue
        for row, (mark, _) in zip(rows, marks, strict=True):
            unmarked = ("", "we look at what is given", *([row.mark(row.gold.text)] if thinking else []))
            scored = bench.score([Attempt(row.problem, text) for text in (*unmarked, *texts)])
            bare, scored = scored[: len(unmarked)], scored[len(unmarked) :]
            if mark is None or any(mark <= (one.scores[name] or 0.0) + TOLERANCE for one in bare):
                continue  # it asks for no marks
            for text, one in zip(texts, scored, strict=True):
                if (one.scores[name] or 0.0) >= mark - TOLERANCE:
                    hits.append(Hit(row, Attempt(row.problem, text), one))
                    names.append(name)
    if not hits:
        return None
    said = f"`{names[0]}` gives it the full mark for form, {hits[0].scored.scores[names[0]]:g}"
    return shown(Finding("FAIL", said, advice=advice), hits, hits[0], len(rows))


def shown(finding: Finding, hits: Sequence[Hit], best: Hit, tried: int) -> Finding:
    """Return the finding with its example and the number of rows."""
    return replace(
        finding,
        rows=len({hit.row.problem.id for hit in hits}),
        of=tried,
        example=best.attempt.text,
        problem=best.row.problem.id,
        max_score=best.scored.reward if finding.max_score is None else finding.max_score,
    )


def is_paid(bench: Bench, scored: ScoredRollout) -> bool:
    """Whether a completion counts as right, or earns more than a wrong answer in the right form."""
    if scored.correct is True:
        return True
    merit = bench.merit(scored)
    return merit is not None and merit > bench.floor + TOLERANCE
