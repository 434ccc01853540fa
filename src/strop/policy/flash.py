"""Flash attention over a packed batch, forward and backward: nothing is padded and there is no mask.

A sequence is a prompt, or a completion without its last token. There are two ways to let a completion see its prompt:

- split: one call over all sequences, each on its own and causal, and one in which all completions of a group attend to
  its prompt; the two are merged by their log-sum-exp. Nothing is gathered. Backward uses that flash attention needs
  only the merged output and log-sum-exp to differentiate either call exactly.
- gathered: one call in which the keys of a completion are a copy of its prompt's and its own. For sliding windows,
  whose reach into the prompt differs from query to query.

torch's own flash kernels are called below autograd, as `torch.nn.attention.varlen` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..types import GroupSpan
from .kernels import ops_for

Saved = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class SplitLayout:
    """Where the sequences of a row begin that holds all prompts first and then, in the same order, all completions."""

    own_starts: torch.Tensor
    """[sequences + 1] int32: prompts, then completions."""
    longest_own: int
    prompts_end: int
    """Tokens of all prompts; completions lie behind."""
    query_starts: torch.Tensor
    """[groups + 1] int32: where each group's completions begin, counted from `prompts_end`."""
    prompt_starts: torch.Tensor
    """[groups + 1] int32."""
    longest_queries: int
    longest_prompt: int

    @classmethod
    def build(cls, groups: tuple[GroupSpan, ...], device: torch.device | str) -> SplitLayout | None:
        """Lay out the groups of a `MicroBatch`; None when the row is in another order."""
        prompts, completions, group_lengths = [], [], []
        at = 0
        for group in groups:
            if group.prompt_start != at:
                return None
            prompts.append(group.prompt_length)
            at += group.prompt_length
        prompts_end = at
        for group in groups:
            begin = at
            for span in group.completions:
                if span.length and span.start != at:
                    return None
                completions += [span.length] if span.length else []
                at += span.length
            group_lengths.append(at - begin)
        starts = [_starts(lengths) for lengths in ([*prompts, *completions], group_lengths, prompts)]
        # One transfer for all three.
        own, queries, keys = torch.cat(starts).to(device, non_blocking=True).split([len(s) for s in starts])
        return cls(own, max(prompts + completions), prompts_end, queries, keys, max(group_lengths), max(prompts))


@dataclass(frozen=True, slots=True)
class RaggedLayout:
    """Where the sequences of the packed row begin, and which keys each of them sees; any order of the row."""

    key_index: torch.Tensor
    """[keys] into T: per sequence its prompt's tokens, then its own; a prompt has its own alone."""
    query_index: torch.Tensor
    """[T]: the row's tokens, sequence after sequence."""
    query_starts: torch.Tensor
    """[sequences + 1] int32."""
    key_starts: torch.Tensor
    """[sequences + 1] int32."""
    longest_query: int
    longest_key: int

    @classmethod
    def build(cls, groups: tuple[GroupSpan, ...], device: torch.device | str) -> RaggedLayout:
        """Lay out the groups of a `MicroBatch`."""
        keys, queries = [], []
        for group in groups:
            prompt = torch.arange(group.prompt_start, group.prompt_start + group.prompt_length)
            keys.append(prompt)
            queries.append(prompt)
            for span in group.completions:
                if span.length == 0:  # a completion of one token has nothing left to pass through the layers
                    continue
                own = torch.arange(span.start, span.start + span.length)
                keys.append(torch.cat([prompt, own]))
                queries.append(own)
        return cls(
            key_index=torch.cat(keys).to(device),
            query_index=torch.cat(queries).to(device),
            query_starts=_starts([len(q) for q in queries]).to(device),
            key_starts=_starts([len(k) for k in keys]).to(device),
            longest_query=max(len(q) for q in queries),
            longest_key=max(len(k) for k in keys),
        )


