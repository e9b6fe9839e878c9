"""The Unix socket a store listens on."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

from weightstore.errors import ArenaUnusable


def listen(path: Path, shared: bool) -> socket.socket:
    """A listening Unix socket at `path`, replacing one that nobody answers on.

    Raises:
        ArenaUnusable: a store already answers there, or the path cannot be used.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and not stat.S_ISSOCK(path.lstat().st_mode):
            raise ArenaUnusable(f"{path} exists and is not a socket; choose another --socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                path.unlink(missing_ok=True)
            else:
                raise ArenaUnusable(
                    f"a store already serves on {path}; use it, stop it, or choose another --socket"
                )
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # The mode is set before anyone can connect; allowed strangers are told apart by their credentials.
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
        if shared:
            path.chmod(0o666)
    except OSError as error:
        raise ArenaUnusable(f"cannot serve on {path}: {error.strerror or error}") from None
    listener.listen(128)
    listener.setblocking(False)
    return listener
