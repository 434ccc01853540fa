"""NF4 on a card: is the kernel right, how long do a decode step's linear layers take, and a step of the whole engine.

    python bench/nf4_decode.py correct layers engine [--models 1.5b 7b] [--tokens 1 16 32 64 128 256]
    python bench/nf4_decode.py warm sweep      # times of all tile sizes per shape, to choose them by

`layers` replays one CUDA graph over all layers of a model, each with weights of its own, so that no cache holds a
weight from one to the next: bf16 in cuBLAS, this project's NF4, bitsandbytes' NF4 where it is installed. `engine`
decodes 64 sequences of a random model in vLLM, in 16 bit and in NF4, and prints milliseconds per step.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
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


Product = Callable[[Any, Any], Any]


def step_ms(weights: list[tuple[int, Any]], product: Product, tokens: int) -> float:
    """Return the milliseconds of `product(x, weight)` for all (inputs, weight), one after the other."""
    import torch

    x = {k: torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16) for k in {k for k, _ in weights}}

    def step() -> None:
        for k, weight in weights:
            product(x[k], weight)

    return graph_ms(step)


def layers(args: argparse.Namespace) -> None:
    """Print the milliseconds of all linear layers of a decode step."""
    import torch

    for name in args.models:
        shapes, count = SHAPES[name]
        print(f"{name}: ms of all linear layers of one decode step, by tokens: {args.tokens}", flush=True)
        for what, make, product in contenders():
            try:
                weights = [(k, make(n, k)) for n, k in shapes * count]
                times = [step_ms(weights, product, m) for m in args.tokens]
                print(f"  {what:26}" + "".join(f"{ms:9.3f}" for ms in times), flush=True)
            except Exception:
                traceback.print_exc(limit=3)
            weights = []
            torch.cuda.empty_cache()


def contenders() -> list[tuple[str, Callable[[int, int], Any], Product]]:
    """Return (name, maker of a weight of n rows and k inputs, product)."""
    import torch

    from strop.quant import nf4_triton, products

    def plain(n: int, k: int) -> Any:
        return torch.randn(n, k, device="cuda", dtype=torch.bfloat16)

    found: list[tuple[str, Callable[[int, int], Any], Product]] = [
        ("bf16 (cuBLAS)", plain, torch.nn.functional.linear),
        ("nf4 as run", random_weight, products.linear),
        ("nf4 kernel", random_weight, nf4_triton.matmul),
        ("nf4 unpacked, cuBLAS", random_weight,
         lambda x, w: torch.nn.functional.linear(x, nf4_triton.dequantize(w, torch.bfloat16))),
    ]  # fmt: skip
    try:
        import bitsandbytes.functional as bnb
        from bitsandbytes.autograd._functions import matmul_4bit
    except ImportError:
        return found

    def theirs(n: int, k: int) -> Any:
        packed = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8, device="cuda")
        absmax = torch.rand(n * k // 64, device="cuda") * 0.05
        code = bnb.get_4bit_type("nf4", device="cuda")
        shape = torch.Size((n, k))
        return packed.t(), bnb.QuantState(absmax=absmax, shape=shape, blocksize=64, code=code, quant_type="nf4",
                                          dtype=torch.bfloat16)  # fmt: skip

    return [*found, ("nf4 (bitsandbytes)", theirs, lambda x, w: matmul_4bit(x, *w))]


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
    if sum(process.wait() for process in running):
        raise RuntimeError("see above")


def sweep(args: argparse.Namespace) -> None:
    """Time every candidate on every shape; print the best ones, and all of them as JSON lines."""
    import torch

    for name in args.models:
        for n, k in SHAPES[name][0]:
            copies = max(2, min(28, 200_000_000 // (n * k // 2)))
            weights = [(k, random_weight(n, k)) for _ in range(copies)]
            for m in args.tokens:
                found = sorted(((us, c) for us, c in timed(weights, n, m)), key=lambda f: f[0])
                print(f"{name} {n}x{k} m={m}")
                for us, c in found[:4]:
                    print(f"    {us:7.2f} us {json.dumps(c)}", flush=True)
                if args.out:
                    with args.out.open("a") as file:
                        file.writelines(
                            json.dumps({"model": name, "n": n, "k": k, "m": m, "us": round(us, 2), **c}) + "\n"
                            for us, c in found
                        )
            del weights
            torch.cuda.empty_cache()


def timed(weights: list[tuple[int, Any]], n: int, m: int) -> Iterator[tuple[float, dict[str, Any]]]:
    """Yield (microseconds of a product, tile sizes and splits)."""
    from strop.quant import nf4, nf4_triton

    groups = nf4.groups_of(weights[0][0])
    for c in candidates(m):
        tiles = -(-n // c["BN"]) * -(-m // c["BM"])
        for splits in (1, 2, 3, 4, 6, 8, 12):
            if splits > 1 and (tiles * splits > 132 * 6 or groups // splits < 3):
                continue
            full = {**c, "splits": splits}
            try:
                ms = step_ms(weights, functools.partial(nf4_triton.matmul, config=full), m)
            except Exception as e:
                print(f"  {full}: {type(e).__name__} {str(e)[:80]}")
                break
            yield ms / len(weights) * 1e3, full


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
    from strop.types import Problem

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
    rates = [rollout_ms(built, problems) for _ in range(3)]
    print(
        f"engine {name} {args.kind}, head {args.head}: {min(rates):.2f} ms a step at 64 sequences (runs "
        f"{[round(r, 2) for r in rates]}), ready after {ready:.0f} s, {memory:.2f} GiB with 4 GiB of KV"
    )


def rollout_ms(engine: Any, problems: list[Any]) -> float:
    """Return the median milliseconds of a decode step, all sequences running."""
    from strop.types import Request, Sampling

    requests = [Request(p, 0, i) for i, p in enumerate(problems)]
    times: list[float] = []

    def tick(unfinished: int, running: int) -> None:
        times.append(time.perf_counter())

    list(engine.generate(requests, Sampling(256, (), 1.0), policy_version=0, progress=tick))
    steps = sorted(b - a for a, b in itertools.pairwise(times[20:-2]))
    return 1e3 * steps[len(steps) // 2]


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
