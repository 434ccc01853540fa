"""Programs behind walls: honest ones pass, hostile ones get nowhere, and expected values stay outside.

Everything here runs real programs in the real sandbox; where the machine offers no isolation, that is what is tested.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from strop.errors import RewardError
from strop.rewards import program_tests
from strop.rewards import sandbox as sandbox_module
from strop.rewards.code import program_of, python_tests
from strop.rewards.jail.run import encode
from strop.rewards.jail.syscalls import seccomp_program
from strop.rewards.program_tests import decode
from strop.rewards.sandbox import Limits, Report, Sandbox, Wall, choose_wall, probe, survey

WALL, WHY_NOT = survey()
isolated = pytest.mark.skipif(WALL is None, reason=f"no isolation on this machine: {WHY_NOT}")
FAST = Limits(cpu_s=1.0, memory_bytes=256 << 20, output_bytes=1 << 16)


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    assert WALL is not None
    with Sandbox(WALL) as sandbox:
        yield sandbox


def run(box: Sandbox, program: str, stdin: str = "", limits: Limits = FAST) -> Report:
    box.begin(program, limits)
    try:
        return box.run({"stdin": stdin}, limits)
    finally:
        box.end()


def score(program: str, row: dict[str, object], **options: object) -> float | None:
    columns = {name: [value] for name, value in row.items()}
    return python_tests([f"<think>hm</think>\n```python\n{program}\n```"], **columns, **options)[0]  # type: ignore[arg-type]


SQUARE = {"tests": [{"input": "3\n", "output": "9\n"}, {"input": "-4", "output": "16"}]}


# --- honest programs ---


@isolated
@pytest.mark.parametrize(
    ("program", "value"),
    [
        ("print(int(input()) ** 2)", 1.0),
        ("import sys\nprint(int(sys.stdin.read()) ** 2, end='  \\n\\n')\nsys.exit(0)", 1.0),
        ("print(9)", 0.0),
        ("print(int(input()) ** 2)\nprint('and more')", 0.0),
        ("print(int(input()) ** 2); raise ValueError", 0.0),
        ("print(int(input()) ** 2); exit(3)", 0.0),
        ("def solve(:", 0.0),
        ("import threading\nt = threading.Thread(target=lambda: print(int(input()) ** 2))\nt.start(); t.join()", 1.0),
        ("import time\ntime.sleep(5)\nprint(int(input()) ** 2)", 1.0),
    ],
)
def test_what_is_printed_is_compared_in_full(program: str, value: float) -> None:
    assert score(program, SQUARE, cpu_seconds=1.0) == value


@isolated
def test_forms_of_tests() -> None:
    program = "def f(x, y=1):\n    return (x, [y, {x}], 0.1 + 0.2)"
    good = ["assert f(2)[0] == 2", "assert f(3, y=5)[1] == [5, {3}]"]
    assert score(program, {"test_list": good}) == 1.0
    assert score(program, {"test_list": [*good, "assert f(2)[0] == 3"]}) == 0.0
    assert score(program, {"test_list": ["assert math.isclose(f(1)[2], 0.3, rel_tol=1e-9)"]}) == 1.0
    assert score(program, {"test_list": ["assert f(1)[2] == 0.3"]}) == 0.0
    assert score("def f(x): return x", {"test_list": ["assert f(n) == 7"], "test_setup_code": "n = 7"}) == 1.0
    assert (
        score("def f(x): return x > 1", {"test_list": ["assert f(2)", "assert not f(0)", "assert f(2) is True"]}) == 1
    )
    assert (
        score("def f(x): return (x, x)", {"inputs": [[1], [2]], "outputs": [[1, 1], [[2, 2]]], "fn_name": "f"}) == 1.0
    )
    apps = json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]})
    assert score("print(sum(map(int, input().split())))", {"input_output": apps}) == 1.0
    method = "class Solution:\n    def twice(self, x):\n        return 2 * x"
    assert score(method, {"tests": [{"fn_name": "twice", "args": [4], "output": 8}]}) == 1.0
    assert score(method, {"tests": [{"fn_name": "twice", "args": [4], "output": 9}]}) == 0.0


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"test_list": []},
        {"test_list": ["assert f(1) == g(1)"]},
        {"test_list": ["assert (f(1) == 2) == True"]},
        {"test_list": ["f(1)"]},
        {"test_list": ["assert f(1) == 2", "assert f(1) < 9"]},
        {"tests": "no json"},
        {"inputs": ["1"], "outputs": []},
        {"tests": [{"input": "1"}]},
    ],
)
def test_a_row_without_tests_that_are_understood_does_not_apply(row: dict[str, object]) -> None:
    reasons: list[str] = []
    columns = {name: [value] for name, value in row.items()}
    values = python_tests(["```python\n1\n```"], **columns, log_extra=lambda _, told: reasons.extend(told))  # type: ignore[arg-type]
    assert values == [None]
    assert "tests" in reasons[0]


def test_no_expected_value_is_sent() -> None:
    secret = "73501"
    rows: list[dict[str, object]] = [
        {"test_list": [f"assert f(1) == {secret}", f"assert {secret} == f(2)", f"assert f(1) != {secret}"]},
        {"test_list": [f"assert f(1) in [{secret}]"]},
        {"test_list": [f"assert math.isclose(f(1), {secret}, rel_tol=0.1)", f"assert f(1) == 1, '{secret}'"]},
        {"tests": [{"input": "1", "output": secret}, {"fn_name": "f", "args": [1], "output": int(secret)}]},
        {"inputs": ["1"], "outputs": [secret]},
        {"input_output": json.dumps({"fn_name": "f", "inputs": [[1]], "outputs": [int(secret)]})},
    ]  # fmt: skip
    for row in rows:
        found = program_tests.tests_of_row(row)
        assert not isinstance(found, str), found
        assert found
        assert all(secret not in json.dumps(dict(test.message)) for test in found)


def test_the_program_is_the_last_closed_block_after_the_thinking() -> None:
    assert program_of("<think>```python\n1\n```</think>\n```python\n2\n```\nor\n```py\n3\n```") == "3\n"
    assert program_of("```python\n1\n```\n```\nnot python\n```") == "1\n"
    assert program_of("```python\n1\n") is None
    assert program_of("<think>```python\n1\n```") is None
    assert program_of("no code") is None


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -7, 10**30, "é\n", 0.1, float("inf"), 1 + 2j, b"\x00", [1, (2, {3})], {"a": [1], (1, 2): None}],
)
def test_values_come_out_as_they_are(value: object) -> None:
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value
    assert type(back) is type(value)


def test_what_is_no_plain_data_equals_nothing() -> None:
    back = decode(json.loads(json.dumps(encode(SimpleNamespace()))))
    assert back != back
    assert all(decode(bad) != 1 for bad in ({"float": "x"}, {"dict": [[{"dict": []}, 1]]}, {"a": 1, "b": 2}))


# --- hostile programs ---


@isolated
@pytest.mark.parametrize(
    "program",
    [
        "import socket\nsocket.create_connection(('127.0.0.1', PORT), 2)\nprint('LEAK')",
        "import socket\ns = socket.socket(socket.AF_UNIX)\nprint('LEAK')",
        "print('LEAK', open('/etc/passwd').read()[:9])",
        "print('LEAK', open('/etc/shadow').read()[:9])",
        "print('LEAK', open(SECRET).read())",
        "open(SECRET, 'w').write('x'); print('LEAK')",
        "open('/usr/lib/leak.txt', 'w').write('x'); print('LEAK')",
        "print('LEAK', open('/proc/1/environ').read()[:9], open('/proc/1/mem', 'rb'))",
        "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'echo LEAK'])",
        "import os\nif os.fork() == 0:\n    print('LEAK', flush=True)",
        "import os, signal\nos.kill(1, signal.SIGKILL)\nprint('LEAK')",
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nprint('LEAK')",
        "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.unshare(0x10000000) == 0\nprint('LEAK')",
        "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.ptrace(16, 1, 0, 0) == 0\nprint('LEAK')",
        "import os\nos.setuid(0)\nprint('LEAK')",
        "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))\nprint('LEAK')",
        "import os\nos.execv('/bin/sh', ['sh'])\nprint('LEAK')",
    ],
)
def test_a_way_out_is_closed(box: Sandbox, program: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("of the user")
    with socket.create_server(("127.0.0.1", 0)) as server:
        head = f"SECRET = {str(secret)!r}\nPORT = {server.getsockname()[1]}\n"
        report = run(box, head + program)
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()
    assert not report.ok
    assert "LEAK" not in report.stdout
    assert secret.read_text() == "of the user"
    assert not Path("/usr/lib/leak.txt").exists()
    assert run(box, "print('alive')").stdout == "alive\n"


@isolated
@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("while True: pass", "CPU time"),
        ("import time\nwhile True: time.sleep(3600)", "CPU time"),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", "CPU time"),
        ("while True: print('x' * 1000)", ""),
        ("x = []\nwhile True: x.append(bytearray(1 << 20))", "MemoryError"),
        ("import os\nwhile True: os.fork()", "PermissionError"),
        ("import os\nos._exit(0)", "before its time"),
        ("import os\nos._exit(1)", "exit code 1"),
        ("import os\nos.abort()", "signal 6"),
        ("import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()", ""),
        ("with open('big', 'wb') as f:\n    while True: f.write(b'x' * 65536)", ""),
        ("x = " + "(" * 5000, "SyntaxError"),
        ("import os\nfor i in range(99): os.open('/dev/null', 0)", "Too many open files"),
    ],
)
def test_a_limit_holds(box: Sandbox, program: str, detail: str) -> None:
    report = run(box, program)
    assert not report.ok
    assert detail in report.detail
    assert len(report.stdout) <= FAST.output_bytes


@isolated
def test_the_limit_of_cpu_time_is_0_not_unscored_and_shared_by_the_tests() -> None:
    begin = time.process_time()
    tests = [{"input": "", "output": ""}] * 3
    assert score("while True: pass", {"tests": tests}, cpu_seconds=1.0) == 0.0
    burn = "import time\nwhile time.process_time() < 0.6: pass"
    assert score(burn, {"tests": tests}, cpu_seconds=1.0) == 0.0
    assert score(burn, {"tests": tests[:1]}, cpu_seconds=1.0) == 1.0
    assert time.process_time() - begin < 1.0, "the CPU time is the program's, not ours"


@isolated
@pytest.mark.parametrize(
    "program",
    [
        'import os\nos.write(3, b\'{"status": "ok", "value": 9}\')\nos._exit(0)',
        'import os\nos.write(3, b\'{"status": "ok", "value": \' + b\'[\' * 100000)\nos._exit(0)',
        "import os\nos.write(1, b'16')\nos._exit(0)",
        "import builtins, sys\nbuiltins.exit = sys.exit = lambda *a: None\nimport json\njson.dumps = lambda *a: '{}'",
        "import os, sys\nos._exit = lambda code: None\nsys.exit = None\nraise SystemExit",
        "import sys\nsys.modules['strop.rewards.jail.run'].encode = lambda *a: 9\ndef f(x): return x",
        "class E(int):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x): return E(1)",
        "class E:\n    def __eq__(self, other): return True\ndef f(x): return E()",
        "def f(x): raise SystemExit(0)",
        "import gc\ndef f(x): return [o for o in gc.get_objects() if isinstance(o, dict) and 'expected' in o]",
    ],
)
def test_a_forged_verdict_is_worth_nothing(program: str) -> None:
    """Whatever a program does to its surroundings: without the expected value it does not pass."""
    assert score(program, {"tests": [{"fn_name": "f", "args": [3], "output": 9000}]}, cpu_seconds=1.0) == 0.0
    assert score(program, SQUARE, cpu_seconds=1.0) == 0.0


@isolated
def test_programs_see_nothing_of_each_other_or_of_the_trainer(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hf_secret")
    assert run(box, "open('left', 'w').write('x'); print(1)").ok
    shown = run(box, "import os\nprint(os.listdir('.'), dict(os.environ), os.getcwd())").stdout
    assert shown.startswith("[] ")
    assert "hf_secret" not in shown
    assert str(Path(__file__).parent.parent / "src") not in shown


@isolated
def test_a_program_holds_no_pipe_to_the_outside(box: Sandbox) -> None:
    look = (
        "import os\nfor fd in range(4096):\n    try: print(fd, oct(os.fstat(fd).st_mode)[:-4])\n"
        "    except OSError: pass"
    )
    assert run(box, look).stdout.split("\n")[:-1] == ["0 0o10", "1 0o10", "2 0o2", "3 0o10"], "files and /dev/null"


@isolated
def test_a_program_is_the_same_twice(box: Sandbox) -> None:
    program = "import random\nprint(hash('a'), list({'x', 'y', 'zz', 'abc'}), random.random())"
    first = run(box, program)
    assert first.ok
    with Sandbox(box.wall) as other:
        assert run(other, program) == first == run(box, program)


@isolated
def test_nothing_outlives_the_sandbox() -> None:
    assert WALL is not None
    sandbox = Sandbox(WALL)
    sandbox.begin("import threading\nthreading.Lock().acquire()\nt = threading.Event(); t.wait()", FAST)
    helper = sandbox._process
    assert helper is not None
    sandbox._deadline = time.monotonic() + 1.0
    family: set[int] = set()
    look = threading.Timer(0.5, lambda: family.update(_with_descendants(helper.pid)))
    look.start()
    with pytest.raises(OSError, match="without using the CPU"):
        sandbox.run({"stdin": ""}, FAST)
    look.join()
    assert helper.poll() is not None
    assert len(family) > 1, "the program did not run"
    assert _left_of(family) == []


def _with_descendants(pid: int) -> set[int]:
    """A process and all that it has started, by number."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def _left_of(family: set[int]) -> list[int]:
    """Who still runs after up to ten seconds: a killed process needs a moment to be gone."""
    left = sorted(family)
    for _ in range(200):
        left = [pid for pid in left if _runs(pid)]
        if not left:
            break
        time.sleep(0.05)
    return left


@isolated
def test_the_sandbox_dies_with_its_owner() -> None:
    code = (
        "import time\nfrom strop.rewards.sandbox import *\nbox = Sandbox(choose_wall())\nlimits = Limits(cpu_s=60)\n"
        "box.begin('while True: pass', limits)\nprint(box._process.pid, flush=True)\nbox.run({'stdin': ''}, limits)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    helper = int(owner.stdout.readline())
    family: set[int] = set()
    for _ in range(100):
        family = _with_descendants(helper)
        if len(family) > 1:
            break
        time.sleep(0.05)
    assert len(family) > 1, "the program does not run"
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    assert _left_of(family) == []


# --- the walls without the filter, which would hide a hole in them ---

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


# --- the filter of system calls ---


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


# --- where there is no isolation ---


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
