"""Runs the probes of an audit, in order, on one bench."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ...errors import RewardError
from ..options import nearest
from . import batch, determinism, full, group, hedge, length, robustness, security, zero
from .bench import Bench, open_pool
from .records import Setting
from .registry import FAMILIES, PROBES, Finding, Probe, skip
from .report import FunctionFacts, Report

MODULES = (zero, hedge, full, length, group, batch, robustness, determinism, security)
"""Importing them registers their probes."""
LAST = ("R5",)
"""Probes that speak of everything before them."""
NO_GOLD = (
    "no completion is known to be right: name the column with the reference answer with --gold, or give known-good "
    "completions with --known-good"
)


def choose(only: Sequence[str] = (), without: Sequence[str] = ()) -> list[Probe]:
    """Return the probes to run; ids and families (`Z`) may be named. Raises RewardError for an unknown one."""
    wanted = (_ids(only, "--only") or set(PROBES)) - _ids(without, "--skip")
    return [probe for probe in all_probes() if probe.id in wanted]


def all_probes() -> list[Probe]:
    """Return every probe, by family and number."""
    families = list(FAMILIES)
    return sorted(PROBES.values(), key=lambda probe: (families.index(probe.id[0]), int(probe.id[1:])))


def _ids(names: Sequence[str], option: str) -> set[str]:
    found: set[str] = set()
    for name in (part.strip().upper() for text in names for part in text.split(",") if part.strip()):
        chosen = {i for i in PROBES if i == name or (name in FAMILIES and i.startswith(name))}
        if not chosen:
            raise RewardError(
                f"{option} names `{name}`, which is no probe",
                hint=nearest(name, PROBES) or f"ids go from {next(iter(PROBES))} to {list(PROBES)[-1]}; docs/audit.md",
            )
        found |= chosen
    return found


def run_audit(
    setting: Setting,
    probes: Sequence[Probe],
    *,
    on_probe: Callable[[Probe], None] = lambda probe: None,
) -> Report:
    """Run probes on a run's rewards. Raises RewardError where a function cannot be loaded or breaks its contract."""
    start = time.monotonic()
    with open_pool(setting) as pool:
        pool.wait_ready()
        bench = Bench(setting, pool)
        bench.lab_tasks = frozenset(probe.task for probe in probes)
        bench.find_references()
        found: dict[str, Finding] = {}
        for probe in sorted(probes, key=lambda probe: probe.id in LAST):
            on_probe(probe)
            found[probe.id] = run_probe(bench, probe)
        return Report(
            functions=function_facts(bench),
            num_rows=len(setting.problems),
            num_scored=bench.num_scored,
            seconds=time.monotonic() - start,
            lint=tuple(bench.lint()),
            findings=tuple((probe, found[probe.id]) for probe in probes),
        )


def run_probe(bench: Bench, probe: Probe) -> Finding:
    """Run one probe, or say why it cannot run."""
    if probe.needs_gold and not bench.rows:
        return skip(NO_GOLD)
    if probe.needs_gold and not bench.sound_rows and probe.id not in ("P1", "Z13"):
        return skip("no right answer earns more than a wrong one; see P1 and Z13")
    return probe.run(bench)


def function_facts(bench: Bench) -> tuple[FunctionFacts, ...]:
    """Return what the run's functions declare."""
    return tuple(
        FunctionFacts(
            name, weight, declared.kind, declared.scope, declared.low, declared.high, name in bench.rules.gated
        )
        for name, weight in bench.weights.items()
        for declared in (bench.declarations[name],)
    )
