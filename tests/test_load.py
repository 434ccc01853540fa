"""Model and adapter folders: a damaged file is named, and what the trainer would compute wrongly is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import TARGETS, tiny_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    CohereConfig,
    Gemma2Config,
    GptOssConfig,
    GraniteConfig,
    PhiConfig,
    PhimoeConfig,
    PretrainedConfig,
)

from strop import load_config
from strop.errors import ModelError
from strop.policy import lora
from strop.policy.load import load_weights, open_model
from strop.trainer.parts import prepare

Edit = Callable[[Path], Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model(), tmp_path / "model"))


def refused(folder: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        open_model(str(folder))
    assert caught.value.hint
    return caught.value


def halved(name: str) -> Edit:
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: (folder / name).stat().st_size // 2]
    )


def written(name: str, text: str) -> Edit:
    return lambda folder: (folder / name).write_text(text)


def changed(name: str, **values: Any) -> Edit:
    return lambda folder: (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **values}))


INDEX = "model.safetensors.index.json"
DAMAGED = {
    "weights cut off": ("model.safetensors", halved("model.safetensors")),
    "weights without the last byte": (
        "model.safetensors",
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
    ),
    "weights cut off in the header": (
        "model.safetensors",
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:50]),
    ),
    "empty weights": ("model.safetensors", written("model.safetensors", "")),
    "a pointer to the weights": ("model.safetensors", written("model.safetensors", "version https://git-lfs\noid 1\n")),
    "a second weight file cut off": ("extra.safetensors", written("extra.safetensors", "x" * 20)),
    "index cut off": (INDEX, written(INDEX, '{"weight_map": {"a"')),
    "index is a list": (INDEX, written(INDEX, "[]")),
    "index without files": (INDEX, written(INDEX, "{}")),
    "index with odd files": (INDEX, written(INDEX, '{"weight_map": {"a": 3}}')),
    "config is a list": ("config.json", written("config.json", "[]")),
    "config cut off": ("config.json", halved("config.json")),
    "config with a wrong type": ("config.json", changed("config.json", hidden_size="x")),
    "config that contradicts itself": ("config.json", changed("config.json", num_hidden_layers=3)),
    "config that is not UTF-8": ("config.json", lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}')),
    "tokenizer cut off": ("tokenizer.json", halved("tokenizer.json")),
    "tokenizer of nothing": ("tokenizer.json", written("tokenizer.json", "{}")),
    "tokenizer without a model": ("tokenizer.json", changed("tokenizer.json", model={"type": "BPE"})),
    "tokenizer is a list": ("tokenizer.json", written("tokenizer.json", "[]")),
    "tokenizer config cut off": ("tokenizer_config.json", halved("tokenizer_config.json")),
    "tokenizer config is a list": ("tokenizer_config.json", written("tokenizer_config.json", "[]")),
    "no tokenizer": ("tokenizer.json", lambda f: [path.unlink() for path in f.glob("tokenizer*")]),
    "generation config cut off": ("generation_config.json", halved("generation_config.json")),
}


@pytest.mark.parametrize(("name", "edit"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_named(folder: Path, name: str, edit: Edit) -> None:
    edit(folder)
    error = refused(folder)
    assert name in error.message
    assert str(folder) in error.message


def test_a_whole_folder_is_opened_and_loaded(folder: Path) -> None:
    source = open_model(str(folder))
    model = load_weights(source, torch.float32, torch.device("cpu"))
    stored = load_file(folder / "model.safetensors")
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in stored.items())


def test_weights_in_several_files(folder: Path) -> None:
    whole = load_file(folder / "model.safetensors")
    names = sorted(whole)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: whole[name] for name in part}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    model = load_weights(open_model(str(folder)), torch.float32, torch.device("cpu"))
    assert torch.equal(model.state_dict()[names[-1]], whole[names[-1]])
    halved("b.safetensors")(folder)
    assert "b.safetensors` is damaged or was cut off" in refused(folder).message
    (folder / "b.safetensors").unlink()
    assert "lacks ['b.safetensors']" in refused(folder).message


def test_weights_damaged_after_they_were_checked(folder: Path) -> None:
    source = open_model(str(folder))
    halved("model.safetensors")(folder)
    with pytest.raises(ModelError, match=r"cannot be loaded: .*not fully covered") as caught:
        load_weights(source, torch.float32, torch.device("cpu"))
    assert "download" in caught.value.hint


def test_weights_that_are_not_all_there_are_not_made_up(folder: Path) -> None:
    whole = load_file(folder / "model.safetensors")
    lacking = {name: value for name, value in whole.items() if name != "model.norm.weight"}
    save_file(lacking, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"do not fit") as caught:
        load_weights(open_model(str(folder)), torch.float32, torch.device("cpu"))
    assert caught.value.message.endswith("its config.json: model.norm.weight is missing")


def test_weights_of_another_shape(folder: Path) -> None:
    changed("config.json", intermediate_size=96)(folder)
    with pytest.raises(ModelError, match=r"mlp\.down_proj\.weight \(64, 128\) != \(64, 96\) and 5 more"):
        load_weights(open_model(str(folder)), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("token", ["x", 1.5, True])
def test_an_end_token_that_is_no_number(folder: Path, token: Any) -> None:
    changed("generation_config.json", eos_token_id=token)(folder)
    assert "end token" in refused(folder).message


SMALL: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
LEFT_OUT = {
    "granite": (lambda: GraniteConfig(**SMALL, logits_scaling=8.0), "logits_scaling 8.0"),
    "cohere": (lambda: CohereConfig(**SMALL), "logit_scale 0.0625"),
    "phi": (lambda: PhiConfig(**SMALL), "a bias in its output head"),
    "phimoe": (lambda: PhimoeConfig(**SMALL, lm_head_bias=True), "a bias in its output head"),
    "gemma2": (lambda: Gemma2Config(**SMALL), "final_logit_softcapping 30"),
    "gemma2 scores": (lambda: Gemma2Config(**SMALL, final_logit_softcapping=None), "attn_logit_softcapping 50"),
    "gpt_oss": (lambda: GptOssConfig(**SMALL, layer_types=["full_attention"]), "attention sinks"),
}


@pytest.mark.parametrize(("make", "setting"), LEFT_OUT.values(), ids=LEFT_OUT.keys())
def test_what_the_log_probabilities_leave_out_is_refused(
    folder: Path, make: Callable[[], PretrainedConfig], setting: str
) -> None:
    config = make()
    config.save_pretrained(folder)
    error = refused(folder)
    assert f"`{config.model_type}`" in error.message
    assert setting in error.message
    assert "another model" in error.hint


@pytest.mark.parametrize(
    "make",
    [
        lambda: GraniteConfig(**SMALL, logits_scaling=1.0),
        lambda: CohereConfig(**SMALL, logit_scale=1.0),
        lambda: PhimoeConfig(**SMALL, lm_head_bias=False),
    ],
)
def test_the_same_types_without_the_setting_are_taken(folder: Path, make: Callable[[], PretrainedConfig]) -> None:
    config = make()
    config.save_pretrained(folder)
    assert open_model(str(folder)).config.model_type == config.model_type


@pytest.mark.parametrize("kind", ["gemma3", "gemma3n", "gemma4", "llama4", "qwen3_5", "fuyu"])
def test_a_text_model_inside_of_another_is_refused(folder: Path, kind: str) -> None:
    AutoConfig.for_model(kind).save_pretrained(folder)
    error = refused(folder)
    assert f"`{kind}`" in error.message
    assert "text-only" in error.hint
    with pytest.raises(ModelError, match="takes text alone"):
        prepare(load_config({"model": {"path": str(folder)}}))


@pytest.mark.parametrize(
    ("kind", "lacking"),
    [
        ("gpt2", "no `intermediate_size`"),
        ("mamba", "no `num_attention_heads`"),
        ("recurrent_gemma", "no `max_position_embeddings`"),
        ("gemma3n_text", "has `intermediate_size` ["),
        ("gemma4_text", "has `head_dim` "),
    ],
)
def test_a_config_that_the_plan_cannot_read_is_refused_by_the_dimension(folder: Path, kind: str, lacking: str) -> None:
    config = AutoConfig.for_model(kind)
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):  # refused before the plan looks at anything
        if getattr(config, name, None):
            setattr(config, name, 0.0)
    config.eos_token_id = 1
    config.save_pretrained(folder)
    with pytest.raises(ModelError) as caught:
        prepare(load_config({"model": {"path": str(folder)}}))
    assert f"`{kind}`" in caught.value.message
    assert lacking in caught.value.message
    assert "llama, mistral" in caught.value.hint


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[dict[str, lora.LoraLinear], Path]:
    """Adapters with values of their own, and the folder they were saved in."""
    model = load_weights(open_model(str(tiny_model())), torch.float32, torch.device("cpu"))
    adapters = lora.inject(model, r=4, alpha=8, target_modules=TARGETS, seed=0)
    torch.manual_seed(0)
    for layer in adapters.values():
        torch.nn.init.normal_(layer.lora_B)
    lora.save_adapter(adapters, tmp_path / "adapter", base_model="tiny")
    return adapters, tmp_path / "adapter"


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DAMAGED_ADAPTER = {
    "weights cut off": (WEIGHTS, halved(WEIGHTS)),
    "empty weights": (WEIGHTS, written(WEIGHTS, "")),
    "no weights": (WEIGHTS, lambda f: (f / WEIGHTS).unlink()),
    "config cut off": (CONFIG, halved(CONFIG)),
    "config is a list": (CONFIG, written(CONFIG, "[]")),
    "config is empty": (CONFIG, written(CONFIG, "")),
    "no config": (CONFIG, lambda f: (f / CONFIG).unlink()),
    "rank 0": (CONFIG, changed(CONFIG, r=0)),
    "rank is text": (CONFIG, changed(CONFIG, r="x")),
    "alpha is text": (CONFIG, changed(CONFIG, lora_alpha="x")),
    "alpha is null": (CONFIG, changed(CONFIG, lora_alpha=None)),
    "another kind of adapter": (CONFIG, changed(CONFIG, peft_type="IA3")),
    "an unknown kind of adapter": (CONFIG, changed(CONFIG, peft_type="x")),
}


@pytest.mark.parametrize(("name", "edit"), DAMAGED_ADAPTER.values(), ids=DAMAGED_ADAPTER.keys())
def test_a_damaged_adapter_is_named(adapter: tuple[dict[str, lora.LoraLinear], Path], name: str, edit: Edit) -> None:
    adapters, folder = adapter
    edit(folder)
    with pytest.raises(ModelError) as caught:
        lora.load_adapter(adapters, folder)
    assert name in caught.value.message
    assert str(folder) in caught.value.message
    assert "lora.init_from" in caught.value.hint


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_damaged_adapter_shows_before_a_model_is_loaded(
    adapter: tuple[dict[str, lora.LoraLinear], Path], name: str
) -> None:
    halved(name)(adapter[1])
    with pytest.raises(ModelError, match=name):
        lora.check_adapter_folder(adapter[1])


def test_an_adapter_in_the_home_folder(
    adapter: tuple[dict[str, lora.LoraLinear], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters, folder = adapter
    monkeypatch.setenv("HOME", str(folder.parent))
    saved = {name: layer.lora_B.detach().clone() for name, layer in adapters.items()}
    for layer in adapters.values():
        torch.nn.init.zeros_(layer.lora_B)
    lora.load_adapter(adapters, Path("~/adapter"))
    assert all(torch.equal(layer.lora_B, saved[name]) for name, layer in adapters.items())
