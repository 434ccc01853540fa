"""Hostile texts against every built-in, and properties that hold for generated ones."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import hostile
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scores import score

from strop.rewards.contract import declaration_of
from strop.rewards.library import LIBRARY

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = ("numeric", "gsm8k", "math")


def test_no_text_hangs_or_crashes_a_built_in(tmp_path: Path) -> None:
    assert len(list(hostile.texts())) >= 300
    assert len({text for _, text in hostile.texts()}) >= 300
    progress = tmp_path / "progress"
    command = [sys.executable, str(ROOT / "bench" / "hostile_texts.py"), "--progress", str(progress)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    print(done.stdout[-2000:])
    assert done.returncode == 0, progress.read_text() + done.stderr[-2000:]
    assert re.search(r"\d+ texts, \d+ built-ins, \d+ calls, 0 hangs, 0 crashes", done.stdout)


# --- a right answer in the asked format is right, however it is written -------------------------------------------

WHOLE = st.integers(-(10**9), 10**9)
DECIMALS = st.decimals(-(10**6), 10**6, places=2, allow_nan=False)
VARIANTS: dict[str, Callable[[str], str]] = {
    "plain": lambda n: n, "spaces": lambda n: f"  {n} ", "dollars": lambda n: f"${n}$", "full stop": lambda n: f"{n}.",
    "currency": lambda n: rf"\$ {n}", "text": lambda n: rf"\text{{{n}}}", "bold": lambda n: f"**{n}**",
    "full width": lambda n: n.translate({48 + d: 0xFF10 + d for d in range(10)}),
    "minus": lambda n: n.replace("-", "\u2212"),
    "unit": lambda n: rf"{n}\text{{ apples}}", "word": lambda n: f"{n} apples", "equation": lambda n: f"x = {n}",
    "zero width": lambda n: "\u200b".join(n), "thin space": lambda n: f"\u2009{n}\u00a0", "math": lambda n: rf"\({n}\)",
}  # fmt: skip


def in_box(answer: str) -> str:
    return rf"<think>Let me see: 17 or 18?</think>The answer is \boxed{{{answer}}}."


@given(WHOLE, st.sampled_from(sorted(VARIANTS)), st.booleans())
def test_harmless_variants_of_a_whole_number(number: int, variant: str, grouped: bool) -> None:
    written = VARIANTS[variant](f"{number:,}" if grouped else str(number))
    for name in NUMBERS:
        assert score(name, in_box(written), answer=str(number)) == 1.0, (name, written)
        assert score(name, in_box(written), truncated=True, answer=number) == 1.0
        assert score(name, in_box(written), answer=str(number + 1)) == 0.0
    for name in ("numeric", "gsm8k"):
        assert score(name, f"<think>so</think>steps\n#### {written}", answer=f"x\n#### {number}") == 1.0


@given(DECIMALS, st.sampled_from(sorted(VARIANTS)))
def test_harmless_variants_of_a_decimal(number: Decimal, variant: str) -> None:
    for form in (f"{number:.2f}", f"{number:.4f}", f"{number:,.2f}"):
        for name in NUMBERS:
            assert score(name, in_box(VARIANTS[variant](form)), answer=str(number)) == 1.0, (name, form)
            assert score(name, in_box(VARIANTS[variant](form)), answer=str(number + Decimal("0.001"))) == 0.0


@given(st.integers(-999, 999), st.integers(1, 999), st.sampled_from([r"\frac", r"\dfrac", r"\tfrac"]))
def test_harmless_variants_of_a_fraction(upper: int, lower: int, command: str) -> None:
    sign, value = "-" * (upper < 0), Fraction(upper, lower)
    for form in (f"{upper}/{lower}", f"{sign}{command}{{{abs(upper)}}}{{{lower}}}", f"{command}{{{upper}}}{{{lower}}}"):
        for name in NUMBERS:
            assert score(name, in_box(form), answer=f"{2 * upper}/{2 * lower}") == 1.0, (name, form)
            assert score(name, in_box(form), answer=str(value + Fraction(1, 10**6))) == 0.0


@given(WHOLE, WHOLE, st.sampled_from(sorted(VARIANTS)))
def test_a_wrong_number_is_never_right(gold: int, other: int, variant: str) -> None:
    for name in NUMBERS:
        value = score(name, in_box(VARIANTS[variant](str(other))), answer=str(gold))
        assert value == float(gold == other)
        assert score(name, in_box(f"{other} or {gold}"), answer=str(gold)) == 0.0
        assert score(name, in_box(f"{gold}, {other}"), answer=str(gold)) == 0.0


# --- a score depends on nothing but its own text and row -----------------------------------------------------------

TEXTS = st.one_of(
    st.text(max_size=200),
    st.sampled_from([text for kind, text in hostile.texts() if kind not in ("huge", "loops") and len(text) < 3000]),
    WHOLE.map(lambda n: in_box(str(n))),
)


@given(st.lists(st.tuples(TEXTS, st.sampled_from(["81", r"x^2+\sqrt{2}", "B", "5 feet"])), min_size=1, max_size=6))
@settings(max_examples=15, deadline=None)
def test_neighbours_and_order_change_nothing(samples: list[tuple[str, str]]) -> None:
    order = random.Random(len(samples)).sample(range(len(samples)), len(samples))
    for name in hostile.names():
        declared = declaration_of(LIBRARY[name])
        if declared.scope == "group":
            continue
        rows = [{**hostile.ROWS[0], "answer": answer} for _, answer in samples]
        alone = [hostile.score(name, text, row)[0] for (text, _), row in zip(samples, rows, strict=True)]
        assert all(value is None or declared.low <= value <= declared.high for value in alone), name
        together = hostile.batch(name, [text for text, _ in samples], rows)
        assert together == alone, name
        shuffled = hostile.batch(name, [samples[i][0] for i in order], [rows[i] for i in order])
        assert shuffled == [alone[i] for i in order], name


# --- GSM8K -------------------------------------------------------------------------------------------------------


def test_every_gold_answer_of_gsm8k_is_accepted_and_no_other(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "gsm8k"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}; set STROP_SHARED to one that holds data/gsm8k")
    lines = [line for part in ("train", "test") for line in (folder / f"{part}.jsonl").open(encoding="utf-8")]
    references = [json.loads(line)["answer"] for line in lines]
    golds = [reference.split("####")[1].strip() for reference in references]
    assert len(golds) == 8792
    boxed = [in_box(gold) for gold in golds]
    classes = {Fraction(gold.replace(",", "")): gold for gold in golds}
    values = sorted(classes)
    for name in NUMBERS:
        assert LIBRARY[name](completions=boxed, answer=references) == [1.0] * len(golds)
        # Every gold of another value, within the ten nearest: what rounding, signs or separators could confuse.
        for distance in (1, 2, 5, 10):
            given = [in_box(classes[value]) for value in values[distance:]]
            assert set(LIBRARY[name](completions=given, answer=[classes[v] for v in values[:-distance]])) == {0.0}
        # And a row of every class against all others.
        for value in values[:: len(values) // 12]:
            given = [in_box(classes[v]) for v in values]
            right = LIBRARY[name](completions=given, answer=[classes[value]] * len(values))
            assert right == [float(v == value) for v in values]
    hashed = [f"<think>so</think>steps\n#### {gold}" for gold in golds]
    assert LIBRARY["gsm8k"](completions=hashed, answer=references) == [1.0] * len(golds)
    assert LIBRARY["numeric"](completions=hashed, answer=references) == [1.0] * len(golds)


def test_verdicts_are_the_same_under_every_hash_seed_and_locale() -> None:
    code = (
        "import hostile, hashlib, json\n"
        "names = [n for n in hostile.names() if n != 'reasoning_gym']\n"
        "texts = [t for k, t in hostile.texts() if k in ('hedges', 'code')]\n"
        "found = [hostile.score(n, t, hostile.ROWS[1]) for n in names for t in texts]\n"
        "print(hashlib.sha256(json.dumps(found).encode()).hexdigest())\n"
    )
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    digests = set()
    for seed, locale in (("0", "C"), ("1", "C.UTF-8")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "LC_ALL": locale, "TZ": "Asia/Tokyo", "PYTHONPATH": path}
        command = [sys.executable, "-c", code]
        digests.add(subprocess.run(command, capture_output=True, env=environment, timeout=300, check=True).stdout)
    assert len(digests) == 1
