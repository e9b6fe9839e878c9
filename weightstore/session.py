"""One connection on the store's side: bytes in, requests out; replies in, bytes out.

Nothing here knows what a request means. The peer may be slow, silent or hostile, so everything is
bounded: a frame by its cap, frames in the making over all connections by a shared budget, unsent
replies by `MAX_UNSENT`, the time to the first frame by `HELLO_SECONDS`. Whoever breaks a bound loses
the connection and nobody else notices.
"""

from __future__ import annotations

import asyncio
import os
import socket
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from weightstore.catalog import Peer
from weightstore.errors import ProtocolError
from weightstore.wire import LENGTH_BYTES, MAX_REQUEST, Message, Request, decode_request, frame, frame_length

READ_BYTES: Final = 256 << 10
MAX_HELLO: Final = 4096
HELLO_SECONDS: Final = 10.0
MAX_UNSENT: Final = 256 << 20
"""Reply bytes a client may leave unread: many times the records of the largest model."""


class Budget:
    """Bytes of unfinished frames that all connections together may occupy."""

    def __init__(self, nbytes: int) -> None:
        self.left = nbytes

    def take(self, nbytes: int) -> None:
        """Raises ProtocolError when nothing is left; then nothing was taken."""
        if nbytes > self.left:
            raise ProtocolError("too many bytes of unfinished frames on all connections together")
        self.left -= nbytes

    def give(self, nbytes: int) -> None:
        self.left += nbytes


class Session:
    """Owns the socket and, until given away, the peer's pidfd.

    `peer` is set by the service when the first request has said who is there.
    """

    def __init__(self, sock: socket.socket, pidfd: int | None, budget: Budget) -> None:
        self.peer: Peer | None = None
        self.pidfd = pidfd
        self.tasks: set[asyncio.Task[None]] = set()
        self._sock = sock
        self._budget = budget
        self._unsent: deque[tuple[memoryview, Sequence[int]]] = deque()
        self._unsent_bytes = 0
        self._more = asyncio.Event()
        self._closing = False

    # -- receiving ---------------------------------------------------------------------------------

    async def receive(self, handle: Callable[[Session, Request], None]) -> None:
        """Call `handle` for each request until the peer closes.

        Raises:
            ProtocolError: the peer broke the protocol.
            OSError, TimeoutError: the connection broke, or stayed silent from the start.
        """
        loop = asyncio.get_running_loop()
        buffer = bytearray()
        taken = 0
        try:
            while True:
                reading = loop.sock_recv(self._sock, READ_BYTES)
                data = await (reading if self.peer else asyncio.wait_for(reading, HELLO_SECONDS))
                if not data:
                    return
                buffer += data
                self._parse(buffer, handle)
                self._budget.give(taken)
                taken = 0
                self._budget.take(len(buffer))
                taken = len(buffer)
        finally:
            self._budget.give(taken)

    def _parse(self, buffer: bytearray, handle: Callable[[Session, Request], None]) -> None:
        """Handle the whole frames in `buffer` and leave the rest there."""
        start = 0
        while len(buffer) - start >= LENGTH_BYTES and not self._closing:
            body = start + LENGTH_BYTES
            length = frame_length(buffer[start:body], MAX_REQUEST if self.peer else MAX_HELLO)
            if len(buffer) < body + length:
                break
            handle(self, decode_request(bytes(memoryview(buffer)[body : body + length])))
            start = body + length
        del buffer[:start]

    # -- sending -----------------------------------------------------------------------------------

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Queue a message; `fds` are closed once sent. A client that does not read is cut off."""
        if self._closing:
            _close_all(fds)
            return
        data = memoryview(frame(message))
        self._unsent.append((data, fds))
        self._unsent_bytes += len(data)
        self._more.set()
        if self._unsent_bytes > MAX_UNSENT:
            self.abort()

    async def transmit(self) -> None:
        """Send what is queued, until cancelled or, after `finish`, until the queue is empty."""
        loop = asyncio.get_running_loop()
        while True:
            while self._unsent:
                data, fds = self._unsent[0]
                sent = await self._send_fds(data, fds) if fds else 0
                await loop.sock_sendall(self._sock, data[sent:])
                self._unsent.popleft()
                self._unsent_bytes -= len(data)
            if self._closing:
                return
            self._more.clear()
            await self._more.wait()

    async def _send_fds(self, data: memoryview, fds: Sequence[int]) -> int:
        """Send some of `data` with the descriptors; the event loop has no call that carries them."""
        loop = asyncio.get_running_loop()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))]
        while True:
            try:
                sent = self._sock.sendmsg([data], rights)
            except BlockingIOError:
                writable: asyncio.Future[None] = loop.create_future()
                loop.add_writer(self._sock, _set, writable)
                try:
                    await writable
                finally:
                    loop.remove_writer(self._sock)
            else:
                _close_all(fds)
                self._unsent[0] = (data, ())
                return sent

    # -- ending ------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Take no more requests; what is queued may still be sent (see `transmit`)."""
        self._closing = True
        self._more.set()

    def abort(self) -> None:
        """Cut the connection: `receive` ends at once."""
        self._closing = True
        self._more.set()
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the peer was faster

    def take_pidfd(self) -> int | None:
        """The peer's pidfd, now the caller's to close."""
        pidfd, self.pidfd = self.pidfd, None
        return pidfd

    def close(self) -> None:
        """Free the socket, unsent descriptors and the pidfd. Idempotent."""
        self._closing = True
        for _, fds in self._unsent:
            _close_all(fds)
        self._unsent.clear()
        self._sock.close()
        pidfd = self.take_pidfd()
        if pidfd is not None:
            os.close(pidfd)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
