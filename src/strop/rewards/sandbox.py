"""Runs a program that a model wrote, behind walls, and reports what it printed or returned.

The program runs in a process of its own that sees no network, no other process, none of the machine's files but the
Python library (read-only), and an empty /tmp; it has limits of CPU time, memory and output, and is killed with all it
started. What is expected of it never goes in: reports are compared outside (`code.py`).

Two ways to build the walls are tried, in this order; the first that works is kept:

    namespaces  user, mount, PID, network, IPC and UTS namespaces built by `jail/walls.py`; no tool is needed
    bwrap       bubblewrap, where the kernel gives namespaces to it alone (AppArmor's restriction in Ubuntu)

Inside them, `jail/syscalls.py` denies processes, programs, sockets and the kernel's rarer doors (x86_64 and aarch64).
Not covered: a fault in the kernel itself, and what can be learned from the clock, the processor or the random device.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast

from ..errors import RewardError

Wall = Literal["namespaces", "bwrap", "none"]

_LENGTH = struct.Struct(">I")
_SYSTEM_LIBRARY = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_READY_LIMIT_S = 30.0
WALL_LIMIT_S = 120.0
"""Safety net for a program that waits without using the CPU; rewards.timeout_s of the pool is shorter."""
NEEDED = (
    "user namespaces for ordinary users (sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces), or bwrap"
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use."""

    cpu_s: float = 4.0
    """CPU seconds of all its tests together; the kernel counts whole ones."""
    memory_bytes: int = 1 << 30
    """Address space of a test's process, the interpreter's own some 20 MB included."""
    output_bytes: int = 1 << 20
    """What a test may print, and what one file may hold."""


@dataclass(frozen=True, slots=True)
class Report:
    """What became of one test."""

    ok: bool
    """Whether the program ran to its end."""
    detail: str
    """Why not."""
    stdout: str = ""
    value: Any = None
    """The encoded value of a call (`jail/run.py`, `encode`)."""


