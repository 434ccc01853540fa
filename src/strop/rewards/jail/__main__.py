"""Serve programs one after the other: frames of a 4-byte length and JSON, on standard input and output.

    in   {"code", "nonce", "cpu_s", "memory_bytes", "output_bytes", "random"}           a program
    out  {"ready": true} | {"refused": reason}
    in   {"stdin": text} | {"call": expression} | {"function": name, "args": list}      a test; {"setup": text} beside
    out  {"nonce", "ended", "cpu_s", "result", "stdout"}
    in   {}                                                                             no further test

Every program gets walls of its own. In mode `namespaces` they are built here, in a process forked for the program; in
mode `bwrap` they stand already, and this process serves one program; mode `none` has no walls.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import traceback

from .libc import PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, prctl
from .run import Json, run_test, write_all
from .walls import build_walls

_LENGTH = struct.Struct(">I")


def main(mode: str, library: list[str], devices: list[str]) -> None:
    """Serve until the input ends."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path[:] = [folder for folder in sys.path if folder != os.environ.get("PYTHONPATH")]
    os.environ.pop("PYTHONPATH", None)
    while (program := receive()) is not None:
        pid = 0 if mode == "bwrap" else os.fork()
        if pid:
            os.waitpid(pid, 0)
            continue
        try:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            try:
                if mode == "namespaces":
                    build_walls(library, devices)
                prctl(PR_SET_NO_NEW_PRIVS, 1)
            except OSError as e:
                send({"refused": str(e)})
            else:
                serve(program, alone=mode != "none")
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)


def serve(program: Json, *, alone: bool) -> None:
    """Run the tests of one program as they come; its CPU time is shared by them."""
    send({"ready": True})
    used = 0.0
    while test := receive():
        report = run_test(program, test, float(str(program["cpu_s"])) - used, alone=alone)
        used += float(str(report["cpu_s"]))
        send({"nonce": program["nonce"], **report})


def send(message: Json) -> None:
    """Write one frame."""
    body = json.dumps(message).encode()
    write_all(1, _LENGTH.pack(len(body)) + body)


def receive() -> Json | None:
    """Read one frame, not a byte more; None at the end of the input."""
    head = _read_exactly(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    body = _read_exactly(_LENGTH.unpack(head)[0])
    message = json.loads(body)
    return message if isinstance(message, dict) else None


def _read_exactly(count: int) -> bytes:
    parts: list[bytes] = []
    while count and (part := os.read(0, count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


if __name__ == "__main__":
    main(sys.argv[1], *json.loads(sys.argv[2]))
