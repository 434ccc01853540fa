"""What both peers are given alike: TRL's GRPO settings, rows, reward, a clock. Unsloth runs TRL's trainer too."""

from __future__ import annotations

import argparse
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
    objective = {"loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated_completions": True} if learns else {}
    return {
        "output_dir": "/tmp/strop-bench-peer", "per_device_train_batch_size": given.micro_batch,
        "gradient_accumulation_steps": max(1, batch // given.micro_batch), "num_generations": work.num_generations,
        "max_completion_length": work.completion_tokens, "beta": 0.0, "bf16": True, "temperature": 1.0,
        "learning_rate": 5e-5 if learns else 1e-5, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3,
        "max_steps": given.steps, "logging_steps": 1, "save_strategy": "no", "report_to": [], "seed": given.seed,
        "shuffle_dataset": False, **objective,
    }  # fmt: skip


def clock(events: Events, seconds: float) -> Any:
    """Return a TrainerCallback that writes each step's time and ends training after `seconds`."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.start = self.began = time.time()

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.time()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            self.began = time.time()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            torch.cuda.synchronize()
            events.write("step", seconds=time.time() - self.began)
            control.should_training_stop |= time.time() - self.start > seconds

    return Clock()


def write_logged(events: Events, log_history: list[dict[str, Any]]) -> None:
    """Write what TRL logged: lengths, mean rewards, and the engine/trainer gap where it has one."""
    names = {"lengths": "completions/mean_length", "rewards": "reward",
             "logp_difference": "sampling/sampling_logp_difference/mean"}  # fmt: skip
    events.write("logged", **{k: [row[name] for row in log_history if name in row] for k, name in names.items()})
