"""A private store for a notebook, a test or the demo: a service process that lives as long as a `with` block.

Invariants:
- the child ends with the block, and also when this process dies without leaving it: it watches a pipe
  whose other end only this process holds;
- after the block nothing is left: no process, no socket, no shared memory, even if the child was killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import posix_ipc

import weightstore
from weightstore.client import Store, connect
from weightstore.errors import StoreGone, StoreSilent
from weightstore.paths import MAX_SOCKET_PATH, SOCKET_NAME, arena_name

START_PATIENCE: Final = 30.0
"""Seconds the child has to answer."""
END_PATIENCE: Final = 10.0
"""Seconds the child has to end after SIGTERM, before SIGKILL."""
_POLL: Final = 0.02


@contextlib.contextmanager
def local_store(capacity: str | int = "2GiB", *, window: str | int = "256MiB") -> Iterator[Store]:
    """Start a private store, connect to it, and remove everything at the end.

    Args:
        capacity: bytes the arena may grow to, as a number or such as ``"2GiB"``; pages are taken as needed.
        window: the unit in which they are taken.

    Raises:
        StoreGone: the service did not start; the message holds what it said.
    """
    directory = _directory()
    socket = os.path.join(directory, SOCKET_NAME)
    try:
        with _Child(socket, capacity, window) as child, child.connect() as store:
            yield store
    finally:
        with contextlib.suppress(posix_ipc.ExistentialError):  # there only if the child was killed
            posix_ipc.unlink_shared_memory(f"/{arena_name(socket)}")
        shutil.rmtree(directory, ignore_errors=True)


def _directory() -> str:
    """A new private directory whose path leaves room for a socket."""
    directory = tempfile.mkdtemp(prefix="weightstore-")
    if len(os.fsencode(directory)) + 1 + len(SOCKET_NAME) > MAX_SOCKET_PATH:
        os.rmdir(directory)
        directory = tempfile.mkdtemp(prefix="weightstore-", dir="/tmp")
    return directory


class _Child:
    """The service process, from its start to its end."""

    def __init__(self, socket: str, capacity: str | int, window: str | int) -> None:
        self._socket = socket
        command = [sys.executable, "-m", "weightstore", "serve", "--socket", socket]
        command += ["--capacity", str(capacity), "--window", str(window)]
        watched, self._lifeline = os.pipe()
        try:
            with open(f"{socket}.log", "wb") as log:
                self._process = subprocess.Popen(
                    [*command, "--until-eof", str(watched)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[watched],
                    env=_environment(),
                )
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(watched)

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lifeline)
        self._process.terminate()
        try:
            self._process.wait(END_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def connect(self) -> Store:
        """A client, as soon as the service answers."""
        pause = threading.Event()
        waited = 0.0
        while True:
            try:
                return connect(self._socket)
            except (StoreGone, StoreSilent):
                code = self._process.poll()
                if code is not None:
                    raise self._failed(f"ended with exit code {code}") from None
            if waited > START_PATIENCE:
                raise self._failed(f"did not answer within {START_PATIENCE:g} s")
            pause.wait(_POLL)
            waited += _POLL

    def _failed(self, how: str) -> StoreGone:
        said = Path(f"{self._socket}.log").read_text(errors="replace").strip()
        return StoreGone(
            f"the local store {how}. It said:\n{said or '(nothing)'}", socket=self._socket, output=said
        )


def _environment() -> dict[str, str]:
    """This process's, in which the child finds the same weightstore even if it is not installed."""
    environment = dict(os.environ)
    home = str(Path(weightstore.__file__).parent.parent)
    if home not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [home, environment.get("PYTHONPATH")]))
    return environment
