"""The plan's model of training time: what it says of cards and models, and what the plan does with it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from records import random_samples
from test_plan import NF4, QWEN_0_5B, QWEN_1_5B, QWEN_7B, plan, workload

from strop.errors import PlanError
from strop.memory.machine import Machine
from strop.memory.pace import LAUNCH_S, Work, card_flops, training_seconds
from strop.memory.shapes import GIB, ModelShape
from strop.objective.packing import pack

GSM8K = workload(16, 8, 400, 400, run__vram_gib=7)


def card(flops: float) -> Machine:
    return Machine("cuda", "card", 16, 79 * GIB, True, 80 * GIB, (), flops)


@pytest.mark.parametrize(
    ("capability", "processors", "khz", "teraflops"),
    [((9, 0), 132, 1_830_000, 989), ((8, 9), 128, 2_520_000, 165), ((8, 6), 82, 1_695_000, 71),
     ((8, 0), 108, 1_410_000, 312), ((12, 0), 170, 2_407_000, 209)],
)  # fmt: skip
def test_a_cards_peak_is_its_data_sheets(
    capability: tuple[int, int], processors: int, khz: int, teraflops: float
) -> None:
    major, minor = capability
    seen = SimpleNamespace(major=major, minor=minor, multi_processor_count=processors, clock_rate=khz)
    assert card_flops(seen) / 1e12 == pytest.approx(teraflops, rel=0.02)


def test_work_is_cut_about_as_the_packing_cuts_it() -> None:
    """Long prompts, groups that fit together or are cut in two, single completions; a larger budget is no worse."""
    work = Work(groups=3, generations=4, prompt=10, completion=100, share_prompt=True)
    assert work.cut(5_000) == (1, 3 * (10 + 400))
    assert work.cut(411) == (3, 3 * (10 + 400))
    assert work.cut(211) == (6, 12 * 100 + 6 * 10)
    assert work.cut(110) == (12, 12 * 110)
    for groups, each, prompt, completion in ((3, 4, 10, 20), (8, 2, 90, 6), (6, 7, 3, 5), (4, 3, 30, 1)):
        # A completion's last token passes no layer.
        samples = random_samples(0, vocab=99, prompts=[prompt] * groups, lengths=[[completion + 1] * each] * groups)
        whole = groups * (prompt + each * completion)
        for share in (True, False):
            work, before = Work(groups, each, prompt, completion, share), (10**6, 10**6)
            for budget in range(prompt + completion, whole + 9, 3):
                batches, found = pack(samples, budget, share_prompt=share), work.cut(budget)
                assert found[0] <= len(batches) <= 2 * found[0], (work, budget)
                assert found[1] <= sum(b.num_tokens for b in batches) <= 1.5 * found[1], (work, budget)
                assert found[0] <= before[0], (work, budget)
                assert found[1] <= before[1], (work, budget)
                before = found


def test_a_layer_takes_the_longer_of_launching_and_computing() -> None:
    shape = ModelShape.from_config(QWEN_0_5B)
    work = Work(1, 8, 100, 300, share_prompt=True)
    slow = training_seconds(shape, 1e12, work, 10_000, 0, packed=False)
    assert slow == pytest.approx(4 * shape.linear_parameters * 2_500 / 0.35e12)
    assert training_seconds(shape, 1e12, work, 400, 0, packed=False) > slow  # each completion with its prompt
    fast = training_seconds(shape, 1e15, work, 10_000, 0, packed=False)
    assert fast == pytest.approx(24 * LAUNCH_S)
    assert training_seconds(shape, 1e15, work, 400, 0, packed=False) == pytest.approx(8 * fast)
    assert training_seconds(shape, 1e15, work, 10_000, 24, packed=False) == pytest.approx(fast * 4 / 3)
    assert training_seconds(shape, 1e12, work, 10_000, 0, packed=True) > slow


def test_a_fast_card_gets_large_micro_batches_of_a_small_model_and_a_slow_one_runs_no_layer_twice() -> None:
    fast = plan(card(989e12), model=QWEN_0_5B, **GSM8K)
    slow = plan(card(30e12), model=QWEN_0_5B, **GSM8K)
    assert fast.checkpoint_layers >= 20
    assert fast.micro_batch_tokens > 4 * slow.micro_batch_tokens
    assert slow.checkpoint_layers == 0


def test_a_large_model_with_room_runs_no_layer_twice() -> None:
    assert plan(card(989e12), model=QWEN_1_5B, **workload(8, 8, 256, 1024, run__vram_gib=24)).checkpoint_layers == 0
    big = workload(4, 8, 256, 1024, run__vram_gib=24, **NF4)
    assert plan(card(989e12), model=QWEN_7B, **big).checkpoint_layers == 0


def test_what_is_pinned_stays() -> None:
    pinned = plan(card(989e12), model=QWEN_0_5B, **GSM8K, optim__checkpoint_layers=0)
    assert pinned.checkpoint_layers == 0
    pinned = plan(card(989e12), model=QWEN_0_5B, **GSM8K, optim__micro_batch_tokens=4000)
    assert (pinned.micro_batch_tokens, pinned.checkpoint_layers) == (4000, 0)


def test_logits_give_way_where_one_sequence_would_not_fit() -> None:
    """The largest length that fits leaves no room for a large chunk of logits."""

    def rows(length: int) -> int:
        return plan(card(989e12), **workload(1, 8, 256, length, run__vram_gib=8)).logit_rows or 0

    with pytest.raises(PlanError) as refused:
        rows(18_328)
    assert "0.0 GiB more" not in str(refused.value)
    assert 0 < rows(18_072) < rows(15_000)
