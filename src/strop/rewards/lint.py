"""Refuses combinations of rewards that teach something else than they seem to, before anything is loaded.

Only declarations, weights, options and the normalisation are looked at; nothing is called and no user code is imported.
A finding is let pass by its name in `rewards.allow`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..errors import RewardError
from .contract import Declaration, declaration_of
from .library import LIBRARY
from .load import read_entries
from .options import nearest
from .sandbox import choose_wall

if TYPE_CHECKING:
    from ..config import Config

FINDINGS: Mapping[str, Literal["refuse", "warn"]] = {
    "length-without-correctness": "refuse",
    "kimi-alone": "refuse",
    "length-with-group-std": "refuse",
    "cosine-without-repetition": "refuse",
    "length-outbids-correctness": "refuse",
    "secondary-outbids-correctness": "warn",
}
"""Everything that can be found, and what happens then."""

_COSINES: Mapping[str, tuple[float, float]] = {"cosine": (0.0, 0.0), "get_cosine_scaled_reward": (-1.0, -0.5)}
"""Default ends of the wrong side, short and long."""
_RIGHT_ONLY = frozenset({"gr3", "lead", "l1_max"})
"""Length rewards that give every wrong completion 0."""
_ALPHAS: Mapping[str, float] = {"gr3": 0.33, "lead": 0.05}
_FACTORS: Mapping[str, Callable[[float], float]] = {
    "gr3": lambda alpha: 1.0 / (1.0 + 8.0 * alpha),
    "lead": lambda alpha: math.exp(-8.0 * alpha),
}
"""What a right answer is still worth at eight times the mean length, or eight deviations above it."""
_NO_NEAR_TIES = frozenset({"truncation"})
"""Length rewards that only turn right into wrong, so that a group's deviation cannot blow them up."""


@dataclass(frozen=True, slots=True)
class Term:
    """One reward function of a run."""

    name: str
    declaration: Declaration
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    builtin: str = ""
    """Its name in the library, "" for the user's own."""
    gated: bool = False
    """Whether it counts only where the completion is right."""


@dataclass(frozen=True, slots=True)
class LintFinding:
    """Something that was found."""

    id: str
    severity: Literal["refuse", "warn"]
    text: str
    hint: str

    @property
    def message(self) -> str:
        """The text with the name of the finding."""
        return f"{self.text} [{self.id}]"


def lint(terms: Sequence[Term], scale_rewards: str) -> list[LintFinding]:
    """Return what is wrong with a combination of rewards, what refuses a run first.

    The user's functions count as declared; without a declaration they are of kind `other`, which may judge answers.
    """
    found = [
        LintFinding(name, FINDINGS[name], text, hint)
        for rule in (_kimi_alone, _without_correctness, _group_std, _cosine, _outbids)
        for name, text, hint in rule([term for term in terms if term.weight != 0], scale_rewards)
    ]
    return sorted(found, key=lambda finding: finding.severity != "refuse")


_Found = Iterator[tuple[str, str, str]]


def _named(terms: Sequence[Term]) -> str:
    return ", ".join(f"`{term.name}`" for term in terms)


def _of_kind(terms: Sequence[Term], *kinds: str) -> list[Term]:
    return [term for term in terms if term.declaration.kind in kinds]


def _without_correctness(terms: Sequence[Term], scale: str) -> _Found:
    lengths = _of_kind(terms, "length")
    if lengths and not _of_kind(terms, "correctness", "other"):
        yield (
            "length-without-correctness",
            f"{_named(lengths)} rewards length while nothing with a weight says which answers are right, so that short "
            "becomes all that counts",
            "rewards.funcs: add a correctness function, such as numeric, exact, math or python_tests",
        )


def _kimi_alone(terms: Sequence[Term], scale: str) -> _Found:
    if terms and all(term.builtin == "kimi" for term in terms):
        yield (
            "kimi-alone",
            "`kimi` is the only reward; alone it puts a short wrong answer (0) above a long right one (-0.5)",
            "rewards.funcs: add a correctness function; kimi is a term to be added to it",
        )


def _group_std(terms: Sequence[Term], scale: str) -> _Found:
    lengths = [term for term in _of_kind(terms, "length") if term.builtin not in _NO_NEAR_TIES]
    if lengths and scale == "group":
        yield (
            "length-with-group-std",
            f"{_named(lengths)} rewards length while objective.scale_rewards is group: where all answers of a group "
            "are right, or all are wrong, length is all that differs, and the division by the group's deviation makes "
            "that count as much as right against wrong",
            "objective.scale_rewards: batch or none; or, instead of the reward, rewards.length_shaping: polarity_bonus",
        )


def _wrong_side(term: Term) -> tuple[float, float]:
    """Return what a cosine gives wrong answers, short and long."""
    short, long = _COSINES[term.builtin]
    return float(term.options.get("min_value_wrong", short)), float(term.options.get("max_value_wrong", long))


def _cosine(terms: Sequence[Term], scale: str) -> _Found:
    repetition = [t for t in _of_kind(terms, "repetition") if t.weight * (t.declaration.high - t.declaration.low) > 0]
    for term in terms:
        if term.builtin not in _COSINES or repetition:
            continue
        short, long = _wrong_side(term)
        if term.weight * (long - short) > 0:
            yield (
                "cosine-without-repetition",
                f"`{term.name}` pays wrong answers for being long ({short:g} short, {long:g} long) and nothing makes "
                "repetition cost, so that a model that is lost learns to repeat itself",
                f"rewards.funcs: add ngram_repetition; or rewards.options.{term.name}: {{min_value_wrong: {long:g}, "
                f"max_value_wrong: {long:g}}}",
            )


