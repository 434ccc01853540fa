"""Attention over a packed batch: each completion sees its group's prompt and itself.

The whole batch passes the model as one row of T tokens. There are two ways to do the work, with the same result up to
rounding:

- flash (`flash.py`): calls of flash attention over sequences of unequal length. Nothing is padded and there is no mask.
  16-bit tensors on a CUDA card of compute capability 8.0 or newer.
- dense: two calls of scaled dot product attention with boolean masks, all prompts padded to the longest, and all
  completions padded to the longest over [keys of their prompt; own keys]. Any device and dtype.

It is plugged into transformers through its public AttentionInterface, so one function serves every decoder whose
layers pass keys and values.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ModelError
from ..types import GroupSpan
from . import flash
from .flash import RaggedLayout, Saved, SplitLayout

ATTENTION_NAME = "strop_packed"
_NOT_FOLLOWED = ("softcap", "s_aux", "position_bias", "head_mask")
"""Keywords with which transformers' models change the scores themselves."""


@dataclass(frozen=True)
class PackedLayout:
    """The groups of a packed row, and the index tensors of whichever way of attention is used on them."""

    groups: tuple[GroupSpan, ...]
    device: torch.device | str = "cpu"

    @classmethod
    def build(cls, groups: tuple[GroupSpan, ...], device: torch.device | str = "cpu") -> PackedLayout:
        """Lay out the groups of a `MicroBatch`; index tensors are made at first use."""
        return cls(groups, device)

    @functools.cached_property
    def dense(self) -> DenseLayout:
        """The padded form."""
        return DenseLayout.build(self.groups, self.device)

    @functools.cached_property
    def split(self) -> SplitLayout | None:
        """Flash attention without copies of keys; None when the row is in another order than it needs."""
        return SplitLayout.build(self.groups, self.device)

    @functools.cached_property
    def ragged(self) -> RaggedLayout:
        """Flash attention with the keys of a prompt copied for each completion."""
        return RaggedLayout.build(self.groups, self.device)

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of the longest prompt with a completion of its own."""
        return max(g.prompt_length + max((s.length for s in g.completions), default=0) for g in self.groups)


@dataclass(frozen=True, slots=True)
class DenseLayout:
    """Index tensors that cut the packed row into padded prompts and completions and put the results back."""

    prompt_index: torch.Tensor
    """[P, longest prompt] into T; padding points at the prompt's first token."""
    completion_index: torch.Tensor
    """[C, longest completion] into T."""
    prompt_of_completion: torch.Tensor
    """[C] row of `prompt_index`."""
    restore_T: torch.Tensor
    """[T] into the concatenated padded prompts and completions."""
    prompt_mask: torch.Tensor
    """[P, 1, Lp, Lp] bool, True where attention is allowed."""
    completion_mask: torch.Tensor
    """[C, 1, Lc, Lp + Lc] bool."""
    prompt_positions: torch.Tensor
    """[P, Lp]; used for sliding windows."""
    completion_positions: torch.Tensor
    """[C, Lc]."""

    @classmethod
    def build(cls, groups: tuple[GroupSpan, ...], device: torch.device | str) -> DenseLayout:
        """Lay out the groups of a `MicroBatch`."""
        # A completion of one token has nothing left to pass through the layers.
        spans = [(g, s) for g, group in enumerate(groups) for s in group.completions if s.length > 0]
        prompt_lengths = torch.tensor([g.prompt_length for g in groups])
        lengths = torch.tensor([s.length for _, s in spans], dtype=torch.int64)
        owner = torch.tensor([g for g, _ in spans], dtype=torch.int64)
        longest_prompt = int(prompt_lengths.max())
        longest = int(lengths.max()) if spans else 0
        prompt_index = _padded([g.prompt_start for g in groups], prompt_lengths, longest_prompt)
        completion_index = _padded([s.start for _, s in spans], lengths, longest)
        total = sum(g.prompt_length + sum(s.length for s in g.completions) for g in groups)
        restore = torch.empty(total, dtype=torch.int64)
        slots = torch.arange(prompt_index.numel() + completion_index.numel())
        flat = torch.cat([prompt_index.flatten(), completion_index.flatten()])
        valid = torch.cat([_valid(prompt_lengths, longest_prompt).flatten(), _valid(lengths, longest).flatten()])
        restore[flat[valid]] = slots[valid]
        prompt_ok = _valid(prompt_lengths, longest_prompt)
        causal_p = torch.ones(longest_prompt, longest_prompt, dtype=torch.bool).tril()
        causal_c = torch.ones(longest, longest, dtype=torch.bool).tril()
        prompt_mask = causal_p & prompt_ok[:, None, :]
        seen_prompt = prompt_ok[owner][:, None, :].expand(-1, longest, -1)
        completion_mask = torch.cat([seen_prompt, causal_c.expand(len(spans), -1, -1)], dim=-1)
        offsets = torch.arange(longest_prompt)
        return cls(
            prompt_index=prompt_index.to(device),
            completion_index=completion_index.to(device),
            prompt_of_completion=owner.to(device),
            restore_T=restore.to(device),
            prompt_mask=prompt_mask[:, None].to(device),
            completion_mask=completion_mask[:, None].to(device),
            prompt_positions=offsets.expand(len(groups), -1).to(device),
            completion_positions=(prompt_lengths[owner][:, None] + torch.arange(longest)).to(device),
        )


def _padded(starts: list[int], lengths: torch.Tensor, longest: int) -> torch.Tensor:
    offsets = torch.arange(longest).expand(len(starts), -1)
    within = torch.where(offsets < lengths[:, None], offsets, torch.zeros_like(offsets))
    return torch.tensor(starts, dtype=torch.int64)[:, None] + within


