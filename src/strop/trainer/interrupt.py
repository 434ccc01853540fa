"""Ctrl-C once: finish the step, write a checkpoint, exit. Twice: stop at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """Turns SIGINT and SIGTERM into a flag that the loop looks at between steps.

    The second SIGINT raises KeyboardInterrupt where the program stands. Outside the main thread, where Python allows
    no handlers, it does nothing.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        """`say` prints one line when the first signal arrives."""
        self.requested = False
        self._say = say
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        self._say(
            "stopping when this step, or the start, is done; a checkpoint will be written (Ctrl-C again stops at once)"
        )
