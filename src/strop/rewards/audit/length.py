"""Length probes: length alone must not be what is paid for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...types import ScoredRollout
from .bench import TOLERANCE, Bench
from .records import Attempt, Row
from .registry import Finding, Hit, is_paid, ok, probe, shown, skip

STEPS = (0, 1, 2, 4, 8, 16)
"""Length of the filler, in sixteenths of what the token limit leaves."""
ORDINARY_SHARE = 0.75
"""Up to this share of the token limit a length is ordinary; beyond it a penalty for overlong completions may begin."""
NUM_ROWS = 4
MAX_RHO = 0.1
MIN_ROOM = 24
"""Tokens that the limit has to leave beside the answer, or lengths cannot be varied."""

_RISES = "a length term that rises somewhere pays for rambling: clamp it, and let it fall with length or stay"


@probe("L1", "the right answer with more and more filler before it")
def longer_right(bench: Bench) -> Finding:
    """The reward must never rise with length: a periodic or bonus term shows here."""
    return _never_rises(bench, right=True)


@probe("L2", "a wrong answer with more and more filler before it")
def longer_wrong(bench: Bench) -> Finding:
    """The same for wrong answers: where it rises, a lost policy learns to ramble."""
    return _never_rises(bench, right=False)


@probe("L3", "a short wrong answer against a long right one")
def short_wrong_long_right(bench: Bench) -> Finding:
    """The right one must win, in one group as well."""
    rows = roomy_rows(bench)
    if not rows:
        return skip(_NO_ROOM)
    groups, hits = [], []
    for row in rows:
        left = room(bench, row)
        texts = [row.wrong, bench.padded(row, row.gold.text, int(ORDINARY_SHARE * left))]
        groups.append([Attempt(row.problem, text) for text in texts])
    scored = bench.score_padded(groups)
    for row, group, (wrong, right) in zip(rows, groups, scored, strict=True):
        if wrong.reward is not None and right.reward is not None and wrong.reward >= right.reward - TOLERANCE:
            hits.append(Hit(row, group[0], wrong))
    highest = _highest(one for group in scored for one in group)
    if not hits:
        return ok(of=len(rows), max_score=highest)
    finding = Finding(
        "FAIL", f"the short wrong answer earns {hits[0].scored.reward:g}, the long right one no more",
        advice="make the length term smaller than correctness, or multiply it with correctness (`gr3`, `l1_max`)",
    )  # fmt: skip
    return shown(finding, hits, hits[0], len(rows))


@probe("L4", "rambling after the right answer")
def after_the_answer(bench: Bench) -> Finding:
    """Words after the answer must cost something; earning more by them fails."""
    rows = roomy_rows(bench)
    if not rows:
        return skip(_NO_ROOM)
    attempts = [Attempt(row.problem, f"{row.right}\n{bench.filler(room(bench, row))}") for row in rows]
    pairs = [(bench.right_of(row), one) for row, one in zip(rows, bench.score(attempts), strict=True)]
    free, gains = [], []
    for row, attempt, (right, after) in zip(rows, attempts, pairs, strict=True):
        if right.reward is None or after.reward is None:
            continue
        if after.reward > right.reward + TOLERANCE:
            gains.append(Hit(row, attempt, after))
        elif after.reward >= right.reward - TOLERANCE:
            free.append(Hit(row, attempt, after))
    if gains:
        finding = Finding("FAIL", f"rambling after the answer earns {gains[0].scored.reward:g}", advice=_RISES)
        return shown(finding, gains, gains[0], len(rows))
    if free:
        finding = Finding(
            "WARN", "rambling after the answer costs nothing", advice="add `answer_last`, or `soft_overlong`"
        )
        return shown(finding, free, free[0], len(rows))
    return ok(of=len(rows), max_score=_highest(after for _, after in pairs))


@probe("L5", "cut off by the token limit")
def cut_off(bench: Bench) -> Finding:
    """Cut before the answer it must not pay; cut right after the answer is the run's own choice and reported."""
    rows = roomy_rows(bench)
    if not rows:
        return skip(_NO_ROOM)
    before = []
    for row in rows:
        text = bench.padded(row, row.gold.text, room(bench, row))
        end = text.rfind(row.mark(row.gold.text))
        before.append(Attempt(row.problem, text[:end].removesuffix("</think>\n").rstrip(), truncated=True))
    hits = []
    scored = bench.score(before)
    for row, attempt, one in zip(rows, before, scored, strict=True):
        if is_paid(bench, one):
            hits.append(Hit(row, attempt, one))
    if hits:
        finding = Finding(
            "FAIL", f"a completion that was cut before its answer earns {hits[0].scored.reward:g}",
            advice="score 0 where no answer is found after the thinking part",
        )  # fmt: skip
        return shown(finding, hits, hits[0], len(rows))
    after = bench.score(Attempt(row.problem, row.right, truncated=True) for row in rows)
    paid = sum(one.correct is True for one in after)
    said = f"cut right after the answer, it still counts as right on {paid} of {len(rows)} rows" if paid else ""
    advice = "`truncation` refuses it; objective.mask_truncated_completions leaves it out of the loss" if paid else ""
    return Finding("REPORT" if paid else "OK", said, of=len(rows), max_score=_highest(after), advice=advice)


