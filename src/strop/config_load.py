"""From a YAML file and `--set` options to a checked `Config`, with messages that name the setting to change."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from .config import Config
from .errors import ConfigError
from .types import REWARD_FORMS

TRL_NAMES: Mapping[str, str] = {
    "model_name_or_path": "model.path",
    "dtype": "model.dtype",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_target_modules": "lora.target_modules",
    "dataset_name": "task.path",
    "dataset_config": "task.dataset_config",
    "dataset_train_split": "task.train_split",
    "dataset_test_split": "task.eval_split",
    "max_prompt_length": "task.max_prompt_length",
    "chat_template_kwargs": "task.chat_template_kwargs",
    "reward_funcs": "rewards.funcs",
    "reward_weights": "rewards.weights",
    "num_generations": "rollout.num_generations",
    "max_completion_length": "rollout.max_completion_length",
    "temperature": "rollout.temperature",
    "top_p": "rollout.top_p",
    "top_k": "rollout.top_k",
    "min_p": "rollout.min_p",
    "repetition_penalty": "rollout.repetition_penalty",
    "loss_type": "objective.loss_type",
    "scale_rewards": "objective.scale_rewards",
    "epsilon": "objective.epsilon",
    "epsilon_high": "objective.epsilon_high",
    "beta": "objective.beta",
    "mask_truncated_completions": "objective.mask_truncated_completions",
    "vllm_importance_sampling_mode": "objective.importance_sampling_mode",
    "vllm_importance_sampling_clip_max": "objective.importance_sampling_clip_max",
    "learning_rate": "optim.learning_rate",
    "lr_scheduler_type": "optim.lr_scheduler_type",
    "warmup_steps": "optim.warmup_steps",
    "weight_decay": "optim.weight_decay",
    "adam_beta1": "optim.adam_beta1",
    "adam_beta2": "optim.adam_beta2",
    "adam_epsilon": "optim.adam_epsilon",
    "max_grad_norm": "optim.max_grad_norm",
    "output_dir": "run.out",
    "max_steps": "run.max_steps",
    "seed": "run.seed",
    "save_steps": "run.save_steps",
    "save_total_limit": "run.save_total_limit",
    "eval_steps": "run.eval_steps",
    "num_generations_eval": "run.eval_num_generations",
    "report_to": "run.report_to",
    "engine": "model.engine",
    "vram_gib": "run.vram_gib",
}
"""TRL's flat names (and two of ours) that are taken at the top level of a config, and where they go."""

NOT_OURS: Mapping[str, str] = {
    "per_device_train_batch_size": "set rollout.num_prompts (problems per step); the micro-batch is planned in tokens, "
    "optim.micro_batch_tokens pins it",
    "gradient_accumulation_steps": "set rollout.num_prompts: a step is num_prompts x num_generations completions, "
    "split into micro-batches of optim.micro_batch_tokens",
    "steps_per_generation": "Strop makes one optimizer step per batch of rollouts; remove the key",
    "generation_batch_size": "set rollout.num_prompts; a step generates num_prompts x num_generations completions",
    "num_iterations": "Strop makes one optimizer step per batch of rollouts; remove the key",
    "use_vllm": "set model.engine to vllm, transformers or auto",
    "vllm_mode": "vLLM always runs inside the training process; remove the key",
    "vllm_gpu_memory_utilization": "set run.vram_gib, the GPU memory that the whole process may use",
    "gpu_memory_utilization": "set run.vram_gib, the GPU memory that the whole process may use",
    "vllm_enable_sleep_mode": "the KV cache is planned beside the training memory (`strop plan`); remove the key",
    "gradient_checkpointing": "the plan checkpoints what it has to; optim.checkpoint_layers pins how many layers",
    "use_peft": "set lora.r (0 trains all weights)",
    "load_in_4bit": "set model.quantization to nf4",
    "load_in_8bit": "set model.quantization to nf4 (4 bits), or model.head to int8 for the output head",
    "num_train_epochs": "set run.max_steps; a step visits rollout.num_prompts problems",
    "load_best_model_at_end": "run.save_best keeps the best checkpoint, which summary.json names; remove the key",
    "resume_from_checkpoint": "use `strop train CONFIG --resume`",
}
"""Names of TRL that have no counterpart, with what to do instead."""


