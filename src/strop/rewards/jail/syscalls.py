"""A filter of system calls, for the processors whose numbers are known here."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

from .libc import PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, check, libc, prctl

_X86_64, _AARCH64 = 0xC000003E, 0xC00000B7
_CALLS: dict[str, tuple[int, int]] = {
    # name: (x86_64, aarch64); -1 where there is none
    "fork": (57, -1), "vfork": (58, -1), "execve": (59, 221), "execveat": (322, 281), "socket": (41, 198),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "unshare": (272, 97), "setns": (308, 268),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "quotactl": (179, 60), "swapon": (167, 224), "swapoff": (168, 225),
    "reboot": (169, 142), "acct": (163, 89), "syslog": (103, 116), "personality": (135, 92), "iopl": (172, -1),
    "ioperm": (173, -1), "modify_ldt": (154, -1), "mbind": (237, 235), "set_mempolicy": (238, 237),
    "migrate_pages": (256, 238), "move_pages": (279, 239), "shmget": (29, 194), "msgget": (68, 186),
    "semget": (64, 190), "memfd_create": (319, 279), "kill": (62, 129), "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
}  # fmt: skip
_NO_WAIT: dict[str, tuple[int, int]] = {"nanosleep": (35, 101), "clock_nanosleep": (230, 115)}
_CLONE, _CLONE3, _TGKILL, _PRLIMIT = (56, 220), 435, (234, 131), (302, 261)
_CLONE_THREAD = 0x00010000
_X32 = 0x40000000
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38


def seccomp_program(machine: str, process: int) -> bytes | None:
    """Return the filter of system calls as BPF for one processor, None where its table is not known here.

    Everything in `_CALLS` fails with EPERM; `clone` makes threads alone; signals reach the process with the id
    `process` alone, and limits of other processes stay as they are. A sleep returns at once, so that a program that
    sleeps for ever meets its limit of CPU time instead of a clock.
    """
    architectures = {"x86_64": (_X86_64, 0), "aarch64": (_AARCH64, 1)}
    if machine not in architectures:
        return None
    audit, column = architectures[machine]

    def load(offset: int) -> tuple[int, int, int, int]:
        return 0x20, 0, 0, offset

    def answer(value: int) -> tuple[int, int, int, int]:
        return 0x06, 0, 0, value

    def unless_equal(value: int, skip: int) -> tuple[int, int, int, int]:
        return 0x15, 0, skip, value

    code = [load(4), (0x15, 1, 0, audit), answer(_KILL), load(0)]
    if machine == "x86_64":
        code += [(0x35, 0, 1, _X32), answer(_KILL)]
    for numbers in _CALLS.values():
        if numbers[column] >= 0:
            code += [unless_equal(numbers[column], 1), answer(_ERRNO | _EPERM)]
    for numbers in _NO_WAIT.values():
        code += [unless_equal(numbers[column], 1), answer(_ERRNO)]
    code += [unless_equal(_CLONE3, 1), answer(_ERRNO | _ENOSYS)]  # its flags lie in memory; libc falls back to clone
    for numbers, only in ((_TGKILL, process), (_PRLIMIT, 0)):  # by their first argument
        code += [unless_equal(numbers[column], 4), load(16), (0x15, 1, 0, only), answer(_ERRNO | _EPERM)]
        code.append(answer(_ALLOW))
    is_thread = (0x45, 1, 0, _CLONE_THREAD)
    code += [unless_equal(_CLONE[column], 3), load(16), is_thread, answer(_ERRNO | _EPERM)]
    code.append(answer(_ALLOW))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def forbid_system_calls() -> bool:
    """Install the filter in this process. Returns False where there is none for this processor."""
    program = seccomp_program(platform.machine(), os.getpid())
    if program is None or sys.byteorder != "little" or struct.calcsize("P") != 8:
        return False
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    pointer = ctypes.create_string_buffer(header, len(header))
    check(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(pointer), 0, 0), "seccomp")
    return True
