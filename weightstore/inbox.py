"""Bytes and descriptors from the store, put together to messages. No I/O.

A peer's stream is untrusted: lengths, message types and descriptor counts are checked here, so that what
comes out is a typed message with exactly the descriptors it announced.

Invariants:
- memory follows what has arrived, never what a frame merely announces;
- a descriptor arrives no later than the first byte of its frame (SCM_RIGHTS on a stream), so frames take
  theirs from a queue in order;
- every descriptor is given out once or closed.
"""

from __future__ import annotations

import array
import socket
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

from weightstore import wire
from weightstore.calls import close_all
from weightstore.errors import ProtocolError

MAX_FDS: Final = 16
"""Descriptors that may wait for their frames."""


class Inbox:
    """`peer` is how messages name the sender, `cap` the largest frame in bytes."""

    def __init__(self, peer: str, cap: int) -> None:
        self._peer = peer
        self._cap = cap
        self._bytes = bytearray()
        self._fds: deque[int] = deque()

    def take_fds(self, ancillary: list[tuple[int, int, bytes]], truncated: bool) -> None:
        """What `recvmsg` brought besides data. Raises ProtocolError if it is too much."""
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
                self._fds.extend(fds)
        if truncated or len(self._fds) > MAX_FDS:
            raise ProtocolError(f"{self._peer} sent more than {MAX_FDS} descriptors")

    def take(self, data: bytes) -> Iterator[tuple[Any, list[int]]]:
        """Messages completed by `data`, each with its descriptors, which are then the caller's.

        Raises:
            ProtocolError: the stream cannot be understood from here on.
        """
        self._bytes += data
        while (body := self._next_body()) is not None:
            message = wire.decode_reply(body)
            count = message.fds if isinstance(message, wire.Welcome | wire.RefitOpened) else 0
            if not 0 <= count <= len(self._fds):
                raise ProtocolError(f"{self._peer} announced {count} descriptors and sent {len(self._fds)}")
            yield message, [self._fds.popleft() for _ in range(count)]

    def _next_body(self) -> bytes | None:
        if len(self._bytes) < wire.LENGTH_BYTES:
            return None
        end = wire.LENGTH_BYTES + wire.frame_length(self._bytes[: wire.LENGTH_BYTES], self._cap)
        if len(self._bytes) < end:
            return None
        body = bytes(memoryview(self._bytes)[wire.LENGTH_BYTES : end])
        del self._bytes[:end]
        return body

    def close(self) -> None:
        """Close descriptors nobody claimed. Idempotent."""
        close_all(self._fds)
