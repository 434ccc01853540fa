"""Writing a fully fine-tuned model as an ordinary folder that transformers and vLLM load."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .load import ModelSource


def save_model(model: torch.nn.Module, source: ModelSource, folder: Path) -> None:
    """Write weights, config, generation config and tokenizer; a tied weight is written once."""
    from safetensors.torch import save_file

    # Copies: q, k and v are views of one tensor of the engine, and safetensors refuses shared storage.
    state = {name: p.detach().cpu().clone().contiguous() for name, p in model.named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    # Without an index vLLM reads every safetensors file of the folder, a checkpoint's optimizer too.
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in state.values())},
        "weight_map": dict.fromkeys(state, "model.safetensors"),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    model.config.save_pretrained(folder)  # type: ignore[union-attr, operator]
    source.tokenizer.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.eos_token_id = list(source.stop_token_ids)
        generation.save_pretrained(folder)  # type: ignore[operator]