class Sandbox:
    """One helper process that runs programs one after the other, each behind fresh walls."""

    def __init__(self, wall: Wall) -> None:
        self.wall: Wall = wall
        self._process: subprocess.Popen[bytes] | None = None
        self._nonce = ""
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._deadline = 0.0

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin(self, program: str, limits: Limits) -> None:
        """Bring a program behind new walls. Raises OSError if they cannot be built."""
        self._deadline = time.monotonic() + _READY_LIMIT_S
        self._nonce = secrets.token_hex(16)
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._start()
        self._send(
            {
                "code": program,
                "nonce": self._nonce,
                "cpu_s": limits.cpu_s,
                "memory_bytes": limits.memory_bytes,
                "output_bytes": limits.output_bytes,
                "random": "random" in program,
            }
        )
        answer = self._receive(1 << 16)
        self._deadline = time.monotonic() + WALL_LIMIT_S
        if answer is None or "refused" in answer:
            self.close()
            raise OSError(errno.EAGAIN, f"the sandbox cannot be built: {(answer or {}).get('refused', 'it died')}")

    def run(self, test: Mapping[str, Any], limits: Limits) -> Report:
        """Run one test of the program: `{"stdin"}`, `{"call"}` or `{"function", "args"}`, with `{"setup"}` or without.

        Raises OSError when the helper dies or the wall-clock safety net is hit: that says something of the machine.
        """
        self._send(test)
        # In JSON a character may take six, and both files are bounded by the limit of output.
        answer = self._receive(12 * limits.output_bytes + (1 << 16))
        if answer is None or answer.get("nonce") != self._nonce:
            self.close()
            raise OSError(errno.EAGAIN, "the sandbox died")
        ended, stdout = str(answer["ended"]), str(answer.get("stdout", ""))
        if ended:
            return Report(False, ended, stdout)
        try:
            said = json.loads(str(answer["result"]))
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            return Report(False, "ended before its time", stdout)
        return Report(said.get("status") == "ok", str(said.get("detail", ""))[:200], stdout, said.get("value"))

    def end(self) -> None:
        """Take the program away, with everything that it left behind."""
        if self._process is None:
            return
        if self.wall == "namespaces":
            self._send({})
        else:
            self.close()

    def close(self) -> None:
        """Kill the helper and what it runs. Safe to call twice."""
        if self._process is not None:
            self._process.kill()
            for stream in (self._process.stdin, self._process.stdout):
                assert stream is not None, "both are pipes"
                stream.close()
            self._process.wait()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        folder: str | None = "/"
        if self.wall == "none":
            self._folder = tempfile.TemporaryDirectory(prefix="strop-program-")
            folder = self._folder.name
        root = str(Path(__file__).resolve().parents[2])
        library, devices = _library(), [path for path in _DEVICES if os.path.exists(path)]
        self._process = subprocess.Popen(
            [
                *_walls_command(self.wall, library, root), _interpreter(), "-S", "-s", "-P", "-X", "utf8",
                "-m", "strop.rewards.jail", self.wall, json.dumps([library, devices]),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd=folder,
            env={"PYTHONHASHSEED": "0", "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1", "LC_ALL": "C.UTF-8"},
        )  # fmt: skip

    def _send(self, message: Mapping[str, Any]) -> None:
        process = self._process
        assert process is not None, "begin starts it"
        assert process.stdin is not None, "it is a pipe"
        body = json.dumps(message).encode()
        try:
            self._write(process.stdin.fileno(), _LENGTH.pack(len(body)) + body)
        except BrokenPipeError:
            return  # the answer that does not come says so

    def _write(self, descriptor: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            self._wait(descriptor, select.POLLOUT)
            view = view[os.write(descriptor, view[: select.PIPE_BUF]) :]

    def _receive(self, most: int) -> dict[str, Any] | None:
        """Return the next message; None if the helper is gone or does not speak our language."""
        head = self._read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack(head)
        if length > most:
            return None
        try:
            message = json.loads(self._read(length))
        except (ValueError, RecursionError):
            return None
        return cast("dict[str, Any]", message) if isinstance(message, dict) else None

    def _read(self, count: int) -> bytes:
        process = self._process
        assert process is not None, "begin starts it"
        assert process.stdout is not None, "it is a pipe"
        parts: list[bytes] = []
        while count:
            self._wait(process.stdout.fileno(), select.POLLIN)
            part = os.read(process.stdout.fileno(), count)
            if not part:
                break
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _wait(self, descriptor: int, event: int) -> None:
        poller = select.poll()
        poller.register(descriptor, event)
        if not poller.poll(max(0.0, self._deadline - time.monotonic()) * 1000):
            self.close()
            raise OSError(errno.EAGAIN, "the program waited without using the CPU, past the limit of wall time")


def _interpreter() -> str:
    """Return the interpreter itself, not a virtual environment's link to it."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@lru_cache(maxsize=1)
def _library() -> list[str]:
    """Return the folders that Python's own modules and the shared libraries under them lie in."""
    own = [os.path.join(sys.base_prefix, name) for name in ("lib", "lib64")]
    found = [path for path in (*_SYSTEM_LIBRARY, *own, "/nix/store") if os.path.lexists(path)]
    inside = [p for p in found if any(p.startswith(q + "/") for q in found if not os.path.islink(q))]
    return [path for path in dict.fromkeys(found) if path not in inside]


def _walls_command(wall: Wall, library: list[str], root: str) -> list[str]:
    if wall != "bwrap":
        return []
    bwrap = shutil.which("bwrap")
    assert bwrap is not None, "the probe asked for it"
    command = [bwrap, "--unshare-all", "--die-with-parent", "--cap-drop", "ALL", "--uid", "65534", "--gid", "65534"]
    for path in [*library, _interpreter(), os.path.join(root, "strop")]:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--ro-bind", path, path]
    for path in _DEVICES:
        if os.path.exists(path):
            command += ["--dev-bind", path, path]
    sized = ["--size", str(16 << 20)] if _bwrap_knows(bwrap, "--size") else []
    return [*command, *sized, "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp", "--"]


@lru_cache(maxsize=4)
def _bwrap_knows(bwrap: str, option: str) -> bool:
    done = subprocess.run([bwrap, "--help"], capture_output=True, text=True, check=False)
    return option in done.stdout + done.stderr


_PROBE = """
import os
print(os.getpid() < 10, sorted(os.listdir("/tmp")), os.path.exists("/etc/passwd"))
"""
_PROBE_ANSWER = "True [] False\n"


def probe(wall: Wall) -> str:
    """Run a small program behind a wall; return "" if it stands, else why it does not."""
    if wall == "bwrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    limits = Limits()
    try:
        with Sandbox(wall) as sandbox:
            sandbox.begin(_PROBE, limits)
            report = sandbox.run({"stdin": ""}, limits)
    except OSError as e:
        return e.strerror or str(e)
    if report.ok and report.stdout == _PROBE_ANSWER:
        return ""
    return report.detail or f"a program inside saw {report.stdout!r}"


@lru_cache(maxsize=1)
def survey() -> tuple[Wall | None, str]:
    """Return the first way of isolation that works on this machine, else None and why each does not."""
    reasons: list[str] = []
    walls: tuple[Wall, ...] = ("namespaces", "bwrap")
    for wall in walls if sys.platform == "linux" else ():
        reason = probe(wall)
        if not reason:
            return wall, ""
        reasons.append(f"{wall}: {reason}")
    return None, "; ".join(reasons) or f"{sys.platform}: only Linux has them"


def choose_wall(*, unsafe: bool = False) -> Wall:
    """Return how programs are isolated here; `unsafe` accepts "none". Raises RewardError where nothing works."""
    wall, reasons = survey()
    if wall is not None:
        return wall
    if unsafe:
        return "none"
    raise RewardError(
        f"programs that a model writes cannot be isolated on this machine ({reasons})",
        hint=f"allow {NEEDED}; rewards.options.python_tests.unsafe: true runs them with your files and rights in reach",
    )
