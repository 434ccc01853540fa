"""NF4 on a card: is the kernel right, how long do a decode step's linear layers take, and a step of the whole engine.

    python bench/nf4_decode.py correct layers engine [--models 1.5b 7b] [--tokens 1 16 32 64 128 256]
    python bench/nf4_decode.py warm sweep      # times of all tile sizes per shape, to choose them by

`layers` replays one CUDA graph over all layers of a model, each with weights of its own, so that no cache holds a
weight from one to the next: bf16 in cuBLAS, this project's NF4, bitsandbytes' NF4 where it is installed. `engine`
decodes 64 sequences of a random model in vLLM, in 16 bit and in NF4, and prints milliseconds per step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shapes import write_config

SHAPES = {  # (rows, inputs) of the fused linear layers of Qwen2.5, and how many decoder layers it has
    "1.5b": ([(2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960)], 28),
    "7b": ([(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)], 28),
}


def graph_ms(run: Callable[[], Any], replays: int = 10) -> float:
    """Return the milliseconds of one replay of `run` as a CUDA graph, the median of several."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def random_weight(n: int, k: int) -> Any:
    """Return a random NF4 weight on the card."""
    import torch

    from strop.quant.nf4 import Nf4, groups_of

    groups = groups_of(k)
    packed = torch.randint(0, 256, (n, 64 * groups), dtype=torch.uint8, device="cuda")
    return Nf4(packed, (torch.rand(n, 2 * groups, device="cuda") * 0.05).half(), k)


def correct(args: argparse.Namespace) -> None:
    """Compare the kernels with torch's operators on the same codes."""
    import torch

    from strop.quant import nf4, nf4_triton

    torch.manual_seed(0)
    worst = 0.0
    for n, k in [*SHAPES["1.5b"][0], (4608, 3584), (3584, 18944), (576, 576), (1216, 896), (130, 192)]:
        weight = nf4.quantize(torch.randn(n, k, device="cuda") * 0.03)
        for dtype in (torch.bfloat16, torch.float16):
            plain = nf4.dequantize(weight, dtype)
            for asm in (True, False):
                wrong = int((nf4_triton.dequantize(weight, dtype, asm=asm) != plain).sum())
                if wrong:
                    print(f"WRONG dequantize {n}x{k} {dtype} asm={asm}: {wrong} values differ")
            bias = torch.randn(n, device="cuda", dtype=dtype)
            for m in (1, 33, 64, 256) if dtype == torch.bfloat16 else (33,):
                x = torch.randn(m, k, device="cuda", dtype=dtype)
                exact = x.float() @ plain.float().t() + bias.float()
                for splits in (None, 1, 3):
                    c = nf4_triton.choose(m, n, nf4.groups_of(k), 132, 227 << 10)
                    if splits is not None:
                        c = {**c, "splits": splits}
                    y = nf4_triton.matmul(x, weight, bias, config=c)
                    again = nf4_triton.matmul(x, weight, bias, config=c)
                    error = float((y.float() - exact).norm() / exact.norm())
                    worst = max(worst, error)
                    if not error < 4e-3 or not torch.equal(y, again):
                        print(f"WRONG {m}x{n}x{k} {dtype} {c}: error {error:.2e}, repeats {torch.equal(y, again)}")
    print(f"correct: largest relative error of a product {worst:.2e} (rounding to 16 bit alone: about 2e-3)")


