"""Draw a finished run as an SVG: accuracy over its steps, and the lines that it printed.

    python scripts/picture_of_run.py RUN docs/images/demo.svg --command "strop demo"

Everything comes from the run folder: the curve and the lines from metrics.jsonl, held-out accuracy from summary.json.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from strop.monitor.metrics import read_metrics
from strop.monitor.progress import Progress

WIDTH, HEIGHT = 860, 502
LEFT, RIGHT, TOP, BOTTOM = 62, 806, 46, 246
LINE_HEIGHT = 17
FIRST_LINE = 318
WINDOW = 5
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
SANS = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
PAPER, PANEL, INK, FAINT, RULE, LINE, MARK = "#0d1117", "#161b22", "#e6edf3", "#8b949e", "#30363d", "#58a6ff", "#3fb950"


def printed_lines(rows: Sequence[Mapping[str, Any]], num_steps: int) -> list[str]:
    """Return the step lines as `strop` prints them, made by the code that prints them."""
    stream, now = io.StringIO(), 0.0
    progress = Progress(stall_warning_s=1e9, stream=stream, clock=lambda: now)
    for row in rows:
        progress.phase("generate")
        progress.advance(tokens=row["num_tokens"])
        now += row["num_tokens"] / row["tokens/generated_per_s"]
        progress.step_done(row["step"] + 1, num_steps, row)
    return stream.getvalue().splitlines()


def some_of(lines: Sequence[str]) -> list[str]:
    """Return the first steps, some in between and the last, with dots where lines are left out."""
    if len(lines) <= 9:
        return list(lines)
    middle = len(lines) // 2
    return [*lines[:3], "…", *lines[middle - 1 : middle + 1], "…", *lines[-2:]]


def place(step: float, accuracy: float, num_steps: int) -> tuple[float, float]:
    """Return the point of the chart for `step` of `num_steps` and an accuracy of 0 to 1."""
    return LEFT + (RIGHT - LEFT) * step / num_steps, BOTTOM - (BOTTOM - TOP) * accuracy


def text(x: float, y: float, content: str, *, size: int = 12, fill: str = FAINT, anchor: str = "start") -> str:
    """Return a label."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-family="{SANS}" font-size="{size}" fill="{fill}" '
        f'text-anchor="{anchor}">{escape(content)}</text>'
    )


def axes(num_steps: int) -> list[str]:
    """Return grid lines with their labels."""
    parts = []
    for percent in (0, 25, 50, 75, 100):
        _, y = place(0, percent / 100, num_steps)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="{RULE}"/>')
        parts.append(text(LEFT - 10, y + 4, f"{percent}%", anchor="end"))
    for quarter in range(5):
        step = round(num_steps * quarter / 4)
        parts.append(text(place(step, 0, num_steps)[0], BOTTOM + 20, str(step), anchor="middle"))
    parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 38, "step", anchor="middle"))
    return parts


def curve(rows: Sequence[Mapping[str, Any]], num_steps: int) -> list[str]:
    """Return a dot per step and the mean of the last steps as a line."""
    known = [(row["step"] + 1, row["accuracy"]) for row in rows if row.get("accuracy") is not None]
    points = [place(step, accuracy, num_steps) for step, accuracy in known]
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in points)
    means = []
    for i, (step, _) in enumerate(known):
        recent = [accuracy for _, accuracy in known[max(0, i + 1 - WINDOW) : i + 1]]
        means.append("{:.1f} {:.1f}".format(*place(step, sum(recent) / len(recent), num_steps)))
    return [
        f'<g fill="{LINE}" opacity="0.45">{dots}</g>',
        f'<path d="M{"L".join(means)}" fill="none" stroke="{LINE}" stroke-width="2.5" stroke-linejoin="round"/>',
    ]


def held_out(summary: Mapping[str, Any], num_steps: int) -> list[str]:
    """Return the marks of the evaluations before and after training."""
    parts = []
    for key, step, anchor, shift in (("eval_before", 0, "start", 10), ("eval_after", num_steps, "end", -10)):
        result = summary[key]
        if result is None:
            continue
        x, y = place(step, result["pass@1"], num_steps)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{MARK}" stroke="{PAPER}" stroke-width="2"/>')
        label = text(
            x + shift,
            y + 38,
            f"held out {'before' if step == 0 else 'after'}: {result['pass@1']:.1%}",
            size=14,
            fill=MARK,
            anchor=anchor,
        )
        # Once as an outline in the colour of the paper, so that no grid line runs through it.
        parts += [label.replace("<text ", f'<text stroke="{PAPER}" stroke-width="6" '), label]
    return parts


def terminal(lines: Sequence[str], command: str) -> list[str]:
    """Return the panel with the command and the lines that it printed."""
    parts = [
        f'<rect x="16" y="{FIRST_LINE - 26}" width="{WIDTH - 32}" height="{HEIGHT - FIRST_LINE + 10}" rx="6" '
        f'fill="{PANEL}"/>'
    ]
    shown = [f"$ {command}", *lines]
    for i, line in enumerate(shown):
        color = FAINT if line == "…" else INK
        parts.append(
            f'<text xml:space="preserve" x="30" y="{FIRST_LINE + i * LINE_HEIGHT}" font-family="{MONO}" '
            f'font-size="12" fill="{color}">{escape(line)}</text>'
        )
    return parts


def draw(run: Path, command: str) -> str:
    """Return the SVG of a run folder."""
    rows = read_metrics(run / "metrics.jsonl")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    num_steps = summary["steps"]
    problems = (summary["eval_after"] or {"problems": 0})["problems"]
    title = f"Share of right answers: each step's own problems, and {problems} that are never trained on"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{escape(title)}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="{PAPER}"/>',
        text(LEFT, 28, title, size=14, fill=INK),
        *axes(num_steps),
        *curve(rows, num_steps),
        *held_out(summary, num_steps),
        *terminal(some_of(printed_lines(rows, num_steps)), command),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Read a run folder and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("picture", type=Path, help="SVG file to write")
    parser.add_argument("--command", default="strop demo", help="what the first line of the terminal shows")
    args = parser.parse_args()
    args.picture.write_text(draw(args.run, args.command), encoding="utf-8")


if __name__ == "__main__":
    main()
