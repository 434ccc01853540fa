"""In which order a finite task visits its problems: a pure function of (seed, position)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from random import Random

from ..seeding import derive_seed


class EpochOrder:
    """Every index in range(size) once per epoch; shuffled by (seed, epoch) if asked.

    A window that reaches into the next epoch holds no index twice: the new epoch's first indices are put in an order in
    which those still in the window come last. That needs two windows per epoch; with fewer, all epochs share one order,
    in which any `size` neighbours differ.
    """

    def __init__(self, size: int, *, seed: int, shuffle: bool) -> None:
        self.size = size
        self._seed, self._shuffle = seed, shuffle
        self._drawn = lru_cache(maxsize=3)(self._draw)

    def window(self, number: int, length: int) -> list[int]:
        """Return the indices at positions [number * length, (number + 1) * length), all different.

        `length` is at most `size`.
        """
        assert 0 < length <= self.size, f"a window of {length} over {self.size} indices"
        start = number * length
        epoch, offset = divmod(start, self.size)
        indices = self._epoch(epoch, length)[offset : offset + length]
        missing = length - len(indices)
        return [*indices, *self._epoch(epoch + 1, length)[:missing]] if missing else list(indices)

    def _epoch(self, epoch: int, length: int) -> Sequence[int]:
        if not self._shuffle or self.size < 2 * length:
            return self._drawn(0)
        order = self._drawn(epoch)
        carried = epoch * self.size % length
        if not carried:
            return order
        still_there = set(self._drawn(epoch - 1)[-carried:])
        head = order[:length]
        return [
            *(index for index in head if index not in still_there),
            *(index for index in head if index in still_there),
            *order[length:],
        ]

    def _draw(self, epoch: int) -> list[int]:
        order = list(range(self.size))
        if self._shuffle:
            Random(derive_seed("epoch", self._seed, epoch)).shuffle(order)
        return order
