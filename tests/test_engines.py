"""Both engines against one contract, and vLLM on the trainer's own weights: zero copies, fresh, streamed, seeded."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch
from engines import Rig, rig
from records import sample, scored

from strop.engine.select import read_ahead
from strop.errors import EngineError, MemoryExhaustedError, ModelError
from strop.memory.shapes import ModelShape
from strop.objective.packing import pack
from strop.seeding import rollout_requests
from strop.types import Problem, Request, Rollout, Sample, Sampling
from strop.weights import alias_parameters

ENGINES = ["vllm", "transformers"]
RANKS = [0, 8]


def problems(count: int, *, tokens: int = 40, seed: int = 0) -> list[Problem]:
    draw = random.Random(seed)
    return [
        Problem(f"p{i}", "question", tuple(draw.randrange(32, 127) for _ in range(tokens + 3 * i)))
        for i in range(count)
    ]


def sampling(rig_: Rig, max_tokens: int = 24, temperature: float = 1.0) -> Sampling:
    return Sampling(max_tokens, rig_.source.stop_token_ids, temperature)


def ordered(rollouts: Iterator[Rollout]) -> list[Rollout]:
    return sorted(rollouts, key=lambda r: (r.problem.id, r.sample_index))


def generate(rig_: Rig, requests: tuple[Request, ...], **kwargs: float) -> list[Rollout]:
    return ordered(rig_.engine.generate(requests, sampling(rig_, **kwargs), policy_version=rig_.weights.version))


def trainer_logprobs(rig_: Rig, rollouts: list[Rollout], *, share: bool = True) -> torch.Tensor:
    samples = [Sample(scored(r, 1.0), 1.0, 1.0) for r in rollouts]
    with torch.no_grad():
        return torch.cat([rig_.policy.forward(b)[0] for b in pack(samples, 600, share_prompt=share)])


def sampler_logprobs(rollouts: list[Rollout]) -> torch.Tensor:
    return torch.tensor([x for r in rollouts for x in r.segments[1].logprobs or ()])


def nudge(rig_: Rig, scale: float = 0.05, seed: int = 0) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in rig_.policy.trainable.values():
            p.add_(scale * torch.randn_like(p))


@pytest.fixture(params=[(e, r) for e in ENGINES for r in RANKS], ids=lambda p: f"{p[0]}-rank{p[1]}")
def any_rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    name, rank = request.param
    built = rig(name, rank=rank)
    yield built
    built.restore()


@pytest.fixture(params=RANKS, ids=lambda r: f"rank{r}")
def vllm_rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    built = rig("vllm", rank=request.param)
    yield built
    built.restore()


def test_sampler_and_trainer_agree_on_every_token(any_rig: Rig) -> None:
    nudge(any_rig)
    any_rig.weights.publish()
    rollouts = generate(any_rig, rollout_requests(problems(4), 4, run_seed=0, step=0))
    ours, theirs = trainer_logprobs(any_rig, rollouts), sampler_logprobs(rollouts)
    assert len(theirs) > 150
    assert (ours - theirs).abs().max() < 2e-5
    assert (trainer_logprobs(any_rig, rollouts, share=False) - theirs).abs().max() < 2e-5


@pytest.mark.parametrize("rank", RANKS)
def test_both_engines_give_the_same_greedy_tokens_and_logprobs(rank: int) -> None:
    requests = rollout_requests(problems(6), 2, run_seed=0, step=0)
    results = []
    for name in ENGINES:
        built = rig(name, rank=rank)
        nudge(built)
        built.weights.publish()
        results.append(generate(built, requests, temperature=0.0))
        built.restore()
    for a, b in zip(*results, strict=True):
        assert a.completion_token_ids == b.completion_token_ids
        assert a.finish_reason == b.finish_reason
        assert a.text == b.text
    assert (sampler_logprobs(results[0]) - sampler_logprobs(results[1])).abs().max() < 1e-4


def test_a_temperature_is_in_the_logprobs_of_both_sides() -> None:
    for name in ENGINES:
        warm = rig(name, temperature=0.6)
        rollouts = generate(warm, rollout_requests(problems(3), 4, run_seed=0, step=0), temperature=0.6)
        gap = trainer_logprobs(warm, rollouts) - sampler_logprobs(rollouts)
        assert gap.abs().max() < 2e-5, name
        cold = rig(name)
        assert (trainer_logprobs(cold, rollouts) - sampler_logprobs(rollouts)).abs().max() > 0.1


def test_completions_follow_their_seed_and_nothing_else(any_rig: Rig) -> None:
    requests = rollout_requests(problems(6), 4, run_seed=0, step=3)
    whole = generate(any_rig, requests)
    again = generate(any_rig, requests)
    assert [r.segments for r in whole] == [r.segments for r in again]
    few = generate(any_rig, requests[4:8])
    assert [r.completion_token_ids for r in few] == [r.completion_token_ids for r in whole[4:8]]
    other = generate(any_rig, rollout_requests(problems(6), 4, run_seed=1, step=3))
    assert [r.completion_token_ids for r in other] != [r.completion_token_ids for r in whole]
    assert len({r.completion_token_ids for r in whole[:4]}) == 4


def test_seeded_draws_have_the_distribution_of_the_model(any_rig: Rig) -> None:
    problem = problems(1)[0]
    requests = tuple(Request(problem, i, 7919 * i + 1) for i in range(900))
    first = [
        r.completion_token_ids[0] for r in any_rig.engine.generate(requests, sampling(any_rig, 1), policy_version=0)
    ]
    with torch.no_grad():
        logits = any_rig.policy.model(input_ids=torch.tensor([problem.prompt_token_ids])).logits[0, -1]
    probs = torch.softmax(logits, -1)
    counts = torch.bincount(torch.tensor(first), minlength=len(probs)).float()
    top = probs.topk(8).indices
    rest_p, rest_n = 1 - probs[top].sum(), 900 - counts[top].sum()
    expected = torch.cat([probs[top], rest_p[None]]) * 900
    observed = torch.cat([counts[top], rest_n[None]])
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < 26.1  # 8 degrees of freedom, p = 0.001


def test_finished_completions_stream_out_while_others_decode(any_rig: Rig) -> None:
    short = Request(problems(1)[0], 0, 1)
    requests = rollout_requests(problems(4), 4, run_seed=0, step=0)
    running_when_first = []

    def progress(unfinished: int, running: int) -> None:
        running_when_first.append(unfinished)

    stops = sampling(any_rig, 60)
    likely = Sampling(60, (*stops.stop_token_ids, *range(32, 90)), 1.0)  # ends after a token or a few
    stream = any_rig.engine.generate((short, *requests), likely, policy_version=0, progress=progress)
    first = next(stream)
    steps_until_first = len(running_when_first)
    rest = list(stream)
    assert len(rest) == len(requests)
    assert len(running_when_first) > steps_until_first + 2
    assert first.num_completion_tokens <= min(r.num_completion_tokens for r in rest)
    stopped = [r for r in [first, *rest] if r.finish_reason == "stop"]
    assert len(stopped) > 8
    assert all(r.completion_token_ids[-1] in likely.stop_token_ids for r in stopped)


def test_the_token_limit_truncates(any_rig: Rig) -> None:
    rollouts = generate(any_rig, rollout_requests(problems(2), 2, run_seed=0, step=0), max_tokens=5)
    assert {r.num_completion_tokens for r in rollouts if r.is_truncated} == {5}
    assert any(r.is_truncated for r in rollouts)


def test_no_byte_of_the_base_lies_outside_vllms_storage(vllm_rig: Rig) -> None:
    assert vllm_rig.weights.unshared_bytes() == 0
    base = sum(v.numel() for v in vllm_rig.engine.base_views().values())
    assert base > 80_000
    name = next(n for n, _ in vllm_rig.policy.model.named_parameters() if n.endswith("input_layernorm.weight"))
    path, _, leaf = name.rpartition(".")
    module = vllm_rig.policy.model.get_submodule(path)
    shared = getattr(module, leaf)
    setattr(module, leaf, torch.nn.Parameter(shared.detach().clone(), requires_grad=False))
    assert vllm_rig.weights.unshared_bytes() == shared.numel() * 4
    setattr(module, leaf, shared)


def test_the_optimizers_writes_are_the_engines_weights() -> None:
    built = rig("vllm")
    inside = built.engine._runner.get_model().get_parameter("model.layers.1.mlp.gate_up_proj.weight")
    ours = built.policy.trainable["model.layers.1.mlp.up_proj.weight"]
    with torch.no_grad():
        ours[3, 5] = 42.0
    assert inside[ours.shape[0] + 3, 5] == 42.0
    built.restore()


def test_a_model_of_another_shape_is_refused() -> None:
    built = rig("vllm")
    from strop.policy.load import build_on_meta, open_model

    source = open_model(built.source.path)
    source.config.intermediate_size += 32
    with pytest.raises(ModelError, match="gate_proj"):
        alias_parameters(build_on_meta(source, torch.float32), built.engine)


def test_stale_keys_and_values_are_never_used(vllm_rig: Rig) -> None:
    """First the cache is seen to hit (prompts longer than a block), then an update is seen to empty it."""
    requests = rollout_requests(problems(4), 4, run_seed=0, step=0)
    cached = generate(vllm_rig, requests)
    assert sum(r.num_cached_tokens for r in cached) > 0
    nudge(vllm_rig, 0.1)
    vllm_rig.weights.publish()
    fresh = generate(vllm_rig, requests)
    firsts = {r.problem.id: r for r in fresh if r.sample_index == 0}
    assert all(r.num_cached_tokens == 0 for r in firsts.values())
    assert (trainer_logprobs(vllm_rig, fresh) - sampler_logprobs(fresh)).abs().max() < 2e-5
    assert [r.completion_token_ids for r in fresh] != [r.completion_token_ids for r in cached]


def test_publishing_while_requests_run_is_refused(vllm_rig: Rig) -> None:
    requests = rollout_requests(problems(2), 2, run_seed=0, step=0)
    likely = Sampling(40, (*vllm_rig.source.stop_token_ids, *range(32, 90)), 1.0)
    stream = vllm_rig.engine.generate(requests, likely, policy_version=0)
    next(stream)
    version = vllm_rig.weights.version
    with pytest.raises(EngineError, match="still running"):
        vllm_rig.weights.publish()
    assert vllm_rig.weights.version == version
    with pytest.raises(EngineError, match="still running"):
        next(vllm_rig.engine.generate(requests, likely, policy_version=0))
    stream.close()  # aborts the rest
    vllm_rig.weights.publish()
    assert len(generate(vllm_rig, requests)) == 4


def test_more_prompt_tokens_than_the_budget_of_one_step_work_seeded() -> None:
    built = rig("vllm")  # 4,096 tokens per engine step
    many = problems(60, tokens=100)
    requests = rollout_requests(many, 2, run_seed=0, step=0)
    assert sum(len(p.prompt_token_ids) for p in many) > 4096 * 2
    rollouts = generate(built, requests, max_tokens=6)
    assert len(rollouts) == 120
    assert (trainer_logprobs(built, rollouts) - sampler_logprobs(rollouts)).abs().max() < 2e-5


def test_an_adapter_of_zeros_changes_no_token() -> None:
    requests = rollout_requests(problems(3), 4, run_seed=0, step=0)
    plain, adapted = generate(rig("vllm"), requests), generate(rig("vllm", rank=8), requests)
    assert [r.completion_token_ids for r in plain] == [r.completion_token_ids for r in adapted]


def test_records_carry_version_seed_and_text(any_rig: Rig) -> None:
    requests = rollout_requests(problems(2), 2, run_seed=0, step=0)
    rollouts = ordered(any_rig.engine.generate(requests, sampling(any_rig), policy_version=17))
    assert [r.seed for r in rollouts] == [r.seed for r in requests]
    assert {r.policy_version for r in rollouts} == {17}
    one = sample(rollouts[0]).scored.rollout
    assert one.segments[0].token_ids == one.problem.prompt_token_ids
    assert one.text == any_rig.source.tokenizer.decode(one.completion_token_ids, skip_special_tokens=True)


def out_of_memory_at(rig_: Rig, calls: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model fail as torch does when the card is full, at these calls of it."""
    executor = rig_.engine._core.model_executor
    original, count = executor.execute_model, [0]

    def execute(*args: object, **kwargs: object) -> object:
        count[0] += 1
        if count[0] in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return original(*args, **kwargs)

    monkeypatch.setattr(executor, "execute_model", execute)


