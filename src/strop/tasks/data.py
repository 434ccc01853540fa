"""Where rows come from: a file, a folder of files named by split, a saved data set, or the Hugging Face hub."""

from __future__ import annotations

import difflib
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn, Protocol

from ..errors import ConfigError, DataError
from .readers import READERS, FileRows, Row, check_texts, read_file

SUFFIXES = ", ".join(READERS)
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")


class Rows:
    """The rows of one split, in a fixed order, each with a stable id and a place for messages."""

    def __init__(self, name: str, split: str, parts: Sequence[FileRows]) -> None:
        self.name, self.split = name, split
        self._parts = [part for part in parts if part.rows]
        self._starts = list(accumulate((len(part.rows) for part in self._parts), initial=0))
        if not self._parts:
            where = ", ".join(f"`{part.label}`" for part in parts)
            raise DataError(f"{where}: no rows", hint="task.path has to name data with at least one row")

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Row:
        part = self._part(index)
        return self._parts[part].rows[index - self._starts[part]]

    def problem_id(self, index: int) -> str:
        """Return `<data set>/<split>/<row index>`."""
        return f"{self.name}/{self.split}/{index}"

    def where(self, index: int) -> str:
        """Return file and line (or row index) of a row."""
        part = self._part(index)
        return self._parts[part].where(index - self._starts[part])

    def _part(self, index: int) -> int:
        return bisect_right(self._starts, index) - 1


class Source(Protocol):
    """A data set with named splits."""

    def read(self, split: str, setting: str) -> Rows:
        """Return a split. Raises DataError, with `setting` in the hint, if there is none of that name."""
        ...


def open_source(path: str, *, name: str | None = None, dataset_config: str | None = None) -> Source:
    """Find what `task.path` means; `name` (by default that of file, folder or hub id) begins the problem ids.

    Raises DataError if it is nothing that can be read.
    """
    local = Path(path).expanduser()
    if "\0" not in path and local.is_file():
        _refuse_config(path, dataset_config)
        if local.suffix.lower() not in READERS:
            raise DataError(
                f"`{path}`: files with the suffix `{local.suffix}` cannot be read", hint=f"task.path takes {SUFFIXES}"
            )
        return FileSource(local, name or local.stem)
    if "\0" not in path and local.is_dir():
        name = name or local.resolve().name
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            _refuse_config(path, dataset_config)
            return SavedSource(local, name)
        return FolderSource(local, name, dataset_config)
    if _HUB_ID.fullmatch(path) and Path(path).suffix.lower() not in READERS:
        return HubSource(path, name or path, dataset_config)
    near = difflib.get_close_matches(local.name, _names_in(local.parent), n=1)
    raise DataError(
        f"task.path: there is no file or folder `{path}`",
        hint=f"did you mean `{local.parent / near[0]}`?" if near else f"give a file ({SUFFIXES}), a folder or a hub id",
    )


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except (OSError, ValueError):
        return []


def _refuse_config(path: str, dataset_config: str | None) -> None:
    if dataset_config is not None:
        raise ConfigError(
            f"task.dataset_config: {dataset_config!r} given, but `{path}` has no configurations",
            hint="remove task.dataset_config",
        )


def _no_split(path: str | Path, split: str, splits: Sequence[str], setting: str) -> NoReturn:
    near = difflib.get_close_matches(split, splits, n=1)
    advice = f"set {setting} to `{near[0] if near else splits[0]}`"
    if setting == "task.eval_split":
        advice = "set task.eval_split to null to hold out task.eval_size of the training rows"
        advice += f", or to `{near[0]}`" if near else ""
    raise DataError(f"`{path}` has no split `{split}`; it has {', '.join(splits)}", hint=advice)


