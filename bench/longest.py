"""The longest completion that fits a card: what Strop's plan accepts, and a whole training step at that length.

    python bench/longest.py --plan-only --vram 8,12,16,24                  the plans; needs no card
    python bench/longest.py --vram 24 --models qwen2.5-1.5b,qwen3-4b,qwen2.5-7b --generations 8
    python bench/longest.py --vram 24 --models qwen2.5-7b --fraction 0.5    a step at half of the planned length

Random weights of the true shape, one prompt of 256 tokens, rank 16 on all seven linears; 1.5B and smaller in bf16,
larger ones in NF4 (or say `qwen3-4b:none`). Lengths are multiples of 256. The models' `max_position_embeddings` is
written as large as the length asks for, since speed and memory do not depend on it; their end token lies outside of
their vocabulary, so that every completion has its full length. Rows go where bench/card/run.py writes its own.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "card"))

import contender_strop  # noqa: E402
import run as card_run  # noqa: E402
from shapes import CONFIGS  # noqa: E402
from workloads import WORKLOADS, Workload  # noqa: E402

from strop.config_load import load_config  # noqa: E402
from strop.errors import PlanError  # noqa: E402
from strop.memory.advice import changed  # noqa: E402
from strop.memory.machine import Machine  # noqa: E402
from strop.memory.plan import Plan, make_plan  # noqa: E402
from strop.memory.shapes import GIB, ModelShape  # noqa: E402

STEP = 256
PROMPT = 256
NO_LIMIT = 2**20
"""Positions of the model while lengths are searched."""
BF16_MODELS = ("qwen2.5-0.5b", "qwen2.5-1.5b")
SHOWN = ("weights_gib", "trained_gib", "max_num_seqs", "kv_cache_gib", "micro_batch_tokens", "checkpoint_layers",
         "logit_rows", "rollout_peak_gib", "training_peak_gib")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Longest:
    """What the plan says of a model on a card."""

    generations: int
    length: int
    """Tokens of the longest completion; 0 when none fits."""
    plan: Plan | None
    refusal: str
    """Why it is not `STEP` tokens longer."""

    @property
    def limit(self) -> str:
        """Which phase would need more memory."""
        return "training" if self.refusal.startswith("training on") else "rollout"

    @property
    def values(self) -> dict[str, Any]:
        return {} if self.plan is None else {item.name: item.value for item in self.plan.items}


def workload(spec: str, vram: float, generations: int) -> Workload:
    """Return the workload of `NAME` or `NAME:QUANTIZATION`; its length is filled in later."""
    name, _, quantization = spec.partition(":")
    if name not in CONFIGS:
        sys.exit(f"--models: `{name}` is not known; there are {', '.join(CONFIGS)}")
    quantization = quantization or ("none" if name in BF16_MODELS else "nf4")
    return Workload(f"longest-{name}-{vram:g}gib", f"the longest completion of {name}", name, 1, generations, PROMPT,
                    STEP, quantization, vram)  # fmt: skip


def search(work: Workload) -> Longest:
    """Find the largest `rollout.max_completion_length` that the plan accepts on a card with `vram_gib` free."""
    from transformers import AutoConfig

    assert work.shape is not None, "the workloads of this bench name a shape"
    content = CONFIGS[work.shape] | {"max_position_embeddings": NO_LIMIT}
    shape = ModelShape.from_config(AutoConfig.for_model(str(content.pop("model_type")), **content))
    size = int(work.vram_gib * GIB)
    card = Machine("cuda", f"a card with {work.vram_gib:g} GiB free", 16, size, True, size)
    with tempfile.TemporaryDirectory() as scratch:
        config = load_config(contender_strop.config_for(work, "random weights", None, Path(scratch), 1, 0))
    low, high = 0, (NO_LIMIT - PROMPT) // STEP + 1  # low fits or is 0; high is refused, if only for its positions
    plan, refusal = None, "the model's positions"
    while high - low > 1:
        middle = (low + high) // 2
        longer = changed(config, rollout__max_completion_length=middle * STEP)
        try:
            plan = make_plan(longer, shape, card, engine="vllm", engine_reason="the engine of a card")
            low = middle
        except PlanError as e:
            high, refusal = middle, e.message
    return Longest(work.num_generations, low * STEP, plan, refusal)


def print_plans(found: dict[str, Longest]) -> None:
    """Print a table of the plans (sizes in GiB), and below it what ends each of them."""
    columns = ("length", "decode_steps", "limit", "head", "embedding", "kv_cache", *SHOWN)
    print("  ".join([f"{'':<28}", *(f"{c.removesuffix('_gib'):>{max(9, len(c) - 4)}}" for c in columns)]))
    for title, longest in found.items():
        plan = longest.plan
        waves = -(-longest.generations // plan.max_num_seqs) if plan else 0
        held = {"length": longest.length, "decode_steps": waves * longest.length, "limit": longest.limit,
                "head": plan.head if plan else "", "embedding": plan.embedding if plan else ""}  # fmt: skip
        cells = held | longest.values
        print("  ".join([f"{title:<28}", *(f"{cells.get(c, '')!s:>{max(9, len(c) - 4)}}" for c in columns)]))
    for title, longest in found.items():
        print(f"{title}: {STEP} tokens more: {longest.refusal}")
        for item in longest.plan.items if longest.plan else ():
            if item.name in ("micro_batch_tokens", "checkpoint_layers", "max_num_seqs"):
                print(f"    {item.name} {item.value}: {item.reason}")


def measure(work: Workload, longest: Longest, given: argparse.Namespace) -> dict[str, Any]:
    """Train for `--steps` steps at `--fraction` of the longest length; return the row."""
    length = max(STEP, round(longest.length * given.fraction / STEP) * STEP)
    work = replace(work, completion_tokens=length)
    positions = max(CONFIGS[str(work.shape)]["max_position_embeddings"], PROMPT + longest.length)
    model = given.scratch / f"model-{work.shape}-{positions}"
    if not (model / "tokenizer.json").exists():  # written last
        # In a process of its own: a CUDA context here would count as the run's memory.
        subprocess.run([sys.executable, __file__, "--write", str(work.shape), str(model), str(positions)], check=True)
    print(f"{work.id}: {length} tokens of {longest.length} planned; its random model has {positions} positions "
          f"({CONFIGS[str(work.shape)]['max_position_embeddings']} are published)", flush=True)  # fmt: skip
    command = [sys.executable, __file__, "--train", json.dumps(asdict(work)), "--workload", work.id,
               "--model", str(model), "--steps", str(given.steps)]  # fmt: skip
    row = card_run.run(work, "strop", command, scratch=given.scratch, timeout=given.timeout)
    row |= {
        "model": work.shape, "quantization": work.quantization, "vram_gib": work.vram_gib,
        "generations": work.num_generations, "prompt_tokens": PROMPT, "planned_length": longest.length,
        "fraction": given.fraction, "length": length, "max_position_embeddings": positions, "limit": longest.limit,
        "refusal": longest.refusal, "plan_of_longest": longest.values,
    }  # fmt: skip
    return row | {"outcome": outcome(row)}


def outcome(row: dict[str, Any]) -> str:
    """Say in words how a run ended."""
    if "failed" in row:
        return "out of memory" if row["out_of_memory"] else "failed"
    if row.get("halvings"):
        return f"a micro-batch was halved {row['halvings']} times"
    if row.get("rollout_shortages"):
        return f"sequences at a time were halved {row['rollout_shortages']} times"
    if row["mean_length"] != row["length"]:
        return f"completions ended early, after {row['mean_length']:.0f} tokens on average"
    return "over the cap" if row["peak_gib"] > row["vram_gib"] else "fits"


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print one line per run, with its phases."""
    for row in rows:
        plan = row.get("plan", {})
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row.get("phases_s", {}).items() if seconds)
        print(
            f"{row['model']:<14} {row['quantization']:<5} {row['vram_gib']:g} GiB  {row['length']:>6} tokens x "
            f"{row['generations']}  peak {row['peak_gib']:.2f} GiB (plan: rollout {plan.get('rollout_peak_gib')}, "
            f"training {plan.get('training_peak_gib')})  step {row.get('step_s', float('nan')):.1f} s: {phases}  "
            f"=> {row['outcome']}"
        )


