"""What the scripts of all contenders share: events with wall times, the L1 data, its prompt and its reward."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import time
from pathlib import Path
from typing import Any

LORA = {"r": 16, "alpha": 32,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}  # fmt: skip
SYSTEM = "Reason step by step, then put the final answer in \\boxed{}."
_BOX = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_NUMBER = re.compile(r"\\?\$?\s*(-?[\d,]*\.?\d+)\s*(?:\\?%|\\text.*)?\.?")


def arguments(description: str) -> argparse.Namespace:
    """Read the options that `run.py` gives to every contender."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--workload", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", help="folder with train.jsonl and test.jsonl of GSM8K, for L1")
    parser.add_argument("--events", type=Path, required=True, help="file that events are appended to")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1e9, help="L1: end training after this long")
    parser.add_argument("--evaluate", type=int, default=1, help="L1: 0 leaves the held-out evaluations out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--checkpointing", type=int, default=1)
    parser.add_argument("--utilization", type=float, default=0.2)
    return parser.parse_args()


class Events:
    """Appends one JSON object per event, with the time of day, to a file that the parent reads."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, event: str, **values: Any) -> None:
        """Write one event."""
        with self._path.open("a") as file:
            file.write(json.dumps({"event": event, "time": time.time(), **values}) + "\n")


def quiet_environment() -> None:
    """Switch off hubs, trackers and a sampler that needs a package which the bundle lacks."""
    os.environ.update(
        HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_USE_FLASHINFER_SAMPLER="0", WANDB_DISABLED="true",
        TRL_EXPERIMENTAL_SILENCE="1", UNSLOTH_DISABLE_STATISTICS="1",
    )  # fmt: skip


def gsm8k_rows(folder: str, split: str, seed: int | None = None) -> list[dict[str, Any]]:
    """Return GSM8K rows as conversational prompts with the gold number; shuffled when a seed is given."""
    rows = []
    for line in Path(folder, f"{split}.jsonl").read_text().splitlines():
        row = json.loads(line)
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}]
        rows.append({"prompt": messages, "answer": row["answer"].split("####")[-1].strip().replace(",", "")})
    if seed is not None:
        random.Random(seed).shuffle(rows)
    return rows


def boxed_number(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """The reward of L1, for all contenders, under TRL's signature."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [boxed_number_is(text, gold.split("####")[-1].strip()) for text, gold in zip(texts, answer, strict=True)]


def boxed_number_is(text: str, answer: str) -> float:
    r"""1.0 where the last `\boxed{}` holds the gold number, else 0.0."""
    boxes = _BOX.findall(text)
    match = _NUMBER.fullmatch(boxes[-1].strip()) if boxes else None
    try:
        return float(match is not None and float(match.group(1).replace(",", "")) == float(answer))
    except ValueError:
        return 0.0


def held_out(llm: Any, tokenizer: Any, folder: str, **generate: Any) -> dict[str, float]:
    """Return greedy and sampled accuracy of a vLLM engine on the whole test split, and the seconds that took."""
    from vllm import SamplingParams

    begin = time.time()

    rows = gsm8k_rows(folder, "test")
    texts = [tokenizer.apply_chat_template(r["prompt"], tokenize=False, add_generation_prompt=True) for r in rows]
    result = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        params = SamplingParams(temperature=temperature, max_tokens=400, seed=None if temperature == 0 else 1)
        outputs = llm.generate(texts, params, use_tqdm=False, **generate)
        hits = [boxed_number_is(o.outputs[0].text, r["answer"]) for o, r in zip(outputs, rows, strict=True)]
        result[name] = sum(hits) / len(hits)
    return result | {"seconds": time.time() - begin}
