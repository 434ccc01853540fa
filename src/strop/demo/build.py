"""Build the demo model from nothing: `python -m strop.demo.build OUT`.

Pretrains a small Llama on generated traces, saves it as an ordinary model folder, measures it on held-out problems and
writes the model card. The result depends on the settings alone, up to the float order of the device.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from .card import card_text, table
from .corpus import IGNORED, Corpus, CorpusSettings
from .measure import held_out_puzzles, measure, method_accuracy
from .tokenizer import END, MAX_LENGTH, PAD, VOCAB_SIZE, build_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

SAMPLES = 8
"""Completions per held-out problem when the model is measured."""


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """Architecture and training. The defaults made the shipped model."""

    hidden_size: int = 96
    intermediate_size: int = 384
    num_layers: int = 3
    head_size: int = 32
    steps: int = 6000
    learning_rate: float = 3e-3
    warmup_steps: int = 200
    weight_decay: float = 0.05
    seed: int = 0
    corpus: CorpusSettings = field(default_factory=CorpusSettings)


def new_model(settings: BuildSettings) -> LlamaForCausalLM:
    """Return an untrained float32 model whose initial values follow from the seed."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    heads = settings.hidden_size // settings.head_size
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=settings.head_size,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=PAD,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=PAD)
    return model


def learning_rate(settings: BuildSettings, step: int) -> float:
    """Return the rate of one step: linear warm-up, then a half cosine down to a hundredth of the peak."""
    warmup = min(1.0, (step + 1) / settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return settings.learning_rate * warmup * (0.01 + 0.99 * cosine)


def batch_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean cross entropy of the completions of one packed batch (see `corpus.Corpus`)."""
    ids_BT, owner_BT = batch["ids"], batch["owner"]
    length = ids_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=ids_BT.device).tril()
    visible_B1TT = (owner_BT[:, None, :, None] == owner_BT[:, None, None, :]) & causal_TT
    logits_BTV = model(
        input_ids=ids_BT, position_ids=batch["positions"], attention_mask=visible_B1TT, use_cache=False
    ).logits
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=IGNORED)


def pretrain(
    settings: BuildSettings, device: torch.device, *, workers: int = 0, log_every: int = 100
) -> LlamaForCausalLM:
    """Return the trained model on `device`, in float32; prints loss and speed every `log_every` steps."""
    model = new_model(settings)
    cast(torch.nn.Module, model).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=settings.weight_decay, fused=device.type == "cuda"
    )
    loader = DataLoader(
        Corpus(settings.corpus, settings.steps),
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    begun = time.perf_counter()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    for step, batch in enumerate(loader):
        loss = batch_loss(model, {name: array.to(device, non_blocking=True) for name, array in batch.items()})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % log_every == 0 or step + 1 == settings.steps:
            seconds = time.perf_counter() - begun
            print(
                f"step {step + 1}/{settings.steps}  loss {loss.item():.4f}  {seconds:.0f} s, "
                f"{seconds / (step + 1) * (settings.steps - step - 1):.0f} s to go",
                flush=True,
            )
    torch.set_float32_matmul_precision(precision)
    return model


def save(model: LlamaForCausalLM, out: Path) -> None:
    """Write weights (rounded to bfloat16, which `model` is set to as well), configuration and tokenizer into `out`."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    model.eval()
    cast(torch.nn.Module, model).to(torch.bfloat16)
    model.save_pretrained(out)
    model.float()
    (out / "model.safetensors").chmod(0o644)
    build_tokenizer().save_pretrained(out)
    settings_file = out / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings_file.write_text(json.dumps(settings, indent=2) + "\n")


def build(out: Path, settings: BuildSettings, device: torch.device) -> None:
    """Pretrain, save, measure and write the card."""
    begun = time.perf_counter()
    workers = min(8, (os.cpu_count() or 1) - 1) if device.type == "cuda" else 0
    model = pretrain(settings, device, workers=workers)
    save(model, out)
    seconds = time.perf_counter() - begun
    name = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
    print(f"trained in {seconds:.0f} s on {name}; measuring", flush=True)
    print(describe(model, out, settings, seconds=seconds, device_name=name))


def describe(
    model: LlamaForCausalLM,
    out: Path,
    settings: BuildSettings,
    *,
    seconds: float,
    device_name: str,
    problems_per_family: int = 100,
) -> str:
    """Measure a saved model, write `measured.json` and the card beside it, and return the table of accuracies."""
    tokenizer, puzzles = build_tokenizer(), held_out_puzzles(problems_per_family)
    accuracy = measure(model, tokenizer, puzzles, k=SAMPLES)
    others = {
        difficulty: measure(model, tokenizer, held_out_puzzles(problems_per_family // 5, difficulty), k=SAMPLES)["all"]
        for difficulty in (1, 3, 4)
    }
    measured = {
        "accuracy": {name: value.as_dict() for name, value in accuracy.items()},
        "pass_at_1_of_other_difficulties": {d: round(value.pass_at_1, 4) for d, value in others.items()},
        "method_accuracy": round(method_accuracy(model, puzzles), 4),
        "difficulty": 2,
        "k": SAMPLES,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "context": MAX_LENGTH,
        "seconds": round(seconds),
        "device": device_name,
        "settings": asdict(settings),
    }
    text = json.dumps(measured, indent=2)
    (out / "measured.json").write_text(text + "\n", encoding="utf-8")
    # Read back, so that the card follows from the file and from nothing else.
    (out / "README.md").write_text(card_text(json.loads(text)), encoding="utf-8")
    return table(measured["accuracy"], SAMPLES)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and build; a wrong option exits with 2 and says what is needed."""
    defaults = BuildSettings()
    parser = argparse.ArgumentParser(prog="python -m strop.demo.build", description="Rebuild the demo model.")
    parser.add_argument("out", type=Path, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.seed < 0:
        parser.error(f"--steps {args.steps} --seed {args.seed}: at least 1 step and a seed of 0 or more are needed")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no usable CUDA card; use --device cpu or auto")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        parser.error(f"{args.out}: no folder can be made there: {e.strerror}")
    use_cuda = args.device != "cpu" and torch.cuda.is_available()
    settings = BuildSettings(steps=args.steps, seed=args.seed, corpus=CorpusSettings(seed=args.seed))
    build(args.out, settings, torch.device("cuda" if use_cuda else "cpu"))


if __name__ == "__main__":
    main()
