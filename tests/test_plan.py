"""The plan's numbers against the shapes they follow from, and its refusals."""

from __future__ import annotations

import random
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen3Config

from strop import load_config
from strop.errors import ConfigError, PlanError
from strop.memory.card import HEADROOM, CardNeeds
from strop.memory.machine import Machine, computes_bf16
from strop.memory.plan import Plan, make_plan
from strop.memory.probe import CardProcess, can_pin, look_at_card
from strop.memory.shapes import FUSED_MODELS, GIB, ModelShape
from strop.policy.load import ModelSource
from strop.trainer.parts import Prepared, without_pinned_memory

ROOT = Path(__file__).parent.parent
CARD_RECIPES = sorted((ROOT / "recipes" / "cards").glob("*.yaml"))
SHAPES = runpy.run_path(str(ROOT / "bench" / "shapes.py"))
QWEN = {"num_key_value_heads": 2, "max_position_embeddings": 32768, "vocab_size": 151936, "tie_word_embeddings": True}
QWEN_0_5B = Qwen2Config(
    hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, **QWEN,
)  # fmt: skip
QWEN_1_5B = Qwen2Config(
    hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, **QWEN,
)  # fmt: skip
QWEN_7B = Qwen2Config(
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    **(QWEN | {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False}),
)  # fmt: skip
GEMMA = Gemma3TextConfig(num_hidden_layers=4, max_position_embeddings=32768)
CPU = Machine("cpu", "CPU", 2, 48 * GIB, True)
CARD = Machine("cuda", "card", 16, 24 * GIB, True, 24 * GIB)
ROOMY = Machine("cuda", "card", 16, 79 * GIB, True, 80 * GIB)


def plan(
    machine: Machine = CPU, kept: dict[str, Any] | None = None, model: Any = QWEN_1_5B, engine: str = "vllm",
    **changes: Any,
) -> Plan:  # fmt: skip
    config = load_config({}, [f"{k.replace('__', '.')}={v}" for k, v in changes.items()])
    shape = ModelShape.from_config(model)
    return make_plan(config, shape, machine, engine=engine, engine_reason="test", kept=kept)


def workload(prompts: int, each: int, prompt: int, completion: int, **more: Any) -> dict[str, Any]:
    return {
        "rollout__num_prompts": prompts, "rollout__num_generations": each, "task__max_prompt_length": prompt,
        "rollout__max_completion_length": completion, **more,
    }  # fmt: skip


NF4 = {"model__quantization": "nf4"}
SMALLEST = NF4 | {"model__head": "int8", "model__embedding": "host", "optim__name": "adamw_8bit"}
WORKLOADS = {
    "L1": (QWEN_0_5B, workload(16, 8, 256, 400, run__vram_gib=8)),
    "W1": (QWEN_1_5B, workload(8, 8, 256, 1024, run__vram_gib=24)),
    "W2": (QWEN_7B, workload(4, 8, 256, 1024, run__vram_gib=24, **NF4)),
    "W3": (QWEN_1_5B, workload(2, 8, 256, 1024, run__vram_gib=4.5, **NF4)),
    "W4": (QWEN_1_5B, workload(4, 8, 2048, 512, run__vram_gib=24)),
    "W5": (QWEN_1_5B, workload(8, 16, 256, 1024, run__vram_gib=24)),
    "W6": (QWEN_7B, workload(2, 8, 256, 1024, run__vram_gib=7, **SMALLEST)),
}


def test_parameters_are_counted_as_the_model_has_them() -> None:
    small = Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=500, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(small)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert ModelShape.from_config(small).num_parameters == matrices
    assert ModelShape.from_config(QWEN_1_5B).num_parameters == pytest.approx(1.54e9, rel=0.01)
    assert ModelShape.from_config(QWEN_1_5B).kv_bytes_per_token("bfloat16") == 28 * 1024
    assert ModelShape.from_config(QWEN_1_5B).lora_parameters(16) == pytest.approx(18.5e6, rel=0.01)