def layers(args: argparse.Namespace) -> None:
    """Print the milliseconds of all linear layers of a decode step."""
    import torch

    from strop.quant import nf4_triton

    for name in args.models:
        shapes, count = SHAPES[name]
        results: dict[str, dict[int, float]] = {}

        def measure(what: str, step: Callable[[dict[int, Any]], None]) -> None:
            for m in args.tokens:
                x = {k: torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _, k in shapes}
                results.setdefault(what, {})[m] = graph_ms(lambda: step(x))

        ours = [(n, k, random_weight(n, k)) for _ in range(count) for n, k in shapes]
        measure("nf4 (Strop)", lambda x: [nf4_triton.matmul(x[k], w) for _, k, w in ours] and None)
        measure("nf4, dequantised, cuBLAS", lambda x: [
            torch.nn.functional.linear(x[k], nf4_triton.dequantize(w, torch.bfloat16)) for _, k, w in ours] and None)
        del ours
        try:
            import bitsandbytes.functional as bnb
            from bitsandbytes import matmul_4bit

            theirs = []
            for n, k in shapes * count:
                packed = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8, device="cuda")
                state = bnb.QuantState(
                    absmax=torch.rand(n * k // 64, device="cuda") * 0.05, shape=torch.Size((n, k)), blocksize=64,
                    code=bnb.get_4bit_type("nf4", device="cuda"), quant_type="nf4", dtype=torch.bfloat16,
                )  # fmt: skip
                theirs.append((k, packed, state))
            measure("nf4 (bitsandbytes)", lambda x: [matmul_4bit(x[k], p.t(), s) for k, p, s in theirs] and None)
            del theirs
        except Exception:
            traceback.print_exc(limit=3)
        torch.cuda.empty_cache()
        plain = [(k, torch.randn(n, k, device="cuda", dtype=torch.bfloat16)) for n, k in shapes * count]
        measure("bf16 (cuBLAS)", lambda x: [torch.nn.functional.linear(x[k], w) for k, w in plain] and None)
        del plain
        torch.cuda.empty_cache()
        print(f"{name}: ms of all linear layers of one decode step, by tokens: {args.tokens}")
        for what, times in results.items():
            print(f"  {what:26}" + "".join(f"{times[m]:9.3f}" for m in args.tokens))


def candidates(m: int) -> list[dict[str, Any]]:
    """Return the tile sizes to try for m tokens."""
    bm = 16 if m <= 16 else 32 if m <= 32 else 64
    sizes = [(bm, 64, 4, 2), (bm, 64, 4, 3), (bm, 64, 4, 4), (bm, 128, 8, 3), (bm, 128, 4, 3)]
    if m > 64:
        sizes += [(128, 64, 4, 3), (128, 128, 4, 2), (128, 128, 4, 3), (128, 128, 8, 3)]
    names = ("BM", "BN", "warps", "stages")
    return [{**dict(zip(names, size, strict=True)), "asm": True} for size in sizes]


def precompile(args: argparse.Namespace) -> None:
    """Compile every n-th candidate by using it once; the compiled kernels are cached on disk."""
    from strop.quant import nf4_triton

    weight = random_weight(256, 1536)
    import torch

    index, count = args.share
    todo = []
    for m in args.tokens:
        todo += [(m, {**c, "splits": s}) for c in candidates(m) for s in (1, 2)]
    for m, c in todo[index::count]:
        try:
            nf4_triton.matmul(torch.randn(m, 1536, device="cuda", dtype=torch.bfloat16), weight, config=c)
        except Exception as e:
            print(f"{c}: {type(e).__name__} {str(e)[:80]}")


def warm(args: argparse.Namespace) -> None:
    """Compile what `sweep` needs in many processes, with `correct` beside them: it measures nothing."""
    count = max(1, min(14, (os.cpu_count() or 1) - 1))
    tokens = [str(t) for t in args.tokens]
    commands = [["precompile", "--tokens", *tokens, "--share", str(i), str(count)] for i in range(count)]
    running = [subprocess.Popen([sys.executable, __file__, *command]) for command in [["correct"], *commands]]
    if any([process.wait() for process in running]):
        raise RuntimeError("see above")


def sweep(args: argparse.Namespace) -> None:
    """Time every candidate on every shape; print the best ones, and all of them as JSON lines."""
    import torch

    from strop.quant import nf4, nf4_triton

    for name in args.models:
        for n, k in SHAPES[name][0]:
            copies = max(2, min(28, 200_000_000 // (n * k // 2)))
            weights = [random_weight(n, k) for _ in range(copies)]
            plain = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(max(2, copies // 4))]
            for m in args.tokens:
                x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
                base = graph_ms(lambda: [torch.nn.functional.linear(x, w) for w in plain], 5) / len(plain) * 1e3
                found = []
                for c in candidates(m):
                    tiles = -(-n // c["BN"]) * -(-m // c["BM"])
                    for splits in (1, 2, 3, 4, 6, 8, 12):
                        if splits > 1 and (tiles * splits > 132 * 6 or nf4.groups_of(k) // splits < 3):
                            continue
                        full = {**c, "splits": splits}
                        try:
                            ms = graph_ms(lambda: [nf4_triton.matmul(x, w, config=full) for w in weights], 3)
                        except Exception as e:
                            print(f"  {full}: {type(e).__name__} {str(e)[:80]}")
                            break
                        found.append((ms / copies * 1e3, full))
                found.sort(key=lambda f: f[0])
                print(f"{name} {n}x{k} m={m}: bf16 {base:.1f} us; best:")
                for us, c in found[:6]:
                    print(f"    {us:7.2f} us {json.dumps(c)}")
                if args.out:
                    with args.out.open("a") as file:
                        for us, c in found:
                            row = {"model": name, "n": n, "k": k, "m": m, "us": round(us, 2), "bf16": round(base, 2), **c}
                            file.write(json.dumps(row) + "\n")
            del weights, plain
            torch.cuda.empty_cache()


def engine(args: argparse.Namespace) -> None:
    """Time decoding in vLLM, each kind in a process of its own."""
    for name in args.models:
        for kind, head in (("none", "16bit"), ("nf4", "16bit"), ("nf4", "int8")):
            command = [sys.executable, __file__, "one-engine", "--models", name, "--kind", kind, "--head", head]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            print((done.stdout if done.returncode == 0 else done.stdout + done.stderr)[-2500:], end="")


def one_engine(args: argparse.Namespace) -> None:
    """Build one engine on random weights and print milliseconds per decode step at 64 sequences."""
    from strop.engine import vllm_compat

    vllm_compat.prepare_environment("cuda", 4)
    import torch

    from strop.engine.base import EngineSettings
    from strop.engine.vllm_engine import VllmEngine
    from strop.types import Problem, Request, Sampling

    name = args.models[0]
    with tempfile.TemporaryDirectory() as folder:
        write_config(f"qwen2.5-{name}", Path(folder))
        start = time.time()
        settings = EngineSettings(
            folder, "bfloat16", max_model_len=640, max_num_seqs=64, max_num_batched_tokens=8192,
            kv_cache_bytes=4 << 30, block_size=None, seed=0, lora_rank=16,
            lora_target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            load_format="dummy", runner="v2", quantization=args.kind, head=args.head,
            embedding="int8" if args.head == "int8" else "card",
        )  # fmt: skip
        built = VllmEngine(settings, lambda ids: "", device="cuda")
    ready, memory = time.time() - start, torch.cuda.memory_allocated() / 2**30
    problems = [Problem(str(i), "", tuple(range(10 + i, 74 + i))) for i in range(64)]
    rates = []
    for _ in range(3):
        requests = [Request(p, 0, i) for i, p in enumerate(problems)]
        times: list[float] = []
        list(built.generate(requests, Sampling(256, (), 1.0), policy_version=0,
                            progress=lambda waiting, running: times.append(time.perf_counter())))  # fmt: skip
        steps = sorted(b - a for a, b in zip(times[20:-2], times[21:-1], strict=True))
        rates.append(1e3 * steps[len(steps) // 2])
    print(f"engine {name} {args.kind}, head {args.head}: {min(rates):.2f} ms a step at 64 sequences (runs {[round(r, 2) for r in rates]}), "
          f"ready after {ready:.0f} s, {memory:.2f} GiB with 4 GiB of KV")


def main() -> None:
    """Run the sections that were asked for; one that fails does not stop the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = {"correct": correct, "layers": layers, "sweep": sweep, "engine": engine, "warm": warm,
                "precompile": precompile, "one-engine": one_engine}  # fmt: skip
    parser.add_argument("sections", nargs="+", choices=sections)
    parser.add_argument("--models", nargs="+", default=["1.5b", "7b"], choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 32, 64, 128, 256])
    parser.add_argument("--share", nargs=2, type=int, default=[0, 1])
    parser.add_argument("--kind", default="nf4")
    parser.add_argument("--head", default="16bit")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    failed = False
    for section in args.sections:
        start = time.time()
        try:
            sections[section](args)
        except Exception:
            failed = True
            traceback.print_exc()
        if section not in ("precompile", "one-engine"):
            print(f"[{section}: {time.time() - start:.0f} s]", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