def write(name: str, folder: str, positions: str) -> None:
    """Write a model of the shape `name` with so many positions, and with an end token that it cannot emit."""
    from shapes import write_model

    CONFIGS[name] = CONFIGS[name] | {
        "max_position_embeddings": int(positions), "eos_token_id": CONFIGS[name]["vocab_size"],
    }  # fmt: skip
    write_model(name, Path(folder))


def train(work: str) -> None:
    """Be the contender of a workload that is not in the table of races."""
    known = Workload(**json.loads(work))
    WORKLOADS[known.id] = known
    contender_strop.main()


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a run's process is ended with this one
    given = _arguments()
    works = {
        f"{spec} x {given.generations}, {float(vram):g} GiB": workload(spec, float(vram), given.generations)
        for spec in given.models.split(",") for vram in given.vram.split(",")
    }  # fmt: skip
    found = {title: search(work) for title, work in works.items()}
    print_plans(found)
    if given.plan_only:
        return
    try:
        card = card_run.card_name()
    except Exception as e:
        sys.exit(f"a step needs a CUDA card with {given.vram} GiB free, its driver, pynvml and vLLM ({e!r}); without "
                 "one, --plan-only prints the plans alone")  # fmt: skip
    rows = []
    for title, work in works.items():
        if not found[title].length:
            print(f"{title}: no length fits, left out")
            continue
        row = {"card": card, **card_run.commit_and_versions(), **measure(work, found[title], given)}
        card_run.add_row(card_run.results_file(given.out, card), row)
        rows.append(row)
    print_rows(rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vram", default="24", help="GiB for the whole process (run.vram_gib); several with commas")
    parser.add_argument("--models", default="qwen2.5-1.5b,qwen3-4b,qwen2.5-7b", help=f"of {', '.join(CONFIGS)}")
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--plan-only", action="store_true", help="print the plans and end; needs no card")
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the planned length to run at")
    parser.add_argument("--steps", type=int, default=1, help="the first one compiles kernels, for some seconds")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one run may take")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/strop-bench"))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    given = parser.parse_args()
    if not 0 < given.fraction <= 1:
        parser.error("--fraction: more than 0, at most 1")
    return given


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write(*sys.argv[2:])
    elif sys.argv[1:2] == ["--train"]:
        _, _, known_as, *rest = sys.argv
        sys.argv[1:] = rest
        train(known_as)
    else:
        main()
