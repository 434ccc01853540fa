"""Group probes: what the run's normalisation and shaping make of rewards, on groups of made-up completions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from ...seeding import derive_seed
from ...types import ScoredRollout
from .bench import TOLERANCE, Bench
from .length import MAX_RHO, ORDINARY_SHARE, pearson, room, roomy_rows
from .records import Attempt, Row
from .registry import Finding, Hit, ok, probe, shown, skip

NUM_GROUPS = 1000
NUM_SCORED_GROUPS = 100
"""Where functions see whole groups, each group has to be scored on its own."""
BANK = 16
"""Lengths per row, for right and for wrong answers."""
MEDIAN_SHARE, SPREAD = 0.25, 0.4
"""Lengths are log-normal around a quarter of the token limit."""
MAX_FLIPS = 0.01

_NO_OBJECTIVE = "the run's advantages are not known here"


@dataclass(frozen=True, slots=True)
class _Groups:
    """Groups of scored completions with the advantages that the run would train with."""

    size: int
    scored: list[ScoredRollout]
    advantages: list[float | None]

    def __len__(self) -> int:
        return len(self.scored) // self.size

    def group(self, index: int) -> list[tuple[ScoredRollout, float]]:
        """Return the members that have an advantage."""
        start = index * self.size
        members = zip(self.scored[start : start + self.size], self.advantages[start : start + self.size], strict=True)
        return [(scored, advantage) for scored, advantage in members if advantage is not None]


@probe("G1", "signs of advantages that length or form turn round")
def sign_flips(bench: Bench) -> Finding:
    """Against correctness alone, on mixed groups at all lengths: more than one in a hundred fails, any is a warning."""
    groups = _mixed_groups(bench)
    if groups is None:
        return skip(_why_not(bench))
    flips, counted = [], 0
    for index in range(len(groups)):
        members = groups.group(index)
        share = sum(s.correct is True for s, _ in members) / max(1, len(members))
        if share in (0.0, 1.0):
            continue
        counted += len(members)
        flips += [s for s, a in members if a * ((s.correct is True) - share) < -TOLERANCE]
    if not flips:
        return ok(f"{len(groups)} groups of {groups.size}", of=len(groups))
    rate = len(flips) / counted
    finding = Finding(
        "FAIL" if rate > MAX_FLIPS else "WARN",
        f"{rate:.2%} of the advantages in {len(groups)} mixed groups push the other way than correctness would",
        advice="weaken the terms beside correctness, gate them (rewards.gated), or use "
        "rewards.length_shaping instead",
    )  # fmt: skip
    return _with_example(bench, finding, flips, len(groups))


@probe("G2", "length in groups without a right answer")
def all_wrong(bench: Bench) -> Finding:
    """The correlation of length and advantage must lie within 0.1 of 0."""
    return _length_lesson(bench, right=False)


@probe("G3", "length in groups of right answers alone")
def all_right(bench: Bench) -> Finding:
    """The correlation of length and advantage must not be above 0.1."""
    return _length_lesson(bench, right=True)


@probe("G4", "equal rewards", needs_gold=False)
def equal_rewards(bench: Bench) -> Finding:
    """A group whose rewards are all the same has advantages of exactly 0."""
    if bench.setting.advantages is None:
        return skip(_NO_OBJECTIVE)
    size = bench.setting.num_generations
    (scored,) = bench.score_groups([[Attempt(bench.setting.problems[0], "x", seed=i) for i in range(size)]])
    for value in (0.1, 1 / 3, 1.0):
        same = [replace(one, reward=value, correct=False, failures={}) for one in scored]
        advantages = bench.setting.advantages(same, size)
        if any(a != 0.0 for a in advantages if a is not None):
            return Finding(
                "FAIL", f"{size} rewards of {value:g} give advantages {[a for a in advantages if a][:3]}",
                advice="a term that differs between equal rewards is at work: look at rewards.length_shaping",
            )  # fmt: skip
    return ok(of=3)


@probe("G5", "one unscored completion in a group")
def one_unscored(bench: Bench) -> Finding:
    """It has no advantage and leaves those of the others finite."""
    advantages, rows = bench.setting.advantages, bench.sound_rows[:4]
    if advantages is None or not rows:
        return skip(_why_not(bench))
    size = bench.setting.num_generations
    for row in rows:
        scored = [bench.right_of(row) if i % 2 else bench.wrong_of(row) for i in range(size)]
        lost = dict.fromkeys(scored[0].scores)
        broken = replace(scored[0], reward=None, correct=None, scores=lost, failures={"x": "NaN"})
        result = advantages([broken, *scored[1:]], size)
        finite = all(a is not None and math.isfinite(a) for a in result[1:])
        if result[0] is not None or (size > 2 and not finite):
            return Finding(
                "FAIL", f"advantages are {list(result)[:4]} beside an unscored completion", of=len(rows),
                advice="report this with the config: an unscored completion has to be left out alone",
            )  # fmt: skip
    return ok(of=len(rows))


@probe("G6", "the order within a group")
def permuted(bench: Bench) -> Finding:
    """Turning a group round turns scores and advantages round, and changes none."""
    rows = roomy_rows(bench) or list(bench.sound_rows[:4])
    if not rows:
        return skip(_why_not(bench))
    size, hits = bench.setting.num_generations, []
    for row in rows:
        texts = [t for _, t in zip(range(size), _members(bench, row, size), strict=False)]
        there = [Attempt(row.problem, text, seed=i) for i, text in enumerate(texts)]
        ((one,), (other,)) = (bench.score_groups([order]) for order in (there, there[::-1]))
        same = all(a.scores == b.scores for a, b in zip(one, other[::-1], strict=True))
        if same and bench.setting.advantages is not None:
            pairs = zip(
                bench.setting.advantages(one, size), reversed(bench.setting.advantages(other, size)), strict=True
            )
            same = all((a is None) == (b is None) and abs((a or 0) - (b or 0)) < 1e-6 for a, b in pairs)
        if not same:
            hits.append(Hit(row, there[0], one[0]))
    if not hits:
        return ok(of=len(rows))
    finding = Finding(
        "FAIL", "scores depend on the place of a completion in its group",
        advice="compare with the group's mean, minimum or sorted values, never with the neighbour",
    )  # fmt: skip
    return shown(finding, hits, hits[0], len(rows))


@probe("G7", "weights beside correctness", needs_gold=False)
def dominance(bench: Bench) -> Finding:
    """All other functions together must be worth less than correctness; gated ones are paid with it only.

    Length rewards are judged by the lint, which knows what each of them gives to wrong answers.
    """
    deciding = bench.deciding
    if not deciding:
        return skip("no function with a weight judges the answer")
    outbid = next((item for item in bench.lint() if item["id"] == "length-outbids-correctness"), None)
    if outbid is not None:
        return Finding("FAIL", outbid["said"], advice=outbid["advice"])
    # A function that declares nothing may well give more than the 1 that is assumed of it.
    highest = {n: max((bench.right_of(row).scores[n] or 0.0 for row in bench.rows), default=0.0) for n in deciding}
    worth = {
        name: abs(weight) * (max(bench.declarations[name].high, highest.get(name, 0.0)) - bench.declarations[name].low)
        for name, weight in bench.weights.items()
        if weight != 0
    }
    deciding = [name for name in deciding if _tells(bench, name)] or deciding
    own = sum(worth[name] for name in deciding)
    beside = [n for n in bench.names_of("format", "other", "repetition") if n not in (*deciding, *bench.rules.gated)]
    total = sum(worth[name] for name in beside)
    said = f"correctness is worth {own:g}, the rest together {total:g}"
    if total < own - TOLERANCE:
        return ok(said)
    return Finding(
        "FAIL", f"{said} ({', '.join(beside)}): a wrong completion can earn as much as a right one",
        advice=f"multiply the weights of {', '.join(beside)} by at most {own / total * 0.5:.2g}, or name them in "
        "rewards.gated; a function without @reward(low=..., high=...) counts as one of 0 to 1",
    )  # fmt: skip


def _tells(bench: Bench, name: str) -> bool:
    """Whether a function gives right and wrong answers in the same form different values."""
    return any(bench.right_of(row).scores[name] != bench.wrong_of(row).scores[name] for row in bench.sound_rows)


def _members(bench: Bench, row: Row, size: int) -> list[str]:
    if row.style is None:
        return [row.right if i % 2 else row.wrong for i in range(size)]
    limit = max(0, int(ORDINARY_SHARE * room(bench, row)))
    return [bench.padded(row, row.gold.text if i % 2 else row.gold.wrong, i * limit // size, i) for i in range(size)]


def _mixed_groups(bench: Bench) -> _Groups | None:
    """Return groups of every share of right answers, at log-normal lengths up to the limit."""
    rng = Random(derive_seed("audit groups", bench.setting.seed))
    return _draw_groups(bench, rng, rng.random, 1.0)


def _length_lesson(bench: Bench, *, right: bool) -> Finding:
    rng = Random(derive_seed("audit groups", bench.setting.seed, int(right)))
    groups = _draw_groups(bench, rng, lambda: float(right), ORDINARY_SHARE)
    if groups is None:
        return skip(_why_not(bench))
    lengths, advantages, members = [], [], []
    for index in range(len(groups)):
        group = groups.group(index)
        if not group:
            continue
        mean = sum(s.rollout.num_completion_tokens for s, _ in group) / len(group)
        lengths += [s.rollout.num_completion_tokens - mean for s, _ in group]
        advantages += [a for _, a in group]
        members += [s for s, _ in group]
    rho = pearson(lengths, advantages)
    if rho <= MAX_RHO and (right or rho >= -MAX_RHO):
        return ok(f"correlation {rho:+.2f}", of=len(groups))
    who = "right" if right else "wrong"
    lesson = "to be long" if rho > 0 else "to give up early"
    finding = Finding(
        "FAIL", f"correlation {rho:+.2f} of length and advantage in groups of {who} answers: they teach {lesson}",
        advice="multiply the length term with correctness (`gr3`), or use rewards.length_shaping instead",
    )  # fmt: skip
    best = max(zip(advantages, members, strict=True), key=lambda pair: pair[0])[1]
    return _with_example(bench, finding, [best], len(groups))


def _draw_groups(bench: Bench, rng: Random, share: Callable[[], float], limit: float) -> _Groups | None:
    rows = roomy_rows(bench)
    if bench.setting.advantages is None or not rows:
        return None
    size = bench.setting.num_generations
    bank = {
        (row.problem.id, right): [
            Attempt(row.problem, bench.padded(row, row.gold.text if right else row.gold.wrong, length, i))
            for i, length in enumerate(_lengths(rng, int(limit * room(bench, row))))
        ]
        for row in rows
        for right in (True, False)
    }
    count = NUM_SCORED_GROUPS if bench.has_group_functions else NUM_GROUPS
    chosen: list[list[Attempt]] = []
    for number in range(count):
        row, right_share = rows[number % len(rows)], share()
        chosen.append([rng.choice(bank[row.problem.id, rng.random() < right_share]) for _ in range(size)])
    scored = [one for group in bench.score_padded(chosen) for one in group]
    return _Groups(size, scored, list(bench.setting.advantages(scored, size)))


def _lengths(rng: Random, limit: int) -> list[int]:
    return [min(limit, max(1, int(MEDIAN_SHARE * limit * math.exp(rng.gauss(0, SPREAD))))) for _ in range(BANK)]


def _why_not(bench: Bench) -> str:
    if bench.setting.advantages is None:
        return _NO_OBJECTIVE
    return "the token limit leaves no room beside the answer, or no right answer is paid"


def _with_example(bench: Bench, finding: Finding, members: Sequence[ScoredRollout], tried: int) -> Finding:
    one = members[0]
    return replace(
        finding, rows=len({m.rollout.problem.id for m in members}), of=tried, example=one.rollout.text,
        problem=one.rollout.problem.id, max_score=max(m.reward or 0.0 for m in members),
    )  # fmt: skip
