"""Model folders: what is in them, the tokenizer, and a model built without weights or with its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_AGAIN = "download the model again"
_JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
               "special_tokens_map.json", "added_tokens.json", "vocab.json")  # fmt: skip
_ORDINARY = "model.path: choose another model, such as Llama, Qwen or Mistral"
_CAPS = ("final_logit_softcapping", "attn_logit_softcapping")
_SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")
_HEAD_BIAS_TYPES = frozenset({"phi", "gptj", "codegen", "ctrl"})
_SINK_TYPES = frozenset({"gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash", "deepseek_v4", "hy_v4"})


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that has been found, with what is needed before any weight is read."""

    path: str
    config: Any
    """transformers' PretrainedConfig."""
    tokenizer: Any
    stop_token_ids: tuple[int, ...]
    """What ends a completion: the end tokens of the generation config, the model config and the tokenizer."""
    kept_modules: tuple[str, ...] = ()
    """Modules that a 4-bit checkpoint holds in 16 bit."""
    packed: bool = False
    """Whether the checkpoint holds NF4 in bitsandbytes' form."""


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a config name such as `bfloat16`."""
    return _DTYPES[name]


def open_model(path: str, quantization: str = "none") -> ModelSource:
    """Read the config and tokenizer of a folder or hub id; a packed checkpoint is taken under `quantization: nf4`.

    Raises ModelError when the folder is missing, incomplete or damaged, the hub cannot be reached, the architecture is
    not a plain decoder, or the tokenizer would never stop.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = Path(path)
    if folder.is_dir():
        _check_folder(folder)
    elif path.startswith(("/", ".", "~")) or folder.exists():
        raise ModelError(f"model folder `{path}` does not exist", hint="model.path: a folder, a hub id, or `demo`")
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as e:  # a wrong value in config.json raises whatever the model's config class runs into
        what = f"`{folder}/config.json` cannot be used" if folder.is_dir() else f"model `{path}` cannot be opened"
        raise ModelError(
            f"{what}: {_reason(e)}", hint="model.path: check the name, or give the folder of a downloaded model"
        ) from e
    _check_architecture(path, config)
    kept = _kept_modules(path, config, quantization)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        usable = bool(tokenizer("1 a", add_special_tokens=False)["input_ids"])
    except Exception as e:  # tokenizers raises bare Exceptions
        raise ModelError(
            f"the tokenizer of `{path}` cannot be read (tokenizer.json, tokenizer_config.json): {_reason(e)}",
            hint=_AGAIN,
        ) from e
    if not usable:
        raise ModelError(
            f"the tokenizer of `{path}` knows no words; tokenizer.json or its vocabulary is missing", hint=_AGAIN
        )
    stops = _stop_token_ids(path, config, tokenizer)
    return ModelSource(path, config, tokenizer, stops, kept or (), packed=kept is not None)


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        what = sorted(p.name for p in folder.iterdir())[:8]
        raise ModelError(
            f"model folder `{folder}` has no config.json (it holds {what})",
            hint="model.path: give the folder that config.json and the weights lie in",
        )
    for name in _JSON_FILES:
        if (folder / name).is_file():
            read_json_object(folder / name, hint=_AGAIN)
    index = folder / "model.safetensors.index.json"
    weights = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        named = read_json_object(index, hint=_AGAIN).get("weight_map")
        if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
            raise ModelError(f"`{index}` has no weight_map from tensors to files", hint=_AGAIN)
        missing = sorted({name for name in named.values() if not (folder / name).is_file()})
        if missing:
            raise ModelError(f"model folder `{folder}` lacks {missing}", hint="download the missing weight files")
    elif not weights:
        raise ModelError(
            f"model folder `{folder}` has no weights (*.safetensors)",
            hint="model.path: safetensors are needed; pickled .bin or .pt files are never read",
        )
    for file in weights:
        check_safetensors(file, hint=_AGAIN)


def read_json_object(path: Path, *, hint: str) -> dict[str, Any]:
    """Return a JSON file's object. Raises ModelError naming the file when it is damaged or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as e:
        raise ModelError(f"`{path}` cannot be read: {_reason(e)}", hint=hint) from e
    if not isinstance(value, dict):
        raise ModelError(f"`{path}` holds a {type(value).__name__}, a JSON object is needed", hint=hint)
    return value


def check_safetensors(path: Path, *, hint: str) -> None:
    """Read a weight file's header and compare it with the file's length. Raises ModelError naming a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as e:
        raise ModelError(f"`{path}` is damaged or was cut off: {_reason(e)}", hint=hint) from e


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:200] or type(error).__name__