@dataclass(frozen=True, slots=True)
class FileSource:
    """A single file is the split `train`; its own stem names it as well."""

    path: Path
    name: str

    def read(self, split: str, setting: str) -> Rows:
        """Return the rows of the file."""
        if split not in ("train", self.path.stem):
            _no_split(self.path, split, ["train"], setting)
        return Rows(self.name, split, [read_file(self.path)])


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A folder of files such as `train.jsonl` or `train-00000-of-00002.parquet`, or one that has them in `data/`.

    With a configuration, its subfolder is read instead.
    """

    path: Path
    name: str
    config: str | None = None

    def read(self, split: str, setting: str) -> Rows:
        """Return the rows of all files of a split, in the order of their shard numbers."""
        files = self._splits()
        if split not in files:
            _no_split(self.path, split, list(files), setting)
        found = files[split]
        if len({path.suffix for path in found}) > 1 or (len(found) > 1 and not all(map(_shard, found))):
            raise DataError(
                f"`{self.path}` has several files for the split `{split}`: {', '.join(path.name for path in found)}",
                hint="keep one of them, or set task.path to the file that is meant",
            )
        shard = _shard(found[0])
        if shard and [int(m["number"]) for m in map(_shard, found) if m] != list(range(int(shard["total"]))):
            raise DataError(
                f"`{self.path}` has {len(found)} of the {int(shard['total'])} files of the split `{split}`",
                hint="copy the missing files",
            )
        return Rows(self.name, split, [read_file(path) for path in found])

    def _splits(self) -> dict[str, list[Path]]:
        folders = [self.path / self.config] if self.config else [self.path, self.path / "data"]
        splits: dict[str, list[Path]] = {}
        for folder in folders:
            here: dict[str, list[Path]] = {}
            for path in sorted(folder.iterdir()) if folder.is_dir() else []:
                if path.is_file() and path.suffix.lower() in READERS:
                    shard = _shard(path)
                    here.setdefault(shard["split"] if shard else path.stem, []).append(path)
            splits = here | splits
        if splits:
            return splits
        inside = ", ".join(_names_in(folders[0])[:10]) or "nothing"
        raise DataError(
            f"the folder `{folders[0]}` has no data files ({SUFFIXES}); it holds {inside}",
            hint="name files by split, such as train.jsonl and test.jsonl; task.dataset_config names a subfolder",
        )


def _shard(path: Path) -> re.Match[str] | None:
    return _SHARD.fullmatch(path.stem)


@dataclass(frozen=True, slots=True)
class SavedSource:
    """A folder that `save_to_disk` of the datasets library wrote: several splits, or one, then called `train`."""

    path: Path
    name: str

    def read(self, split: str, setting: str) -> Rows:
        """Return the rows of a split."""
        import datasets

        try:
            saved = datasets.load_from_disk(str(self.path))
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise DataError(f"`{self.path}` is not a whole saved data set: {e}", hint="save it again") from e
        splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        if split not in splits:
            _no_split(self.path, split, [str(name) for name in splits], setting)
        return _table_rows(self.name, split, str(self.path / split), splits[split])


@dataclass(frozen=True, slots=True)
class HubSource:
    """A data set on the Hugging Face hub, or in its local cache."""

    path: str
    name: str
    config: str | None = None

    def read(self, split: str, setting: str) -> Rows:
        """Return the rows of a split, which may be a slice such as `train[:1000]`."""
        import datasets
        from datasets.exceptions import DatasetsError

        try:
            table = datasets.load_dataset(self.path, self.config, split=split)
        except ValueError as e:
            known = re.search(r"Unknown split .* Should be one of \[(.*)\]", str(e))
            if known:
                _no_split(self.path, split, re.findall(r"'([^']*)'", known[1]), setting)
            raise DataError(
                f"data set `{self.path}` cannot be loaded: {e}", hint="task.dataset_config names its configuration"
            ) from e
        except ConnectionError as e:
            raise DataError(
                f"data set `{self.path}` is not on this machine, and the hub cannot be reached: {e}",
                hint=f"set task.path to a local file or folder ({SUFFIXES}, or one made by save_to_disk)",
            ) from e
        except (OSError, RuntimeError, DatasetsError) as e:
            raise DataError(
                f"data set `{self.path}` cannot be loaded: {e}",
                hint="check task.path; it may also be a local file or folder",
            ) from e
        return _table_rows(self.name, split, f"{self.path}/{split}", table)


def _table_rows(name: str, split: str, label: str, table: Any) -> Rows:
    found = FileRows(label, table.with_format(None).to_list())
    check_texts(found)
    return Rows(name, split, [found])