def test_out_of_memory_in_a_rollout_halves_what_runs_and_gives_the_same_completions(
    vllm_rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = rollout_requests(problems(6), 4, run_seed=0, step=3)
    whole = generate(vllm_rig, requests)
    engine, said = vllm_rig.engine, []
    monkeypatch.setattr(engine, "_note", said.append)
    out_of_memory_at(vllm_rig, {9}, monkeypatch)
    most: list[int] = []
    try:
        again = ordered(
            engine.generate(
                requests, sampling(vllm_rig), policy_version=0, progress=lambda left, running: most.append(running)
            )
        )
        assert [r.completion_token_ids for r in again] == [r.completion_token_ids for r in whole]
        assert max(most[:8]) == len(requests)
        assert engine._scheduler.max_num_running_reqs == 64
        assert "64 at a time instead of 128" in said[0]
        out_of_memory_at(vllm_rig, {1, 3}, monkeypatch)
        with pytest.raises(MemoryExhaustedError, match="3 times in this run") as error:
            generate(vllm_rig, requests)
        assert "run.vram_gib" in str(error.value.hint)
        assert not engine._scheduler.has_unfinished_requests()
    finally:
        engine.limit_concurrency(128)
        engine._out_of_memory = 0
    monkeypatch.undo()
    assert [r.segments for r in generate(vllm_rig, requests)] == [r.segments for r in whole]


def test_a_prefill_that_ran_out_of_memory_leaves_no_keys_and_values_behind(
    vllm_rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are in the prefix cache as soon as a step is planned, whether it was computed or not."""
    requests = rollout_requests(problems(3, tokens=70), 4, run_seed=0, step=3)
    whole = generate(vllm_rig, requests)
    engine = vllm_rig.engine
    out_of_memory_at(vllm_rig, {1}, monkeypatch)
    try:
        again = generate(vllm_rig, requests)
    finally:
        engine.limit_concurrency(128)
        engine._out_of_memory = 0
    assert [r.completion_token_ids for r in again] == [r.completion_token_ids for r in whole]
    assert [r.num_cached_tokens for r in again] == [r.num_cached_tokens for r in whole]


def test_fewer_places_than_requests_fill_up_in_batches(vllm_rig: Rig) -> None:
    """All completions are the same, and steps with a prompt in them are few."""
    requests = rollout_requests(problems(12), 4, run_seed=0, step=0)
    whole = generate(vllm_rig, requests)
    engine = vllm_rig.engine
    steps: list[tuple[int, bool]] = []
    original = engine._scheduler.schedule

    def schedule(*args: object) -> object:
        step = original(*args)
        steps.append((len(step.num_scheduled_tokens), bool(step.scheduled_new_reqs)))
        return step

    engine._scheduler.schedule = schedule
    engine.limit_concurrency(16)
    try:
        waved = generate(vllm_rig, requests)
    finally:
        engine.limit_concurrency(128)
        del engine._scheduler.schedule
    assert [r.completion_token_ids for r in waved] == [r.completion_token_ids for r in whole]
    assert max(count for count, _ in steps) == 16
    with_prompts = sum(new for _, new in steps)
    assert 3 <= with_prompts <= 1 + (len(requests) - 16) // 2
    assert len(steps) > 4 * with_prompts


def test_plain_steps_give_what_vllms_own_scheduler_gives(vllm_rig: Rig) -> None:
    requests = rollout_requests(problems(6), 4, run_seed=0, step=0)
    scheduler = vllm_rig.engine._scheduler
    assert scheduler._plain
    ours = generate(vllm_rig, requests, max_tokens=40)
    scheduler._plain = False
    try:
        theirs = generate(vllm_rig, requests, max_tokens=40)
    finally:
        scheduler._plain = True
    assert [(r.segments, r.finish_reason, r.num_cached_tokens) for r in ours] == [
        (r.segments, r.finish_reason, r.num_cached_tokens) for r in theirs
    ]


@pytest.mark.parametrize("rank", [4, 8])
def test_the_plan_counts_the_engines_adapter(rank: int) -> None:
    built = rig("vllm", rank=rank)
    modules = built.engine._runner.lora_manager._adapter_manager.modules.values()  # type: ignore[attr-defined]
    held = sum(m.strop_factors.a.numel() + m.strop_factors.b_t.numel() for m in modules)
    assert held == ModelShape.from_config(built.source.config).engine_lora_values(rank)


def test_vllm_looks_at_a_models_class_without_starting_a_process(vllm_rig: Rig) -> None:
    import vllm.model_executor.models.registry as registry

    assert vllm_rig.engine is not None
    # What vLLM runs in another process, which imports all of vLLM, when it first meets an architecture.
    assert registry._run_in_subprocess(os.getpid) == os.getpid()


def test_libraries_are_read_ahead_where_the_system_can(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *_: asked.append(os.readlink(f"/proc/self/fd/{fd}")))
    assert read_ahead() == len(asked) > 3
    assert any("/torch/lib/libtorch_cpu" in path for path in asked)
    assert any("/vllm/" in path for path in asked)
    monkeypatch.delattr(os, "posix_fadvise")
    assert read_ahead() == 0
