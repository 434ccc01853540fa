"""vLLM's second model runner, with decode steps of a rollout as one CUDA graph each: inputs, model, sampling and state.

vLLM captures the model alone; what surrounds it, some thirty kernels launched from Python, took half of a step's time
with a 0.5B model at 128 sequences on an H100 (4.3 ms a step, 2.9 with the whole step in the graph). The state of all
requests lies on the card in this runner, so a step in which each request decodes one token depends on nothing from the
host but which requests take part. Steps of another kind (prompts, or anything vLLM's own scheduler planned) go vLLM's
way. Inside a step the layers are those of `vllm_decode.py` where the model is known there, after they were seen to
compute what vLLM's modules do.

Written against 0.26. Can go when vLLM captures sampling with the model.
"""

# The types of 0.26, which has another `BlockTables` and `capture_model` than the vLLM that a CPU has:
# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode
from vllm.distributed.parallel_state import graph_capture
from vllm.forward_context import set_forward_context
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import AsyncModelRunnerOutput, LogprobsLists, ModelRunnerOutput
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from . import vllm_decode, vllm_lora
from .vllm_kernels import Drawing, prepare
from .vllm_scheduler import DecodeStep

_RING = 4
"""Pinned buffers in turn: a step is planned while one runs, so that two are in flight at most."""
_CHECKED_STEPS = 6
"""Tokens of each request that are decoded both ways at the start; the first alone would hide what attention does."""
_CHECKED_ROWS = 20
"""Requests that are decoded both ways: more than one tile of a kernel, and not all of a graph's rows."""
_FULL_CARD = 0.8
"""Programs per multiprocessor from which on a card is full (FlashAttention 3, `num_splits_heuristic`)."""
_MOST_APART = (0.05, 0.3)
"""`DecodeModel.apart`, of a layer over all rows, and of any row. With a tiny model in fp32 an adapter, positions, the
cache, head norms or a norm's weight that are left out gave 0.06 to 1.0 for the first, right layers 5e-7."""


@dataclass(slots=True)
class _Decoded(AsyncModelRunnerOutput):
    """The result of a step, on its way from the card."""

    ids: list[str]
    pinned: torch.Tensor
    """[2, rows] int32: tokens, and log-probabilities as the bits of fp32."""
    event: torch.cuda.Event

    def get_output(self) -> ModelRunnerOutput:
        """Wait for the step and return it as vLLM's scheduler expects it."""
        self.event.synchronize()
        values = self.pinned.numpy()[:, : len(self.ids)]
        tokens = values[0].copy()
        return ModelRunnerOutput(
            req_ids=self.ids,
            req_id_to_index={name: i for i, name in enumerate(self.ids)},
            sampled_token_ids=tokens[:, None].tolist(),
            logprobs=LogprobsLists(
                tokens[:, None], values[1].copy().view(np.float32)[:, None], np.zeros(len(self.ids), np.int32)
            ),
        )