_NEEDED: Mapping[str, str] = {
    "int_type": "a whole number is needed",
    "float_type": "a number is needed",
    "bool_type": "true or false is needed",
    "string_type": "text is needed",
    "tuple_type": "a list is needed",
    "dict_type": "a mapping is needed",
    "model_type": "a mapping of settings is needed",
}
"""What a setting takes, by the type of pydantic's error; its own words are used for the rest."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-5 as text; people write it all the time, so it is a float here."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load_config(source: str | Path | Mapping[str, Any] | Config | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (or take a mapping or a Config), apply `key=value` overrides in order, and check the result.

    Paths stay as written. Raises ConfigError with the file or option, the key, what was given and what is needed or
    the nearest valid name.
    """
    origin = "config"
    if isinstance(source, Config):
        raw: dict[str, Any] = source.model_dump()
    elif source is None:
        raw = {}
    elif isinstance(source, Mapping):
        raw = _plain(source)
    else:
        origin, raw = str(source), _read_yaml(Path(source))
    tree = _move_flat_names(raw, origin)
    origins = {_apply_override(tree, item): f"--set {item}" for item in overrides}
    return _validate(tree, origin, origins)


def dump_config(config: Config) -> str:
    """Return the whole config as YAML, defaults included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def with_absolute_paths(config: Config) -> Config:
    """Return the config with local paths made absolute, so that it means the same from any current directory.

    A path counts as local if something lies there now; `demo`, hub ids, built-in names and modules stay as they are.
    """
    model, task = config.model.path, config.task.path
    has_data = config.task.name in ("gsm8k", "dataset")
    changes = {
        "model": {"path": model if model == "demo" else _absolute(model)},
        "task": {"path": _absolute(task) if has_data and task else task},
        "lora": {"init_from": _absolute(config.lora.init_from) if config.lora.init_from else None},
        "rewards": {"funcs": tuple(_absolute_function(entry) for entry in config.rewards.funcs)},
    }
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=update) for name, update in changes.items()}
    )


def _absolute(path: str) -> str:
    expanded = os.path.expanduser(path)
    return os.path.abspath(expanded) if "\0" not in path and os.path.exists(expanded) else path


def _absolute_function(entry: str) -> str:
    place, form = entry.strip(), ""
    if place.partition(":")[0] in REWARD_FORMS and place.count(":") > 1:
        form, _, place = place.partition(":")
        form += ":"
    target, colon, function = place.rpartition(":")
    return f"{form}{_absolute(target)}{colon}{function}" if target.endswith(".py") else entry


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, old value, new value) for every setting that differs."""
    before, after = dict(_leaves(old.model_dump())), dict(_leaves(new.model_dump()))
    return [
        (key, before.get(key), after.get(key)) for key in sorted(before | after) if before.get(key) != after.get(key)
    ]


def _plain(source: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _plain(v) if isinstance(v, Mapping) else v for k, v in source.items()}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and prefix.count(".") < 1:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError) as e:
        raise ConfigError(
            f"config file `{path}` cannot be read: {e.strerror or e}",
            hint="give the path of a .yaml file, for example recipes/demo.yaml",
        ) from e
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"config file `{path}` cannot be read: {e}", hint="it has to be UTF-8 text") from e
    try:
        loaded = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(
            f"{where}: not valid YAML: {getattr(e, 'problem', None) or e}", hint="check indentation, colons and tags"
        ) from e
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"config file `{path}` holds a {type(loaded).__name__}, a mapping of sections is needed",
            hint="start with a line such as `task:`",
        )
    return loaded


def _move_flat_names(raw: dict[str, Any], origin: str) -> dict[str, Any]:
    """Put TRL's flat names into their sections; refuse names that mean nothing here, with what to do instead."""
    sections = Config.model_fields
    tree: dict[str, Any] = {k: (dict(v) if isinstance(v, Mapping) else v) for k, v in raw.items() if k in sections}
    for key, value in raw.items():
        if key in sections:
            continue
        if key in NOT_OURS:
            raise ConfigError(f"{origin}: `{key}` is not a setting of Strop", hint=NOT_OURS[key])
        if key not in TRL_NAMES:
            raise _unknown(origin, str(key), [*sections, *TRL_NAMES])
        section, name = TRL_NAMES[key].split(".")
        target = tree.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(
                f"{origin}: `{section}` has to be a mapping", hint=f"write `{section}:` and its keys below"
            )
        if name in target:
            raise ConfigError(
                f"{origin}: `{key}` and `{section}.{name}` are the same setting and both are given",
                hint=f"keep `{section}.{name}`",
            )
        target[name] = _trl_value(key, value)
    return tree


