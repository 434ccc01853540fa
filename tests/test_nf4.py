"""NF4 and 8-bit weights: the formats against bitsandbytes, one copy for engine and trainer, and learning on them."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import TARGETS, Rig, decode, tiny_model
from records import scored
from test_engines import generate, nudge, problems, sampler_logprobs, trainer_logprobs
from transformers import Qwen2Config

from strop.config import ModelConfig
from strop.config_load import load_config
from strop.engine import vllm_compat
from strop.engine.base import EngineSettings
from strop.engine.transformers_engine import TransformersEngine
from strop.errors import EngineError, ModelError
from strop.memory.machine import Machine
from strop.memory.plan import make_plan
from strop.memory.shapes import ModelShape
from strop.objective.packing import pack
from strop.policy import lora
from strop.policy.load import build_on_meta, open_model, torch_dtype
from strop.policy.nf4 import Int8Embedding, Int8Head, Nf4Linear, held_as, load_model
from strop.policy.policy import Policy, check_packed_forward
from strop.quant import int8
from strop.seeding import rollout_requests
from strop.trainer.parts import _model_and_engine, move_buffers, prepare
from strop.types import MicroBatch, Rollout, Sample
from strop.weights import SharedWeights, alias_parameters


@pytest.fixture(scope="session")
def bnb() -> Any:
    """bitsandbytes' own functions, which ours are compared with; it runs on a CPU too."""
    return pytest.importorskip("bitsandbytes.functional")


def weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02


# ---------------------------------------------------------------- engine and trainer


def quantised_rig(
    path: Path, *, head: str = "16bit", embedding: str = "card", device: str = "cpu", targets: tuple[str, ...] = TARGETS
) -> Rig:
    """An NF4 engine on a model folder, and a policy on its tensors."""
    torch.set_num_threads(1)
    vllm_compat.prepare_environment(device, 1)
    from strop.engine.vllm_engine import VllmEngine

    source = open_model(str(path), "nf4")
    held = held_as(source, ModelConfig.model_validate({"quantization": "nf4", "head": head, "embedding": embedding}))
    dtype = "float32" if device == "cpu" else "bfloat16"
    settings = EngineSettings(
        source.path, dtype, max_model_len=320, max_num_seqs=64, max_num_batched_tokens=2048,
        kv_cache_bytes=(32 if device == "cpu" else 256) << 20, block_size=32 if device == "cpu" else None, seed=0,
        lora_rank=8, lora_target_modules=targets, runner=vllm_compat.RUNNERS[device],  # type: ignore[arg-type]
        quantization="nf4", kept_modules=source.kept_modules, head=held[0], embedding=held[1],
    )  # fmt: skip
    engine = VllmEngine(settings, lambda ids: decode(source, ids), device=device)
    model = build_on_meta(source, torch_dtype(dtype))
    alias_parameters(model, engine)
    move_buffers(model, torch.device(device))
    adapters = lora.inject(model, r=8, alpha=32, target_modules=targets, seed=0)
    policy = Policy(model, 1.0, adapters)
    return Rig(source, engine, policy, SharedWeights(policy, engine), {})


RIGS: dict[str, Callable[[], Rig]] = {
    "qwen3": functools.cache(lambda: quantised_rig(tiny_model("qwen3"))),
    "llama": functools.cache(lambda: quantised_rig(tiny_model("llama"))),
    "qwen3-int8": functools.cache(lambda: quantised_rig(tiny_model("qwen3"), head="int8")),
    "llama-int8": functools.cache(lambda: quantised_rig(tiny_model("llama"), head="int8", embedding="int8")),
    "llama-nf4": functools.cache(lambda: quantised_rig(tiny_model("llama"), head="int8", embedding="nf4")),
    "llama-host": functools.cache(lambda: quantised_rig(tiny_model("llama"), embedding="host")),
}


@pytest.mark.parametrize("kind", RIGS)
def test_engine_and_trainer_compute_on_one_packed_copy(kind: str) -> None:
    built = RIGS[kind]()
    check_packed_forward(built.policy)
    rollouts = generate(built, rollout_requests(problems(4), 2, run_seed=0, step=0))
    gap = (trainer_logprobs(built, rollouts) - sampler_logprobs(rollouts)).abs()
    assert gap.numel() > 50
    assert gap.max() < 5e-5
    assert built.weights.unshared_bytes() == 0
    layers = [m for m in built.policy.model.modules() if isinstance(m, Nf4Linear)]
    assert len(layers) == 14
    down = next(m for m in layers if m.in_features == 128)
    assert 8 * sum(t.nbytes for t in down.buffers()) == 4.25 * down.in_features * down.out_features


