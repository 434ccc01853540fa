"""The walls without the filter, which would hide a hole in them; the filter; and machines that offer no isolation."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from programs import SQUARE, run, score

from strop.errors import RewardError
from strop.rewards import sandbox as sandbox_module
from strop.rewards.jail.syscalls import seccomp_program
from strop.rewards.sandbox import Sandbox, Wall, choose_wall, probe

INSIDE = """
import json, os, socket, sys
from strop.rewards.jail.walls import build_walls
library, devices, port, outside, secret = json.loads(sys.argv[1])
build_walls(library, devices)
def tried(do):
    try:
        return repr(do())
    except OSError as e:
        return type(e).__name__ + " " + str(e.errno)
def fill():
    with open("/tmp/big", "wb") as file:
        for _ in range(40):
            file.write(bytes(1 << 20))
seen = {
    "pid": os.getpid(), "uid": os.getuid(), "tmp": os.listdir("/tmp"), "nets": socket.if_nameindex(),
    "connect": tried(lambda: socket.create_connection(("127.0.0.1", port), 2)),
    "kill": tried(lambda: os.kill(outside, 0)), "secret": tried(lambda: open(secret)),
    "etc": tried(lambda: os.listdir("/etc")), "root": tried(lambda: os.mkdir("/x")),
    "system": tried(lambda: open("/usr/lib/x", "w")), "fill": tried(fill),
    "null": tried(lambda: open("/dev/null", "w").close()),
    "setuid": tried(lambda: os.setuid(0)), "chroot": tried(lambda: os.chroot("/tmp")),
    "host": tried(lambda: socket.sethostname("x")),
}
print(json.dumps(seen), flush=True)
os._exit(0)
"""


@pytest.mark.skipif(bool(probe("namespaces")), reason="no namespaces of our own on this machine")
def test_the_walls_hold_by_themselves(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("of the user")
    with socket.create_server(("127.0.0.1", 0)) as server:
        told = [sandbox_module._library(), ["/dev/null"], server.getsockname()[1], os.getpid(), str(secret)]
        done = subprocess.run(
            [sys.executable, "-c", INSIDE, json.dumps(told)], capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "pid": 1, "uid": 65534, "tmp": [], "nets": [[1, "lo"]], "connect": "OSError 101",
        "kill": "ProcessLookupError 3", "secret": "FileNotFoundError 2", "etc": "FileNotFoundError 2",
        "root": "OSError 30", "system": "OSError 30", "fill": "OSError 28", "null": "None",
        "setuid": "PermissionError 1", "chroot": "PermissionError 1", "host": "PermissionError 1",
    }  # fmt: skip


def answer_of(program: bytes, architecture: int, number: int, argument: int = 0) -> str:
    """Run a filter as the kernel would (classic BPF, the five instructions that it uses)."""
    data = struct.pack("<IIQQ", number, architecture, 0, argument)
    code, at, register = list(struct.iter_unpack("<HBBI", program)), 0, 0
    while True:
        kind, yes, no, value = code[at]
        at += 1
        if kind == 0x20:
            (register,) = struct.unpack_from("<I", data, value)
        elif kind == 0x06:
            return {0x7FFF0000: "allow", 0x80000000: "kill", 0x00050001: "denied", 0x00050026: "absent"}.get(
                value, "returns 0" if value == 0x00050000 else hex(value)
            )
        else:
            holds = {0x15: register == value, 0x35: register >= value, 0x45: bool(register & value)}[kind]
            at += yes if holds else no


@pytest.mark.parametrize(
    ("machine", "architecture", "numbers"),
    [
        (
            "x86_64", 0xC000003E,
            {"read": 0, "socket": 41, "clone": 56, "execve": 59, "kill": 62, "tgkill": 234, "prlimit64": 302,
             "clone3": 435, "clock_nanosleep": 230, "unshare": 272, "mount": 165, "futex": 202},
        ),
        (
            "aarch64", 0xC00000B7,
            {"read": 63, "socket": 198, "clone": 220, "execve": 221, "kill": 129, "tgkill": 131, "prlimit64": 261,
             "clone3": 435, "clock_nanosleep": 115, "unshare": 97, "mount": 40, "futex": 98},
        ),
    ],
)  # fmt: skip
def test_the_filter_answers_as_it_should(machine: str, architecture: int, numbers: dict[str, int]) -> None:
    program = seccomp_program(machine, 77)
    assert program is not None

    def answer(name: str, argument: int = 0) -> str:
        return answer_of(program, architecture, numbers[name], argument)

    assert {answer(name) for name in ("read", "futex")} == {"allow"}
    assert {answer(name) for name in ("socket", "execve", "kill", "unshare", "mount")} == {"denied"}
    assert (answer("clone", 0x11), answer("clone", 0x3D0F00)) == ("denied", "allow")
    assert (answer("tgkill", 1), answer("tgkill", 77)) == ("denied", "allow")
    assert (answer("prlimit64", 1), answer("prlimit64", 0)) == ("denied", "allow")
    assert (answer("clone3"), answer("clock_nanosleep")) == ("absent", "returns 0")
    assert answer_of(program, 0x40000003, 11) == "kill", "calls of another architecture"
    if machine == "x86_64":
        assert answer_of(program, architecture, 0x40000000 + 41) == "kill", "x32"
    assert seccomp_program("riscv64", 77) is None


def test_without_isolation_programs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module, "survey", lambda: (None, "namespaces: not here"))
    with pytest.raises(RewardError, match="cannot be isolated") as error:
        score("print(1)", SQUARE)
    assert "unsafe: true" in error.value.hint
    assert choose_wall(unsafe=True) == "none"


@pytest.mark.skipif(sys.platform != "linux", reason="limits and memory files of Linux")
def test_unsafe_still_has_limits() -> None:
    with Sandbox("none") as box:
        assert run(box, "print(int(input()) + 1)", "1").stdout == "2\n"
        assert run(box, "while True: pass").detail == "ran past its CPU time"
        if seccomp_program(os.uname().machine, 1) is not None:
            assert not run(box, "import subprocess\nsubprocess.run(['true'])").ok


def test_a_probe_sees_through_a_wall_that_is_none() -> None:
    if sys.platform == "linux":
        assert probe("none") != ""


@pytest.mark.parametrize("wall", ["namespaces", "bwrap"])
def test_each_wall_that_stands_here_hides_the_machine(wall: Wall) -> None:
    reason = probe(wall)
    if reason:
        pytest.skip(f"{wall}: {reason}")
    with Sandbox(wall) as box:
        report = run(box, "import os\nprint(os.getuid(), os.path.exists('/proc'), os.path.exists('/etc/shadow'))")
        assert report.stdout == "65534 False False\n"
        assert not run(box, "import socket\nsocket.socket()").ok
        assert not run(box, "open('/usr/lib/x', 'w')").ok
