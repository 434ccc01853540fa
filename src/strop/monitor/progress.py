"""What a person sees while a run goes on: a live view in a terminal, plain lines anywhere else.

Output is a courtesy: a closed pipe or an odd terminal ends the output, never the run.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live

_SLOW_PHASE_S = 10.0
"""Plain output names a phase only once it has run this long, then after each doubling."""
_ETA_STEPS = 20


class _Phase:
    """A stretch of the step that has a name; leaving it as a context manager goes back to the phase before."""

    def __init__(self, progress: Progress, name: str, total: int | None, now: float) -> None:
        self.progress = progress
        self.name = name
        self.total = total
        self.done = 0
        self.tokens = 0
        self.started = self.resumed = now
        self.tokens_at_resume = 0
        self.last_tick: float | None = None
        self.report_after = _SLOW_PHASE_S
        self.before: _Phase | None = None

    def __enter__(self) -> _Phase:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.progress._leave(self)

    def describe(self, now: float) -> str:
        seconds = now - self.started
        count = "" if self.total is None and not self.done else f" {self.done}"
        count += "" if self.total is None else f"/{self.total}"
        rate = f"  {self.tokens / seconds:,.0f} tok/s" if self.tokens and seconds > 0 else ""
        return f"{self.name}{count}{rate}  {_duration(seconds)}"


class Progress:
    """Shows phases and steps of a run; a context manager that restores the terminal however it is left.

    The terminal view needs a terminal on `stream` (default: stdout) and neither NO_COLOR nor CI in the environment.
    A small thread repaints it and names a phase in which nothing finishes for `stall_warning_s` seconds, so that one
    which hangs inside a native call is named as well.
    """

    def __init__(
        self,
        *,
        stall_warning_s: float,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Write to `stream`; `clock` gives seconds."""
        self.notes: list[str] = []
        """Every text given to `note`, in order."""
        self._stream = stream if stream is not None else sys.stdout
        self._clock = clock
        self._stall_warning_s = stall_warning_s
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._live: Live | None = None
        self._broken = False
        self._busy = False
        self._waiting: deque[Callable[[], object]] = deque()
        self._phase: _Phase | None = None
        self._step, self._max_steps = 0, 0
        self._recent_steps: deque[float] = deque(maxlen=_ETA_STEPS)
        self._generated_tokens, self._generating_s = 0, 0.0
        self._step_started = self._last_finished = clock()
        self._warn_after = stall_warning_s
        self._stalled = False
        self._last_line = ""

    def __enter__(self) -> Progress:
        """Start the live view, where there is one, and the thread."""
        self._step_started = self._last_finished = self._clock()
        if is_live_terminal(self._stream):
            self._try(self._start_live)
        self._thread = threading.Thread(target=self._watch, name="strop-progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Stop both and give the terminal back."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)
        with self._lock:
            self._phase = None
            live, self._live = self._live, None
            if live is not None:
                # Also after an output error: it gives sys.stdout and the cursor back.
                with contextlib.suppress(OSError, ValueError):
                    live.stop()

    def start_at(self, step: int, max_steps: int) -> None:
        """Say that `step` of `max_steps` steps are done when the first step begins, which is now."""
        with self._lock:
            self._step, self._max_steps = step, max_steps
            self._step_started = self._clock()

    def phase(self, name: str, *, total: int | None = None) -> _Phase:
        """Enter a phase (start, load, generate, score, train, publish, evaluate, checkpoint) of `total` things.

        A plain call replaces the current phase; as a context manager it ends with the block, and the phase around it
        goes on.
        """
        with self._lock:
            now = self._clock()
            self._pause(now)
            phase = _Phase(self, name, total, now)
            phase.before, self._phase = self._phase, phase
            self._finished(now)
            return phase

    def advance(self, n: int = 1, tokens: int = 0) -> None:
        """Report that `n` more things of the current phase are finished, with so many generated tokens."""
        with self._lock:
            if self._phase is not None:
                self._phase.done += n
                self._phase.tokens += tokens
            self._finished(self._clock())

    def tick(self) -> None:
        """Report a sign of life, e.g. one decode step, that finished nothing; prints a stall warning when due."""
        with self._lock:
            if self._phase is not None:
                self._phase.last_tick = self._clock()
            self._check()

    def step_done(self, step: int, max_steps: int, metrics: Mapping[str, float]) -> None:
        """Print the line of a finished step: `step` of `max_steps`, counted from 1.

        Reads `reward`, `accuracy`, `completions/mean_length`, `completions/clipped_ratio` and `step_time` (seconds;
        else the time since the last step was done) where the metrics have them.
        """
        with self._lock:
            now = self._clock()
            self._pause(now)
            self._phase = None
            seconds = metrics.get("step_time", now - self._step_started)
            if math.isfinite(seconds):
                self._recent_steps.append(seconds)
            self._step, self._max_steps = step, max_steps
            left = max(0, max_steps - step)
            parts = [
                f"step {step:>{len(str(max_steps))}}/{max_steps}",
                f"reward {_number(metrics.get('reward'), '.3f')}",
            ]
            if "accuracy" in metrics:
                parts.append(f"accuracy {_number(metrics['accuracy'], '.1%')}")
            parts.append(f"length {_number(metrics.get('completions/mean_length'), '.0f')}")
            parts.append(f"truncated {_number(metrics.get('completions/clipped_ratio'), '.0%')}")
            if self._generated_tokens and self._generating_s > 0:
                parts.append(f"{self._generated_tokens / self._generating_s:,.0f} tok/s")
            parts.append(_duration(seconds))
            if left and self._recent_steps:
                parts.append(f"ETA {_duration(statistics.median(self._recent_steps) * left)}")
            self._generated_tokens, self._generating_s = 0, 0.0
            self._step_started = now
            self._finished(now)
            self._last_line = "  ".join(parts)
            self._print(self._last_line)

    def say(self, text: str) -> None:
        """Print a line above the live view."""
        with self._lock:
            self._print(text)

    def note(self, text: str) -> None:
        """Print a warning above the live view and keep it in `notes`; goes to stderr once stdout is closed."""
        with self._lock:
            self.notes.append(text)
            self._print(f"note: {text}")
            if self._broken:
                with contextlib.suppress(OSError, ValueError):
                    print(f"note: {text}", file=sys.stderr, flush=True)

    def _leave(self, phase: _Phase) -> None:
        """Go back to the phase around `phase`, unless `step_done` has ended it already."""
        with self._lock:
            current = self._phase
            while current is not None and current is not phase:
                current = current.before
            if current is None:
                return
            now = self._clock()
            self._pause(now)
            self._phase = phase.before
            if self._phase is not None:
                self._phase.resumed, self._phase.tokens_at_resume = now, self._phase.tokens
            self._finished(now)

    def _pause(self, now: float) -> None:
        """Add what the current phase generated since it began or went on to the step's count."""
        phase = self._phase
        if phase is not None and phase.tokens > phase.tokens_at_resume:
            self._generated_tokens += phase.tokens - phase.tokens_at_resume
            self._generating_s += now - phase.resumed

    def _finished(self, now: float) -> None:
        if self._stalled and self._phase is not None:
            self._print(f"{self._phase.name} goes on after {_duration(now - self._last_finished)}")
        self._stalled = False
        self._warn_after = self._stall_warning_s
        self._last_finished = now

    def _watch(self) -> None:
        every = 0.5 if self._live is not None else max(0.02, min(1.0, self._stall_warning_s / 4))
        while not self._closing.wait(every):
            with self._lock:
                if self._closing.is_set():
                    return
                self._check()
                if self._live is not None:
                    self._try(self._live.refresh)

    def _check(self) -> None:
        """Warn of a stall, and name a slow phase in plain output; each again only after twice the time."""
        phase, now = self._phase, self._clock()
        if phase is None:
            return
        idle = now - self._last_finished
        if idle >= self._warn_after:
            self._warn_after = idle * 2
            self._stalled = True
            ticked = f"; last decode step {_duration(now - phase.last_tick)} ago" if phase.last_tick is not None else ""
            self.note(f"nothing finished for {_duration(idle)} in phase {phase.describe(now)}{ticked}")
        elif self._live is None and now - phase.started >= phase.report_after:
            phase.report_after = 2 * (now - phase.started)
            self._print(f"  step {self._step + 1}: {phase.describe(now)}")

    def _print(self, text: str) -> None:
        self._try(lambda: self._print_above_live(text) if self._live is not None else self._print_plain(text))

    def _print_above_live(self, text: str) -> None:
        assert self._live is not None
        self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _print_plain(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        self._stream.flush()

    def _try(self, output: Callable[[], object]) -> None:
        """Let output that fails be the last. A closed stream raises ValueError, a closed pipe BrokenPipeError.

        A signal handler may print while this very thread is printing, which Python's streams refuse: that output waits.
        """
        self._waiting.append(output)
        if self._busy:
            return
        self._busy = True
        try:
            while self._waiting:
                following = self._waiting.popleft()
                if not self._broken:
                    following()
        except (OSError, ValueError) as e:
            self._broken = True
            if isinstance(e, BrokenPipeError):
                with contextlib.suppress(OSError, ValueError):
                    self._discard_stdout()
        finally:
            self._busy = False

    def _discard_stdout(self) -> None:
        """Point a closed stdout nowhere, so that a later `print` of any other part does not end the run either."""
        if self._stream.fileno() == 1:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.close(null)

    def _start_live(self) -> None:
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self._stream)
        live = Live(console=console, get_renderable=self._view, auto_refresh=False, transient=True)
        live.start()
        self._live = live

    def _view(self) -> Group:
        """Three lines: how far the run is, what it does now, and how the last step went."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now = self._clock()
        line = Table.grid(padding=(0, 2))
        line.add_row(
            Text(f"step {self._step}/{self._max_steps or '?'}", style="bold"),
            ProgressBar(total=max(1, self._max_steps), completed=self._step, width=30),
            Text(f"{_duration(now - self._step_started)} in this step"),
        )
        phase = Text(self._phase.describe(now) if self._phase is not None else "", style="cyan")
        return Group(line, phase, Text(self._last_line, style="dim", no_wrap=True, overflow="ellipsis"))


def is_live_terminal(stream: TextIO) -> bool:
    """Whether a live view may be drawn on `stream`."""
    if os.environ.get("NO_COLOR") or os.environ.get("CI") or os.environ.get("TERM") == "dumb":
        return False
    try:
        return stream.isatty()
    except ValueError:
        return False


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
