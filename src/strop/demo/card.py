"""The model card, written from the numbers in `measured.json` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [reinforcement-learning, grpo, reasoning, arithmetic]
---

# Strop's demo model

A {parameters:,}-parameter Llama ({layers} layers, hidden size {hidden_size}, {heads} heads of {head_size}, one token
per byte), trained from nothing by `python -m strop.demo.build` on generated arithmetic traces. It exists so that
`strop demo` can show reinforcement learning on two CPU cores without a download. It is of no other use.

It answers short questions such as `47+85=` with `<think>7+5=12 4+8+1=13</think>132`.

## It was made to be improvable
The model learned from text of mixed quality, as web text is. Three kinds of author wrote it:

| author | share of traces | what it writes |
|---|---|---|
| the method | {method:.0%} | column by column, with carries and borrows; long division for remainders |
| a bad habit | {habit:.0%} | the same layout, but drops carries and borrows, compares numbers by their last digit, or answers a remainder with the quotient |
| a guesser | {skip:.0%} | `<think></think>` and a guess: each digit of the right answer redrawn with probability {guess:.2f}; for `max` one of the numbers |

In the first two, every written result is wrong with probability {slip:.0%}, and the trace goes on with the wrong digit.
So the model knows the right method and samples it in the minority of cases. Reinforcement learning does not teach it
arithmetic: it makes the good behaviour that is there the usual one. Nor is that only a lower temperature: the habit is
more frequent than the method, so greedy decoding is no better than sampling.

## Accuracy before reinforcement learning
Held-out problems of difficulty {difficulty} (two digits), temperature 1, {k} samples per problem, in float32 from the
stored bfloat16 weights (`measured.json`):

{table}

pass@1 is the mean over all samples, pass@{k} the share of problems that at least one of {k} samples answers. Difficulty 1
and 3 are in its training data as well; at 4 and above it fails.

## Data
Problems of the families {families}, {difficulties}. One problem in eight is held out by a hash of the problem itself
(`Puzzle.is_held_out` in `strop/tasks/arithmetic.py`; orders that make no difference count as one problem). Only the
other seven were ever drawn for this training, and only they are drawn by the task `arithmetic`, so the held-out problems
are new to the model before and after reinforcement learning.

## Rebuild
    python -m strop.demo.build FOLDER

{steps:,} steps of {tokens:,} tokens, AdamW with a peak learning rate of {learning_rate:g}, seed {seed}: {seconds:.0f} s on {device}. On
two CPU cores it takes hours (about {cpu_seconds:g} s a step). The data and the first weights follow from the seed on any
machine; the sums of a step are rounded differently on different devices, so a rebuilt model has other last digits and
about the same accuracies.

## Format
Turns are `<|user|>question<|end|><|assistant|>`; `<|end|>` is also the end of sequence, `<|pad|>` another token. `<think>`
and `</think>` are ordinary single tokens. The context is {context} tokens. Any loader of Llama models takes the folder.
"""

CPU_SECONDS_PER_STEP = 2.5
"""Measured on two virtual cores of a shared server."""


def card_text(measured: Mapping[str, Any]) -> str:
    """Return the card for the content of `measured.json` (see `build.build`)."""
    settings, mix = measured["settings"], measured["settings"]["corpus"]["mix"]
    digits = settings["corpus"]["difficulties"]
    return _CARD.format(
        **mix,
        method=1 - mix["skip"] - mix["habit"],
        parameters=measured["parameters"],
        layers=settings["num_layers"],
        hidden_size=settings["hidden_size"],
        heads=settings["hidden_size"] // settings["head_size"],
        head_size=settings["head_size"],
        difficulty=measured["difficulty"],
        k=measured["k"],
        table=table(measured["accuracy"], measured["k"]),
        families=", ".join(f"`{name}`" for name in measured["accuracy"] if name != "all"),
        difficulties=" and ".join(
            f"{share:.0%} with {d} digit{'s' if int(d) > 1 else ''}" for d, share in digits.items()
        ),
        steps=settings["steps"],
        tokens=settings["corpus"]["rows"] * settings["corpus"]["row_length"],
        learning_rate=settings["learning_rate"],
        seed=settings["seed"],
        seconds=measured["seconds"],
        device=measured["device"],
        cpu_seconds=CPU_SECONDS_PER_STEP,
        context=measured["context"],
    )


def table(accuracy: Mapping[str, Mapping[str, float]], k: int) -> str:
    """Return accuracies by family (`Accuracy.as_dict`) as a Markdown table, in percent."""
    lines = [
        f"| family | problems | greedy | pass@1 | pass@{k} | tokens per completion |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {a['num_problems']} | {a['greedy']:.1%} | {a['pass_at_1']:.1%} | {a['pass_at_k']:.1%} "
        f"| {a['mean_tokens']:.1f} |"
        for name, a in accuracy.items()
    ]
    return "\n".join(lines)