@functools.cache
def family(kind: str) -> Path:
    """Write a tiny model of another architecture."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, GemmaConfig, MistralConfig, Phi3Config

    make = {
        "qwen2": Qwen2Config, "mistral": MistralConfig, "gemma": GemmaConfig, "gemma3": Gemma3TextConfig,
        "phi3": Phi3Config,
    }[kind]  # fmt: skip
    extra = {"gemma": {"head_dim": 32}, "gemma3": {"head_dim": 32, "sliding_window": 24},
             "phi3": {"original_max_position_embeddings": 512}}  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix=f"strop-{kind}-"))
    shutil.copytree(tiny_model("llama"), folder, dirs_exist_ok=True)
    tokens = open_model(str(folder)).config
    config = make(
        vocab_size=tokens.vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, eos_token_id=tokens.eos_token_id, bos_token_id=None,
        pad_token_id=tokens.pad_token_id, **extra.get(kind, {}),
    )  # fmt: skip
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["qwen2", "mistral", "gemma", "gemma3", "phi3"])
def test_other_families_share_by_vllms_own_packing_map(kind: str) -> None:
    targets = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj") if kind == "phi3" else TARGETS
    built = quantised_rig(family(kind), targets=targets)
    nudge(built)
    built.weights.publish()
    rollouts = generate(built, rollout_requests(problems(2), 2, run_seed=0, step=0))
    assert (trainer_logprobs(built, rollouts) - sampler_logprobs(rollouts)).abs().max() < 5e-5
    assert built.weights.unshared_bytes() == 0
    assert sum(isinstance(m, Nf4Linear) for m in built.policy.model.modules()) == 2 * len(targets)
    built.engine.close()


def test_a_copy_of_a_packed_weight_would_be_counted() -> None:
    built = RIGS["llama"]()
    layer = next(m for m in built.policy.model.modules() if isinstance(m, Nf4Linear))
    shared = layer.packed
    layer.packed = shared.clone()
    try:
        assert built.weights.unshared_bytes() == shared.numel()
    finally:
        layer.packed = shared


def test_a_learning_step_reaches_the_engine() -> None:
    built = RIGS["llama-int8"]()
    before = generate(built, rollout_requests(problems(2), 2, run_seed=0, step=0))
    nudge(built)
    built.weights.publish()
    after = generate(built, rollout_requests(problems(2), 2, run_seed=0, step=0))
    assert (trainer_logprobs(built, before) - sampler_logprobs(before)).abs().mean() > 1e-2
    assert (trainer_logprobs(built, after) - sampler_logprobs(after)).abs().max() < 5e-5


def batch_of(rollouts: list[Rollout]) -> MicroBatch:
    """Pack rollouts for a training pass."""
    return pack([Sample(scored(r, 1.0), 1.0, 1.0) for r in rollouts], 10**4)[0]


def test_gradients_are_those_of_the_unpacked_model() -> None:
    """The packed base and its dequantised twin, an ordinary model, give an adapter the same gradient."""
    built = RIGS["llama-int8"]()
    model = copy.deepcopy(built.policy.model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Nf4Linear):
            unpacked: torch.nn.Module = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            unpacked.weight.data = module.dequantized()
        elif isinstance(module, Int8Embedding | Int8Head):
            unpacked = (
                torch.nn.Embedding(1, 1) if isinstance(module, Int8Embedding) else torch.nn.Linear(1, 1, bias=False)
            )
            unpacked.weight.data = int8.dequantize(int8.Int8(module.values, module.scale), torch.float32)
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, unpacked)
    adapters = {n: m for n, m in model.named_modules() if isinstance(m, lora.LoraLinear)}
    plain = Policy(model, 1.0, adapters)
    rollouts = generate(built, rollout_requests(problems(2), 2, run_seed=0, step=0))
    batch = batch_of(rollouts)
    for policy in (built.policy, plain):
        policy.model.zero_grad()
        logprobs, _ = policy.forward(batch)
        (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    for name, parameter in plain.trainable.items():
        ours = built.policy.trainable[name].grad
        assert (ours - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-7, name


# ---------------------------------------------------------------- checkpoints


def packed_checkpoint(bnb: Any, kind: str, *, kept: tuple[str, ...], nested: bool) -> Path:
    """Write a model as bitsandbytes and transformers store one in 4 bits."""
    from safetensors.torch import load_file, save_file

    folder = Path(tempfile.mkdtemp(prefix="strop-bnb-"))
    shutil.copytree(tiny_model(kind), folder, dirs_exist_ok=True)
    stored = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if not layer.endswith("_proj") or any(k in layer.split(".") or layer.startswith(k) for k in kept):
            stored[name] = tensor
            continue
        packed, state = bnb.quantize_4bit(tensor, blocksize=64, quant_type="nf4", compress_statistics=nested)
        stored[name] = packed
        stored |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested, "llm_int8_skip_modules": list(kept),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("nested", [False, True])
def test_a_checkpoint_of_bitsandbytes_is_taken_as_it_is(nested: bool, bnb: Any) -> None:
    kept = ("lm_head", "model.layers.1.mlp", "model.layers.0.self_attn.k_proj")
    built = quantised_rig(packed_checkpoint(bnb, "llama", kept=kept, nested=nested))
    assert built.source.packed
    assert built.source.kept_modules == kept
    rollouts = generate(built, rollout_requests(problems(2), 2, run_seed=0, step=0))
    assert (trainer_logprobs(built, rollouts) - sampler_logprobs(rollouts)).abs().max() < 5e-5
    assert built.weights.unshared_bytes() == 0
    whole = {n.removesuffix(".base"): m for n, m in RIGS["llama"]().policy.model.named_modules()}
    found = {n.removesuffix(".base"): m for n, m in built.policy.model.named_modules() if isinstance(m, Nf4Linear)}
    # k is kept, so the fused q, k, v are.
    assert len(found) == 14 - 3 - 3
    for name, module in found.items():
        if not nested:
            assert torch.equal(module.packed, whole[name].packed)
            assert torch.equal(module.absmax, whole[name].absmax)
        else:  # statistics in 8 bits move every value of a block
            gap = module.dequantized() - whole[name].dequantized()
            assert 0 < gap.norm() < 0.03 * whole[name].dequantized().norm()
    built.engine.close()


# ---------------------------------------------------------------- what is refused


def test_a_packed_checkpoint_needs_the_setting(bnb: Any) -> None:
    folder = packed_checkpoint(bnb, "llama", kept=(), nested=False)
    with pytest.raises(ModelError, match="stored quantised") as caught:
        open_model(str(folder))
    assert "nf4" in str(caught.value)
    source = open_model(str(folder), "nf4")
    with pytest.raises(ModelError, match="transformers engine"):
        load_model(source, ModelConfig(quantization="nf4"), torch.float32, torch.device("cpu"))


def test_a_damaged_packed_checkpoint_is_refused_by_the_name_of_its_weight(bnb: Any) -> None:
    from safetensors.torch import load_file, save_file

    folder = packed_checkpoint(bnb, "llama", kept=(), nested=True)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[f"{name}.absmax"] = tensors[f"{name}.absmax"].flatten()[:-3]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=name) as caught:
        quantised_rig(folder)
    assert "download it again" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4"),
        ({"quant_method": "awq", "bits": 4}, "awq, 4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"bits": 3}, "unknown, 3"),
    ],
)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_another_packing_is_refused(stored: dict[str, Any], said: str, quantization: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_model("llama"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = stored
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said) as caught:
        open_model(str(tmp_path), quantization)
    assert "16-bit checkpoint" in str(caught.value.hint)


@pytest.mark.parametrize("held", [{"embedding": "host"}, {"embedding": "int8"}, {"head": "int8", "embedding": "host"}])
def test_a_tied_model_has_one_tensor_for_both_ends(held: dict[str, str]) -> None:
    with pytest.raises(ModelError, match="one tensor"):
        held_as(open_model(str(tiny_model("qwen3"))), ModelConfig.model_validate(held))


def mixture_of_experts(folder: Path) -> Path:
    """Write a model whose experts vLLM holds under other names than transformers."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    shutil.copytree(tiny_model("llama"), folder, dirs_exist_ok=True)
    tokens = open_model(str(folder)).config
    config = Qwen3MoeConfig(
        vocab_size=tokens.vocab_size, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    mixture_of_experts(tmp_path)
    with pytest.raises(EngineError, match="mixture of experts"):
        quantised_rig(tmp_path)


FREED = """
import gc, sys
from strop import load_config
from strop.errors import ModelError
from strop.trainer.parts import build, make_pool, prepare

def engines():
    gc.collect()
    return [x for x in gc.get_objects() if type(x).__name__
            in ("EngineCore", "CPUModelRunner", "LlamaForCausalLM", "Qwen3MoeForCausalLM")]

def start(model):
    prepared = prepare(load_config({
        "model": {"path": model, "dtype": "float32"}, "lora": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
        "task": {"name": "arithmetic", "max_prompt_length": 64},
        "rollout": {"num_prompts": 2, "num_generations": 2, "max_completion_length": 24},
    }))
    with make_pool(prepared.config, prepared.task.default_rewards) as pool, build(prepared, pool, print) as parts:
        assert parts.weights.unshared_bytes() == 0

kept = []
try:
    start(sys.argv[1])
except ModelError as e:  # as a notebook keeps it
    kept.append(e)
assert not engines(), engines()
assert [e.message.split("`")[1] for e in kept] == ["model.layers.0.mlp.experts.gate_up_proj"]
start(sys.argv[2])
assert not engines(), engines()
print("freed")
"""


def test_an_engine_is_freed_when_a_start_fails_after_it_was_built(tmp_path: Path) -> None:
    """Also while the error is kept; another run starts in the same process, and its engine is freed as well."""
    folders = [str(mixture_of_experts(tmp_path)), str(tiny_model("llama"))]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FREED, *folders],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.endswith("freed\n"), done.stderr[-2000:]


