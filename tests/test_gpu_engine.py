"""The engine on a CUDA card: decode steps as graphs against the trainer, KV release, the dial, out of memory."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engines import TARGETS, Rig, tiny_model
from test_engines import (
    generate,
    nudge,
    ordered,
    out_of_memory_at,
    problems,
    sampler_logprobs,
    sampling,
    trainer_logprobs,
)

from strop.engine import vllm_compat
from strop.engine.base import EngineSettings
from strop.memory.dial import VramDial
from strop.memory.machine import detect_machine
from strop.memory.probe import look_at_card
from strop.policy import lora
from strop.policy.load import build_on_meta, open_model
from strop.policy.policy import Policy
from strop.seeding import rollout_requests
from strop.trainer.parts import move_buffers
from strop.weights import SharedWeights, alias_parameters

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def card() -> Iterator[Rig]:
    vllm_compat.prepare_environment("cuda", 4)
    from strop.engine.vllm_engine import VllmEngine

    source = open_model(str(tiny_model()))
    settings = EngineSettings(
        source.path, "bfloat16", max_model_len=320, max_num_seqs=64, max_num_batched_tokens=4096,
        kv_cache_bytes=1 << 30, block_size=None, seed=0, lora_rank=8, lora_target_modules=TARGETS,
        runner=vllm_compat.RUNNERS["cuda"], release_kv=True,
    )  # fmt: skip
    engine = VllmEngine(settings, lambda ids: source.tokenizer.decode(ids, skip_special_tokens=True), device="cuda")
    model = build_on_meta(source, torch.bfloat16)
    alias_parameters(model, engine)
    move_buffers(model, torch.device("cuda"))
    policy = Policy(model, 1.0, lora.inject(model, r=8, alpha=32, target_modules=TARGETS, seed=0))
    weights = SharedWeights(policy, engine)
    yield Rig(source, engine, policy, weights, {n: p.detach().clone() for n, p in policy.trainable.items()})
    engine.close()


@pytest.fixture
def rig_(card: Rig) -> Iterator[Rig]:
    yield card
    card.restore()


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_the_chosen_runner_runs_whole_decode_steps_as_graphs(rig_: Rig) -> None:
    runner = rig_.engine._runner
    assert type(runner).__module__ == "strop.engine.vllm_runner"
    assert sorted(runner._graphs)[-1] == 64
    replays = []
    graph = runner._graphs[16]
    runner._graphs[16] = type("Counted", (), {"replay": lambda self: (replays.append(1), graph.replay())})()
    try:
        rollouts = generate(rig_, rollout_requests(problems(4), 4, run_seed=0, step=0), max_tokens=24)
    finally:
        runner._graphs[16] = graph
    assert len(replays) >= 5
    gap = (trainer_logprobs(rig_, rollouts).cpu() - sampler_logprobs(rollouts)).abs()
    assert gap.mean() < 0.02


def test_graphs_and_vllms_own_way_draw_the_same_tokens(rig_: Rig) -> None:
    """The noise is the same function of seed and position; only rounding of batched products may differ."""
    nudge(rig_)
    rig_.weights.publish()
    requests = rollout_requests(problems(6), 4, run_seed=0, step=0)
    scheduler = rig_.engine._scheduler
    ours = generate(rig_, requests, max_tokens=40)
    scheduler._plain = False
    try:
        theirs = generate(rig_, requests, max_tokens=40)
    finally:
        scheduler._plain = True
    tokens = parted = 0
    for a, b in zip(ours, theirs, strict=True):
        pairs = list(zip(a.completion_token_ids, b.completion_token_ids, strict=False))
        common = next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
        tokens, parted = tokens + common, parted + (common < len(pairs))
    # Two draws that lie closer than bf16's rounding may change places; draws with other noise nearly always do.
    assert parted <= 0.05 * tokens, (parted, tokens)
    for a, b in zip(ours, theirs, strict=True):
        if a.completion_token_ids == b.completion_token_ids:
            assert a.segments[1].logprobs == pytest.approx(b.segments[1].logprobs, abs=0.05)


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_temperature_is_in_tokens_and_logprobs(rig_: Rig, temperature: float) -> None:
    nudge(rig_)
    rig_.weights.publish()
    rig_.policy.temperature = temperature or 1.0
    try:
        rollouts = generate(rig_, rollout_requests(problems(4), 4, run_seed=0, step=0), temperature=temperature)
        gap = (trainer_logprobs(rig_, rollouts).cpu() - sampler_logprobs(rollouts)).abs()
    finally:
        rig_.policy.temperature = 1.0
    assert gap.mean() < 0.03
    if temperature == 0.0:
        assert len({r.completion_token_ids for r in rollouts}) <= 6


def test_seeded_draws_have_the_distribution_of_the_model(rig_: Rig) -> None:
    """Two tokens each, the second of which comes from a graph.

    A draw's place in the model's cumulative distribution, spread evenly over the token's own share, is uniform
    whatever the distribution is, so that draws after different first tokens count together.
    """
    from strop.types import Request

    problem = problems(1)[0]
    requests = tuple(Request(problem, i, 7919 * i + 1) for i in range(2000))
    done = [r.completion_token_ids for r in rig_.engine.generate(requests, sampling(rig_, 2), policy_version=0)]
    pairs = torch.tensor([ids for ids in done if len(ids) == 2])
    assert len(pairs) > 1000
    prompt = torch.tensor(problem.prompt_token_ids)
    with torch.no_grad():
        ids = torch.cat([prompt.expand(len(pairs), -1), pairs[:, :1]], dim=1).cuda()
        probs = torch.softmax(rig_.policy.model(input_ids=ids).logits[:, -2:].double().cpu(), dim=-1)
    probs[:, 0, list(rig_.source.stop_token_ids)] = 0.0  # those who stopped at once are not counted
    probs[:, 0] /= probs[:, 0].sum(-1, keepdim=True)
    generator = torch.Generator().manual_seed(0)
    for column in (0, 1):
        p, token = probs[:, column], pairs[:, column : column + 1]
        below = p.cumsum(-1).gather(1, token) - p.gather(1, token)
        place = below + torch.rand(len(pairs), 1, generator=generator, dtype=torch.float64) * p.gather(1, token)
        counts = torch.histc(place, 10, 0, 1)
        expected = len(pairs) / 10
        assert ((counts - expected) ** 2 / expected).sum() < 30, (column, counts.tolist())  # 9 degrees of freedom


def test_the_kv_cache_is_given_back_and_nothing_drifts(rig_: Rig) -> None:
    requests = rollout_requests(problems(6), 4, run_seed=0, step=3)
    first = generate(rig_, requests)
    engine = rig_.engine
    size = engine.releasable_bytes
    assert size >= 1 << 30
    mapped = []
    for _ in range(10):
        before = used_bytes()
        engine.release_memory()
        assert before - used_bytes() >= size
        torch.full((1 << 28,), float("nan"), device="cuda").mul_(2)  # what the trainer leaves behind
        engine.restore_memory()
        mapped.append(used_bytes())
        again = generate(rig_, requests)
        assert [r.segments for r in again] == [r.segments for r in first]
    assert max(mapped[1:]) - min(mapped[1:]) < 32 << 20


def test_releasing_with_a_step_still_on_the_card_is_safe(rig_: Rig) -> None:
    requests = rollout_requests(problems(4), 4, run_seed=0, step=0)
    whole = generate(rig_, requests)
    stream = rig_.engine.generate(requests, sampling(rig_, 200), policy_version=0)
    next(stream)
    stream.close()
    rig_.engine.release_memory()
    rig_.engine.restore_memory()
    assert [r.segments for r in generate(rig_, requests)] == [r.segments for r in whole]


def test_out_of_memory_in_a_rollout_halves_what_runs(rig_: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = rollout_requests(problems(8), 4, run_seed=0, step=3)
    engine, said = rig_.engine, []
    monkeypatch.setattr(engine, "_note", said.append)
    batched = engine._scheduler.max_num_scheduled_tokens
    out_of_memory_at(rig_, {9}, monkeypatch)
    try:
        again = ordered(engine.generate(requests, sampling(rig_), policy_version=0))
    finally:
        engine.limit_concurrency(64)
        engine._scheduler.max_num_scheduled_tokens = batched
        engine._out_of_memory = 0
    assert len(again) == len(requests)
    assert "32 at a time instead of 64" in said[0]
    assert (trainer_logprobs(rig_, again).cpu() - sampler_logprobs(again)).abs().mean() < 0.02


def test_the_dial_stops_an_allocation_at_the_cap_and_moves_with_the_kv_cache(rig_: Rig) -> None:
    machine = detect_machine()
    free, total = torch.cuda.mem_get_info()
    cap = (total - free) + (1 << 30)
    engine = rig_.engine
    try:
        dial = VramDial(cap, free_bytes=total)  # as if this process had found the card empty
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(3 << 29, device="cuda", dtype=torch.int8)
        engine.release_memory()
        dial.training(engine.releasable_bytes)
        held = torch.empty(3 << 29, device="cuda", dtype=torch.int8)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(1 << 30, device="cuda", dtype=torch.int8)
        assert used_bytes() <= cap + (64 << 20)
        del held
        dial.rollouts()
        engine.restore_memory()
        assert used_bytes() <= cap
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        engine.restore_memory()
    assert machine.total_bytes >= total


def test_another_process_on_the_card_is_seen_and_its_memory_comes_back_after_kill_9() -> None:
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    uuid = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    before = look_at_card(uuid)
    assert before is not None
    code = "import torch, time; x = torch.zeros(1 << 30, device='cuda'); print('there', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "there"
        during = look_at_card(uuid)
        assert during is not None
        assert before.free_bytes - during.free_bytes > 4 << 30
    finally:
        other.kill()
        other.wait()
    assert_free_again(uuid, before.free_bytes)


def assert_free_again(uuid: str, free_bytes: int) -> None:
    """Wait until as much of the card is free as there was, or nearly."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        after = look_at_card(uuid)
        assert after is not None
        if free_bytes - after.free_bytes < 64 << 20:
            return
        time.sleep(0.2)
    raise AssertionError("the memory of a process that ended did not come back")


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_the_card_is_free_again_however_a_run_ends(sign: signal.Signals, tmp_path: Path) -> None:
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    uuid = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    before = look_at_card(uuid)
    assert before is not None
    run = demo_run(tmp_path / "run")
    deadline = time.monotonic() + 200
    while not (tmp_path / "run" / "checkpoint-2" / "manifest.json").is_file():
        assert run.poll() is None, run.stdout.read()[-3000:] if run.stdout else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)
    during = look_at_card(uuid)
    assert during is not None
    assert before.free_bytes - during.free_bytes > 1 << 30
    run.send_signal(sign)
    run.wait(timeout=60)
    assert_free_again(uuid, before.free_bytes)


