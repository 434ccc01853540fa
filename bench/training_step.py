"""What a training step costs on a card, without an engine: random weights, synthetic packed batches, real code.

python bench/training_step.py --visit 80          all that follows, in one process
python bench/training_step.py --tune              tilings of the gated product
python bench/training_step.py --kernels           each Triton function against its plain form
python bench/training_step.py --check              fused blocks against plain layers and fp32, gradients included
python bench/training_step.py --model 1.5b --work W1 [--tokens 36000] [--checkpoint 0] [--plain] [--repeat] [--padded]
python bench/training_step.py --model 1.5b --work W1 --ablate [--json FILE]
python bench/training_step.py --model 0.5b --work L1 --profile

MFU is  FLOPs / (seconds * the card's peak in card/peaks.py)  with, per token of the layers, 4 * linear weights (forward
2, gradient of the input 2; the base gets none of its own) + 12 * adapter weights / 2, per trained token 4 * vocabulary
* hidden, and for the attention 4 * heads * head size * (pairs of query and key) * 3.5 per layer. Work done twice,
because of checkpointing or repeated prompts, is not counted as useful.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import runpy
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import training_check
from shapes import CONFIGS
from transformers import AutoModelForCausalLM, Qwen2Config

from strop.config import ObjectiveConfig
from strop.objective.packing import pack
from strop.policy import logprobs, lora
from strop.policy.kernels import torch_ops
from strop.policy.optim import MasterAdamW
from strop.policy.policy import Policy
from strop.trainer.update import MicroBatchLimit, update
from strop.types import MicroBatch, Problem, Rollout, Sample, ScoredRollout, Segment

PEAKS = runpy.run_path(str(Path(__file__).parent / "card" / "peaks.py"))
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 3_000, "tie_word_embeddings": True},
    **{name.removeprefix("qwen2.5-"): CONFIGS[name] for name in CONFIGS if name.startswith("qwen2.5-")},
}  # fmt: skip
WORK = {  # prompts, generations, prompt tokens, completion tokens (lowest, mode, highest)
    "L1": (16, 8, 110, (80, 390, 400)),
    "W1": (8, 8, 256, (1024, 1024, 1024)),
    "W4": (4, 8, 2048, (512, 512, 512)),
    "W5": (8, 16, 256, (30, 146, 1024)),
    "tiny": (2, 4, 20, (10, 30, 40)),
}


@dataclass(frozen=True)
class Setup:
    model: str
    work: str
    tokens: int
    """Budget of a micro-batch."""
    checkpoint: int = 0
    """Checkpointed layers; -1: all."""
    plain: bool = False
    """Layers as transformers wrote them."""
    repeat: bool = False
    """Every completion with a prompt of its own."""
    padded: bool = False
    """Every completion as long as the longest."""
    old_logits: bool = False
    """Logits in fp32 tensors, through plain torch."""
    old_pass: bool = False
    """A forward pass more before the update, for the log-probabilities of the policy that sampled."""
    rank: int = 16
    layers: int | None = None
    dtype: torch.dtype = torch.bfloat16


def build(model: str, layers: int | None = None, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Any:
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
             "vocab_size", "tie_word_embeddings")  # fmt: skip
    sizes = {name: SHAPES[model][name] for name in names}
    sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
    config = Qwen2Config(
        **sizes, max_position_embeddings=32_768, rope_theta=1e6, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        net = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    for layer in net.model.layers:  # as an engine keeps them
        stack([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj])
        stack([layer.mlp.gate_proj, layer.mlp.up_proj])
    return net


def stack(members: Sequence[torch.nn.Linear]) -> None:
    whole = torch.cat([m.weight.data for m in members])
    for m, part in zip(members, whole.split([m.out_features for m in members]), strict=True):
        m.weight = torch.nn.Parameter(part, requires_grad=False)


def make_policy(net: Any, setup: Setup) -> Policy:
    adapters = lora.inject(net, r=setup.rank, alpha=2.0 * setup.rank, target_modules=TARGETS, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for a in adapters.values():  # not zero, so that every gradient is there
            a.lora_B.normal_(std=0.01)
    layers = len(net.model.layers) if setup.checkpoint < 0 else setup.checkpoint
    return Policy(net, 1.0, adapters, checkpoint_layers=layers, fuse=not setup.plain)


def make_samples(work: str, vocab: int, *, padded: bool) -> list[Sample]:
    prompts, generations, prompt_length, (low, mode, high) = WORK[work]
    draw = random.Random(0)
    found = []
    for p in range(prompts):
        problem = Problem(f"p{p}", "question", tuple(draw.randrange(2, vocab) for _ in range(prompt_length)))
        for g in range(generations):
            drawn = round(draw.triangular(low, high, mode))
            n = high if padded else drawn
            ids = tuple(draw.randrange(2, vocab) for _ in range(n))
            segments = (
                Segment("prompt", problem.prompt_token_ids, (False,) * prompt_length),
                Segment("sampled", ids, (True,) * n, (-12.0,) * n),
            )
            rollout = Rollout(problem, g, segments, "", "stop", 0, 0)
            found.append(Sample(ScoredRollout(rollout, 1.0, {}), draw.uniform(-1, 1), 1.0))
    count = sum(s.scored.rollout.num_completion_tokens for s in found)
    return [replace(s, token_weight=1.0 / count) for s in found]


def useful_flops(net: Any, batches: Sequence[MicroBatch], rank: int) -> float:
    c = net.config
    size = c.hidden_size // c.num_attention_heads
    q, kv = c.num_attention_heads * size, c.num_key_value_heads * size
    pairs = [(c.hidden_size, q), (c.hidden_size, kv), (c.hidden_size, kv), (q, c.hidden_size)]
    pairs += [(c.hidden_size, c.intermediate_size)] * 2 + [(c.intermediate_size, c.hidden_size)]
    linear = c.num_hidden_layers * sum(i * o for i, o in pairs)
    adapters = c.num_hidden_layers * rank * sum(i + o for i, o in pairs)
    tokens = sum(b.num_tokens for b in batches)
    trained = sum(b.num_trained_tokens for b in batches)
    seen = 0.0
    for group in (g for b in batches for g in b.groups):
        seen += group.prompt_length**2 / 2
        seen += sum(s.length * (group.prompt_length + s.length / 2) for s in group.completions)
    attention = c.num_hidden_layers * 4 * c.num_attention_heads * size * seen * 3.5
    return tokens * (4 * linear + 6 * adapters) + 4.0 * trained * c.vocab_size * c.hidden_size + attention


@functools.cache
def peak_flops() -> float | None:
    """The card's peak in FLOP/s; None, and said so, where its name is not in the table."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no card"
    if note := PEAKS["unknown_peak"](name):
        print(note, flush=True)
    tflops = PEAKS["peak_tflops"](name)
    return None if tflops is None else tflops * 1e12