def test_bytes_of_weights_follow_the_settings_of_the_model() -> None:
    shape = ModelShape.from_config(QWEN_7B)
    assert shape.weight_bytes("bfloat16") == pytest.approx(15.2e9, rel=0.01)
    linears, plain = 6.53e9 * 4.25 / 8, 2 * 152064 * 3584
    assert shape.weight_bytes("bfloat16", "nf4") == pytest.approx(linears + 2 * plain, rel=0.01)
    assert shape.weight_bytes("bfloat16", "nf4", "int8", "host") == pytest.approx(linears + plain / 2, rel=0.01)
    tied = ModelShape.from_config(QWEN_1_5B)
    saved = tied.weight_bytes("bfloat16", "nf4") - tied.weight_bytes("bfloat16", "nf4", "int8")
    assert saved == pytest.approx(151936 * 1536, rel=0.01)


def test_checkpointed_layers_keep_their_input_and_others_what_their_blocks_save() -> None:
    shape = ModelShape.from_config(QWEN_1_5B)
    none, some, all_ = (shape.activation_bytes_per_token("bfloat16", checkpointed=n, fused=True) for n in (0, 10, 28))
    assert all_ == 28 * 1536 * 2
    assert (none - some) * 18 == (some - all_) * 10
    assert none == 28 * (2 * (2 * 1536 + 2 * 14 * 128 + 2 * 8960) + 4 * 12)
    qwen3 = ModelShape.from_config(Qwen3Config())
    assert qwen3.head_norms
    assert "qwen3" in FUSED_MODELS


def test_models_that_are_counted_as_fused_are_those_that_the_policy_fuses() -> None:
    from strop.policy import fused

    assert {t for name, types in vars(fused).items() if name.endswith("_TYPES") for t in types} == FUSED_MODELS


def test_what_is_derived_has_a_reason_and_fits() -> None:
    result = plan()
    assert all(item.reason for item in result.items)
    assert result.dtype == "float32"
    assert result.threads == 1
    assert result.max_model_len == 1024
    assert result.block_size == 32
    assert plan(CARD).dtype == "bfloat16"
    assert plan(CARD).block_size is None


@pytest.mark.parametrize("name", WORKLOADS)
def test_published_workloads_fit_their_cards(name: str) -> None:
    model, changes = WORKLOADS[name]
    result = plan(ROOMY, model=model, **changes)
    shown = result.as_dict()
    cap = changes["run__vram_gib"]
    assert all(item.reason for item in result.items)
    assert result.memory_bytes == int(cap * GIB)
    assert max(shown["rollout_peak_gib"]["value"], shown["training_peak_gib"]["value"]) <= cap * (1 - HEADROOM) + 0.01
    assert result.max_num_seqs == changes["rollout__num_prompts"] * changes["rollout__num_generations"]
    assert result.micro_batch_tokens >= result.max_model_len
    assert 0 <= result.checkpoint_layers <= model.num_hidden_layers
    assert result.logit_rows is not None
    assert result.logit_rows >= 128


def test_phases_take_turns_only_where_they_do_not_fit_beside_each_other() -> None:
    model, changes = WORKLOADS["W1"]
    caps = (6, 8, 12, 16, 24, 40, 70)
    plans = [plan(ROOMY, model=model, **(changes | {"run__vram_gib": cap})) for cap in caps]
    assert plans[0].release_kv
    assert not plans[-1].release_kv
    released = [p.release_kv for p in plans]
    assert released == sorted(released, reverse=True)
    layers = [p.checkpoint_layers for p in plans]
    assert layers == sorted(layers, reverse=True)
    assert layers[-1] == 0
    assert all(p.checkpoint_layers == 0 for p in plans if not p.release_kv)
    tokens = [p.micro_batch_tokens for p in plans if not p.checkpoint_layers]
    assert tokens == sorted(tokens)
    assert plans[0].max_num_seqs < plans[-1].max_num_seqs == 64
    assert 64 % plans[0].max_num_seqs < plans[0].max_num_seqs


