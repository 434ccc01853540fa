"""GRPO in one screen, from Strop's public functions: no run folder, no checkpoints, no progress, just the loop.

python examples/minimal_loop.py 40
"""

from __future__ import annotations

import sys

from strop import load_config
from strop.objective.packing import pack
from strop.objective.samples import make_samples
from strop.objective.schedule import learning_rate
from strop.policy.optim import MasterAdamW
from strop.seeding import rollout_requests
from strop.trainer.evaluate import in_order
from strop.trainer.parts import build, make_pool, prepare
from strop.trainer.update import update

config = load_config(
    {
        "model": {"path": "demo"},
        "lora": {"r": 0},
        "task": {"name": "arithmetic", "max_prompt_length": 64},
        "rollout": {"num_prompts": 16, "num_generations": 8, "max_completion_length": 96},
        "objective": {"loss_type": "dapo", "epsilon_high": 0.28},
        "optim": {"learning_rate": 3e-4, "warmup_steps": 2},
    }
)


def main(num_steps: int) -> list[float]:
    """Train for `num_steps` and return the mean reward of each step."""
    rewards = []
    prepared = prepare(config)
    with make_pool(config, prepared.task.default_rewards) as pool, build(prepared, pool, print) as parts:
        optimizer = MasterAdamW(parts.policy.trainable, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        for step in range(num_steps):
            # P problems, G completions each; they are scored in other processes while more are being sampled.
            problems_P = parts.task.batch(step, config.rollout.num_prompts)
            requests_N = rollout_requests(problems_P, config.rollout.num_generations, run_seed=0, step=step)
            rollouts = parts.engine.generate(requests_N, parts.sampling, policy_version=parts.weights.version)
            scored_N = in_order(pool.score(rollouts, group_size=config.rollout.num_generations), requests_N)

            # Advantages relative to the group, every token's share of the step's loss, groups without signal dropped.
            batch = make_samples(
                scored_N,
                config.rollout.num_generations,
                loss_type=config.objective.loss_type,
                scale_rewards=config.objective.scale_rewards,
                max_completion_length=config.rollout.max_completion_length,
                mask_truncated_completions=False,
                keep_groups_without_signal=False,
            )
            # Packed micro-batches, one gradient, one step; then the engine samples from the new weights.
            stats = update(
                parts.policy,
                optimizer,
                pack(batch.samples, parts.plan.micro_batch_tokens),
                config.objective,
                learning_rate=learning_rate(step, peak=3e-4, warmup_steps=2, max_steps=num_steps),
                max_grad_norm=1.0,
            )
            parts.weights.publish()
            rewards.append(batch.metrics["reward"].value)
            print(f"step {step + 1:3d}  reward {rewards[-1]:.3f}  stepped {stats.stepped}", flush=True)
    return rewards


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
