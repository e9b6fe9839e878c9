"""Arenas in shared memory: which are held by a living store, and which a dead one left behind."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from weightstore.doctor.finding import Finding, Host
from weightstore.errors import ArenaUnusable
from weightstore.layout import HEADER_BYTES, MAGIC, read_committed, unpack_header
from weightstore.segment import lock_holder
from weightstore.sizes import format_size

PREFIX: Final = "weightstore-"


def check_arenas(host: Host) -> list[Finding]:
    """One finding for each object that is, or is named like, an arena."""
    findings = list(_arenas(host.shm))
    return findings or [Finding("arenas", "ok", f"none in {host.shm}")]


def _arenas(shm: Path) -> Iterator[Finding]:
    try:
        paths = sorted(path for path in shm.iterdir() if stat.S_ISREG(path.lstat().st_mode))
    except OSError:
        return
    for path in paths:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            if path.name.startswith(PREFIX):
                yield Finding("arena", "ok", f"{path} is not ours to look into ({error.strerror})")
            continue
        try:
            if path.name.startswith(PREFIX) or os.pread(fd, len(MAGIC), 0) == MAGIC:
                yield _describe(path, fd)
        finally:
            os.close(fd)


def _describe(path: Path, fd: int) -> Finding:
    used = format_size(os.fstat(fd).st_blocks * 512)
    remove = f"rm {path}"
    page = os.pread(fd, HEADER_BYTES, 0)
    try:
        header = unpack_header(page, str(path))
    except ArenaUnusable as error:
        return Finding("arena", "warn", f"{error}; it takes {used}", f"If nothing needs it: {remove}")
    seen = (
        f"{path.name}: {format_size(header.capacity)} capacity, "
        f"{format_size(read_committed(page) if len(page) == HEADER_BYTES else 0)} committed, {used} in memory"
    )
    holder = lock_holder(fd)
    if holder is not None:
        return Finding("arena", "ok", f"{seen}; held by the store with pid {holder}")
    if _is_locked(fd):
        return Finding("arena", "ok", f"{seen}; held by a store in another pid namespace")
    return Finding(
        "arena",
        "warn",
        f"{seen}; no living store holds it",
        f"Bring its models back: weightstore serve --arena {path.name}; or free the memory: {remove}",
    )


def _is_locked(fd: int) -> bool:
    """Whether somebody holds the exclusive lock, asked for where /proc/locks cannot show it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False
