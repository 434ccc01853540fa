"""Advantages, losses, sampler correction, samples and schedule against slow, independent references."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from records import rollout, scored

from strop.objective.advantages import group_advantages
from strop.objective.correction import sampler_correction
from strop.objective.losses import policy_loss
from strop.objective.samples import make_samples
from strop.objective.schedule import learning_rate

REWARDS = [1.0, 0.0, 0.0, 1.0, 0.3, 0.9, 0.3, -1.0]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_the_textbook_formula(scale: str) -> None:
    result = group_advantages(REWARDS, 4, scale=scale)
    for p in range(2):
        group = REWARDS[4 * p : 4 * p + 4]
        std = {"group": statistics.stdev(group), "batch": statistics.stdev(REWARDS), "none": None}[scale]
        for g, reward in enumerate(group):
            expected = reward - statistics.fmean(group)
            expected = expected if std is None else expected / (std + 1e-4)
            assert result.advantages_N[4 * p + g] == pytest.approx(expected, rel=1e-12)


def test_advantages_equal_a_torch_computation_in_the_layout_trl_uses() -> None:
    grouped = torch.tensor(REWARDS, dtype=torch.float64).view(-1, 4)
    expected = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    ours = torch.tensor(group_advantages(REWARDS, 4, scale="group").advantages_N, dtype=torch.float64)
    torch.testing.assert_close(ours.view(-1, 4), expected, rtol=1e-12, atol=0)


def test_a_tied_group_has_exactly_zero_advantage_although_its_mean_is_rounded() -> None:
    result = group_advantages([0.1, 0.1, 0.1, 0.0, 1.0, 0.0], 3, scale="group")
    assert (0.1 + 0.1 + 0.1) / 3 != 0.1  # why a comparison with the mean would not do
    assert result.advantages_N[:3] == (0.0, 0.0, 0.0)
    assert result.has_signal_P == (False, True)


def test_unscored_members_leave_the_group_and_a_lone_member_has_no_advantage() -> None:
    result = group_advantages([1.0, None, 0.0, None, None, 1.0], 3, scale="none")
    assert result.advantages_N == (0.5, None, -0.5, None, None, None)
    assert result.has_signal_P == (True, False)


def test_means_and_deviations_are_taken_over_the_same_rewards() -> None:
    """Otherwise a deviation of 0 over part of the batch would divide differences that are not in it."""
    rewards = [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    result = group_advantages(rewards, 4, scale="batch")
    assert result.advantages_N[0] == pytest.approx(0.25 / (statistics.stdev(rewards) + 1e-4))
    assert make(rewards, [3] * 8, truncated={3}, mask=True, groups=4, scale="batch").advantages_N == result.advantages_N


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="groups of 4"):
        group_advantages([1.0, 2.0, 3.0], 4, scale="group")


def slow_loss(lengths, logp, old, sampler, adv, ref, *, loss_type, eps, high, beta, cap, l_max):
    """The losses as nested Python sums over completions and tokens, straight from the papers, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    k = 0
    n_tokens = sum(lengths)
    for i, length in enumerate(lengths):
        inner = torch.zeros((), dtype=torch.float64)
        for _ in range(length):
            ratio = torch.exp(logp[k] - old[k])
            clipped = (
                ratio if 1 - eps <= ratio <= 1 + high else ratio.new_tensor(1 - eps if ratio < 1 - eps else 1 + high)
            )
            objective = min(ratio * adv[i], clipped * adv[i])
            weight = min(math.exp(float(logp[k].detach()) - float(sampler[k])), cap)
            term = -objective * weight
            if beta:
                d = ref[k] - logp[k]
                term = term + beta * (torch.exp(d) - d - 1)
            inner = inner + term
            k += 1
        if loss_type == "grpo":
            total = total + inner / length / len(lengths)
        elif loss_type == "dapo":
            total = total + inner / n_tokens
        else:
            total = total + inner / (len(lengths) * l_max)
    return total


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_losses_and_gradients_equal_the_slow_reference(loss_type: str, beta: float) -> None:
    torch.manual_seed(0)
    lengths, l_max = [6, 9, 2, 8], 12
    count = sum(lengths)
    rollouts = [rollout([1], range(2, 2 + n), sample_index=g % 2) for g, n in enumerate(lengths)]
    batch = make_samples(
        [scored(r, reward) for r, reward in zip(rollouts, [1.0, 0.0, 0.5, -0.25], strict=True)], 2,
        loss_type=loss_type, scale_rewards="none", max_completion_length=l_max, mask_truncated_completions=False,
        keep_groups_without_signal=False,
    )  # fmt: skip
    adv_i = [s.advantage for s in batch.samples]
    old = -2 * torch.rand(count, dtype=torch.float64)
    logp = (old + 0.4 * torch.randn(count, dtype=torch.float64)).requires_grad_()
    sampler = old + 0.5 * torch.randn(count, dtype=torch.float64)
    ref = old + 0.3 * torch.randn(count, dtype=torch.float64)
    expected = slow_loss(
        lengths,
        logp,
        old,
        sampler,
        adv_i,
        ref,
        loss_type=loss_type,
        eps=0.2,
        high=0.28,
        beta=beta,
        cap=1.5,
        l_max=l_max,
    )
    (expected_grad,) = torch.autograd.grad(expected, logp)

    spread = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    ours_logp = logp.detach().clone().requires_grad_()
    correction = sampler_correction(ours_logp, sampler, spread, mode="token_truncate", clip_max=1.5)
    output = policy_loss(
        ours_logp, old_logprobs_K=old, advantages_K=torch.tensor(adv_i, dtype=torch.float64)[spread],
        weights_K=torch.tensor([s.token_weight for s in batch.samples], dtype=torch.float64)[spread],
        correction_K=correction.weights_K.double(), loss_type=loss_type, epsilon=0.2, epsilon_high=0.28,
        reference_logprobs_K=ref, beta=beta,
    )  # fmt: skip
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ours_logp.grad, expected_grad, rtol=1e-6, atol=1e-9)
    assert (expected_grad == 0).any() or beta, "the case has to contain clipped tokens"
    low = output.metrics["clip_ratio/low_mean"].value
    high = output.metrics["clip_ratio/high_mean"].value
    assert low > 0, "the case has to clip below"
    assert high > 0, "the case has to clip above"