def _ends(term: Term) -> tuple[float, float]:
    """Return the least that a term adds to a right completion and the most that it adds to a wrong one."""
    weight, low, high = term.weight, term.declaration.low, term.declaration.high
    right = wrong = (weight * low, weight * high)
    if term.builtin == "soft_overlong":
        right = wrong = (0.0, -weight * float(term.options.get("factor", 0.5)))
    elif term.builtin == "kimi":
        wrong = (weight * low, 0.0)
    elif term.builtin in _FACTORS:
        right = (0.0, weight * (_FACTORS[term.builtin](float(term.options.get("alpha", _ALPHAS[term.builtin]))) - 1.0))
    elif term.builtin in _COSINES:
        shift = 1.0 if term.builtin == "cosine" else 0.0
        ends = (("min_value_correct", 0.5), ("max_value_correct", 1.0))
        first, second = (weight * (float(term.options.get(key, value)) - shift) for key, value in ends)
        short, long = _wrong_side(term)
        right, wrong = (first, second), (weight * short, weight * long)
    elif term.builtin in _NO_NEAR_TIES:
        right = wrong = (0.0, 0.0)  # a right answer that it touches counts as wrong
    if term.gated or term.builtin in _RIGHT_ONLY:
        wrong = (0.0, 0.0)
    return min(right), max(wrong)


def _margin(right: Sequence[Term], others: Sequence[Term]) -> float:
    """Return how far the worst right completion is above the best wrong one, which misses one function of `right`."""
    decided = min(term.weight * (term.declaration.high - term.declaration.low) for term in right)
    return decided + sum(low - high for low, high in map(_ends, others))


def _outbids(terms: Sequence[Term], scale: str) -> _Found:
    right = _of_kind(terms, "correctness")
    if not right:
        return
    for term in _of_kind(terms, "length"):
        if _margin(right, [term]) < -1e-9:
            yield (
                "length-outbids-correctness",
                f"`{term.name}` can put a wrong answer above a right one: its values differ by more than those of "
                f"{_named(right)}",
                "rewards.weights: lower that of the length reward until correctness decides",
            )
    others = [term for term in terms if term not in right and (term.builtin or term.declaration != Declaration())]
    if others and _margin(right, others) < 1e-9:
        yield (
            "secondary-outbids-correctness",
            f"{_named(others)} together reach what {_named(right)} is worth, so that a wrong answer can earn as much "
            "as a right one",
            "rewards.weights: give correctness more than all others together, or name the others in rewards.gated",
        )


def terms_of(
    funcs: Sequence[str],
    weights: Sequence[float] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    gated: Sequence[str] | None = None,
    declared: Mapping[str, Declaration] | None = None,
) -> list[Term]:
    """Return the terms of entries of `rewards.funcs`; `declared` are declarations of user functions, where known.

    `gated` None means those of kind `format`, where a correctness function has a weight. Raises RewardError for an
    entry that cannot be read.
    """
    terms: list[Term] = []
    specs = read_entries(funcs)
    for spec, weight in zip(specs, weights or (1.0,) * len(specs), strict=True):
        builtin = spec.target if spec.kind == "builtin" else ""
        declaration = declaration_of(LIBRARY[builtin]) if builtin else (declared or {}).get(spec.name, Declaration())
        terms.append(Term(spec.name, declaration, weight, (options or {}).get(spec.name, {}), builtin))
    judged = any(term.declaration.kind == "correctness" and term.weight != 0 for term in terms)
    if gated is None:
        gated = [term.name for term in terms if judged and term.declaration.kind == "format"]
    return [Term(t.name, t.declaration, t.weight, t.options, t.builtin, t.name in gated) for t in terms]


def check_rewards(
    config: Config, default_funcs: Sequence[str], declared: Mapping[str, Declaration] | None = None
) -> list[str]:
    """Check the rewards of a run and return warnings, one sentence each.

    Raises RewardError for the first finding that refuses the run and is not in `rewards.allow`, for a name in there
    that is no finding, and where programs are to be run that this machine cannot isolate.
    """
    rewards = config.rewards
    for name in rewards.allow:
        if name not in FINDINGS:
            raise RewardError(
                f"rewards.allow: `{name}` is not a finding",
                hint=nearest(name, FINDINGS) or f"findings: {', '.join(FINDINGS)}",
            )
    terms = terms_of(rewards.funcs or default_funcs, rewards.weights, rewards.options, rewards.gated, declared)
    warnings: list[str] = []
    for finding in lint(terms, config.objective.scale_rewards):
        if finding.id in rewards.allow:
            continue
        if finding.severity == "refuse":
            raise RewardError(finding.message, hint=f"{finding.hint}; or rewards.allow: [{finding.id}] if you mean it")
        warnings.append(f"{finding.message}; {finding.hint}")
    for term in terms:
        if term.builtin == "python_tests" and choose_wall(unsafe=bool(term.options.get("unsafe"))) == "none":
            warnings.append("`python_tests` runs programs that the model writes without isolation, as you asked for")
    return warnings
