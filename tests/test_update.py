"""One optimizer step against a slow one written out, and the steps that must not be made."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from engines import tiny_model
from records import random_samples

from strop.config import ObjectiveConfig
from strop.errors import MemoryExhaustedError
from strop.objective.packing import pack
from strop.policy import lora
from strop.policy.load import load_weights, open_model
from strop.policy.optim import MasterAdamW
from strop.policy.policy import Policy
from strop.trainer.update import FORGIVEN_AFTER, MAX_HALVINGS, MicroBatchLimit, update
from strop.types import MicroBatch, Sample, StepStats

TEMPERATURE = 0.7
LEARNING_RATE = 1e-2
ADAM = {"betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.1}
"""An epsilon of the size of the gradients: the step then shows their size and not only their sign."""


def new_policy() -> Policy:
    torch.set_num_threads(1)
    return Policy(load_weights(open_model(str(tiny_model())), torch.float32, torch.device("cpu")), TEMPERATURE)


@functools.cache
def new_samples() -> tuple[Sample, ...]:
    """Samples whose sampler is off by up to 1.2 in log-probability: corrections on either side of 1."""
    policy, draw = new_policy(), random.Random(1)
    samples = random_samples(0, vocab=127, prompts=[9, 4, 13], lengths=[[6, 1, 8], [5, 12], [3, 7]], weight=0.02)
    result = []
    for s in samples:
        rollout = s.scored.rollout
        off = tuple(float(x) - draw.uniform(-0.6, 1.2) for x in plain_logprobs(policy, s).detach())
        segments = (rollout.segments[0], replace(rollout.segments[1], logprobs=off))
        result.append(replace(s, scored=replace(s.scored, rollout=replace(rollout, segments=segments))))
    return tuple(result)


def step(
    policy: Policy,
    optimizer: MasterAdamW,
    batches: Sequence[MicroBatch],
    objective: ObjectiveConfig | None = None,
    max_grad_norm: float = 1e9,
) -> StepStats:
    return update(
        policy, optimizer, batches, objective or ObjectiveConfig(), learning_rate=LEARNING_RATE,
        max_grad_norm=max_grad_norm,
    )  # fmt: skip


def snapshot(policy: Policy, optimizer: MasterAdamW) -> dict[str, torch.Tensor]:
    parameters = {f"parameter.{name}": p.detach() for name, p in policy.trainable.items()}
    return {name: value.clone() for name, value in (parameters | optimizer.state_dict()).items()}


def assert_bit_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def change(policy: Policy, before: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([(p.detach() - before[name]).flatten() for name, p in policy.trainable.items()])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two changes, relative to the larger one."""
    return float((a - b).norm() / torch.maximum(a.norm(), b.norm()))


def written_out(
    samples: Sequence[Sample], objective: ObjectiveConfig, max_grad_norm: float, reference: Policy | None = None
) -> tuple[torch.Tensor, float, float]:
    """The change of the weights, the loss and the gradient's norm: one plain forward pass per completion, then torch's
    own clipping and AdamW."""
    policy = new_policy()
    before = {name: p.detach().clone() for name, p in policy.trainable.items()}
    loss = torch.zeros(())
    for sample in samples:
        rollout = sample.scored.rollout
        logp = plain_logprobs(policy, sample)
        delta = logp.detach() - torch.tensor(rollout.segments[1].logprobs)
        kind = objective.importance_sampling_mode
        ratio = torch.exp(delta.sum().expand_as(delta) if kind.startswith("sequence") else delta)
        cap = objective.importance_sampling_clip_max
        if kind == "none":
            correction = torch.ones_like(ratio)
        elif kind.endswith("truncate"):
            correction = ratio.clamp(max=cap)
        else:
            correction = ratio * (ratio <= cap)
        token_loss = -torch.exp(logp - logp.detach()) * sample.advantage * correction
        if reference is not None:
            gap = plain_logprobs(reference, sample).detach() - logp
            token_loss = token_loss + objective.beta * (torch.exp(gap) - gap - 1)
        loss = loss + (token_loss * sample.token_weight).sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(list(policy.trainable.values()), max_grad_norm)
    decayed = [p for p in policy.trainable.values() if p.ndim >= 2]
    others = [p for p in policy.trainable.values() if p.ndim < 2]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=LEARNING_RATE, **ADAM).step()
    return change(policy, before), float(loss.detach()), float(norm)


