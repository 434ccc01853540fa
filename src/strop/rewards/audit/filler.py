"""Words that fill a completion: prose of no content, without numbers, that repeats no phrase."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from ...seeding import derive_seed

SAMPLE_WORDS = 64

_WORDS = """
we look at what is given and then take the next part with care because it may be small or large so that it fits under
our rule while another view would need more work before any claim about this case can stand on its own feet since each
term must keep its place until both sides agree where they meet again after some change of form which leaves them equal
though written in other words from here onward nothing else seems left open except how far that idea goes when applied
over longer paths through known ground
"""


def filler(num_tokens: int, seed: int, length: Callable[[str], int]) -> str:
    """Return words of about `num_tokens` tokens, other ones for another seed; `length` counts the tokens of a text."""
    if num_tokens <= 0:
        return ""
    rng, words = Random(derive_seed("filler", seed)), _WORDS.split()
    sample = " ".join(rng.choice(words) for _ in range(SAMPLE_WORDS))
    count = max(1, num_tokens * SAMPLE_WORDS // max(1, length(sample)))
    return " ".join(rng.choice(words) for _ in range(count))