def test_on_policy_gradient_is_the_plain_policy_gradient() -> None:
    logp = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    weights, adv = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([1.0, -2.0, 0.5])
    output = policy_loss(
        logp, old_logprobs_K=logp.detach(), advantages_K=adv, weights_K=weights, correction_K=torch.ones(3),
        loss_type="dapo", epsilon=0.2,
    )  # fmt: skip
    output.loss.backward()
    torch.testing.assert_close(logp.grad, -weights * adv)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "none"])
def test_corrections_equal_a_loop(mode: str) -> None:
    trainer = torch.tensor([-1.0, -2.0, -0.1, -3.0, -1.0])
    sampler = torch.tensor([-1.5, -1.0, -1.2, -3.1, -0.2])
    sequence = torch.tensor([0, 0, 0, 1, 1])
    cap = 1.4
    result = sampler_correction(trainer, sampler, sequence, mode=mode, clip_max=cap)
    expected = []
    for k in range(5):
        same = [j for j in range(5) if sequence[j] == sequence[k]]
        d = sum(float(trainer[j] - sampler[j]) for j in same) if "sequence" in mode else float(trainer[k] - sampler[k])
        ratio = math.exp(d)
        expected.append(1.0 if mode == "none" else min(ratio, cap) if "truncate" in mode else ratio * (ratio <= cap))
    torch.testing.assert_close(result.weights_K, torch.tensor(expected))
    if mode.startswith("token"):
        clipped = sum(math.exp(float(a - b)) > cap for a, b in zip(trainer, sampler, strict=True))
        assert clipped > 0
        assert result.metrics["sampling/importance_sampling_clipped_share"].value == pytest.approx(clipped / 5)
    assert result.metrics["sampling/sampling_logp_difference/max"].value == pytest.approx(1.1)


def make(rewards, lengths, *, truncated=(), mask=False, loss_type="dapo", keep=False, groups=2, scale="none"):
    items = [
        rollout([1], range(2, 2 + n), sample_index=i % groups, truncated=i in truncated) for i, n in enumerate(lengths)
    ]
    return make_samples(
        [scored(r, reward) for r, reward in zip(items, rewards, strict=True)], groups, loss_type=loss_type,
        scale_rewards=scale, max_completion_length=50, mask_truncated_completions=mask,
        keep_groups_without_signal=keep,
    )  # fmt: skip


def test_denominators_are_counted_before_groups_without_signal_are_dropped() -> None:
    batch = make([1.0, 0.0, 1.0, 1.0], [4, 6, 10, 20])
    assert len(batch.samples) == 2
    assert batch.samples[0].token_weight == pytest.approx(1 / 40)
    assert batch.metrics["frac_reward_zero_std"].value == 0.5
    assert len(make([1.0, 0.0, 1.0, 1.0], [4, 6, 10, 20], keep=True).samples) == 4


def test_unscored_completions_count_nowhere() -> None:
    batch = make([1.0, 0.0, None, 1.0], [4, 6, 10, 20], loss_type="grpo")
    assert batch.counts.num_completions == 3
    assert batch.counts.num_tokens == 30
    assert batch.samples[0].token_weight == pytest.approx(1 / (3 * 4))
    assert batch.metrics["frac_unscored"].value == 0.25
    assert batch.metrics["reward"].value == pytest.approx(2 / 3)


def test_masked_truncated_completions_leave_loss_and_denominators_but_not_the_baseline() -> None:
    batch = make([1.0, 0.0, 1.0, 0.0], [4, 6, 10, 20], truncated={1}, mask=True)
    assert [s.scored.rollout.num_completion_tokens for s in batch.samples] == [4, 10, 20]
    assert batch.samples[0].advantage == 0.5
    assert batch.samples[0].token_weight == pytest.approx(1 / 34)
    assert batch.metrics["completions/clipped_ratio"].value == 0.25


def test_schedule_warms_up_and_decays() -> None:
    rates = [learning_rate(s, peak=1.0, warmup_steps=4, max_steps=14, kind="linear") for s in range(15)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[13] == pytest.approx(0.1)
    assert rates[14] == 0.0
    assert learning_rate(9, peak=1.0, warmup_steps=4, max_steps=14, kind="cosine") == pytest.approx(0.5)
    assert learning_rate(13, peak=1.0, warmup_steps=4, max_steps=14, kind="constant") == 1.0
