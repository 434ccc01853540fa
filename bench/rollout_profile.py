"""Where a decode step's time goes: milliseconds a step by part, for each model runner and scheduler.

python bench/rollout_profile.py                      # 0.5B on both runners, 1.5B on the chosen one
python bench/rollout_profile.py qwen2.5-0.5b v2      # one model and runner, in this process
python bench/rollout_profile.py qwen2.5-7b v2 nf4    # with packed weights
python bench/rollout_profile.py qwen2.5-1.5b v2 - kernels   # nothing but the kernels of a step, by time
"""

from __future__ import annotations

import cProfile
import io
import pstats
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from shapes import TARGETS, card_gib, prompts, write_config

SHAPES = ((16, 8, 192), (2, 8, 128))
"""(prompts, completions of each, tokens): a whole step's rollout and a tail."""
PROMPT_TOKENS = 110
Times = defaultdict[str, float]


def build(name: str, runner: str, quantization: str) -> Any:
    from strop.engine import vllm_compat
    from strop.engine.base import EngineSettings

    vllm_compat.prepare_environment("cuda", 4, runner)
    begin = time.perf_counter()
    from strop.engine.vllm_engine import VllmEngine

    settings = EngineSettings(
        str(write_config(name)), "bfloat16", max_model_len=1280, max_num_seqs=128, max_num_batched_tokens=8192,
        kv_cache_bytes=4 << 30, block_size=None, seed=0, lora_rank=16, lora_target_modules=TARGETS,
        runner=runner, release_kv=False, load_format="dummy", quantization=quantization,
    )  # fmt: skip
    engine = VllmEngine(settings, lambda ids: "", device="cuda")
    print(f"## {name} {runner} {quantization}: engine ready after {time.perf_counter() - begin:.1f} s", flush=True)
    own = engine._runner
    if runner == "v2":
        how = "our kernels" if own._layers is not None else "vLLM's modules"
        print(f"layers by {how}, apart from vLLM's {own.apart}, said: {own.not_whole}", flush=True)
    attempt("memory", lambda: memory(engine))
    return engine


def memory(engine: Any) -> None:
    """Print what the engine takes beside weights and KV cache; the plan's constants come from here."""
    import torch

    gib = 2**30
    weights = sum({p.data_ptr(): p.nbytes for p in engine._runner.get_model().parameters()}.values()) / gib
    slots = sum(s.a_RH.nbytes + s.b_HR.nbytes for s in engine.adapter_slots().values()) / gib
    graphs = sum(s["total_size"] for s in torch.cuda.memory_snapshot() if s["segment_pool_id"] != (0, 0)) / gib
    print(
        f"card {card_gib():.3f} GiB, torch reserved {torch.cuda.memory_reserved() / gib:.3f}, allocated "
        f"{torch.cuda.memory_allocated() / gib:.3f}, most allocated {torch.cuda.max_memory_allocated() / gib:.3f}; "
        f"weights {weights:.3f}, adapter slots {slots:.3f}, KV {engine._settings.kv_cache_bytes / gib:.3f}, "
        f"graph pools {graphs:.3f}",
        flush=True,
    )


def timed(owner: Any, name: str, label: str, times: Times) -> None:
    """Add up the time that a method of `owner` takes under `label`."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            times[label] += time.perf_counter() - begin

    setattr(owner, name, call)


def rollout(engine: Any, groups: int, each: int, tokens: int) -> tuple[float, int]:
    """Return seconds and engine steps of one rollout."""
    from strop.seeding import rollout_requests
    from strop.types import Sampling

    requests = rollout_requests(prompts(groups, PROMPT_TOKENS), each, run_seed=0, step=0)
    steps = 0

    def count(unfinished: int, running: int) -> None:
        nonlocal steps
        steps += 1

    begin = time.perf_counter()
    made = sum(r.num_completion_tokens for r in engine.generate(
        requests, Sampling(tokens, (), 1.0), policy_version=0, progress=count
    ))  # fmt: skip
    assert made == groups * each * tokens, made
    return time.perf_counter() - begin, steps


def measure(engine: Any, label: str, times: Times) -> None:
    for groups, each, tokens in SHAPES:
        rollout(engine, groups, each, 8)
        short, _ = rollout(engine, groups, each, 8)  # prompts, and what a rollout takes to begin and to end
        times.clear()
        seconds, steps = rollout(engine, groups, each, tokens)
        parts = "  ".join(f"{k} {1000 * v / steps:.2f}" for k, v in sorted(times.items()))
        rest = 1000 * (seconds - sum(times.values())) / steps
        print(
            f"{label:<34} {groups * each:>4} sequences  {1000 * seconds / steps:6.2f} ms a step  "
            f"{groups * each * tokens / seconds:8,.0f} tok/s   {parts}  rest (waiting, own work) {rest:.2f}  "
            f"8 tokens in {1000 * short:.0f} ms",
            flush=True,
        )


def profile(engine: Any) -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    _, steps = rollout(engine, 16, 8, 100)
    profiler.disable()
    for order, lines in (("tottime", 24), ("cumulative", 24)):
        text = io.StringIO()
        pstats.Stats(profiler, stream=text).strip_dirs().sort_stats(order).print_stats(lines)
        print(f"-- {steps} steps, by {order} (the profiler's own cost included)")
        print("\n".join(line for line in text.getvalue().splitlines() if line[:9].strip()), flush=True)


def graph_only(engine: Any) -> None:
    """Time the replay of whole steps back to back, the card's share of a step, with short and with long contexts."""
    import torch

    with torch.inference_mode():
        for size in engine._runner._graphs:
            if size in (1, 16, 64, 128):
                times = "  ".join(f"at {n} tokens {steps_at(engine._runner, size, n):.2f} ms" for n in (50, 400, 1000))
                print(f"graph of {size} rows: {times}", flush=True)