# ---------------------------------------------------------------- the other engine


def test_without_vllm_the_same_weights_are_packed() -> None:
    source = open_model(str(tiny_model("llama")))
    model = load_model(source, ModelConfig(quantization="nf4"), torch.float32, torch.device("cpu"))
    engine = TransformersEngine(model, lambda ids: decode(source, ids), max_num_seqs=8, pad_token_id=256)
    policy = Policy(model, 1.0, lora.inject(model, r=8, alpha=32, target_modules=TARGETS, seed=0))
    other = Rig(source, engine, policy, SharedWeights(policy, engine), {})
    assert other.weights.unshared_bytes() == 0
    nudge(other)
    rollouts = generate(other, rollout_requests(problems(2), 2, run_seed=0, step=0))
    assert (trainer_logprobs(other, rollouts) - sampler_logprobs(rollouts)).abs().max() < 5e-5
    whole = {n.removesuffix(".base"): m for n, m in RIGS["llama"]().policy.model.named_modules()}
    for name, module in model.named_modules():
        if isinstance(module, Nf4Linear):
            assert torch.equal(module.packed, whole[name.removesuffix(".base")].packed)


def test_the_trainer_may_hold_a_second_copy(tmp_path: Path) -> None:
    config = load_config({
        "model": {"path": str(tiny_model("llama")), "dtype": "float32", "quantization": "nf4", "share_weights": "copy"},
        "lora": {"r": 8}, "task": {"name": "arithmetic", "max_prompt_length": 64}, "run": {"out": str(tmp_path)},
        "rollout": {"num_prompts": 2, "num_generations": 2, "max_completion_length": 24},
    })  # fmt: skip
    notes: list[str] = []
    prepared = prepare(config)
    stack = ExitStack()
    model, engine = _model_and_engine(prepared, notes.append, stack)
    policy = Policy(model, 1.0, lora.inject(model, r=8, alpha=32, target_modules=TARGETS, seed=0))
    built = Rig(prepared.source, engine, policy, SharedWeights(policy, engine), {})
    nudge(built)
    built.weights.publish()
    rollouts = generate(built, rollout_requests(problems(2, tokens=20), 2, run_seed=0, step=0))
    assert (trainer_logprobs(built, rollouts) - sampler_logprobs(rollouts)).abs().max() < 5e-5
    assert built.weights.unshared_bytes() > 0
    assert any("second time" in note for note in notes)
    stack.close()