@probe("L6", "the right answer without any reasoning")
def no_reasoning(bench: Bench) -> Finding:
    """Whether to pay for it is a choice: a policy that is paid for it may stop reasoning."""
    rows = [row for row in bench.sound_rows if row.style is not None and row.style.reasoning != "none"]
    if not rows:
        return skip("the asked form has no place for reasoning")
    scored = bench.score(Attempt(row.problem, row.mark(row.gold.text)) for row in rows)
    paid = sum(one.correct is True for one in scored)
    if not paid:
        return ok("not paid", of=len(rows), max_score=_highest(scored))
    return Finding("REPORT", f"counts as right on {paid} of {len(rows)} rows", of=len(rows), max_score=_highest(scored))


@probe("L7", "rambles that repeat themselves")
def rambles(bench: Bench) -> Finding:
    """Where a repetition function is in use, it has to see plain repetition, and should see its disguises."""
    names = bench.names_of("repetition")
    if not names:
        return skip("no function of kind `repetition` has a weight; nothing in this run counts repetition")
    rows = roomy_rows(bench)[:2]
    if not rows:
        return skip(_NO_ROOM)
    seen: dict[str, int] = {}
    hits: list[Hit] = []
    for row in rows:
        texts = repetitive(bench, room(bench, row))
        plain = bench.padded(row, row.gold.text, room(bench, row))
        base, *others = bench.score(
            [Attempt(row.problem, plain), *(Attempt(row.problem, row.write(row.gold.text, t)) for t in texts.values())]
        )
        for (name, text), one in zip(texts.items(), others, strict=True):
            if _part(bench, one, names) < _part(bench, base, names) - TOLERANCE:
                continue
            seen[name] = seen.get(name, 0) + 1
            hits.append(Hit(row, Attempt(row.problem, row.write(row.gold.text, text)), one))
    if not hits:
        return ok(f"{len(repetitive(bench, MIN_ROOM))} kinds are penalised", of=len(rows))
    finding = Finding(
        "FAIL" if PLAIN_REPETITION in seen else "WARN", f"not penalised: {', '.join(seen)}",
        advice="use `ngram_repetition` and `compression_ratio` together: each sees what the other misses",
    )  # fmt: skip
    return shown(finding, hits, hits[0], len(rows))


PLAIN_REPETITION = "a phrase over and over"