class RolloutRunner(GPUModelRunner):
    """The runner that an engine on a card is built with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._size_of: list[int] = []
        """Captured size by number of requests."""
        self._rows: list[str] | None = None
        """Whose rows stand in `_control` at present."""
        self._under_way: list[str] | None = None
        self._controls = self._results = 0
        """Turns of the rings."""
        self._layers: vllm_decode.DecodeModel | None = None
        """What runs the layers in a decode step; None: vLLM's modules."""
        self.apart: dict[str, tuple[float, float]] = {}
        """How far its layers were from vLLM's modules, as in `_MOST_APART`, by kind of adapter."""
        self.not_whole: str | None = None
        """Why decode steps are not one graph each, or not with our layers."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load as vLLM does, then stack the adapter's factors."""
        super().load_model(*args, **kwargs)
        if self.lora_config:
            vllm_lora.combine_all(self)

    def _one_graph_suffices(self) -> bool:
        groups = self.kv_cache_config.kv_cache_groups
        return (
            len(groups) == 1
            and type(groups[0].kv_cache_spec) is FullAttentionSpec
            and self.block_tables.blocks_per_kv_block == [1]
            and self.block_tables.cp_size == 1
            and not self.use_pp
            and not self.supports_mm_inputs
            and self.num_speculative_steps == 0
            and self.model_state.rope_state is None
            and self.kv_block_zeroer is None
        )

    @torch.inference_mode()
    def capture_model(self) -> int:
        """Capture whole decode steps; where a model needs more than that, vLLM's graphs of the model alone."""
        if not self._one_graph_suffices():
            self.not_whole = "this model's attention needs more than one kind of KV cache, or inputs of its own"
            return super().capture_model()
        before = torch.cuda.mem_get_info()[0]
        reasons: list[str] = []
        own = self._own_layers(reasons)
        for layers in (own, None) if own else (None,):
            self._layers = layers
            try:
                if layers is not None:
                    self._compare_with_modules()
                self._capture()
                self._compare_with_eager()
                break
            except Exception as e:
                # What fails here would fail in every step; vLLM's own way is slower and does not depend on it.
                what = "our layers of a decode step" if layers else "a decode step as one CUDA graph"
                reasons.append(f"{what} failed ({type(e).__name__}: {str(e)[:300]})")
                self._graphs.clear()
            gc.collect()
            torch.cuda.empty_cache()
        self.not_whole = "; ".join(reasons) or None
        return before - torch.cuda.mem_get_info()[0] if self._graphs else super().capture_model()

    def _own_layers(self, reasons: list[str]) -> vllm_decode.DecodeModel | None:
        """Return what runs the layers faster than vLLM's modules; where there is nothing, add why."""
        try:
            built = vllm_decode.build(self)
        except Exception as e:  # vLLM has changed: its modules still run
            built = f"{type(e).__name__}: {str(e)[:300]}"
        if not isinstance(built, str):
            return built
        reasons.append(f"the layers are vLLM's own modules ({built})")
        return None

    def _capture(self) -> None:
        self._make_buffers()
        # Not vLLM's pool: one whose graphs are gone, as after an error here, cannot be captured into again.
        pool = torch.cuda.graph_pool_handle()
        sizes = sorted(self.compilation_config.cudagraph_capture_sizes, reverse=True)
        with graph_capture(device=self.device):
            for size in sizes:
                self._decode(size)  # loads kernels, which cannot be done while capturing
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool):
                    self._decode(size)
                self._graphs[size] = graph

    def _make_buffers(self) -> None:
        if self._size_of:
            return
        device, rows = self.device, self.max_num_reqs
        self._drawing = Drawing(rows, self.vocab_size, device)
        self._control = torch.zeros(1 + rows, dtype=torch.int32, device=device)
        self._control_ring = torch.zeros(_RING, 1 + rows, dtype=torch.int32, pin_memory=True)
        self._result_ring = torch.zeros(_RING, 2, rows, dtype=torch.int32, pin_memory=True)
        self._control[0] = 1  # one request in slot 0, which is nobody's yet: it writes into the null block
        ascending = sorted(self.compilation_config.cudagraph_capture_sizes)
        self._size_of = [next(s for s in ascending if s >= max(n, 1)) for n in range(rows + 1)]

    def _compare_with_modules(self) -> None:
        """Run a few tokens of several requests through each of our layers and of vLLM's; raises where they differ."""
        self._make_buffers()
        rows = min(_CHECKED_ROWS, self.max_num_reqs, self.kv_cache_config.num_blocks - 1)
        for kind in ("zeros", "random") if self.lora_config else ("zeros",):
            adapter = vllm_lora.random_adapter(self) if kind == "random" else nullcontext()
            with adapter, self._pretended(rows):
                apart = self._layers_apart(rows)
            by_layer = apart.mean(dim=(0, 2))
            worst = int(by_layer.nan_to_num(nan=math.inf).argmax())
            self.apart[kind] = mean, most = float(by_layer[worst]), float(apart.max())
            if not (mean <= _MOST_APART[0] and most <= _MOST_APART[1]):  # NaN too
                how = "with an adapter of random values" if kind == "random" else "without an adapter's part"
                raise RuntimeError(
                    f"{how}, layer {worst} differs from vLLM's module by {mean:.3f} of what it adds, a row of a layer "
                    f"by {most:.3f}; {_MOST_APART[0]:g} and {_MOST_APART[1]:g} are allowed"
                )

    @contextmanager
    def _pretended(self, rows: int) -> Iterator[None]:
        """Let slots 0 to rows - 1 be requests with a block each; afterwards all is as before anybody came."""
        state, table = self.req_states, self.block_tables.block_tables[0].gpu
        count = torch.arange(rows, dtype=torch.int32, device=self.device)
        self._control[0] = rows
        self._control[1 : 1 + rows] = count
        table[:rows, 0] = count + 1
        try:
            yield
        finally:
            self._control.zero_()
            self._control[0] = 1
            self._rows = None
            table[:rows] = 0
            state.num_computed_tokens.gpu.zero_()
            state.last_sampled_tokens.zero_()
            self._forget(rows)

    def _forget(self, rows: int) -> None:
        """Zero the blocks of the pretended requests."""
        for cache in self.kv_caches:
            cache[: rows + 1].zero_()

    def _layers_apart(self, rows: int) -> torch.Tensor:
        """Return `DecodeModel.apart` [steps, layers, rows] of tokens that depend on step and row, from position 0."""
        state, layers, found = self.req_states, self._layers, []
        assert layers is not None, "there are layers to compare"
        self._forget(rows)
        for step in range(_CHECKED_STEPS):
            state.num_computed_tokens.gpu[:rows] = step
            numbers = torch.arange(rows, device=self.device) * 7919 + step * 104729
            state.last_sampled_tokens[:rows, 0] = numbers % self.vocab_size
            apart = self._in_a_step(self._size_of[rows], lambda ids, at: layers.apart(self.model.model, ids, at))
            found.append(apart[:, :rows])
        return torch.stack(found)

    def _compare_with_eager(self) -> None:
        """Replay a greedy step and compare its token and log-probability with plain torch; raises where they differ."""
        state, size = self.req_states, self._size_of[1]
        state.num_computed_tokens.gpu[0] = 0
        state.last_sampled_tokens[0] = 7
        self._drawing.temperatures[0] = 0.0
        self._graphs[size].replay()
        token = int(self._drawing.result[0, 0])
        logprob = float(self._drawing.result[1, :1].view(torch.float32))
        state.num_computed_tokens.gpu[0] = 0
        state.last_sampled_tokens[0] = 7
        logits = self._logits(size)[0].float()
        expected = torch.log_softmax(logits, dim=-1)
        self._drawing.temperatures[0] = 1.0
        state.last_sampled_tokens.zero_()
        best = float(expected.max())
        if not (abs(float(expected[token]) - best) < 1e-2 and abs(logprob - best) < 1e-2):
            raise RuntimeError(
                f"the graph drew token {token} at {logprob:.4f}, the largest log-probability is {best:.4f}"
            )

    def _decode(self, size: int) -> None:
        self._drawing(self._logits(size), self._control, self)

    def _logits(self, size: int, *, plain: bool = False) -> torch.Tensor:
        """Return the logits [size, V] of a step of the requests in `_control`; `plain`: by vLLM's modules."""
        model = self.model if plain or self._layers is None else self._layers
        hidden = self._in_a_step(size, lambda ids, positions: model(input_ids=ids, positions=positions))
        return self.model.compute_logits(hidden)

    def _in_a_step(self, size: int, run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return what `run` makes of tokens and positions [size] inside the forward context of a decode step."""
        prepare(size, self._control, self)
        slots = self.block_tables.slot_mappings[:, :size]
        with self._splits(size):
            metadata = build_attn_metadata(
                attn_groups=self.attn_groups, num_reqs=size, num_tokens=size,
                query_start_loc_gpu=self.input_buffers.query_start_loc[: size + 1],
                query_start_loc_cpu=torch.arange(size + 1, dtype=torch.int32), max_query_len=1,
                seq_lens=self.input_buffers.seq_lens, max_seq_len=self.max_model_len,
                block_tables=tuple(t[:size] for t in self.block_tables.input_block_tables), slot_mappings=slots,
                kv_cache_config=self.kv_cache_config,
                seq_lens_cpu_upper_bound=torch.full((size,), self.max_model_len, dtype=torch.int32),
                positions=self.input_buffers.positions[:size], is_prefilling=torch.zeros(size, dtype=torch.bool),
                for_cudagraph_capture=True,
            )  # fmt: skip
        with set_forward_context(
            metadata, self.vllm_config, num_tokens=size, cudagraph_runtime_mode=CUDAGraphMode.NONE,
            slot_mapping=build_slot_mappings_by_layer(slots, self.kv_cache_config),
            is_padding=self.input_buffers.is_padding[:size],
        ):  # fmt: skip
            return run(self.input_buffers.input_ids[:size], self.input_buffers.positions[:size])

    @contextmanager
    def _splits(self, size: int) -> Iterator[None]:
        """Plan attention without cutting keys into pieces where `size` requests fill the card by themselves.

        vLLM cuts them for every CUDA graph, and a second kernel per layer has to join them. FlashAttention's own rule.
        """
        builder = self.attn_groups[0][0].get_metadata_builder(0)
        programs = size * self.model_config.get_num_kv_heads(self.parallel_config)
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        most = getattr(builder, "max_num_splits", 0)
        if most > 1 and programs >= _FULL_CARD * processors:
            builder.max_num_splits = 1
        try:
            yield
        finally:
            if most > 1:
                builder.max_num_splits = most

    def add_requests(self, scheduler_output: Any) -> None:
        """Take in new requests; their seeds and temperatures also go where whole steps read them."""
        new = scheduler_output.scheduled_new_reqs
        if not new:
            return
        super().add_requests(scheduler_output)
        if self._graphs:
            sampling = self.sampler.sampling_states
            # Whole tables: a handful of kilobytes, once per step that admits somebody.
            self._drawing.seeds.copy_(torch.from_numpy(sampling.seeds.np).pin_memory(), non_blocking=True)
            self._drawing.temperatures.copy_(torch.from_numpy(sampling.temperature.np).pin_memory(), non_blocking=True)

    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a step; a plain decode step by its graph."""
        if not self._graphs or type(scheduler_output) is not DecodeStep:
            self._rows = None
            return super().execute_model(scheduler_output, *args, **kwargs)
        self.finish_requests(scheduler_output)
        cached = scheduler_output.scheduled_cached_reqs
        index = self.req_states.req_id_to_index
        for name, blocks in scheduler_output.new_blocks.items():
            self.block_tables.append_block_ids(index[name], blocks, overwrite=False)
        if scheduler_output.new_blocks:
            self.block_tables.apply_staged_writes()
        ids = cached.req_ids
        if ids is not self._rows:
            self._controls += 1
            pinned = self._control_ring[self._controls % _RING]
            rows = pinned.numpy()
            rows[0] = len(ids)
            rows[1 : 1 + len(ids)] = [index[name] for name in ids]
            self._control.copy_(pinned, non_blocking=True)
            self._rows = ids
        self._graphs[self._size_of[len(ids)]].replay()
        self._under_way = ids
        self.execute_model_state = None
        return None

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        """Return what the step sampled."""
        ids, self._under_way = self._under_way, None
        if ids is None:
            return super().sample_tokens(grammar_output)
        self._results += 1
        pinned = self._result_ring[self._results % _RING]
        # On the stream of the graphs: the next step writes into the same result.
        pinned.copy_(self._drawing.result, non_blocking=True)
        event = torch.cuda.Event(blocking=False)
        event.record()
        return _Decoded(ids, pinned, event)
