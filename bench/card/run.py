"""One command for the whole comparison on one card: each workload with each contender, in one go, as a table and JSON.

    python bench/card/run.py --workloads W1,W4 --contenders strop,trl,unsloth
    python bench/card/run.py --workloads L1 --model FOLDER --data FOLDER --seconds 255 --steps 500
    python bench/card/run.py --workloads W1 --ablate             W1, and W1's training without each idea in turn

A contender runs in a process of its own. Times are taken from its first instruction; memory is what NVML reports for
the whole card, sampled every 20 ms. `mfu_6n` = 6 x (linears + head) x tokens per second of training / peak.
Rows of `--ablate` are training phases alone (bench/training_step.py); their memory is what torch reserved.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from workloads import SHAPES, WORKLOADS, Workload, linear_parameters

HERE = Path(__file__).resolve().parent
SCRIPTS = {"strop": "contender_strop.py", "trl": "peer_trl.py", "unsloth": "peer_unsloth.py"}
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "4090": 165.0, "3090": 71.0, "A100": 312.0, "5090": 209.0}
"""Dense bf16 with fp32 accumulation, from the vendors' data sheets."""
OUT_OF_MEMORY = ("MemoryExhaustedError", "OutOfMemoryError", "CUDA out of memory")
SHORTAGES = {
    "halvings": "ran out of memory on a micro-batch",
    "rollout_shortages": "out of GPU memory while generating:",
}
"""Column -> what Strop notes when it halves a micro-batch (trainer/update.py), or the sequences at a time (engine)."""
PACKAGES = ("torch", "transformers", "vllm", "bitsandbytes", "liger-kernel", "peft", "trl", "unsloth")


class PeakMemory(threading.Thread):
    """The largest number of bytes in use on the card, sampled every 20 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        import pynvml

        handle = card_handle()
        # Version 2 reports what nvidia-smi shows; version 1 adds what the driver itself reserves.
        self._used = lambda: pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).used
        self.peak, self._done = 0, threading.Event()
        self.start()

    def run(self) -> None:
        """Sample until `stop`."""
        while not self._done.wait(0.02):
            self.peak = max(self.peak, self._used())

    def stop(self) -> float:
        """End sampling and return the peak in GiB."""
        self._done.set()
        self.join()
        return self.peak / 2**30


def main() -> None:
    """Run what was asked for; each finished row is written at once."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` ends the contender
    given = _arguments()
    card = card_name()
    target = results_file(given.out, card)
    rows: list[dict[str, Any]] = json.loads(target.read_text()) if target.exists() else []
    for name in filter(None, given.workloads.split(",")):
        work = WORKLOADS[name]
        model = _model_for(work, given)
        for contender in given.contenders.split(","):
            if contender != "strop" and importlib.util.find_spec(contender) is None:
                print(f"{name} {contender}: not installed, left out", flush=True)
                continue
            command = _command(work, contender, model, given)
            row = run(work, contender, command, scratch=given.scratch, timeout=given.timeout, seed=given.seed)
            rows = add_row(target, {"card": card, **commit_and_versions(), **row})
    if given.ablate:
        for row in ablation(given.scratch, given.ablate_tokens, given.timeout):
            rows = add_row(target, {"card": card, **commit_and_versions(), **row})
    print_table(rows)


def results_file(folder: Path, card: str) -> Path:
    """Return the JSON file of today's rows of a card."""
    return folder / f"{datetime.date.today()}-{re.sub(r'[^A-Za-z0-9]+', '-', card)}.json"