def _starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of flash attention: which queries see which keys."""

    query_starts: torch.Tensor
    key_starts: torch.Tensor
    longest_query: int
    longest_key: int
    causal: bool
    window: tuple[int, int]
    scale: float | None

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[Tq, heads, D], [Tk, kv heads, D] -> ([Tq, heads, D], log-sum-exp [heads, Tq] fp32)."""
        result: Any = torch.ops.aten._flash_attention_forward(
            q, k, v, self.query_starts, self.key_starts, self.longest_query, self.longest_key, 0.0, self.causal, False,
            scale=self.scale, window_size_left=self.window[0], window_size_right=self.window[1],
        )  # fmt: skip
        out, lse = result[0], result[1]
        assert lse.shape == (q.shape[1], q.shape[0]), f"flash attention gave a log-sum-exp of shape {tuple(lse.shape)}"
        return out, lse

    def backward(
        self, grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
        lse: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """Return the gradients of q, k and v."""
        no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty(0, device=q.device)
        return torch.ops.aten._flash_attention_backward(  # type: ignore[no-any-return]
            grad, q, k, v, out, lse, self.query_starts, self.key_starts, self.longest_query, self.longest_key, 0.0,
            self.causal, no_dropout, unused, scale=self.scale, window_size_left=self.window[0],
            window_size_right=self.window[1],
        )  # fmt: skip


def _split_calls(layout: SplitLayout, scale: float | None) -> tuple[_Call, _Call]:
    own = _Call(
        layout.own_starts, layout.own_starts, layout.longest_own, layout.longest_own, True, (-1, 0), scale
    )  # fmt: skip
    prompt = _Call(
        layout.query_starts, layout.prompt_starts, layout.longest_queries, layout.longest_prompt, False, (-1, -1), scale
    )
    return own, prompt


def split_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SplitLayout, scale: float | None
) -> tuple[torch.Tensor, Saved]:
    """[T, heads, D] and [T, kv heads, D] -> ([T, heads, D], what `split_backward` needs beside it)."""
    own, prompt = _split_calls(layout, scale)
    out, lse = own.forward(q, k, v)
    if not layout.longest_queries:
        return out, (lse,)
    end = layout.prompts_end
    other, other_lse = prompt.forward(q[end:], k[:end], v[:end])
    ops_for(q.device).merge_attention_(out[end:], lse[:, end:], other, other_lse)
    return out, (lse,)


def split_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, saved: Saved,
    layout: SplitLayout, scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the gradients of q, k and v; `grad` and `out` are [T, heads, D]."""
    own, prompt = _split_calls(layout, scale)
    (lse,) = saved
    dq, dk, dv = own.backward(grad, q, k, v, out, lse)
    if layout.longest_queries:
        end = layout.prompts_end
        more_q, more_k, more_v = prompt.backward(
            grad[end:], q[end:], k[:end], v[:end], out[end:], lse[:, end:].contiguous()
        )
        dq[end:].add_(more_q)
        dk[:end].add_(more_k)
        dv[:end].add_(more_v)
    return dq, dk, dv


def gathered_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: RaggedLayout, scale: float | None, window: int | None
) -> tuple[torch.Tensor, Saved]:
    """As `split_forward`; a query sees the last `window` keys, itself included."""
    call = _gathered_call(layout, scale, window)
    keys, values = (x.index_select(0, layout.key_index) for x in (k, v))
    packed_out, lse = call.forward(q.index_select(0, layout.query_index), keys, values)
    out = torch.empty_like(packed_out)
    out[layout.query_index] = packed_out
    return out, (lse,)


def gathered_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, saved: Saved,
    layout: RaggedLayout, scale: float | None, window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `split_backward`. A prompt's gradients are added up in fp32."""
    call = _gathered_call(layout, scale, window)
    keys, values = (x.index_select(0, layout.key_index) for x in (k, v))
    grad_rows, q_rows, out_rows = (x.index_select(0, layout.query_index) for x in (grad, q, out))
    dq_rows, dkeys, dvalues = call.backward(grad_rows, q_rows, keys, values, out_rows, saved[0])
    dq = torch.empty_like(dq_rows)
    dq[layout.query_index] = dq_rows
    dk, dv = (
        torch.zeros(x.shape, dtype=torch.float32, device=x.device).index_add_(0, layout.key_index, d.float())
        for x, d in ((k, dkeys), (v, dvalues))
    )
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _gathered_call(layout: RaggedLayout, scale: float | None, window: int | None) -> _Call:
    # Ends aligned: the last query of a sequence sees its last key.
    local = (-1, 0) if window is None else (window - 1, 0)
    return _Call(
        layout.query_starts, layout.key_starts, layout.longest_query, layout.longest_key, window is None, local, scale
    )
