"""Trackers that draw the metrics of a run: TensorBoard."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import ConfigError, RunError, StropError
from .files import reason_of

NAMES = ("tensorboard",)
"""What `run.report_to` may name, beside `none`."""


class Tracker(Protocol):
    """One place that metrics are sent to."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a step."""
        ...

    def close(self) -> None:
        """Release what the tracker holds."""
        ...


class Trackers:
    """All trackers of a run, as named in `run.report_to`."""

    def __init__(self, names: Sequence[str], folder: Path, resume_step: int | None) -> None:
        """Open the trackers; TensorBoard writes into `folder`.

        What an earlier process logged beyond `resume_step`, the last step that the checkpoint covers, is not shown any
        more; None hides all of it.
        Raises ConfigError for an unknown name, StropError when a package is missing, RunError when `folder` cannot be
        written.
        """
        unknown = [name for name in names if name not in (*NAMES, "none")]
        if unknown:
            raise ConfigError(
                f"run.report_to: `{unknown[0]}` is not a tracker; {', '.join(NAMES)} or none is needed",
                hint="set run.report_to to tensorboard or none; metrics.jsonl is written in either case",
            )
        if "none" in names and len(names) > 1:
            raise ConfigError(
                f"run.report_to: `none` stands beside {', '.join(name for name in names if name != 'none')}",
                hint="name trackers, or none alone",
            )
        first_step = 0 if resume_step is None else resume_step + 1
        self._trackers: list[Tracker] = [TensorBoard(folder, first_step)] if "tensorboard" in names else []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of a step to every tracker. Raises RunError when one cannot be written."""
        for tracker in self._trackers:
            tracker.log(step, values)

    def close(self) -> None:
        """Close every tracker."""
        for tracker in self._trackers:
            tracker.close()


class TensorBoard:
    """Writes scalars as TensorBoard event files, each step on disk when `log` returns."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Start a file that replaces whatever earlier files in `folder` hold from `first_step` on."""
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as e:
            raise StropError(
                "run.report_to names tensorboard, which is not installed",
                hint="pip install tensorboard, or set run.report_to: none",
            ) from e
        self._folder = folder
        protos: tuple[Any, Any] = event_pb2, summary_pb2
        self._event, session_log, self._summary = protos[0].Event, protos[0].SessionLog, protos[1].Summary
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = RecordWriter(_next_file(folder).open("xb"))
        except OSError as e:
            raise self._failure(e) from e
        # TensorBoard drops older events from this step on when it reads a START mark in a version 2 file.
        self._append(self._event(wall_time=time.time(), step=first_step, file_version="brain.Event:2"))
        start = session_log(status=session_log.START)
        self._append(self._event(wall_time=time.time(), step=first_step, session_log=start))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record each value as a scalar under its name."""
        scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._append(self._event(wall_time=time.time(), step=step, summary=self._summary(value=scalars)))

    def close(self) -> None:
        """Close the event file."""
        try:
            self._writer.close()
        except OSError as e:
            raise self._failure(e) from e

    def _append(self, event: Any) -> None:
        try:
            self._writer.write(event.SerializeToString())
            self._writer.flush()
        except OSError as e:
            raise self._failure(e) from e

    def _failure(self, error: OSError) -> RunError:
        return RunError(
            f"TensorBoard events cannot be written to {self._folder}: {reason_of(error, self._folder)}",
            hint="free space there and go on with --resume, or set run.report_to: none",
        )


def _next_file(folder: Path) -> Path:
    """Name a file that sorts after every earlier one, also within one second or after the clock was set back.

    TensorBoard reads files in the order of their names, and a START mark only hides what it has read before.
    """
    numbers = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
    newest = max((int(number) for number in numbers if number.isdecimal()), default=0)
    return folder / f"events.out.tfevents.{max(int(time.time()), newest + 1):010d}.{socket.gethostname()}.{os.getpid()}"
