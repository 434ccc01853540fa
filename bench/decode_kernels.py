"""Microseconds of each kernel of a decode step's layers, for several tiles: a CUDA graph of fifty calls each.

python bench/decode_kernels.py               # 0.5B, 1.5B and 7B, rank 16
python bench/decode_kernels.py qwen3-4b 32   # one shape of bench/shapes.py, another rank

What a product has just written is in the card's cache, as in a step; every call has a B of its own, which is not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from shapes import CONFIGS

from strop.engine.decode_kernels import (
    ROPE_TILE,
    SILU_TILE,
    Product,
    Rotary,
    add_norm,
    add_rope_cache,
    add_silu_mul,
)

CALLS = 50
ROWS = (16, 64, 128)
NAMES = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b")
SILU_TILES = (
    (16, 64, 2),
    (16, 64, 4),
    (16, 128, 2),
    (16, 128, 4),
    (16, 256, 4),
    (32, 64, 4),
    (32, 128, 4),
    (64, 64, 4),
)
ROPE_TILES = ((16, 1), (16, 2), (16, 4), (32, 2), (32, 4))
NORM_WARPS = (2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model that decide the kernels' work."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    size: int
    head_norms: bool
    bias: bool

    @classmethod
    def of(cls, name: str) -> Shape:
        c: dict[str, Any] = CONFIGS[name]
        size = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
        kind = c["model_type"]
        return cls(c["hidden_size"], c["intermediate_size"], c["num_attention_heads"], c["num_key_value_heads"], size,
                   kind == "qwen3", kind == "qwen2")  # fmt: skip


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Return the time of one of `calls` in a graph of all of them."""
    for call in calls[:2]:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return 100 * start.elapsed_time(end) / len(calls)


def products(rows: int, sizes: Sequence[int], rank: int, *, bias: bool = False) -> list[Product]:
    """Return a product of all parts with its adapter's columns beside it, as often as there are calls."""
    width, total = sum(sizes), rank * len(sizes)
    y = torch.randn(rows, width + total, device="cuda", dtype=torch.bfloat16)
    added = torch.randn(width, device="cuda", dtype=torch.bfloat16) if bias else None
    factors = torch.randn(CALLS, total, width, device="cuda", dtype=torch.bfloat16)
    return [Product(y, y[:, width:] if rank else None, b if rank else None, added) for b in factors]


def show(kernel: str, rows: int, times: dict[Any, float], chosen: Any) -> None:
    best = min(times, key=times.__getitem__)
    listed = "  ".join(f"{tile} {us:.2f}" for tile, us in times.items())
    found = f"best {best} {times[best]:.2f} us, chosen {chosen} {times[chosen]:.2f}"
    print(f"{kernel:<16} {rows:4} rows: {found}   {listed}", flush=True)


def norms(shape: Shape, rows: int, rank: int) -> None:
    made = products(rows, [shape.hidden], rank)
    residual = torch.zeros(rows, shape.hidden, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(shape.hidden, device="cuda", dtype=torch.bfloat16)
    times: dict[Any, float] = {}
    for warps in (None, *NORM_WARPS):
        times[warps] = microseconds([lambda p=p, w=warps: add_norm(p, residual, weight, 1e-6, warps=w) for p in made])
    show("add_norm", rows, times, None)


def silus(shape: Shape, rows: int, rank: int) -> None:
    made = products(rows, [shape.inner] * 2, rank)
    times: dict[Any, float] = {}
    for tile in SILU_TILES:
        times[tile] = microseconds([lambda p=p, t=tile: add_silu_mul(p, shape.inner, tile=t) for p in made])
    show("add_silu_mul", rows, times, SILU_TILE)


def ropes(shape: Shape, rows: int, rank: int) -> None:
    size, device = shape.size, "cuda"
    made = products(rows, [n * size for n in (shape.heads, shape.kv_heads, shape.kv_heads)], rank, bias=shape.bias)
    cache = torch.zeros(rows, 16, shape.kv_heads, 2 * size, device=device, dtype=torch.bfloat16).transpose(1, 2)
    weight = torch.ones(size, device=device, dtype=torch.bfloat16) if shape.head_norms else None
    rotary = Rotary(torch.randn(4096, size, device=device, dtype=torch.bfloat16), weight, weight, 1e-6)
    positions = torch.randint(0, 4096, (rows,), device=device)
    slots = 16 * torch.randperm(rows, device=device)
    times: dict[Any, float] = {}
    for tile in ROPE_TILES:
        times[tile] = microseconds(
            [lambda p=p, t=tile: add_rope_cache(p, shape.heads, rotary, positions, slots, cache, tile=t) for p in made]
        )
    show("add_rope_cache", rows, times, ROPE_TILE)


def linears(shape: Shape, rows: int, rank: int) -> None:
    """Print what a product costs alone, with A below the weight, and with A and B as products of their own."""
    attention = (shape.heads + 2 * shape.kv_heads) * shape.size
    layers = {"qkv": (shape.hidden, attention, 3), "o": (shape.heads * shape.size, shape.hidden, 1),
              "gate_up": (shape.hidden, 2 * shape.inner, 2), "down": (shape.inner, shape.hidden, 1)}  # fmt: skip
    for name, (width, outs, parts) in layers.items():
        linear(name, rows, width, outs, parts * rank)


def linear(name: str, rows: int, width: int, outs: int, total: int) -> None:
    """Print the times of one layer's products."""
    # Enough weights that none is still in the card's cache.
    count = max(2, min(CALLS, (200 << 20) // (2 * width * outs)))
    stacked = torch.randn(count, outs + total, width, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(total, outs, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)

    def apart(w: torch.Tensor) -> torch.Tensor:
        return product(x, w[:outs]).addmm_(product(x, w[outs:]), b)

    product = torch.nn.functional.linear
    alone = microseconds([lambda w=w: product(x, w[:outs]) for w in stacked])
    below = microseconds([lambda w=w: product(x, w) for w in stacked])
    three = microseconds([lambda w=w: apart(w) for w in stacked])
    times = f"W {alone:.2f} us, W and A {below:.2f}, W, A and B as three {three:.2f}"
    print(f"{name:<16} {rows:4} rows: {times}", flush=True)


def main() -> None:
    names, rank = (sys.argv[1:2] or NAMES), int(sys.argv[2]) if len(sys.argv) > 2 else 16
    print(torch.cuda.get_device_name())
    for name in names:
        shape = Shape.of(name)
        print(f"## {name} {shape}, rank {rank}", flush=True)
        for part in (norms, silus, ropes, linears):
            for rows in ROWS:
                part(shape, rows, rank)


if __name__ == "__main__":
    main()
