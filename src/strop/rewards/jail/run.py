"""One test of a program, in a child process with limits."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable

from .libc import PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, prctl
from .syscalls import forbid_system_calls

Json = dict[str, object]

OVER = "ran past its CPU time"
_MAX_DEPTH = 50
_MAX_THREADS = 64


def run_test(program: Json, test: Json, cpu_left: float, *, alone: bool) -> Json:
    """Run one test in a child and return its report. `alone`: every other process here is killed afterwards.

    What the child wrote goes out as it is: nothing that a program made is taken apart in here. Raises OSError if the
    child could not be given its limits.
    """
    if cpu_left <= 0:
        return {"cpu_s": 0.0, "ended": OVER, "result": "", "stdout": ""}
    stdin, stdout, result = (os.memfd_create(name) for name in ("stdin", "stdout", "result"))
    write_all(stdin, str(test.get("stdin", "")).encode("utf-8", "replace"))
    os.lseek(stdin, 0, 0)
    cpu_limit = math.ceil(cpu_left)
    began_r, began_w = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            _become_child((stdin, stdout, result, began_w), program, cpu_limit, alone)
            _run_child(program, test)
        finally:
            os._exit(97)
    os.close(began_w)
    began = os.read(began_r, 1)
    _, status, usage = os.wait4(pid, 0)
    if alone:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
    if not began:
        raise OSError("the limits of a test could not be set")
    cpu_s = usage.ru_utime + usage.ru_stime
    report: Json = {"cpu_s": cpu_s, "ended": _how(status, cpu_s >= cpu_limit), "result": _read_all(result)}
    if "stdin" in test:
        report["stdout"] = _read_all(stdout)
    for descriptor in (stdin, stdout, result, began_r):
        os.close(descriptor)
    return report


def _how(status: int, spent: bool) -> str:
    """Return how a child ended, "" for a regular end."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        over = number == signal.SIGXCPU or (number == signal.SIGKILL and spent)
        return OVER if over else f"was ended by signal {number}"
    code = os.WEXITSTATUS(status)
    return f"ended early with exit code {code}" if code else ""


def _become_child(files: tuple[int, int, int, int], program: Json, cpu_limit: int, alone: bool) -> None:
    """Keep three memory files and nothing else, under limits that bind this process and its threads; then say so."""
    stdin, stdout, result, began = files
    nothing = os.open("/dev/null", os.O_RDWR)
    keep = [os.dup2(file, 20 + i) for i, file in enumerate((stdin, stdout, nothing, result, began))]
    for i, file in enumerate(keep):
        os.dup2(file, i)
    began = 4
    os.closerange(began + 1, 1 << 16)
    output, memory = int(str(program["output_bytes"])), int(str(program["memory_bytes"]))
    limits = {
        resource.RLIMIT_CPU: (cpu_limit, cpu_limit + 1), resource.RLIMIT_AS: (memory, memory),
        resource.RLIMIT_FSIZE: (output, output), resource.RLIMIT_NOFILE: (64, 64), resource.RLIMIT_CORE: (0, 0),
    }  # fmt: skip
    if alone:  # without walls of its own the count would be that of all the user's processes
        limits[resource.RLIMIT_NPROC] = (_MAX_THREADS, _MAX_THREADS)
    for kind, (soft, hard) in limits.items():
        _, most = resource.getrlimit(kind)
        hard = hard if most == resource.RLIM_INFINITY else min(hard, most)
        resource.setrlimit(kind, (min(soft, hard), hard))
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_DUMPABLE, 0)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    forbid_system_calls()
    for stream, descriptor, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        setattr(sys, stream, open(descriptor, mode, encoding="utf-8", errors="replace", closefd=False))  # noqa: SIM115
        setattr(sys, f"__{stream}__", getattr(sys, stream))
    os.write(began, b"+")
    os.close(began)


def _run_child(program: Json, test: Json) -> None:
    """Run the program, and what the test calls in it; write the outcome to descriptor 3."""
    said: Json = {"status": "ok"}
    try:
        if program.get("random"):
            import random

            random.seed(0)
        space: dict[str, object] = {"__name__": "__main__" if "stdin" in test else "solution"}
        exec(compile(str(test.get("setup", "")), "<setup>", "exec"), space)
        exec(compile(str(program["code"]), "<solution>", "exec"), space)
        if "call" in test:
            said["value"] = encode(eval(compile(str(test["call"]), "<test>", "eval"), space))
        elif "function" in test:
            arguments = test["args"]
            assert isinstance(arguments, list)
            said["value"] = encode(_find(space, str(test["function"]))(*arguments))
    except SystemExit as e:
        if e.code not in (None, 0) or "stdin" not in test:
            said = {"status": "failed", "detail": f"called exit({e.code!r:.40})"}
    except BaseException as e:
        said = {"status": "failed", "detail": f"raised {type(e).__name__}: {e}"[:200]}
    try:
        sys.stdout.flush()
    except BaseException as e:
        said = {"status": "failed", "detail": f"raised {type(e).__name__} while printing"}
    try:
        text = json.dumps(said)
    except BaseException as e:
        text = json.dumps({"status": "failed", "detail": f"its value cannot be written: {type(e).__name__}"})
    write_all(3, text.encode())
    os._exit(0)


def _find(space: dict[str, object], name: str) -> Callable[..., object]:
    """Return a function of the program, or a method of its class `Solution`, as in many data sets."""
    found = space.get(name)
    if found is None and isinstance(solution := space.get("Solution"), type):
        found = getattr(solution(), name)
    if not callable(found):
        raise NameError(f"there is no function {name}")
    return found


def encode(value: object, depth: int = 0) -> object:
    """Return a value as JSON that keeps apart what `==` keeps apart; what is no plain data becomes its type's name."""
    if depth > _MAX_DEPTH:
        raise ValueError("a value nested too deeply")
    if value is None or isinstance(value, bool | str):
        return value if value is None or isinstance(value, bool) else str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return {"float": float.hex(value)}
    if isinstance(value, complex):
        return {"complex": [float.hex(value.real), float.hex(value.imag)]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, dict):
        return {"dict": [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in value.items()]}
    for kind, name in ((tuple, "tuple"), (set, "set"), (frozenset, "set")):
        if isinstance(value, kind):
            return {name: [encode(item, depth + 1) for item in value]}
    if isinstance(value, list):
        return [encode(item, depth + 1) for item in value]
    return {"other": type(value).__name__}


def write_all(descriptor: int, data: bytes) -> None:
    """Write everything. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _read_all(descriptor: int) -> str:
    os.lseek(descriptor, 0, 0)
    parts: list[bytes] = []
    while part := os.read(descriptor, 1 << 20):
        parts.append(part)
    return b"".join(parts).decode("utf-8", "replace")
