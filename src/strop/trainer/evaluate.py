"""pass@1 and pass@k on held-out problems, through the engine and the rewards of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..errors import RewardError
from ..monitor.summary import EvalSummary
from ..seeding import rollout_requests
from ..types import Request, Rollout, ScoredRollout
from .parts import Parts

FULL_MARK = 1.0 - 1e-6
"""A completion is right when the first reward function gives at least this."""


def in_order(scored: Sequence[ScoredRollout], requests: Sequence[Request]) -> list[ScoredRollout]:
    """Put what came back in the order it finished into the order it was asked for."""
    place = {(id(r.problem), r.sample_index): i for i, r in enumerate(requests)}
    assert len(scored) == len(requests), f"{len(scored)} completions for {len(requests)} requests"
    return sorted(scored, key=lambda s: place[id(s.rollout.problem), s.rollout.sample_index])


def evaluate(
    parts: Parts, on_finished: Callable[[Rollout], None] = lambda rollout: None, tick: Callable[[], None] = lambda: None
) -> EvalSummary | None:
    """Sample k completions per held-out problem and score them; None when evaluation is off.

    Seeds depend on the problem and the sample alone, so two evaluations of one run compare the same draws. pass@k is
    the share of problems with at least one right completion among the k. An unscored completion counts neither way;
    a problem with none scored is left out.
    """
    run = parts.config.run
    if run.eval_num_problems == 0:
        return None
    problems = parts.task.held_out(run.eval_num_problems)
    k = 1 if run.eval_temperature == 0 else run.eval_num_generations
    requests = rollout_requests(problems, k, run_seed=run.seed, step=0, purpose="eval")
    sampling = replace(parts.sampling, temperature=run.eval_temperature)

    def progress(running: int, new_tokens: int) -> None:
        parts.pool.pump()
        tick()

    def finished(rollouts: object) -> object:
        for rollout in rollouts:  # type: ignore[attr-defined]
            on_finished(rollout)
            yield rollout

    stream = parts.engine.generate(requests, sampling, policy_version=parts.weights.version, progress=progress)
    scored = in_order(parts.pool.score(finished(stream)), requests)  # type: ignore[arg-type]
    return summarise(scored, k)


def summarise(scored_N: Sequence[ScoredRollout], k: int) -> EvalSummary:
    """Return pass@1 and pass@k of groups of k. Raises RewardError when nothing at all was scored."""
    verdicts = [[correct(s) for s in scored_N[i : i + k]] for i in range(0, len(scored_N), k)]
    known = [[v for v in group if v is not None] for group in verdicts]
    known = [group for group in known if group]
    if not known:
        failures = next((f"{n}: {r}" for s in scored_N for n, r in s.failures.items()), "no function applies")
        raise RewardError(
            f"not one of {len(scored_N)} completions of the evaluation could be scored ({failures})",
            hint="rewards.funcs: see `strop rewards check CONFIG`, or rewards.timeout_s if it ran out of time",
        )
    flat = [v for group in known for v in group]
    return EvalSummary(
        pass_at_1=sum(flat) / len(flat), pass_at_k=sum(map(any, known)) / len(known), k=k, problems=len(known)
    )


def correct(scored: ScoredRollout) -> bool | None:
    """Whether the first reward function, the verdict, gives its full mark; None when it gave no value."""
    value = next(iter(scored.scores.values()))
    return None if value is None else value >= FULL_MARK
