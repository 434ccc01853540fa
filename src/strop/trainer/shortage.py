"""Running out of a card's memory where nothing can be made smaller: an error that says where, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import MemoryExhaustedError

IN_A_NEW_RUN = "With --out ANOTHER_FOLDER, rollout.max_completion_length may be shorter"
"""A resumed run goes on with the completions that it began with."""
DOING = {
    "restore": "while a checkpoint was read",
    "load": "while model, engine and adapters were loaded",
    "optimizer": "while the optimizer's state was allocated",
    "generate": "while completions were generated",
    "train": "while training, outside of a micro-batch",
    "publish": "while the engine took over the new weights",
    "evaluate": "during an evaluation",
    "checkpoint": "while a checkpoint was written",
}


@contextmanager
def shortage_told(phase: str, *, resumable: bool = True) -> Iterator[None]:
    """Turn torch.OutOfMemoryError inside the block into MemoryExhaustedError, which says what was being done.

    The hint names what a run that goes on may change, where `resumable`, and apart from it what only a new one may.
    """
    try:
        yield
    except torch.OutOfMemoryError as e:
        if phase in ("load", "optimizer", "restore"):
            smaller = "in a new run optim.name: adamw_8bit, lora.r or model.quantization: nf4 take less"
        elif resumable:
            smaller = f"rollout.max_num_seqs: lower it; then go on with --resume. {IN_A_NEW_RUN}"
        else:
            smaller = "rollout.max_num_seqs: lower it"
        raise MemoryExhaustedError(
            f"the card ran out of memory {DOING.get(phase, f'in the phase `{phase}`')}: {str(e).split('. ')[0]}",
            hint=f"run.vram_gib: raise it, or end what else uses the card; {smaller}",
        ) from e
