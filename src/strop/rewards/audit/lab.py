"""A process in which reward functions are watched: `python -m strop.rewards.audit.lab`, started by `laboratory`.

It takes one pickled Order on standard input and writes one JSON line per finished task, so that a function which hangs
or kills the process costs the later tasks only. Nothing of the trainer runs here.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import io
import json
import os
import pickle
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import RewardError
from ..call import Completion, RunFacts
from ..load import FunctionSpec, Loaded, load, load_function

REPEATS = 10
GROWTH_CALLS = 1000
GROWTH_LIMIT_S = 8.0
LATENCY_CALLS = 200
LATENCY_LIMIT_S = 4.0
LIFE_LIMIT_S = 120
WATCHED = (
    "open", "exec", "compile", "socket", "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty",
    "os.posix_spawn", "os.chdir", "os.putenv", "os.unsetenv", "os.mkdir", "os.remove", "os.rename", "os.rmdir",
    "os.listdir", "os.scandir", "shutil", "urllib.Request", "pty.spawn", "ctypes.dlopen",
)  # fmt: skip
"""Audit events, by name or by what stands before the first dot."""
CLOCKS = (
    "time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time", "localtime",
)  # fmt: skip
"""Functions of `time` whose use is noted."""


@dataclass(frozen=True, slots=True)
class Order:
    """What the lab is to do."""

    specs: tuple[FunctionSpec, ...]
    options: dict[str, dict[str, Any]]
    facts: RunFacts
    sys_path: tuple[str, ...]
    groups: tuple[tuple[Completion, ...], ...]
    """Completions of one problem each."""
    correct: tuple[tuple[bool | None, ...], ...]
    """What functions of group scope are told about them."""
    tasks: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[Completion, ...]], ...] = ()
    """(column, what was done to it, completions of the damaged row)."""


class Watch:
    """Audit events and readings of the clock while a function runs, in the thread that runs it."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self._active = threading.local()
        self._files: frozenset[str] = frozenset()
        sys.addaudithook(self._hook)
        for name in CLOCKS:
            setattr(time, name, self._clock(name, getattr(time, name)))

    def of_functions(self, specs: Sequence[FunctionSpec]) -> None:
        """Note in which files the functions are written: only their own readings of the clock count."""
        codes = [getattr(_written(spec), "__code__", None) for spec in specs]
        self._files = frozenset(code.co_filename for code in codes if code is not None)

    @contextlib.contextmanager
    def during(self) -> Iterator[list[tuple[str, str]]]:
        """Collect what happens inside."""
        events: list[tuple[str, str]] = []
        self._active.events = events
        try:
            yield events
        finally:
            self._active.events = None

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        events: list[tuple[str, str]] | None = getattr(self._active, "events", None)
        if events is None or not (event in WATCHED or event.partition(".")[0] in WATCHED):
            return
        self._active.events = None  # describing an event may raise others
        try:
            events.append((event, _described(event, args)))
        finally:
            self._active.events = events

    def _clock(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def read(*args: Any) -> Any:
            events: list[tuple[str, str]] | None = getattr(self._active, "events", None)
            if events is not None and sys._getframe(1).f_code.co_filename in self._files:
                events.append(("clock", name))
            return real(*args)

        return read


def _written(spec: FunctionSpec) -> Any:
    """Return the Python function that somebody wrote for this entry."""
    found = inspect.unwrap(load_function(spec))
    if hasattr(found, "__code__"):
        return found
    return vars(found if inspect.isclass(found) else type(found)).get("__call__")


def _described(event: str, args: tuple[Any, ...]) -> str:
    if event == "open":
        path, mode, flags = (*args, None, None, None)[:3]
        writes = any(ch in str(mode or "") for ch in "wax+") or bool(
            isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        return f"{'write' if writes else 'read'} {path}"
    if event == "exec":
        code = args[0]
        return f"{getattr(code, 'co_filename', '?')}"
    if event == "compile":
        return f"{args[1]!r}"
    return " ".join(str(arg)[:80] for arg in args[:2])


Values = list[tuple[str, str, str]]


def evaluate(functions: Sequence[Loaded], order: Order, shift: int = 0) -> Values:
    """Return (function, row, verdicts) for every call, verdicts bit for bit. `shift` changes the seeds alone."""
    result: Values = []
    for group, correct in zip(order.groups, order.correct, strict=True):
        seeded = tuple(replace(c, seed=c.seed + shift) for c in group)
        for loaded in functions:
            for part, told in _calls(loaded, seeded, correct):
                result.append((loaded.function.name, part[0].where, call(loaded, _fresh(part), told)))
    return result


def _fresh(part: tuple[Completion, ...]) -> tuple[Completion, ...]:
    """Return a copy, as every call in a worker gets one: no function sees what another one changed."""
    return pickle.loads(pickle.dumps(part))  # type: ignore[no-any-return]


def _calls(
    loaded: Loaded, group: tuple[Completion, ...], correct: tuple[bool | None, ...]
) -> Iterator[tuple[tuple[Completion, ...], tuple[bool | None, ...]]]:
    if loaded.declaration.scope == "group":
        yield group, correct
    else:
        yield from (((one,), (told,)) for one, told in zip(group, correct, strict=True))


def call(loaded: Loaded, part: tuple[Completion, ...], correct: tuple[bool | None, ...] | None) -> str:
    """Call a function and return its verdicts, or why there are none, as text."""
    try:
        outcomes, _ = loaded.function.score(part, _wait, correct)
    except RewardError as e:
        return f"refused: {e.message}"
    return " ".join(o.failure or (o.value.hex() if o.value is not None else "None") for o in outcomes)


def _wait(awaitable: Any) -> Any:
    async def whole() -> Any:
        return await awaitable

    return _runner().run(whole())


_LOCAL = threading.local()


def _runner() -> asyncio.Runner:
    """Return this thread's event loop. Opening one takes sockets, which are none of the function's doing."""
    if not hasattr(_LOCAL, "runner"):
        _LOCAL.runner = asyncio.Runner()
        _LOCAL.runner.get_loop()
    return _LOCAL.runner  # type: ignore[no-any-return]


class Lab:
    """The tasks; each returns what can be written as JSON."""

    def __init__(self, order: Order, watch: Watch) -> None:
        sys.path.extend(folder for folder in order.sys_path if folder not in sys.path)
        self.order, self.watch = order, watch
        self.functions = [load(spec, order.options.get(spec.name, {}), order.facts) for spec in order.specs]
        watch.of_functions(order.specs)

    def values(self) -> Any:
        """Every verdict once."""
        return evaluate(self.functions, self.order)

    def repeat(self) -> Any:
        """Verdicts that change when the same completions are scored again under other seeds of the rollout."""
        first = evaluate(self.functions, self.order)
        return _differences([first, *(evaluate(self.functions, self.order, shift=i) for i in range(1, REPEATS))])

    def threads(self) -> Any:
        """Verdicts that change when two threads score at once."""
        first, both = evaluate(self.functions, self.order), [[], []]

        def run(index: int) -> None:
            both[index] = evaluate(self.functions, self.order)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return _differences([first, *both])

    def lists(self) -> Any:
        """Verdicts of functions of sample scope that change when they get lists of 2 and of 64."""
        found = []
        every = [c for group in self.order.groups for c in group]
        for loaded in self.functions:
            if loaded.declaration.scope == "group":
                continue
            alone = [call(loaded, _fresh((c,)), None) for c in every]
            for size in (2, 64):
                batch = [(every * size)[i] for i in range(size)]
                together = call(loaded, _fresh(tuple(batch)), None)
                expected = " ".join((alone * size)[i] for i in range(size))
                if together != expected and not any("raised" in a or "refused" in a for a in alone):
                    found.append((loaded.function.name, every[0].where, f"list of {size}: {together[:200]}"))
                    break
        return found

    def purity(self) -> Any:
        """What each function does beside computing: generators drawn from, arguments changed, events."""
        effects: dict[str, dict[str, list[str]]] = {}
        evaluate(self.functions, self.order)  # whatever a first call imports is not an effect of scoring
        for loaded in self.functions:
            noted = effects.setdefault(
                loaded.function.name, {"random": [], "mutated": [], "events": [], "executed": []}
            )
            for group, correct in zip(self.order.groups, self.order.correct, strict=True):
                for part, told in _calls(loaded, group, correct):
                    self._observe(loaded, part, told, noted)
        return {
            name: {kind: sorted(set(items))[:8] for kind, items in noted.items()} for name, noted in effects.items()
        }

    def _observe(
        self, loaded: Loaded, part: tuple[Completion, ...], told: tuple[bool | None, ...], noted: dict[str, list[str]]
    ) -> None:
        where, part = part[0].where, _fresh(part)
        clean = pickle.dumps(part)
        _seed(part[0].seed)
        states = _generator_states()
        _runner()
        with self.watch.during() as events:
            call(loaded, part, told)
        noted["random"] += [name for name, state in _generator_states().items() if states.get(name, state) != state]
        if pickle.dumps(part) != clean:
            noted["mutated"].append(where)
        for event, detail in events:
            if event == "exec" and not detail.startswith("<frozen ") and not Path(detail).is_file():
                noted["executed"].append(f"code from {detail}")
            elif event not in ("exec", "compile") and not _is_import(event, detail):
                noted["events"].append(f"{event}: {detail}")

    def growth(self) -> Any:
        """Bytes by which the process grows over many calls, and how many there were."""
        evaluate(self.functions, self.order)
        before, start, calls = _resident_bytes(), time.perf_counter(), 0
        while calls < GROWTH_CALLS and time.perf_counter() - start < GROWTH_LIMIT_S:
            for group, correct in zip(self.order.groups, self.order.correct, strict=True):
                for loaded in self.functions:
                    for part, told in _calls(loaded, group, correct):
                        call(loaded, part, told)
                        calls += 1
        return {"bytes": max(0, _resident_bytes() - before), "calls": calls}

    def latency(self) -> Any:
        """Seconds that all functions together take for one completion: sorted."""
        taken: list[float] = []
        begin = time.perf_counter()
        while len(taken) < LATENCY_CALLS and time.perf_counter() - begin < LATENCY_LIMIT_S:
            for group, correct in zip(self.order.groups, self.order.correct, strict=True):
                start = time.perf_counter()
                for loaded in self.functions:
                    for part, told in _calls(loaded, group, correct):
                        call(loaded, part, told)
                taken.append((time.perf_counter() - start) / len(group))
        return sorted(taken)

    def columns(self) -> Any:
        """Verdicts on damaged rows: (column, damage, index of the completion, function, verdicts)."""
        found = []
        for column, damage, group in self.order.rows:
            for index, one in enumerate(group):
                for loaded in self.functions:
                    part = group if loaded.declaration.scope == "group" else (one,)
                    found.append((column, damage, index, loaded.function.name, call(loaded, part, (None,) * len(part))))
        return found


def _differences(runs: Sequence[Values]) -> Values:
    return [
        (name, where, f"{a} | {b}")
        for other in runs[1:]
        for (name, where, a), (_, _, b) in zip(runs[0], other, strict=True)
        if a != b
    ]


def _is_import(event: str, detail: str) -> bool:
    """Whether an event is Python reading its own modules, which a rare branch may still import."""
    kind, _, path = detail.partition(" ")
    return (
        event in ("open", "os.listdir", "os.scandir")
        and kind != "write"
        and (path.endswith((".py", ".pyc", ".so")) or (event != "open" and detail.split(" ")[0] in sys.path))
    )


def _seed(seed: int) -> None:
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.manual_seed(seed)


def _generator_states() -> dict[str, bytes]:
    states = {"random": pickle.dumps(random.getstate())}
    if "numpy" in sys.modules:
        states["numpy.random"] = pickle.dumps(sys.modules["numpy"].random.get_state())
    if "torch" in sys.modules:
        states["torch"] = bytes(sys.modules["torch"].get_rng_state().numpy())
    return states


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Do what the order says, one JSON line per task; the first says whether the functions could be loaded."""
    signal.alarm(LIFE_LIMIT_S)  # whoever started this process may be gone
    outbox = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    order: Order = pickle.load(io.BufferedReader(io.FileIO(0, closefd=False)))
    watch = Watch()

    def tell(task: str, result: Any) -> None:
        outbox.write(json.dumps({"task": task, "result": result}) + "\n")
        outbox.flush()

    lab = Lab(order, watch)
    tell("load", True)
    for task in order.tasks:
        tell(task, getattr(lab, task)())


if __name__ == "__main__":
    main()
