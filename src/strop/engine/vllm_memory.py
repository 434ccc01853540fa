"""Giving the KV cache's memory back while the trainer works, and mapping it again: same addresses, so that CUDA graphs
and block tables stay valid.

vLLM's sleep mode releases weights as well, which the trainer's parameters are views of, and with the second model
runner whatever else is allocated beside the cache. Only the cache's own tensors are taken from vLLM's mappable
allocator here.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from ..errors import EngineError

TAG = "strop_kv_cache"


class KvPool:
    """The tensors of the KV cache in memory that can be unmapped. One pool per process, as vLLM's allocator is one."""

    def __init__(self) -> None:
        """Prepare vLLM's allocator. Raises EngineError where vLLM was built without it."""
        from vllm.device_allocator import cumem

        if not cumem.cumem_available:
            raise EngineError(
                "this vLLM has no cumem allocator, which the release of the KV cache needs",
                hint="install the CUDA wheel of vLLM, or set model.engine to transformers",
            )
        self._cumem = cumem
        self._allocator: Any = cumem.CuMemAllocator.get_instance()
        self._tensors: list[torch.Tensor] = []
        self.released = False

    def allocate(self, make: Callable[..., dict[str, torch.Tensor]], *args: Any) -> dict[str, torch.Tensor]:
        """Return what `make` allocates (tensors by layer), from memory that can be unmapped."""
        with self._allocator.use_memory_pool(tag=TAG):
            tensors = make(*args)
        self._tensors = list({t.data_ptr(): t for t in tensors.values()}.values())
        return tensors

    @property
    def num_bytes(self) -> int:
        """Bytes of the cache, rounded up as they were mapped."""
        return sum(data.handle[1] for data in self._allocations())

    def _allocations(self) -> list[Any]:
        return [data for data in self._allocator.pointer_to_data.values() if data.tag == TAG]

    def release(self) -> None:
        """Unmap the cache; its contents are lost. Nothing may be running on the card."""
        if self.released:
            return
        torch.cuda.synchronize()
        for data in self._allocations():
            self._cumem.unmap_and_release(data.handle)
            data.is_asleep = True
        self.released = True

    def restore(self) -> None:
        """Map the cache again, filled with zeros; the trainer's unused blocks are returned first.

        Raises torch.OutOfMemoryError when the card has not enough free memory.
        """
        if not self.released:
            return
        self._make_room()
        for data in self._allocations():
            if not data.is_asleep:  # mapped by an attempt that failed later
                continue
            try:
                self._cumem.create_and_map(data.handle)
            except RuntimeError as e:  # somebody took the memory after it was looked at
                raise torch.OutOfMemoryError(f"the KV cache cannot be mapped: {e}") from e
            data.is_asleep = False
        self.released = False
        # Undefined bytes may read as NaN, and kernels that load whole blocks multiply them by weights of zero.
        with torch.inference_mode():
            for tensor in self._tensors:
                tensor.zero_()

    def _make_room(self) -> None:
        for find_cycles in (False, True):  # the search takes longer than everything else here
            if find_cycles:
                gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info()
            if free >= self.num_bytes:
                return
        raise torch.OutOfMemoryError(
            f"the KV cache needs {self.num_bytes / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free on the card"
        )


def install(pool: KvPool, runner: str) -> Callable[[], None]:
    """Let the KV cache of the next engine come from `pool`; return a function that undoes it.

    Wraps the function of the chosen model runner that allocates the raw tensors: `_allocate_kv_cache` of V2 and
    `GPUModelRunner._allocate_kv_cache_tensors` of V1. Raises EngineError when it has moved.
    """
    if runner == "v2":
        import vllm.v1.worker.gpu.attn_utils as owner

        name = "_allocate_kv_cache"
    else:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner as owner

        name = "_allocate_kv_cache_tensors"
    original = getattr(owner, name, None)
    if original is None:
        raise EngineError(
            f"vLLM has no {owner.__name__}.{name}, which the release of the KV cache has to change",
            hint="install the tested pair of vLLM and torch; `strop doctor` names it",
        )

    def allocate(*args: Any) -> dict[str, torch.Tensor]:
        return pool.allocate(original, *args)

    setattr(owner, name, allocate)
    return lambda: setattr(owner, name, original)
