"""A real store process, raw sockets that speak its protocol (or do not), and weights without torch.

For tests that look at the store from outside: what it does when a process is killed, and what it does
with clients that are broken, hostile or slow.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from weightstore import wire
from weightstore.client import Store, connect
from weightstore.paths import arena_name
from weightstore.trainer import Refit
from weightstore.types import TensorSpec, align_up, contiguous_stride

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 60.0
"""Seconds until a test gives up on what must happen; nothing depends on how fast it happens."""
MIB = 1 << 20

T = TypeVar("T")


def eventually(condition: Callable[[], T], what: str) -> T:
    """The first true value of `condition`, which other processes are about to make true."""
    pause = threading.Event()
    for _ in range(int(PATIENCE / 0.005)):
        value = condition()
        if value:
            return value
        pause.wait(0.005)
    raise AssertionError(f"still not: {what}; last seen: {value!r}")


# -- the store ------------------------------------------------------------------------------------


class Service:
    """`weightstore serve` on `directory`/s, to be killed and started again; removes its arena at the end."""

    def __init__(
        self,
        directory: Path,
        *options: str,
        capacity: str = "64MiB",
        window: str = "4MiB",
        grace: float = 600.0,
        prefix: Sequence[str] = (),
        **popen: Any,
    ) -> None:
        self.directory = directory
        self.socket = str(directory / "s")
        self._command = [*prefix, sys.executable, "-m", "weightstore", "serve", "--socket", self.socket]
        self._command += ["--capacity", capacity, "--window", window, "--reserve", "0", "--grace", str(grace)]
        self._command += options
        self._popen = popen
        self._log = directory / "log"
        self._process: subprocess.Popen[str] | None = None
        self.start()

    def start(self, *options: str) -> None:
        """Start it and return when it serves."""
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [*self._command, *options],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                **self._popen,
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.startswith("serving"), (line, self.log())

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def shm(self) -> Path:
        return Path("/dev/shm", arena_name(self.socket))

    def log(self) -> str:
        """All it has written to stderr, over all its lives."""
        return self._log.read_text()

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.end(signal.SIGKILL)

    def end(self, number: int = signal.SIGTERM) -> int:
        """The exit code after a signal."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(number)
        process.communicate(timeout=PATIENCE)
        return process.returncode

    def wait(self) -> int:
        """The exit code of a store that ends by itself."""
        process, self._process = self._process, None
        assert process is not None
        process.communicate(timeout=PATIENCE)
        return process.returncode

    def connect(self) -> Store:
        return connect(self.socket, timeout=PATIENCE)

    def raw(self, **hello: Any) -> Raw:
        """A raw connection that has said Hello."""
        raw = Raw(self.socket)
        raw.hello(**hello)
        return raw

    def status(self) -> wire.Status:
        with self.raw() as raw:
            return raw.status()

    def settled(self) -> wire.Status:
        """The status once every other connection has ended and no space waits for a writer.

        Raw connections of this process are one writer, and say here that they are done.
        """
        with self.raw() as raw:

            def quiet() -> wire.Status | None:
                raw.ask(wire.Drained(id=0))
                status = raw.status()
                waits = status.arena.pending + status.arena.quarantined
                return None if status.clients > 1 or status.leases or status.refits or waits else status

            return eventually(quiet, "every connection has ended and no space waits for a writer")

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(signal.SIGKILL)
        self.shm.unlink(missing_ok=True)


# -- a client without manners ---------------------------------------------------------------------


