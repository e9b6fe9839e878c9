"""One connection on the store's side: bytes in, requests out; replies in, bytes out.

Nothing here knows what a request means. The peer may be slow, silent, busy or hostile, so everything is
bounded: a frame by its cap, the time to the first request by `HELLO_SECONDS`, requests handled without
letting others have a turn by `TURN`, unsent replies by `MAX_UNSENT`, and what all connections together
have unfinished or unsent by a shared `Budget`. Whoever breaks a bound loses the connection and nobody
else notices.
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
TURN: Final = 16
"""Requests of one connection that are handled before every other connection has had its turn."""
MAX_UNSENT: Final = 256 << 20
"""Reply bytes a client may leave unread: many times the records of the largest model."""


class Budget:
    """Bytes that all connections together may occupy with frames under way in one direction.

    When they are too many, whoever has not moved for longest is cut off: a client that comes with a large
    frame must not pay for others that never finish theirs.
    """

    def __init__(self, nbytes: int, what: str) -> None:
        self.left = nbytes
        self._what = what
        self._held: dict[Session, int] = {}
        """In the order in which they last moved."""

    def hold(self, session: Session, nbytes: int, moved: bool = True) -> None:
        """`session` occupies so much from now on; `moved` if that is its peer's doing."""
        self.left += self._held.get(session, 0) - nbytes
        if moved:
            self._held.pop(session, None)
        if nbytes:
            self._held[session] = nbytes
        while self.left < 0:
            stalest = next(iter(self._held))
            self.left += self._held.pop(stalest)
            stalest.cut(ProtocolError(f"all connections together have too many bytes of {self._what}"))


class Session:
    """Owns the socket and, until given away, the peer's pidfd.

    `peer` is set by the service when the first request has said who is there.
    """

    def __init__(self, sock: socket.socket, pidfd: int | None, unfinished: Budget, unsent: Budget) -> None:
        self.peer: Peer | None = None
        self.pidfd = pidfd
        self.tasks: set[asyncio.Task[None]] = set()
        self._sock = sock
        self._unfinished = unfinished
        self._unsent_budget = unsent
        self._unsent: deque[tuple[memoryview, Sequence[int]]] = deque()
        self._unsent_bytes = 0
        self._more = asyncio.Event()
        self._closing = False
        self._breach: ProtocolError | None = None

    # -- receiving ---------------------------------------------------------------------------------

    async def receive(self, handle: Callable[[Session, Request], None]) -> None:
        """Call `handle` for each request until the peer closes.

        Raises:
            ProtocolError: the peer broke the protocol, or a bound.
            OSError: the connection broke.
        """
        loop = asyncio.get_running_loop()
        late = ProtocolError(f"nothing was asked within {HELLO_SECONDS:g} s")
        greeting = loop.call_later(HELLO_SECONDS, self.cut, late)
        buffer = bytearray()
        handled = 0
        try:
            while self._listening and (data := await loop.sock_recv(self._sock, READ_BYTES)):
                buffer += data
                while self._listening and (request := self._next(buffer)) is not None:
                    handle(self, request)
                    if self.peer is not None:
                        greeting.cancel()
                    handled += 1
                    if handled % TURN == 0:
                        await asyncio.sleep(0)
                self._unfinished.hold(self, len(buffer))
                # sock_recv does not wait while there is something to read, as a busy peer always has.
                await asyncio.sleep(0)
        finally:
            greeting.cancel()
            self._unfinished.hold(self, 0)
        if self._breach is not None:
            raise self._breach

    @property
    def _listening(self) -> bool:
        return not self._closing and self._breach is None

    def _next(self, buffer: bytearray) -> Request | None:
        """Take the first whole frame out of `buffer`, if there is one."""
        if len(buffer) < LENGTH_BYTES:
            return None
        end = LENGTH_BYTES + frame_length(buffer[:LENGTH_BYTES], MAX_REQUEST if self.peer else MAX_HELLO)
        if len(buffer) < end:
            return None
        body = bytes(memoryview(buffer)[LENGTH_BYTES:end])
        del buffer[:end]
        return decode_request(body)

    # -- sending -----------------------------------------------------------------------------------

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Queue a message; `fds` are closed once sent. A client that does not read is cut off."""
        if self._closing:
            _close_all(fds)
            return
        data = memoryview(frame(message))
        self._unsent.append((data, fds))
        self._count_unsent(len(data), moved=False)
        self._more.set()
        if self._unsent_bytes > MAX_UNSENT:
            self.cut(ProtocolError(f"more than {MAX_UNSENT} bytes of replies have not been read"))

    async def transmit(self) -> None:
        """Send what is queued, until cancelled or, after `finish`, until the queue is empty.

        Raises:
            OSError: the peer does not take replies any more; the connection is cut.
        """
        loop = asyncio.get_running_loop()
        try:
            while True:
                while self._unsent:
                    data, fds = self._unsent[0]
                    sent = await self._send_fds(data, fds) if fds else 0
                    await loop.sock_sendall(self._sock, data[sent:])
                    self._unsent.popleft()
                    self._count_unsent(-len(data), moved=True)
                if self._closing:
                    return
                self._more.clear()
                await self._more.wait()
        except OSError:
            self.abort()  # it may still be asking, but who cannot be answered is no client
            raise

    def _count_unsent(self, nbytes: int, moved: bool) -> None:
        self._unsent_bytes += nbytes
        self._unsent_budget.hold(self, self._unsent_bytes, moved)

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

    def cut(self, breach: ProtocolError) -> None:
        """End `receive` with `breach`. What the peer sends is not looked at any more."""
        self._breach = self._breach or breach
        try:
            self._sock.shutdown(socket.SHUT_RD)
        except OSError:
            pass  # the peer was faster

    def abort(self) -> None:
        """End the connection in both directions; `receive` returns."""
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
        self._unsent_budget.hold(self, 0)
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
