"""Decode steps with our kernels on a CUDA card: against plain torch, vLLM's modules and the trainer."""

from __future__ import annotations

import functools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import TARGETS, Rig, decode, tiny_model
from test_decode_kernels import KERNELS, check_kernel
from test_engines import generate, nudge, problems, sampler_logprobs, trainer_logprobs

from strop.engine import vllm_compat
from strop.engine.base import EngineSettings
from strop.policy import lora
from strop.policy.load import build_on_meta, open_model
from strop.policy.policy import Policy
from strop.seeding import rollout_requests
from strop.trainer.parts import move_buffers
from strop.weights import SharedWeights, alias_parameters

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@dataclass(frozen=True)
class Case:
    """A model's architecture and how it is held."""

    kind: str
    dtype: torch.dtype = torch.bfloat16
    quantization: str = "none"
    rank: int = 8
    targets: tuple[str, ...] = TARGETS

    @property
    def name(self) -> str:
        held = self.quantization if self.quantization != "none" else str(self.dtype).removeprefix("torch.")
        return f"{self.kind}-{held}-rank{self.rank}-{len(self.targets)}targets"


CASES = [
    Case("tiny"),
    Case("llama"),
    Case("llama", dtype=torch.float16),
    Case("llama", rank=128),
    Case("qwen2"),
    Case("qwen2-biased"),
    Case("qwen2", rank=0),
    Case("qwen2", targets=("q_proj", "v_proj", "down_proj")),
    Case("qwen3"),
    Case("qwen3", quantization="nf4"),
    Case("qwen2", quantization="nf4", rank=16),
]


