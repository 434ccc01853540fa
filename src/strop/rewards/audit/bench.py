"""What probes work with: the run's rewards, its rows, and for each row a right completion and a wrong one.

Completions are scored by a reward pool of the run's own configuration, so that limits, weights and gating are those of
the run. Nothing is sampled and no weights are loaded.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import StropError
from ...seeding import derive_seed
from ...types import Problem, Rollout, ScoredRollout, Segment
from ..combine import Rules, make_rules
from ..contract import Declaration
from ..lint import lint, terms_of
from ..pool import RewardPool
from .filler import filler
from .records import Attempt, Row, Setting
from .reference import THOUGHT, Gold, Style, golds_of, styles_for

if TYPE_CHECKING:
    from .laboratory import Laboratory

TOLERANCE = 1e-9
"""Rewards that differ by less are equal."""
MIN_ENCODED_CHARS, CHARS_PER_TOKEN = 1 << 14, 8
"""Characters that are tokenised of a text longer than any completion of the run."""
NEARLY = 0.05
"""Forms whose rewards differ by less than this part of the whole range are equally good: the first one is taken."""
PRINTED_BYTES = 2000
"""What is shown of that which functions printed, where they broke down."""
STYLE_ROWS = 4
"""Rows on which the form of the answer is found."""


@contextmanager
def open_pool(setting: Setting) -> Iterator[RewardPool]:
    """Yield a started pool of the run's configuration without a log of verdicts.

    What functions print about made-up completions is dropped, but for its end where the pool breaks down: it may say
    why.
    """
    with tempfile.TemporaryDirectory(prefix="strop-check-") as folder:
        printed = Path(folder) / "printed"
        try:
            with RewardPool(
                setting.config,
                default_funcs=setting.default_funcs,
                output=printed,
                max_completion_length=setting.max_completion_length,
                max_steps=setting.max_steps,
                note=setting.note,
            ) as pool:
                yield pool
        except StropError:
            if printed.exists():
                end = printed.read_bytes()[-PRINTED_BYTES:].decode("utf-8", "replace")
                print(end, end="" if end.endswith("\n") or not end else "\n", file=sys.stderr)
            raise


class Bench:
    """Scores attempts and knows what right and wrong completions earn."""

    def __init__(self, setting: Setting, pool: RewardPool) -> None:
        """`pool` is started and used for nothing else meanwhile; it has no verdict log."""
        self.setting, self.pool = setting, pool
        self.failures: Counter[str] = Counter()
        """Reasons of unscored completions, over everything that was scored."""
        self.num_scored = 0
        self.num_unscored = 0
        """Completions that a failure left without a reward."""
        self.rows: tuple[Row, ...] = ()
        schema = setting.config.options.get("json_schema", {}).get("schema")
        self.golds = golds_of(setting.problems, setting.gold_column, setting.known_good, schema)
        self._known: dict[tuple[str, str, bool, int], ScoredRollout] = {}
        self._row_of: dict[str, Row] = {}
        self._right: dict[str, ScoredRollout] = {}
        self._wrong: dict[str, ScoredRollout] = {}
        self.tried: tuple[str, ...] = ()
        """Names of the styles that were tried for right answers."""
        self.lab_tasks: frozenset[str] = frozenset()
        """What the probes of this audit will ask of the lab, which does it in one process."""
        self._lab: Laboratory | None = None

    @property
    def lab(self) -> Laboratory:
        """The process of its own in which functions are watched; started when first asked."""
        if self._lab is None:
            from .laboratory import Laboratory

            self._lab = Laboratory(self)
        return self._lab

    @contextmanager
    def with_limit(self, seconds: float) -> Iterator[Bench]:
        """Yield a bench with the same references whose workers have another time limit."""
        config = self.setting.config.model_copy(update={"timeout_s": seconds})
        setting = replace(self.setting, config=config)
        with open_pool(setting) as pool:
            other = copy.copy(self)
            other.setting, other.pool, other._known = setting, pool, {}
            yield other
            self.num_scored, self.num_unscored = other.num_scored, other.num_unscored

    @cached_property
    def declarations(self) -> dict[str, Declaration]:
        """What each function declares, by name."""
        return self.pool.declarations()

    @cached_property
    def rules(self) -> Rules:
        """Which functions decide what is right, and which count only then."""
        return make_rules(self.pool.names, self.pool.weights, self.declarations, self.setting.config.gated)

    def names_of(self, *kinds: str) -> list[str]:
        """Return the functions with a weight that are of one of these kinds."""
        weighted = zip(self.pool.names, self.pool.weights, strict=True)
        return [name for name, weight in weighted if weight != 0 and self.declarations[name].kind in kinds]

    @property
    def forms_tried(self) -> str:
        """The forms in which right answers were tried, in a few words."""
        pairs = [name.rpartition(", ") for name in self.tried]
        forms = dict.fromkeys(form or mode for form, _, mode in pairs)
        modes = dict.fromkeys(mode.removesuffix(" reasoning") for form, _, mode in pairs if form)
        said = ", ".join(forms) or "the known-good completion"
        return f"{said}; each with {', '.join(modes)} reasoning" if modes else said

    @property
    def deciding(self) -> list[str]:
        """Functions that decide what is right: those declared `correctness`, else those of kind `other`."""
        return list(self.rules.marks)

    @property
    def has_group_functions(self) -> bool:
        """Whether a function with a weight sees whole groups."""
        return any(self.declarations[name].scope == "group" for name in self.weights if self.weights[name] != 0)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each function by name."""
        return dict(zip(self.pool.names, self.pool.weights, strict=True))

    def lint(self, *, only_new: bool = False) -> list[dict[str, str]]:
        """Return what the lint says: id, severity, said, advice; what `rewards.allow` names is reported only.

        `only_new`: without what it says before the user's functions are loaded and their declarations are known.
        """
        config, scale = self.setting.config, self.setting.scale_rewards
        arguments = (config.funcs or self.setting.default_funcs, config.weights, config.options, config.gated)
        known = {found.id for found in lint(terms_of(*arguments), scale)} if only_new else set[str]()
        graded = {"refuse": "FAIL", "warn": "WARN"}
        return [
            {
                "id": found.id,
                "severity": "REPORT" if found.id in config.allow else graded[found.severity],
                "said": found.message,
                "advice": found.hint,
            }
            for found in lint(terms_of(*arguments, self.declarations), scale)
            if found.id not in known
        ]

    def score(self, attempts: Iterable[Attempt]) -> list[ScoredRollout]:
        """Score completions, each on its own; where functions see groups, beside one right and one wrong completion."""
        listed = list(attempts)
        new = list({a.key: a for a in listed if a.key not in self._known}.values())
        if self.has_group_functions:
            groups = [[attempt, *self._companions(attempt.problem)] for attempt in new]
            results = [group[0] for group in self.score_groups(groups)]
        else:
            results = self._score_all([[attempt] for attempt in new])
        self._known.update(zip((a.key for a in new), results, strict=True))
        return [self._known[attempt.key] for attempt in listed]

    def score_padded(self, groups: Sequence[Sequence[Attempt]]) -> list[list[ScoredRollout]]:
        """Score groups of completions with filler in them: repetition is left out of their rewards."""
        if not self.has_group_functions:  # then a group is nothing but its members, which may be known
            flat = iter(self.score(attempt for group in groups for attempt in group))
            scored = [[next(flat) for _ in group] for group in groups]
        else:
            scored = self.score_groups(groups)
        return [[self.without_repetition(one) for one in group] for group in scored]

    def score_groups(self, groups: Sequence[Sequence[Attempt]]) -> list[list[ScoredRollout]]:
        """Score completions that stand in one group; all groups of one size."""
        flat = iter(self._score_all(groups))
        return [[next(flat) for _ in group] for group in groups]

    def _score_all(self, groups: Sequence[Sequence[Attempt]]) -> list[ScoredRollout]:
        try:
            for group in groups:
                for index, attempt in enumerate(group):
                    self.pool.submit(self.rollout(attempt, index), group_size=len(group), global_step=0)
                self.pool.pump()
            scored = self.pool.collect()
        except BaseException:
            self.pool.discard()
            raise
        self.num_scored += len(scored)
        self.num_unscored += sum(one.reward is None and bool(one.failures) for one in scored)
        for one in scored:
            self.failures.update(f"{name}: {reason}" for name, reason in one.failures.items())
        return scored

    def rollout(self, attempt: Attempt, index: int = 0) -> Rollout:
        """Return the rollout that an engine would have made of this completion."""
        problem, setting = attempt.problem, self.setting
        token_ids = tuple(self.encode(attempt.text))
        if not attempt.truncated:
            token_ids += (setting.stop_token_id,)
        prompt = problem.prompt_token_ids
        return Rollout(
            problem=problem,
            sample_index=index,
            segments=(
                Segment("prompt", prompt, (False,) * len(prompt)),
                Segment("sampled", token_ids, (True,) * len(token_ids), (0.0,) * len(token_ids)),
            ),
            text=attempt.text,
            finish_reason="length" if attempt.truncated else "stop",
            policy_version=0,
            seed=derive_seed("audit", problem.id, attempt.text, attempt.seed),
        )

    def encode(self, text: str) -> Sequence[int]:
        """Tokenise a completion; half a surrogate pair, which no model writes, counts as a question mark."""
        most = max(MIN_ENCODED_CHARS, CHARS_PER_TOKEN * self.setting.max_completion_length)
        return self.setting.encode(text[:most].encode("utf-8", "replace").decode())

    def length(self, text: str) -> int:
        """Return the number of tokens of a completion, without a stop token."""
        return len(self.encode(text))

    def merit(self, scored: ScoredRollout) -> float | None:
        """Return the reward without length and repetition, which have probes of their own; None if unscored."""
        return self._without(scored, "length", "repetition")

    def without_repetition(self, scored: ScoredRollout) -> ScoredRollout:
        """Return the scores with a reward that leaves repetition out: made-up filler repeats more than prose does."""
        return replace(scored, reward=self._without(scored, "repetition"))

    def _without(self, scored: ScoredRollout, *kinds: str) -> float | None:
        """A gated function gave nothing to a completion that is not right."""
        if scored.reward is None:
            return None
        apart = 0.0
        for name in self.names_of(*kinds):
            value = scored.scores[name]
            if value is not None and (scored.correct or name not in self.rules.gated):
                apart += self.weights[name] * value
        return scored.reward - apart

    def restrict_to(self, problems: Sequence[Problem]) -> None:
        """Leave out the other problems; before references are looked for."""
        kept = {problem.id for problem in problems}
        self.golds = [g for p, g in zip(self.setting.problems, self.golds, strict=True) if p.id in kept]
        self.setting = replace(self.setting, problems=tuple(p for p in self.setting.problems if p.id in kept))

    def find_references(self) -> None:
        """Find, for each row, the form in which its right answer earns most; needed by most probes."""
        todo = [(p, g) for p, g in zip(self.setting.problems, self.golds, strict=True) if g is not None]
        whole = [Row(p, g, None, g.text, g.wrong) for p, g in todo if g.kind == "completion"]
        answers = [(p, g) for p, g in todo if g.kind != "completion"]
        rows = [*whole, *(self._styled_rows(answers) if answers else [])]
        order = {problem.id: i for i, problem in enumerate(self.setting.problems)}
        self.rows = tuple(sorted(rows, key=lambda row: order[row.problem.id]))
        self._row_of = {row.problem.id: row for row in self.rows}
        rights = self.score(Attempt(row.problem, row.right) for row in self.rows)
        wrongs = self.score(Attempt(row.problem, row.wrong) for row in self.rows)
        self._right = {row.problem.id: s for row, s in zip(self.rows, rights, strict=True)}
        self._wrong = {row.problem.id: s for row, s in zip(self.rows, wrongs, strict=True)}

    def _styled_rows(self, answers: Sequence[tuple[Problem, Gold]]) -> list[Row]:
        best = self._best_style(answers[:STYLE_ROWS])
        rows = [_row(problem, gold, best) for problem, gold in answers]
        scored = self._score_alone(Attempt(row.problem, row.right) for row in rows)
        mark = max((m for s in scored if (m := self._mark(s)) is not None), default=None)
        result = []
        for row, one in zip(rows, scored, strict=True):
            if self._mark(one) != mark and not self.is_full(one):
                other = self._best_style([(row.problem, row.gold)])
                row = _row(row.problem, row.gold, other)
            result.append(row)
        return result

    def _best_style(self, answers: Sequence[tuple[Problem, Gold]]) -> Style:
        """Return the style with the most right answers and the highest rewards; stop early where all marks are full."""
        asked = self.setting.config.options.get("script_consistency", {}).get("script")
        styles = styles_for(answers[0][0], asked if isinstance(asked, str) else None)
        totals: dict[Style, tuple[int, float]] = {}
        for part in (styles[:3], styles[3:]):
            attempts = [Attempt(p, style.write(g.text, p.prefill)) for style in part for p, g in answers]
            scored = iter(self._score_alone(attempts))
            for style in part:
                ones = [next(scored) for _ in answers]
                full, merits = sum(map(self.is_full, ones)), [m for o in ones if (m := self.merit(o)) is not None]
                totals[style] = (full, round(sum(merits), 9))
            self.tried = tuple(dict.fromkeys([*self.tried, *(style.name for style in part)]))
            if any(full == len(answers) for full, _ in totals.values()):
                break
        most = max(full for full, _ in totals.values())
        merits = [merit for full, merit in totals.values() if full == most]
        enough = max(merits) - NEARLY * (max(merits) - min(merit for _, merit in totals.values()))
        return next(style for style, (full, merit) in totals.items() if full == most and merit >= enough)

    def _score_alone(self, attempts: Iterable[Attempt]) -> list[ScoredRollout]:
        """Score while no reference is known yet, each completion as a group of its own."""
        return self._score_all([[attempt] for attempt in attempts])

    def is_full(self, scored: ScoredRollout) -> bool:
        """Whether every function with a weight that judges answer or form gives its declared maximum."""
        names = self.names_of("correctness", "format", "other")
        values = [(scored.scores[name], self.declarations[name].high) for name in names]
        known = [(value, high) for value, high in values if value is not None]
        return scored.reward is not None and bool(known) and all(value >= high - TOLERANCE for value, high in known)

    def _mark(self, scored: ScoredRollout) -> tuple[bool, float] | None:
        merit = self.merit(scored)
        return None if merit is None else (bool(scored.correct), round(merit, 9))

    def _companions(self, problem: Problem) -> list[Attempt]:
        row = self._row_of.get(problem.id)
        return [] if row is None else [Attempt(problem, row.right), Attempt(problem, row.wrong, seed=1)]

    def right_of(self, row: Row) -> ScoredRollout:
        """Return the scores of a row's right completion."""
        return self._right[row.problem.id]

    def wrong_of(self, row: Row) -> ScoredRollout:
        """Return the scores of a row's wrong completion."""
        return self._wrong[row.problem.id]

    @property
    def sound_rows(self) -> tuple[Row, ...]:
        """Rows whose right completion earns more than the wrong one."""
        return tuple(row for row in self.rows if self._gap(row) > TOLERANCE)

    def _gap(self, row: Row) -> float:
        right, wrong = self.merit(self.right_of(row)), self.merit(self.wrong_of(row))
        return 0.0 if right is None or wrong is None else right - wrong

    @property
    def floor(self) -> float:
        """What a wrong answer in the right form earns at most, over the sound rows. Needs at least one of them."""
        merits = [self.merit(self.wrong_of(row)) for row in self.sound_rows]
        return max(merit for merit in merits if merit is not None)

    def padded(self, row: Row, answer: str, num_tokens: int, seed: int = 0) -> str:
        """Return a completion with this answer and about `num_tokens` more tokens of reasoning."""
        thought = THOUGHT if row.style is None else row.style.thought
        return row.write(answer, f"{thought} {self.filler(num_tokens, seed)}".strip())

    def filler(self, num_tokens: int, seed: int = 0) -> str:
        """Return plain words of about this many tokens, without numbers and without repeated phrases."""
        return filler(num_tokens, seed, self.length)


def _row(problem: Problem, gold: Gold, style: Style) -> Row:
    return Row(problem, gold, style, style.write(gold.text, problem.prefill), style.write(gold.wrong, problem.prefill))
