"""Fused blocks, checkpointing and the two ways of flash attention against the plain layers, gradients included."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from records import random_samples
from test_policy import CONFIGS, SHAPES, TARGETS, VOCAB, assert_same, gradients, model, samples, shake

from strop.objective.packing import halved, pack
from strop.policy import attention, flash, lora
from strop.policy.attention import PackedLayout, attend, attend_backward
from strop.policy.linears import MAX_FUSED_RANK
from strop.policy.logprobs import token_logprobs
from strop.policy.policy import Policy, check_packed_forward
from strop.types import MicroBatch


def policy(kind: str, *, fuse: bool, adapters: bool = True, checkpointed: int = 0, stacked: bool = False) -> Policy:
    net = model(kind)
    if stacked:
        for layer in net.model.layers:
            stack([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj])
            stack([layer.mlp.gate_proj, layer.mlp.up_proj])
    found = lora.inject(net, r=4, alpha=12.0, target_modules=TARGETS, seed=0) if adapters else {}
    built = Policy(net, 0.7, found, checkpoint_layers=checkpointed, fuse=fuse)
    if adapters:
        shake(built)
    return built


def stack(members: Sequence[torch.nn.Linear]) -> None:
    """Let the weights lie one after the other in one tensor, as vLLM keeps them."""
    whole = torch.cat([m.weight.data for m in members])
    for m, part in zip(members, whole.split([m.out_features for m in members]), strict=True):
        m.weight = torch.nn.Parameter(part)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("adapters", [True, False], ids=["lora", "full"])
def test_fused_blocks_compute_what_the_plain_layers_compute(kind: str, adapters: bool) -> None:
    batches = pack(samples(), 60)
    plain, ours = (policy(kind, fuse=fuse, adapters=adapters) for fuse in (False, True))
    assert ours.fused is not None
    check_packed_forward(ours)
    for batch in batches:
        expected, got = plain.forward(batch), ours.forward(batch)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=2e-5)
    assert_same(gradients(ours, batches), gradients(plain, batches))


@pytest.mark.parametrize(
    ("targets", "rank"),
    [(("q_proj", "v_proj"), 4), (("gate_proj",), 4), (("k_proj", "up_proj", "down_proj"), 4), (TARGETS, 80)],
)
def test_any_choice_of_layers_and_rank_is_fused(targets: tuple[str, ...], rank: int) -> None:
    """Layers without an adapter beside such with one, and ranks above what the gated product adds on its way."""
    assert rank in (4, MAX_FUSED_RANK + 16)
    built = []
    for fuse in (False, True):
        net = model("qwen2")
        built.append(Policy(net, 0.7, lora.inject(net, r=rank, alpha=8.0, target_modules=targets, seed=0), fuse=fuse))
        shake(built[-1])
    batches = pack(samples(), 60)
    assert_same(gradients(built[1], batches), gradients(built[0], batches))


def test_weights_that_lie_in_one_tensor_are_used_as_one() -> None:
    batches = pack(samples(), 60)
    apart, together = (policy("qwen2", fuse=True, stacked=s) for s in (False, True))
    assert together.fused is not None
    storage = together.model.model.layers[0].self_attn.q_proj.base.weight.untyped_storage()
    used = together.fused._layers[0][0].qkv._stacked
    assert used is not None
    assert used.untyped_storage().data_ptr() == storage.data_ptr()
    assert_same(gradients(together, batches), gradients(apart, batches))


def test_an_architecture_that_the_blocks_do_not_know_stays_as_it_is() -> None:
    odd = policy("llama", fuse=False)
    odd.model.model.layers[1].mlp.extra = torch.nn.Identity()
    assert Policy(odd.model, 1.0, odd.adapters, fuse=True).fused is None


@pytest.mark.parametrize(
    ("kind", "fuse"), [("qwen3", True), ("qwen3", False), ("gemma3-window", True), ("gemma3-window", False)]
)
def test_checkpointed_layers_give_the_same_bits(kind: str, fuse: bool) -> None:
    batches = pack(samples(), 60)
    whole, half, all_of_it = (policy(kind, fuse=fuse, checkpointed=n) for n in (0, 1, 2))
    expected = gradients(whole, batches)
    for other in (half, all_of_it):
        got = gradients(other, batches)
        assert [name for name in expected if not torch.equal(expected[name], got[name])] == []


def test_checkpointed_layers_keep_less() -> None:
    (batch,) = pack(samples(), 1000)
    kept = []
    for count in (0, 1, 2):
        sizes: list[int] = []
        ours = policy("llama", fuse=True, checkpointed=count)

        def note(x: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            ours.forward(batch)
        kept.append(sum(sizes))
    assert kept[0] > 1.5 * kept[1] > 1.5 * kept[2]


def test_a_changed_master_shows_in_the_next_pass() -> None:
    (batch,) = pack(samples(), 1000)
    ours, plain = policy("llama", fuse=True), policy("llama", fuse=False)
    before = ours.forward(batch)[0].detach()
    for p in (ours, plain):
        for adapter in p.adapters.values():
            adapter.lora_B.data.mul_(-1.0)  # `.data` leaves no trace in torch's version counter
    after = ours.forward(batch)[0].detach()
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, plain.forward(batch)[0].detach(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ours.reference_logprobs(batch), plain.reference_logprobs(batch), rtol=1e-5, atol=2e-5)


def allowed(call: flash._Call, queries: int, keys: int) -> torch.Tensor:
    row = torch.arange(queries)[:, None] + keys - queries
    col = torch.arange(keys)[None]
    ok = torch.ones(queries, keys, dtype=torch.bool)
    if call.causal or call.window[1] == 0:
        ok &= col <= row
    if call.window[0] >= 0:
        ok &= row - col <= call.window[0]
    return ok


class SlowCall(flash._Call):
    """Attention over sequences of unequal length, written out: what torch's kernels do on a card."""

    def _sequences(self, q: torch.Tensor, k: torch.Tensor) -> list[tuple[slice, slice, torch.Tensor]]:
        q_at, k_at = self.query_starts.tolist(), self.key_starts.tolist()
        assert (q_at[-1], k_at[-1]) == (len(q), len(k))
        found = []
        for i in range(len(q_at) - 1):
            rows, cols = slice(q_at[i], q_at[i + 1]), slice(k_at[i], k_at[i + 1])
            assert rows.stop - rows.start <= self.longest_query
            assert cols.stop - cols.start <= self.longest_key
            wide = k[cols].repeat_interleave(q.shape[1] // k.shape[1], 1)
            scores = torch.einsum("qhd,khd->hqk", q[rows], wide) * (self.scale or q.shape[-1] ** -0.5)
            ok = allowed(self, rows.stop - rows.start, cols.stop - cols.start)
            found.append((rows, cols, scores.masked_fill(~ok, -torch.inf)))
        return found

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = torch.zeros_like(q), torch.zeros(q.shape[1], q.shape[0])
        for rows, cols, scores in self._sequences(q, k):
            lse[:, rows] = scores.logsumexp(-1)
            wide = v[cols].repeat_interleave(q.shape[1] // v.shape[1], 1)
            out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), wide)
        return out, lse

    def backward(
        self, grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
        lse: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        group, scale = q.shape[1] // k.shape[1], self.scale or q.shape[-1] ** -0.5
        inner = (grad * out).sum(-1).t()
        for rows, cols, scores in self._sequences(q, k):
            p = (scores - lse[:, rows, None]).exp()
            ds = p * (
                torch.einsum("qhd,khd->hqk", grad[rows], v[cols].repeat_interleave(group, 1)) - inner[:, rows, None]
            )
            dq[rows] = torch.einsum("hqk,khd->qhd", ds, k[cols].repeat_interleave(group, 1)) * scale
            dk[cols] = (torch.einsum("hqk,qhd->khd", ds, q[rows]) * scale).unflatten(1, (-1, group)).sum(2)
            dv[cols] = torch.einsum("hqk,qhd->khd", p, grad[rows]).unflatten(1, (-1, group)).sum(2)
        return dq, dk, dv


@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize("lengths", [[[6, 1, 8], [5, 12], [3, 7, 2]], [[1, 1], [5, 1], [4]], [[1], [1, 1], [1]]])
@pytest.mark.parametrize("share", [True, False])
def test_flash_attention_in_two_calls_is_the_dense_one(
    window: int | None, lengths: list[list[int]], share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = random_samples(0, vocab=50, prompts=[9, 4, 13], lengths=lengths)
    batch = pack(items, 10**6, share_prompt=share)[0]
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(batch.num_tokens, heads, 8) for heads in (6, 2, 2, 6))
    layout = PackedLayout.build(batch.groups)
    out, saved = attend(q, k, v, layout, None, window)
    expected = [out, *attend_backward(grad, q, k, v, out, saved, layout, None, window)]

    monkeypatch.setattr(attention, "_has_flash", lambda x: True)
    monkeypatch.setattr(flash, "_Call", SlowCall)
    out, saved = attend(q, k, v, layout, None, window)
    got = [out, *attend_backward(grad, q, k, v, out, saved, layout, None, window)]
    assert ("ragged" in vars(layout)) == (window == 5)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


def test_halves_hold_the_same_completions_and_give_the_same_gradient() -> None:
    ours = policy("qwen2", fuse=False)
    for share in (True, False):
        (batch,) = pack(samples(), 1000, share_prompt=share)
        parts = halved(batch)
        assert parts is not None
        longest = max(SHAPES["lengths"], key=sum)
        assert max(p.num_tokens for p in parts) < batch.num_tokens - sum(longest) / 2
        for name in ("target_ids_K", "weights_K", "advantages_K", "sampler_logprobs_K"):
            assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(batch, name))
        assert all(int(p.sequence_K[0]) == 0 for p in parts)
        assert_same(gradients(ours, list(parts)), gradients(ours, [batch]))
    (single,) = pack(samples()[:1], 1000)
    assert halved(single) is None


