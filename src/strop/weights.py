"""The one class through which engine and trainer share tensors.

Invariants, each checked when it matters and each with a test that fails when it is broken:

1. One copy. Every base parameter of the trainer's model is a view into the engine's storage. `unshared_bytes` is 0.
2. Engine storage is written in place, never replaced: kernels and CUDA graphs keep its addresses.
3. Adapters reach the engine by a copy into its resident slots: no disk, no registration, no merge.
4. After the weights changed, nothing computed from the old ones survives: `publish` resets the prefix cache on a
   drained engine, which raises if it is not, and only then counts the new version.
"""

from __future__ import annotations

import torch

from .engine.base import Engine
from .errors import ModelError
from .policy import nf4
from .policy.lora import LoraLinear
from .policy.policy import Policy


def alias_parameters(model: torch.nn.Module, engine: Engine) -> None:
    """Point every parameter of a model built on meta at the engine's storage.

    Raises ModelError naming a parameter that the engine does not have, or has in another shape: then the two would
    not be the same model.
    """
    views = engine.base_views()
    nf4.adopt(model, views, next(model.parameters()).dtype)
    shared: dict[int, torch.nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        view = views.get(name)
        if view is None or view.shape != parameter.shape:
            found = "nothing" if view is None else f"shape {tuple(view.shape)}"
            raise ModelError(
                f"the engine has {found} for `{name}`, shape {tuple(parameter.shape)} is needed to share the weights",
                hint="model.share_weights: copy holds them twice; model.engine: transformers shares them, more slowly",
            )
        # A tied weight is one parameter here as well, or the optimizer would update it twice.
        key = view.data_ptr()
        if key not in shared:
            shared[key] = torch.nn.Parameter(view, requires_grad=False)
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, shared[key])


class SharedWeights:
    """Hands the policy's weights to the engine after each update, and counts versions."""

    def __init__(self, policy: Policy, engine: Engine) -> None:
        """Connect a policy whose base is already aliased; the adapter's first values are published."""
        self._policy, self._engine = policy, engine
        self._slots = engine.adapter_slots()
        self.version = -1
        missing = set(policy.adapters) - set(self._slots) if self._slots else set()
        if missing:
            raise ModelError(
                f"the engine has no adapter slot for {sorted(missing)[:3]}",
                hint="lora.target_modules: leave these layers out, or set model.engine to transformers",
            )
        self.publish()

    def publish(self) -> int:
        """Make the engine generate with the present weights; return the new version.

        Raises EngineError when the engine still runs requests.
        """
        with torch.no_grad():
            for name, slot in self._slots.items():
                adapter: LoraLinear | None = self._policy.adapters.get(name)
                if adapter is not None:
                    a, b = adapter.factors()
                    slot.a_RH.copy_(a)
                    slot.b_HR.copy_(b)
        self._engine.reset_prefix_cache()
        self.version += 1
        return self.version

    def unshared_bytes(self) -> int:
        """Return how many bytes of base parameters lie outside the engine's storage."""
        regions = [
            (v.untyped_storage().data_ptr(), v.untyped_storage().nbytes()) for v in self._engine.base_views().values()
        ]
        adapter_parameters = {id(p) for a in self._policy.adapters.values() for p in (a.lora_A, a.lora_B)}
        outside = 0
        model = self._policy.model
        for tensor in [*model.parameters(), *nf4.quantised_tensors(model)]:
            if id(tensor) in adapter_parameters:
                continue
            start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
            if not any(base <= start and start + size <= base + length for base, length in regions):
                outside += size
        return outside
