"""Checkpoints that a kill, a full disk or a flipped bit cannot take away.

`RUN/checkpoint-N/` is written under a hidden name, every file is synced, `manifest.json` comes last, then the folder is
renamed. So a folder with the final name is complete, and the manifest (size and sha256 of every file) tells whether it
still is. Only safetensors and JSON are read back; a file that the manifest does not name is never opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..monitor.files import is_leftover, partial_path, removed_path, sync_folder
from .tensorfile import tensor_bytes, write_tensors

if TYPE_CHECKING:
    import torch

FORMAT = 1
"""Version of the layout; a folder of another version is not read."""

_FOLDER = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger(__name__)

FileRecord = dict[str, int | str]
"""{"size": bytes, "sha256": hex} of one file."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose every file has been compared with its manifest."""

    step: int
    path: Path
    state: dict[str, Any]
    """Content of `state.json`."""
    files: frozenset[str]
    """Names of its files, relative to `path`."""
    skipped: tuple[str, ...] = ()
    """Newer checkpoints that could not be used, each with the reason."""

    def tensors(self, file: str) -> dict[str, torch.Tensor]:
        """Read one safetensors file of the checkpoint onto the CPU, in the dtypes that were written.

        Raises CheckpointError when the checkpoint has no such file.
        """
        from safetensors.torch import load_file

        if file not in self.files:
            raise CheckpointError(f"{self.path} has no {file}; it holds {', '.join(sorted(self.files))}")
        return load_file(self.path / file)


def write_checkpoint(
    run_dir: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    extra: Callable[[Path], None] | None = None,
    keep: int,
    spared: int | None = None,
) -> Path:
    """Write `RUN/checkpoint-STEP`, durable when this returns, then remove all but the `keep` newest up to this step.

    The checkpoint of step `spared` is not removed.

    `tensors` maps file names (`optimizer.safetensors`) to tensors of any device, layout or shared storage; `state`
    becomes `state.json` (floats that JSON lacks, such as NaN, are kept in Python's spelling); `extra` may write further
    files and folders into the folder it is given. A step has one state: when `checkpoint-STEP` is there already and
    verifies, it is kept as it is.

    Raises CheckpointError when the disk does not take it; older checkpoints are untouched then.
    """
    assert keep >= 1, f"keep is {keep}"
    assert all(name.endswith(".safetensors") and "/" not in name for name in tensors), f"file names: {list(tensors)}"
    encoded_state = json.dumps(dict(state), ensure_ascii=False, indent=1).encode()
    final = run_dir / f"checkpoint-{step}"
    if _problem_with(final) is None:
        return final
    partial = partial_path(final)
    try:
        _discard(partial)
        partial.mkdir()
        if extra is not None:
            extra(partial)
        records = {name: write_tensors(partial / name, content) for name, content in tensors.items()}
        records["state.json"] = _write_synced(partial / "state.json", encoded_state)
        _record_others(partial, records)
        manifest = {"format": FORMAT, "step": step, "files": records}
        _write_synced(partial / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True).encode())
        sync_folder(partial)
        _set_aside(final)
        partial.rename(final)
        sync_folder(run_dir)
    except BaseException as e:
        with contextlib.suppress(OSError):
            _discard(partial)
        if _is_write_failure(e):
            needed = sum(tensor_bytes(content) for content in tensors.values()) + len(encoded_state)
            raise _write_error(run_dir, step, e, needed) from e
        raise
    _prune(run_dir, step, keep, spared)
    return final


def find_checkpoints(run_dir: Path) -> list[int]:
    """Return the steps that have a checkpoint folder, ascending; none of them is verified by this."""
    try:
        names = os.listdir(run_dir)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        raise CheckpointError(f"run folder {run_dir} cannot be read: {e.strerror}") from e
    return sorted(int(match[1]) for name in names if (match := _FOLDER.fullmatch(name)))


def read_latest(run_dir: Path) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, or None when the run has none.

    Broken ones are skipped and named in `Checkpoint.skipped`. Raises CheckpointError when there are checkpoints and
    none verifies.
    """
    skipped: list[str] = []
    for step in reversed(find_checkpoints(run_dir)):
        try:
            return _read(run_dir / f"checkpoint-{step}", tuple(skipped))
        except CheckpointError as e:
            skipped.append(e.message)
    if skipped:
        raise CheckpointError(
            f"no checkpoint in {run_dir} can be used: {'; '.join(skipped)}",
            hint="restore one of these folders from a copy, or start again with another --out",
        )
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the one checkpoint at `path`. Raises CheckpointError when it is incomplete or was changed."""
    return _read(path, ())


def is_complete(path: Path) -> bool:
    """Whether `path` is a checkpoint that has all of its files in their sizes; their content is not compared."""
    return _problem_with(path, compare_content=False) is None


def clean_leftovers(run_dir: Path) -> list[str]:
    """Remove what killed processes left unfinished in `run_dir` and return the names; call it with the run locked."""
    try:
        removed = sorted(name for name in os.listdir(run_dir) if is_leftover(name))
        for name in removed:
            _discard(run_dir / name)
    except OSError as e:
        raise CheckpointError(
            f"unfinished files of an earlier process in {run_dir} cannot be removed: {e.strerror or e}",
            hint="mend the permissions of the run folder",
        ) from e
    return removed


