"""NF4 and 8-bit weights as formats: against bitsandbytes, their products and gradients, and the kernels' own code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from strop.policy.nf4 import Nf4Linear
from strop.quant import int8, nf4, products
from strop.quant.bnb import PackedError, merged


@pytest.fixture(scope="session")
def bnb() -> Any:
    """bitsandbytes' own functions, which ours are compared with; it runs on a CPU too."""
    return pytest.importorskip("bitsandbytes.functional")


def weight(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("shape", [(8, 64), (96, 576), (130, 256)])
def test_codes_are_those_of_bitsandbytes(shape: tuple[int, int], bnb: Any) -> None:
    w = weight(*shape)
    w[0] = 0  # a block without a scale
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=False)
    ours, theirs = nf4.quantize(w), nf4.from_bitsandbytes(packed, state.absmax, shape)
    torch.testing.assert_close(ours.packed, theirs.packed, rtol=0, atol=0)
    torch.testing.assert_close(ours.absmax, theirs.absmax, rtol=0, atol=0)
    reference = bnb.dequantize_4bit(packed, state)
    # Three roundings to half a unit in the last place each; the four bits themselves are off by 9 %.
    for dtype, most in ((torch.float32, 2**-11), (torch.float16, 3 * 2**-11), (torch.bfloat16, 3.02 * 2**-8)):
        gap = nf4.dequantize(ours, dtype).float() - reference
        assert (gap.abs() <= most * reference.abs() + 1e-9).all()
        assert gap.norm() <= 0.5 * most * reference.norm()
    assert 0.07 < (reference - w).norm() / w.norm() < 0.11


