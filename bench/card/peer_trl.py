"""A workload through TRL's GRPOTrainer with colocated vLLM, as its documentation sets one GPU up."""

from __future__ import annotations

import sys

from contender import LORA, Events, arguments, held_out, quiet_environment
from peer import Meter, clock, context_length, grpo_arguments, rows_and_reward, write_logged
from workloads import WORKLOADS


def main() -> None:
    quiet_environment()
    given = arguments(__doc__ or "")
    work, events = WORKLOADS[given.workload], Events(given.events)
    if work.quantization != "none":
        sys.exit("TRL's colocated vLLM does not work with a 4-bit base (trl#4973)")
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    learns = work.shape is None
    rows, reward = rows_and_reward(work, given)
    meter = Meter()
    config = GRPOConfig(
        use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=given.utilization,
        vllm_enable_sleep_mode=not learns, vllm_max_model_length=context_length(work),
        gradient_checkpointing=bool(given.checkpointing),
        model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "sdpa"}, **grpo_arguments(work, given),
    )  # fmt: skip
    adapter = LoraConfig(
        r=LORA["r"], lora_alpha=LORA["alpha"], target_modules=LORA["target_modules"], task_type="CAUSAL_LM"
    )
    trainer = GRPOTrainer(
        model=given.model, reward_funcs=meter.reward(reward), args=config, train_dataset=Dataset.from_list(rows),
        callbacks=[clock(events, given.seconds, meter)], peft_config=adapter,
    )  # fmt: skip
    events.write("ready")
    meter.watch(trainer, work.num_generations)
    evaluates = learns and bool(given.evaluate)
    generation = getattr(trainer, "vllm_generation", trainer)
    if evaluates:
        events.write("held_out", when="before", **held_out(generation.llm, trainer.processing_class, given.data))
    trainer.train()
    write_logged(events, trainer.state.log_history)
    if evaluates:
        generation.sync_weights()
        generation.llm.reset_prefix_cache()
        events.write("held_out", when="after", **held_out(generation.llm, trainer.processing_class, given.data))


if __name__ == "__main__":
    main()
