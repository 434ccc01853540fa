"""Running out of a card's memory where nothing can be made smaller: an error that says where, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import MemoryExhaustedError

DOING = {
    "load": "while model, engine and adapters were loaded",
    "optimizer": "while the optimizer's state was allocated",
    "generate": "while completions were generated",
    "train": "while training, outside of a micro-batch",
    "publish": "while the engine took over the new weights",
    "evaluate": "during an evaluation",
    "checkpoint": "while a checkpoint was written",
}


@contextmanager
def shortage_told(phase: str) -> Iterator[None]:
    """Turn torch.OutOfMemoryError inside the block into MemoryExhaustedError, which says what was being done."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        starting = phase in ("load", "optimizer")
        smaller = "optim.name: adamw_8bit, lora.r or model.quantization: nf4 take less" if starting else (
            "rollout.max_completion_length or rollout.max_num_seqs: lower them; and go on with --resume"
        )  # fmt: skip
        raise MemoryExhaustedError(
            f"the card ran out of memory {DOING.get(phase, f'in the phase `{phase}`')}: {str(e).split('. ')[0]}",
            hint=f"run.vram_gib: raise it, or end what else uses the card; {smaller}",
        ) from e