def plain_logprobs(policy: Policy, sample: Sample) -> torch.Tensor:
    rollout = sample.scored.rollout
    ids = torch.tensor([rollout.problem.prompt_token_ids + rollout.completion_token_ids])
    logits = policy.model(input_ids=ids).logits[0].float() / TEMPERATURE
    logp = torch.log_softmax(logits[:-1], -1).gather(1, ids[0, 1:, None]).squeeze(1)
    return logp[-rollout.num_completion_tokens :]


def moved_policy() -> Policy:
    policy = new_policy()
    torch.manual_seed(5)
    with torch.no_grad():
        for p in policy.trainable.values():
            p.add_(0.05 * torch.randn_like(p))
    return policy


CASES = {
    "defaults": (ObjectiveConfig(), 1e9),
    "no-correction": (ObjectiveConfig(importance_sampling_mode="none"), 1e9),
    "another-cap": (ObjectiveConfig(importance_sampling_clip_max=1.05), 1e9),
    "token-mask": (ObjectiveConfig(importance_sampling_mode="token_mask"), 1e9),
    "sequence-truncate": (ObjectiveConfig(importance_sampling_mode="sequence_truncate"), 1e9),
    "sequence-mask": (ObjectiveConfig(importance_sampling_mode="sequence_mask"), 1e9),
    "kl": (ObjectiveConfig(beta=0.5), 1e9),
    "clipped": (ObjectiveConfig(), 0.05),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("budget", [10_000, 30], ids=["one-batch", "several-batches"])
def test_a_step_equals_one_that_is_written_out(name: str, budget: int) -> None:
    objective, max_grad_norm = CASES[name]
    samples = new_samples()
    batches = pack(samples, budget)
    assert len(batches) == 1 if budget == 10_000 else len(batches) > 2
    policy = new_policy()
    before = {n: p.detach().clone() for n, p in policy.trainable.items()}
    reference = None
    if objective.beta > 0:
        reference = moved_policy()
        policy.reference = {n: p.detach().clone() for n, p in reference.trainable.items()}
    expected, loss, norm = written_out(samples, objective, max_grad_norm, reference)

    stats = step(policy, MasterAdamW(policy.trainable, **ADAM), batches, objective, max_grad_norm)

    assert stats.stepped
    assert distance(change(policy, before), expected) < 1e-3
    assert stats.metrics["loss"].value == pytest.approx(loss, rel=1e-4)
    assert stats.metrics["grad_norm"].value == pytest.approx(norm, rel=1e-4)
    if name != "defaults":  # else the comparison above would not see that the setting is ignored
        assert distance(expected, written_out(samples, *CASES["defaults"])[0]) > 0.02
    if name == "clipped":
        assert norm > 10 * max_grad_norm


@pytest.mark.parametrize(("name", "side"), [("upper", 1), ("lower", -1)])
def test_the_clip_bounds_reach_the_loss(name: str, side: int) -> None:
    """The ratio of an on-policy step is exactly 1, so a bound is only seen when it lies on the other side of 1.

    No config can hold such a bound: `model_copy` does not check. The gradient of every token with an advantage of that
    sign is then cut off.
    """
    samples = [replace(s, advantage=side * abs(s.advantage)) for s in new_samples()]
    policy = new_policy()
    bounds = {"upper": {"epsilon_high": -0.5}, "lower": {"epsilon": -0.5, "epsilon_high": 0.9}}
    objective = ObjectiveConfig().model_copy(update=bounds[name])
    stats = step(policy, MasterAdamW(policy.trainable, **ADAM), pack(samples, 10_000), objective)
    assert stats.metrics["grad_norm"].value == 0
    share = stats.metrics["clip_ratio/high_mean" if side > 0 else "clip_ratio/low_mean"].value
    assert share == 1


def damaged(batches: list[MicroBatch], how: str) -> list[MicroBatch]:
    """Spoil the last batch, so that good gradients are there when the bad ones come."""
    last = batches[-1]
    if how == "infinite weight":
        weights = last.weights_K.clone()
        weights[0] = float("inf")
        return [*batches[:-1], replace(last, weights_K=weights)]
    if how == "NaN from the sampler":
        sampler = last.sampler_logprobs_K.clone()
        sampler[-1] = float("nan")
        return [*batches[:-1], replace(last, sampler_logprobs_K=sampler)]
    return [*batches[:-1], replace(last, weights_K=last.weights_K * 1e32)]  # the loss is finite, the norm is not


@pytest.mark.parametrize("how", ["infinite weight", "NaN from the sampler", "gradient overflows"])
def test_a_step_that_is_not_finite_touches_nothing(how: str) -> None:
    policy, batches = new_policy(), pack(new_samples(), 30)
    optimizer = MasterAdamW(policy.trainable, **ADAM)
    assert step(policy, optimizer, batches).stepped  # so that there are moments to spoil
    before = snapshot(policy, optimizer)

    stats = step(policy, optimizer, damaged(batches, how))

    assert not stats.stepped
    assert "finite" in stats.skipped_reason
    assert not torch.isfinite(torch.tensor([stats.metrics["loss"].value, stats.metrics["grad_norm"].value])).all()
    if how == "gradient overflows":
        assert torch.isfinite(torch.tensor(stats.metrics["loss"].value))
    assert_bit_equal(before, snapshot(policy, optimizer))
    assert all(p.grad is None for p in policy.trainable.values())

    # The next step is the one of a run that never saw the bad batch.
    step(policy, optimizer, batches)
    undisturbed = new_policy()
    its_optimizer = MasterAdamW(undisturbed.trainable, **ADAM)
    for _ in range(2):
        step(undisturbed, its_optimizer, batches)
    assert_bit_equal(snapshot(undisturbed, its_optimizer), snapshot(policy, optimizer))


def test_nothing_to_train_on_is_no_step_and_decays_no_momentum() -> None:
    policy, batches = new_policy(), pack(new_samples(), 30)
    optimizer = MasterAdamW(policy.trainable, **ADAM)
    step(policy, optimizer, batches)
    before = snapshot(policy, optimizer)
    stats = step(policy, optimizer, [])
    assert not stats.stepped
    assert stats.skipped_reason
    assert_bit_equal(before, snapshot(policy, optimizer))


def test_a_step_is_reported_batch_by_batch_with_its_numbers() -> None:
    policy, batches = new_policy(), pack(new_samples(), 30)
    calls = []
    stats = update(
        policy, MasterAdamW(policy.trainable, **ADAM), batches, ObjectiveConfig(), learning_rate=0.25,
        max_grad_norm=1.0, on_batch=lambda: calls.append(1),
    )  # fmt: skip
    assert len(calls) == len(batches)
    assert stats.metrics["learning_rate"].value == 0.25
    assert stats.metrics["num_trained_tokens"].value == sum(b.num_tokens for b in batches)


class Shortage:
    """Raises what torch raises, in a layer's backward pass, whenever a batch has more than `tokens` tokens.

    By then later layers have added their share to the gradients.
    """

    def __init__(self, policy: Policy, tokens: int) -> None:
        self.tokens, self.raised = tokens, 0
        layer = policy.model.get_decoder().layers[0]
        layer.register_forward_hook(self._look)

    def _look(self, layer: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        if output.shape[1] > self.tokens:
            output.register_hook(self._fail)

    def _fail(self, gradient: torch.Tensor) -> None:
        self.raised += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")


def test_a_step_that_ran_out_of_memory_is_made_with_the_same_gradient() -> None:
    batches = sorted(pack(new_samples(), 30), key=lambda b: b.num_tokens)
    sizes = [b.num_tokens for b in batches]
    assert len(batches) > 2
    policy, undisturbed = new_policy(), new_policy()
    before = {n: p.detach().clone() for n, p in policy.trainable.items()}
    shortage = Shortage(policy, tokens=max(sizes) - 1)
    assert sizes.index(max(sizes)) > 0  # other batches have added their gradients by then
    notes: list[str] = []
    limit = MicroBatchLimit(note=notes.append)
    calls: list[int] = []
    stats = update(
        policy, MasterAdamW(policy.trainable, **ADAM), batches, ObjectiveConfig(), learning_rate=LEARNING_RATE,
        max_grad_norm=1e9, limit=limit, on_batch=lambda: calls.append(1),
    )  # fmt: skip
    assert shortage.raised == 1
    assert stats.stepped
    expected = step(undisturbed, MasterAdamW(undisturbed.trainable, **ADAM), batches)
    assert distance(change(policy, before), change(undisturbed, before)) < 1e-4
    for name in ("loss", "entropy", "grad_norm"):
        assert stats.metrics[name].value == pytest.approx(expected.metrics[name].value, rel=1e-4)
    assert limit.within(10_000) == max(sizes) // 2
    assert limit.within(3) == 3
    assert len(notes) == 1
    assert "optim.micro_batch_tokens" in notes[0]


def test_the_third_shortage_of_a_run_ends_it_and_leaves_the_weights_alone() -> None:
    policy = new_policy()
    optimizer = MasterAdamW(policy.trainable, **ADAM)
    batches = pack(new_samples(), 10_000)
    step(policy, optimizer, batches)
    before = snapshot(policy, optimizer)
    shortage = Shortage(policy, tokens=0)
    limit = MicroBatchLimit()
    told: list[bool] = []
    with pytest.raises(MemoryExhaustedError, match="at a time") as caught:
        update(
            policy, optimizer, batches, ObjectiveConfig(), learning_rate=0.1, max_grad_norm=1.0, limit=limit,
            on_step=lambda: told.append(True),
        )  # fmt: skip
    assert shortage.raised == 3
    assert told == []
    assert limit.tokens is not None
    assert limit.tokens <= batches[0].num_tokens // 8 + 1
    for setting in ("run.vram_gib", "rollout.max_completion_length", "optim.micro_batch_tokens"):
        assert setting in caught.value.hint
    assert_bit_equal(before, snapshot(policy, optimizer))
    assert all(p.grad is None for p in policy.trainable.values())


def test_shortages_that_lie_far_apart_do_not_add_up() -> None:
    (batch,) = pack(new_samples(), 10_000)
    limit = MicroBatchLimit()
    for shortage in range(MAX_HALVINGS + 2):
        limit.halve([batch], batch, "test")
        for _ in range(FORGIVEN_AFTER):
            limit.fitted()
        assert limit.halvings == 0, f"after shortage {shortage + 1}"
    assert limit.within(10_000) == batch.num_tokens // 2
    for _ in range(MAX_HALVINGS):
        limit.halve([batch], batch, "test")
        for _ in range(FORGIVEN_AFTER - 1):
            limit.fitted()
    with pytest.raises(MemoryExhaustedError):
        limit.halve([batch], batch, "test")


def test_an_optimizer_without_room_for_its_step_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = new_policy()
    optimizer = MasterAdamW(policy.trainable, **ADAM)

    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(optimizer, "_step_piece", fail)
    told: list[bool] = []
    with pytest.raises(MemoryExhaustedError, match="optimizer") as caught:
        update(
            policy, optimizer, pack(new_samples(), 10_000), ObjectiveConfig(), learning_rate=0.1, max_grad_norm=1.0,
            on_step=lambda: told.append(True),
        )  # fmt: skip
    assert "adamw_8bit" in caught.value.hint
    assert told == [True]


def test_a_single_completion_that_does_not_fit_ends_the_run_at_once() -> None:
    policy = new_policy()
    shortage = Shortage(policy, tokens=0)
    with pytest.raises(MemoryExhaustedError):
        step(policy, MasterAdamW(policy.trainable, **ADAM), pack(new_samples()[:1], 10_000))
    assert shortage.raised == 1


def test_fp16_keeps_gradients_that_would_vanish() -> None:
    """With a token's share of the loss at 2e-7, gradients of the hidden states lie below the smallest fp16 number."""
    samples = [replace(s, token_weight=2e-7) for s in new_samples()]
    exact, half = new_policy(), new_policy()
    half.model.half()
    adapted = []
    for policy in (exact, half):
        adapters = lora.inject(policy.model, r=4, alpha=8, target_modules=("q_proj", "up_proj"), seed=0)
        torch.manual_seed(3)
        for a in adapters.values():
            torch.nn.init.normal_(a.lora_B, std=0.1)
        adapted.append(Policy(policy.model, TEMPERATURE, adapters))
    norms = []
    for policy in adapted:
        stats = step(policy, MasterAdamW(policy.trainable, **ADAM), pack(samples, 10_000))
        assert stats.stepped
        norms.append(stats.metrics["grad_norm"].value)
    assert norms[1] == pytest.approx(norms[0], rel=0.02)
    # Without the scale of the loss it is far off.
    policy = adapted[1]
    (batch,) = pack(samples, 10_000)
    (policy.forward(batch)[0] * batch.advantages_K * batch.weights_K).sum().backward()
    lost = torch.cat([p.grad.flatten() for p in policy.trainable.values()]).norm()
    assert lost < 0.9 * norms[0]
