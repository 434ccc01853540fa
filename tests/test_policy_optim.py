"""Compact optimizer state: bit-equal where nothing is packed, close where something is, the same after a restart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from strop.config import OptimConfig
from strop.errors import CheckpointError
from strop.policy import compact, optim
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_in_pieces_are_those_of_torch_bit_for_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """`w` and `norm` are cut in the middle; `v` has a gradient in every other step only."""
    monkeypatch.setattr(optim, "PIECE", 100)
    held = parameters(dtype)
    ours = optimizer(held, None)
    masters = {n: torch.nn.Parameter(p.detach().float().clone()) for n, p in held.items()}
    groups: list[dict[str, Any]] = [
        {"params": [m for m in masters.values() if (m.ndim == 2) == matrix]} for matrix in (True, False)
    ]
    groups[1]["weight_decay"] = 0.0
    theirs = torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    noise = torch.Generator().manual_seed(5)
    for t in range(10):
        for n, p in held.items():
            gradient = torch.randn(p.shape, generator=noise).to(dtype)
            p.grad = None if n == "v" and t % 2 else gradient
            masters[n].grad = None if p.grad is None else gradient.float() * 0.7
        ours.step(learning_rate=0.02, gradient_scale=0.7)
        theirs.step()
    state = ours.state_dict()
    for n, m in masters.items():
        assert torch.equal(state[f"master.{n}"], m)
        assert torch.equal(held[n], m.to(dtype))
        for key, value in theirs.state[m].items():
            assert torch.equal(state[f"{key}.{n}"], value)


def beside_a_large_channel(spread: float, density: float, kind: tuple[bool, bool] | None) -> tuple[torch.Tensor, float]:
    """Make 200 steps on noisy gradients, every 16th value's `spread` times the others', a share of which is 0.

    Returns the small values' path and their largest step in units of the learning rate.
    """
    p = torch.nn.Parameter(torch.zeros(4, BLOCK))
    ours = optimizer({"w": p}, kind, decay=0.0)
    noise = torch.Generator().manual_seed(1)
    size = torch.ones(BLOCK)
    size[::16] = spread
    size *= 1e-3 / spread
    small = size < 1e-3 if spread > 1 else torch.ones(BLOCK, dtype=torch.bool)
    largest, path = 0.0, []
    for _ in range(200):
        there = torch.rand(p.shape, generator=noise) < density
        p.grad = size * (torch.randn(p.shape, generator=noise) + 0.3) * (there | ~small)
        before = p.detach().clone()
        ours.step(learning_rate=1e-3, gradient_scale=1.0)
        largest = max(largest, float((p.detach() - before)[:, small].abs().max()) / 1e-3)
        path.append(p.detach()[:, small].clone())
    return torch.stack(path), largest


@pytest.mark.parametrize("density", [1.0, 0.1], ids=["dense", "sparse"])
@pytest.mark.parametrize("spread", [1.0, 30.0, 300.0, 1000.0])
def test_small_gradients_beside_large_ones_make_steps_of_the_learning_rate(spread: float, density: float) -> None:
    exact, allowed = beside_a_large_channel(spread, density, None)
    ours, largest = beside_a_large_channel(spread, density, (True, False))
    assert allowed < 1.6
    assert largest < 1.6
    # Between rare gradients a moment shrinks by less than half of what two numbers are apart, and stays too large.
    assert (ours - exact).norm() < (0.1 if density == 1.0 else 0.35) * exact.norm()


def test_what_divides_is_0_only_where_every_gradient_was() -> None:
    held = Packed.zeros(BLOCK, False, torch.device("cpu"))
    values = torch.logspace(-30, 0, BLOCK)
    values[7] = 0
    held.pack(values)
    assert torch.equal(held.unpack() == 0, values == 0)


def test_moments_of_the_earlier_coding_are_refused() -> None:
    held = parameters(torch.float32)
    state = optimizer(held, (True, False)).state_dict()
    old = {name.replace("exp_avg_sq_root", "exp_avg_sq"): value for name, value in state.items()}
    before = {n: p.detach().clone() for n, p in held.items()}
    with pytest.raises(CheckpointError, match="earlier version") as error:
        optimizer(held, (True, False)).load_state_dict(old)
    assert "lora.init_from" in error.value.hint
    assert all(torch.equal(before[n], p) for n, p in held.items())


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
    assert {k.split(".")[0] for k in eight} == {"parameter", "beside", "exp_avg", "exp_avg_sq_root", "steps"}
    assert eight["beside.w"].dtype == torch.float32
    kahan = make_optimizer(held, OptimConfig(master="kahan")).state_dict()
    assert kahan["beside.w"].dtype == torch.bfloat16
    plain = make_optimizer(held, OptimConfig(master="kahan")).state_dict()
    sizes = [sum(v.numel() * v.element_size() for v in state.values()) for state in (eight, plain)]
    assert sizes[0] < sizes[1]
