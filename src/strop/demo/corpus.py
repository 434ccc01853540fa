"""Pretraining batches: traces packed into rows of one fixed length, each batch a pure function of (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset

from ..seeding import derive_seed
from ..tasks.arithmetic import FAMILIES, Puzzle
from .tokenizer import PAD, encode_completion, encode_prompt
from .traces import Mix, write_trace

if TYPE_CHECKING:
    from collections.abc import Mapping

IGNORED = -100
"""Label of a token that is not trained on (the prompt and the filling of a row)."""


@dataclass(frozen=True, slots=True)
class CorpusSettings:
    """What the model reads. Letters: B rows per batch, T tokens per row."""

    rows: int = 128
    row_length: int = 128
    difficulties: Mapping[int, float] = field(default_factory=lambda: {1: 0.1, 2: 0.7, 3: 0.2})
    """Weight of each number of digits."""
    mix: Mix = field(default_factory=Mix)
    seed: int = 0


def draw_training_puzzle(rng: Random, difficulties: Mapping[int, float]) -> Puzzle:
    """Return one problem of the training side, of any family."""
    digits = rng.choices(list(difficulties), list(difficulties.values()))[0]
    draw = FAMILIES[rng.choice(list(FAMILIES))]
    while (puzzle := draw(rng, digits)).is_held_out:
        pass
    return puzzle


class Corpus(Dataset[dict[str, np.ndarray]]):
    """Batch number -> arrays of one packed batch.

    `ids`, `labels`, `positions` are [B, T] int64; `labels` is the next token, or `IGNORED`. `owner` is [B, T] int64,
    the number of the trace within its row, so that tokens of different traces can be kept from seeing each other.
    """

    def __init__(self, settings: CorpusSettings, num_batches: int) -> None:
        self.settings = settings
        self.num_batches = num_batches

    def __len__(self) -> int:
        """Return the number of batches."""
        return self.num_batches

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """Return the batch of one step."""
        settings = self.settings
        rng = Random(derive_seed("demo/pretraining", settings.seed, step))
        shape = (settings.rows, settings.row_length)
        batch = {
            "ids": np.full(shape, PAD, dtype=np.int64),
            "labels": np.full(shape, IGNORED, dtype=np.int64),
            "positions": np.zeros(shape, dtype=np.int64),
            "owner": np.full(shape, -1, dtype=np.int64),
        }
        row, start, owner = 0, 0, 0
        while row < settings.rows:
            puzzle = draw_training_puzzle(rng, settings.difficulties)
            prompt = encode_prompt(puzzle.text)
            tokens = prompt + encode_completion(*write_trace(puzzle, settings.mix, rng))
            if len(tokens) - 1 > settings.row_length:
                continue
            if start + len(tokens) - 1 > settings.row_length:
                row, start, owner = row + 1, 0, 0
                if row == settings.rows:
                    break
            end = start + len(tokens) - 1
            batch["ids"][row, start:end] = tokens[:-1]
            batch["labels"][row, start + len(prompt) - 1 : end] = tokens[len(prompt) :]
            batch["positions"][row, start:end] = range(end - start)
            batch["owner"][row, start:end] = owner
            start, owner = end, owner + 1
        return batch
