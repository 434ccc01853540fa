"""The log of verdicts that a clock or a dead worker decided, written before they are used and replayed on resume.

Such a verdict depends on the machine. A resumed run that scored the completion again could come to another one and
would then differ from the uninterrupted run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import RunError
from ..types import Rollout

Key = tuple[str, int, str]
"""(function name, seed of the rollout, digest of the completion's text)."""


class VerdictLog:
    """Verdicts by (function, seed, text). With a path, each is one JSON line that is on disk before `add` returns."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._reasons: dict[Key, str] = {}
        if path is not None and path.exists():
            self._read(path)

    def __len__(self) -> int:
        return len(self._reasons)

    def find(self, name: str, rollout: Rollout) -> str | None:
        """Return the reason why this function gave no score for this completion earlier, or None."""
        return self._reasons.get(_key(name, rollout)) if self._reasons else None

    def add(self, name: str, rollouts: Iterable[Rollout], reason: str) -> None:
        """Write the verdict on one completion, or on all of a group, to disk. Raises RunError if that fails."""
        keys = [_key(name, rollout) for rollout in rollouts]
        self._reasons |= dict.fromkeys(keys, reason)
        if self._path is None:
            return
        entries = ({"function": key[0], "seed": key[1], "text": key[2], "reason": reason} for key in keys)
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        is_new = not self._path.exists()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
            if is_new:
                _sync_folder(self._path.parent)
        except OSError as e:
            raise RunError(
                f"the verdict log `{self._path}` cannot be written: {e}",
                hint="free space on the disk of run.out, or take another folder",
            ) from e

    def _read(self, path: Path) -> None:
        """Read the log. A last line without its line break was torn before its verdict was used: cut it off."""
        try:
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                with path.open("r+b") as file:
                    file.truncate(whole)
        except OSError as e:
            raise RunError(f"the verdict log `{path}` cannot be read: {e}", hint="check the folder of run.out") from e
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._reasons[entry["function"], entry["seed"], entry["text"]] = entry["reason"]
            except (ValueError, KeyError, TypeError) as e:
                raise RunError(
                    f"{path}:{number} is not a verdict", hint="restore the file, or start the run in a new folder"
                ) from e


def _key(name: str, rollout: Rollout) -> Key:
    text = hashlib.blake2b(rollout.text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return name, rollout.seed, text


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
