"""Answers and completions that stall, crash or deceive graders. All are plain text and are never run here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

MEGABYTE = 1 << 20

BOMBS: tuple[str, ...] = (
    "9**9**9", "9^{9^9}", "10^{10^{10}}", "10**10**10", "9^{9^{9^9}}", r"1.0\times10^{400000000}",
    "9^{9^9} \\bmod 100", "1e999999999", "1e-999999999", "1000000!", "100000000!", "100!!", "((9!)!)!",
    r"\binom{1000000}{500000}",
    r"\sum_{i=1}^{1000000000} i^i", r"\sum_{i=1}^{100000}\sin(i)", r"\prod_{i=1}^{10000000} i",
    r"\int_0^1 \sin(x^x) dx", r"\lim_{x\to 0} \frac{\sin(x^{x^x})}{x}", r"\log(\log(\log(9^{9^9})))",
    "gcd(" + "7" * 4000 + "," + "3" * 4000 + ")",
    "x^{1000000}+1", "(x+1)^{100000}", "2" + "*2" * 3000,
)  # fmt: skip
"""Short answers whose value takes forever, or does not fit into memory."""


@cache
def nested() -> tuple[str, ...]:
    """Answers of extreme depth or length."""
    return (
        *("(" * n + "81" + ")" * n for n in (10, 12, 20, 35, 44, 500, 5000)),
        *("{" * n + "81" + "}" * n for n in (100, 10_000, 100_000)),
        r"\boxed{" * 1000 + "81" + "}" * 1000, r"\boxed{" * 100_000, "}" * 100_000,
        r"\frac{1}{" * 200 + "2" + "}" * 200, r"\sqrt{" * 60 + "2" + "}" * 60, r"\sin(" * 60 + "1" + ")" * 60,
        "[" * 2000 + "]" * 2000, "-" * 5000 + "1", "1" * 100_000, "0." + "3" * 100_000, "1/" * 5000 + "1",
        "1+" * 20_000 + "1", "x_{" * 300 + "1" + "}" * 300, "^".join("2" * 200), "=".join(["81"] * 2000),
    )  # fmt: skip


@cache
def odd() -> tuple[str, ...]:
    """Characters and values that parsers stumble over."""
    return (
        "nan", "-inf", "1e400", "0/0", "1/0", r"\frac{1}{0}", "--1", "+-+1", "1__000", "1,,000", ".", "-", "%", "$$",
        "$", "\\", r"\frac", r"\frac{1}", r"\sqrt", "{", "}", "\\boxed", "\\boxed{", "\\boxed}", "####", "#### ####",
        "\x00", "8\x001", "\ud800", "8\udfff1", "\u202e18\u202c", "8\u200b1", "\u2066\u2067", "\ufeff81",
        "\uff18\uff11", "\u0668\u0661", "\u09ee\u09e7", "\U0001d7f6\U0001d7cf", "\u2078\u00b9", "\u2167", "\u00bd",
        "\u221e", "e\u0301" * 500, "\U0001f600" * 500, "\r\n81\r\n", "\v81\f", "\x1b[31m81\x1b[0m",
        "a\u0300\u0301\u0302" * 300, "(?i)81", "(a+)+$",
        "a" * 60 + "!", "a" * 30_000 + "!", "%s%s%n", "{0.__class__}", "${81}", "{{81}}", "<!--81-->", "<![CDATA[81]]>",
    )  # fmt: skip


@cache
def bulky() -> tuple[str, ...]:
    """Whole completions of great size."""
    return (
        "x" * MEGABYTE, "word " * (MEGABYTE // 5), "1 " * (MEGABYTE // 2), "\n" * 100_000, "line\n" * 100_000,
        "<think>" * 20_000, "<think></think>" * 10_000, "<answer>" * 20_000, "<answer>1</answer>" * 10_000,
        r"\boxed{1} " * 20_000, "#### 1\n" * 20_000, "```python\n" * 10_000, "$" * 100_000, "\\" * 100_000,
        " " * MEGABYTE,
        "(" * 100_000, '{"a":' * 20_000, "[" * 100_000,
    )  # fmt: skip


CODE_FORMS: Mapping[str, Callable[[Path], str]] = {
    "import in an expression": lambda marker: f"__import__('os').mkdir({str(marker)!r})",
    "attribute walk": lambda marker: (
        "[c for c in ().__class__.__base__.__subclasses__() if c.__name__=='_wrap_close'][0]"
        f".__init__.__globals__['mkdir']({str(marker)!r})"
    ),
    "exec of a text": lambda marker: f'exec("import os; os.mkdir({str(marker)!r})")',
    "statement": lambda marker: f"import os\nos.mkdir({str(marker)!r})",
    "lambda that is called": lambda marker: f"(lambda: __import__('pathlib').Path({str(marker)!r}).mkdir())()",
    "shell": lambda marker: f"$(mkdir {marker}) `mkdir {marker}`; mkdir {marker}",
    "format field and f-string": lambda marker: f"{{__import__('os').mkdir({str(marker)!r})}}",
}
"""Seven ways in which text becomes code, each of which would make the directory that it is given."""

DATA_FORMS: Mapping[str, Callable[[Path], str]] = {
    "pickle": lambda marker: f"cos\nmkdir\n(V{marker}\ntR.",
    "YAML object": lambda marker: f"!!python/object/apply:os.mkdir ['{marker}']",
    "YAML object, new": lambda marker: f"!!python/object/new:os.mkdir ['{marker}']",
    "template": lambda marker: f"{{{{ cycler.__init__.__globals__.os.mkdir('{marker}') }}}}",
}
"""Serialised forms that unsafe loaders turn into calls."""


def hostile_answers() -> tuple[str, ...]:
    """Return every answer above; each is tried in the asked form."""
    return (*BOMBS, *nested(), *odd())
