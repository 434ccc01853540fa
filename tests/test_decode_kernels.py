"""A decode step's kernels in Triton's interpreter against plain torch, and adapters that lie below a layer's weight."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from strop.engine.vllm_lora import combine, random_adapter
from strop.errors import EngineError

REFERENCE = """
import itertools, sys, torch
from strop.engine.decode_kernels import Product, Rotary, add_norm, add_rope_cache, add_silu_mul

ON_CARD = sys.argv[1] == "cuda"
torch.set_default_device(sys.argv[1])
GENERATOR = torch.Generator(sys.argv[1]).manual_seed(0)

def rand(*shape, dtype):
    return torch.randn(*shape, generator=GENERATOR).to(dtype)

def product(rows, sizes, rank, dtype, *, bias, apart):
    '''A product with junk beside it, and what it is worth in fp32, rounded once.'''
    width, total = sum(sizes), rank * len(sizes)
    buffer = rand(rows, width + total + 5, dtype=dtype)
    y = buffer[:, : width + 3]
    low = rand(rows, total, dtype=dtype) if apart else buffer[:, width : width + total]
    b = torch.zeros(total, width, dtype=dtype)
    column = 0
    for part, size in enumerate(sizes):
        b[part * rank : (part + 1) * rank, column : column + size] = 0.3 * rand(rank, size, dtype=dtype)
        column += size
    added = rand(width, dtype=dtype) if bias else None
    worth = y[:, :width].double() + low.double() @ b.double() + (added.double() if bias else 0)
    return Product(y, low if rank else None, b if rank else None, added), worth

def norm(x, weight, eps, dtype):
    normed = (x.double() / (x.double().pow(2).mean(-1, keepdim=True) + eps).sqrt()).to(dtype)
    return (normed.double() * weight.double()).to(dtype)

def close(ours, theirs, dtype, what):
    '''Equal but for sums whose fp32 and fp64 values round to neighbours, which what follows may double.'''
    unit = torch.finfo(dtype).eps
    gap = (ours.double() - theirs.double()).abs()
    assert torch.isfinite(ours).all(), what
    size = theirs.double().abs()
    assert (gap <= 2 * unit * (size + size.max())).all(), (what, float(gap.max()))
    if ON_CARD or dtype == torch.float16:  # the interpreter cuts bf16 off instead of rounding it
        assert (gap > 0).float().mean() < 0.03, (what, float((gap > 0).float().mean()))
"""

NORM = """
for dtype, rank, (rows, width) in itertools.product(
    (torch.bfloat16, torch.float16), (0, 1, 8, 16, 20), ((1, 64), (5, 200), (3, 576))
):
    residual, weight = rand(rows, width, dtype=dtype), rand(width, dtype=dtype)
    p, worth = product(rows, [width], rank, dtype, bias=rank == 20, apart=rank == 8)
    total = (residual.double() + worth.to(dtype).double()).to(dtype)
    case = ("add_norm", dtype, rank, rows, width)
    ours = add_norm(p, residual, weight, 1e-5)
    close(residual, total, dtype, case)
    close(ours, norm(residual, weight, 1e-5, dtype), dtype, case)
    before = residual.clone()
    close(add_norm(None, residual, weight, 1e-5), norm(before, weight, 1e-5, dtype), dtype, case)
    assert torch.equal(residual, before)
"""

SILU = """
for dtype, rank, (rows, width) in itertools.product(
    (torch.bfloat16, torch.float16), (0, 8, 16, 20, 70), ((1, 40), (18, 136), (33, 128))
):
    if dtype == torch.bfloat16 and rank and not ON_CARD:
        continue  # the interpreter multiplies the bits of bf16 matrices as integers
    p, worth = product(rows, [width, width], rank, dtype, bias=rank == 20, apart=rank == 8)
    gate, up = worth.to(dtype).double().split(width, dim=1)
    theirs = ((gate * gate.sigmoid()).to(dtype).double() * up).to(dtype)
    for tile in ((16, 64, 4), None):
        ours = add_silu_mul(p, width, tile=tile)
        close(ours, theirs, dtype, ("add_silu_mul", dtype, rank, rows, width, tile))
"""

ROPE = """
def rope(x, cos_sin, positions, dtype):
    cos, sin = cos_sin[positions].double()[:, None].chunk(2, dim=-1)
    a, b = x.double().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(dtype)