def test_pinned_numbers_are_taken() -> None:
    result = plan(CARD, optim__checkpoint_layers=5, optim__micro_batch_tokens=3000, rollout__max_num_seqs=24)
    assert (result.checkpoint_layers, result.micro_batch_tokens, result.max_num_seqs) == (5, 3000, 24)
    assert plan(CPU, rollout__max_num_seqs=24).max_num_seqs == 24


def test_a_prompt_is_held_once_per_group() -> None:
    config = load_config({}, ["rollout.num_prompts=4", "task.max_prompt_length=2048"])
    needs = CardNeeds(config, ModelShape.from_config(QWEN_1_5B), "bfloat16", 2560)
    token = 28 * 1024
    assert needs.kv_bytes(32) < (4 * 2048 + 32 * (512 + 32) + 64) * token
    assert needs.kv_bytes(32) >= (4 * 2048 + 32 * 512) * token


def test_gradients_make_room_for_rollouts() -> None:
    """7B in 7 GiB decodes all 16 completions at once only because there are no gradients meanwhile."""
    numbers = plan(ROOMY, model=QWEN_7B, **workload(2, 8, 256, 1024, run__vram_gib=7, **SMALLEST))
    assert numbers.max_num_seqs == 16
    shown = {item.name: item.value for item in numbers.items}
    rank = 16 * 28 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    room = 0.97 * 7 - shown["rollout_peak_gib"]
    assert 0 <= room < 4 * rank / GIB


def test_kept_numbers_win_where_they_fit_and_only_there() -> None:
    roomy = plan(Machine("cpu", "CPU", 2, 128 * GIB, True))
    tight = Machine("cpu", "CPU", 2, 40 * GIB, True)
    assert plan(tight).micro_batch_tokens < roomy.micro_batch_tokens
    free_again = Machine("cpu", "CPU", 2, 128 * GIB, True)
    first = plan(tight)
    resumed = plan(free_again, kept=first.promise())
    assert resumed.promise() == first.promise()
    assert plan(tight, kept=roomy.promise()).promise() != roomy.promise()
    assert plan(CARD, kept=first.promise()).dtype == "bfloat16"
    on_small_card = plan(CARD, run__vram_gib=8)
    assert plan(CARD, kept=on_small_card.promise()).promise() == on_small_card.promise() != plan(CARD).promise()
    assert plan(CARD, run__vram_gib=8, kept=plan(CARD).promise()).promise() == on_small_card.promise()


def test_a_resumed_run_takes_what_is_pinned_now() -> None:
    for machine in (CARD, CPU):
        first = plan(machine)
        now = {"optim__micro_batch_tokens": 2000, "optim__checkpoint_layers": 7, "rollout__max_num_seqs": 9}
        again = plan(machine, kept=first.promise(), **now)
        assert (again.micro_batch_tokens, again.checkpoint_layers, again.max_num_seqs) == (2000, 7, 9)
        more = plan(machine, kept=first.promise(), optim__micro_batch_tokens=2000)
        assert more.promise() == first.promise() | {"micro_batch_tokens": 2000}


def test_a_number_that_the_model_or_the_card_cuts_short_says_so() -> None:
    for machine in (CARD, CPU):
        layers = plan(machine, optim__checkpoint_layers=99).as_dict()["checkpoint_layers"]
        assert layers["value"] == 28
        assert "is 99, the model has 28" in layers["reason"]
    tight = plan(CARD, run__vram_gib=6, rollout__max_num_seqs=60, rollout__max_completion_length=4096)
    assert tight.max_num_seqs < 60
    assert "does not fit" in tight.as_dict()["max_num_seqs"]["reason"]
    assert "not used here" in plan(CPU, run__vram_gib=7).as_dict()["memory_gib"]["reason"]


