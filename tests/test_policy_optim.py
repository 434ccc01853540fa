"""Compact optimizer state: bit-equal where nothing is packed, close where something is, the same after a restart."""

from __future__ import annotations

import pytest
import torch

from strop.config import OptimConfig
from strop.policy import compact
from strop.policy.compact import BLOCK, CompactAdamW, Packed, code
from strop.policy.optim import MasterAdamW, Optimizer, make_optimizer

KINDS = [(False, False), (True, False), (False, True), (True, True)]
IDS = ["fp32", "8bit", "kahan", "8bit-kahan"]


def parameters(dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(2)
    return {
        "w": torch.nn.Parameter(torch.randn(30, 41).to(dtype)),
        "norm": torch.nn.Parameter(torch.randn(41).to(dtype)),
        "v": torch.nn.Parameter(torch.randn(3, 5).to(dtype)),
    }


def optimizer(held: dict[str, torch.nn.Parameter], kind: tuple[bool, bool] | None, decay: float = 0.1) -> Optimizer:
    if kind is None:
        return MasterAdamW(held, betas=(0.9, 0.99), eps=1e-8, weight_decay=decay)
    return CompactAdamW(
        held, betas=(0.9, 0.99), eps=1e-8, weight_decay=decay, eight_bit=kind[0], compensated=kind[1]
    )  # fmt: skip


def walk(
    dtype: torch.dtype, kind: tuple[bool, bool] | None, steps: int = 40, restart: int | None = None
) -> dict[str, torch.Tensor]:
    """Follow noisy gradients towards fixed targets; return the parameters."""
    held = parameters(dtype)
    targets = {n: p.detach().float().flip(0) for n, p in held.items()}
    ours = optimizer(held, kind)
    noise = torch.Generator().manual_seed(5)
    for t in range(steps):
        if t == restart:
            state = {k: v.clone() for k, v in ours.state_dict().items()}
            held = {n: torch.nn.Parameter(torch.zeros_like(p)) for n, p in held.items()}
            ours = optimizer(held, kind)
            ours.load_state_dict(state)
        for n, p in held.items():
            p.grad = (p.detach().float() - targets[n] + 0.3 * torch.randn(p.shape, generator=noise)).to(dtype)
        ours.step(learning_rate=0.02, gradient_scale=0.7)
    return {n: p.detach().float() for n, p in held.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_packing_it_is_the_other_optimizer_bit_for_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = walk(dtype, None)
    for piece in (compact.PIECE, 100):  # values per piece: everything at once, or parameters cut in several places
        monkeypatch.setattr(compact, "PIECE", piece)
        got = walk(dtype, (False, False))
        assert [n for n in expected if not torch.equal(expected[n], got[n])] == []


@pytest.mark.parametrize("kind", KINDS[1:], ids=IDS[1:])
def test_packed_state_follows_the_fp32_one(kind: tuple[bool, bool]) -> None:
    start = {n: p.detach().float() for n, p in parameters(torch.bfloat16).items()}
    exact, ours = walk(torch.bfloat16, None), walk(torch.bfloat16, kind)
    for n in exact:
        moved = (exact[n] - start[n]).norm()
        assert (ours[n] - exact[n]).norm() < (0.04 if kind[0] else 0.01) * moved, n


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compact_state_survives_a_restart_bit_for_bit(kind: tuple[bool, bool], dtype: torch.dtype) -> None:
    whole, resumed = walk(dtype, kind, 12), walk(dtype, kind, 12, restart=7)
    assert [n for n in whole if not torch.equal(whole[n], resumed[n])] == []


def test_a_compensated_weight_keeps_updates_that_bf16_would_lose() -> None:
    p = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    ours = optimizer({"w": p}, (False, True), decay=0.0)
    for _ in range(400):
        p.grad = torch.ones_like(p)
        ours.step(learning_rate=1e-4, gradient_scale=1.0)
    assert torch.allclose(p.float(), torch.full((8,), 0.96), atol=4e-3)  # 400 x 1e-4; one bf16 step at 1 is 4e-3


def test_a_block_keeps_its_largest_value_and_the_order_of_the_small_ones() -> None:
    torch.manual_seed(0)
    values = torch.randn(3 * BLOCK + 17) * torch.logspace(-5, 2, 3 * BLOCK + 17)
    for signed in (True, False):
        held = Packed.zeros(len(values), signed, values.device)
        assert torch.equal(held.unpack(), torch.zeros_like(values))
        source = values if signed else values.abs()
        held.pack(source)
        error = (held.unpack() - source).abs()
        assert held.codes.dtype == torch.uint8
        for i in range(4):
            block = slice(i * BLOCK, (i + 1) * BLOCK)
            top = source[block].abs().max()
            assert error[block].max() <= 0.016 * top
            assert held.unpack()[block].abs().max() == pytest.approx(float(top), rel=0.016)
        assert float((error / source.abs()).median()) < 0.03
    assert torch.equal(code(True, values.device), code(True, values.device).sort().values)


def test_the_settings_choose_the_optimizer() -> None:
    held = parameters(torch.bfloat16)
    assert isinstance(make_optimizer(held, OptimConfig()), MasterAdamW)
    eight = make_optimizer(held, OptimConfig(name="adamw_8bit")).state_dict()
    assert {k.split(".")[0] for k in eight} == {"parameter", "beside", "exp_avg", "exp_avg_sq", "steps"}
    assert eight["beside.w"].dtype == torch.float32
    kahan = make_optimizer(held, OptimConfig(master="kahan")).state_dict()
    assert kahan["beside.w"].dtype == torch.bfloat16
    plain = make_optimizer(held, OptimConfig(master="kahan")).state_dict()
    sizes = [sum(v.numel() * v.element_size() for v in state.values()) for state in (eight, plain)]
    assert sizes[0] < sizes[1]
