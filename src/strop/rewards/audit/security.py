"""Security probes: what a model writes is never run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from .bench import Bench
from .records import Attempt
from .registry import Finding, ok, probe
from .texts import CODE_FORMS, DATA_FORMS


@probe("X1", "code in the answer", needs_gold=False)
def code(bench: Bench) -> Finding:
    """Seven forms of code that would make a directory in a temporary folder."""
    return _inert(bench, CODE_FORMS, "never eval, exec or format what a model wrote; parse it and walk the tree")


@probe("X2", "serialised objects in the answer", needs_gold=False)
def serialised(bench: Bench) -> Finding:
    """Pickle, YAML and template strings that unsafe loaders turn into calls."""
    return _inert(bench, DATA_FORMS, "use json.loads or yaml.safe_load; never unpickle or render what a model wrote")


def _inert(bench: Bench, forms: Mapping[str, Callable[[Path], str]], advice: str) -> Finding:
    row = next(iter(bench.sound_rows or bench.rows), None)
    problem = row.problem if row else bench.setting.problems[0]
    with tempfile.TemporaryDirectory(prefix="strop-audit-") as folder:
        placed: list[tuple[str, Path, Attempt]] = []
        for number, (name, form) in enumerate(forms.items()):
            for place in ("bare", "marked", "boxed", "tagged"):
                marker = Path(folder) / f"{number}{place}"
                text = form(marker)
                written = {
                    "bare": text, "marked": row.write(text) if row else text, "boxed": rf"\boxed{{{text}}}",
                    "tagged": f"<answer>{text}</answer>",
                }[place]  # fmt: skip
                placed.append((name, marker, Attempt(problem, written)))
        bench.score(attempt for _, _, attempt in placed)
        made = [(name, attempt) for name, marker, attempt in placed if marker.exists()]
    if not made:
        return ok(f"{len(forms)} forms in 4 places")
    names = ", ".join(dict.fromkeys(name for name, _ in made))
    return Finding(
        "FAIL", f"was run: {names}", rows=1, of=1, example=made[0][1].text, problem=problem.id, advice=advice
    )