def pieces(batch: MicroBatch) -> list[MicroBatch]:
    parts = halved(batch)
    return [batch] if parts is None else [p for part in parts for p in pieces(part)]


def test_halving_ends_with_single_completions() -> None:
    (batch,) = pack(samples(), 1000)
    singles = pieces(batch)
    repacked = [pack([s], 1000)[0] for s in samples()]
    assert len(singles) == len(repacked)
    for ours, theirs in zip(singles, repacked, strict=True):
        assert ours.groups == theirs.groups
        for name in ("token_ids_T", "position_ids_T", "predictor_K", "target_ids_K", "sequence_K"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


class Packed8:
    """A head whose weight is not a tensor."""

    requires_grad = False

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight, self.shape, self.dtype = weight, weight.shape, weight.dtype

    def logits(self, hidden_KH: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(hidden_KH @ self._weight.t())

    def input_gradient(self, grad_KV: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(grad_KV @ self._weight)


def test_a_frozen_head_gives_the_gradient_of_a_trained_one() -> None:
    torch.manual_seed(0)
    start, weight, targets, mix = (
        torch.randn(11, 16),
        torch.randn(VOCAB, 16),
        torch.randint(0, VOCAB, (11,)),
        torch.randn(11),
    )
    results = []
    for head in (weight.clone().requires_grad_(), weight, Packed8(weight)):
        hidden = start.clone().requires_grad_()
        logp, entropy = token_logprobs(hidden, head, targets, temperature=0.6, rows=4)
        (logp * mix).sum().backward()
        results.append((logp.detach(), entropy, hidden.grad))
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
