"""Every built-in reward on every hostile text of tests/hostile.py: CPU seconds of the worst, and no crash.

python bench/hostile_texts.py

A call that takes more than LIMIT seconds of CPU time ends the process by a signal, wherever it hangs; the file that
`--progress` names then says which one it was.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import hostile  # noqa: E402

from strop.rewards.contract import declaration_of  # noqa: E402
from strop.rewards.library import LIBRARY, PRELOADS  # noqa: E402

LIMIT = 10
"""Seconds of CPU time for one call: some fifty times the worst on a machine of its own."""
MEMORY = 4 << 30


def main(progress: str) -> None:
    texts = list(hostile.texts())
    names = hostile.names()
    for name in names:
        PRELOADS.get(name, lambda: None)()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    notes = os.open(progress, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    calls, worst = 0, dict.fromkeys(names, (0.0, "", ""))
    for name in names:
        declared = declaration_of(LIBRARY[name])
        for number, (kind, text) in enumerate(texts):
            os.pwrite(notes, f"{name:<40}{kind:<12}{number:<8}{text[:40]!r:<60}"[:160].encode("ascii", "replace"), 0)
            for row in hostile.ROWS if declared.kind == "correctness" else hostile.ROWS[:1]:
                limit_cpu()
                start = time.process_time()
                values = hostile.score(name, text, row)
                seconds = time.process_time() - start
                calls += 1
                if not all(value is None or declared.low <= value <= declared.high for value in values):
                    sys.exit(f"{name} gives {values} for {text[:60]!r} ({kind})")
                worst[name] = max(worst[name], (seconds, kind, repr(text[:40])))
    for name, (seconds, kind, text) in sorted(worst.items(), key=lambda item: -item[1][0]):
        print(f"{name:<32} {1000 * seconds:8.1f} ms  {kind:<10} {text}")
    seconds = max(entry[0] for entry in worst.values())
    print(f"{len(texts)} texts, {len(names)} built-ins, {calls} calls, 0 hangs, 0 crashes, worst {seconds:.3f} s")


def limit_cpu() -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime) + LIMIT
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--progress", default=os.devnull)
    main(parser.parse_args().progress)
