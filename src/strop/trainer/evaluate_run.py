"""`strop eval`: a config's model as it is, or the newest checkpoint of a run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from ..config_load import load_config
from ..errors import CheckpointError, ConfigError
from ..monitor.progress import Progress
from ..monitor.summary import EvalSummary
from ..policy.optim import load_weights
from .checkpoint import Checkpoint, read_latest
from .evaluate import eval_requests, evaluate
from .parts import build, make_pool, prepare
from .session import OPTIMIZER_FILE
from .shortage import shortage_told


def evaluate_target(target: Path, overrides: Sequence[str]) -> EvalSummary:
    """Evaluate a run folder or a config file. Raises a StropError when there is nothing to evaluate."""
    checkpoint = _checkpoint(target) if target.is_dir() else None
    config = load_config(target / "config.resolved.yaml" if checkpoint else target, overrides)
    prepared = prepare(config)
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(stall_warning_s=config.run.stall_warning_s))
        pool = stack.enter_context(make_pool(config, prepared.task.default_rewards, note=progress.note))
        with shortage_told("load"):
            parts = stack.enter_context(build(prepared, pool, progress.note))
        if checkpoint is not None:
            with shortage_told("restore"):
                load_weights(parts.policy.trainable, checkpoint.tensors(OPTIMIZER_FILE))
                parts.weights.publish()
            parts.weights.version = checkpoint.step
            progress.say(f"evaluating {checkpoint.path}")
        with progress.phase("evaluate", total=len(eval_requests(parts))), shortage_told("evaluate", resumable=False):
            result = evaluate(parts, lambda rollout: progress.advance(), progress.tick)
    if result is None:
        raise ConfigError(
            "run.eval_num_problems is 0, so there is nothing to evaluate", hint="run.eval_num_problems: set it"
        )
    return result


def _checkpoint(folder: Path) -> Checkpoint:
    checkpoint = read_latest(folder) if (folder / "config.resolved.yaml").is_file() else None
    if checkpoint is None:
        raise CheckpointError(
            f"`{folder}` is not a run folder with a checkpoint",
            hint="give the folder of a run, or a config whose model.path is the model to measure",
        )
    return checkpoint
