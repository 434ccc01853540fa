"""Bytes that a step of full fine-tuning really allocates, against those that the plan counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from records import random_samples
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Qwen2Config

from strop import load_config
from strop.memory import card
from strop.memory.card import CardNeeds
from strop.memory.shapes import ModelShape
from strop.objective.packing import pack
from strop.policy import compact, optim
from strop.policy.optim import make_optimizer
from strop.policy.policy import Policy
from strop.trainer.update import update

SMALL_PIECE = 1 << 16


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the highest sum of what `work` holds at a time, by the allocator's own reports."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    assert record.profiler is not None
    results: Any = record.profiler.kineto_results
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("settings", [[], ["optim.name=adamw_8bit", "optim.master=kahan"]], ids=["fp32", "8bit-kahan"])
@pytest.mark.parametrize(
    ("vocab", "layers", "tied"), [(16_000, 1, True), (16_000, 1, False), (600, 8, True)],
    ids=["tied-head", "head", "layers"],
)  # fmt: skip
def test_the_plan_covers_what_a_step_of_all_weights_takes(
    vocab: int, layers: int, tied: bool, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is nearly all head, and one that is nearly all layers: the two peaks that there are."""
    for module, name in ((optim, "PIECE"), (compact, "PIECE"), (card, "STEP_VALUES")):
        monkeypatch.setattr(module, name, SMALL_PIECE)
    monkeypatch.setattr(card, "COMPACT_STEP", (SMALL_PIECE, card.COMPACT_STEP[1]))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shape = Qwen2Config(
        vocab_size=vocab, hidden_size=128, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, dtype=torch.bfloat16,
    )  # fmt: skip
    net = AutoModelForCausalLM.from_config(shape)
    config = load_config({}, ["lora.r=0", "model.dtype=bfloat16", *settings])
    policy = Policy(net, 1.0, fuse=True, logit_rows=128)
    optimizer = make_optimizer(policy.trainable, config.optim)
    batches = pack(random_samples(0, vocab=vocab, prompts=[4, 4], lengths=[[4, 4], [4, 4]]), 12)
    assert len(batches) > 1  # the second adds to gradients that are there

    def step() -> None:
        assert update(policy, optimizer, batches, config.objective, learning_rate=1e-3, max_grad_norm=1.0).stepped

    measured = peak_bytes(step)
    tokens = max(b.num_tokens for b in batches)
    needs = CardNeeds(config, ModelShape.from_config(shape), "bfloat16", tokens)
    planned = needs.gradients + needs.training(tokens, 0, 128)
    assert 0.6 * planned < measured <= 1.002 * planned  # norms and biases are not counted
    if vocab > 1000:  # without the gradient of the head the plan would not have been enough
        assert measured > needs.gradients + tokens * needs.bytes_per_token(0) + needs.logits(128)
    else:  # nor would it with a copy of all gradients
        assert planned < needs.gradients + 4 * needs.shape.num_parameters


def test_the_plan_counts_the_pieces_that_the_optimizers_take() -> None:
    assert card.STEP_VALUES == optim.PIECE
    assert card.COMPACT_STEP[0] == compact.PIECE


@pytest.mark.parametrize("settings", [["optim.name=adamw_8bit"], ["optim.master=kahan"], []], ids=str)
def test_a_step_takes_the_bytes_that_are_counted_for_a_piece(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (optim, compact):
        monkeypatch.setattr(module, "PIECE", SMALL_PIECE)
    p = torch.nn.Parameter(torch.randn(10, SMALL_PIECE // 4).bfloat16())
    optimizer = make_optimizer({"w": p}, load_config({}, ["lora.r=0", *settings]).optim)
    p.grad = torch.randn_like(p)
    # On a CPU torch's AdamW has the root and a quotient of it beside the gradient; on a card one kernel does it all.
    each = card.COMPACT_STEP[1] if settings else 4 + 8
    measured = peak_bytes(lambda: optimizer.step(learning_rate=1e-3, gradient_scale=1.0))
    assert measured <= each * SMALL_PIECE + 4096
