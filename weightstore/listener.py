"""The Unix socket a store listens on, from its creation to its removal.

Invariants:
- of any number of stores started on one path at once, one gets it, and the others leave it alone: making
  and removing the socket happen under a lock beside it;
- what is removed at the end is the socket that was made;
- it lies in a directory where nobody else can put another in its place.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from weightstore.errors import ArenaUnusable
from weightstore.paths import private_directory

log = logging.getLogger("weightstore.service")


@contextlib.contextmanager
def listening(path: Path, shared: bool) -> Iterator[socket.socket]:
    """A listening Unix socket at `path`, replacing one that nobody answers on; removed at the end.

    `shared` lets other users connect; whoever may not stay is told apart by his credentials.

    Raises:
        ArenaUnusable: a store already answers there, or the path cannot be used.
        UsageError: others can write to the directory.
    """
    try:
        _prepare(path.parent, shared)
        with _alone(path):
            _require_free(path)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                ours = _bind(listener, path, shared)
            except BaseException:
                listener.close()
                raise
    except OSError as error:
        raise ArenaUnusable(f"cannot serve on {path}: {error.strerror or error}") from None
    with listener:
        try:
            yield listener
        finally:
            with contextlib.suppress(FileNotFoundError), _alone(path):
                if os.path.samestat(path.lstat(), ours):
                    path.unlink()


def _prepare(directory: Path, shared: bool) -> None:
    existed = directory.exists()
    private_directory(str(directory))
    if not shared:
        return
    if not existed:
        directory.chmod(0o711)
    closed = [str(d) for d in (directory, *directory.parents) if not d.stat().st_mode & stat.S_IXOTH]
    if closed:
        log.warning(
            "users let in by --allow-uid cannot reach the socket: they may not pass through %s; chmod o+x, "
            "or choose another --socket",
            ", ".join(closed),
        )


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock on `path`, which others hold only for moments."""
    lock = f"{path}.lock"
    fd = _locked(lock)
    while fd is None:
        fd = _locked(lock)
    try:
        yield
    finally:
        os.unlink(lock)
        os.close(fd)


def _locked(lock: str) -> int | None:
    """A descriptor of the locked file `lock`; None if its last holder removed it meanwhile."""
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.path.samestat(os.stat(lock), os.fstat(fd)):
            return fd
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _require_free(path: Path) -> None:
    """Remove a socket that nobody listens on."""
    if path.exists() and not stat.S_ISSOCK(path.lstat().st_mode):
        raise ArenaUnusable(f"{path} exists and is not a socket; choose another --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass  # it listens, and has no time
    raise ArenaUnusable(f"a store already serves on {path}; use it, stop it, or choose another --socket")


def _bind(listener: socket.socket, path: Path, shared: bool) -> os.stat_result:
    """Bind and listen; what identifies the socket's file."""
    # The mode is set before anyone can connect.
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    ours = path.lstat()
    if shared:
        path.chmod(0o666)
    listener.listen(128)
    return ours