def test_a_cpu_counts_what_is_packed_and_pinned() -> None:
    def weights(**changes: Any) -> Any:
        return plan(CPU, **changes).as_dict()["weights_gib"]

    plain, packed = weights(), weights(**NF4)
    assert "linears in 4 bits" in packed["reason"]
    assert plain["value"] - packed["value"] == pytest.approx(1.31e9 * (4 - 17 / 32) / GIB, rel=0.02)
    assert weights(model__share_weights="copy")["value"] > 1.8 * plain["value"]
    assert "8 bits" in weights(optim__name="adamw_8bit")["reason"]
    with pytest.raises(PlanError, match=r"optim.micro_batch_tokens.* needs") as error:
        plan(CPU, optim__micro_batch_tokens=200_000)
    plan(CPU, **hinted(str(error.value.hint)))


@pytest.mark.parametrize(
    ("engine", "model", "changes"),
    [
        ("transformers", QWEN_7B, {"model__head": "int8"}),
        ("transformers", QWEN_7B, {"model__embedding": "host"}),
        ("vllm", QWEN_7B, {"model__head": "int8", "model__share_weights": "copy"}),
        ("vllm", QWEN_1_5B, {"model__embedding": "host"}),
        ("vllm", QWEN_1_5B, {"model__embedding": "nf4"}),
        ("vllm", QWEN_1_5B, {"model__embedding": "int8", "model__head": "16bit"}),
        ("vllm", GEMMA, {"model__head": "int8"}),
        ("vllm", QWEN_1_5B, {"lora__r": 0, "optim__master": "kahan", "model__dtype": "float32"}),
    ],
)
def test_settings_that_exclude_each_other_are_refused_by_the_plan(
    engine: str, model: Any, changes: dict[str, Any]
) -> None:
    with pytest.raises(PlanError) as error:
        plan(ROOMY, model=model, engine=engine, **changes)
    named = hinted(str(error.value.hint).partition("; or")[0])
    plan(ROOMY, model=model, **(changes | named))


@pytest.mark.parametrize(
    "options", [["optim.master=kahan"], ["lora.r=0", "model.quantization=nf4"], ["lora.r=0", "model.head=int8"]]
)
def test_settings_that_nothing_would_come_of_are_refused(options: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"lora\.r is"):
        load_config({}, options)


def drawn(draw: random.Random) -> tuple[ModelShape, Machine, str, list[str]]:
    """A model, a machine, an engine and settings, none of them likely."""
    kv_heads, hidden = draw.choice([1, 4, 8]), draw.choice([256, 1536, 4096])
    shape = ModelShape(
        draw.choice([1, 4, 28, 48]), hidden, hidden * draw.choice([3, 5]), kv_heads * draw.choice([1, 7]), kv_heads,
        draw.choice([64, 256]), draw.choice([512, 151936, 262144]), draw.random() < 0.5, 131072, draw.random() < 0.8,
    )  # fmt: skip
    size = draw.choice([2, 4, 8, 12, 24, 80]) * GIB
    machine = Machine("cuda", "card", 8, size, True, size) if draw.random() < 0.8 else Machine("cpu", "", 8, size, True)
    choices: dict[str, tuple[float, list[Any]]] = {
        "rollout.num_prompts": (1, [1, 8, 64]), "rollout.num_generations": (1, [2, 64]),
        "task.max_prompt_length": (1, [1, 512, 2048]), "rollout.max_completion_length": (1, [1, 400, 4096, 32000]),
        "lora.r": (1, [0, 1, 16, 512]), "run.vram_gib": (0.5, [0.05, 1, 3.3, 7]), "rollout.max_num_seqs": (0.2, [1, 7]),
        "optim.micro_batch_tokens": (0.2, [40_000, 200_000]), "optim.checkpoint_layers": (0.2, [0, 99]),
        "model.quantization": (0.3, ["nf4"]), "model.share_weights": (0.1, ["copy"]), "optim.master": (0.1, ["kahan"]),
        "objective.beta": (0.2, [0.1]), "model.head": (0.1, ["16bit"]), "optim.name": (0.2, ["adamw_8bit"]),
    }  # fmt: skip
    options = [f"{key}={draw.choice(values)}" for key, (share, values) in choices.items() if draw.random() < share]
    return shape, machine, draw.choice(["vllm", "vllm", "transformers"]), options


