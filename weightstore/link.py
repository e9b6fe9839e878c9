"""The way to one store: a connection that is made again when it breaks, and the arena behind it.

    down ──connect──► greeting ──► live ──lost──► down

Invariants:
- at most one connection is live; it becomes live only after `greet` has renewed what the last one held,
  so whoever gets a connection finds its leases on it;
- connecting, greeting and `while_down` exclude each other;
- a background thread tries again, ever more slowly, only while `wanted()` says that somebody holds
  something; otherwise the next request does.
"""

from __future__ import annotations

import os
import random
import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from weightstore import wire
from weightstore.connection import Connection, on_io_thread
from weightstore.errors import StoreGone, UsageError, WeightstoreError
from weightstore.mapping import ArenaMapping

PATIENCE: Final = 30.0
FIRST_RETRY: Final = 0.05
LAST_RETRY: Final = 1.0
"""Seconds between attempts to reconnect: doubled from the first to the last, less up to half at random,
so that many engines do not return in step."""


class Link:
    """A client object's link to the store at `path`. Thread-safe.

    Args:
        path: the store's socket.
        timeout: seconds a store has to accept and to answer the greeting.
        on_unasked: as in `Connection`.
        greet: called with a new connection, and whether the arena is the one known before, before the
            connection is used for anything else; may raise, and then there is no connection. Others wait for
            it: it gives each answer `timeout` seconds.
        wanted: whether to reconnect without being asked.

    Attributes:
        timeout: as given.
        patience: seconds that a store which is connected has for what it answers at once. Many, since one
            that is only slow must not fail a wake.
    """

    def __init__(
        self,
        path: str,
        timeout: float,
        on_unasked: Callable[[Connection, wire.Unasked], None],
        greet: Callable[[Connection, bool], None],
        wanted: Callable[[], bool],
    ) -> None:
        self.path = path
        self.instance = secrets.token_hex(8)
        self.timeout = timeout
        self.patience = PATIENCE
        self._on_unasked = on_unasked
        self._greet = greet
        self._wanted = wanted
        self._connecting = threading.Lock()
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._welcome: wire.Welcome | None = None
        self._reader: ArenaMapping | None = None
        self._writer: ArenaMapping | None = None
        self._separate: set[Connection] = set()
        self._closed = threading.Event()
        self._pid = os.getpid()
        self._reviver: threading.Thread | None = None

    @property
    def connection(self) -> Connection | None:
        """The live connection, if there is one."""
        connection = self._connection
        return None if connection is None or connection.lost else connection

    @property
    def forked(self) -> bool:
        """Whether this is a fork of the process that opened the link, which closed its sockets."""
        return os.getpid() != self._pid

    @property
    def mapping(self) -> ArenaMapping:
        """The arena of the last store that answered, mapped read-only."""
        if self._reader is None:
            raise UsageError("this store was closed; connect again")
        return self._reader

    def connect(self) -> Connection:
        """The live connection; if there is none, one attempt to make it.

        Raises:
            StoreGone: nobody is there.
            StoreSilent: somebody is there and does not answer.
            AccessDenied, ProtocolError, ArenaUnusable: who answers is no store for us.
            UsageError: closed, in a fork of the process that opened it, or on a connection's thread.
        """
        self._require_usable()
        if connection := self.connection:
            return connection
        with self._connecting:
            if connection := self.connection:
                return connection
            self._require_usable()
            return self._connect()

    def while_down(self, action: Callable[[], None]) -> bool:
        """Run `action` while no connection is live or being made; False, without running it, if one is."""
        self._require_usable()
        with self._connecting:
            if self.connection is not None:
                return False
            action()
            return True

    def open_writer(self, fd: int) -> ArenaMapping:
        """The arena mapped for writing, from a descriptor that this call takes over."""
        try:
            welcome = self._welcome
            if welcome is None:
                raise UsageError("this store was closed; connect again")
            known = self._writer
            if known is None or (known.uuid, known.nbytes) != (welcome.arena, welcome.nbytes):
                old, known = known, ArenaMapping(fd, welcome.nbytes, True, welcome.arena)
                self._writer = known
                if old is not None:
                    old.close()  # refits into it ended with their connection; what it pinned is let go
            return known
        finally:
            os.close(fd)

    @contextmanager
    def separate(self) -> Iterator[Connection]:
        """A connection of its own, for a request that may block long."""
        self._require_usable()
        connection, _, fd = self._hello(lambda *_: None, lambda *_: None, "")
        os.close(fd)
        self._separate.add(connection)
        try:
            self._require_usable()  # closed meanwhile: `close` may have missed this one
            yield connection
        finally:
            self._separate.discard(connection)
            connection.close()

    def close(self) -> None:
        """Hang up, join the threads, let go of the arena. Idempotent; does nothing in a forked child."""
        if self.forked:
            return
        self._closed.set()
        for separate in list(self._separate):
            separate.close()
        with self._lock:
            reviver = self._reviver
        if reviver is not None and reviver is not threading.current_thread():
            reviver.join()
        with self._connecting:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        for mapping in (self._reader, self._writer):
            if mapping is not None:
                mapping.close()
        self._reader = self._writer = self._welcome = None

    # -- connecting --------------------------------------------------------------------------------

    def _require_usable(self) -> None:
        if self.forked:
            raise UsageError(
                f"this store was opened by process {self._pid}, and this is a fork of it; call "
                "weightstore.connect() in the child"
            )
        if self._closed.is_set():
            raise UsageError("this store was closed; connect again with weightstore.connect()")
        if on_io_thread():  # whoever is connecting waits for this very thread
            raise UsageError(
                "an offer callback may call advance(); it must hand other requests to another thread"
            )

    def _connect(self) -> Connection:
        connection, welcome, fd = self._hello(self._on_unasked, self._lost, self.instance)
        try:
            known = self._reader
            same = known is None or known.uuid == welcome.arena
            try:
                if known is None or (known.uuid, known.nbytes) != (welcome.arena, welcome.nbytes):
                    self._reader = ArenaMapping(fd, welcome.nbytes, False, welcome.arena)
            finally:
                os.close(fd)
            self._welcome = welcome
            self._greet(connection, same)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        if connection.lost:  # so early that `_lost` did not recognise it
            self._lost(connection, StoreGone("lost at once"))
        return connection

    def _hello(
        self,
        on_unasked: Callable[[Connection, wire.Unasked], None],
        on_lost: Callable[[Connection, WeightstoreError], None],
        instance: str,
    ) -> tuple[Connection, wire.Welcome, int]:
        connection = Connection.open(self.path, self.timeout, on_unasked, on_lost)
        hello = wire.Hello(id=0, protocol=wire.PROTOCOL, client=client_name(), instance=instance)
        try:
            welcome, fd = connection.request_fd(hello, wire.Welcome, timeout=self.timeout)
        except BaseException:
            connection.close()
            raise
        return connection, welcome, fd

    # -- coming back -------------------------------------------------------------------------------

    def _lost(self, connection: Connection, reason: WeightstoreError) -> None:
        with self._lock:
            if connection is not self._connection or self._closed.is_set() or self._reviver is not None:
                return
            if self._wanted():
                self._reviver = threading.Thread(
                    target=self._revive, name="weightstore-reconnect", daemon=True
                )
                self._reviver.start()

    def _revive(self) -> None:
        pause = FIRST_RETRY
        while not self._closed.wait(pause * random.uniform(0.5, 1.0)):
            try:
                self.connect()
            except (WeightstoreError, OSError):
                pause = min(2 * pause, LAST_RETRY)
            with self._lock:
                if self.connection is not None or not self._wanted():
                    self._reviver = None
                    return


def client_name() -> str:
    """How `status` shows this process: its program."""
    program = os.path.basename(sys.argv[0]) if sys.argv and sys.argv[0] not in ("", "-", "-c") else ""
    return program or os.path.basename(sys.executable) or "python"
