"""Releases and maps the KV cache many times with work in between, and compares tokens, log-probabilities and memory.

python bench/kv_cycles.py [cycles]
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

from shapes import TARGETS, card_gib, prompts, randomise, write_config

NAME, KV_GIB = "qwen2.5-0.5b", 8
WORK_GIB = 6
"""What stands for training: allocated, written with NaN and freed while the cache is released."""


def build() -> Any:
    from strop.engine import vllm_compat
    from strop.engine.base import EngineSettings

    vllm_compat.prepare_environment("cuda", 4)
    from strop.engine.vllm_engine import VllmEngine

    settings = EngineSettings(
        str(write_config(NAME)), "bfloat16", max_model_len=512, max_num_seqs=64, max_num_batched_tokens=8192,
        kv_cache_bytes=KV_GIB << 30, block_size=None, seed=0, lora_rank=16, lora_target_modules=TARGETS,
        runner=vllm_compat.RUNNERS["cuda"], release_kv=True, load_format="dummy",
    )  # fmt: skip
    return VllmEngine(settings, lambda ids: "", device="cuda")


def sample(engine: Any) -> list[Any]:
    from strop.seeding import rollout_requests
    from strop.types import Sampling

    requests = rollout_requests(prompts(8, 110), 8, run_seed=0, step=0)
    done = list(engine.generate(requests, Sampling(48, (), 1.0), policy_version=0))
    done.sort(key=lambda r: (r.problem.id, r.sample_index))
    return [(r.completion_token_ids, r.segments[1].logprobs) for r in done]


def largest_difference(a: list[Any], b: list[Any]) -> float:
    return max(abs(x - y) for (_, p), (_, q) in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def main(cycles: int) -> None:
    import torch

    from strop.memory.machine import detect_machine

    machine = detect_machine()
    others = ", ".join(map(str, machine.processes)) or "nobody else seen"
    print(f"NVML: {machine.memory_bytes / 2**20:,.0f} MiB free of {machine.total_bytes / 2**20:,.0f}; {others}")
    free, total = torch.cuda.mem_get_info()
    print(f"CUDA, with its context: {free / 2**20:,.0f} MiB free of {total / 2**20:,.0f}", flush=True)
    begin = time.perf_counter()
    engine = build()
    print(f"engine ready after {time.perf_counter() - begin:.1f} s", flush=True)
    randomise(engine)
    engine.reset_prefix_cache()
    sample(engine)  # fills caches
    first = sample(engine)
    spread = [x for _, logprobs in first for x in logprobs]
    print(f"{len(spread)} tokens, log-probabilities {min(spread):.2f} to {max(spread):.2f}")
    print(
        f"KV cache {engine.releasable_bytes / 2**30:.3f} GiB in {engine._pool and len(engine._pool._tensors)} tensors"
    )
    print("cycle  card GiB released / working / mapped   torch reserved GiB")
    releases, restores, rows, wrong, worst = [], [], [], 0, 0.0
    for cycle in range(cycles):
        begin = time.perf_counter()
        engine.release_memory()
        torch.cuda.synchronize()
        releases.append(time.perf_counter() - begin)
        released = card_gib()
        work = torch.full((WORK_GIB << 28,), float("nan"), device="cuda")
        work.mul_(2)
        working = card_gib()
        del work
        begin = time.perf_counter()
        engine.restore_memory()
        torch.cuda.synchronize()
        restores.append(time.perf_counter() - begin)
        again = sample(engine)
        wrong += [t for t, _ in again] != [t for t, _ in first]
        worst = max(worst, largest_difference(again, first))
        rows.append((cycle, released, working, card_gib(), torch.cuda.memory_reserved() / 2**30))
        if cycle % max(1, cycles // 10) == 0 or cycle == cycles - 1:
            print("{:5d}  {:8.3f} {:8.3f} {:8.3f}   {:8.3f}".format(*rows[-1]), flush=True)
    for name, values in (("release", releases), ("restore (zeroed)", restores)):
        ms = sorted(1000 * v for v in values)
        print(f"{name}: median {statistics.median(ms):.1f} ms, {ms[0]:.1f} to {ms[-1]:.1f}")
    drift = max(r[3] for r in rows[1:]) - min(r[3] for r in rows[1:])
    print(f"{cycles} cycles: {wrong} with other tokens, largest difference of a log-probability {worst:.2e}, "
          f"mapped memory varies by {1024 * drift:.1f} MiB")  # fmt: skip
    engine.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
