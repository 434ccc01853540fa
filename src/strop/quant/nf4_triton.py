"""Triton kernels for NF4: a product for few tokens, and the whole weight in 16 bit for many.

    y[M, N] = x[M, K] @ W[N, K]^T + bias      W as `nf4.dequantize` gives it, fp32 accumulation

One program owns BN rows of W and BM tokens. Per group of 128 inputs it reads 64 bytes a row, which are two tiles of 64
inputs (`nf4.Nf4`), turns them into 16-bit tiles in registers and multiplies each with its slice of x. The weight's tile
is the left operand, so that few tokens make a narrow product instead of a padded one. With few rows K is cut into
`splits`: the partial sums are added by whichever program of a tile comes last, always in the same order.

Codes become 16-bit numbers four at a time: `prmt` picks bytes from a table of eight by three bits of each nibble, one
table for either value of the fourth bit and either byte of the number, and a mask made of the fourth bits chooses.
"""

# pyright: reportMissingParameterType=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from .nf4 import BLOCK, CODES, GROUP, Nf4


def _lookup(half: str, signs: str, tag: str, tables: dict[str, str]) -> str:
    """Return PTX that looks up four nibbles: bytes into h{tag} and l{tag}.

    `half` is a register with the nibbles' low three bits, `signs` the selector of their fourth bits.
    """
    t = tables
    return f"""
        prmt.b32 m, $4, left, {signs};
        prmt.b32 p, {t["HL0"]}, {t["HL1"]}, {half};
        prmt.b32 q, {t["HH0"]}, {t["HH1"]}, {half};
        lop3.b32 h{tag}, m, q, p, 0xCA;
        prmt.b32 p, {t["LL0"]}, {t["LL1"]}, {half};
        prmt.b32 q, {t["LH0"]}, {t["LH1"]}, {half};
        lop3.b32 l{tag}, m, q, p, 0xCA;
    """


def decode_asm(dtype: torch.dtype) -> str:
    """Return PTX for four packed bytes ($4) and their scales ($5 $6 of the high halves, $7 $8 of the low ones).

    $0 $1 become the weights of the high halves, $2 $3 those of the low ones, two to a register.
    """
    codes = torch.tensor(CODES, dtype=torch.float32).to(dtype).view(torch.int16).tolist()
    tables = {}
    for name, table in (("HL", [c >> 8 for c in codes[:8]]), ("HH", [c >> 8 for c in codes[8:]]),
                        ("LL", codes[:8]), ("LH", codes[8:])):  # fmt: skip
        for i in range(2):
            word = int.from_bytes(bytes(c & 0xFF for c in table[4 * i : 4 * i + 4]), "little")
            tables[f"{name}{i}"] = f"0x{word:08x}"
    # Adding -0 changes no product; a plain bf16 product needs a newer card.
    times = "fma.rn.bf16x2 {0}, p, {1}, zero;" if dtype == torch.bfloat16 else "mul.rn.f16x2 {0}, p, {1};"
    pairs = (("$0", "a", "0x7351", "$5"), ("$1", "b", "0x7351", "$6"), ("$2", "a", "0x6240", "$7"),
             ("$3", "b", "0x6240", "$8"))  # fmt: skip
    return (
        """{
        .reg .b32 left, low, next, zero, m, p, q, ha, la, hb, lb;
        mov.b32 zero, 0x80008000;
        shl.b32 left, $4, 4;
        and.b32 low, $4, 0x77777777;
        shr.b32 next, low, 16;"""
        + _lookup("low", "0x9D8C", "a", tables)
        + _lookup("next", "0xBFAE", "b", tables)
        + "".join(
            f"prmt.b32 p, l{tag}, h{tag}, {order};\n        {times.format(out, scale)}\n        "
            for out, tag, order, scale in pairs
        )
        + "}"
    )


_BF16: tl.constexpr = tl.constexpr(decode_asm(torch.bfloat16))
_FP16: tl.constexpr = tl.constexpr(decode_asm(torch.float16))
_REGISTERS: tl.constexpr = tl.constexpr("=r,=r,=r,=r,r,r,r,r,r")


