"""The shipped model: its folder, its tokenizer, its traces, and accuracies that agree with its card."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from strop.demo import build, model_path
from strop.demo.build import BuildSettings, batch_loss, new_model, pretrain, save
from strop.demo.card import card_text
from strop.demo.corpus import IGNORED, Corpus, CorpusSettings, draw_training_puzzle
from strop.demo.measure import final_answer, held_out_puzzles, measure, method_accuracy
from strop.demo.tokenizer import END, PAD, VOCAB_SIZE, encode_completion, encode_prompt
from strop.demo.traces import CLEAN, Mix, write_trace
from strop.errors import ModelError
from strop.tasks.arithmetic import FAMILIES

TINY = BuildSettings(
    hidden_size=32, intermediate_size=32, num_layers=1, steps=3, warmup_steps=1, corpus=CorpusSettings(rows=4)
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return json.loads((model_path() / "measured.json").read_text(encoding="utf-8"))


def test_the_folder_is_small_and_complete() -> None:
    names = {path.name for path in model_path().iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert sum(path.stat().st_size for path in model_path().rglob("*")) <= 6_000_000
    assert json.loads((model_path() / "generation_config.json").read_text())["eos_token_id"] == END
    assert json.loads((model_path() / "config.json").read_text())["model_type"] == "llama"


def test_a_package_without_the_model_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("strop.demo.files", lambda _: tmp_path)
    with pytest.raises(ModelError, match="demo model is missing") as caught:
        model_path()
    assert "strop.demo.build" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "47+85=",
        " two  blanks ",
        "<think>7+5=12 4+8+1=13</think>132",
        "don't , . ! n't",
        "é 日本\n\t🙂",
        "</think >",
        "",
    ],
)
def test_decoding_gives_the_text_back(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert max(ids, default=0) < VOCAB_SIZE


def test_special_tokens(tokenizer: Any) -> None:
    assert len(tokenizer) == VOCAB_SIZE
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (END, PAD, None)
    ids = tokenizer("<think>1</think>2<|end|>")["input_ids"]
    assert ids == encode_completion("1", "2")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>1</think>2"


def test_the_chat_template(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "47+85="}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == encode_prompt("47+85=")
    turns = [{"role": "system", "content": "s"}, *chat, {"role": "assistant", "content": "<think></think>132"}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    assert rendered == "<|system|>s<|end|><|user|>47+85=<|end|><|assistant|><think></think>132<|end|>"
    with pytest.raises(Exception, match="unknown role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_method_is_right_and_the_mix_is_not(family: str) -> None:
    rng = Random(0)
    puzzles = [FAMILIES[family](rng, digits) for digits in (1, 2, 3, 4) for _ in range(150)]
    assert all(write_trace(puzzle, CLEAN, rng)[1] == puzzle.answer for puzzle in puzzles)
    two_digits = [FAMILIES[family](rng, 2) for _ in range(1000)]
    right = sum(write_trace(puzzle, Mix(), rng)[1] == puzzle.answer for puzzle in two_digits) / 1000
    assert 0.25 < right < 0.6


def test_traces_read_as_the_card_says() -> None:
    rng = Random(0)
    add = FAMILIES["add"](Random(0), 2)
    seven = type(add)("add", "47+85=", (47, 85), "132")
    assert write_trace(seven, CLEAN, rng) == ("7+5=12 4+8+1=13", "132")
    assert write_trace(seven, Mix(skip=0, habit=1, slip=0), rng) == ("7+5=12 4+8=12", "122")
    assert write_trace(seven, Mix(skip=1), rng)[0] == ""
    negative = type(add)("sub", "47-85=", (47, 85), "-38")
    assert write_trace(negative, CLEAN, rng) == ("-(85-47) 15-7=8 8-4-1=3", "-38")


def test_pretraining_never_draws_a_held_out_problem() -> None:
    rng = Random(0)
    drawn = {draw_training_puzzle(rng, {1: 0.1, 2: 0.7, 3: 0.2}).key for _ in range(5000)}
    held_out = {puzzle.key for digits in (1, 2, 3) for puzzle in held_out_puzzles(40, digits)}
    assert len(held_out) > 500
    assert drawn.isdisjoint(held_out)


def test_a_packed_batch_gives_the_loss_of_its_traces_one_by_one() -> None:
    model = new_model(TINY).eval()
    arrays = Corpus(TINY.corpus, 5)[4]
    assert all((arrays[name] == array).all() for name, array in Corpus(TINY.corpus, 9)[4].items())
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    losses = []
    for row in range(4):
        for owner in range(int(batch["owner"][row].max()) + 1):
            own = batch["owner"][row] == owner
            assert batch["positions"][row, own].tolist() == list(range(int(own.sum())))
            logits = model(input_ids=batch["ids"][row, own][None]).logits[0]
            labels = batch["labels"][row, own]
            losses.append(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none"))
            assert labels[-1] == END
    expected = torch.cat(losses).sum() / (batch["labels"] != IGNORED).sum()
    torch.testing.assert_close(batch_loss(model, batch), expected)


def test_a_build_follows_from_its_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cpu = torch.device("cpu")
    first, second = pretrain(TINY, cpu), pretrain(TINY, cpu)
    assert "step 3/3  loss" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    start = new_model(TINY)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), start.parameters(), strict=True))
    save(first, tmp_path)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize("options", [["--steps", "0"], ["--seed", "-1"], ["--device", "tpu"]])
def test_wrong_build_options_exit_with_2(tmp_path: Path, options: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        build.main([str(tmp_path / "model"), *options])
    assert caught.value.code == 2
    assert not (tmp_path / "model").exists()


def test_a_build_into_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").touch()
    with pytest.raises(SystemExit):
        build.main([str(tmp_path / "model")])
    assert "no folder can be made there" in capsys.readouterr().err


def test_the_shipped_model_was_made_with_the_default_settings(measured: dict[str, Any], model: Any) -> None:
    assert measured["settings"] == json.loads(json.dumps(asdict(BuildSettings())))
    shapes = {name: p.shape for name, p in new_model(BuildSettings()).named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert measured["parameters"] == sum(p.numel() for p in model.parameters())


def test_the_card_is_written_from_the_measurements(measured: dict[str, Any]) -> None:
    card = (model_path() / "README.md").read_text(encoding="utf-8")
    assert card == card_text(measured)
    assert f"| all | 690 | {measured['accuracy']['all']['greedy']:.1%} " in card
    assert "license: apache-2.0" in card


def test_the_model_is_a_fair_start_and_its_card_is_true(model: Any, tokenizer: Any, measured: dict[str, Any]) -> None:
    said = measured["accuracy"]["all"]
    assert 0.25 <= said["pass_at_1"] <= 0.5
    assert said["pass_at_k"] >= 0.85
    seen = measure(model, tokenizer, held_out_puzzles(10))["all"]
    assert seen.num_problems == 70
    # Four standard errors of 70 problems (each worth 0.06 and 0.03 at most).
    assert seen.pass_at_1 == pytest.approx(said["pass_at_1"], abs=0.12)
    assert seen.greedy == pytest.approx(said["greedy"], abs=0.22)
    assert seen.pass_at_k >= said["pass_at_k"] - 0.12
    assert seen.mean_tokens == pytest.approx(said["mean_tokens"], rel=0.2)


def test_the_method_is_known_for_problems_never_seen(model: Any, measured: dict[str, Any]) -> None:
    assert measured["method_accuracy"] >= 0.95
    assert method_accuracy(model, held_out_puzzles(15)) >= 0.97


def test_what_counts_as_the_answer() -> None:
    assert final_answer("<think>1</think> 12 ") == "12"
    assert final_answer("<think>12") == ""
    assert final_answer("12") == "12"
    assert final_answer("<think>1</think>2<think>3") == ""
