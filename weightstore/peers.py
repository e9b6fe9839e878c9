"""Who is at the other end of a Unix socket, and when that process is gone.

Linux facts this relies on: SO_PEERCRED gives pid, uid and gid of the process that connected, as of
that moment; SO_PEERPIDFD (Linux 6.5) gives a pidfd of that very process, also from another pid
namespace; a pidfd becomes readable when its process has exited, at which point none of its threads
runs and the driver has released its device mappings.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from typing import Final

from weightstore.catalog import Writer

SO_PEERPIDFD: Final = 77  # not in Python's socket module
_CREDENTIALS: Final = struct.Struct("iII")


def peer_credentials(sock: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process that connected `sock`; pid 0 if it is not visible from here."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return int(pid), int(uid)


def peer_pidfd(sock: socket.socket) -> int | None:
    """A pidfd of the connected process, the caller's to close; None if it is gone or invisible."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError:
        pass  # before Linux 6.5, or the process has exited: ask by pid
    pid, _ = peer_credentials(sock)
    return open_pidfd(pid)


def open_pidfd(pid: int) -> int | None:
    """A pidfd of process `pid`, or None if there is none (a pid of 0 is of a process not visible from here).
    Raises OSError for want of descriptors."""
    if pid <= 0:
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def start_ticks(pid: int) -> int:
    """Start time of process `pid` in clock ticks since boot; 0 if it cannot be seen.

    Together with the pid this names a process for the life of the host (proc(5), field 22 of stat).
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except OSError:
        return 0
    return int(fields[19])


def reopen_pidfd(writer: Writer) -> int | None:
    """A pidfd of the process that an earlier store knew as `writer`; None if that is gone or invisible."""
    pidfd = open_pidfd(writer.pid)
    if pidfd is not None and start_ticks(writer.pid) != writer.started:
        os.close(pidfd)  # a later process with the same number
        return None
    return pidfd


class Exits:
    """Tells the event loop's owner when writers' processes have ended. Owns their pidfds."""

    def __init__(self, gone: Callable[[Writer], None]) -> None:
        self._gone = gone
        self._loop = asyncio.get_running_loop()
        self._pidfds: dict[Writer, int] = {}

    def watch(self, writer: Writer, pidfd: int) -> None:
        self._forget(writer)
        self._pidfds[writer] = pidfd
        self._loop.add_reader(pidfd, self._exited, writer)

    def keep_only(self, writers: Callable[[], set[Writer]]) -> None:
        """Watch nobody who is not among `writers()`, which is asked only if somebody is watched."""
        if self._pidfds:
            for writer in self._pidfds.keys() - writers():
                self._forget(writer)

    def close(self) -> None:
        self.keep_only(set)

    def _exited(self, writer: Writer) -> None:
        self._forget(writer)
        self._gone(writer)

    def _forget(self, writer: Writer) -> None:
        pidfd = self._pidfds.pop(writer, None)
        if pidfd is not None:
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
