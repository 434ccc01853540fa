"""Accuracy of a model on held-out arithmetic problems, by family: greedy, sampled once, and best of k samples.

Models and tokenizers are those of transformers; its own types are too loose to be checked against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any

import torch

from ..seeding import derive_seed
from ..tasks.arithmetic import FAMILIES, Puzzle
from .tokenizer import encode_completion, encode_prompt
from .traces import CLEAN, write_trace

BATCH_SIZE = 512
"""Completions that are generated together."""
MAX_DRAWS = 40
"""Draws per wanted problem; one draw in eight is held out."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares in 0..1 over `num_problems` problems."""

    num_problems: int
    greedy: float
    pass_at_1: float
    """Mean over all samples at temperature 1."""
    pass_at_k: float
    """Share of problems that at least one of the k samples answers."""
    mean_tokens: float
    """Mean length of a sampled completion, the end of the turn included."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, rounded to four digits."""
        return {name: round(getattr(self, name), 4) for name in self.__slots__}


def held_out_puzzles(count_per_family: int, difficulty: int = 2) -> list[Puzzle]:
    """Return different held-out problems of every family; a family that has fewer gives what it has."""
    found: dict[str, Puzzle] = {}
    for family, draw in FAMILIES.items():
        rng = Random(derive_seed("demo/measure", family, difficulty))
        draws = (draw(rng, difficulty) for _ in range(count_per_family * MAX_DRAWS))
        fresh = {puzzle.key: puzzle for puzzle in draws if puzzle.is_held_out}
        found |= dict(islice(fresh.items(), count_per_family))
    return list(found.values())


def final_answer(text: str) -> str:
    """Return what follows the last `</think>`, without surrounding blanks; empty while a `<think>` is still open.

    A text without tags is its own answer, as for the reward `exact`.
    """
    if text.rfind("<think>") > text.rfind("</think>"):
        return ""
    return text.rpartition("</think>")[2].strip()


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    puzzles: Sequence[Puzzle],
    *,
    temperature: float,
    max_tokens: int = 96,
) -> tuple[list[str], list[int]]:
    """Return one completion per problem and its number of tokens; temperature 0 is greedy, else torch's generator."""
    sampling = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    texts: list[str] = []
    lengths: list[int] = []
    for start in range(0, len(puzzles), BATCH_SIZE):
        chunk = puzzles[start : start + BATCH_SIZE]
        inputs = tokenizer.apply_chat_template(
            [[{"role": "user", "content": puzzle.text}] for puzzle in chunk],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_tokens, **sampling)
        completions = output[:, inputs["input_ids"].shape[1] :]
        lengths += (completions != tokenizer.pad_token_id).sum(dim=1).tolist()
        texts += tokenizer.batch_decode(completions, skip_special_tokens=True)
    return texts, lengths


def measure(
    model: Any,
    tokenizer: Any,
    puzzles: Sequence[Puzzle],
    *,
    k: int = 8,
    seed: int = 0,
) -> dict[str, Accuracy]:
    """Return the accuracy of each family and of `all`; sampling is seeded (and sets torch's global generator)."""
    greedy_texts, _ = complete(model, tokenizer, puzzles, temperature=0.0)
    torch.manual_seed(seed)
    repeated = [puzzle for puzzle in puzzles for _ in range(k)]
    texts, lengths = complete(model, tokenizer, repeated, temperature=1.0)
    right_PK = torch.tensor([final_answer(t) == p.answer for t, p in zip(texts, repeated, strict=True)]).reshape(-1, k)
    greedy_P = torch.tensor([final_answer(t) == p.answer for t, p in zip(greedy_texts, puzzles, strict=True)])
    lengths_PK = torch.tensor(lengths, dtype=torch.float).reshape(-1, k)

    def over(chosen_P: torch.Tensor) -> Accuracy:
        return Accuracy(
            num_problems=int(chosen_P.sum()),
            greedy=greedy_P[chosen_P].float().mean().item(),
            pass_at_1=right_PK[chosen_P].float().mean().item(),
            pass_at_k=right_PK[chosen_P].any(dim=1).float().mean().item(),
            mean_tokens=lengths_PK[chosen_P].mean().item(),
        )

    families = list(dict.fromkeys(puzzle.family for puzzle in puzzles))
    by_family = {f: over(torch.tensor([p.family == f for p in puzzles])) for f in families}
    return by_family | {"all": over(torch.ones(len(puzzles), dtype=torch.bool))}


@torch.no_grad()
def method_accuracy(model: Any, puzzles: Sequence[Puzzle]) -> float:
    """Return how often the model's first choice for a digit after `=` is right, along flawless traces of the problems.

    It tells whether the method is known, apart from how often it is sampled.
    """
    right = total = 0
    for puzzle in puzzles:
        prompt = encode_prompt(puzzle.text)
        completion = encode_completion(*write_trace(puzzle, CLEAN, Random(0)))
        ids = torch.tensor([prompt + completion], device=model.device)
        choices = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].argmax(dim=-1).tolist()
        is_result = False
        for token, choice in zip(completion, choices, strict=True):
            is_result = is_result and ord("0") <= token <= ord("9")
            total += is_result
            right += is_result and token == choice
            is_result = is_result or token == ord("=")
    return right / total
