"""The plan's numbers against the shapes they follow from, and its refusals."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM, Qwen2Config

from strop import load_config
from strop.errors import PlanError
from strop.memory.machine import Machine
from strop.memory.plan import make_plan
from strop.memory.shapes import GIB, ModelShape

QWEN_1_5B = Qwen2Config(
    hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
    vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=32768,
)  # fmt: skip
CPU = Machine("cpu", "CPU", 2, 48 * GIB, True)
CARD = Machine("cuda", "card", 16, 24 * GIB, True)


def plan(machine: Machine = CPU, kept: dict[str, Any] | None = None, **changes: Any) -> Any:
    config = load_config({}, [f"{k.replace('__', '.')}={v}" for k, v in changes.items()])
    shape = ModelShape.from_config(QWEN_1_5B)
    return make_plan(config, shape, machine, engine="vllm", engine_reason="test", kept=kept)


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


def test_what_is_derived_has_a_reason_and_fits() -> None:
    result = plan()
    assert all(item.reason for item in result.items)
    assert result.dtype == "float32"
    assert result.threads == 1
    assert result.max_model_len == 1024
    assert result.block_size == 32
    assert plan(CARD).dtype == "bfloat16"
    assert plan(CARD).block_size is None


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
