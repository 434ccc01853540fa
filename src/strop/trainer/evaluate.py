"""pass@1 and pass@k on held-out problems, through the engine and the rewards of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..errors import RewardError
from ..monitor.summary import EvalSummary
from ..seeding import rollout_requests
from ..types import Request, Rollout, ScoredRollout
from .parts import Parts


class UnscoredError(RewardError):
    """Not one completion of an evaluation could be scored."""


def finishing_order(scored: Sequence[ScoredRollout], requests: Sequence[Request]) -> list[int]:
    """Return, for each request, the index into what came back in the order it finished."""
    assert len(scored) == len(requests), f"{len(scored)} completions for {len(requests)} requests"
    found = {(s.rollout.problem.id, s.rollout.sample_index): i for i, s in enumerate(scored)}
    return [found[request.problem.id, request.sample_index] for request in requests]


def in_order(scored: Sequence[ScoredRollout], requests: Sequence[Request]) -> list[ScoredRollout]:
    """Put what came back in the order it finished into the order it was asked for."""
    return [scored[i] for i in finishing_order(scored, requests)]


def eval_requests(parts: Parts) -> tuple[Request, ...]:
    """Return k requests per held-out problem; none when evaluation is off.

    Seeds depend on the problem and the sample alone, so two evaluations of one run compare the same draws. Greedy
    evaluation takes k = 1.
    """
    run = parts.config.run
    if run.eval_num_problems == 0:
        return ()
    return rollout_requests(
        parts.task.held_out(run.eval_num_problems), num_samples(parts), run_seed=run.seed, step=0, purpose="eval"
    )


def num_samples(parts: Parts) -> int:
    """Return k of pass@k."""
    run = parts.config.run
    return 1 if run.eval_temperature == 0 else run.eval_num_generations


def evaluate(
    parts: Parts,
    on_finished: Callable[[Rollout], None] = lambda rollout: None,
    tick: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
) -> EvalSummary | None:
    """Sample k completions per held-out problem and score them; None when evaluation is off or `stop` says so.

    pass@k is the share of problems with at least one right completion among the k; right is `ScoredRollout.correct`. A
    completion without a verdict counts neither way; a problem with none is left out. Raises UnscoredError when there is
    none at all.
    """
    requests = eval_requests(parts)
    if not requests:
        return None
    sampling = replace(parts.sampling, temperature=parts.config.run.eval_temperature)

    def progress(unfinished: int, running: int) -> None:
        parts.pool.pump()
        tick()

    for rollout in parts.engine.generate(requests, sampling, policy_version=parts.weights.version, progress=progress):
        if stop():
            parts.pool.discard()
            return None
        parts.pool.submit(rollout, group_size=num_samples(parts))
        on_finished(rollout)
    return summarise(in_order(parts.pool.collect(), requests), num_samples(parts))


def summarise(scored_N: Sequence[ScoredRollout], k: int) -> EvalSummary:
    """Return pass@1 and pass@k of groups of k. Raises UnscoredError when nothing at all was scored."""
    verdicts = [[s.correct for s in scored_N[i : i + k]] for i in range(0, len(scored_N), k)]
    known = [[v for v in group if v is not None] for group in verdicts]
    known = [group for group in known if group]
    if not known:
        failures = next((f"{n}: {r}" for s in scored_N for n, r in s.failures.items()), "nothing says what is right")
        raise UnscoredError(
            f"not one of {len(scored_N)} completions of the evaluation could be scored ({failures})",
            hint="rewards.funcs: mend it, or add one that says what is right; rewards.timeout_s, if it ran out "
            "of time; run.eval_num_problems: 0 to train without a measurement",
        )
    flat = [v for group in known for v in group]
    return EvalSummary(
        pass_at_1=sum(flat) / len(flat), pass_at_k=sum(map(any, known)) / len(known), k=k, problems=len(known)
    )
