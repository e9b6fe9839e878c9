"""Who is on the other end: peers (connections) and writers (processes that may touch the arena).

A connection may end while its process lives on, with copies still landing in the arena. So space
is owed to the *writer*, which outlives its connections, and leases to the *peer*, which does not.
"""

from __future__ import annotations

import msgspec


class Writer(msgspec.Struct, frozen=True, array_like=True):
    """A client object in one process. `started` is the process's start time in clock ticks since
    boot, which tells it from a later process with the same pid; `instance` is the client's name."""

    pid: int
    started: int
    instance: str


class Peer(msgspec.Struct, frozen=True):
    """One connection. `number` is unique in a store's lifetime; `client` is its own description."""

    number: int
    writer: Writer
    client: str = ""

    def __str__(self) -> str:
        return f"{self.client or 'client'} (pid {self.writer.pid})"