def _check_architecture(path: str, config: Any) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"model `{path}` is of type `{config.model_type}`, a text decoder is needed",
            hint="model.path: choose a causal language model such as Llama, Qwen, Mistral or Gemma",
        )
    if config.get_text_config() is not config:
        raise ModelError(
            f"model `{path}` is of type `{config.model_type}`, a text decoder inside of a model for other inputs as "
            "well; one that takes text alone is needed",
            hint="model.path: give a text-only checkpoint, whose config.json names a model_type such as "
            "gemma3_text, llama, mistral, qwen2 or qwen3",
        )
    for left_out in _left_out(config):
        raise ModelError(
            f"model `{path}` is of type `{config.model_type}` with {left_out}, which the trainer's log-probabilities "
            "would leave out",
            hint=_ORDINARY,
        )


def _kept_modules(path: str, config: Any, quantization: str) -> tuple[str, ...] | None:
    """Return what a 4-bit checkpoint left in 16 bit, None for an ordinary one.

    Raises ModelError for a packed one that is not wanted or of another kind.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    given: dict[str, Any] = stored if isinstance(stored, dict) else stored.to_dict()
    method = given.get("quant_method") or ("bitsandbytes" if given.get("load_in_4bit") else "unknown")
    fits = method == "bitsandbytes" and given.get("load_in_4bit") and given.get("bnb_4bit_quant_type") == "nf4"
    if quantization != "nf4" or not fits:
        how = "8 bits" if given.get("load_in_8bit") else given.get("bits", "unknown")
        kind = f"{method}, {given.get('bnb_4bit_quant_type', how)}"
        raise ModelError(
            f"model `{path}` is stored quantised ({kind}), 16 or 32 bit weights are needed"
            + ("" if fits else "; of packed ones, bitsandbytes' NF4 under model.quantization nf4"),
            hint="model.quantization: nf4 trains it as it is" if fits else "model.path: give the 16-bit checkpoint",
        )
    if given.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        raise ModelError(
            f"model `{path}` stores NF4 in {given['bnb_4bit_quant_storage']}, uint8 is needed",
            hint="model.path: give the 16-bit checkpoint; it is packed while it is read",
        )
    # The engine is told by its own settings, and transformers would look for bitsandbytes.
    del config.quantization_config
    return tuple(given.get("llm_int8_skip_modules") or ())


def _left_out(config: Any) -> Iterator[str]:
    """Yield what the packed attention and the chunked log-probabilities do not compute, as far as a config tells."""
    yield from (f"{name} {getattr(config, name)}" for name in _CAPS if getattr(config, name, None))
    yield from (f"{name} {getattr(config, name)}" for name in _SCALES if getattr(config, name, None) not in (None, 1))
    if config.model_type in _HEAD_BIAS_TYPES or getattr(config, "lm_head_bias", False):
        yield "a bias in its output head"
    if config.model_type in _SINK_TYPES:
        yield "attention sinks"


def _stop_token_ids(path: str, config: Any, tokenizer: Any) -> tuple[int, ...]:
    from transformers import GenerationConfig

    try:
        generation = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        generation = None
    stops: list[int] = []
    for source in (generation, tokenizer.eos_token_id, getattr(config, "eos_token_id", None)):
        ids = source if isinstance(source, list | tuple) else [source]
        odd = [i for i in ids if i is not None and (isinstance(i, bool) or not isinstance(i, int))]
        if odd:
            raise ModelError(
                f"model `{path}` has the end token {odd[0]!r}, a whole number is needed",
                hint="set eos_token_id in the model's generation_config.json or config.json",
            )
        stops += [i for i in ids if i is not None and i not in stops]
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
    """Load the model with its own weights, for the transformers engine.

    Raises ModelError when they cannot be read, do not fit config.json, or are not all there.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise ModelError(f"weights of `{source.path}` cannot be loaded: {_reason(e)}", hint=_AGAIN) from e
    model, report = loaded
    # transformers would go on with random values for either.
    wrong = sorted(f"{name} {tuple(stored)} != {tuple(ours)}" for name, stored, ours in report["mismatched_keys"])
    wrong += sorted(f"{name} is missing" for name in report["missing_keys"])
    if wrong:
        raise ModelError(
            f"weights of `{source.path}` do not fit its config.json: {wrong[0]}"
            + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""),
            hint=_AGAIN,
        )
    return model.to(device).eval()  # type: ignore[no-any-return]