def test_a_width_that_blocks_do_not_divide_is_padded() -> None:
    w = weight(5, 100)
    wide = torch.nn.functional.pad(w, (0, 28))
    packed, whole = nf4.quantize(w), nf4.quantize(wide)
    assert torch.equal(packed.packed, whole.packed)
    assert torch.equal(packed.absmax, whole.absmax)
    plain = nf4.dequantize(packed, torch.float32)
    assert torch.equal(plain, nf4.dequantize(whole, torch.float32)[:, :100])
    x = torch.randn(3, 100)
    torch.testing.assert_close(products.linear(x, packed), x @ plain.t(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="multiple of 64"):
        nf4.from_bitsandbytes(packed.packed, packed.absmax, (5, 100))


@pytest.mark.parametrize("pieces", [1, 3])
def test_products_are_those_of_the_unpacked_weight(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "PIECE", 192 * (96 // pieces))
    packed = nf4.quantize(weight(96, 192))
    plain = nf4.dequantize(packed, torch.float32)
    x, grad = torch.randn(2, 5, 192), torch.randn(2, 5, 96)
    bias = torch.randn(96)
    torch.testing.assert_close(products.linear(x, packed, bias), x @ plain.t() + bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(products.input_gradient(grad, packed), grad @ plain, rtol=1e-5, atol=1e-5)


def test_a_layer_has_the_gradient_of_its_unpacked_weight() -> None:
    layer = Nf4Linear(nf4.quantize(weight(32, 64)), None, torch.float64)
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    torch.testing.assert_close(layer(x), x @ layer.dequantized().t())


def test_eight_bits_round_to_the_nearest_of_255_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "PIECE_ROWS", 20)
    w = weight(50, 32)
    w[3] = 0
    packed = int8.quantize(w)
    plain = int8.dequantize(packed, torch.float32)
    assert ((plain - w).abs() <= 0.5001 * packed.scale[:, None]).all()
    x, out = torch.randn(4, 32), torch.empty(4, 50)
    torch.testing.assert_close(products.linear_int8(x, packed, out=out), x @ plain.t(), rtol=1e-5, atol=1e-5)
    grad = torch.randn(4, 50)
    torch.testing.assert_close(int8.input_gradient(grad, packed, torch.empty(4, 32)), grad @ plain)
    ids = torch.tensor([[3, 49], [0, 7]])
    torch.testing.assert_close(int8.gather(packed, ids, torch.float32), plain[ids])


@pytest.mark.parametrize("width", [64, 100, 128, 160])
def test_an_embedding_in_4_bits_is_the_rows_of_the_unpacked_one(width: int) -> None:
    packed = nf4.quantize(weight(50, width))
    ids = torch.tensor([[3, 49, 3], [0, 7, 48]])
    assert torch.equal(products.embedded(packed, ids, torch.float32), nf4.dequantize(packed, torch.float32)[ids])


KERNELS = """
import torch
from strop.quant import int8, int8_triton, nf4, nf4_triton
for m, n, k in ((5, 96, 100), (37, 130, 256), (3, 34, 160), (2, 33, 192), (2, 5, 129)):
    w = nf4.quantize(torch.randn(n, k) * 0.02)
    x, bias = torch.randn(m, k).half(), torch.randn(n).half()
    plain = nf4.dequantize(w, torch.float16)
    assert torch.equal(nf4_triton.dequantize(w, torch.float16, asm=False), plain)
    guarded, groups = torch.full((n * k + 256,), 7.0, dtype=torch.float16), nf4.groups_of(k)
    nf4_triton._dequantize_kernel[(-(-n // 32), -(-groups // 4))](
        w.packed, w.absmax.view(torch.int32), nf4_triton._table(x.device), guarded, n, k, groups, k,
        ROWS=32, GROUPS=4, ASM=False,
    )
    assert torch.equal(guarded[: n * k].view(n, k), plain)
    assert (guarded[n * k :] == 7.0).all(), k
    exact = x.float() @ plain.float().t() + bias.float()
    for splits in (1, 2):
        config = {"BM": 16, "BN": 64, "splits": splits, "warps": 4, "stages": 2, "asm": False}
        y = nf4_triton.matmul(x, w, bias, config=config)
        assert (y.float() - exact).abs().max() < 2e-3 * exact.abs().max(), (m, n, k, splits)
    assert not nf4_triton._locks(x.device).any()
    q = int8.quantize(torch.randn(n, k))
    y = torch.empty(m, n, dtype=torch.float16)
    int8_triton.matmul(x, q, y)
    exact = x.float() @ int8.dequantize(q, torch.float32).t()
    assert (y.float() - exact).abs().max() < 2e-3 * exact.abs().max()
"""


def test_the_kernels_compute_the_same_in_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", KERNELS], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def permute(a: int, b: int, selector: int) -> int:
    """PTX prmt.b32: each nibble of the selector picks a byte of (a, b), or repeats its sign when its bit 3 is set."""
    values = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
    result = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = values[nibble & 7]
        result |= (byte if nibble < 8 else 0xFF * (byte >> 7)) << 8 * i
    return result


def halves(word: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([word], dtype=torch.int64).to(torch.uint32).view(dtype)


def run_ptx(text: str, registers: dict[str, int], dtype: torch.dtype) -> None:
    """Run straight-line PTX of the few instructions that the kernel uses."""

    def times(a: int, b: int) -> int:
        return int((halves(a, dtype) * halves(b, dtype)).view(torch.uint32).item())

    table: dict[str, Callable[..., int]] = {
        "mov.b32": lambda a: a, "and.b32": lambda a, b: a & b, "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
        "shr.b32": lambda a, b: a >> b, "prmt.b32": permute, "mul.rn.f16x2": times,
        "fma.rn.bf16x2": lambda a, b, c: times(a, b) if c == 0x80008000 else -1,
        "lop3.b32": lambda a, b, c, table: (a & b) | (~a & c) if table == 0xCA else -1,
    }  # fmt: skip
    for line in text.strip("{} \n").split(";"):
        operation, _, operands = line.strip().partition(" ")
        if operation in ("", ".reg"):
            continue
        target, *names = (name.strip() for name in operands.split(","))
        registers[target] = table[operation](*(int(n, 0) if n[0].isdigit() else registers[n] for n in names))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_assembler_code_unpacks_every_byte(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from strop.quant.nf4_triton import decode_asm

    text = decode_asm(dtype)
    scales = torch.tensor([0.37, 0.021, 1.7, 0.0009]).to(dtype)
    packed = torch.arange(256, dtype=torch.uint8).view(64, 4)
    codes = torch.tensor(nf4.CODES).to(dtype)
    for four in packed:
        registers = {"$4": int(four.view(torch.uint32).item())}
        for i, scale in enumerate(scales):
            registers[f"${5 + i}"] = int(scale.repeat(2).view(torch.uint32).item())
        run_ptx(text, registers, dtype)
        outs = torch.cat([halves(registers[f"${i}"], dtype) for i in range(4)])
        high, low = codes[(four >> 4).int()], codes[(four & 15).int()]
        want = torch.cat([high[:2] * scales[0], high[2:] * scales[1], low[:2] * scales[2], low[2:] * scales[3]])
        assert torch.equal(outs, want)


def test_nested_statistics_unfold_as_bitsandbytes_unfolds_them(bnb: Any) -> None:
    w = weight(160, 256)
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    tensors = [("a.weight", packed), *((f"a.weight.{k}", v) for k, v in state.as_dict(packed=True).items())]
    before = torch.get_default_dtype()
    for order, default in ((tensors, torch.float32), (tensors[::-1], torch.bfloat16)):  # vLLM sets the model's dtype
        torch.set_default_dtype(default)
        try:
            ((name, _, ours),) = merged(order)
        finally:
            torch.set_default_dtype(before)
        assert name == "a.weight"
        assert ours is not None
        reference = bnb.dequantize_4bit(packed, state)
        assert (nf4.dequantize(ours, torch.float32) - reference).abs().max() < 2e-3 * reference.abs().max()
    with pytest.raises(ValueError, match=r"lacks .*absmax"):
        list(merged(tensors[:1]))


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda parts: parts.pop(key)


def cut(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda parts: parts.update({key: parts[key].flatten()[:-1]})


def state_with(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(parts: dict[str, Any]) -> None:
        key = "a.weight.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(parts[key].tolist()).decode()) | changes
        text = json.dumps({k: v for k, v in state.items() if v is not None})
        parts[key] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


def scrambled(parts: dict[str, Any]) -> None:
    parts["a.weight.quant_state.bitsandbytes__nf4"] = torch.tensor([255, 123, 0], dtype=torch.uint8)


def another_code(parts: dict[str, Any]) -> None:
    parts["a.weight.quant_map"] = torch.linspace(-1, 1, 16)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without("a.weight"), "lacks"),
        (without("a.weight.absmax"), "absmax"),
        (without("a.weight.nested_absmax"), "nested"),
        (without("a.weight.quant_state.bitsandbytes__nf4"), "quant_state"),
        (cut("a.weight"), "bytes and"),
        (cut("a.weight.absmax"), "scales"),
        (cut("a.weight.quant_map"), "another code"),
        (another_code, "another code"),
        (scrambled, "cannot be read"),
        (state_with(blocksize=128), "blocks of 128"),
        (state_with(quant_type="fp4"), "fp4"),
        (state_with(shape=[160, 128]), "320 scales|640 scales"),
        (state_with(shape=None), "shape"),
        (state_with(nested_offset=None), "nested_offset"),
        (state_with(nested_blocksize="many"), "many"),
    ],
)  # fmt: skip
def test_a_damaged_packed_weight_is_refused_by_name(
    damage: Callable[[dict[str, Any]], None], said: str, bnb: Any
) -> None:
    packed, state = bnb.quantize_4bit(weight(160, 256), blocksize=64, quant_type="nf4", compress_statistics=True)
    parts = {"a.weight": packed, **{f"a.weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    damage(parts)
    with pytest.raises(PackedError, match=said) as error:
        list(merged(parts.items()))
    assert "`a.weight" in str(error.value)