cases = [(torch.bfloat16, 0, 64, False, 5), (torch.bfloat16, 0, 128, True, 17), (torch.float16, 16, 64, True, 3),
         (torch.float16, 20, 96, False, 16), (torch.float16, 8, 128, True, 19), (torch.float16, 16, 256, False, 2)]
if ON_CARD:
    cases += [(torch.bfloat16, rank, size, normed, rows) for rank, rows in ((16, 2), (8, 64), (40, 33))
              for size in (32, 64, 96, 128, 256) for normed in (False, True)]
for dtype, rank, size, normed, rows in cases:
    heads, kv_heads, tokens, blocks = 6, 2, 16, 5
    sizes = [heads * size, kv_heads * size, kv_heads * size]
    p, worth = product(rows, sizes, rank, dtype, bias=not normed, apart=rank == 8)
    angles = torch.arange(50)[:, None] * 10000 ** -(torch.arange(size // 2) / (size // 2))
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)
    positions = torch.randint(0, 50, (rows,), generator=GENERATOR)
    slots = torch.randperm(blocks * tokens, generator=GENERATOR)[:rows]
    slots[rows // 2] = -1
    weights = [rand(size, dtype=dtype) for _ in range(2)]
    rotary = Rotary(cos_sin, *weights, 1e-6) if normed else Rotary(cos_sin)
    for order in ((0, 2, 1, 3), (0, 1, 2, 3)):  # tokens before heads in memory, and the other way round
        shape = [(blocks, kv_heads, tokens, 2 * size)[i] for i in order]
        memory = torch.full((shape[0], 2, *shape[1:]), 7.0, dtype=dtype)  # another layer's pages lie between
        cache = memory[:, 0].permute(*[order.index(i) for i in range(4)])
        q = add_rope_cache(p, heads, rotary, positions, slots, cache)
        case = ("add_rope_cache", dtype, rank, size, normed, rows, order)
        mine, key, value = (t.view(rows, -1, size) for t in worth.to(dtype).split(sizes, dim=1))
        if normed:
            mine, key = norm(mine, weights[0], 1e-6, dtype), norm(key, weights[1], 1e-6, dtype)
        close(q, rope(mine, cos_sin, positions, dtype), dtype, case)
        key, kept = rope(key, cos_sin, positions, dtype), slots >= 0
        block, place = slots[kept] // tokens, slots[kept] % tokens
        written = cache[block, :, place]
        close(written[..., :size], key[kept], dtype, case)
        close(written[..., size:], value[kept], dtype, case)
        cache[block, :, place] = 7.0
        assert (memory == 7.0).all(), "something was written beside the slots"
"""


KERNELS = {"add_norm": NORM, "add_silu_mul": SILU, "add_rope_cache": ROPE}


def check_kernel(name: str, device: str) -> None:
    """Compare a kernel with its reference in a process of its own; on a CPU in Triton's interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    done = subprocess.run(
        [sys.executable, "-c", REFERENCE + KERNELS[name], device], capture_output=True, text=True, env=environment,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_compute_the_same_in_tritons_interpreter(name: str) -> None:
    pytest.importorskip("triton")
    check_kernel(name, "cpu")


LAYERS = """
from collections import defaultdict
from types import SimpleNamespace
import torch
from strop.engine import vllm_compat, vllm_lora
vllm_compat.prepare_environment("cpu", 1)
vllm_lora._is_plain_on_card = lambda module: True  # A below the weight, as on a card
from engines import rig
from test_engines import nudge
from strop.engine import vllm_decode
built = rig("vllm", rank=8)
nudge(built, 0.3)
built.weights.publish()
assert built.weights.unshared_bytes() == 0
model = built.engine._runner.get_model()
runner = SimpleNamespace(model=model, dtype=torch.float32)
assert vllm_decode.build(runner) == "the model's dtype is torch.float32"
vllm_decode.DTYPES = (torch.float32,)
reason = vllm_decode.build(runner)
assert "attention runs by a CPU" in reason, reason
vllm_decode._check_attention = lambda inner, dtype: None
decoder = vllm_decode.build(runner)
ROWS, STEPS, PADDING = 4, 6, 2

class Attend:
    '''Attention over the paged cache in plain torch; `metadata` is the step, rows have a block each.'''
    def __init__(self, scale):
        self.scale = scale
    def forward(self, layer, q, key, value, cache, metadata, output):
        past, group = cache[:, :, : metadata + 1], layer.num_heads // layer.num_kv_heads
        keys, values = (t.repeat_interleave(group, 1) for t in past.chunk(2, dim=-1))
        weights = torch.einsum("thd,thnd->thn", q, keys).mul(self.scale).softmax(-1)
        output.copy_(torch.einsum("thn,thnd->thd", weights, values))
        output[PADDING] = float("nan")

for layer in decoder._layers:
    inner = layer.attention
    inner.impl = Attend(inner.impl.scale)
    inner.kv_cache = torch.zeros(ROWS, 16, inner.num_kv_heads, 2 * inner.head_size).transpose(1, 2)
ids, logits = torch.randint(32, 120, (ROWS, STEPS)), []
with torch.inference_mode():
    for step in range(STEPS):
        slots = 16 * torch.arange(ROWS) + step
        slots[PADDING] = -1
        context = SimpleNamespace(slot_mapping=defaultdict(lambda: slots), attn_metadata=defaultdict(lambda: step))
        vllm_decode.get_forward_context = lambda: context
        logits.append(model.compute_logits(decoder(ids[:, step].int(), torch.full((ROWS,), step))))
with torch.no_grad():
    want = built.policy.model(input_ids=ids).logits
real = [row for row in range(ROWS) if row != PADDING]
gap = (torch.stack(logits, 1)[real][..., : want.shape[-1]] - want[real]).abs().max()
assert gap < 1e-3 < 0.1 * want.abs().max(), gap

def modules_attend(inner):
    def forward(q, k, v):
        step = context.attn_metadata[""]
        cache, size = inner.kv_cache, inner.head_size
        for row in real:
            cache[row, :, step, :size] = k[row].view(-1, size)
            cache[row, :, step, size:] = v[row].view(-1, size)
        out = torch.empty(len(q), inner.num_heads, size)
        inner.impl.forward(inner, q.view(len(q), -1, size), None, None, cache, step, out)
        return out.view(len(q), -1)
    inner.forward = forward

def apart():
    global context
    found = []
    for layer in decoder._layers:
        layer.attention.kv_cache.zero_()
    with torch.inference_mode():
        for step in range(STEPS):
            slots = 16 * torch.arange(ROWS) + step
            slots[PADDING] = -1
            context = SimpleNamespace(slot_mapping=defaultdict(lambda: slots), attn_metadata=defaultdict(lambda: step))
            found.append(decoder.apart(model.model, ids[:, step].int(), torch.full((ROWS,), step))[:, real])
    return torch.stack(found).mean(dim=(0, 2))

for layer in decoder._layers:
    modules_attend(layer.attention)
by_layer = apart()
print("right", by_layer)
assert by_layer.max() < 1e-4, by_layer

silu, rope, norm = vllm_decode.add_silu_mul, vllm_decode.add_rope_cache, vllm_decode.add_norm
def without_adapter_in_the_second(product, width):
    there = product.b_t is decoder._layers[1].gate_up.factors.b_t
    return silu(product._replace(low=None) if there else product, width)
wrong = {
    "an adapter in one layer": {"add_silu_mul": without_adapter_in_the_second},
    "positions": {"add_rope_cache": lambda p, h, r, at, s, c: rope(p, h, r, at * 0, s, c)},
    "head norms": {"add_rope_cache": lambda p, h, r, at, s, c: rope(p, h, r._replace(q_norm=None), at, s, c)},
    "the cache": {"add_rope_cache": lambda p, h, r, at, s, c: rope(p, h, r, at, s * 0 - 1, c)},
    "a norm's weight": {"add_norm": lambda p, x, w, e: norm(p, x, torch.ones_like(w), e)},
}
for name, changes in wrong.items():
    for key, value in changes.items():
        setattr(vllm_decode, key, value)
    by_layer = apart()
    vllm_decode.add_silu_mul, vllm_decode.add_rope_cache, vllm_decode.add_norm = silu, rope, norm
    print(name, by_layer)
    assert by_layer.max() > 0.05, (name, by_layer)
    if name.startswith("an adapter"):
        assert by_layer[0] < 1e-4, by_layer
"""


def test_the_layers_compute_what_the_trainer_computes() -> None:
    """vLLM's own modules of a CPU model, taken over by the kernels: positions, cache, adapters, norms and padding."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", LAYERS], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def wrapped(sizes: list[int], width: int, rank: int, dtype: torch.dtype = torch.bfloat16) -> SimpleNamespace:
    """A layer as vLLM wraps it: base and empty slots of each part."""
    base = torch.nn.Linear(width, sum(sizes), bias=False, dtype=dtype)
    base.requires_grad_(False)
    return SimpleNamespace(
        base_layer=base,
        lora_a_stacked=tuple(torch.zeros(1, 1, rank, width, dtype=dtype) for _ in sizes),
        lora_b_stacked=tuple(torch.zeros(1, 1, size, rank, dtype=dtype) for size in sizes),
    )


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("with_base", [False, True])
def test_slots_are_views_of_what_is_multiplied(rank: int, with_base: bool) -> None:
    torch.manual_seed(0)
    sizes, width = [24, 8, 8], 48
    layer = wrapped(sizes, width, rank)
    parameter, before = layer.base_layer.weight, layer.base_layer.weight.detach().clone()
    old = before.untyped_storage().nbytes()
    assert combine(layer, with_base=with_base) == (old if with_base else 0)
    factors = layer.strop_factors
    assert layer.base_layer.weight is parameter
    assert torch.equal(parameter, before)
    assert parameter.is_contiguous()
    x = torch.randn(5, width, dtype=torch.bfloat16)
    want = x.float() @ before.float().t()
    parts = want.split(sizes, dim=1)
    for a, b, part in zip(layer.lora_a_stacked, layer.lora_b_stacked, parts, strict=True):
        a[0, 0].copy_(torch.randn(rank, width))
        b[0, 0].copy_(torch.randn(part.shape[1], rank))
        part += (x.float() @ a[0, 0].float().t()).to(x.dtype).float() @ b[0, 0].float().t()
    low = x @ factors.a.t()
    if with_base:
        assert factors.stacked.shape[0] % 8 == 0
        assert parameter.untyped_storage().data_ptr() == factors.stacked.untyped_storage().data_ptr()
        assert parameter.data_ptr() == factors.stacked.data_ptr()
        product = x @ factors.stacked.t()
        rows = sum(sizes) + factors.a.shape[0]
        torch.testing.assert_close(product[:, sum(sizes) : rows], low)
        assert not product[:, rows:].any()
        y = product[:, : sum(sizes)]
    else:
        assert factors.stacked is None
        y = x @ parameter.t()
    ours = y.float() + low.float() @ factors.b_t.float()
    assert (ours - want).norm() < 1e-2 * want.norm()
    parameter.data.mul_(2)  # a trainer that writes into the base writes into the product as well
    if with_base:
        torch.testing.assert_close(factors.stacked[: sum(sizes)], before * 2)
    for index in (0, 2):
        layer.lora_a_stacked[index][0] = 0
        layer.lora_b_stacked[index][0] = 0
    middle = factors.b_t[rank : 2 * rank, 24:32]
    assert middle.all()
    assert factors.b_t.count_nonzero() == middle.numel()


def test_a_second_adapter_slot_is_refused() -> None:
    layer = wrapped([16], 16, 8)
    layer.lora_a_stacked = (torch.zeros(2, 1, 8, 16),)
    with pytest.raises(EngineError, match="2 adapter slots"):
        combine(layer, with_base=False)


def test_a_random_adapter_changes_each_part_and_leaves_zeros_and_torchs_generator() -> None:
    torch.manual_seed(0)
    layers = {"a": wrapped([64, 32, 32], 256, 16), "b": wrapped([128], 256, 16)}
    for layer in layers.values():
        combine(layer, with_base=True)
    manager = SimpleNamespace(_adapter_manager=SimpleNamespace(modules=layers))
    runner = SimpleNamespace(lora_manager=manager)
    state = torch.get_rng_state()
    x = torch.randn(64, 256).to(torch.bfloat16)
    torch.set_rng_state(state)
    with random_adapter(runner):
        for layer in layers.values():
            factors = layer.strop_factors
            added = (x @ factors.a.t()).float() @ factors.b_t.float()
            base = (x @ layer.base_layer.weight.t()).float()
            sizes = [b.shape[2] for b in layer.lora_b_stacked]
            for mine, theirs in zip(added.split(sizes, dim=1), base.split(sizes, dim=1), strict=True):
                assert 0.3 < mine.norm() / theirs.norm() < 0.8
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(layer.strop_factors.stacked[128:].any() for layer in layers.values())
    assert not any(layer.strop_factors.b_t.any() for layer in layers.values())
