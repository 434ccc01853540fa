"""vLLM's scheduler with a short way through steps in which every running request decodes one token.

vLLM's own way costs 25 to 30 microseconds of Python per request and step (slots, block hashes, stop checks, one output
object per token), which at 128 sequences of a small model is longer than the card works. In a rollout nearly all steps
are plain decode steps: nothing is admitted, nothing is preempted, one token per request. For those this scheduler does
what vLLM's does and leaves out what has no effect there; every other step is vLLM's.

Sampled tokens go to `sink`, one row per request, and only a finished request makes an output object. The classes are
handed to vLLM through its `scheduler_cls` option. Written against 0.26 (CUDA) and 0.32 (CPU). Can go when vLLM's
Python time per step is below that of its kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.sched.utils import check_stop, remove_all
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request, RequestStatus

if TYPE_CHECKING:
    _Base = Scheduler
else:
    _Base = object

ADMIT_SHARE = 8
"""While more requests wait than fit, new ones are let in when this fraction of the places is free: a step with a prompt
in it runs without a CUDA graph, so one of those per finished request would cost more than the empty places do."""


@dataclass(slots=True)
class Row:
    """What a running request has sampled so far."""

    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])


class DecodeStep(SchedulerOutput):
    """A step planned here: one token for each of its requests."""

    new_blocks: dict[str, tuple[list[int], ...]]
    """KV blocks by request, of those that get a new one."""


class _Rollout(_Base):
    """The short way; mixed into both of vLLM's schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sink: dict[str, Row] = {}
        """Rows by request id, filled by plain decode steps; kept by the engine."""
        self._decoding: list[Request] = []
        self._names: list[str] = []
        """Their ids: the same list as long as the same requests decode."""
        groups = self.kv_cache_config.kv_cache_groups
        # Sliding windows free blocks as they go, and speculation samples several tokens: vLLM's way for those.
        self._plain = (
            len(groups) == 1
            and type(groups[0].kv_cache_spec) is FullAttentionSpec
            and self.connector is None
            and self.num_spec_tokens == 0
            and not self.log_stats
        )

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Plan the next step: plainly where all running requests decode, else as vLLM does."""
        step = self._decode_step() if self._plain else None
        return super().schedule(*args, **kwargs) if step is None else step

    def _nobody_comes_in(self) -> bool:
        running = len(self.running)
        if self.get_num_unfinished_requests() == running:
            return True
        places = self.max_num_running_reqs
        return running > places - max(1, places // ADMIT_SHARE)

    def _decode_step(self) -> DecodeStep | None:
        """Return the step, or None when it is not one where each request decodes one token."""
        if not self.running or self.reset_preempted_req_ids or not self._nobody_comes_in():
            return None
        manager = self.kv_cache_manager
        group = manager.coordinator.single_type_managers[0]
        blocks_of, block_size, limit = group.req_to_blocks, group.block_size, self.max_model_len
        scheduled: list[Request] = []
        short: list[Request] = []
        for request in self.running:
            computed, under_way = request.num_computed_tokens, request.num_output_placeholders
            if under_way and computed + 2 - under_way >= request.num_prompt_tokens + request.max_tokens:
                continue  # its last token is being sampled
            if computed + 1 >= limit:
                continue
            if len(request._all_token_ids) + under_way - computed != 1:
                return None
            if len(blocks_of[request.request_id]) * block_size <= computed:
                short.append(request)
            scheduled.append(request)
        if not scheduled or len(scheduled) > self.max_num_scheduled_tokens:
            return None
        if len(short) > manager.block_pool.get_num_free_blocks():
            return None  # somebody has to be preempted
        self.current_step += 1
        manager.new_step_starts()
        new_blocks = {}
        for request in short:
            blocks = manager.allocate_slots(request, 1)
            assert blocks is not None, "free blocks were counted before"
            new_blocks[request.request_id] = blocks.get_block_ids()
        if scheduled != self._decoding:
            self._decoding = scheduled
            self._names = [request.request_id for request in scheduled]
        tokens = dict.fromkeys(self._names, 1)
        step = DecodeStep(
            scheduled_new_reqs=[],
            scheduled_cached_reqs=self._cached(scheduled, new_blocks),
            num_scheduled_tokens=tokens,
            total_num_scheduled_tokens=len(tokens),
            scheduled_spec_decode_tokens={},
            scheduled_encoder_inputs={},
            num_common_prefix_blocks=[0],
            preempted_req_ids=self.reset_preempted_req_ids,
            finished_req_ids=self.finished_req_ids,
            free_encoder_mm_hashes=[],
            new_block_ids_to_zero=self._get_new_block_ids_to_zero(),
        )
        step.new_blocks = new_blocks
        in_advance = isinstance(self, AsyncScheduler)
        for request in scheduled:
            request.num_computed_tokens += 1
            request.num_in_flight_tokens += 1
            if in_advance:
                request.num_output_placeholders += 1
        self.finished_req_ids = set()
        self.reset_preempted_req_ids = set()
        return step

    def _cached(self, scheduled: list[Request], new_blocks: dict[str, tuple[list[int], ...]]) -> CachedRequestData:
        """Describe running requests to the model runner."""
        all_tokens = {}
        if not self.use_v2_model_runner:  # the first runner is told all tokens of who was not in the step before
            before = self.prev_step_scheduled_req_ids
            all_tokens = {r.request_id: list(r._all_token_ids) for r in scheduled if r.request_id not in before}
            before.clear()
            before.update(self._names)
        return CachedRequestData(
            req_ids=self._names,
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids=all_tokens,
            new_block_ids=[new_blocks.get(name) for name in self._names] if new_blocks else [None] * len(scheduled),
            num_computed_tokens=[request.num_computed_tokens for request in scheduled],
            num_output_tokens=[len(r._output_token_ids) + r.num_output_placeholders for r in scheduled],
        )

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        """Take in what a step sampled; returns outputs of finished requests alone after a plain step."""
        ids = scheduler_output.num_scheduled_tokens
        requests = [self.requests.get(i) for i in ids]
        if (
            type(scheduler_output) is not DecodeStep
            or model_runner_output.logprobs is None
            or any(r is not None and r.status != RequestStatus.RUNNING for r in requests)
        ):
            return super().update_from_output(scheduler_output, model_runner_output)
        sampled = model_runner_output.sampled_token_ids
        # [requests, 1]: the sampled token's own
        logprobs = model_runner_output.logprobs.logprobs[:, 0].tolist()
        index, sink, hashed = model_runner_output.req_id_to_index, self.sink, self.hash_block_size
        limit, in_advance = self.max_model_len, isinstance(self, AsyncScheduler)
        stopped: list[Request] = []
        for request_id, request in zip(ids, requests, strict=True):
            if request is None:  # it ended in the step before this one
                continue
            request.num_in_flight_tokens -= 1
            if in_advance:
                request.num_output_placeholders -= 1
            i = index[request_id]
            token = sampled[i][0]
            row = sink[request_id]
            row.token_ids.append(token)
            row.logprobs.append(logprobs[i])
            request._output_token_ids.append(token)
            request._all_token_ids.append(token)
            length = len(request._all_token_ids)
            if length % hashed == 0:
                request.update_block_hashes()
            params = request.sampling_params
            assert params is not None
            assert params.stop_token_ids is not None
            if (
                length >= limit
                or len(request._output_token_ids) >= request.max_tokens
                or token in params.stop_token_ids
                or token == params.eos_token_id
            ):
                ended = check_stop(request, limit)  # sets the status
                assert ended, f"vLLM goes on with a request that ended: {request.request_id}"
                stopped.append(request)
        return {0: EngineCoreOutputs(outputs=self._finish(stopped))} if stopped else {}

    def _finish(self, stopped: list[Request]) -> list[EngineCoreOutput]:
        outputs = []
        for request in stopped:
            reason = request.get_finished_reason()
            self._free_request(request)
            outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=reason,
                    stop_reason=request.stop_reason,
                )
            )
        self.running = remove_all(self.running, set(stopped))
        return outputs


class RolloutScheduler(_Rollout, Scheduler):
    """For a CPU: a step is finished before the next is planned."""


class AsyncRolloutScheduler(_Rollout, AsyncScheduler):
    """For a card: the next step is planned while one runs."""
