"""A real service process that a test can kill and start again on the same socket."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import posix_ipc

from weightstore.client import Store, connect
from weightstore.errors import StoreGone
from weightstore.paths import arena_name

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 30.0


class ServiceProcess:
    """`weightstore serve` on `directory`/s. Removes its arena at the end, however it ended."""

    def __init__(self, directory: Path, capacity: str = "96MiB", window: str = "8MiB") -> None:
        self.socket = str(directory / "s")
        self._command = [sys.executable, "-m", "weightstore", "serve", "--socket", self.socket]
        self._command += ["--capacity", capacity, "--window", window, "--reserve", "0"]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and return when it serves."""
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith(b"serving"):
            _, errors = self._process.communicate(timeout=PATIENCE)
            raise AssertionError(f"the service did not start: {errors.decode()}")

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def terminate(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            process.communicate(timeout=PATIENCE)

    def connect(self) -> Store:
        return connect(self.socket)

    def __enter__(self) -> ServiceProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_shared_memory(f"/{arena_name(self.socket)}")


def until_back(store: Store, pause: float = 0.01) -> None:
    """Wait until `store` has reconnected by itself."""
    import threading

    waiting = threading.Event()
    for _ in range(int(PATIENCE / pause)):
        if store.link.connection is not None:
            return
        waiting.wait(pause)
    raise StoreGone(f"{store!r} did not come back")


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))
