"""Robustness probes: no text and no row stalls a function, kills its process or earns what it should not."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

from ..combine import Outcome, combine
from .bench import CHARS_PER_TOKEN, TOLERANCE, Bench
from .laboratory import damaged_attempts
from .records import Attempt
from .registry import Finding, ok, probe, skip
from .solvers import with_numbers
from .texts import bulky, hostile_answers

HANG_LIMIT_S = 2.0
MAX_HANGS = 3
"""After so many the probe ends: every one of them costs a worker."""
MAX_GROWTH_BYTES = 256 << 20
COST_PER_STEP_S = 0.5
"""What scoring may cost in a step before it is worth a warning: 5 % of a step of ten seconds."""
CHUNK = 4

_BOUND = "bound length, depth, digits and exponents before parsing, and never evaluate an answer"


@probe("R1", "texts that stall or crash a parser", needs_gold=False)
def hostile(bench: Bench) -> Finding:
    """Each answer alone and in the asked form (no programs), each bulky completion as it is; two seconds a call."""
    attempts = list(_hostile_attempts(bench))
    hangs: list[tuple[Attempt, str]] = []
    deaths: list[tuple[Attempt, str]] = []
    slowest, tried = 0.0, 0
    with bench.with_limit(HANG_LIMIT_S) as quick:
        for start in range(0, len(attempts), CHUNK):
            part = attempts[start : start + CHUNK]
            begin = time.monotonic()
            for attempt, scored in zip(part, quick.score(part), strict=True):
                for reason in scored.failures.values():
                    if "past the limit" in reason:
                        hangs.append((attempt, reason))
                    elif "died" in reason:
                        deaths.append((attempt, reason))
            slowest, tried = max(slowest, time.monotonic() - begin), tried + len(part)
            if len(hangs) + len(deaths) >= MAX_HANGS:
                break
    if hangs or deaths:
        reach = CHARS_PER_TOKEN * bench.setting.max_completion_length
        within = [(attempt, reason) for attempt, reason in (*hangs, *deaths) if len(attempt.text) <= reach]
        attempt, reason = (within or [*hangs, *deaths])[0]
        beyond = "" if within else ", all longer than a completion of this run can be"
        return Finding(
            "FAIL" if within else "WARN",
            f"{len(hangs)} hangs and {len(deaths)} dead workers in {tried} texts{beyond}: {reason}",
            rows=1, of=1, example=attempt.text, problem=attempt.problem.id, advice=_BOUND,
        )  # fmt: skip
    return ok(f"{len(attempts)} texts, slowest {CHUNK} together {slowest:.1f} s", of=1)


def _hostile_attempts(bench: Bench) -> Iterator[Attempt]:
    row = next(iter(bench.sound_rows or bench.rows), None)
    problem = row.problem if row else bench.setting.problems[0]
    if row and row.gold.kind == "expression":  # a text of other numbers may be refused before it is evaluated
        nines = with_numbers(problem, (9, 9, 9), 81)
        yield from (Attempt(nines, row.write(text)) for text in ("9**9**9", "9**(9**9)"))
    # As a program such a text is what the sandbox is for: its own limit of processor time ends it.
    styled = row is not None and row.gold.kind != "program"
    for text in hostile_answers():
        yield Attempt(problem, text)
        yield Attempt(problem, row.write(text) if row and styled else rf"\boxed{{{text}}}")
    for text in bulky():
        yield Attempt(problem, text)


@probe("R2", "memory over a thousand calls", needs_gold=False, task="growth")
def growth(bench: Bench) -> Finding:
    """Growth of the process that scores, after a first round."""
    found = bench.lab.result("growth")
    if found is None:
        return _unfinished(bench)
    said = f"{found['bytes'] / 2**20:.0f} MiB over {found['calls']} calls"
    if found["bytes"] > MAX_GROWTH_BYTES:
        return Finding("FAIL", said, advice="bound what is kept between calls: caches, logs, sessions")
    return ok(said)


@probe("R3", "time per completion", needs_gold=False, task="latency")
def latency(bench: Bench) -> Finding:
    """p50, p99 and what a step costs with the run's workers, which score while others still decode."""
    taken = bench.lab.result("latency")
    if not taken:
        return _unfinished(bench)
    setting = bench.setting
    p50, p99 = taken[len(taken) // 2], taken[min(len(taken) - 1, int(len(taken) * 0.99))]
    batch = setting.num_prompts * setting.num_generations
    cost = batch * sum(taken) / len(taken) / setting.config.workers
    said = f"p50 {1000 * p50:.2g} ms, p99 {1000 * p99:.2g} ms; a step of {batch} completions: {cost:.2g} s"
    if cost > COST_PER_STEP_S:
        return Finding("WARN", said, advice="raise rewards.workers, or compare cheaply before computing")
    return Finding("REPORT", said)


@probe("R4", "rows with a column missing, empty or NaN", needs_gold=False, task="columns")
def damaged_rows(bench: Bench) -> Finding:
    """On such a row, nothing and garbage must not be paid; the right answer may be, where the column is not read."""
    found = bench.lab.result("columns")
    if found is None:
        return _unfinished(bench)
    if not found:
        return skip("rows have no columns")
    verdicts: dict[tuple[str, str, int], dict[str, Outcome]] = {}
    raised: Counter[str] = Counter()
    for column, damage, index, name, verdict in found:
        outcome = _outcome(verdict.split(" ")[0] if not verdict.startswith(("raised", "refused")) else verdict)
        verdicts.setdefault((column, damage, index), {})[name] = outcome
        if outcome.failure.startswith("raised"):
            raised[outcome.failure.partition(":")[0]] += 1
    names, weights = bench.pool.names, bench.pool.weights
    base = bench.floor if bench.sound_rows else None
    problems = {(column, damage): problem for column, damage, problem in bench.lab.damaged}
    for (column, damage, index), outcomes in verdicts.items():
        attempt = damaged_attempts(bench, problems[column, damage])[index]
        one = combine(bench.rollout(attempt), names, weights, outcomes, bench.rules)
        merit = bench.merit(one)
        if index and (one.correct is True or (base is not None and merit is not None and merit > base + TOLERANCE)):
            return Finding(
                "FAIL", f"with column `{column}` {damage} a completion earns {one.reward:g}", rows=1, of=1,
                max_score=one.reward, example=attempt.text, problem=attempt.problem.id,
                advice="return None where the reference answer is missing or cannot be read",
            )  # fmt: skip
    cases = len(verdicts)
    if raised:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in raised.most_common(3))
        return Finding("REPORT", f"{cases} damaged rows: unscored where it {kinds}", of=1)
    return ok(f"{cases} damaged rows", of=1)


def _outcome(text: str) -> Outcome:
    if text == "None":
        return Outcome(None)
    try:
        return Outcome(float.fromhex(text))
    except ValueError:
        return Outcome(None, text)


@probe("R5", "exceptions", needs_gold=False)
def exceptions(bench: Bench) -> Finding:
    """Everything that was unscored in this audit, by reason; runs last of all."""
    if not bench.failures:
        return ok(f"none in {bench.num_scored} completions")
    kinds: Counter[str] = Counter()
    for reason, count in bench.failures.items():
        kinds[reason.partition("(")[0][:80].strip()] += count
    listed = "; ".join(f"{reason} x{count}" for reason, count in kinds.most_common(3))
    lost = bench.num_unscored == bench.num_scored
    return Finding(
        "FAIL" if lost else "WARN", f"{bench.num_unscored} of {bench.num_scored} completions unscored: {listed}",
        rows=bench.num_unscored, of=bench.num_scored,
        advice="an unscored completion teaches nothing: "
        + ("mend the function" if lost else "catch what a strange text can raise and score it 0"),
    )  # fmt: skip


def _unfinished(bench: Bench) -> Finding:
    return Finding("FAIL", bench.lab.trouble, advice="a function must not hang or end its process")
