"""The `strop` command: one thin function per verb. Heavy modules are imported when a verb needs them."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import StropError

if TYPE_CHECKING:
    from .config import Config

app = typer.Typer(
    help="Train a reasoning model with GRPO on one GPU (or a CPU), with vLLM embedded in the training loop.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, e.g. optim.learning_rate=1e-5."),
]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder; default: runs/NAME of the config.")]


@contextlib.contextmanager
def _messages() -> Iterator[None]:
    """Turn errors meant for a user into a message and their exit code, a second Ctrl-C into 130."""
    try:
        yield
    except StropError as e:
        print(f"error: {e.message}", file=sys.stderr)
        if e.hint:
            print(f"hint: {e.hint}", file=sys.stderr)
        raise typer.Exit(e.exit_code) from None
    except KeyboardInterrupt:
        print("stopped at once; `--resume` goes on from the newest checkpoint, or from the start", file=sys.stderr)
        raise typer.Exit(130) from None


def _quiet_libraries() -> None:
    """Keep libraries' banners and bars out of the view; whoever set these variables keeps them."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for a package that nothing here uses


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file; see recipes/.")],
    out: Out = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in the run folder.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    overrides: Set = None,
) -> None:
    """Train a run."""
    with _messages():
        from .config_load import load_config

        checked = load_config(config, overrides or [])
        if dry_run:
            _show_plan(checked)
            return
        folder = out or (Path(checked.run.out) if checked.run.out else Path("runs") / config.stem)
        _finish(_train(checked, folder, resume=resume), folder)


@app.command()
def demo(
    lora: Annotated[bool, typer.Option("--lora", help="Train rank-16 adapters instead of all weights.")] = False,
    out: Out = None,
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 0,
    overrides: Set = None,
) -> None:
    """Train the small model that ships with Strop to do arithmetic, in a few minutes on two CPU cores."""
    with _messages():
        from .config_load import load_config
        from .recipes_dir import recipe_path

        changes = [f"run.seed={seed}", *(overrides or [])]
        checked = load_config(recipe_path("demo-lora" if lora else "demo"), changes)
        folder = out or _unused(Path("runs") / ("demo-lora" if lora else "demo"))
        summary = _train(checked, folder, resume=False)
        before, after = summary["eval_before"], summary["eval_after"]
        if before and after:
            print(
                f"accuracy {before['pass@1']:.1%} -> {after['pass@1']:.1%} on {after['problems']} held-out problems "
                f"(pass@1, {after['k']} samples each; "
                f"pass@{after['k']} {before['pass@k']:.1%} -> {after['pass@k']:.1%}) "
                f"in {summary['seconds']:.0f} s"
            )
        _finish(summary, folder)


@app.command()
def plan(config: Annotated[Path, typer.Argument(help="YAML file.")], overrides: Set = None) -> None:
    """Show every derived number of a run with its reason; loads no weights."""
    with _messages():
        from .config_load import load_config

        _show_plan(load_config(config, overrides or []))


@app.command("eval")
def evaluate(
    target: Annotated[
        Path, typer.Argument(help="A config (the model as it is), or a run folder (its newest checkpoint).")
    ],
    overrides: Set = None,
) -> None:
    """Measure pass@1 and pass@k on held-out problems."""
    with _messages():
        _quiet_libraries()
        from .trainer.evaluate_run import evaluate_target
        from .trainer.session import shown

        result = evaluate_target(target, overrides or [])
        print(shown(result))


@app.command()
def doctor() -> None:
    """Show what is installed and whether it is a tested pair; print this with a bug report."""
    with _messages():
        _quiet_libraries()
        from .trainer.doctor import report

        for line in report():
            print(line)


rewards = typer.Typer(help="Check and audit reward functions.", no_args_is_help=True)
app.add_typer(rewards, name="rewards")

Gold = Annotated[
    str | None, typer.Option("--gold", metavar="COLUMN", help="Column with right answers; default: the usual ones.")
]
KnownGood = Annotated[
    Path | None,
    typer.Option("--known-good", metavar="FILE", help="JSON lines with `id` and `completion` of right completions."),
]
Seed = Annotated[int, typer.Option("--seed", help="Another seed takes other rows.")]


@rewards.command("check")
def check_rewards(
    config: Annotated[Path, typer.Argument(help="YAML file.")],
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of the task to try.")] = 8,
    seed: Seed = 0,
    gold: Gold = None,
    known_good: KnownGood = None,
    overrides: Set = None,
) -> None:
    """Try completions of known worth on a run's rewards, as training does before step 0; exits 1 on a failure."""
    with _messages():
        _quiet_libraries()
        from .config_load import load_config
        from .trainer.rewards_command import check_config

        result = check_config(
            load_config(config, overrides or []), rows=rows, seed=seed, gold=gold, known_good=known_good
        )
        for line in result.lines():
            print(line)
        raise typer.Exit(1 if result.failed else 0)


@rewards.command("audit")
def audit_rewards(
    config: Annotated[Path, typer.Argument(help="YAML file.")],
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of the task to try.")] = 32,
    seed: Seed = 0,
    gold: Gold = None,
    known_good: KnownGood = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="IDS", help="Ids or families of probes, e.g. Z,P1.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option("--skip", metavar="IDS", help="Ids or families to leave out.")
    ] = None,
    report: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the findings there.")] = None,
    overrides: Set = None,
) -> None:
    """Probe a run's rewards for what a policy could exploit; exits 1 if a probe fails."""
    with _messages():
        _quiet_libraries()
        from .config_load import load_config
        from .trainer.rewards_command import audit_config, check_report_path, show_audit

        if report is not None:
            check_report_path(report)
        found = audit_config(
            load_config(config, overrides or []), rows=rows, seed=seed, gold=gold, known_good=known_good,
            only=only or [], without=skip or [],
        )  # fmt: skip
        show_audit(found, report)
        raise typer.Exit(1 if found.failed else 0)


def _train(config: Config, folder: Path, *, resume: bool) -> dict[str, Any]:
    _quiet_libraries()
    from .trainer.loop import train as run

    return run(config, out=folder, resume=resume)


def _show_plan(config: Config) -> None:
    _quiet_libraries()
    from .trainer.parts import prepare

    prepared = prepare(config)
    for line in prepared.plan.lines():
        print(line)
    for reason, count in prepared.task.dropped.items():
        print(f"{count} rows are dropped: {reason}")


def _finish(summary: dict[str, Any], folder: Path) -> None:
    print(f"run folder: {folder}")
    if summary["stopped"] in ("interrupted", "paused"):
        again = f"strop train {folder / 'config.resolved.yaml'} --out {folder} --resume"
        print(f"{summary['stopped']} after step {summary['steps']}; go on with: {again}")
        raise typer.Exit(130)


def _unused(folder: Path) -> Path:
    """Return `folder`, or the first of folder-2, folder-3, … that does not exist."""
    number, candidate = 1, folder
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def main() -> None:
    """Entry point of the `strop` command. A setting without its `--set` is named; Typer would call it unexpected."""
    for before, given in itertools.pairwise(sys.argv):
        if re.fullmatch(r"[a-z]+(\.\w+)+=.*", given) and not before.startswith("--"):
            print(f"error: `{given}` stands alone; a setting needs `--set` before it", file=sys.stderr)
            print(f"hint: --set {given}", file=sys.stderr)
            raise SystemExit(2)
    app()
