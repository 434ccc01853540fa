"""A workload through Strop: writes a config, trains by the loop's own steps, and reports from the run's own files."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from contender import SYSTEM, Events, arguments, quiet_environment
from random_model import prompts
from workloads import WORKLOADS, Workload

HERE = Path(__file__).resolve().parent


def config_for(work: Workload, model: str, data: str | None, folder: Path, steps: int, seed: int) -> dict[str, Any]:
    """Return the config of a workload as a mapping; what it does not say is planned."""
    common: dict[str, Any] = {
        "model": {"path": model, "quantization": work.quantization},
        "lora": {"r": 16, "alpha": 32},
        "rollout": {
            "num_prompts": work.num_prompts, "num_generations": work.num_generations,
            "max_completion_length": work.completion_tokens,
        },
        "run": {"max_steps": steps, "seed": seed, "save_steps": 10**6, "rollout_steps": 0, "vram_gib": work.vram_gib,
                "report_to": "none", "eval_num_problems": 0},
    }  # fmt: skip
    if work.shape is None:
        common["task"] = {"name": "gsm8k", "path": data, "max_prompt_length": 400, "eval_size": 1319,
                          "system_prompt": SYSTEM}  # fmt: skip
        common["rewards"] = {"funcs": [f"{HERE / 'contender.py'}:boxed_number"], "length_shaping": "none"}
        common["objective"] = {"loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated_completions": True}
        common["optim"] = {"learning_rate": 5e-5, "warmup_steps": 3}
        _make_small(common, work)
        common["run"] |= {"eval_num_problems": 1319, "eval_num_generations": 1, "eval_temperature": 0.0}
        return common
    rows = folder / "prompts.jsonl"
    texts = prompts(work.num_prompts * (steps + 1), work.prompt_tokens)
    rows.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    common["task"] = {"name": "dataset", "path": str(rows), "eval_split": None, "eval_size": 1, "answer_column": None,
                      "conversational": False, "shuffle": False, "max_prompt_length": work.prompt_tokens}  # fmt: skip
    common["rewards"] = {"funcs": [f"{HERE / 'synthetic_reward.py'}:by_digest"], "check": False,
                         "length_shaping": "none"}  # fmt: skip
    common["optim"] = {"learning_rate": 1e-5, "warmup_steps": 3}
    _make_small(common, work)
    return common


def _make_small(config: dict[str, Any], work: Workload) -> None:
    """As in recipes/cards, so that all completions decode at once."""
    if work.smallest:
        # L1's model has one tensor for head and embedding, so that int8 holds both, and on the card.
        config["model"] |= {"head": "int8", "embedding": "auto" if work.shape is None else "host"}
        config["optim"]["name"] = "adamw_8bit"


def accuracy(session: Any, temperature: float) -> float | None:
    """Return accuracy on the held-out rows with one completion each; None where nothing could be scored."""
    from strop.trainer.evaluate import UnscoredError, evaluate

    config = session.config
    run = config.run.model_copy(update={"eval_temperature": temperature, "eval_num_generations": 1})
    parts = dataclasses.replace(session.parts, config=config.model_copy(update={"run": run}))
    try:
        found = evaluate(parts, tick=session.progress.tick)
    except UnscoredError as e:
        session.progress.note(e.message)
        return None
    return None if found is None else found.pass_at_1


def report_held_out(session: Any, events: Events, when: str) -> None:
    """Measure greedy and sampled accuracy, and write both with the time that took."""
    begin = time.time()
    greedy, sampled = accuracy(session, 0.0), accuracy(session, 1.0)
    events.write("held_out", when=when, greedy=greedy, sampled=sampled, seconds=time.time() - begin)


def main() -> None:
    quiet_environment()
    given = arguments(__doc__ or "")
    work, events = WORKLOADS[given.workload], Events(given.events)
    from strop.config_load import load_config
    from strop.monitor.metrics import read_metrics
    from strop.trainer.loop import train_step
    from strop.trainer.opening import open_session

    evaluates = work.shape is None and bool(given.evaluate)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        mapping = config_for(work, given.model, given.data, Path(scratch), given.steps, given.seed)
        with open_session(load_config(mapping), out, resume=False) as session:
            events.write("ready")
            if evaluates:
                report_held_out(session, events, "before")
            session.start_clock()
            start = time.time()
            while session.state.step < given.steps and time.time() - start < given.seconds:
                began = time.time()
                train_step(session)
                now = time.time()
                events.write("step", seconds=now - began, since=now - start, reward=session.state.reward)
            if evaluates:
                report_held_out(session, events, "after")
            summary = session.summarise("finished", None)
        rows = read_metrics(out / "metrics.jsonl")
        plan = json.loads((out / "plan.json").read_text())
    events.write("metrics", rows=rows, summary=summary, plan={k: v["value"] for k, v in plan.items()})


if __name__ == "__main__":
    main()
