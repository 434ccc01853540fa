"""A process that has imported torch and vLLM once and forks a child for each run it is asked for.

Reads one JSON object a line: {"config": {...}, "out": "...", "resume": false, "kill_when": null, "env": {}}. A child
trains for real; "kill_when" names a condition on the run folder at which a thread of the child sends it SIGKILL:
["rows", n, delay_s] some time after n rows of metrics, ["partial", n] while checkpoint-n is being written.
Answers with the child's exit status (negative: killed by that signal).
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

PRELOADED = (
    "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker", "vllm.lora.punica_wrapper.punica_cpu",
    "vllm.model_executor.models.qwen3", "transformers.models.qwen3.modeling_qwen3", "pyarrow.parquet", "pandas", "peft",
    "strop.trainer.loop", "strop.policy.policy", "strop.weights",
)  # fmt: skip


def kill_when(out: Path, condition: list[Any]) -> None:
    kind, number, *rest = condition
    while True:
        if kind == "rows":
            path = out / "metrics.jsonl"
            if path.exists() and path.read_bytes().count(b"\n") >= number:
                time.sleep(rest[0])
                break
        elif any(out.glob(f".checkpoint-{number}.partial*/optimizer.safetensors")):
            break
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGKILL)


def child(job: dict[str, Any]) -> None:
    from strop import train
    from strop.errors import StropError

    os.environ.update(job["env"])
    if job["kill_when"]:
        threading.Thread(target=kill_when, args=(Path(job["out"]), job["kill_when"]), daemon=True).start()
    try:
        train(job["config"], out=job["out"], resume=job["resume"])
    except StropError as e:
        print(e, file=sys.stderr)
        os._exit(2)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    from strop.engine import vllm_compat

    vllm_compat.prepare_environment("cpu", 1)
    import torch

    torch.set_num_threads(1)
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # children then neither scan nor copy what is here already

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what children print must not mix with the answers
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    main()