@functools.cache
def model_folder(kind: str) -> Path:
    """Write a random model of four layers; Qwen2 has biases, Qwen3 head norms, Llama scaled positions."""
    if kind == "tiny":
        return tiny_model()
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, Qwen2Config, Qwen3Config

    from strop.demo.tokenizer import VOCAB_SIZE, build_tokenizer

    tokenizer = build_tokenizer()
    scaled = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 128, "rope_theta": 1e4}  # fmt: skip
    make, more = {
        "llama": (LlamaConfig, {"head_dim": 64, "rope_scaling": scaled}),
        "qwen2": (Qwen2Config, {}),
        "qwen2-biased": (Qwen2Config, {}),
        "qwen3": (Qwen3Config, {"head_dim": 128}),
    }[kind]
    config = make(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=640, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=kind != "llama",
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None, **more,
    )  # fmt: skip
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():  # distributions that are not flat, and biases that are not zero
            p.add_(0.05 * torch.randn_like(p))
        if kind == "qwen2-biased":  # as in Qwen2.5-0.5B, whose biases of k reach 200
            for name, p in model.named_parameters():
                if name.endswith("k_proj.bias"):
                    p[::3] = 100.0 * torch.randn_like(p[::3])
    folder = Path(tempfile.mkdtemp(prefix=f"strop-{kind}-"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    return folder


@functools.cache
def rig_of(case: Case) -> Rig:
    vllm_compat.prepare_environment("cuda", 4)
    from strop.engine.vllm_engine import VllmEngine

    source = open_model(str(model_folder(case.kind)), case.quantization)
    settings = EngineSettings(
        source.path, str(case.dtype).removeprefix("torch."), max_model_len=320, max_num_seqs=64,
        max_num_batched_tokens=2048, kv_cache_bytes=256 << 20, block_size=None, seed=0, lora_rank=case.rank,
        lora_target_modules=case.targets, runner="v2", quantization=case.quantization,  # type: ignore[arg-type]
        kept_modules=source.kept_modules,
    )  # fmt: skip
    engine = VllmEngine(settings, lambda ids: decode(source, ids), device="cuda")
    model = build_on_meta(source, case.dtype)
    alias_parameters(model, engine)
    move_buffers(model, torch.device("cuda"))
    adapters = {}
    if case.rank:
        adapters = lora.inject(model, r=case.rank, alpha=32, target_modules=case.targets, seed=0)
    policy = Policy(model, 1.0, adapters)
    return Rig(source, engine, policy, SharedWeights(policy, engine), {})


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_compute_what_torch_computes(name: str) -> None:
    check_kernel(name, "cuda")


def decoded(runner: Any, rows: int, *, plain: bool) -> torch.Tensor:
    """Return logits [steps, rows, V] in fp32 of tokens that depend on step and row, from position 0 on."""
    found = []
    runner._forget(rows)
    for step in range(6):
        runner.req_states.num_computed_tokens.gpu[:rows] = step
        numbers = torch.arange(rows, device="cuda") * 7919 + step * 104729
        runner.req_states.last_sampled_tokens[:rows, 0] = numbers % runner.vocab_size
        found.append(runner._logits(runner._size_of[rows], plain=plain)[:rows].float())
    return torch.stack(found)


def distances(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    return (ours - theirs).norm(dim=-1) / (theirs - theirs.mean(-1, keepdim=True)).norm(dim=-1)


def in_fp32(built: Rig, kind: str, rows: int) -> torch.Tensor:
    """Return the logits [steps, rows, V] of `decoded`'s tokens by transformers in fp32, adapters merged."""
    from transformers import AutoModelForCausalLM

    runner: Any = built.engine._runner
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder(kind), dtype=torch.float32)
    model = model.cuda()
    for name, module in built.policy.model.named_modules():
        if isinstance(module, lora.LoraLinear):
            weight = model.get_submodule(name).weight
            weight.data += module.scale * (module.lora_B.detach() @ module.lora_A.detach()).to(weight.dtype)
    steps = torch.arange(6, device="cuda") * 104729
    ids = (torch.arange(rows, device="cuda")[:, None] * 7919 + steps) % runner.vocab_size
    with torch.no_grad():
        return model(input_ids=ids).logits.transpose(0, 1)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_logits_are_those_of_vllms_modules_and_of_the_trainer(case: Case) -> None:
    built = rig_of(case)
    runner: Any = built.engine._runner
    assert runner.not_whole is None
    assert runner._layers is not None
    print(f"{case.name}: at the start {runner.apart}")
    if case.rank:
        nudge(built)
        built.weights.publish()
    with torch.inference_mode(), runner._pretended(50):
        ours, theirs = decoded(runner, 50, plain=False), decoded(runner, 50, plain=True)
    gaps = distances(ours, theirs)
    built.engine.reset_prefix_cache()
    print(f"{case.name}: trained adapter, mean {gaps.mean():.4f}, max {gaps.max():.4f}")
    if case.quantization == "none":
        exact = in_fp32(built, case.kind, 50)
        width = exact.shape[-1]
        off, modules_off = (distances(x[..., :width], exact).mean() for x in (ours, theirs))
        print(f"{case.name}: from fp32, ours {off:.4f}, vLLM's modules {modules_off:.4f}")
        assert off < 1.1 * modules_off
    # With keys of size 100 two ways to round to bf16 are far apart, both as near to fp32; so are engine and trainer.
    assert gaps.mean() < (0.12 if case.kind == "qwen2-biased" else 0.03)
    assert gaps.max() < (1.0 if case.kind == "qwen2-biased" else 0.15)
    rollouts = generate(built, rollout_requests(problems(8), 4, run_seed=0, step=0), max_tokens=48)
    apart = (trainer_logprobs(built, rollouts).cpu() - sampler_logprobs(rollouts)).abs()
    print(f"{case.name}: |logp difference| to the trainer over {apart.numel()}: {apart.mean():.2e}, {apart.max():.2e}")
    assert apart.numel() > 500
    assert apart.mean() < (0.3 if case.kind == "qwen2-biased" else 0.02)
    assert built.weights.unshared_bytes() == 0


@pytest.mark.parametrize("case", [Case("qwen2"), Case("llama", rank=128)], ids=lambda c: c.name)
def test_the_base_and_its_adapter_are_one_tensor(case: Case) -> None:
    built = rig_of(case)
    modules = built.engine._runner.lora_manager._adapter_manager.modules
    for module in modules.values():
        stacked = module.strop_factors.stacked
        assert stacked is not None
        assert module.base_layer.weight.data_ptr() == stacked.data_ptr()
        assert module.lora_a_stacked[0].untyped_storage().data_ptr() == stacked.untyped_storage().data_ptr()
    held = {m.strop_factors.stacked.untyped_storage().data_ptr() for m in modules.values()}
    assert len(held) == len(modules)


def step_ms(runner: Any, size: int, *, plain: bool) -> float:
    """Return the milliseconds of a graph of the model alone, `size` rows."""
    pool, graph = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
    runner._logits(size, plain=plain)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, pool):
        runner._logits(size, plain=plain)
    graph.replay()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(100):
        graph.replay()
    torch.cuda.synchronize()
    return 10 * (time.perf_counter() - begin)


@pytest.mark.parametrize("case", [Case("qwen2"), Case("qwen2", rank=0), Case("qwen3", quantization="nf4")],
                         ids=lambda c: c.name)  # fmt: skip
def test_a_step_takes_less_time_than_with_vllms_modules(case: Case) -> None:
    built = rig_of(case)
    runner: Any = built.engine._runner
    with torch.inference_mode(), runner._pretended(50):
        ours, theirs = step_ms(runner, 64, plain=False), step_ms(runner, 64, plain=True)
    built.engine.reset_prefix_cache()
    print(f"{case.name}: a step of 64 rows, four layers: {ours:.3f} ms, by vLLM's modules {theirs:.3f} ms")
    assert ours < theirs


def test_layers_that_compute_something_else_are_not_used_and_the_user_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that leaves the adapter out is found at the start; steps go by vLLM's modules then."""
    from strop.engine import vllm_decode

    built = rig_of(Case("qwen3"))
    runner: Any = built.engine._runner
    original = vllm_decode.add_silu_mul
    monkeypatch.setattr(vllm_decode, "add_silu_mul", lambda p, width: original(p._replace(low=None), width))
    try:
        runner._graphs.clear()
        runner.capture_model()
        assert runner._layers is None
        assert "our layers of a decode step failed" in runner.not_whole
        assert "random values" in runner.not_whole
        built.weights.publish()
        rollouts = generate(built, rollout_requests(problems(4), 4, run_seed=0, step=0))
        apart = (trainer_logprobs(built, rollouts).cpu() - sampler_logprobs(rollouts)).abs()
        assert apart.mean() < 0.02
    finally:
        monkeypatch.undo()
        runner._graphs.clear()
        runner.capture_model()
        built.weights.publish()
    assert runner._layers is not None
    assert runner.not_whole is None
