"""A workload through Unsloth with fast_inference (weights shared with vLLM), as its documentation sets one GPU up."""

from __future__ import annotations

from contender import LORA, Events, arguments, held_out, quiet_environment
from peer import Meter, clock, context_length, grpo_arguments, rows_and_reward, write_logged
from workloads import WORKLOADS


def main() -> None:
    quiet_environment()
    given = arguments(__doc__ or "")
    work, events = WORKLOADS[given.workload], Events(given.events)
    import torch
    from unsloth import FastLanguageModel  # has to come before trl

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=given.model, max_seq_length=context_length(work), load_in_4bit=work.quantization == "nf4",
        fast_inference=True, max_lora_rank=LORA["r"], gpu_memory_utilization=given.utilization, dtype=torch.bfloat16,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=LORA["r"], lora_alpha=LORA["alpha"], target_modules=LORA["target_modules"],
        use_gradient_checkpointing="unsloth" if given.checkpointing else False, random_state=given.seed,
    )  # fmt: skip
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows, reward = rows_and_reward(work, given)
    meter = Meter()
    # TRL's default would switch it on again.
    without = {} if given.checkpointing else {"gradient_checkpointing": False}
    trainer = GRPOTrainer(
        model=model, processing_class=tokenizer, reward_funcs=[meter.reward(reward)],
        args=GRPOConfig(**grpo_arguments(work, given), **without), train_dataset=Dataset.from_list(rows),
        callbacks=[clock(events, given.seconds, meter)],
    )  # fmt: skip
    events.write("ready")
    meter.watch(trainer, work.num_generations)
    evaluates = work.shape is None and bool(given.evaluate)
    if evaluates:
        events.write("held_out", when="before", **held_out(model.vllm_engine, tokenizer, given.data))
    trainer.train()
    write_logged(events, trainer.state.log_history)
    if evaluates:
        folder = "/tmp/strop-bench-peer/adapter"
        model.save_lora(folder)
        model.vllm_engine.reset_prefix_cache()
        after = held_out(model.vllm_engine, tokenizer, given.data, lora_request=model.load_lora(folder))
        events.write("held_out", when="after", **after)


if __name__ == "__main__":
    main()