def _read(path: Path, skipped: tuple[str, ...]) -> Checkpoint:
    problem = _problem_with(path)
    if problem is not None:
        raise CheckpointError(f"{path.name} is not usable: {problem}", hint=f"looked in {path.parent}")
    manifest = json.loads((path / "manifest.json").read_bytes())
    try:
        state = json.loads((path / "state.json").read_bytes())
    except ValueError as e:
        raise CheckpointError(f"{path.name} is not usable: state.json is not JSON: {e}") from e
    return Checkpoint(int(manifest["step"]), path, state, frozenset(manifest["files"]), skipped)


def _problem_with(path: Path, *, compare_content: bool = True) -> str | None:
    """Why `path` is not a complete checkpoint, or None. Without `compare_content` only names and sizes count."""
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            return "it is a link or a file, not a folder"
        if not _is_plain_file(path, "manifest.json"):
            return "manifest.json is missing"
        manifest = json.loads((path / "manifest.json").read_bytes())
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            return f"manifest.json is not of format {FORMAT}"
        if f"checkpoint-{manifest.get('step')}" != path.name:
            return f"manifest.json is of step {manifest.get('step')}"
        files = manifest.get("files")
        if not isinstance(files, dict) or "state.json" not in files:
            return "manifest.json names no state.json"
        for name, record in files.items():
            problem = _problem_with_file(path, name, record, compare_content)
            if problem is not None:
                return problem
    except FileNotFoundError:
        return "it is missing"
    except (ValueError, RecursionError):
        return "manifest.json is not JSON"
    except OSError as e:
        return f"it cannot be read: {e.strerror or e}"
    return None


def _problem_with_file(folder: Path, name: str, record: Any, compare_content: bool) -> str | None:
    parts = PurePosixPath(name).parts
    if not parts or name != "/".join(parts) or ".." in parts or parts[0] == "/":
        return f"manifest.json names {name!r}, which is not a file of the folder"
    if not isinstance(record, dict) or not _SHA256.fullmatch(str(record.get("sha256"))):
        return f"manifest.json has no checksum of {name}"
    if not _is_plain_file(folder, name):
        return f"{name} is missing"
    size = (folder / name).stat().st_size
    if size != record.get("size"):
        return f"{name} has {size} bytes, {record.get('size')} were written"
    if compare_content and _sha256(folder / name) != record["sha256"]:
        return f"the content of {name} has changed since it was written"
    return None


def _is_plain_file(folder: Path, name: str) -> bool:
    """Whether `name` is a file that no link on the way leads out of the folder; a pipe would block whoever opens it."""
    path = folder / name
    parents = [parent for parent in path.parents if parent != folder and parent.is_relative_to(folder)]
    try:
        return all(stat.S_ISDIR(parent.lstat().st_mode) for parent in parents) and stat.S_ISREG(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _write_synced(path: Path, data: bytes) -> FileRecord:
    with path.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _record_others(partial: Path, records: dict[str, FileRecord]) -> None:
    """Sync and hash what `extra` wrote, at any depth."""
    for folder, folders, files in os.walk(partial):
        for name in (*folders, *files):
            path = Path(folder, name)
            relative = path.relative_to(partial).as_posix()
            if path.is_symlink():
                raise CheckpointError(f"{relative} of a checkpoint is a link; a checkpoint has to hold the file itself")
            if name in folders:
                sync_folder(path)
            elif relative not in records:
                with path.open("rb") as f:
                    os.fsync(f.fileno())
                    digest = hashlib.file_digest(f, "sha256").hexdigest()
                records[relative] = {"size": path.stat().st_size, "sha256": digest}


def _set_aside(path: Path) -> None:
    """Rename a checkpoint away in one go, so that no half-deleted folder ever looks complete, then delete it."""
    if not path.is_symlink() and not path.exists():
        return
    away = removed_path(path)
    _discard(away)
    path.rename(away)
    _discard(away)


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _prune(run_dir: Path, newest: int, keep: int, spared: int | None) -> None:
    """Remove checkpoints before the `keep` newest complete ones up to `newest`; a failure is told, not raised."""
    complete = 0
    for step in reversed(find_checkpoints(run_dir)):
        path = run_dir / f"checkpoint-{step}"
        if step > newest or (complete >= keep and step == spared):
            continue
        if complete >= keep:
            try:
                _set_aside(path)
            except OSError as e:
                _log.warning("%s is no longer needed and cannot be removed: %s", path, e.strerror or e)
        elif _problem_with(path, compare_content=False) is None:
            complete += 1


def _is_write_failure(error: BaseException) -> bool:
    """Whether the disk is at fault. The Rust writers of safetensors and tokenizers only say so in their text."""
    return isinstance(error, OSError) or (isinstance(error, Exception) and "(os error " in str(error))


def _write_error(run_dir: Path, step: int, error: BaseException, needed: int) -> CheckpointError:
    reason = str(error)
    if isinstance(error, OSError) and error.strerror:
        reason = f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    try:
        free = f"{shutil.disk_usage(run_dir).free:,} are free"
    except OSError:
        free = "the folder cannot be read"
    kept = [n for n in find_checkpoints(run_dir) if n != step]
    rest = f"the checkpoint of step {kept[-1]} is untouched" if kept else "there is no earlier checkpoint"
    return CheckpointError(
        f"the checkpoint of step {step} cannot be written to {run_dir}: {reason}; "
        f"at least {needed:,} bytes are needed and {free}; {rest}",
        hint="free space there (all but the newest checkpoint may go), or copy the run folder to another disk and set "
        "run.out to it; then go on with --resume",
    )
