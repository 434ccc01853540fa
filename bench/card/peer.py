"""What both peers are given alike: TRL's GRPO settings, rows, reward, a clock. Unsloth runs TRL's trainer too."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

from contender import Events, boxed_number, gsm8k_rows
from random_model import prompts
from synthetic_reward import by_digest
from workloads import Workload


def rows_and_reward(work: Workload, given: argparse.Namespace) -> tuple[list[dict[str, Any]], Callable[..., Any]]:
    """Return the training rows, and the reward function under TRL's signature."""
    if work.shape is not None:
        texts = prompts(work.num_prompts * (given.steps + 1), work.prompt_tokens)
        return [{"prompt": text} for text in texts], by_digest
    return gsm8k_rows(given.data, "train", given.seed), boxed_number


def context_length(work: Workload) -> int:
    """Tokens that the engine has to hold; L1 leaves room for the chat template."""
    return work.prompt_tokens + work.completion_tokens + (200 if work.shape is None else 8)


def grpo_arguments(work: Workload, given: argparse.Namespace) -> dict[str, Any]:
    """Return arguments of TRL's GRPOConfig; what the workload does not say is left at TRL's default."""
    learns = work.shape is None
    batch = work.num_prompts * work.num_generations
    if batch % given.micro_batch:
        raise SystemExit(
            f"--micro-batch {given.micro_batch}: the {batch} completions of {work.id} are no multiple of it"
        )
    objective = {"loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated_completions": True} if learns else {}
    return {
        "output_dir": "/tmp/strop-bench-peer", "per_device_train_batch_size": given.micro_batch,
        "gradient_accumulation_steps": batch // given.micro_batch, "num_generations": work.num_generations,
        "max_completion_length": work.completion_tokens, "beta": 0.0, "bf16": True, "temperature": 1.0,
        "learning_rate": 5e-5 if learns else 1e-5, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3,
        "max_steps": given.steps, "logging_steps": 1, "save_strategy": "no", "report_to": [], "seed": given.seed,
        "shuffle_dataset": False, **objective,
    }  # fmt: skip


class Meter:
    """Times what TRL's trainer does within a step, from outside; what it cannot find stays unknown.

    `rollout` is all that happens before training: completions (`generate`, with weights handed over: `publish`),
    rewards, and the log-probabilities of the policy that sampled.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._rewards: list[float] = []
        self._generated: int | None = None
        self._to_train: int | None = None
        self._generations = 1

    def reward(self, function: Callable[..., list[float]]) -> Callable[..., list[float]]:
        """Return the reward function, listened to."""

        @functools.wraps(function)
        def heard(*args: Any, **kwargs: Any) -> list[float]:
            result = function(*args, **kwargs)
            self._rewards += result
            return result

        return heard

    def watch(self, trainer: Any, num_generations: int) -> None:
        """Put a clock around the trainer's methods."""
        self._generations = num_generations
        self._time(trainer, "_generate_and_score_completions", "rollout")
        self._time(trainer, "_generate_single_turn", "generate", self._count)
        self._time(getattr(trainer, "vllm_generation", None), "sync_weights", "publish")

    def begin(self) -> None:
        """Forget what came before a step."""
        self._seconds, self._rewards, self._generated, self._to_train = {}, [], None, None

    def step(self, seconds: float) -> dict[str, float | None]:
        """Return what is known of a step that took so long."""
        took = self._seconds
        found: dict[str, float | None] = {"reward": sum(self._rewards) / len(self._rewards) if self._rewards else None}
        if "generate" in took:
            found["generate_s"] = took["generate"] - took.get("publish", 0.0)
            found |= {"publish_s": took["publish"]} if "publish" in took else {}
        if "rollout" in took:
            found["train_s"] = seconds - took["rollout"]
            found |= {"prepare_s": took["rollout"] - took["generate"]} if "generate" in took else {}
        return found | {"generated_tokens": self._generated, "trained_tokens": self._to_train}

    def _time(self, owner: Any, name: str, key: str, after: Callable[..., None] | None = None) -> None:
        method = getattr(owner, name, None)
        if not callable(method):
            return

        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            begin = time.perf_counter()
            result = method(*args, **kwargs)
            synchronize()
            self._seconds[key] = self._seconds.get(key, 0.0) + time.perf_counter() - begin
            if after is not None:
                after(result, *args, **kwargs)
            return result

        setattr(owner, name, timed)

    def _count(self, result: Any, prompt_ids: Any = (), *_: Any, **__: Any) -> None:
        """Count tokens; a prompt, which comes once per completion, counts once, since more is never needed."""
        try:
            generated = sum(len(ids) for ids in result[0])
            prompts_once = sum(len(ids) for ids in prompt_ids) // self._generations
        except (TypeError, LookupError, AttributeError) as e:
            print(f"the tokens of a step could not be counted: {e!r}", flush=True)
            return
        self._generated = (self._generated or 0) + generated
        self._to_train = (self._to_train or 0) + generated + prompts_once


def synchronize() -> None:
    """Wait for the card, where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock(events: Events, seconds: float, meter: Meter) -> Any:
    """Return a TrainerCallback that writes each step's time and ends training after `seconds`."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.start = self.began = time.time()

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.time()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronize()
            meter.begin()
            self.began = time.time()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            synchronize()
            now = time.time()
            took, since = now - self.began, now - self.start
            events.write("step", seconds=took, since=since, **meter.step(took))
            control.should_training_stop |= since > seconds

    return Clock()


def write_logged(events: Events, log_history: list[dict[str, Any]]) -> None:
    """Write what TRL logged: lengths, mean rewards, and the engine/trainer gap where it has one."""
    names = {"lengths": "completions/mean_length", "rewards": "reward",
             "logp_difference": "sampling/sampling_logp_difference/mean"}  # fmt: skip
    events.write("logged", **{k: [row[name] for row in log_history if name in row] for k, name in names.items()})
