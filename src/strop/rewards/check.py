"""The check of reward functions that runs by itself before step 0: a few completions whose worth is known.

It stops a run only for what cannot be meant: a function that breaks its contract or lacks a column, one that fails on
every row, and a correctness function that refuses every reference answer or pays for nothing at all. Whatever may be
intended (a reward that is no verdict, some rows that cannot be scored), or may come from a form of answers that is not
known here (the same reward for everything), is said and does not stop the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import RewardError
from ..types import Problem, ScoredRollout
from .answers import opens_thinking
from .audit.bench import TOLERANCE, Bench, open_pool
from .audit.full import BASIC, spellings, still_right
from .audit.records import Attempt, Row, Setting
from .audit.reference import THOUGHT
from .audit.report import shorten

GARBAGE = ("?", "I do not know.", "the the the the the", "{[(<\u20ac", "<think>\nwe look at what is given")
NUM_VARIANT_ROWS = 2
CHUNK, MAX_TIMEOUTS = 2, 3
"""Rows that are tried at a time, and calls past the limit after which no further ones are."""
OFF = "rewards.check: false starts without this check"

Severity = Literal["FAIL", "WARN", "NOTE"]


@dataclass(frozen=True, slots=True)
class Complaint:
    """Something that the check found."""

    severity: Severity
    """FAIL stops a run, NOTE is said by the command only."""
    said: str
    """What was given and what is needed."""
    hint: str
    problem: str = ""
    """Id of the row that shows it."""
    text: str = ""
    """The completion that shows it."""

    @property
    def message(self) -> str:
        """What was given and needed, with the row and the completion."""
        where = f"; row {self.problem}, completion {shorten(self.text)}" if self.problem else ""
        return self.said + where


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Everything that the check found, and what was looked at."""

    complaints: tuple[Complaint, ...]
    passed: tuple[str, ...]
    """What was found in order, a sentence each."""

    @property
    def failed(self) -> bool:
        """Whether something was found that stops a run."""
        return any(c.severity == "FAIL" for c in self.complaints)

    def lines(self) -> Iterator[str]:
        """Yield the result for a terminal."""
        yield from (f"ok    {text}" for text in self.passed)
        for complaint in self.complaints:
            yield f"{complaint.severity:<5} {complaint.message}"
            yield f"      hint: {complaint.hint}"

    def raise_if_failed(self) -> None:
        """Raise RewardError with the first finding that stops a run."""
        for complaint in self.complaints:
            if complaint.severity == "FAIL":
                raise RewardError(f"the check of reward functions failed: {complaint.message}", hint=complaint.hint)


def run_check(setting: Setting, *, starting: bool = False) -> CheckResult:
    """Check a run's rewards on its first rows. Raises RewardError where a function cannot be loaded.

    `starting`: a run is about to start. The lint has already said what it knows without the declarations of the user's
    functions, and what may come from a form of answers that is not known here is no reason to stop.
    """
    with open_pool(setting) as pool:
        pool.wait_ready()
        bench = Bench(setting, pool)
        check = _Check(bench, starting)
        for item in bench.lint(only_new=starting):
            if item["severity"] in ("FAIL", "WARN"):
                check.add("FAIL" if item["severity"] == "FAIL" else "WARN", item["said"], item["advice"])
        try:
            check.run()
        except RewardError as e:  # a broken contract or a missing column; the message names function and row
            check.add("FAIL", e.message, e.hint)
        return CheckResult(tuple(check.complaints), tuple(check.passed))


