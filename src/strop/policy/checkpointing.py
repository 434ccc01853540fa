"""Activation checkpointing of single layers (Chen et al. 2016, arXiv 1604.06174): keep the input alone, run twice.

The first layers are checkpointed: backward reaches them last, when everything that the others kept is free again, so
that the layer which is run again finds the most room.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint


def run_layer(layer: Callable[..., torch.Tensor], *inputs: Any, checkpoint: bool) -> torch.Tensor:
    """Run a layer; with `checkpoint` it is run again in backward. No layer draws random numbers."""
    if not checkpoint or not torch.is_grad_enabled():
        return layer(*inputs)
    return torch_checkpoint(  # type: ignore[no-any-return]
        layer, *inputs, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
    )


@contextmanager
def checkpointed(layers: Any, count: int, around: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Checkpoint the first `count` modules of a decoder's layers inside the block, by their own forward method.

    A layer runs inside of `around()`, the second time as well: backward comes when the block is left.
    """
    chosen = list(layers)[:count]

    def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            with around():
                return forward(*args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            return run_layer(functools.partial(inside, **kwargs), *args, checkpoint=True)

        return run

    for layer in chosen:
        layer.forward = wrapped(layer.forward)
    try:
        yield
    finally:
        for layer in chosen:
            del layer.forward  # the method of the class shows again
