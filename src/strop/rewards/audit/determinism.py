"""Determinism and purity probes: one text and one row give one float, whatever else is going on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .bench import Bench
from .registry import Finding, Severity, ok, probe

CIRCUMSTANCES: tuple[Mapping[str, str], ...] = (
    {"PYTHONHASHSEED": "0", "LC_ALL": "C", "TZ": "UTC"},
    {"PYTHONHASHSEED": "1", "LC_ALL": "C.UTF-8", "TZ": "Asia/Kathmandu"},
    {"PYTHONHASHSEED": "2", "LC_ALL": "tr_TR.UTF-8", "TZ": "America/St_Johns"},
    {"PYTHONHASHSEED": "3", "LC_ALL": "C", "TZ": "Pacific/Chatham"},
    {"PYTHONHASHSEED": "4", "LC_ALL": "C.UTF-8", "TZ": "Etc/GMT+12"},
)
"""Five hash seeds, three locales, five time zones; a locale that is not installed counts as C."""
LOAD_S = 20.0
EXPECTED_EFFECTS: Mapping[str, tuple[str, ...]] = {
    "python_tests": ("subprocess", "os.", "open", "socket", "shutil", "ctypes"),
}
"""Built-in functions whose work is to start something, and the audit events that belong to it."""

_PURE = "a score must follow from the completion and its row alone"


@probe("D1", "the same input ten times", needs_gold=False, task="repeat")
def repeated(bench: Bench) -> Finding:
    """Under other seeds of the rollout, so that a function which draws random numbers shows."""
    return _differing(bench, bench.lab.result("repeat"), "when it is scored again")


@probe("D2", "fresh processes: hash seed, locale, time zone", needs_gold=False)
def processes(bench: Bench) -> Finding:
    """Five processes, each under other circumstances."""
    order = bench.lab.order("values")
    with ThreadPoolExecutor(2) as starters:
        runs = list(starters.map(lambda around: bench.lab.run(order, around), CIRCUMSTANCES))
    base, trouble = runs[0]
    for (results, trouble), around in zip(runs, CIRCUMSTANCES, strict=True):
        if "values" not in results:
            return _lost(trouble)
        for first, other in zip(base["values"], results["values"], strict=True):
            if first != other:
                seen = f"{first[2]} | {other[2]} under {' '.join(f'{k}={v}' for k, v in around.items())}"
                return _differing(bench, [(first[0], first[1], seen)], "in another process")
    return ok(f"{len(base['values'])} calls in {len(runs)} processes")


@probe("D3", "two threads at once", needs_gold=False, task="threads")
def threads(bench: Bench) -> Finding:
    """Strop calls functions in one thread; a function that shares state between threads shows here."""
    return _differing(bench, bench.lab.result("threads"), "when two threads score", "WARN")


@probe("D4", "a busy machine", needs_gold=False, task="values")
def load(bench: Bench) -> Finding:
    """The same calls while every core is busy: a verdict that a clock decides shows."""
    idle = bench.lab.result("values")
    if idle is None:
        return _lost(bench.lab.trouble)
    burn = f"import time\nend = time.monotonic() + {LOAD_S}\nwhile time.monotonic() < end: sum(range(9999))"
    spinners = [subprocess.Popen([sys.executable, "-S", "-c", burn]) for _ in range(os.cpu_count() or 1)]
    try:
        results, trouble = bench.lab.run(bench.lab.order("values"))
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()
    if "values" not in results:
        return _lost(trouble)
    differing = [(a[0], a[1], f"{a[2]} | {b[2]}") for a, b in zip(idle, results["values"], strict=True) if a != b]
    return _differing(bench, differing, "on a busy machine")


@probe("D5", "global random generators", needs_gold=False, task="purity")
def generators(bench: Bench) -> Finding:
    """Drawing from `random`, NumPy's or torch's global generator. Strop seeds them for each call; nobody else does."""
    return _effects(
        bench, "random", "draws from the global generator of", "WARN",
        "use random.Random(seed) of your own, or no random numbers at all",
    )  # fmt: skip


@probe("D6", "files, sockets, processes, environment", needs_gold=False, task="purity")
def effects(bench: Bench) -> Finding:
    """Seen by an audit hook (PEP 578) while each function scores. Reading the clock is in D8."""
    found = bench.lab.result("purity")
    if found is None:
        return _lost(bench.lab.trouble)
    worst: Severity = "OK"
    seen: list[str] = []
    for name, noted in found.items():
        own = EXPECTED_EFFECTS.get(name, ())
        events = [e for e in noted["events"] if not e.startswith(("clock", *own))]
        if events:
            seen.append(f"`{name}`: {', '.join(events[:3])}")
            only_reads = all(event.startswith(("open: read", "os.listdir", "os.scandir")) for event in events)
            worst = "WARN" if only_reads and worst != "FAIL" else "FAIL"
    if worst == "OK":
        declared = [name for name in found if name in EXPECTED_EFFECTS]
        return ok(f"beside what {', '.join(declared)} is for" if declared else "")
    return Finding(
        worst, "; ".join(seen)[:300],
        advice="read files when the module is imported, and keep networks out of a reward: what they say changes",
    )  # fmt: skip


@probe("D7", "arguments that are changed", needs_gold=False, task="purity")
def mutation(bench: Bench) -> Finding:
    """What a row holds is the same after the call as before. Each function gets copies, so no other one is misled."""
    return _effects(
        bench, "mutated", "changes its arguments on", "WARN", "copy a column before sorting or popping from it"
    )


@probe("D8", "code that is run, and the clock", needs_gold=False, task="purity")
def executed(bench: Bench) -> Finding:
    """Code that was compiled while scoring and then run (the audit event `exec`; parsing alone raises only `compile`).

    Readings of the clock are seen by wrappers around the functions of `time`, when the function's own file calls them.
    """
    found = bench.lab.result("purity")
    if found is None:
        return _lost(bench.lab.trouble)
    running = {name: noted["executed"] for name, noted in found.items() if noted["executed"]}
    if running:
        name, code = next(iter(running.items()))
        return Finding(
            "FAIL", f"`{name}` runs code that was made while scoring ({', '.join(code)})",
            advice="never eval or exec what a model wrote: parse it (ast.parse, Fraction) and walk the tree",
        )  # fmt: skip
    clocks = [name for name, noted in found.items() if any(e.startswith("clock") for e in noted["events"])]
    if clocks:
        return Finding(
            "WARN", f"{', '.join(f'`{name}`' for name in clocks)} reads the clock",
            advice="decide by bounds on the input, not by the time it takes: rewards.timeout_s is there for the rest",
        )  # fmt: skip
    return ok()


def _effects(bench: Bench, kind: str, does: str, severity: Severity, advice: str) -> Finding:
    found = bench.lab.result("purity")
    if found is None:
        return _lost(bench.lab.trouble)
    seen = {name: noted[kind] for name, noted in found.items() if noted[kind]}
    if not seen:
        return ok()
    said = "; ".join(f"`{name}` {does} {', '.join(items[:3])}" for name, items in seen.items())
    return Finding(severity, said, advice=advice)


def _differing(bench: Bench, found: Any, when: str, severity: Severity = "FAIL") -> Finding:
    if found is None:
        return _lost(bench.lab.trouble)
    if not found:
        return ok()
    name, where, seen = found[0]
    rows = len({row for _, row, _ in found})
    return Finding(
        severity, f"`{name}` gives another value {when}: {seen[:160]}", rows=rows, problem=where, advice=_PURE
    )


def _lost(trouble: str) -> Finding:
    return Finding("FAIL", trouble, advice="a function must not hang or end its process")