def _trl_value(key: str, value: Any) -> Any:
    """TRL takes true and false for scale_rewards as well."""
    if key == "scale_rewards" and isinstance(value, bool):
        return "group" if value else "none"
    return value


def _apply_override(tree: dict[str, Any], item: str) -> str:
    """Put the value into the tree and return `section.name` of the setting."""
    given, separator, text = item.partition("=")
    given = given.strip()
    if not separator or not given:
        raise ConfigError(f"--set {item}: `section.key=value` is needed", hint="for example --set run.max_steps=20")
    key = TRL_NAMES.get(given, given)
    if key in NOT_OURS:
        raise ConfigError(f"--set {item}: `{key}` is not a setting of Strop", hint=NOT_OURS[key])
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as e:
        raise ConfigError(f"--set {item}: the value is not valid YAML", hint="put quotes around special signs") from e
    *parents, last = key.split(".")
    if not parents:
        raise _unknown(f"--set {item}", key, [*TRL_NAMES, *(k for k, _ in _leaves(Config().model_dump()))])
    if parents[0] not in Config.model_fields:
        raise _unknown(f"--set {item}", parents[0], [*Config.model_fields, *TRL_NAMES])
    node = tree
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {item}: `{part}` has no keys below it", hint="use `section.key=value`")
        node = child
    node[last] = _trl_value(given, value)
    return ".".join(key.split(".")[:2])


def _validate(tree: dict[str, Any], origin: str, origins: Mapping[str, str]) -> Config:
    """Check the tree; `origins` names the `--set` option that a setting comes from."""
    try:
        return Config.model_validate(tree)
    except ValidationError as e:
        error = e.errors()[0]
        location = [str(part) for part in error["loc"]]
        origin = origins.get(".".join(location[:2]), origin)
        if error["type"] == "extra_forbidden":
            raise _unknown(origin, ".".join(location), _names_beside(location)) from e
        where = ".".join(location) or "config"
        message = _NEEDED.get(error["type"], error["msg"].removeprefix("Value error, "))
        given = "" if isinstance(error["input"], dict | BaseModel) else f"{_shown(error['input'])} given; "
        others = f" ({len(e.errors()) - 1} more)" if len(e.errors()) > 1 else ""
        raise ConfigError(f"{origin}: `{where}`: {given}{message}{others}", hint=_field_hint(location)) from e


def _shown(value: Any) -> str:
    """A value as YAML spells it, text in quotes, so that "20" and 20 are told apart."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _section_model(name: str) -> type[BaseModel] | None:
    field = Config.model_fields.get(name)
    annotation = field.annotation if field else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _names_beside(location: Sequence[str]) -> list[str]:
    section = _section_model(location[0]) if len(location) > 1 else None
    if section is None:
        return [*Config.model_fields, *TRL_NAMES]
    return [f"{location[0]}.{name}" for name in section.model_fields]


def _field_hint(location: Sequence[str]) -> str:
    section = _section_model(location[0]) if location else None
    field = section.model_fields.get(location[1]) if section and len(location) > 1 else None
    if field is None:
        return "change the value in the config, or with --set section.key=value"
    return f"{location[0]}.{location[1]}: {field.description}"


def _unknown(origin: str, key: str, known: Sequence[str]) -> ConfigError:
    leaf = key.rsplit(".", 1)[-1]
    everywhere = [k for k, _ in _leaves(Config().model_dump())]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:
        by_leaf = {k.rsplit(".", 1)[-1]: k for k in [*everywhere, *known]}
        close = [by_leaf[m] for m in difflib.get_close_matches(leaf, list(by_leaf), n=1, cutoff=0.6)]
    hint = f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(sorted(known)[:12])}"
    return ConfigError(f"{origin}: `{key}` is not a known setting", hint=hint)