class _Check:
    """One pass over the rows; stops asking rows that cannot be scored."""

    def __init__(self, bench: Bench, starting: bool) -> None:
        self.bench, self.starting = bench, starting
        self.complaints: list[Complaint] = []
        self.passed: list[str] = []
        self.seen: list[ScoredRollout] = []

    def add(self, severity: Severity, said: str, hint: str, problem: str = "", text: str = "") -> None:
        """Note a finding."""
        self.complaints.append(Complaint(severity, said, hint, problem, text))

    def score(self, attempts: Sequence[Attempt]) -> list[ScoredRollout]:
        """Score completions and remember them."""
        scored = self.bench.score(attempts)
        self.seen += scored
        return scored

    def run(self) -> None:
        """Look at nothing and garbage first, then at right answers."""
        problems = self.bench.setting.problems
        empties: list[ScoredRollout] = []
        for start in range(0, len(problems), CHUNK):
            empties += self.score([Attempt(problem, "") for problem in problems[start : start + CHUNK]])
            if sum(_is_late(one) for one in empties) >= MAX_TIMEOUTS:
                break  # the rest would only take time
        good = self._that_can_be_scored(empties)
        if not good:
            return
        nothing = [Attempt(problem, "") for problem in good]
        nothing += [Attempt(problem, text) for problem in good[:NUM_VARIANT_ROWS] for text in GARBAGE]
        if lost := [one for one in self.score(nothing) if one.reward is None]:
            what = "an empty completion" if not lost[0].rollout.text else "garbage"
            self.add(
                "WARN", f"{what} cannot be scored: {_why(lost[0])}; such completions teach nothing",
                "score 0 where there is no answer", lost[0].rollout.problem.id, lost[0].rollout.text,
            )  # fmt: skip
        self.bench.restrict_to(good)
        self.bench.find_references()
        rows = self.bench.rows
        self.seen += [self.bench.right_of(row) for row in rows] + [self.bench.wrong_of(row) for row in rows]
        if rows:
            self._gold(rows)
            self._nothing_pays(nothing)
            self._variants()
            self._prefilled()
        else:
            self.passed.append("no completion is known to be right, so right answers were not checked")
        self._constant()

    def _that_can_be_scored(self, empties: Sequence[ScoredRollout]) -> list[Problem]:
        """Return the problems of which some completion can be scored, and say of which none can.

        A function may well fail on an empty completion alone, so words and the reference answer are tried as well.
        """
        golds = {p.id: g.text for p, g in zip(self.bench.setting.problems, self.bench.golds, strict=True) if g}
        lost: list[ScoredRollout] = []
        for one in empties:
            if one.reward is not None:
                continue
            problem, others = one.rollout.problem, [GARBAGE[1]]
            others += [rf"\boxed{{{golds[problem.id]}}}"] if problem.id in golds else []
            if _is_late(one) or all(o.reward is None for o in self.score([Attempt(problem, t) for t in others])):
                lost.append(one)
        ids = {one.rollout.problem.id for one in lost}
        good = [one.rollout.problem for one in empties if one.rollout.problem.id not in ids]
        if lost:
            first, problem = lost[0], lost[0].rollout.problem
            more = f" and {_count(len(lost) - 1, 'other row')}" if len(lost) > 1 else ""
            reference = f"; its reference answer is {shorten(golds[problem.id], 60)}" if problem.id in golds else ""
            stops = not good and not any(map(_is_late, lost))
            self.add(
                "FAIL" if stops else "WARN",
                f"row {problem.id}{more} cannot be scored, whatever the completion: {_why(first)}{reference}; "
                + ("nothing would be learned" if stops else "such rows teach nothing"),
                f"mend the function or the column that it reads; {OFF}" if stops
                else "mend the function named, or remove the rows",
                problem.id, first.rollout.text,
            )  # fmt: skip
        return good

    def _gold(self, rows: Sequence[Row]) -> None:
        """Right answers get the maximum: of correctness functions, and of those that judge the form."""
        bench, before = self.bench, len(self.complaints)
        for name in bench.names_of("correctness", "format"):
            declared = bench.declarations[name]
            values = [(row, bench.right_of(row).scores[name]) for row in rows]
            low = [(row, v) for row, v in values if v is not None and v < declared.high - TOLERANCE]
            if not low:
                continue
            row, value = low[0]
            judges = declared.kind == "correctness"
            every = len(low) == len(values)
            gold = shorten(row.gold.text, 60)
            what = f"the reference answer {gold}" if judges else "a completion in the asked form"
            said = (
                f"`{name}` gives {what} {value:g} on {len(low)} of {_count(len(values), 'row')}; its maximum, "
                f"{declared.high:g}, is needed"
            )
            if judges:
                said += f"; tried: {bench.forms_tried}"
            hint = (
                "task.answer_column has to name the reference answers that this function compares with; " + OFF
                if judges
                else "look at what the function asks for, and whether prompt and chat template ask for the same"
            )
            self.add("FAIL" if judges and every else "WARN", said, hint, row.problem.id, row.right)
        if len(self.complaints) > before or not self._earn_more(rows):
            return
        if bench.names_of("correctness", "format"):
            self.passed.append(f"right answers get the maximum on {_count(len(rows), 'row')} ({rows[0].style_name})")
        else:
            self.passed.append(
                f"right answers earn more than wrong ones on {_count(len(rows), 'row')} ({rows[0].style_name})"
            )
        self._counts_as_right(rows)

    def _earn_more(self, rows: Sequence[Row]) -> bool:
        """Say where right answers earn no more than wrong ones; return whether they all do."""
        bench = self.bench
        sound = {row.problem.id for row in bench.sound_rows}
        same = [row for row in rows if row.problem.id not in sound]
        if same and self._differs():
            row = same[0]
            right, wrong = (bench.merit(one) for one in (bench.right_of(row), bench.wrong_of(row)))
            self.add(
                "WARN",
                f"the reference answer {shorten(row.gold.text, 60)} earns {_number(right)}, and a wrong answer "
                f"{_number(wrong)}, on {len(same)} of {_count(len(rows), 'row')}; tried: {bench.forms_tried}",
                "see whether the function reads the column of the reference answer in its form, "
                "`#### 42` for 42 say, and finds the answer where the prompt asks for it",
                row.problem.id, row.right,
            )  # fmt: skip
        return not same

    def _counts_as_right(self, rows: Sequence[Row]) -> None:
        """Functions that declare nothing decide together what is right, each at 1: say where that is never reached."""
        bench = self.bench
        one, row = bench.right_of(rows[0]), rows[0]
        values = [(name, one.scores[name], mark) for name, mark in bench.rules.marks.items()]
        short = [f"`{name}` {value:g}" for name, value, mark in values if value is not None and value < mark]
        if not short or any(one.correct is True for one in self.seen):
            return
        self.add(
            "WARN",
            "no completion counts as right, for none of these functions says which of them judges answers and at what "
            f"value, and all of them have to reach 1 then; the right answer gets {', '.join(short)}. The run learns, "
            "but accuracy, pass@k, length shaping and the monitors take every answer for wrong",
            'put @reward(kind="correctness", high=...) with its largest value above the function that judges answers, '
            'and @reward(kind="format") above those that judge form (docs/rewards.md)',
            row.problem.id, row.right,
        )  # fmt: skip

    def _nothing_pays(self, attempts: Sequence[Attempt]) -> None:
        """Neither an empty completion nor garbage may earn what a right one earns, or count as right."""
        bench, judged = self.bench, bool(self.bench.names_of("correctness"))
        sound = {row.problem.id: row for row in bench.sound_rows}
        for attempt, one in zip(attempts, bench.score(attempts), strict=True):
            row, merit = sound.get(attempt.problem.id), bench.merit(one)
            right = None if row is None else bench.merit(bench.right_of(row))
            as_much = merit is not None and right is not None and merit >= right - TOLERANCE
            if one.reward is not None and (one.correct is True or as_much):
                what = "an empty completion" if not attempt.text else "garbage"
                self.add(
                    "FAIL" if judged and one.correct is True else "WARN",
                    f"{what} earns {one.reward:g}, as much as the right answer; less is needed",
                    f"score 0 where there is no answer; {OFF}", attempt.problem.id, attempt.text,
                )  # fmt: skip
                return
        if sound:
            self.passed.append("empty completions and garbage earn less than right answers")

    def _variants(self) -> None:
        bench = self.bench
        tried = [
            (name, row, Attempt(row.problem, text))
            for row in bench.sound_rows[:NUM_VARIANT_ROWS]
            for name, text in spellings(row)
        ]
        scored = self.score([attempt for _, _, attempt in tried])
        refused = [
            (name, row, attempt)
            for (name, row, attempt), one in zip(tried, scored, strict=True)
            if not still_right(bench, row, one)
        ]
        if refused:
            name, row, attempt = next((r for r in refused if r[0] in BASIC), refused[0])
            severity: Severity = "WARN" if name in BASIC else "NOTE"
            more = len({other for other, _, _ in refused}) - 1
            others = f" and {_count(more, 'other variant')}" if more else ""
            self.add(
                severity, f"the right answer is refused in a harmless variant, {name}{others}",
                "normalise before comparing"
                + ("; `numeric` and `math` read such spellings of numbers" if row.gold.kind == "number" else ""),
                row.problem.id, attempt.text,
            )  # fmt: skip
        elif tried:
            self.passed.append(f"{len({name for name, _, _ in tried})} harmless variants of right answers pass")

    def _prefilled(self) -> None:
        """Where the chat template opens <think>, a completion that goes on from there is in form."""
        bench = self.bench
        rows = [row for row in bench.rows if opens_thinking(row.problem.prefill) and row.style is not None]
        if not rows:
            return
        row = rows[0]
        thought = THOUGHT if row.style is None else row.style.thought
        again = Attempt(row.problem, f"<think>\n{thought}\n</think>\n{row.mark(row.gold.text)}")
        (doubled,) = self.score([again])
        merits = bench.merit(bench.right_of(row)), bench.merit(doubled)
        if merits[0] is not None and merits[1] is not None and merits[1] > merits[0] + TOLERANCE:
            better = [n for n in bench.pool.names if (doubled.scores[n] or 0) > (bench.right_of(row).scores[n] or 0)]
            declared = any(bench.declarations[n].kind in ("correctness", "format") for n in better)
            self.add(
                "FAIL" if declared else "WARN",
                f"the chat template already writes {shorten(row.problem.prefill)}, and {', '.join(better)} still asks "
                "for <think> in the completion; a completion that goes on from there needs the same mark",
                "read the keyword `prefill` in the function (docs/rewards.md), or use `think_format`",
                row.problem.id, row.right,
            )  # fmt: skip
            return
        self.passed.append("a completion that goes on from the prefilled <think> is recognised")

    def _differs(self) -> bool:
        rewards = [one.reward for one in self.seen if one.reward is not None]
        return bool(rewards) and max(rewards) - min(rewards) > TOLERANCE

    def _constant(self) -> None:
        rewards = [one.reward for one in self.seen if one.reward is not None]
        if not rewards or self._differs():
            if rewards:
                self.passed.append(
                    f"rewards differ: {min(rewards):g} to {max(rewards):g} on {len(rewards)} completions"
                )
            return
        if any(c.severity == "FAIL" for c in self.complaints):
            return
        one = self.seen[0]
        among = ", right answers among them," if self.bench.rows else ""
        self.add(
            "WARN" if self.starting else "FAIL",
            f"all {len(rewards)} completions that were tried{among} get {rewards[0]:g}; without differences nothing is "
            "learned",
            "look at what the functions return; if they ask for a form of answers that was not tried, --known-good of "
            "strop rewards check takes completions in it",
            one.rollout.problem.id, one.rollout.text,
        )  # fmt: skip


def _is_late(scored: ScoredRollout) -> bool:
    return any("past the limit" in reason for reason in scored.failures.values())


def _why(scored: ScoredRollout) -> str:
    return next(iter(f"`{n}` {r}" for n, r in scored.failures.items()), "no function with a weight applies")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _number(value: float | None) -> str:
    return "nothing" if value is None else f"{value:g}"