@pytest.mark.parametrize(
    ("tied", "gib", "settings", "expected"),
    [
        (False, 24.0, {}, ("16bit", "card")),
        (False, 8.0, {}, ("16bit", "host")),
        (False, 7.0, {}, ("int8", "host")),
        (False, 24.0, {"head": "int8"}, ("int8", "card")),
        (True, 24.0, {"head": "int8"}, ("int8", "int8")),
        (True, 7.0, {}, ("int8", "int8")),
    ],
)
def test_the_vocabulary_is_held_in_less_where_the_run_would_not_fit(
    tied: bool, gib: float, settings: dict[str, str], expected: tuple[str, str]
) -> None:
    shape = ModelShape.from_config(
        Qwen2Config(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                    num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=tied)
    )  # fmt: skip
    config = load_config({
        "model": {"path": "x", "quantization": "nf4", **settings}, "run": {"vram_gib": gib},
        "rollout": {"num_prompts": 2, "num_generations": 8, "max_completion_length": 1024},
    })  # fmt: skip
    card = Machine("cuda", "a card", 16, 78 << 30, True, 80 << 30)
    plan = make_plan(config, shape, card, engine="vllm", engine_reason="")
    assert (plan.head, plan.embedding) == expected
    said = {item.name: item.reason for item in plan.items}
    assert ("would not fit" in said.get("head", "")) == (expected[0] == "int8" and not settings)
    again = make_plan(config, shape, card, engine="vllm", engine_reason="", kept=plan.promise())
    assert (again.head, again.embedding) == expected
