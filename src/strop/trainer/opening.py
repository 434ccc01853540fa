"""Opening a run: its folder, its parts, its newest checkpoint when it goes on; what can fail cheaply comes first."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..config import Config
from ..errors import RunError
from ..monitor.metrics import MetricsLog
from ..monitor.progress import Progress
from ..monitor.rollouts import RolloutStore
from ..monitor.trackers import Trackers
from ..policy.optim import Optimizer, make_optimizer
from ..rewards.lint import check_rewards
from .checkpoint import Checkpoint, read_latest
from .interrupt import Interrupt
from .parts import Parts, build, length_shaping, make_pool, prepare
from .rewards_command import check_before_training
from .runfolder import open_run_folder
from .session import LIMIT_FILE, OPTIMIZER_FILE, Session
from .shortage import shortage_told
from .state import RunState
from .update import MicroBatchLimit
from .watch import DIAGNOSES_FILE, open_watch


@contextmanager
def open_session(config: Config, out: Path, *, resume: bool) -> Iterator[Session]:
    """Build a run, restore its newest checkpoint when resuming, and close everything at the end."""
    started = time.monotonic()
    with ExitStack() as stack:
        folder = stack.enter_context(open_run_folder(out, config, resume=resume))
        progress = stack.enter_context(Progress(stall_warning_s=config.run.stall_warning_s))
        interrupt = stack.enter_context(Interrupt(progress.say))
        for notice in folder.notices:
            progress.note(notice)
        (folder.path / "summary.json").unlink(missing_ok=True)  # of an earlier stop
        with progress.phase("start"):
            checkpoint = read_latest(folder.path) if resume else None
            prepared = prepare(config, checkpoint.state["promise"] if checkpoint else None)
            for warning in check_rewards(config, prepared.task.default_rewards):
                progress.note(warning)
            for line in [*prepared.plan.lines(), *map(str, filter(None, [length_shaping(config)]))]:
                progress.say(line)
            folder.write_json("plan.json", prepared.plan.as_dict())
            for notice in folder.write_environment(threads=prepared.plan.threads):
                progress.note(notice)
            verdicts = folder.path / "verdicts.jsonl"
            pool = stack.enter_context(make_pool(config, prepared.task.default_rewards, verdicts, progress.note))
            if checkpoint is None:
                check_before_training(prepared, progress.note, progress.say)
            with progress.phase("load"), shortage_told("load"):
                parts = stack.enter_context(build(prepared, pool, progress.note))
            if parts.plan is not prepared.plan:  # planned again while it was built, and said so
                folder.write_json("plan.json", parts.plan.as_dict())
            with shortage_told("optimizer"):
                optimizer = make_optimizer(parts.policy.trainable, config.optim)
            state = _restore(checkpoint, parts, optimizer, progress) if checkpoint else RunState()
            tokens = _limit(checkpoint, folder.path)
            if tokens is not None and tokens < parts.plan.micro_batch_tokens:
                progress.note(
                    f"micro-batches stay at most {tokens} tokens long: the card ran out of memory on longer ones"
                )
            pool.wait_ready()
            last_step = state.step - 1 if resume else None
            metrics = stack.enter_context(MetricsLog(folder.metrics_path, resume_step=last_step))
            diagnoses = stack.enter_context(MetricsLog(folder.path / DIAGNOSES_FILE, resume_step=last_step))
            stored = checkpoint.state.get("monitor", {}) if checkpoint else None
            watch = open_watch(config, folder.path, parts, diagnoses, stored)
            watch.remind(progress)
            rollouts = RolloutStore(folder.rollouts_path)
            if resume:
                rollouts.truncate_after(last_step)
            trackers = Trackers(config.run.report_to, folder.tensorboard_path, last_step)
            stack.callback(trackers.close)
            progress.start_at(state.step, config.run.max_steps)
        session = Session(
            config, parts, optimizer, folder, progress, interrupt, metrics, rollouts, trackers, watch, state,
            saved_step=checkpoint.step if checkpoint else -1, started=started,
            limit=MicroBatchLimit(tokens, note=progress.note),
        )  # fmt: skip
        if watch.canary is not None:
            session.check_canary()
        yield session


def _limit(checkpoint: Checkpoint | None, folder: Path) -> int | None:
    """Return the longest micro-batch that memory allowed so far: as the checkpoint says, or the run's last end."""
    found = [checkpoint.state.get("micro_batch_limit")] if checkpoint else []
    if (folder / LIMIT_FILE).is_file():
        try:
            found.append(int(json.loads((folder / LIMIT_FILE).read_text())["micro_batch_tokens"]))
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise RunError(
                f"`{folder / LIMIT_FILE}` cannot be read: {e!r}", hint="remove it; the run then finds out again"
            ) from e
    return min((tokens for tokens in found if tokens is not None), default=None)


def _restore(checkpoint: Checkpoint, parts: Parts, optimizer: Optimizer, progress: Progress) -> RunState:
    for message in checkpoint.skipped:
        progress.note(message)
    with shortage_told("restore"):
        optimizer.load_state_dict(checkpoint.tensors(OPTIMIZER_FILE))
        parts.weights.publish()
    state = RunState.from_dict(checkpoint.state)
    parts.weights.version = state.step
    before, now = checkpoint.state["promise"], parts.plan.promise()
    # A checkpoint of an earlier version lacks numbers that nothing was planned for yet.
    changed = [f"{key} {before[key]} -> {now[key]}" for key in now if key in before and before[key] != now[key]]
    if changed:
        progress.note(f"the run goes on, but not bit-equal to an uninterrupted one: {', '.join(changed)}")
    versions = parts.pool.versions()
    known: dict[str, str] = checkpoint.state.get("reward_versions", versions)
    if rewritten := [name for name, version in versions.items() if known.get(name) != version]:
        progress.note(f"reward functions changed since the checkpoint, so rewards may: {', '.join(rewritten)}")
    progress.say(f"resumed at step {state.step} from {checkpoint.path.name}")
    if state.step >= parts.config.run.max_steps:
        progress.note(f"run.max_steps is {parts.config.run.max_steps}: there is no step left to make")
    return state
