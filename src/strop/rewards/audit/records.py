"""What the check and the audit know of a run, and the completions that they make up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...config import RewardsConfig
from ...types import Problem, ScoredRollout
from .reference import Gold, Style

Advantages = Callable[[Sequence[ScoredRollout], int], Sequence[float | None]]
"""(scored rollouts in groups, group size) -> the advantages that the run would train with."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A run as far as rewards see it."""

    config: RewardsConfig
    default_funcs: tuple[str, ...]
    problems: tuple[Problem, ...]
    encode: Callable[[str], Sequence[int]]
    """The tokenizer, without special tokens."""
    stop_token_id: int
    max_completion_length: int
    num_generations: int
    num_prompts: int = 1
    max_steps: int | None = None
    scale_rewards: str = "none"
    """What advantages are divided by; for the lint."""
    advantages: Advantages | None = None
    """None: probes of the group's advantages are skipped."""
    seed: int = 0
    gold_column: str | None = None
    sure_columns: frozenset[str] = frozenset()
    """Columns that no row of the run leaves empty, since the task refuses such rows."""
    known_good: dict[str, str] = field(default_factory=dict[str, str])
    """Completions that are known to be right, by problem id."""
    note: Callable[[str], None] = lambda text: None
    """Takes what loading the functions has to say."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A completion that somebody might write."""

    problem: Problem
    text: str
    truncated: bool = False
    """Whether it ran into the token limit: no stop token at its end."""
    seed: int = 0

    @property
    def key(self) -> tuple[str, str, bool, int]:
        """What tells it apart from others of the same rows."""
        return self.problem.id, self.text, self.truncated, self.seed


@dataclass(frozen=True, slots=True)
class Row:
    """A problem with completions whose worth is known."""

    problem: Problem
    gold: Gold
    style: Style | None
    """None for a known-good completion, which is in no style of ours."""
    right: str
    wrong: str

    def write(self, answer: str, thought: str | None = None) -> str:
        """Return a completion with another answer, in the same form."""
        if self.style is None:
            return answer
        prefill = self.problem.prefill
        return self.style.write(answer, prefill) if thought is None else self.style.write(answer, prefill, thought)

    @property
    def style_name(self) -> str:
        """Name of the form, for messages."""
        return "known-good completion" if self.style is None else self.style.name

    def mark(self, answer: str) -> str:
        """Return an answer with what the form puts around it, without any reasoning."""
        return answer if self.style is None else f"{self.style.before}{answer}{self.style.after}"