def add_row(target: Path, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Add a row to a results file, which is written at once; return all of its rows."""
    rows = [*(json.loads(target.read_text()) if target.exists() else []), row]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def run(
    work: Workload, contender: str, command: list[str], *, scratch: Path, timeout: float, seed: int = 0
) -> dict[str, Any]:
    """Run a contender's command, `--events FILE` added, and return its row; a failure is a row with its last output."""
    folder = scratch / f"{work.id}-{contender}-{time.time():.0f}"
    folder.mkdir(parents=True)
    events_path, log = folder / "events.jsonl", folder / "log.txt"
    peak, started = PeakMemory(), time.time()
    with log.open("wb") as output:
        code = _run_alone([*command, "--events", str(events_path)], output, timeout)
    row: dict[str, Any] = {"workload": work.id, "contender": contender, "seed": seed,
                           "peak_gib": round(peak.stop(), 2), "wall_s": round(time.time() - started, 1)}  # fmt: skip
    events = [json.loads(line) for line in events_path.read_text().splitlines()] if events_path.exists() else []
    row |= summarise(work, events, started, card_name())
    said = log.read_text(errors="replace")
    row |= {column: said.count(note) for column, note in SHORTAGES.items() if note in said}
    if code:
        row["failed"] = f"no end after {timeout:g} s\n" * (code == 124) + said[-1500:]
        row["out_of_memory"] = any(sign in said for sign in OUT_OF_MEMORY)
    print(json.dumps({k: v for k, v in row.items() if k != "rows"}), flush=True)
    return row


def _command(work: Workload, contender: str, model: str, given: argparse.Namespace) -> list[str]:
    command = [sys.executable, str(HERE / SCRIPTS[contender]), "--workload", work.id, "--model", model,
               "--steps", str(given.steps), "--seconds", str(given.seconds), "--seed", str(given.seed),
               "--micro-batch", str(given.micro_batch), "--checkpointing", str(given.checkpointing),
               "--utilization", str(given.utilization)]  # fmt: skip
    return [*command, "--data", given.data] if given.data else command


def ablation(scratch: Path, tokens: int, timeout: float) -> list[dict[str, Any]]:
    """Time W1's training with all ideas and without each of them; one row per variant."""
    folder = scratch / f"ablation-{time.time():.0f}"
    folder.mkdir(parents=True)
    found, log = folder / "rows.json", folder / "log.txt"
    command = [sys.executable, str(HERE.parent / "training_step.py"), "--model", "1.5b", "--work", "W1",
               "--tokens", str(tokens), "--ablate", "--json", str(found)]  # fmt: skip
    with log.open("wb") as output:
        code = _run_alone(command, output, timeout)
    said = log.read_text(errors="replace")
    print(said, flush=True)
    rows: list[dict[str, Any]] = json.loads(found.read_text()) if found.exists() else []
    if code or not rows:
        rows.append({"work": "W1", "variant": "the bench itself", "failed": said[-1500:]})
    return [{"workload": f"{row.pop('work')}-ablation", "contender": "strop", **row} for row in rows]


def _run_alone(command: list[str], output: Any, timeout: float) -> int:
    """Run a contender in a process group of its own and leave none of it behind, whatever ends this call."""
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def summarise(work: Workload, events: list[dict[str, Any]], started: float, card: str) -> dict[str, Any]:
    """Turn a contender's events into the columns of its row."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        by_name.setdefault(event["event"], []).append(event)
    row: dict[str, Any] = {}
    if "ready" in by_name:
        row["ready_s"] = round(by_name["ready"][0]["time"] - started, 1)
    steps = [event["seconds"] for event in by_name.get("step", [])]
    for event in by_name.get("metrics", []):
        steps = [metrics["step_time"] for metrics in event["rows"]]
        row |= _from_metrics(work, event, card)
    if steps:
        later = steps[1:] or steps
        row |= {
            "first_step_s": round(steps[0], 2), "step_s": round(statistics.median(later), 3),
            "step_s_min": round(min(later), 3), "step_s_max": round(max(later), 3), "steps": len(steps),
        }  # fmt: skip
    for event in by_name.get("logged", []):
        gaps = event.get("logp_difference") or []
        row |= {"logp_difference": statistics.mean(gaps)} if gaps else {}
        row["mean_length"] = round(statistics.mean(event["lengths"]), 1) if event.get("lengths") else None
        row["rewards"] = event.get("rewards")
    for event in by_name.get("held_out", []):
        row[f"held_out_{event['when']}"] = {k: event[k] for k in ("greedy", "sampled") if k in event}
    return row


def _from_metrics(work: Workload, event: dict[str, Any], card: str) -> dict[str, Any]:
    rows = event["rows"][1:] or event["rows"]

    def median(name: str) -> float | None:
        values = [row[name] for row in rows if row.get(name) is not None]
        return statistics.median(values) if values else None

    trained = median("tokens/trained_per_s")
    result = {
        "generate_s": median("time/generate_s"), "train_s": median("time/train_s"),
        "publish_s": median("time/publish_s"), "rollout_tokens_per_s": median("tokens/generated_per_s"),
        "trained_tokens_per_s": trained, "logp_difference": median("sampling/sampling_logp_difference/mean"),
        "mean_length": median("completions/mean_length"), "rewards": [row.get("reward") for row in event["rows"]],
        "torch_peak_gib": median("memory/peak_gib"), "plan": event["plan"],
        "held_out_before": event["summary"].get("eval_before"), "held_out_after": event["summary"].get("eval_after"),
        "phases_s": {name[5:-2]: median(name) for name in event["rows"][-1] if name.startswith("time/")},
    }  # fmt: skip
    peak = next((value for name, value in PEAK_TFLOPS.items() if name in card), None)
    if work.shape in SHAPES and trained and peak:
        result["mfu_6n"] = round(6 * linear_parameters(work.shape) * trained / (peak * 1e12), 3)
    return result


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print one line per row."""
    columns = (
        "workload", "contender", "ready_s", "first_step_s", "step_s", "step_s_min", "step_s_max", "peak_gib",
        "generate_s", "train_s", "rollout_tokens_per_s", "trained_tokens_per_s", "mfu_6n", "logp_difference",
    )  # fmt: skip
    print("  ".join(f"{c.removesuffix('_per_s'):>12}" for c in columns))
    for row in rows:
        cells = [row.get(c) for c in columns]
        shown = [f"{c:.4g}" if isinstance(c, float) else str("" if c is None else c) for c in cells]
        marks = [row.get("variant", ""), "FAILED" if "failed" in row else ""]
        print("  ".join([*(f"{c:>12}" for c in shown), *filter(None, marks)]))


def _model_for(work: Workload, given: argparse.Namespace) -> str:
    if work.shape is None:
        if not given.model or not given.data:
            sys.exit(f"{work.id} needs --model (an instruct model's folder) and --data (a folder with GSM8K's rows)")
        return given.model
    folder = given.scratch / f"model-{work.shape}{'-ends' if work.mean_completion else ''}"
    # In a process of its own: a CUDA context here would count as the contenders' memory.
    ends = ["--mean-completion", str(work.mean_completion)] if work.mean_completion else []
    subprocess.run([sys.executable, str(HERE / "random_model.py"), work.shape, str(folder), *ends], check=True)
    return str(folder)


def card_handle() -> Any:
    """Return NVML's handle of the card that CUDA calls 0; NVML itself does not know CUDA_VISIBLE_DEVICES."""
    import pynvml

    pynvml.nvmlInit()
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    by = pynvml.nvmlDeviceGetHandleByIndex if first.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID
    return by(int(first) if first.isdecimal() else first)


def card_name() -> str:
    """Return the name of the card that CUDA calls 0; makes no CUDA context."""
    import pynvml

    return str(pynvml.nvmlDeviceGetName(card_handle()))


def commit_and_versions() -> dict[str, Any]:
    """Return the commit (or STROP_COMMIT) and the versions of the packages that matter."""
    commit = (
        os.environ.get("STROP_COMMIT")
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True
        ).stdout.strip()
    )
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"commit": commit, "versions": versions}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="W1,W2,W3,W4,W5,W6")
    parser.add_argument("--contenders", default="strop,trl,unsloth")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps; the first one is reported apart")
    parser.add_argument("--model", help="L1: folder of the instruct model")
    parser.add_argument("--data", help="L1: folder with train.jsonl and test.jsonl")
    parser.add_argument("--seconds", type=float, default=1e9, help="L1: training time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--micro-batch", type=int, default=8, help="peers: per_device_train_batch_size")
    parser.add_argument("--checkpointing", type=int, default=1, help="TRL: gradient_checkpointing")
    parser.add_argument("--utilization", type=float, default=0.2, help="peers: gpu_memory_utilization")
    parser.add_argument("--ablate", action="store_true", help="W1's training without each idea; needs about 55 GiB")
    parser.add_argument("--ablate-tokens", type=int, default=36_000, help="tokens of a micro-batch there")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one run may take")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/strop-bench"))
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
