"""The loop. Each line takes a record and returns a richer one; everything else is set-up.

Problem -> Request -> Rollout -> ScoredRollout -> Sample -> MicroBatch -> StepStats
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import Config
from ..config_load import load_config
from ..errors import DivergenceError, MemoryExhaustedError
from ..objective.packing import pack
from ..objective.samples import make_samples
from ..objective.schedule import learning_rate
from ..seeding import rollout_requests
from ..types import Request
from .evaluate import finishing_order
from .opening import open_session
from .parts import length_shaping
from .session import Session
from .update import update


def train(
    config: Config | Mapping[str, Any] | str | Path, *, out: str | Path | None = None, resume: bool = False
) -> dict[str, Any]:
    """Train a run and return the content of its summary.json.

    `config` is a Config, a mapping or a YAML file; `out` the run folder (default: `run.out`, else runs/NAME of the
    file, else runs/run). With `resume` the newest checkpoint in it is continued. Raises a StropError with a hint for
    anything that the user can change.
    """
    checked = load_config(config)
    name = Path(config).stem if isinstance(config, str | Path) else "run"
    folder = Path(out or checked.run.out or Path("runs") / name)
    with open_session(checked, folder, resume=resume) as session:
        session.evaluate_before()
        try:
            while session.goes_on:
                train_step(session)
                session.checkpoint_if_due()
            return session.finish()
        except DivergenceError:
            session.summarise("diverged", None)
            raise
        except MemoryExhaustedError:
            session.save_after_shortage()
            raise


def train_step(session: Session) -> None:
    """Make one step: problems, completions, rewards, advantages, one update, new weights for the engine."""
    config, parts, step = session.config, session.parts, session.state.step
    groups = config.rollout.num_generations

    problems_P = parts.task.batch(step, config.rollout.num_prompts)
    requests_N = rollout_requests(problems_P, groups, run_seed=config.run.seed, step=step)
    with session.phase("generate", len(requests_N)):
        _generate_and_submit(session, requests_N)
    with session.phase("score", len(requests_N)):
        finished = parts.pool.collect()
        order = finishing_order(finished, requests_N)
        scored_N = [finished[i] for i in order]
        extras = {name: [column[i] for i in order] for name, column in parts.pool.take_extras().items()}
    with session.phase("pack"):
        batch = make_samples(
            scored_N,
            groups,
            loss_type=config.objective.loss_type,
            scale_rewards=config.objective.scale_rewards,
            max_completion_length=config.rollout.max_completion_length,
            mask_truncated_completions=config.objective.mask_truncated_completions,
            keep_groups_without_signal=config.objective.beta > 0,
            shaping=length_shaping(config),
        )
        tokens = session.limit.within(parts.plan.micro_batch_tokens)
        batches = pack(batch.samples, tokens, share_prompt=config.optim.share_prompt)
    with session.phase("train", len(batches)), parts.training_memory():
        stats = update(
            parts.policy, session.optimizer, batches, config.objective,
            learning_rate=_learning_rate(config, step), max_grad_norm=config.optim.max_grad_norm,
            on_batch=session.progress.advance, on_step=session.weights_change, limit=session.limit,
        )  # fmt: skip
    with session.phase("publish"):
        parts.weights.publish()
    session.record(scored_N, batch, stats, extras)


def _generate_and_submit(session: Session, requests_N: tuple[Request, ...]) -> None:
    """Hand each completion to the reward workers as it finishes, while others still decode."""
    parts = session.parts
    for rollout in parts.engine.generate(
        requests_N, parts.sampling, policy_version=parts.weights.version, progress=session.on_engine_step
    ):
        parts.pool.submit(rollout, group_size=session.config.rollout.num_generations, global_step=session.state.step)
        session.progress.advance(1, tokens=rollout.num_completion_tokens)


def _learning_rate(config: Config, step: int) -> float:
    optim = config.optim
    return learning_rate(
        step, peak=optim.learning_rate, warmup_steps=optim.warmup_steps, max_steps=config.run.max_steps,
        kind=optim.lr_scheduler_type,
    )  # fmt: skip