@triton.jit
def _decode(packed, pair, table_ptr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Return both 16-bit tiles of a packed one; `pair` holds both scales of a row's group in one int32."""
    scale_a = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(dtype)[:, None]
    scale_b = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(dtype)[:, None]
    if ASM:
        if dtype == tl.bfloat16:
            wa, wb = tl.inline_asm_elementwise(
                _BF16, _REGISTERS, [packed, scale_a, scale_b], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
        else:
            wa, wb = tl.inline_asm_elementwise(
                _FP16, _REGISTERS, [packed, scale_a, scale_b], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
            )
    else:
        index = packed.to(tl.int32)
        wa = tl.load(table_ptr + (index >> 4)).to(dtype) * scale_a
        wb = tl.load(table_ptr + (index & 15)).to(dtype) * scale_b
    return wa, wb


@triton.jit(do_not_specialize=["M", "groups", "splits", "per_split"])
def _matmul_kernel(
    x_ptr, packed_ptr, absmax_ptr, table_ptr, bias_ptr, y_ptr, part_ptr, lock_ptr,
    M, N, K, groups, stride_x, splits, per_split,
    BM: tl.constexpr, BN: tl.constexpr, EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
    ASM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile_n, tile_m, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tile_n * BN + tl.arange(0, BN)
    tokens = tile_m * BM + tl.arange(0, BM)
    row_ok, token_ok = rows < N, tokens < M
    inner = tl.arange(0, 64)
    packed_ptrs = packed_ptr + rows.to(tl.int64)[:, None] * (groups * 64) + inner[None, :]
    absmax_ptrs = absmax_ptr + rows * groups
    x_ptrs = x_ptr + tokens[:, None] * stride_x + inner[None, :]
    first = part * per_split
    last = tl.minimum(first + per_split, groups)
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    dtype = x_ptr.dtype.element_ty
    pair = tl.load(absmax_ptrs + first, mask=row_ok, other=0)
    for group in tl.range(first, last, num_stages=STAGES):
        packed = tl.load(packed_ptrs + group * 64, mask=row_ok[:, None], other=0)
        first_k = group * 128
        if EVEN_K:
            xa = tl.load(x_ptrs + first_k, mask=token_ok[:, None], other=0.0)
            xb = tl.load(x_ptrs + first_k + 64, mask=token_ok[:, None], other=0.0)
        else:
            xa = tl.load(x_ptrs + first_k, mask=token_ok[:, None] & (first_k + inner < K)[None, :], other=0.0)
            xb = tl.load(x_ptrs + first_k + 64, mask=token_ok[:, None] & (first_k + 64 + inner < K)[None, :], other=0.0)
        # Read one group ahead: these are too small for asynchronous copies.
        following = tl.load(absmax_ptrs + tl.minimum(group + 1, last - 1), mask=row_ok, other=0)
        wa, wb = _decode(packed, pair, table_ptr, dtype, ASM)
        acc = tl.dot(wa, tl.trans(xa), acc)
        acc = tl.dot(wb, tl.trans(xb), acc)
        pair = following
    y_ptrs = y_ptr + tokens[None, :].to(tl.int64) * N + rows[:, None]
    y_ok = row_ok[:, None] & token_ok[None, :]
    if SPLIT:
        offsets = tokens[None, :].to(tl.int64) * N + rows[:, None]
        size = M.to(tl.int64) * N
        tl.store(part_ptr + part * size + offsets, acc, mask=y_ok, cache_modifier=".cg")
        tl.debug_barrier()
        lock = lock_ptr + tile_m * tl.num_programs(0) + tile_n
        arrived = tl.atomic_add(lock, 1, sem="acq_rel")
        if arrived == splits - 1:
            acc = tl.zeros((BN, BM), dtype=tl.float32)
            for i in range(splits):
                acc += tl.load(part_ptr + i * size + offsets, mask=y_ok, other=0.0, cache_modifier=".cg")
            if HAS_BIAS:
                acc += tl.load(bias_ptr + rows, mask=row_ok, other=0.0).to(tl.float32)[:, None]
            tl.store(y_ptrs, acc.to(dtype), mask=y_ok)
            tl.atomic_xchg(lock, 0)
    else:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + rows, mask=row_ok, other=0.0).to(tl.float32)[:, None]
        tl.store(y_ptrs, acc.to(dtype), mask=y_ok)


@triton.jit(do_not_specialize=["N", "groups"])
def _dequantize_kernel(
    packed_ptr, absmax_ptr, table_ptr, out_ptr, N, K, groups, stride_out,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inner = tl.arange(0, 64)
    row_ok = rows < N
    dtype = out_ptr.dtype.element_ty
    first = tl.program_id(1) * GROUPS
    for group in range(first, tl.minimum(first + GROUPS, groups)):
        packed_ptrs = packed_ptr + rows.to(tl.int64)[:, None] * (groups * 64) + group * 64 + inner[None, :]
        packed = tl.load(packed_ptrs, mask=row_ok[:, None], other=0)
        pair = tl.load(absmax_ptr + rows * groups + group, mask=row_ok, other=0)
        wa, wb = _decode(packed, pair, table_ptr, dtype, ASM)
        k = group * 128 + inner
        out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * stride_out + k[None, :]
        tl.store(out_ptrs, wa, mask=row_ok[:, None] & (k < K)[None, :])
        tl.store(out_ptrs + 64, wb, mask=row_ok[:, None] & (k + 64 < K)[None, :])


_TABLES: dict[torch.device, torch.Tensor] = {}
_LOCKS: dict[torch.device, torch.Tensor] = {}
_MAX_TILES = 1 << 14


def _table(device: torch.device) -> torch.Tensor:
    if device not in _TABLES:
        _TABLES[device] = torch.tensor(CODES, dtype=torch.float32, device=device)
    return _TABLES[device]


def _locks(device: torch.device) -> torch.Tensor:
    """Return counters that are 0 between launches; every kernel that uses them puts them back."""
    if device not in _LOCKS:
        _LOCKS[device] = torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)
    return _LOCKS[device]


def matmul(
    x_MK: torch.Tensor, weight: Nf4, bias: torch.Tensor | None = None, *, config: dict[str, Any] | None = None
) -> torch.Tensor:
    """Return x @ W^T + bias, [M, N] in x's dtype (bf16 or fp16), without writing W to memory."""
    m, k = x_MK.shape
    n, groups = weight.out_features, weight.packed.shape[1] // BLOCK
    c = config or choose(m, n, groups, *_card(x_MK.device))
    per_split = -(-groups // c["splits"])
    splits = -(-groups // per_split)
    grid = (triton.cdiv(n, c["BN"]), triton.cdiv(m, c["BM"]), splits)
    if grid[0] * grid[1] > _MAX_TILES:
        per_split, splits, grid = groups, 1, (grid[0], grid[1], 1)
    y = x_MK.new_empty(m, n)
    x = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    partial = torch.empty(splits * m * n, dtype=torch.float32, device=x.device) if splits > 1 else y
    _matmul_kernel[grid](
        x, weight.packed, weight.absmax.view(torch.int32), _table(x.device), y if bias is None else bias, y, partial,
        _locks(x.device), m, n, k, groups, x.stride(0), splits, per_split,
        BM=c["BM"], BN=c["BN"], EVEN_K=k % GROUP == 0, HAS_BIAS=bias is not None, SPLIT=splits > 1,
        ASM=c["asm"], STAGES=c["stages"], num_warps=c["warps"],
    )  # fmt: skip
    return y


@functools.cache
def _card(device: torch.device) -> tuple[int, int]:
    """Return (multiprocessors, bytes of shared memory that a program may have)."""
    if device.type != "cuda":
        return 4, 1 << 20
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def choose(m: int, n: int, groups: int, processors: int, shared_memory: int) -> dict[str, Any]:
    """Return the tile sizes and splits for a shape, by what `bench/nf4_decode.py sweep` found."""
    # Three stages of 128 x 128 tiles are 115 KB, which consumer cards do not have.
    small = m <= 64 or shared_memory < 120_000
    bm = 16 if m <= 16 else 32 if m <= 32 else 64 if small else 128
    bn = 64 if small or n * groups < 50_000 else 128
    tiles = triton.cdiv(n, bn) * triton.cdiv(m, bm)
    wanted = int(processors * (4 if m <= 32 else 2 if m <= 64 else 1.25))
    splits = max(1, min((wanted + tiles // 2) // tiles, groups // 3))
    return {"BM": bm, "BN": bn, "splits": splits, "warps": 4, "stages": 3, "asm": True}


def dequantize(weight: Nf4, dtype: torch.dtype, *, asm: bool = True) -> torch.Tensor:
    """Return the weight [N, K] in bf16 or fp16; the values that `matmul` multiplies with."""
    n, groups = weight.out_features, weight.packed.shape[1] // BLOCK
    out = torch.empty(n, weight.in_features, dtype=dtype, device=weight.packed.device)
    rows, per = 32, 4
    grid = (triton.cdiv(n, rows), triton.cdiv(groups, per))
    _dequantize_kernel[grid](
        weight.packed, weight.absmax.view(torch.int32), _table(out.device), out, n, weight.in_features, groups,
        out.stride(0), ROWS=rows, GROUPS=per, ASM=asm, num_warps=4,
    )  # fmt: skip
    return out
