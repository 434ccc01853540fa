"""What an audit found, as a table for people and as JSON for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .registry import SEVERITIES, Finding, Probe

if TYPE_CHECKING:
    from rich.console import Console

FORMAT_VERSION = 1
EXAMPLE_CHARS = 120
_COLOURS = {"FAIL": "bold red", "WARN": "yellow", "REPORT": "cyan", "SKIP": "dim", "OK": "green"}


@dataclass(frozen=True, slots=True)
class FunctionFacts:
    """A reward function as the run uses it."""

    name: str
    weight: float
    kind: str
    scope: str
    low: float
    high: float
    gated: bool


@dataclass(frozen=True, slots=True)
class Report:
    """The result of an audit."""

    functions: tuple[FunctionFacts, ...]
    num_rows: int
    num_scored: int
    seconds: float
    lint: tuple[Mapping[str, str], ...]
    """What the lint says of the configuration: severity, said, advice."""
    findings: tuple[tuple[Probe, Finding], ...]

    @property
    def counts(self) -> dict[str, int]:
        """Number of probes by severity."""
        counted = Counter(finding.severity for _, finding in self.findings)
        return {severity: counted[severity] for severity in SEVERITIES}

    @property
    def failed(self) -> bool:
        """Whether a probe or the lint failed."""
        return bool(self.counts["FAIL"]) or any(item["severity"] == "FAIL" for item in self.lint)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it; docs/audit.md describes the keys."""
        return {
            "version": FORMAT_VERSION,
            "functions": [asdict(function) for function in self.functions],
            "rows": self.num_rows,
            "completions_scored": self.num_scored,
            "seconds": round(self.seconds, 3),
            "counts": self.counts,
            "lint": [dict(item) for item in self.lint],
            "probes": [
                {"id": probe.id, "family": probe.family, "title": probe.title, **_plain(asdict(finding))}
                for probe, finding in self.findings
            ],
        }


def _plain(finding: dict[str, Any]) -> dict[str, Any]:
    """Lone surrogates are no UTF-8; they are written as escapes."""
    return {
        key: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
        for key, value in finding.items()
    }


def shorten(text: str, limit: int = EXAMPLE_CHARS) -> str:
    """Return a text on one line, in quotes, its middle left out where it is long."""
    if len(text) > limit:
        half = (limit - 5) // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return repr(text)


def print_report(report: Report, console: Console) -> None:
    """Print the table, and below it an example and advice for what failed or is a warning."""
    from rich.table import Table
    from rich.text import Text

    for facts in report.functions:
        gate = ", gated" if facts.gated else ""
        console.print(
            f"{facts.name}: weight {facts.weight:g}, {facts.kind}, {facts.scope} scope, "
            f"range [{facts.low:g}, {facts.high:g}]{gate}",
            markup=False, highlight=False,
        )  # fmt: skip
    for item in report.lint:
        console.print(f"lint {item['severity']}: {item['said']}\n  hint: {item['advice']}", markup=False)
    table = Table(show_lines=False, pad_edge=False, box=None)
    for title in ("probe", "what is tried", "", "rows", "max", "found"):
        table.add_column(title, justify="right" if title in ("rows", "max") else "left")
    for probe, finding in report.findings:
        rows = f"{finding.rows}/{finding.of}" if finding.of else ""
        highest = "" if finding.max_score is None else f"{finding.max_score:.3g}"
        severity = Text(finding.severity, style=_COLOURS[finding.severity])
        table.add_row(probe.id, probe.title, severity, rows, highest, Text(_printable(finding.said)))
    console.print(table)
    for probe, finding in report.findings:
        if finding.severity in ("FAIL", "WARN"):
            _print_detail(probe, finding, console)
    counted = ", ".join(f"{count} {severity}" for severity, count in report.counts.items() if count)
    console.print(
        f"{len(report.findings)} probes: {counted}; {report.num_scored} completions scored on {report.num_rows} rows "
        f"in {report.seconds:.1f} s",
        markup=False, highlight=False,
    )  # fmt: skip


def _print_detail(probe: Probe, finding: Finding, console: Console) -> None:
    lines = [f"{probe.id} {finding.severity}: {probe.title}: {_printable(finding.said)}"]
    if finding.example or finding.problem:
        lines.append(f"  row {finding.problem}: {shorten(finding.example)}")
    if finding.advice:
        lines.append(f"  hint: {finding.advice}")
    console.print("\n".join(lines), markup=False, highlight=False)


def _printable(text: str) -> str:
    return "".join(ch if ch.isprintable() else " " for ch in text)
