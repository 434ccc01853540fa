"""Hostile programs behind walls get nowhere, neither out nor past a limit, and leave nothing behind.

Everything here runs real programs in the real sandbox.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import FAST, SQUARE, WALL, isolated, run, score

from strop.rewards.sandbox import Sandbox


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    assert WALL is not None
    with Sandbox(WALL) as sandbox:
        yield sandbox


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
