"""Checks of what the running kernel offers, by trying it: version numbers lie on patched kernels."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket

from weightstore.arena import MADV_POPULATE_WRITE
from weightstore.doctor.finding import Finding, Host, Status
from weightstore.peers import SO_PEERPIDFD


def check_kernel(host: Host) -> list[Finding]:
    release = host.read(host.proc / "sys/kernel/osrelease") or "unknown"
    return [
        _finding(
            "populate",
            populates(),
            f"MADV_POPULATE_WRITE (kernel {release})",
            "warn",
            "The arena is committed by one thread through fallocate instead. Linux 5.14 is faster.",
        ),
        _finding(
            "process handles",
            opens_pidfds(),
            f"pidfd_open (kernel {release})",
            "fail",
            "The store cannot tell when a dead writer's memory is safe to reuse. Use Linux 5.3 or newer, and "
            "a seccomp profile that allows pidfd_open.",
        ),
        _finding(
            "peer handles",
            knows_peers(),
            f"SO_PEERPIDFD (kernel {release})",
            "ok",
            "The store uses pidfd_open on the peer's pid instead, which is as good unless pids wrap around "
            "within milliseconds. Linux 6.5 has it.",
        ),
    ]


def _finding(name: str, there: bool, what: str, otherwise: Status, advice: str) -> Finding:
    if there:
        return Finding(name, "ok", f"{what} works")
    return Finding(name, otherwise, f"{what} does not work", advice)


def populates() -> bool:
    """Whether madvise(MADV_POPULATE_WRITE) works."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        anchor = ctypes.c_char.from_buffer(page)
        failed = libc.madvise(ctypes.addressof(anchor), mmap.PAGESIZE, MADV_POPULATE_WRITE)
        del anchor
    return not failed or ctypes.get_errno() != errno.EINVAL


def opens_pidfds() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError):
        return False
    return True


def knows_peers() -> bool:
    """Whether getsockopt(SO_PEERPIDFD) works on a Unix socket."""
    left, right = socket.socketpair()
    with left, right:
        try:
            os.close(left.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
        except OSError:
            return False
    return True