class Raw:
    """A socket to a store. Sends what it is told; understands what comes back."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(path)
        self.fds: list[int] = []
        self.unasked: list[wire.Unasked] = []
        self._bytes = bytearray()
        self._last_id = 0

    def hello(self, **fields: Any) -> wire.Welcome:
        return self.ask(wire.Hello(id=0, **{"protocol": wire.PROTOCOL, **fields}))

    def send(self, data: bytes | wire.Message, fds: Sequence[int] = ()) -> None:
        data = data if isinstance(data, bytes) else wire.frame(data)
        if fds:
            data = data[socket.send_fds(self.sock, [data], list(fds)) :]
        self.sock.sendall(data)

    def read(self) -> Any:
        """The next message. EOFError when the store has hung up."""
        while True:
            if len(self._bytes) >= wire.LENGTH_BYTES:
                end = wire.LENGTH_BYTES + wire.frame_length(self._bytes[: wire.LENGTH_BYTES], wire.MAX_REPLY)
                if len(self._bytes) >= end:
                    message = wire.decode_reply(bytes(self._bytes[wire.LENGTH_BYTES : end]))
                    del self._bytes[:end]
                    return message
            try:
                data, fds, _, _ = socket.recv_fds(self.sock, 1 << 20, 16)
            except ConnectionResetError:
                raise EOFError from None
            self.fds += fds
            if not data:
                raise EOFError
            self._bytes += data

    def post(self, message: wire.Request) -> int:
        """Send `message` with an id chosen here; returns that."""
        self._last_id += 1
        self.send(msgspec.structs.replace(message, id=self._last_id))
        return self._last_id

    def ask(self, message: wire.Request) -> Any:
        """The reply to `message`."""
        return self.reply(self.post(message))

    def reply(self, number: int) -> Any:
        """The reply of that id; what the store sends unasked before it goes to `unasked`."""
        while True:
            message = self.read()
            if isinstance(message, wire.Unasked):
                self.unasked.append(message)
            elif message.id == number:
                return message
            elif message.id == 0:
                raise message.to_error()

    def status(self) -> wire.Status:
        status: wire.Status = self.ask(wire.GetStatus(id=0))
        return status

    def last_words(self) -> wire.Failed | None:
        """Read until the store hangs up: why it did, if it said so."""
        last = None
        with contextlib.suppress(EOFError):
            while True:
                message = self.read()
                if isinstance(message, wire.Failed) and message.id == 0:
                    last = message
        return last

    def close(self) -> None:
        self.sock.close()
        while self.fds:
            os.close(self.fds.pop())

    def __enter__(self) -> Raw:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# -- weights without torch ------------------------------------------------------------------------


Sizes = Mapping[str, "int | tuple[int, ...]"]
"""Tensors by name: a number of bytes, or the shape of a float32 tensor."""


def specs(sizes: Sizes) -> list[TensorSpec]:
    return [
        TensorSpec(name, "uint8", (size,), (1,))
        if isinstance(size, int)
        else TensorSpec(name, "float32", size, contiguous_stride(size))
        for name, size in sizes.items()
    ]


def fill(refit: Refit, sizes: Sizes, value: int) -> None:
    """Write tensors of these sizes, every byte `value`."""
    for record in refit.reserve(specs(sizes)):
        refit.mapping.view(record.offset, record.nbytes)[:] = bytes([value]) * record.nbytes
    refit.wrote(sizes)


def publish(store: Store, model: str, sizes: Sizes, value: int, **how: Any) -> int:
    """Commit a version all of whose written bytes are `value`; returns its number."""
    with store.refit(model, **how) as refit:
        fill(refit, sizes, value)
    return refit.report.version


def contents(store: Store, model: str, tag: str = "latest", version: int | None = None) -> dict[str, bytes]:
    """Every tensor's bytes, read through a lease."""
    lease = store.lease(model, tag, version=version)
    try:
        return {name: bytes(lease.mapping.view(r.offset, r.nbytes)) for name, r in lease.records.items()}
    finally:
        lease.release()


def everything(store: Store) -> dict[tuple[str, str], tuple[int, dict[str, bytes]]]:
    """Every readable tag's version number and bytes: what must survive whoever dies."""
    found = {}
    for model in store.status().models:
        for tag, number in model.tags.items():
            if tag not in model.torn:
                found[model.name, tag] = (number, contents(store, model.name, tag))
    return found


def require_balanced(store: Store) -> None:
    """Every byte of the arena is either free or some readable version's, each once."""
    status = store.status()
    extents = set()
    for model in status.models:
        assert not model.torn
        for version in model.versions:
            with store.lease(model.name, version=version.number) as snapshot:
                extents |= {record.extent for record in snapshot.records.values() if record.nbytes}
    arena = status.arena
    assert (arena.pending, arena.quarantined) == (0, 0)
    assert arena.reachable == sum(align_up(extent.nbytes) for extent in extents)
    assert arena.free + arena.reachable == arena.committed


def values(found: Mapping[str, bytes]) -> dict[str, set[int]]:
    """Each tensor's distinct bytes: one value where it was written whole."""
    return {name: set(data) for name, data in found.items()}
