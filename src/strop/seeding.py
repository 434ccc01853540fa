"""Seeds as pure functions of what they are for.

A run is reproducible because nothing is drawn from a generator whose state depends on history: every seed is 63 bits
of BLAKE2b over a labelled tuple, so that a resumed run draws what the uninterrupted one would have drawn. `hash()` is
never used, since Python salts it per process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from .types import Problem, Request


def derive_seed(*parts: int | str) -> int:
    """Return 63 bits of BLAKE2b over `parts`, as a non-negative int below 2**63.

    The parts are encoded as one JSON list, so ("a", "bc") and ("ab", "c") differ, and so do 1 and "1".
    """
    payload = json.dumps(parts, separators=(",", ":"), ensure_ascii=True).encode()
    return int.from_bytes(hashlib.blake2b(payload, digest_size=8).digest(), "big") >> 1


def rollout_requests(
    problems_P: Sequence[Problem], num_generations: int, *, run_seed: int, step: int, purpose: str = "train"
) -> tuple[Request, ...]:
    """Return P * G requests in (problem, sample) order, each with the seed of (run seed, step, problem id, sample)."""
    return tuple(
        Request(problem=problem, sample_index=g, seed=derive_seed(purpose, run_seed, step, problem.id, g))
        for problem in problems_P
        for g in range(num_generations)
    )