def test_plans_drawn_at_random_stay_below_their_memory_and_their_advice_is_enough() -> None:
    draw = random.Random(0)
    seen = {"fits": 0, "advice": 0}
    for _ in range(600):
        shape, machine, engine, options = drawn(draw)
        try:
            config = load_config({}, options)
        except ConfigError:
            continue
        try:
            result = make_plan(config, shape, machine, engine=engine, engine_reason="test")
        except PlanError as e:
            hint = e.hint or "none"
            if any(part in hint for part in ("smaller model", "at most", "at least", "; or")):
                continue  # no change is enough, or the settings exclude each other whatever the memory
            followed = [f"{key.replace('__', '.')}={value}" for key, value in hinted(hint).items()]
            make_plan(load_config({}, [*options, *followed]), shape, machine, engine=engine, engine_reason="test")
            seen["advice"] += 1
            continue
        seen["fits"] += 1
        shown = {item.name: item.value for item in result.items}
        assert max(shown.get("rollout_peak_gib", 0), shown.get("training_peak_gib", 0)) <= result.memory_bytes / GIB
        assert result.micro_batch_tokens >= result.max_model_len
        assert result.max_num_seqs >= 1
        again = make_plan(config, shape, machine, engine=engine, engine_reason="test", kept=result.promise())
        assert again.promise() == result.promise()
    assert min(seen.values()) > 50, seen


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout__max_completion_length": 40000}, "positions"),
        ({"optim__micro_batch_tokens": 100}, "longest prompt and completion"),
        ({"run__vram_gib": 40}, "24.0 GiB are free on"),
        ({"run__vram_gib": 3}, "GiB"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_setting_to_change(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said) as error:
        plan(CARD, **changes)
    assert error.value.hint


def hinted(hint: str) -> dict[str, str]:
    """Settings that a hint names, as `section__name: value`."""
    return {f"{s}__{n}": v for s, n, v in re.findall(r"(\w+)\.(\w+): ([\w.]*\w)", hint)}


@pytest.mark.parametrize(
    ("machine", "model", "changes", "first"),
    [
        (ROOMY, QWEN_1_5B, {"run__vram_gib": 4.3}, "run.vram_gib"),
        (CARD, QWEN_1_5B, {"run__vram_gib": 3}, "model.quantization"),
        (Machine("cuda", "card", 8, 4 * GIB, True), QWEN_1_5B, {}, "model.quantization"),
        (Machine("cuda", "card", 8, 14 * GIB, True), QWEN_7B, {}, "model.quantization"),
        (Machine("cuda", "card", 8, 7 * GIB, True), QWEN_7B, NF4 | {"model__embedding": "card"}, "model.embedding"),
        (CARD, QWEN_1_5B, {"lora__r": 0}, "optim.name"),
        (Machine("cuda", "card", 8, 12 * GIB, True), QWEN_1_5B, {"lora__r": 0}, "lora.r"),
        (CARD, QWEN_1_5B, {"optim__micro_batch_tokens": 200000}, "optim.micro_batch_tokens"),
        (CARD, QWEN_7B, NF4 | {"optim__checkpoint_layers": 0, "rollout__max_completion_length": 8000}, "optim.checkp"),
        (Machine("cpu", "CPU", 2, 24 * GIB, True), QWEN_1_5B, {"rollout__max_completion_length": 2000}, "rollout.m"),
    ],
)  # fmt: skip
def test_the_change_that_is_named_is_enough(machine: Machine, model: Any, changes: dict[str, Any], first: str) -> None:
    with pytest.raises(PlanError) as error:
        plan(machine, model=model, **changes)
    hint = str(error.value.hint)
    settings = hinted(hint)
    assert any(f"{k.replace('__', '.')}".startswith(first) for k in settings), hint
    plan(machine, model=model, **(changes | settings))


@pytest.mark.parametrize("recipe", CARD_RECIPES, ids=lambda path: path.stem)
def test_recipes_for_cards_fit_the_published_shapes(recipe: Path) -> None:
    config = load_config(recipe)
    published = dict(SHAPES["CONFIGS"][SHAPES["PUBLISHED"][config.model.path]])
    shape = ModelShape.from_config(AutoConfig.for_model(published.pop("model_type"), **published))
    card = int(recipe.stem.split("gb-")[0])
    assert config.run.vram_gib is not None
    assert config.run.vram_gib < card
    free = Machine("cuda", "card", 8, int(config.run.vram_gib * GIB), True)
    result = make_plan(config, shape, free, engine="vllm", engine_reason="test")
    assert result.max_num_seqs * 2 >= config.rollout.num_prompts * config.rollout.num_generations
    assert recipe.read_text().startswith(f"# {config.model.path.split('/')[1]} on GSM8K")


def test_what_no_change_fits_says_so() -> None:
    with pytest.raises(PlanError) as error:
        plan(Machine("cuda", "card", 8, 2 * GIB, True), model=QWEN_7B)
    assert "smaller model" in str(error.value.hint)


def test_who_holds_the_card_is_named_before_anything_is_loaded() -> None:
    desktop = CardProcess(4242, "ollama", 10 * GIB)
    held = Machine("cuda", "card", 16, 13 * GIB, True, 24 * GIB, (desktop, CardProcess(7, "Xorg", 100 << 20)))
    with pytest.raises(PlanError, match=r"ollama \(pid 4242\) holds 10.0 GiB") as error:
        plan(held, run__vram_gib=20)
    assert "at most 13" in str(error.value.hint)
    reason = plan(held).as_dict()["memory_gib"]["reason"]
    assert "ollama" in reason
    assert "Xorg" not in reason


def test_who_holds_the_card_is_named_where_a_run_would_fit_without() -> None:
    def refusal(*processes: CardProcess, free: float = 4.2, **changes: Any) -> str:
        held = Machine("cuda", "card", 16, int(free * GIB), True, 24 * GIB, processes)
        with pytest.raises(PlanError) as error:
            plan(held, **changes)
        return str(error.value.hint)

    ollama, silent, small = CardProcess(4242, "ollama", 10 * GIB), CardProcess(7, "game", None), CardProcess(9, "x", 99)
    assert refusal(ollama, small).endswith("; or end what else uses the card: ollama (pid 4242) holds 10.0 GiB")
    assert "game (pid 7) holds memory" in refusal(silent)
    assert "with run.vram_gib: null: ollama" in refusal(ollama, run__vram_gib=3)
    assert "end what" not in refusal(small)
    assert "end what" not in refusal(ollama, model=QWEN_7B)
    assert refusal(ollama, free=11, model=QWEN_7B, rollout__max_completion_length=1024).count("pid 4242") == 1
    plan(Machine("cuda", "card", 16, int(14.2 * GIB), True, 24 * GIB))  # what the first advice comes to


def test_a_card_without_bfloat16_trains_in_float16() -> None:
    turing = Machine("cuda", "RTX 2080", 8, 8 * GIB, computes_bf16(SimpleNamespace(major=7, minor=5)))
    assert plan(turing, model=QWEN_0_5B).dtype == "float16"
    with pytest.raises(PlanError, match="RTX 2080") as error:
        plan(turing, model=QWEN_0_5B, model__dtype="bfloat16")
    assert "float16" in str(error.value.hint)
    assert computes_bf16(SimpleNamespace(major=8, minor=6))


def test_without_pinned_memory_the_smallest_recipe_holds_its_embedding_in_4_bits() -> None:
    config = load_config(next(r for r in CARD_RECIPES if r.stem == "8gb-qwen2.5-7b"))
    shape = ModelShape.from_config(QWEN_7B)
    plans = []
    for pins in (True, False):
        card = Machine("cuda", "card", 8, 8 * GIB, True, pins=pins)
        plans.append(make_plan(config, shape, card, engine="vllm", engine_reason="test"))
    assert [(p.head, p.embedding, p.max_num_seqs) for p in plans] == [("int8", "host", 16), ("int8", "nf4", 8)]
    assert "embedding in 4 bits" in plans[1].as_dict()["weights_gib"]["reason"]
    weights = [p.as_dict()["weights_gib"]["value"] for p in plans]
    assert weights[1] - weights[0] == pytest.approx(152064 * 3584 * 17 / 32 / GIB, abs=0.02)
    # A run that began with pinned memory goes on without.
    card = Machine("cuda", "card", 8, 8 * GIB, True, pins=False)
    assert make_plan(config, shape, card, engine="vllm", engine_reason="", kept=plans[0].promise()).embedding == "nf4"
    with pytest.raises(PlanError) as error:
        plan(
            card,
            model=QWEN_7B,
            **workload(2, 8, 320, 1024, **(SMALLEST | {"model__embedding": "int8"})),
            run__vram_gib=6.9,
        )
    assert "run.vram_gib" in str(error.value.hint)


def test_where_nothing_can_be_pinned_the_run_is_planned_again_before_it_is_loaded() -> None:
    """On a machine without a card nothing can be pinned, whatever the plan says."""
    if can_pin(1 << 20):
        pytest.skip("host memory can be pinned here")
    notes: list[str] = []

    def planned(**changes: Any) -> Prepared:
        config = load_config({}, [f"{k.replace('__', '.')}={v}" for k, v in (smallest | changes).items()])
        first = make_plan(config, ModelShape.from_config(QWEN_7B), ROOMY, engine="vllm", engine_reason="")
        assert first.embedding == "host"
        source = ModelSource("7b", QWEN_7B, None, (0,))
        return without_pinned_memory(Prepared(config, source, cast("Any", None), first, ROOMY), notes.append)

    smallest = workload(2, 8, 320, 1024, run__vram_gib=7, **SMALLEST) | {"model__embedding": "auto"}
    again = planned()
    assert (again.plan.embedding, again.machine.pins) == ("nf4", False)
    assert len(notes) == 1
    assert "1.0 GiB" in notes[0]
    assert "nf4" in notes[0]
    with pytest.raises(PlanError, match="finds no host memory") as error:
        planned(model__embedding="host")
    assert str(error.value.hint).startswith("model.embedding: auto; ")
    with pytest.raises(PlanError, match="and beside it") as error:
        planned(run__vram_gib=6.6)
    assert "run.vram_gib: 6.9" in str(error.value.hint)
    with pytest.raises(PlanError, match="finds no host memory") as error:
        planned(run__vram_gib=6.6, model__embedding="host")
    assert str(error.value.hint).startswith("model.embedding: auto, and run.vram_gib: 6.9")
    fits = make_plan(load_config({}, ["run.vram_gib=24"]), ModelShape.from_config(QWEN_1_5B), ROOMY, engine="vllm",
                     engine_reason="")  # fmt: skip
    plain = Prepared(load_config({}), ModelSource("x", QWEN_1_5B, None, (0,)), cast("Any", None), fits, ROOMY)
    assert without_pinned_memory(plain, notes.append) is plain


def test_a_card_that_the_driver_does_not_know_is_no_error() -> None:
    assert look_at_card("GPU-00000000-0000-0000-0000-000000000000") is None