def measure(setup: Setup, net: Any | None = None, repeats: int = 3, label: str = "") -> dict[str, Any]:
    """Print one line: the median time of an update, its spread, memory, tokens per second, MFU. Return it as a row."""
    net = net if net is not None else build(setup.model, setup.layers, setup.dtype)
    unwrap(net)
    policy = make_policy(net, setup)
    samples = make_samples(setup.work, net.config.vocab_size, padded=setup.padded)
    begin = time.perf_counter()
    batches = pack(samples, setup.tokens, share_prompt=not setup.repeat)
    packing = time.perf_counter() - begin
    useful = useful_flops(net, pack(make_samples(setup.work, net.config.vocab_size, padded=False), 10**9), setup.rank)
    optimizer = MasterAdamW(policy.trainable, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    limit = MicroBatchLimit(note=lambda message: print(f"{label or setup.work}: {message}", flush=True))
    before = logprobs.ops_for
    if setup.old_logits:
        logprobs.ops_for = lambda device: torch_ops  # type: ignore[assignment, return-value]
        policy.logit_rows = 1024
    try:
        step(policy, optimizer, batches, setup, limit)  # compiles kernels, fills the allocator's cache
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            stats = step(policy, optimizer, batches, setup, limit)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
    finally:
        logprobs.ops_for = before
    seconds = statistics.median(times)
    tokens = sum(b.num_tokens for b in batches)
    peak = peak_flops()
    mfu = None if peak is None else round(useful / seconds / peak, 4)
    allocated, reserved = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
    print(
        f"{label or setup.work:<28} {seconds * 1e3:8.1f} ms ({min(times) * 1e3:.0f} to {max(times) * 1e3:.0f})  "
        f"{tokens:>7} tokens in {len(batches)}  {tokens / seconds:>9,.0f} tok/s  "
        f"MFU {'unknown' if mfu is None else f'{mfu:5.1%}'}  "
        f"peak {allocated:.1f} / {reserved:.1f} GiB  pack {packing * 1e3:.0f} ms  "
        f"grad norm {stats.metrics['grad_norm'].value:.4g}",
        flush=True,
    )
    return {
        "work": setup.work, "variant": label, "step_s": round(seconds, 4), "step_s_min": round(min(times), 4),
        "step_s_max": round(max(times), 4), "torch_reserved_gib": round(reserved, 2),
        "torch_allocated_gib": round(allocated, 2), "micro_batch_tokens": setup.tokens, "tokens": tokens,
        "trained_tokens_per_s": round(tokens / seconds), "mfu": mfu, "halvings": limit.halvings,
    }  # fmt: skip


def step(
    policy: Policy, optimizer: MasterAdamW, batches: Sequence[MicroBatch], setup: Setup,
    limit: MicroBatchLimit | None = None,
) -> Any:  # fmt: skip
    if setup.old_pass:
        with torch.no_grad():
            for batch in batches:
                policy.forward(batch)
    # A rate of 0, so that every variant works on the same weights.
    return update(policy, optimizer, batches, ObjectiveConfig(), learning_rate=0.0, max_grad_norm=1.0, limit=limit)


def unwrap(net: Any) -> None:
    """Take the adapters off again, so that one model serves all variants."""
    for name, module in list(net.named_modules()):
        if isinstance(module, lora.LoraLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(parent), leaf, module.base)


def ablate(setup: Setup, found: Path | None = None) -> None:
    """Time a step with all ideas and without each of them; rows go to `found` as they are measured."""
    net = build(setup.model, setup.layers, setup.dtype)
    small = max(8_000, setup.tokens // 2)
    variants = {
        "all": setup,
        "old-policy pass on": replace(setup, old_pass=True),
        "all, micro-batches of 9,000": replace(setup, tokens=9_000),
        "full checkpointing": replace(setup, checkpoint=-1),
        "prompts repeated": replace(setup, repeat=True),
        "fp32 logits, no kernel": replace(setup, old_logits=True),
        "plain layers": replace(setup, plain=True, tokens=small),
        "plain, full checkpointing": replace(setup, plain=True, checkpoint=-1),
    }
    # Where all completions are of one length there is nothing to pad: W5 stands in.
    low, _, high = WORK[setup.work][3]
    mixed = setup if low < high else replace(setup, work="W5")
    variants |= {} if mixed is setup else {f"{mixed.work}, all": mixed}
    variants[f"{mixed.work}, padded"] = replace(mixed, padded=True)
    rows: list[dict[str, Any]] = []

    for name, variant in variants.items():
        error = guarded(name, lambda v=variant, n=name: rows.append(measure(v, net, label=n, repeats=2)))
        if error:
            rows.append({"work": variant.work, "variant": name, "failed": error})
        if found is not None:
            found.write_text(json.dumps(rows))


def profile(setup: Setup) -> None:
    """Print the kernels that take most, and the share of the step in which no kernel runs."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    net = build(setup.model, setup.layers, setup.dtype)
    policy = make_policy(net, setup)
    batches = pack(make_samples(setup.work, net.config.vocab_size, padded=setup.padded), setup.tokens)
    optimizer = MasterAdamW(policy.trainable, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    step(policy, optimizer, batches, setup)
    torch.cuda.synchronize()
    with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        begin = time.perf_counter()
        step(policy, optimizer, batches, setup)
        torch.cuda.synchronize()
        wall = time.perf_counter() - begin
    kernels: dict[str, list[float]] = {}
    spans = []
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and "#" not in event.name[:1]:
            kernels.setdefault(event.name[:110], []).append(event.time_range.elapsed_us())
            spans.append((event.time_range.start, event.time_range.end))
    busy = covered(spans)
    launches = sum(map(len, kernels.values()))
    print(
        f"wall {wall * 1e3:.1f} ms (with the profiler), kernels run in {busy / 1e3:.1f} ms of it, {launches} launches"
    )
    print(f"gaps: {1 - busy / 1e6 / wall:.1%}")
    for name, took in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:28]:
        print(f"  {sum(took) / 1e3:8.2f} ms  {len(took):>5} x  {name}")


def covered(spans: list[tuple[float, float]]) -> float:
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def visit(device: str, seconds: float) -> None:
    """Everything that a short visit to a card is for, the most telling first; nothing new is begun after `seconds`."""
    begin = time.perf_counter()
    small, large = Setup("0.5b", "L1", 60_000), Setup("1.5b", "W1", 36_000)
    sections: dict[str, Callable[[], object]] = {
        "kernels": lambda: training_check.kernels(device),
        "check": lambda: training_check.check(device),
        "L1": lambda: measure(small),
        "L1 profile": lambda: profile(small),
        "W1": lambda: measure(large),
        "W1 profile": lambda: profile(large),
        "W4": lambda: measure(replace(large, work="W4")),
        "W1 ablation": lambda: ablate(large),
        "W5": lambda: measure(replace(large, work="W5")),
        "7b, 12 layers": lambda: measure(replace(large, model="7b", layers=12, tokens=18_000), label="7b, 12 layers"),
    }
    for name, run in sections.items():
        if time.perf_counter() - begin > seconds:
            print(f"{name}: left out, {seconds:g} s are over")
            continue
        print(f"== {name}, after {time.perf_counter() - begin:.0f} s", flush=True)
        guarded(name, run)
    print(f"== done after {time.perf_counter() - begin:.0f} s", flush=True)


def guarded(name: str, run: Callable[[], object]) -> str:
    """Run a section; an error is shown and ends that section alone. Return the error in a line, or nothing."""
    error = ""
    try:
        run()
    except Exception as e:
        error = f"{type(e).__name__}: {str(e)[:300]}"
        print(f"{name}: FAILED {error}", flush=True)
        if not isinstance(e, torch.OutOfMemoryError):
            traceback.print_exc()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return error


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="1.5b", choices=SHAPES)
    parser.add_argument("--work", default="W1", choices=WORK)
    parser.add_argument("--tokens", type=int, default=36_000)
    parser.add_argument("--checkpoint", type=int, default=0)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    for flag in ("plain", "repeat", "padded", "check", "kernels", "tune", "ablate", "profile"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --ablate: write its rows there")
    parser.add_argument("--visit", type=float, metavar="SECONDS", help="all sections, none begun after this long")
    given = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device == 'cuda' else 'no card'}", flush=True)
    setup = Setup(
        given.model, given.work, given.tokens, given.checkpoint, given.plain, given.repeat, given.padded,
        layers=given.layers,
    )  # fmt: skip
    if given.visit:
        visit(device, given.visit)
        return
    if given.kernels:
        guarded("kernels", lambda: training_check.kernels(device))
    if given.check:
        guarded("check", lambda: training_check.check(device))
    if given.tune:
        guarded("tune", training_check.tune)
    if given.ablate:
        guarded("ablate", lambda: ablate(setup, given.json))
    if given.profile:
        guarded("profile", lambda: profile(setup))
    if not (given.kernels or given.check or given.tune or given.ablate or given.profile):
        guarded(given.work, lambda: measure(setup, repeats=given.repeats))


if __name__ == "__main__":
    main()
