"""Model folders: what is in them, the tokenizer, and a model built without weights or with its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that has been found, with what is needed before any weight is read."""

    path: str
    config: Any
    """transformers' PretrainedConfig."""
    tokenizer: Any
    stop_token_ids: tuple[int, ...]
    """What ends a completion: the end tokens of the generation config, the model config and the tokenizer."""


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a config name such as `bfloat16`."""
    return _DTYPES[name]


def open_model(path: str) -> ModelSource:
    """Read the config and tokenizer of a folder or hub id.

    Raises ModelError when the folder is missing or incomplete, the hub cannot be reached, the architecture is not a
    plain decoder, or the tokenizer would never stop.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = Path(path)
    if folder.is_dir():
        _check_folder(folder)
    elif path.startswith(("/", ".", "~")) or folder.exists():
        raise ModelError(f"model folder `{path}` does not exist", hint="model.path: a folder, a hub id, or `demo`")
    try:
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as e:
        first = str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__
        raise ModelError(
            f"model `{path}` cannot be opened: {first}",
            hint="model.path: check the name, or give the folder of a downloaded model",
        ) from e
    _check_architecture(path, config)
    stops = _stop_token_ids(path, config, tokenizer)
    return ModelSource(path, config, tokenizer, stops)


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        what = sorted(p.name for p in folder.iterdir())[:8]
        raise ModelError(
            f"model folder `{folder}` has no config.json (it holds {what})",
            hint="model.path: give the folder that config.json and the weights lie in",
        )
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        raise ModelError(f"`{folder}/config.json` cannot be read: {e}", hint="download the model again") from e
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        needed = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        missing = sorted(name for name in needed if not (folder / name).is_file())
        if missing:
            raise ModelError(f"model folder `{folder}` lacks {missing}", hint="download the missing weight files")
    elif not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"model folder `{folder}` has no weights (*.safetensors)",
            hint="model.path: safetensors are needed; pickled .bin or .pt files are never read",
        )


def _check_architecture(path: str, config: Any) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"model `{path}` is of type `{config.model_type}`, a text decoder is needed",
            hint="model.path: choose a causal language model such as Llama, Qwen, Mistral or Gemma",
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"model `{path}` is stored quantised, 16 or 32 bit weights are needed",
            hint="model.path: give the unquantised checkpoint",
        )
    if getattr(config, "final_logit_softcapping", None):
        raise ModelError(
            f"model `{path}` caps its logits (final_logit_softcapping), which the chunked log-probabilities leave out",
            hint="model.path: choose a model without logit soft-capping",
        )


def _stop_token_ids(path: str, config: Any, tokenizer: Any) -> tuple[int, ...]:
    from transformers import GenerationConfig

    try:
        generation = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        generation = None
    stops: list[int] = []
    for source in (generation, tokenizer.eos_token_id, getattr(config, "eos_token_id", None)):
        ids = source if isinstance(source, list | tuple) else [source]
        stops += [int(i) for i in ids if i is not None and int(i) not in stops]
    if not stops:
        raise ModelError(
            f"model `{path}` names no end token, so no completion would ever stop",
            hint="set eos_token in the model's tokenizer_config.json or generation_config.json",
        )
    return tuple(stops)


def build_on_meta(source: ModelSource, dtype: torch.dtype) -> torch.nn.Module:
    """Build the model with parameters on the meta device (no memory) and real, computed buffers."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(source.config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()  # type: ignore[no-any-return]


def load_weights(source: ModelSource, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """Load the model with its own weights, for the transformers engine."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype, attn_implementation="sdpa")
    except OSError as e:
        first = str(e).strip().splitlines()[0][:200]
        raise ModelError(f"weights of `{source.path}` cannot be read: {first}", hint="download the model again") from e
    return model.to(device).eval()  # type: ignore[no-any-return]
