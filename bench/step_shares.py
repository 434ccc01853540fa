"""What a step of a finished run is made of: median seconds and share of each phase, and tokens per second.

python bench/step_shares.py runs/demo
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from strop.monitor.metrics import read_metrics

SKIP = 2
"""Leading steps left out: they fill caches."""


def main(folder: Path) -> None:
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["step"] >= SKIP]
    totals = [row["step_time"] for row in rows]
    print(f"{len(rows)} steps, {statistics.median(totals):.3f} s each (median; {min(totals):.3f} to {max(totals):.3f})")
    whole = sum(totals)
    names = sorted({k for row in rows for k in row if k.startswith("time/")})
    for name in names:
        seconds = [row.get(name) or 0.0 for row in rows]
        print(f"  {name:<18} {statistics.median(seconds):8.4f} s  {sum(seconds) / whole:6.1%} of all time")
    work = sum((row.get("time/generate_s") or 0) + (row.get("time/train_s") or 0) for row in rows)
    print(f"neither rollout nor training: {1 - work / whole:.1%}")
    for name in ("tokens/generated_per_s", "tokens/trained_per_s"):
        values = [row[name] for row in rows if row.get(name)]
        print(f"{name}: {statistics.median(values):,.0f} (median)")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
