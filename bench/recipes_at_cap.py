"""Runs recipes for three steps on random weights of the true shape, and compares the card's peak with the recipe's cap.

python bench/recipes_at_cap.py                     # all of recipes/cards; up to 16 GB of disk meanwhile
python bench/recipes_at_cap.py 8gb-qwen2.5-7b ...  # some

What the card holds is read every 20 ms while a run lives, all processes together, less what was there before.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from shapes import PUBLISHED

RECIPES = Path(__file__).parent.parent / "recipes" / "cards"
STEPS = 3
LIMIT_S = 420


def card_uuid() -> str:
    asked = subprocess.run(["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"], capture_output=True, text=True)
    return asked.stdout.split()[0]


class Watch(threading.Thread):
    """Keeps the most bytes that were in use on the card."""

    def __init__(self, uuid: str) -> None:
        super().__init__(daemon=True)
        self._uuid, self.peak, self.ended = uuid, 0, threading.Event()

    def used(self) -> int:
        from strop.memory.probe import look_at_card

        use = look_at_card(self._uuid)
        assert use is not None, "no NVML"
        return use.total_bytes - use.free_bytes

    def run(self) -> None:
        while not self.ended.wait(0.02):
            self.peak = max(self.peak, self.used())


def prompts_file(folder: Path, tokens: int) -> Path:
    """Write problems whose prompts have nearly `tokens` tokens, and answers that a random model will not give."""
    draw = random.Random(0)
    rows = [
        {"question": "".join(draw.choice("abcdefghij ") for _ in range(tokens - 8)), "answer": str(i)}
        for i in range(64)
    ]
    path = folder / "train.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def rewards_file(folder: Path) -> Path:
    """A reward that is different for each completion, so that every group has a signal."""
    path = folder / "rewards.py"
    path.write_text(
        "import zlib\n\n\ndef any_number(completions, **kwargs):\n"
        "    return [zlib.crc32(str(c).encode()) % 1000 / 1000 for c in completions]\n"
    )
    return path


def run(recipe: Path, model: Path, work: Path, uuid: str) -> dict[str, Any]:
    from strop.config_load import load_config

    config = load_config(recipe)
    out = work / recipe.stem
    changes = {
        "model.path": model, "task.name": "dataset", "task.path": prompts_file(work, config.task.max_prompt_length),
        "task.eval_split": "null", "task.eval_size": 1, "rewards.funcs": f"[{rewards_file(work)}:any_number]",
        "rewards.weights": "[1.0]", "run.max_steps": STEPS, "run.eval_num_problems": 0,
        "run.save_steps": 1000, "run.report_to": "none", "objective.mask_truncated_completions": "false",
    }  # fmt: skip
    watch = Watch(uuid)
    before = watch.used()
    watch.start()
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "strop", "train", str(recipe), "--out", str(out),
         *(x for key, value in changes.items() for x in ("--set", f"{key}={value}"))],
        capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    watch.ended.set()
    watch.join()
    rows = []
    if (out / "metrics.jsonl").is_file():
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    if done.returncode or len(rows) < STEPS:
        print(done.stdout[-1500:], done.stderr[-3000:], sep="\n")
    steps = [row["step_time"] for row in rows]
    plan = json.loads((out / "plan.json").read_text()) if (out / "plan.json").is_file() else {}
    keys = (
        "max_num_seqs",
        "kv_cache",
        "micro_batch_tokens",
        "checkpoint_layers",
        "rollout_peak_gib",
        "training_peak_gib",
    )
    return {
        "cap": config.run.vram_gib, "peak": (watch.peak - before) / 2**30, "left": (watch.used() - before) / 2**30,
        "steps": steps, "seconds": seconds, "plan": {k: plan[k]["value"] for k in keys if k in plan},
        "generate": [row.get("time/generate_s") for row in rows], "train": [row.get("time/train_s") for row in rows],
    }  # fmt: skip


def main(wanted: list[str]) -> None:
    uuid = card_uuid()
    recipes = [p for p in sorted(RECIPES.glob("*.yaml")) if not wanted or p.stem in wanted]
    from strop.config_load import load_config

    by_model: dict[str, list[Path]] = {}
    for recipe in recipes:
        by_model.setdefault(PUBLISHED[load_config(recipe).model.path], []).append(recipe)
    for name, group in by_model.items():
        work = Path(tempfile.mkdtemp(prefix="strop-cap-"))
        begin = time.perf_counter()
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom pathlib import Path\n" \
               f"from shapes import write_model; write_model({name!r}, Path({str(work / 'm')!r}))"  # fmt: skip
        subprocess.run([sys.executable, "-c", code], check=True)
        print(f"## {name}: weights written in {time.perf_counter() - begin:.0f} s", flush=True)
        for recipe in group:
            try:
                r = run(recipe, work / "m", work, uuid)
            except subprocess.TimeoutExpired:
                print(f"!! {recipe.stem}: no end after {LIMIT_S} s", flush=True)
                continue
            print(
                f"{recipe.stem:<22} cap {r['cap']:5.1f} GiB  peak {r['peak']:6.2f}  after the end {r['left']:5.2f}  "
                f"steps {' '.join(f'{s:.2f}' for s in r['steps'])} s  generate {r['generate']}  train {r['train']}  "
                f"whole run {r['seconds']:.0f} s  {r['plan']}  {'OK' if r['peak'] <= r['cap'] else 'OVER THE CAP'}",
                flush=True,
            )
        shutil.rmtree(work)


if __name__ == "__main__":
    main(sys.argv[1:])