def _valid(lengths: torch.Tensor, longest: int) -> torch.Tensor:
    return torch.arange(longest)[None, :] < lengths[:, None]


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedLayout,
    *,
    scaling: float | None,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Attend within the layout: query [1, heads, T, D], key and value [1, kv heads, T, D] -> [1, T, heads, D]."""
    query, key, value = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    if _has_flash(query):
        return _Attend.apply(query, key, value, layout, scaling, sliding_window)[None]  # type: ignore[no-any-return]
    return _dense(query, key, value, layout, scaling, sliding_window)[None]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: PackedLayout, scaling: float | None, window: int | None
) -> tuple[torch.Tensor, Saved]:
    """[T, heads, D] and [T, kv heads, D] -> ([T, heads, D], what `attend_backward` needs beside it), below autograd."""
    if not _has_flash(q):
        return _dense(q, k, v, layout, scaling, window), ()
    if layout.split is not None and (window is None or window >= layout.longest):
        return flash.split_forward(q, k, v, layout.split, scaling)
    return flash.gathered_forward(q, k, v, layout.ragged, scaling, window)


def attend_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, saved: Saved,
    layout: PackedLayout, scaling: float | None, window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the gradients of q, k and v, each in its own shape and dtype."""
    if not _has_flash(q):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            again = _dense(leaves[0], leaves[1], leaves[2], layout, scaling, window)
        dq, dk, dv = torch.autograd.grad(again, leaves, grad)
        return dq, dk, dv
    if layout.split is not None and (window is None or window >= layout.longest):
        return flash.split_backward(grad, q, k, v, out, saved, layout.split, scaling)
    return flash.gathered_backward(grad, q, k, v, out, saved, layout.ragged, scaling, window)


class _Attend(torch.autograd.Function):
    """`attend` for a model whose layers run as transformers wrote them."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: PackedLayout, scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        # A model may hold a head's tokens side by side; FlashAttention's output would then lie in that way too.
        q, k, v = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (q, k, v))
        out, saved = attend(q, k, v, layout, scaling, window)
        ctx.save_for_backward(q, k, v, out, *saved)
        ctx.how = (layout, scaling, window)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, *saved = ctx.saved_tensors
        return (*attend_backward(grad.contiguous(), q, k, v, out, tuple(saved), *ctx.how), None, None, None)


def _has_flash(x: torch.Tensor) -> bool:
    fits = x.shape[-1] % 8 == 0 and x.shape[-1] <= 256
    return fits and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and _capability(x.device) >= (8, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed_layout: PackedLayout,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """[T, heads, D] and [T, kv heads, D] -> [T, heads, D]."""
    layout = packed_layout.dense
    q_p, k_p, v_p = (_take(x, layout.prompt_index) for x in (query, key, value))
    prompt_mask, completion_mask = layout.prompt_mask, layout.completion_mask
    if sliding_window is not None:
        at_p, at_c = layout.prompt_positions, layout.completion_positions
        at_keys = torch.cat([at_p[layout.prompt_of_completion], at_c], dim=-1)
        prompt_mask = prompt_mask & _within(at_p, at_p, sliding_window)
        completion_mask = completion_mask & _within(at_c, at_keys, sliding_window)
    out = _sdpa(q_p, k_p, v_p, prompt_mask, scaling)
    if layout.completion_index.numel():
        q_c, k_c, v_c = (_take(x, layout.completion_index) for x in (query, key, value))
        k_c = torch.cat([k_p.index_select(0, layout.prompt_of_completion), k_c], dim=2)
        v_c = torch.cat([v_p.index_select(0, layout.prompt_of_completion), v_c], dim=2)
        out = torch.cat([out, _sdpa(q_c, k_c, v_c, completion_mask, scaling)])
    return out.index_select(0, layout.restore_T)


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[T, heads, D] -> [rows, heads, length, D]."""
    return x.index_select(0, index.flatten()).unflatten(0, tuple(index.shape)).transpose(1, 2)


def _within(query_at: torch.Tensor, key_at: torch.Tensor, window: int) -> torch.Tensor:
    return (query_at[:, :, None] - key_at[:, None, :] < window)[:, None]


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """[rows, heads, Lq, D] x [rows, kv heads, Lk, D] -> [rows * Lq, heads, D]."""
    if q.is_cuda and q.shape[1] != k.shape[1]:
        # With grouped heads and a mask, torch's only kernel on CUDA is the one that keeps all scores in memory.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).flatten(0, 1)


def _interface(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    strop_layout: PackedLayout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' AttentionInterface calls; the layout travels as a keyword of the forward pass."""
    assert strop_layout is not None, "the packed attention was called without a layout"
    left_out = [name for name in _NOT_FOLLOWED if kwargs.get(name) is not None]
    if left_out:
        raise ModelError(
            f"the model's attention uses {', '.join(left_out)}, which the packed training pass does not follow",
            hint="model.path: choose a Llama, Qwen2, Qwen3, Mistral or Gemma3 model",
        )
    window = sliding_window or getattr(module, "sliding_window", None)
    out = packed_attention(query, key, value, strop_layout, scaling=scaling, sliding_window=window)
    return out, None


def register() -> None:
    """Make the packed attention known to transformers; calling it twice changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _interface)


@contextmanager
def packed(config: Any) -> Iterator[None]:
    """Let a model use the packed attention inside the block, and what it used before outside of it."""
    before = config._attn_implementation
    config._attn_implementation = ATTENTION_NAME
    try:
        yield
    finally:
        config._attn_implementation = before
