"""The open refits of one client, and its promise to the store after a connection broke among them.

When a connection ends, the store keeps the space of its open refits in quarantine, because copies may
still be landing there. The promise `Drained` gives it back.

Invariant: it is sent only when every refit of a lost connection has no copy under way, and its owner, if
he was given memory to write to, has learned that it is over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from weightstore import wire
from weightstore.casts import Cast
from weightstore.connection import Connection
from weightstore.errors import DeviceError, StoreGone, StoreSilent
from weightstore.link import Link
from weightstore.trainer import Refit

if TYPE_CHECKING:
    from weightstore.names import NameMap
    from weightstore.reader import Lease

_log = logging.getLogger("weightstore")


class Refits:
    """The open refits of one client, which owes the store a promise when a connection breaks among them."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._open: set[Refit] = set()
        self._owed = False
        self._greeted = False

    def open(
        self, request: wire.OpenRefit, names: NameMap | None, cast: Cast, lease: Callable[[str], Lease]
    ) -> Refit:
        """Begin or join a refit; see `Store.refit`."""
        started = time.perf_counter()
        connection = self._link.connect()
        opened, fd = connection.request_fd(
            request,
            wire.RefitOpened,
            undo=lambda late: connection.post(wire.AbortRefit(id=0, refit=late.refit), wire.Done),
        )
        try:
            mapping = self._link.open_writer(fd)
            if names is not None:
                opened = msgspec.structs.replace(opened, names=None)  # the caller's own goes before it
            elif opened.names is not None:
                from weightstore.names.published import decode_published

                # Its publisher could not know which tensors each refit would put.
                names = decode_published(request.model, opened.names).relaxed()
            refit = Refit(connection, request, opened, mapping, started, self._forget, names, cast, lease)
        except BaseException:  # nobody will ever hold it: it must not keep the tag from others
            connection.post(wire.AbortRefit(id=0, refit=opened.refit), wire.Done)
            raise
        with self._lock:
            self._open.add(refit)
        return refit

    def settle(self, connection: Connection) -> None:
        """On a new connection: wait for the copies begun on lost ones, then promise that none is landing.

        While a view of a lost refit may be in use the promise is put off until that refit is given up.

        Raises:
            StoreGone: it went again.
            StoreSilent: it does not answer.
        """
        with self._lock:
            gone = [refit for refit in self._open if refit.lost]
            # Owed to a store that comes back even if no refit is known here: the answer to one's opening
            # may have been lost with the connection.
            self._owed, self._greeted = self._greeted, True
        landed = []
        for refit in gone:
            try:
                refit.drain()
                landed.append(refit)
            except DeviceError as error:
                # Nobody can say where its copies stand, so its space stays in quarantine until we exit.
                _log.error("copies into a lost refit failed: %s", error)
        with self._lock:
            self._open.difference_update(refit for refit in landed if not refit.viewed)
        self._promise(connection, self._link.timeout)

    def _forget(self, refit: Refit) -> None:
        """`refit` has ended and its owner knows."""
        with self._lock:
            self._open.discard(refit)
        connection = self._link.connection
        if connection is not None:
            try:
                self._promise(connection, self._link.patience)
            except (StoreGone, StoreSilent):
                pass  # still owed: the next connection's greeting sees to it

    def _promise(self, connection: Connection, timeout: float) -> None:
        with self._lock:
            if not self._owed or any(refit.lost for refit in self._open):
                return
            self._owed = False
        try:
            connection.request(wire.Drained(id=0), wire.Done, timeout=timeout)
        except BaseException:
            self._owed = True
            raise
