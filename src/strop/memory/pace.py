"""How long training takes on a card, roughly: by it the plan weighs layers that run twice against small micro-batches.

A layer costs a micro-batch the longer of two times: the card's, for the products, and the processor's, for launching
the kernels. On a fast card a layer of a small model is over before the next is launched, and then few large
micro-batches with checkpointed layers beat many small ones without.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .shapes import ModelShape

LAUNCH_S = 4e-3
"""Launching a layer's kernels, forward and backward, from Python. An estimate: a 0.5B model took 0.5 s for a step of
GSM8K in micro-batches of 4,600 tokens on an H100, and 0.29 s for twice as many tokens in one micro-batch."""
RUN_AGAIN = 1 / 3
"""What a checkpointed layer costs more; 0.35 measured with 1.5B on an H100."""
SHARE_OF_PEAK = 0.35
"""Of the card's peak, reached by a whole layer with its norms and attention."""
UNKNOWN_FLOPS = 100e12
FLOPS_PER_BYTE = 150
"""Of a card's peak to its bandwidth: 76 (3090) to 295 (H100)."""
_FLOPS_PER_SM_AND_CYCLE = {(7, 5): 1024, (8, 0): 2048, (8, 6): 512, (8, 9): 512, (9, 0): 4096, (10, 0): 8192,
                           (12, 0): 512}  # fmt: skip
"""Dense 16-bit products with fp32 sums, by compute capability (data sheets; GeForce's where there are several)."""


def card_flops(properties: Any) -> float:
    """Return a card's peak in FLOP/s from torch's device properties; a guess for cards that are not known."""
    per_cycle = _FLOPS_PER_SM_AND_CYCLE.get((properties.major, properties.minor))
    khz = getattr(properties, "clock_rate", 0) or 1.7e6
    return UNKNOWN_FLOPS if per_cycle is None else per_cycle * properties.multi_processor_count * khz * 1e3


@dataclass(frozen=True, slots=True)
class Work:
    """What a step trains on: completions of `completion` tokens at most, in groups with a prompt of `prompt` tokens."""

    groups: int
    generations: int
    prompt: int
    completion: int
    share_prompt: bool

    def cut(self, micro_batch: int) -> tuple[int, int]:
        """Return (micro-batches, packed tokens of all) at full length: no more of either than packing makes.

        A prompt is read again in each micro-batch that its group reaches into. Never more of either in a larger
        micro-batch, where packing itself now cuts a group in two and now does not.
        """
        completions, each = self.groups * self.generations, self.prompt + self.completion
        if not self.share_prompt:
            return math.ceil(completions / max(1, micro_batch // each)), completions * each
        fits = max(1, (micro_batch - self.prompt) // self.completion)
        own = completions * self.completion
        count = max(math.ceil(completions / fits), math.ceil((own + self.groups * self.prompt) / micro_batch))
        return count, own + max(count, self.groups) * self.prompt


def training_seconds(
    shape: ModelShape, flops: float, work: Work, micro_batch: int, checkpointed: int, *, packed: bool
) -> float:
    """Return the seconds of forward and backward over a step in micro-batches of at most `micro_batch` tokens.

    Per token and weight 4 FLOP: forward, and the gradient of the input; a frozen base needs none of its own. 4-bit
    weights (`packed`) are unpacked for each of the two, reading and writing some 4.6 bytes a weight.
    """
    flops = flops or UNKNOWN_FLOPS
    weights = shape.linear_parameters / shape.num_layers
    count, tokens = work.cut(micro_batch)
    products = 4 * weights * tokens / count / (SHARE_OF_PEAK * flops)
    unpacking = 2 * 4.6 * weights / (flops / FLOPS_PER_BYTE) if packed else 0.0
    layer = max(LAUNCH_S, products + unpacking)
    return count * layer * (shape.num_layers + RUN_AGAIN * checkpointed)
