"""Where a store listens, and which arena belongs to it: pure decisions over paths, plus one directory check.

Invariants:
- client and service resolve the same argument and environment to the same socket;
- the arena's name follows from the socket's real path, so a restarted store finds its own arena and two
  stores never share one;
- a socket lives in a directory that nobody but its owner (or root) can write to.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from hashlib import blake2b
from typing import Final

from weightstore.errors import UsageError

ENVIRONMENT: Final = "WEIGHTSTORE_SOCKET"
SOCKET_NAME: Final = "store.sock"
MAX_SOCKET_PATH: Final = 107
"""Bytes of `sockaddr_un.sun_path` less its final zero (unix(7))."""


def socket_path(
    path: str | os.PathLike[str] | None = None, environment: Mapping[str, str] = os.environ
) -> str:
    """The socket to use: `path`, else ``$WEIGHTSTORE_SOCKET``, else `default_socket()`; made absolute.

    Raises:
        UsageError: empty, or longer than the kernel allows.
    """
    chosen = environment.get(ENVIRONMENT) or default_socket(environment) if path is None else os.fspath(path)
    if not chosen:
        raise UsageError(
            f"the socket path is empty; leave it out for the default, {default_socket(environment)}"
        )
    chosen = os.path.abspath(chosen)
    size = len(os.fsencode(chosen))
    if size > MAX_SOCKET_PATH:
        raise UsageError(
            f"socket path of {size} bytes: the kernel allows {MAX_SOCKET_PATH}; choose a shorter directory "
            f"than {os.path.dirname(chosen)}",
            path=chosen,
            nbytes=size,
        )
    return chosen


def default_socket(environment: Mapping[str, str] = os.environ) -> str:
    """``$XDG_RUNTIME_DIR/weightstore/store.sock``, or ``/tmp/weightstore-<uid>/store.sock`` without one."""
    runtime = environment.get("XDG_RUNTIME_DIR")
    directory = os.path.join(runtime, "weightstore") if runtime else f"/tmp/weightstore-{os.getuid()}"
    return os.path.join(directory, SOCKET_NAME)


def pin_lock(arena: str) -> str:
    """The file by which processes of one user take turns in registering the arena of this uuid."""
    return os.path.join(os.path.dirname(default_socket()), f"pin-{arena}.lock")


def arena_name(socket: str) -> str:
    """Name of the shared memory object of the store on `socket`: ``weightstore-<uid>-<12 hex>``."""
    digest = blake2b(os.fsencode(os.path.realpath(socket)), digest_size=6).hexdigest()
    return f"weightstore-{os.getuid()}-{digest}"


def private_directory(directory: str) -> str:
    """Create `directory` (mode 0700, with parents) or check that the one there is safe for a socket.

    An existing directory may be readable by others, never writable: whoever can write to it could
    put a socket of his own in the store's place.

    Raises:
        UsageError: not a directory, someone else's, or writable by group or others.
    """
    os.makedirs(directory, mode=0o700, exist_ok=True)
    require_private(directory)
    return directory


def require_private(directory: str) -> None:
    """Raise UsageError unless only this user or root can replace what lies in `directory`.

    `directory` itself may not be a symbolic link, which somebody else could turn around.
    """
    status = os.lstat(directory)
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(
            f"{directory} is not a directory; the store's socket needs one of its own", path=directory
        )
    if status.st_uid not in (os.getuid(), 0):
        raise UsageError(
            f"{directory} belongs to uid {status.st_uid}, not to uid {os.getuid()}; use another socket path",
            path=directory,
            owner=status.st_uid,
        )
    if status.st_mode & 0o022:
        raise UsageError(
            f"{directory} is writable by others (mode {stat.S_IMODE(status.st_mode):04o}), who could replace "
            "the store's socket; put the socket in a directory of its own (mode 0700)",
            path=directory,
            mode=stat.S_IMODE(status.st_mode),
        )
