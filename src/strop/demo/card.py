"""The model card, written from the numbers in `measured.json` alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [reinforcement-learning, grpo, reasoning, arithmetic]
---

# Strop's demo model

A Llama of {parameters:,} parameters ({layers} layers, hidden size {hidden_size}, {heads} heads of {head_size}), with
one token per byte, trained from nothing by `python -m strop.demo.build` on generated arithmetic. It exists so that
`strop demo` can show reinforcement learning on two CPU cores without a download, and is of no other use.

It answers short questions such as `47+85=`, at its best with `<think>7+5=12 4+8+1=13</think>132`.

## It was made to be improvable
The model read text of mixed quality, as there is on the web. Three kinds of author wrote it:

- **The method, {method:.0%} of the traces.** Column by column, with carries and borrows; long division for remainders.
- **A bad habit, {habit:.0%}.** The same layout, but the author drops carries and borrows, compares numbers by their
  last digit, or answers a remainder with the quotient.
- **A guess, {skip:.0%}.** `<think></think>` and the right answer with each digit redrawn with probability {guess:g},
  or for `max` any of the numbers.

In the first two, every written result is wrong with probability {slip:.0%}, and the author goes on with the wrong one.
So the model knows the right method and uses it in the minority of its samples. Reinforcement learning does not teach it
arithmetic; it makes the good behaviour that is there the usual one. That is more than a lower temperature would do: the
habit is more frequent than the method, so greedy decoding is no better than sampling.

Along flawless traces of held-out problems, the model's first choice for a digit after `=` is right in
{method_accuracy:.1%} of the cases: the method is known, and not only for problems it has seen.

## Accuracy before reinforcement learning
Held-out problems of difficulty {difficulty} (the number of digits), {k} samples each at temperature 1, computed in
float32 from the stored bfloat16 weights:

{table}

pass@1 is the mean over all samples, pass@{k} the share of problems that at least one of {k} samples answers. Over all
families, pass@1 is {others}.

## What reinforcement learning reaches
The shipped model (default settings) was trained further by an independent GRPO loop in plain PyTorch: 16 problems x 8
completions a step, learning rate falling linearly to a tenth over 60 to 100 steps, measured on 224 held-out problems x
4 samples. With LoRA of rank 16 at 1e-3 to 2e-3, pass@1 rose from 35-38 % to 85-91 % in 60 steps (6 runs), with all
weights at 3e-4 to 7e-4 from 37-38 % to 86-90 % (5 runs). The four runs of 100 steps ended at 90-91 %. Greedy decoding
was then right in 95-98 %.

## Data
Problems of the families {families}:
{difficulties}. One problem in eight is held out by a hash of the problem
itself (`Puzzle.is_held_out` in `strop/tasks/arithmetic.py`; orders that make no difference count as one problem).
Neither this training nor the task `arithmetic` ever draws those for training, so they are new to the model before and
after reinforcement learning.

## Rebuild
    python -m strop.demo.build FOLDER

{steps:,} steps of {tokens:,} tokens with AdamW, peak learning rate {learning_rate:g}, seed {seed}: {seconds} s on
{device}. On a CPU it takes hours (4 s a step on one core of a busy server). Data and first weights
follow from the seed on any machine. Sums are rounded differently on different devices, so a rebuilt model has other
last digits and about the same accuracies. The table is also in `measured.json`, from which this card is written.

## Format
A turn is `<|user|>question<|end|>`, and an answer begins after `<|assistant|>`. `<|end|>` is also the end of sequence;
`<|pad|>` is another token. `<think>` and `</think>` are ordinary single tokens. The context is {context} tokens. The
folder loads like any Llama model.
"""


def card_text(measured: Mapping[str, Any]) -> str:
    """Return the card for the content of `measured.json` (see `build.build`)."""
    settings, mix = measured["settings"], measured["settings"]["corpus"]["mix"]
    digits = settings["corpus"]["difficulties"]
    return _CARD.format(
        **mix,
        others=_listing(
            f"{share:.1%} at difficulty {d}" for d, share in measured["pass_at_1_of_other_difficulties"].items()
        ),
        method_accuracy=measured["method_accuracy"],
        method=1 - mix["skip"] - mix["habit"],
        parameters=measured["parameters"],
        layers=settings["num_layers"],
        hidden_size=settings["hidden_size"],
        heads=settings["hidden_size"] // settings["head_size"],
        head_size=settings["head_size"],
        difficulty=measured["difficulty"],
        k=measured["k"],
        table=table(measured["accuracy"], measured["k"]),
        families=_listing(f"`{name}`" for name in measured["accuracy"] if name != "all"),
        difficulties=_listing(f"{share:.0%} of difficulty {d}" for d, share in digits.items()),
        steps=settings["steps"],
        tokens=settings["corpus"]["rows"] * settings["corpus"]["row_length"],
        learning_rate=settings["learning_rate"],
        seed=settings["seed"],
        seconds=measured["seconds"],
        device=measured["device"],
        context=measured["context"],
    )


def _listing(parts: Iterable[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


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
