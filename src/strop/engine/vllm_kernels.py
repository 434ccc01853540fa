"""Triton kernels for what a decode step does beside the model: its inputs before, its sample after.

They work on fixed buffers of vLLM's second model runner, so that a whole step is one CUDA graph. `control` is
[n, row 0, row 1, ...] in int32: how many requests decode, and which slot of the runner's state each of them has.
"""

# pyright: reportMissingParameterType=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
from vllm.triton_utils import tl, tldevice, triton
from vllm.v1.worker.gpu.sample.gumbel import tl_rand32

VOCAB_BLOCK = 4096


@triton.jit
def _prepare_kernel(
    control, computed, last_token, table, input_ids, positions, seq_lens, starts, slots, step_table,
    width, BLOCK_TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    n = tl.load(control)
    real = row < n
    request = tl.load(control + 1 + row, mask=real, other=0)
    position = tl.load(computed + request, mask=real, other=0)
    token = tl.load(last_token + request, mask=real, other=0)
    tl.store(input_ids + row, token.to(tl.int32))
    tl.store(positions + row, position.to(tl.int64))
    tl.store(seq_lens + row, tl.where(real, position + 1, 0))
    tl.store(starts + row + 1, tl.minimum(row + 1, n))
    if row == 0:
        tl.store(starts, 0)
    columns = tl.arange(0, WIDTH)
    held = tl.where(real, width, 0)
    blocks = tl.load(table + request.to(tl.int64) * width + columns, mask=columns < held, other=0)
    tl.store(step_table + row.to(tl.int64) * width + columns, blocks, mask=columns < width)
    block = tl.load(table + request.to(tl.int64) * width + position // BLOCK_TOKENS, mask=real, other=0)
    slot = block.to(tl.int64) * BLOCK_TOKENS + position % BLOCK_TOKENS
    tl.store(slots + row, tl.where(real, slot, -1))


@triton.jit
def _draw_kernel(
    logits, stride, control, seeds, temperatures, positions, best, best_token, best_logit, largest, total,
    vocab, num_blocks, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    part = tl.program_id(1)
    if row >= tl.load(control):
        return
    request = tl.load(control + 1 + row)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    x = tl.load(logits + row.to(tl.int64) * stride + columns, mask=inside, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperatures + request)
    greedy = temperature == 0.0
    x = x / tl.where(greedy, 1.0, temperature)
    most = tl.max(x, axis=0)
    at = row * num_blocks + part
    tl.store(largest + at, most)
    tl.store(total + at, tl.sum(tl.where(inside, tl.exp(x - most), 0.0), axis=0))
    # The noise of vLLM's own sampler (`gumbel_block_argmax`): a function of the seed, the position and the token.
    noise_seed = tl.randint(tl.load(seeds + request), tl.load(positions + row))
    u = tl_rand32(noise_seed, columns, includes_zero=False)
    noise = -tl.log(-tldevice.log1p(-u))
    y = tl.where(inside, x + tl.where(greedy, 0.0, noise), float("-inf"))
    value, index = tl.max(y, axis=0, return_indices=True)
    tl.store(best + at, value)
    tl.store(best_token + at, part * BLOCK + index)
    tl.store(best_logit + at, tl.max(tl.where(columns == part * BLOCK + index, x, float("-inf")), axis=0))


@triton.jit
def _finish_kernel(
    control, best, best_token, best_logit, largest, total, tokens, logprobs, last_token, computed, all_tokens,
    all_tokens_stride, lengths, num_blocks, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if row >= tl.load(control):
        return
    request = tl.load(control + 1 + row)
    parts = tl.arange(0, BLOCKS)
    inside = parts < num_blocks
    at = row * num_blocks + parts
    _, winner = tl.max(tl.load(best + at, mask=inside, other=float("-inf")), axis=0, return_indices=True)
    token = tl.load(best_token + row * num_blocks + winner)
    chosen = tl.load(best_logit + row * num_blocks + winner)
    peaks = tl.load(largest + at, mask=inside, other=float("-inf"))
    most = tl.max(peaks, axis=0)
    sums = tl.load(total + at, mask=inside, other=0.0)
    norm = most + tl.log(tl.sum(tl.where(inside, sums * tl.exp(peaks - most), 0.0), axis=0))
    tl.store(tokens + row, token)
    tl.store(logprobs + row, chosen - norm)
    tl.store(last_token + request, token.to(tl.int64))
    tl.store(computed + request, tl.load(computed + request) + 1)
    length = tl.load(lengths + request)
    tl.store(all_tokens + request.to(tl.int64) * all_tokens_stride + length, token)
    tl.store(lengths + request, length + 1)


def prepare(size: int, control: torch.Tensor, runner: Any) -> None:
    """Fill the first `size` rows of the runner's input buffers from its state; rows beyond n become padding."""
    state, buffers, tables = runner.req_states, runner.input_buffers, runner.block_tables
    table = tables.block_tables[0].gpu
    width = table.stride(0)
    _prepare_kernel[(size,)](
        control, state.num_computed_tokens.gpu, state.last_sampled_tokens, table, buffers.input_ids, buffers.positions,
        buffers.seq_lens, buffers.query_start_loc, tables.slot_mappings, tables.input_block_tables[0],
        width, BLOCK_TOKENS=tables.block_sizes[0], WIDTH=triton.next_power_of_2(width),
    )  # fmt: skip


class Drawing:
    """Samples one token per row of logits and moves the runner's state on; buffers are made once."""

    def __init__(self, max_rows: int, vocab: int, device: torch.device) -> None:
        self._vocab, self._num_blocks = vocab, triton.cdiv(vocab, VOCAB_BLOCK)
        self._parts = torch.empty(4, max_rows, self._num_blocks, dtype=torch.float32, device=device)
        self._tokens = torch.empty(max_rows, self._num_blocks, dtype=torch.int32, device=device)
        self.seeds = torch.zeros(max_rows, dtype=torch.int64, device=device)
        """By slot of the runner's state."""
        self.temperatures = torch.ones(max_rows, dtype=torch.float32, device=device)
        self.result = torch.zeros(2, max_rows, dtype=torch.int32, device=device)
        """Tokens, and their log-probabilities as the bits of fp32; by row of the step."""

    def __call__(self, logits: torch.Tensor, control: torch.Tensor, runner: Any) -> None:
        """[rows, V] of any float dtype; log-probabilities are those of the tempered distribution, in fp32."""
        best, best_logit, largest, total = self._parts
        state, size = runner.req_states, logits.shape[0]
        _draw_kernel[(size, self._num_blocks)](
            logits, logits.stride(0), control, self.seeds, self.temperatures, runner.input_buffers.positions, best,
            self._tokens, best_logit, largest, total, self._vocab, self._num_blocks, BLOCK=VOCAB_BLOCK, num_warps=8,
        )  # fmt: skip
        _finish_kernel[(size,)](
            control, best, self._tokens, best_logit, largest, total, self.result[0],
            self.result[1].view(torch.float32), state.last_sampled_tokens, state.num_computed_tokens.gpu,
            state.all_token_ids.gpu, state.all_token_ids.gpu.stride(0), state.total_len.gpu, self._num_blocks,
            BLOCKS=triton.next_power_of_2(self._num_blocks), num_warps=1,
        )  # fmt: skip
