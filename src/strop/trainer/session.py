"""A run in progress: its parts, its folder, its logs and the little state that is not a function of the step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import DivergenceError, MemoryExhaustedError, StropError
from ..monitor.metrics import MetricsLog
from ..monitor.progress import Progress
from ..monitor.rollouts import RolloutStore
from ..monitor.summary import EvalSummary, StopReason, build_summary
from ..monitor.trackers import Trackers
from ..objective.samples import SampleBatch
from ..policy import lora
from ..policy.optim import Optimizer
from ..types import Metric, ScoredRollout, StepStats, merge_metrics
from .canary import VerdictChangedError
from .checkpoint import is_complete, write_checkpoint
from .evaluate import UnscoredError, eval_requests, evaluate, num_samples
from .interrupt import Interrupt
from .parts import Parts
from .runfolder import RunFolder
from .shortage import shortage_told
from .state import RunState
from .update import MicroBatchLimit
from .watch import Watch, stopped_by

MAX_NONFINITE_STEPS = 3
OPTIMIZER_FILE = "optimizer.safetensors"
LIMIT_FILE = "micro_batch_limit.json"
"""What a run that memory ended has learned, for the checkpoint that it goes on from."""


@dataclass(slots=True)
class Session:
    """Everything the loop works with."""

    config: Config
    parts: Parts
    optimizer: Optimizer
    folder: RunFolder
    progress: Progress
    interrupt: Interrupt
    metrics: MetricsLog
    rollouts: RolloutStore
    trackers: Trackers
    watch: Watch
    state: RunState
    saved_step: int
    """Step of the newest checkpoint; -1 without one."""
    started: float
    times: dict[str, float] = field(default_factory=dict[str, float])
    """Seconds of this step by phase."""
    step_started: float = field(default_factory=time.perf_counter)
    limit: MicroBatchLimit = field(default_factory=MicroBatchLimit)
    in_step: bool = False
    """Whether weights have changed whose step is not recorded yet: they are those of no step number."""

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        """Show a phase of the step and add up its time under `time/NAME_s`.

        Raises MemoryExhaustedError when the card runs out of memory in it and nobody knew what to make smaller.
        """
        begin = time.perf_counter()
        try:
            with self.progress.phase(name, total=total), shortage_told(name):
                yield
        finally:
            self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - begin

    def on_engine_step(self, unfinished: int, running: int) -> None:
        """Keep the reward workers fed and the live view honest between decode steps."""
        self.parts.pool.pump()
        self.progress.tick()

    def evaluate(self, *, stoppable: bool) -> EvalSummary | None:
        """Evaluate on held-out problems, with progress; None when evaluation is off or the user asked to stop.

        An evaluation between steps is not `stoppable`: its result is part of the step's row of metrics.
        """
        with self.phase("evaluate", len(eval_requests(self.parts))):
            return evaluate(
                self.parts,
                lambda rollout: self.progress.advance(),
                self.progress.tick,
                lambda: stoppable and self.interrupt.requested,
            )

    def evaluate_or_say(self, *, stoppable: bool) -> EvalSummary | None:
        """Evaluate; when not one completion can be scored, say so and go on: a trained step is worth more."""
        try:
            return self.evaluate(stoppable=stoppable)
        except UnscoredError as e:
            self.progress.note(e.message)
            return None

    def evaluate_before(self) -> None:
        """Measure the untrained policy once; a resumed run takes it from its state."""
        wanted = self.config.run.eval_num_problems
        there = len(eval_requests(self.parts)) // num_samples(self.parts)
        if there < wanted:
            self.progress.note(f"run.eval_num_problems is {wanted}; {there} held-out problems are there")
        if self.state.step == 0 and self.state.eval_before is None:
            self.state.eval_before = self.evaluate(stoppable=True)
            if self.state.eval_before is not None:
                self.progress.say(f"held out before training: {shown(self.state.eval_before)}")
        self.start_clock()

    def start_clock(self) -> None:
        """Begin the first step's time here."""
        self.times.clear()
        self.step_started = time.perf_counter()

    def record(
        self, scored_N: list[ScoredRollout], batch: SampleBatch, stats: StepStats, extras: Mapping[str, list[Any]]
    ) -> None:
        """Write the finished step's metrics and rollouts, advance the step number and guard against divergence.

        An evaluation that finds no memory ends the run after all of this: the step is whole.
        """
        self.in_step = True
        shortage: MemoryExhaustedError | None = None
        step, config, state = self.state.step, self.config, self.state
        verdicts = [s.correct for s in scored_N if s.correct is not None]
        seen = self.watch.see(scored_N, batch.advantages_N)
        extra = {
            "accuracy": Metric(sum(verdicts), len(verdicts)),
            "optimizer_steps": Metric(float(stats.stepped), kind="sum"),
        }
        values = {name: m.value for name, m in merge_metrics([batch.metrics, stats.metrics, extra]).items()}
        state.step = step + 1
        state.num_tokens += sum(len(seg.token_ids) for s in scored_N for seg in s.rollout.segments)
        state.reward = values["reward"] if math.isfinite(values["reward"]) else None
        if _is_nonfinite(scored_N, stats):
            state.nonfinite_steps += 1
        elif stats.stepped:  # a step without signal says nothing, so it leaves the count alone
            state.nonfinite_steps = 0
        values |= {"num_tokens": state.num_tokens, "nonfinite_steps": state.nonfinite_steps, **seen.metrics}
        values |= self._logged_by_rewards(values)
        if config.run.eval_steps and state.step % config.run.eval_steps == 0 and state.step < config.run.max_steps:
            result = None
            try:
                result = self.evaluate_or_say(stoppable=False)
            except MemoryExhaustedError as e:
                shortage = e
            if result is not None:
                values |= {"eval_pass@1": result.pass_at_1, f"eval_pass@{result.k}": result.pass_at_k}
                self.progress.say(f"held out after step {state.step}: {shown(result)}")
        values |= self.watch.follow(step, seen, values)
        generated = sum(s.rollout.num_completion_tokens for s in scored_N)
        values |= self._timings(generated, values.get("num_trained_tokens", 0))
        self.metrics.write(step, values)
        self.trackers.log(step, values)
        if config.run.rollout_steps and step % config.run.rollout_steps == 0:
            self.rollouts.write(step, scored_N, batch.advantages_N, extras)
        self.watch.keep_canary(step, scored_N)
        self.in_step = False
        self._tell(step, values, scored_N, stats)
        if shortage is not None:
            raise shortage

    def _logged_by_rewards(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return what reward functions gave to `log_metric`; a name of ours is not overwritten but moved aside."""
        logged = {}
        for name, numbers in self.parts.pool.take_metrics().items():
            logged[f"logged/{name}" if name in values else name] = sum(numbers) / len(numbers)
        return logged

    def _tell(self, step: int, values: Mapping[str, float], scored_N: list[ScoredRollout], stats: StepStats) -> None:
        """Show the step, and what went wrong in it; stop a run that has diverged."""
        self.progress.step_done(step + 1, self.config.run.max_steps, values)
        if not stats.stepped:
            self.progress.note(f"step {step + 1}: no optimizer step was made: {stats.skipped_reason}")
        weights = dict(zip(self.parts.pool.names, self.parts.pool.weights, strict=True))
        for name, reason in sorted({(n, r) for s in scored_N for n, r in s.failures.items()})[:2]:
            effect = "gave no value" if weights.get(name) == 0 else "left completions unscored"
            self.progress.note(f"step {step + 1}: reward `{name}` {effect}: {reason}")
        self.watch.tell(step, self.progress)
        if self.state.nonfinite_steps >= MAX_NONFINITE_STEPS:
            kept = f"checkpoint-{self.saved_step} is kept" if self.saved_step >= 0 else "no checkpoint was written yet"
            raise DivergenceError(
                f"log-probabilities, loss or gradient were not finite in {MAX_NONFINITE_STEPS} steps in a row, "
                f"last at step {step + 1}; {kept}",
                hint="optim.learning_rate: lower it; then start again with --out ANOTHER_FOLDER",
            )

    def _timings(self, generated: int, trained: float) -> dict[str, float]:
        """Return the step's times; what no phase covers (records, the last step's checkpoint) is `time/other_s`."""
        times, self.times = self.times, {}
        now = time.perf_counter()
        total, self.step_started = now - self.step_started, now
        generating, training = times.get("generate", 0.0), times.get("train", 0.0)
        return {
            **{f"time/{name}_s": seconds for name, seconds in times.items()},
            "time/other_s": total - sum(times.values()),
            "tokens/generated_per_s": generated / generating if generating else math.nan,
            "tokens/trained_per_s": trained / training if training else math.nan,
            **_memory(self.parts),
            "step_time": total - times.get("evaluate", 0.0),
        }

    @property
    def goes_on(self) -> bool:
        """Whether another step is to be made: steps are left, and neither the user nor a monitor ends the run.

        A monitor waits for a step that was finite, since no checkpoint is written of another.
        """
        ended = self.interrupt.requested or (self.watch.halt is not None and not self.state.nonfinite_steps)
        return self.state.step < self.config.run.max_steps and not ended

    def check_canary(self) -> None:
        """Score the stored completions again; a changed verdict ends the run, with a checkpoint."""
        assert self.watch.canary is not None, "it is checked once it was taken"
        try:
            with self.progress.phase("canary"):
                self.watch.canary.check(self.parts.pool, step=self.state.step)
        except VerdictChangedError:
            self.save()
            self.summarise("failed", None)
            raise

    def checkpoint_if_due(self) -> None:
        """Write a checkpoint every `save_steps` and at the end."""
        step, run = self.state.step, self.config.run
        if step % run.save_steps == 0 or step >= run.max_steps:
            self.save()
        if self.watch.canary_is_due(step):
            self.check_canary()

    def save(self) -> None:
        """Write a checkpoint of the present step, unless there is one or the last step was not finite.

        Writing one then would push the last good one out.
        """
        if self.saved_step == self.state.step or self.state.nonfinite_steps:
            return
        with self.progress.phase("checkpoint"), shortage_told("checkpoint"):
            score, best = self.watch.monitor.score(), self.state.best
            window = self.config.monitor.window
            lost = best is not None and self.config.run.save_best and not self._is_there(best[0])
            # Means over other numbers of steps cannot be compared: a short one is high by luck.
            if score is not None and (best is None or lost or best[2] != window or score > best[1]):
                self.state.best = (self.state.step, score, window)
            state = {**self.state.as_dict(), "seconds": self.seconds(), "promise": self.parts.plan.promise()}
            if self.limit.tokens is not None:
                state["micro_batch_limit"] = self.limit.tokens
            state |= {"monitor": self.watch.monitor.as_dict(), "reward_versions": self.parts.pool.versions()}
            write_checkpoint(
                self.folder.path,
                self.state.step,
                tensors={OPTIMIZER_FILE: self.optimizer.state_dict()},
                state=state,
                extra=self._export,
                keep=self.config.run.save_total_limit,
                spared=self.state.best[0] if self.state.best and self.config.run.save_best else None,
            )
        self.saved_step = self.state.step

    def weights_change(self) -> None:
        """Called before the optimizer writes weights: until the step is recorded no checkpoint can be written."""
        self.in_step = True

    def save_after_shortage(self) -> None:
        """Write a checkpoint of the last whole step, where its weights are still there; says why there is none."""
        if self.in_step:
            self.progress.note("no checkpoint is written: the weights have changed since the last whole step")
            return
        try:
            if self.limit.tokens is not None:  # also where this step's checkpoint is there already, without it
                self.folder.write_json(LIMIT_FILE, {"micro_batch_tokens": self.limit.tokens})
            self.save()
            self.summarise("failed", None)
        except (StropError, RuntimeError, OSError) as e:
            self.progress.note(f"no checkpoint could be written after the shortage: {e}")
            return
        if self.saved_step == self.state.step:
            self.progress.say(f"checkpoint-{self.saved_step} holds everything up to step {self.state.step}")

    def _best(self) -> dict[str, Any] | None:
        """Return the best checkpoint that is still there, and say so where it is not the last."""
        if self.state.best is None:
            return None
        step, score, window = self.state.best
        if not self._is_there(step):
            return None
        name = f"checkpoint-{step}"
        if step != self.saved_step:
            self.progress.say(f"best checkpoint: {name}, {score:.3f} on average over its last {window} steps")
        return {"checkpoint": name, "score": score}

    def _is_there(self, step: int) -> bool:
        return is_complete(self.folder.path / f"checkpoint-{step}")

    def _export(self, folder: Path) -> None:
        """Write what other tools load: a PEFT adapter, or a whole model folder."""
        if self.parts.policy.adapters:
            lora.save_adapter(self.parts.policy.adapters, folder, base_model=self.parts.source.path)
        else:
            from ..policy.export import save_model

            save_model(self.parts.policy.model, self.parts.source, folder)

    def seconds(self) -> float:
        """Return the wall time of this run so far, over all its processes."""
        return self.state.seconds + time.monotonic() - self.started

    def finish(self) -> dict[str, Any]:
        """Evaluate the trained policy, or keep what there is when the run ends early; write and return the summary.

        Raises DiagnosisError when a monitor stops the run.
        """
        for reason, count in self.parts.task.dropped.items():
            self.progress.note(f"{count} problems were left out: {reason}")
        after, halt = None, self.watch.halt
        if self.state.step < self.config.run.max_steps and halt is not None and not self.state.nonfinite_steps:
            self.save()
            summary = self.summarise("paused" if halt.action == "pause" else "stopped", None)
            if halt.action == "stop":
                raise stopped_by(halt, self.state.step)
            return summary
        if not self.interrupt.requested:
            after = self.evaluate_or_say(stoppable=True)
            if after is not None:
                self.progress.say(f"held out after training: {shown(after)}")
        if self.state.step < self.config.run.max_steps:
            self.save()
            return self.summarise("interrupted", None)
        return self.summarise("finished", after)

    def summarise(self, stopped: StopReason, after: EvalSummary | None) -> dict[str, Any]:
        """Write summary.json and return it."""
        summary = build_summary(
            steps=self.state.step,
            seconds=self.seconds(),
            stopped=stopped,
            reward=self.state.reward,
            eval_before=self.state.eval_before,
            eval_after=after,
            diagnoses=self.watch.monitor.summary(),
            best=self._best(),
        )
        self.folder.write_json("summary.json", summary)
        return summary


def _is_nonfinite(scored_N: list[ScoredRollout], stats: StepStats) -> bool:
    """Whether the gradient was not finite, or the policy gives what it samples no finite log-probability any more."""
    if not stats.stepped and "grad_norm" in stats.metrics:
        return True
    return not all(math.isfinite(x) for s in scored_N for seg in s.rollout.segments for x in seg.logprobs or ())


def shown(result: EvalSummary) -> str:
    """Return pass@1 and pass@k in words."""
    text = f"pass@1 {result.pass_at_1:.1%}"
    text += f", pass@{result.k} {result.pass_at_k:.1%}" if result.k > 1 else ""
    return f"{text} on {result.problems} problems"


def _memory(parts: Parts) -> dict[str, float]:
    if (dial := parts.dial) is not None:
        return {
            "memory/peak_gib": dial.peak_bytes / 2**30,
            "memory/beside_gib": dial.beside_bytes / 2**30,
            "memory/alloc_retries": float(dial.retries),
        }
    import resource

    return {"memory/peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30}