def steps_at(runner: Any, rows: int, context: int, repeats: int = 40) -> float:
    """Return milliseconds of a step of `rows` requests that have `context` tokens each, in blocks of their own."""
    import torch

    table, state = runner.block_tables.block_tables[0].gpu, runner.req_states
    blocks = -(-(context + repeats + 4) // 16)
    runner._control[0] = rows
    runner._control[1 : 1 + rows] = torch.arange(rows, device="cuda")
    places = torch.arange(rows * blocks, device="cuda").view(rows, blocks)
    table[:rows, :blocks] = 1 + places % (
        runner.kv_cache_config.num_blocks - 1
    )  # blocks are shared where there are few
    state.num_computed_tokens.gpu[:rows] = context
    graph = runner._graphs[runner._size_of[rows]]
    graph.replay()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        graph.replay()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - begin) / repeats


def kernels(engine: Any) -> None:
    """List where the card spends a step of 64 and of 128 rows, by kernel."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    for rows in (64, 128):
        graph = engine._runner._graphs[rows]
        graph.replay()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(5):
                graph.replay()
            torch.cuda.synchronize()
        events = sorted(seen.key_averages(), key=lambda e: -e.device_time_total)
        total, count = sum(e.device_time_total for e in events), sum(e.count for e in events)
        print(f"-- {rows} rows: {total / 5000:.3f} ms of kernels a step, {count // 5} launches", flush=True)
        for e in events[:22]:
            print(
                f"{e.device_time_total / 5000:7.3f} ms {e.count // 5:4d} x {e.device_time_total / e.count:5.1f} us "
                f" {e.key[:80]}"
            )


def attempt(what: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except Exception as e:  # one section must not cost the others
        print(f"!! {what}: {type(e).__name__}: {e}", flush=True)


def one(name: str, runner: str, quantization: str = "none", only: str = "") -> None:
    engine = build(name, runner, "none" if quantization == "-" else quantization)
    if only == "kernels":
        attempt("graph", lambda: graph_only(engine))
        attempt("kernels", lambda: kernels(engine))
        engine.close()
        return
    scheduler, core, times = engine._scheduler, engine._core, defaultdict[str, float](float)
    timed(scheduler, "schedule", "schedule", times)
    timed(scheduler, "update_from_output", "update", times)
    timed(core.model_executor, "execute_model", "execute", times)
    timed(core.model_executor, "sample_tokens", "sample", times)
    attempt("own scheduler", lambda: measure(engine, f"{name} {runner} own scheduler", times))
    if runner == "v1":
        scheduler._plain = False
        attempt("vLLM's scheduler", lambda: measure(engine, f"{name} {runner} vLLM's scheduler", times))
        scheduler._plain = True
    if runner == "v1":
        original = engine._sampling_params

        def unseeded(request: Any, sampling: Any) -> Any:
            params = original(request, sampling)
            params.seed = None
            return params

        engine._sampling_params = unseeded
        attempt("unseeded", lambda: measure(engine, f"{name} {runner} own scheduler, unseeded", times))
    if runner == "v2":
        attempt("graph", lambda: graph_only(engine))
        attempt("kernels", lambda: kernels(engine))
    attempt("memory", lambda: memory(engine))
    attempt("profile", lambda: profile(engine))
    engine.close()


def main() -> None:
    if len(sys.argv) > 2:
        one(*sys.argv[1:5])
        return
    for arguments in (("qwen2.5-0.5b", "v2"), ("qwen2.5-0.5b", "v1"), ("qwen2.5-1.5b", "v2")):
        try:
            subprocess.run([sys.executable, __file__, *arguments], timeout=90, check=False)
        except subprocess.TimeoutExpired:
            print(f"!! {arguments}: no end after 90 s", flush=True)


if __name__ == "__main__":
    main()
