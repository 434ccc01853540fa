"""One command for the whole comparison on one card: each workload with each contender, in one go, as a table and JSON.

    python bench/card/run.py --model FOLDER --data FOLDER --sweep        L1 and W1 to W6 for everyone that is installed
    python bench/card/run.py --workloads W1,W4 --contenders strop,trl,unsloth
    python bench/card/run.py --workloads L1 --model FOLDER --data FOLDER --seeds 0,1,2 --seconds strop=255,trl=1000
    python bench/card/run.py --workloads W1 --ablate             W1, and W1's training without each idea in turn

A contender runs in a process of its own. Times are taken from its first instruction; memory is what NVML reports for
the whole card, sampled every 20 ms. `mfu_6n` = 6 x (linears + head) x tokens per second of training / peak.
Rows of `--ablate` are training phases alone (bench/training_step.py); their memory is what torch reserved.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import options
import sweep
from peaks import unknown_peak
from summary import complete, summarise
from table import table
from workloads import Workload, linear_parameters_of

HERE = Path(__file__).resolve().parent
SCRIPTS = {"strop": "contender_strop.py", "trl": "peer_trl.py", "unsloth": "peer_unsloth.py"}
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
    given = options.read(description=__doc__)
    works, left_out = options.wanted_workloads(given)
    for line in left_out:
        print(line, flush=True)
    try:
        card = card_name()
    except Exception as e:
        sys.exit(f"the comparison needs a CUDA card, its driver and pynvml ({e!r})")
    if note := unknown_peak(card):
        print(note, flush=True)
    race = Race(given, card)
    for work in works:
        race.run(work)
    if given.ablate:
        for row in ablation(given.scratch, given.ablate_tokens, given.timeout):
            race.add(row)
    print(table(race.rows), flush=True)


class Race:
    """The rows of a card's results file of today, and the runs that add to it."""

    def __init__(self, given: argparse.Namespace, card: str) -> None:
        self._given, self._card = given, card
        self._target = results_file(given.out, card)
        self.rows: list[dict[str, Any]] = json.loads(self._target.read_text()) if self._target.exists() else []

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write a row and return it."""
        self.rows = add_row(self._target, {"card": self._card, **commit_and_versions(), **row})
        return self.rows[-1]

    def run(self, work: Workload) -> None:
        """Run a workload with each contender that is there, all seeds in turn."""
        given = self._given
        model = _model_for(work, given)
        settings = {}
        for contender in given.contenders:
            if contender != "strop" and not work.peers:
                print(f"{work.id} {contender}: has no such settings, left out", flush=True)
            elif contender != "strop" and importlib.util.find_spec(contender) is None:
                print(f"{work.id} {contender}: not installed, left out", flush=True)
            else:
                settings[contender] = self._settings(work, contender, model)
        for seed in options.seeds(given):
            for contender, setting in settings.items():
                steps, seconds = options.limits(work, contender, given)
                self._run_one(work, contender, model, steps=steps, seconds=seconds, seed=seed, **setting)

    def _settings(self, work: Workload, contender: str, model: str) -> dict[str, Any]:
        """Return a peer's micro-batch and checkpointing: as given, or the fastest that a sweep finds."""
        given = self._given
        setting = {"micro_batch": given.micro_batch[contender], "checkpointing": given.checkpointing[contender]}
        if contender == "strop" or work.shape is not None or contender not in given.sweep:
            return setting

        def attempt(micro_batch: int, checkpointing: int) -> dict[str, Any]:
            return self._run_one(
                work, contender, model, steps=sweep.STEPS, seconds=options.UNLIMITED_S, seed=options.seeds(given)[0],
                micro_batch=micro_batch, checkpointing=checkpointing, swept=True,
            )  # fmt: skip

        found = sweep.best(sweep.sweep(attempt, work.vram_gib), work.vram_gib)
        if found is None:
            print(
                f"{work.id} {contender}: nothing of the sweep ran under {work.vram_gib:g} GiB; goes on with {setting}"
            )
            return setting
        setting = {name: found[name] for name in setting}
        print(f"{work.id} {contender}: fastest under {work.vram_gib:g} GiB: {setting}", flush=True)
        return setting

    def _run_one(
        self, work: Workload, contender: str, model: str, *, steps: int, seconds: float, seed: int, micro_batch: int,
        checkpointing: int, swept: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        given, utilization = self._given, self._given.utilization[contender]
        command = [
            sys.executable, str(HERE / SCRIPTS[contender]), "--workload", work.id, "--model", model, "--steps",
            str(steps), "--seconds", str(seconds), "--seed", str(seed), "--micro-batch", str(micro_batch),
            "--checkpointing", str(checkpointing), "--utilization", str(utilization), "--evaluate", str(int(not swept)),
        ]  # fmt: skip
        command += ["--data", given.data] if given.data else []
        row = run(
            work, contender, command, scratch=given.scratch, timeout=given.timeout, seed=seed,
            parameters=_parameters(model),
        )  # fmt: skip
        if contender != "strop":
            row |= {"micro_batch": micro_batch, "checkpointing": checkpointing, "utilization": utilization}
        return self.add(row | ({"sweep": True} if swept else {}))


@functools.cache
def _parameters(model: str) -> int | None:
    """Return the weights that a token is multiplied with, by the model's config; None where it has other names."""
    try:
        return linear_parameters_of(json.loads(Path(model, "config.json").read_text()))
    except (OSError, KeyError) as e:
        print(f"{model}: its sizes are not known ({e!r}), so MFU is left empty", flush=True)
        return None


def results_file(folder: Path, card: str) -> Path:
    """Return the JSON file of today's rows of a card."""
    return folder / f"{datetime.date.today()}-{re.sub(r'[^A-Za-z0-9]+', '-', card)}.json"


def add_row(target: Path, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Add a row, with all required columns, to a results file, which is written at once; return all of its rows."""
    rows = [*(json.loads(target.read_text()) if target.exists() else []), complete(row)]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def run(
    work: Workload, contender: str, command: list[str], *, scratch: Path, timeout: float, seed: int = 0,
    parameters: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run a contender's command, `--events FILE` added, and return its row; a failure is a row with its last output."""
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{work.id}-{contender}-", dir=scratch))
    events_path, log = folder / "events.jsonl", folder / "log.txt"
    peak, started = PeakMemory(), time.time()
    with log.open("wb") as output:
        code = _run_alone([*command, "--events", str(events_path)], output, timeout)
    row: dict[str, Any] = {"workload": work.id, "contender": contender, "seed": seed,
                           "peak_gib": round(peak.stop(), 2), "wall_s": round(time.time() - started, 1)}  # fmt: skip
    events = [json.loads(line) for line in events_path.read_text().splitlines()] if events_path.exists() else []
    row |= summarise(work, events, started, card_name(), parameters)
    said = log.read_text(errors="replace")
    row |= {column: said.count(note) for column, note in SHORTAGES.items() if note in said}
    if code:
        row["failed"] = f"no end after {timeout:g} s\n" * (code == 124) + said[-1500:]
        row["out_of_memory"] = any(sign in said for sign in OUT_OF_MEMORY)
    print(json.dumps({k: v for k, v in row.items() if k not in ("curve", "rewards")}), flush=True)
    return row


def ablation(scratch: Path, tokens: int, timeout: float) -> list[dict[str, Any]]:
    """Time W1's training with all ideas and without each of them; one row per variant."""
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="ablation-", dir=scratch))
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


def _model_for(work: Workload, given: argparse.Namespace) -> str:
    if work.shape is None:
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


if __name__ == "__main__":
    main()
