"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on the linear layers of a model.

    y = x W^T + (x A^T) (s B)^T        A [R, in], B [out, R], s = alpha / R

A and B are fp32 masters whatever the base's dtype; the forward pass uses exactly the values that the engine's slots
hold, A and s B rounded to the base's dtype, so that both compute the same policy. peft is used for its file format
only (`save_adapter`, `load_adapter`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError
from ..seeding import derive_seed
from .load import check_safetensors, read_json_object

_PREFIX = "base_model.model."
_AGAIN = "lora.init_from: download or save the adapter again, or give another folder with a PEFT adapter"


class LoraLinear(torch.nn.Module):
    """A frozen linear layer with a trained adapter beside it.

    `base` is torch's linear layer, or a module that stands for one whose weight is packed: callable, with
    `in_features`, `out_features`, `compute_dtype` (of activations) and `dequantized()`, the weight [out, in].
    """

    def __init__(self, base: Any, r: int, alpha: float, *, seed: int, name: str) -> None:
        super().__init__()
        self.base = base
        self.scale = alpha / r
        self.enabled = True
        device = next(itertools.chain(base.parameters(), base.buffers())).device
        generator = torch.Generator().manual_seed(derive_seed("lora", seed, name))
        # peft's default: Kaiming uniform with a = sqrt(5), that is a bound of 1 / sqrt(fan in).
        bound = 1.0 / math.sqrt(base.in_features)
        start = torch.empty(r, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = torch.nn.Parameter(start.to(device))
        self.lora_B = torch.nn.Parameter(torch.zeros(base.out_features, r, device=device))

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (A, s B) in the base's dtype: what the engine's slot holds and what the forward pass uses."""
        dtype = getattr(self.base, "compute_dtype", None) or self.base.weight.dtype
        return self.lora_A.to(dtype), (self.lora_B * self.scale).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer, with its adapter unless it is switched off."""
        y = self.base(x)
        if not self.enabled:
            return y
        a, b = self.factors()
        return y + torch.nn.functional.linear(torch.nn.functional.linear(x, a), b)


def inject(
    model: torch.nn.Module, *, r: int, alpha: float, target_modules: Sequence[str], seed: int
) -> dict[str, LoraLinear]:
    """Replace each linear layer whose last name is in `target_modules`; return the adapters by full module name.

    Raises ModelError when a target matches no layer.
    """
    found = find_targets(model, target_modules)
    adapters = {}
    for name, module in found.items():
        parent, _, leaf = name.rpartition(".")
        adapters[name] = LoraLinear(module, r, alpha, seed=seed, name=name)
        setattr(model.get_submodule(parent), leaf, adapters[name])
    return adapters


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module is a linear layer, or stands for one whose weight is packed."""
    return isinstance(module, torch.nn.Linear) or hasattr(module, "dequantized")


def find_targets(model: torch.nn.Module, target_modules: Sequence[str]) -> dict[str, torch.nn.Module]:
    """Return the linear layers to adapt by full name. Raises ModelError when a target matches none."""
    wanted = set(target_modules)
    found = {
        name: module
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in wanted and is_linear(module)
    }
    missing = wanted - {name.rsplit(".", 1)[-1] for name in found}
    if missing:
        linears = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if is_linear(m)})
        raise ModelError(
            f"lora.target_modules names {sorted(missing)}, which the model does not have",
            hint=f"lora.target_modules: its linear layers are {linears}",
        )
    return found


@contextmanager
def disabled(adapters: dict[str, LoraLinear]) -> Iterator[None]:
    """Switch all adapters off inside the block."""
    for adapter in adapters.values():
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters.values():
            adapter.enabled = True


def state_dict(adapters: dict[str, LoraLinear]) -> dict[str, torch.Tensor]:
    """Return the fp32 factors under PEFT's names."""
    state = {}
    for name, adapter in adapters.items():
        state[f"{_PREFIX}{name}.lora_A.weight"] = adapter.lora_A.detach().cpu()
        state[f"{_PREFIX}{name}.lora_B.weight"] = adapter.lora_B.detach().cpu()
    return state


def save_adapter(adapters: dict[str, LoraLinear], folder: Path, *, base_model: str) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` as PEFT reads them."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    any_adapter = next(iter(adapters.values()))
    r = any_adapter.lora_A.shape[0]
    targets = sorted({name.rsplit(".", 1)[-1] for name in adapters})
    config = LoraConfig(
        r=r,
        lora_alpha=_whole(any_adapter.scale * r),
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file(state_dict(adapters), folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _whole(value: float) -> Any:
    return round(value) if abs(value - round(value)) < 1e-9 else value


def check_adapter_folder(folder: str | Path) -> Path:
    """Return the weights' file of a PEFT adapter folder. Raises ModelError when there is none, or a damaged one."""
    path = Path(folder).expanduser() / "adapter_model.safetensors"
    config = path.with_name("adapter_config.json")
    if not path.is_file() or not config.is_file():
        raise ModelError(
            f"`{folder}` holds no adapter_model.safetensors with its adapter_config.json",
            hint="lora.init_from: give a folder with a PEFT adapter",
        )
    read_json_object(config, hint=_AGAIN)
    check_safetensors(path, hint=_AGAIN)
    return path


def load_adapter(adapters: dict[str, LoraLinear], folder: Path) -> None:
    """Copy a PEFT adapter into `adapters`. Raises ModelError when it is missing, damaged, or of another shape."""
    from safetensors.torch import load_file

    path = check_adapter_folder(folder)
    stored = load_file(path)
    expected = state_dict(adapters)
    if set(stored) != set(expected):
        odd = sorted(set(stored) ^ set(expected))[:3]
        raise ModelError(
            f"the adapter in `{folder}` is for other layers (for example {odd})",
            hint="lora.target_modules: name the layers that it adapts",
        )
    _check_scale(adapters, path.parent)
    with torch.no_grad():
        for name, adapter in adapters.items():
            for leaf, target in (("lora_A", adapter.lora_A), ("lora_B", adapter.lora_B)):
                source = stored[f"{_PREFIX}{name}.{leaf}.weight"]
                if source.shape != target.shape:
                    raise ModelError(
                        f"the adapter in `{folder}` has {leaf} of shape {tuple(source.shape)} for `{name}`, "
                        f"{tuple(target.shape)} is needed",
                        hint="lora.r: set it to the adapter's rank",
                    )
                target.copy_(source)


def _check_scale(adapters: dict[str, LoraLinear], folder: Path) -> None:
    from peft import LoraConfig

    try:
        config: Any = LoraConfig.from_pretrained(str(folder))
        scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as e:
        raise ModelError(
            f"`{folder}/adapter_config.json` is not the config of a LoRA adapter: {e or type(e).__name__}", hint=_AGAIN
        ) from e
    ours = next(iter(adapters.values())).scale
    if abs(scale - ours) > 1e-9 or config.use_dora:
        raise ModelError(
            f"the adapter in `{folder}` is scaled by {scale:g}{' with DoRA' if config.use_dora else ''}, "
            f"the run by {ours:g}",
            hint=f"lora.alpha: set it to {scale * config.r:g} (lora.r {config.r}); DoRA adapters are not supported",
        )
