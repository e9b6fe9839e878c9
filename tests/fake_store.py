"""A store that says what a test tells it to: real socket, real arena, scripted answers."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import posix_ipc

from weightstore import wire
from weightstore.errors import StoreGone
from weightstore.layout import DATA_OFFSET, Header, pack_header
from weightstore.link import Link
from weightstore.types import TensorRecord, contiguous_stride, nbytes_of

MIB = 1 << 20
PATIENCE = 20.0


class FakeArena:
    """A real segment with a real header; removed from the file system at once."""

    def __init__(self, capacity: int = MIB, uuid: UUID | None = None) -> None:
        self.uuid = uuid or uuid4()
        self.capacity = capacity
        self.nbytes = DATA_OFFSET + capacity
        name = f"/weightstore-test-{secrets.token_hex(6)}"
        shm = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=self.nbytes)
        posix_ipc.unlink_shared_memory(name)
        self.fd = shm.fd
        os.posix_fallocate(self.fd, DATA_OFFSET, capacity)
        os.pwrite(self.fd, pack_header(Header(self.uuid, capacity, MIB, 1.0)), 0)

    def reader(self) -> int:
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY)

    def writer(self) -> int:
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR)

    def write(self, offset: int, data: bytes) -> None:
        os.pwrite(self.fd, data, offset)

    def close(self) -> None:
        os.close(self.fd)


def record(
    name: str, offset: int, shape: Sequence[int] = (4,), dtype: str = "float32", **more: Any
) -> TensorRecord:
    """A contiguous record `offset` bytes into the data area."""
    shape = tuple(shape)
    nbytes = nbytes_of(dtype, shape)
    return TensorRecord(name, dtype, shape, contiguous_stride(shape), DATA_OFFSET + offset, nbytes, **more)


Answer = Callable[[Any], "wire.Message | tuple[wire.Message, list[int]] | bytes | None"]


class FakeStore:
    """Answers each request through `answers`, by type; unknown ones with Done. Records what it got."""

    def __init__(self, path: Path | str, arena: FakeArena) -> None:
        self.path = str(path)
        self.arena = arena
        self.answers: dict[type, Answer] = {wire.Hello: self.welcome}
        self.received: list[Any] = []
        self._ended = 0
        self._changed = threading.Condition()
        self._peers: list[socket.socket] = []
        self._sending = threading.Lock()
        self._listener: socket.socket | None = None
        self._threads: list[threading.Thread] = []
        self.start()

    def start(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen(16)
        self._spawn(self._accept, self._listener)

    def welcome(self, hello: wire.Hello) -> tuple[wire.Message, list[int]]:
        arena = self.arena
        message = wire.Welcome(
            id=hello.id,
            arena=str(arena.uuid),
            capacity=arena.capacity,
            window=MIB,
            nbytes=arena.nbytes,
            server="fake",
            pid=os.getpid(),
        )
        return message, [arena.reader()]

    def wait(self, kind: type, count: int = 1) -> list[Any]:
        """The requests of type `kind`, once there are `count`."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.of(kind)) >= count, PATIENCE), (
                f"{len(self.of(kind))} of {count} {kind.__name__}; got {self.received}"
            )
            return self.of(kind)

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.received if isinstance(message, kind)]

    def push(self, message: wire.Message | bytes, fds: list[int] | None = None) -> None:
        """Send to the latest connection, and close `fds`."""
        self._send(self._peers[-1], message, fds or [])

    def lose(self, link: Link, stop: bool = False) -> None:
        """End every connection (and stop listening), and return when `link`'s has noticed."""
        connection = link.connection
        assert connection is not None
        if stop:
            self.stop()
        else:
            self.drop()
        try:
            connection.request(wire.Drained(id=0), wire.Done)
        except StoreGone:
            return
        raise AssertionError("the connection goes on")

    def drop(self) -> None:
        """End every connection."""
        peers, self._peers = self._peers, []
        for peer in peers:
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        """Stop listening and end every connection, as a killed store does."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
            os.unlink(self.path)
        self.drop()

    def close(self) -> None:
        self.stop()
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()

    def _spawn(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            self._peers.append(peer)
            self._spawn(self._converse, peer)

    def _converse(self, peer: socket.socket) -> None:
        with peer, peer.makefile("rb") as stream, self._counting_ends():
            while True:
                try:
                    prefix = stream.read(wire.LENGTH_BYTES)
                    if len(prefix) < wire.LENGTH_BYTES:
                        return
                    body = stream.read(wire.frame_length(prefix, wire.MAX_REQUEST))
                except OSError:
                    return
                request = wire.decode_request(body)
                with self._changed:
                    self.received.append(request)
                    self._changed.notify_all()
                answer = self.answers.get(type(request), lambda r: wire.Done(id=r.id))(request)
                if isinstance(answer, tuple):
                    self._send(peer, *answer)
                elif answer is not None:
                    self._send(peer, answer, [])

    @contextlib.contextmanager
    def _counting_ends(self) -> Iterator[None]:
        try:
            yield
        finally:
            with self._changed:
                self._ended += 1
                self._changed.notify_all()

    def wait_ended(self, count: int = 1) -> None:
        """Until that many connections were seen to end."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._ended >= count, PATIENCE)

    def _send(self, peer: socket.socket, message: wire.Message | bytes, fds: list[int]) -> None:
        data = message if isinstance(message, bytes) else wire.frame(message)
        try:
            with self._sending, contextlib.suppress(OSError):
                if fds:
                    sent = socket.send_fds(peer, [data], fds)
                    peer.sendall(data[sent:])
                else:
                    peer.sendall(data)
        finally:
            for fd in fds:
                os.close(fd)