@pytest.mark.parametrize("cap", [3.0, 5.0])
def test_a_run_stays_under_its_dial(cap: float, tmp_path: Path) -> None:
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    uuid = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    before = look_at_card(uuid)
    assert before is not None
    run = subprocess.Popen(
        [sys.executable, "-m", "strop", "demo", "--lora", "--out", str(tmp_path / "run"), "--set", "run.max_steps=3",
         "--set", "run.eval_num_problems=8", "--set", f"run.vram_gib={cap}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
    )  # fmt: skip
    peak = 0
    while run.poll() is None:
        use = look_at_card(uuid)
        assert use is not None
        peak = max(peak, before.free_bytes - use.free_bytes)
        time.sleep(0.02)
    assert run.returncode == 0, run.stdout.read()[-3000:] if run.stdout else ""
    print(f"cap {cap} GiB, peak {peak / 2**30:.2f} GiB")
    assert peak <= cap * 2**30


def demo_run(out: Path, *more: str) -> subprocess.Popen[str]:
    """Start a deterministic demo run of four steps that saves after two."""
    changes = ("run.max_steps=4", "run.save_steps=2", "run.eval_num_problems=0", "run.deterministic=true", *more)
    return subprocess.Popen(
        [sys.executable, "-m", "strop", "demo", "--lora", "--out", str(out),
         *(x for c in changes for x in ("--set", c))],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=out.parent,
    )  # fmt: skip


def finished(run: subprocess.Popen[str]) -> None:
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said[-3000:]


def test_a_deterministic_run_that_is_killed_and_resumed_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished(demo_run(whole))
    first = demo_run(killed)
    deadline = time.monotonic() + 200
    while not (killed / "checkpoint-2" / "manifest.json").is_file():
        assert first.poll() is None, first.stdout.read()[-3000:] if first.stdout else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.kill()
    first.wait()
    again = subprocess.Popen(
        [sys.executable, "-m", "strop", "train", str(killed / "config.resolved.yaml"), "--out", str(killed),
         "--resume"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
    )  # fmt: skip
    finished(again)
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (whole / "checkpoint-4" / name).read_bytes() == (killed / "checkpoint-4" / name).read_bytes(), name