def repetitive(bench: Bench, num_tokens: int) -> dict[str, str]:
    """Return rambles of about this many tokens by name: repetition, plain and disguised."""
    phrase = "so we check it once more and "
    turns = max(3, num_tokens // max(1, bench.length(phrase)))
    variants = ("we check it again", "again we check it", "it is checked again", "once more we check it")
    return {
        PLAIN_REPETITION: phrase * turns,
        "without spaces": phrase.replace(" ", "") * turns,
        "zero-width characters": "".join(phrase.replace(" ", " " + "\u200b" * (i % 3)) for i in range(turns)),
        "a counter": " ".join(f"step {i} is checked" for i in range(max(3, turns * 2))),
        "changing case": "".join(_case(phrase, i) for i in range(turns)),
        "paraphrases in turn": " ".join(variants[i % 4] for i in range(max(4, turns * 2))),
    }


def _case(phrase: str, number: int) -> str:
    return "".join(ch.upper() if (number >> (i % 8)) & 1 else ch for i, ch in enumerate(phrase))


@probe("L8", "correlation of length and reward")
def correlation(bench: Bench) -> Finding:
    """Spearman's rho at ordinary lengths: at most 0.1 for right answers, within 0.1 of 0 for wrong ones."""
    rows = roomy_rows(bench)
    if not rows:
        return skip(_NO_ROOM)
    worst: tuple[float, bool] = (0.0, True)
    hits: list[Hit] = []
    for row in rows:
        lengths = [int(i / 11 * ORDINARY_SHARE * room(bench, row)) for i in range(12)]
        for right in (True, False):
            answer = row.gold.text if right else row.gold.wrong
            attempts = [Attempt(row.problem, bench.padded(row, answer, n, i)) for i, n in enumerate(lengths)]
            (scored,) = bench.score_padded([attempts])
            known = [
                (bench.length(a.text), s.reward) for a, s in zip(attempts, scored, strict=True) if s.reward is not None
            ]
            rho = spearman([n for n, _ in known], [reward for _, reward in known])
            if (rho > MAX_RHO) if right else (abs(rho) > MAX_RHO):
                worst = max(worst, (rho, right), key=lambda pair: abs(pair[0]))
                hits.append(Hit(row, attempts[-1 if rho > 0 else 0], scored[-1 if rho > 0 else 0]))
    if not hits:
        return ok(of=len(rows))
    rho, right = worst
    lesson = {
        (True, True): "right answers are paid for being long",
        (False, True): "wrong answers are paid for being long: a lost policy rambles",
        (False, False): "wrong answers are paid for being short: a policy learns to give up early",
    }[right, rho > 0]
    finding = Finding(
        "FAIL", f"rho {rho:+.2f} on {'right' if right else 'wrong'} answers alone: {lesson}",
        advice="let length matter for right answers only (`gr3`, `l1_max`, rewards.length_shaping)",
    )  # fmt: skip
    return shown(finding, hits, hits[-1], len(rows))


_NO_ROOM = "the token limit leaves no room beside the answer, or the reward takes nothing before it"


def roomy_rows(bench: Bench) -> list[Row]:
    """Return rows whose right answer stays right with words before it, and that have room for them."""
    rows = [row for row in bench.sound_rows if row.style is not None and row.style.reasoning != "none"]
    return [row for row in rows[:NUM_ROWS] if room(bench, row) >= MIN_ROOM]


def room(bench: Bench, row: Row) -> int:
    """Return the tokens that the limit leaves beside the answer and its form."""
    return bench.setting.max_completion_length - bench.length(row.right) - 2


def _never_rises(bench: Bench, *, right: bool) -> Finding:
    rows = roomy_rows(bench)
    if not rows:
        return skip(_NO_ROOM)
    hits: list[Hit] = []
    rises: list[tuple[float, float]] = []
    everything: list[ScoredRollout] = []
    for row in rows:
        answer = row.gold.text if right else row.gold.wrong
        texts = [bench.padded(row, answer, n * room(bench, row) // 16) for n in STEPS]
        attempts = [Attempt(row.problem, text) for text in texts]
        (scored,) = bench.score_padded([attempts])
        everything += scored
        lowest = float("inf")
        for attempt, one in zip(attempts, scored, strict=True):
            if one.reward is None:
                continue
            if one.reward > lowest + TOLERANCE:
                hits.append(Hit(row, attempt, one))
                rises.append((lowest, one.reward))
            lowest = min(lowest, one.reward)
    if not hits:
        return ok(of=len(rows), max_score=_highest(everything))
    index = max(range(len(hits)), key=lambda i: rises[i][1] - rises[i][0])
    low, high = rises[index]
    who = "a right" if right else "a wrong"
    finding = Finding("FAIL", f"the reward of {who} answer rises with length, from {low:g} to {high:g}", advice=_RISES)
    return shown(finding, hits, hits[index], len(rows))


def _part(bench: Bench, scored: ScoredRollout, names: Sequence[str]) -> float:
    return sum(bench.weights[name] * (scored.scores[name] or 0.0) for name in names)


def _highest(scored: Iterable[ScoredRollout]) -> float | None:
    return max((one.reward for one in scored if one.reward is not None), default=None)


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return Spearman's rank correlation, ties at their mean rank; 0 where one side is constant."""
    return pearson(_ranks(xs), _ranks(ys))


def _ranks(values: Sequence[float]) -> list[float]:
    rounded = [round(value, 9) for value in values]
    ordered = sorted(rounded)
    first = {value: ordered.index(value) for value in set(ordered)}
    return [first[value] + (ordered.count(value) - 1) / 2 for value in rounded]


def pearson(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the correlation of two lists; 0 where one of them is constant or has fewer than two values."""
    if len(xs) < 2:
        return 0.0
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    dx, dy = [x - mean_x for x in xs], [y - mean_y for y in ys]
    norm = (sum(d * d for d in dx) * sum(d * d for d in dy)) ** 0.5
    return sum(a * b for a, b in zip(dx, dy, strict=True)) / norm if norm > 1e-12 else 0.0
