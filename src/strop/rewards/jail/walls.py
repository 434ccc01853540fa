"""Namespaces, and a root folder that holds the Python library and an empty /tmp: what bubblewrap does, without it."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct

from .libc import PR_SET_PDEATHSIG, check, libc, prctl

_NOBODY = 65534
_TMP_BYTES = 16 << 20
_NEW_NS, _NEW_UTS, _NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR = 442


def build_walls(library: list[str], devices: list[str]) -> None:
    """Enter new namespaces whose root holds the `library` folders (read-only), the `devices` and an empty /tmp.

    Returns in the first process of the new PID namespace, as nobody and without any capability; the calling process
    waits for it and exits with it. Raises OSError where the kernel refuses.
    """
    _enter_namespaces()
    _build_root(library, devices)
    pid = os.fork()
    if pid:
        os.close(0)
        os.close(1)
        _, status = os.waitpid(pid, 0)
        os._exit(0 if status == 0 else 1)
    _drop_privileges()


def _enter_namespaces() -> None:
    user, group = os.geteuid(), os.getegid()
    flags = _NEW_USER | _NEW_NS | _NEW_PID | _NEW_NET | _NEW_IPC | _NEW_UTS
    if user:
        check(libc.unshare(flags), "unshare")
        _write_maps("self", f"{_NOBODY} {user} 1", f"{_NOBODY} {group} 1", deny_groups=True)
    else:
        _enter_as_root(flags)
    # Changed credentials reset it, so it is set again here.
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _enter_as_root(flags: int) -> None:
    """Enter with root and nobody mapped, which a process in the old namespace has to do; the walls end as nobody."""
    entered_r, entered_w = os.pipe()
    target = os.getpid()
    helper = os.fork()
    if not helper:
        code = 1
        try:
            os.close(entered_w)
            if os.read(entered_r, 1):
                both = f"0 0 1\n{_NOBODY} {_NOBODY} 1\n"
                _write_maps(str(target), both, both, deny_groups=False)
                code = 0
        finally:
            os._exit(code)
    os.close(entered_r)
    try:
        check(libc.unshare(flags & ~_NEW_PID), "unshare")
        os.write(entered_w, b"1")
    finally:
        os.close(entered_w)
        _, status = os.waitpid(helper, 0)
    if status:
        raise OSError("the user namespace could not be given its ids")
    check(libc.unshare(_NEW_PID), "unshare")  # after the helper: only the next child is to be the first process


def _write_maps(process: str, users: str, groups: str, *, deny_groups: bool) -> None:
    names = [("uid_map", users), ("gid_map", groups)]
    for name, text in [("setgroups", "deny"), *names] if deny_groups else names:
        with open(f"/proc/{process}/{name}", "w") as file:
            file.write(text)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    arguments = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    result = libc.mount(*arguments, ctypes.c_ulong(flags), None if data is None else data.encode())
    check(result, f"mount {target}")


def _build_root(library: list[str], devices: list[str]) -> None:
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,nr_inodes=4k,mode=755")
    os.mkdir("/tmp/.old")
    os.chdir("/tmp")
    check(libc.syscall(_PIVOT_ROOT[platform.machine()], b"/tmp", b"/tmp/.old"), "pivot_root")
    os.chdir("/")
    for path in library:
        _show(path)
    for path in devices:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "w").close()
        _mount("/.old" + path, path, None, _MS_BIND)
    check(libc.umount2(b"/.old", 2), "umount")  # MNT_DETACH
    os.rmdir("/.old")
    os.makedirs("/tmp", exist_ok=True)
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={_TMP_BYTES},nr_inodes=1k,mode=777")
    _mount(None, "/", None, _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV, "size=1m,nr_inodes=4k,mode=755")
    os.chdir("/tmp")


def _show(path: str) -> None:
    """Bind a folder of the old root at the same place, read-only; a link stays a link."""
    old = "/.old" + path
    if os.path.islink(old):
        os.symlink(os.readlink(old), path)
        return
    os.makedirs(path, exist_ok=True)
    _mount(old, path, None, _MS_BIND | _MS_REC)
    wanted = struct.pack("QQQQ", _MS_RDONLY | _MS_NOSUID | _MS_NODEV, 0, 0, 0)
    recursive = 0x8000
    if libc.syscall(_MOUNT_SETATTR, -100, os.fsencode(path), recursive, wanted, len(wanted)) == 0:
        return
    kept = os.statvfs(path).f_flag & 0x0E  # a namespace of one's own may not clear nosuid, nodev, noexec
    _mount(None, path, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV | kept)


def _drop_privileges() -> None:
    if os.getuid() != _NOBODY:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    check(libc.capset(header, nothing), "capset")
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
