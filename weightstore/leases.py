"""The live leases of one client: which one the store speaks of, and renewing them when it came back.

Invariant: a lease can be found from the moment the store grants it, before anything the store sends
afterwards is looked at, until it is released or lost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from weightstore import wire
from weightstore.connection import Connection
from weightstore.errors import UsageError, WeightstoreError
from weightstore.link import Link
from weightstore.reader import Lease


class Leases:
    """The live leases of one client: finds the one the store speaks of, renews all with a returned store."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: set[Lease] = set()
        self._held: dict[tuple[Connection, int], Lease] = {}

    @property
    def any(self) -> bool:
        return bool(self._live)

    def open(
        self,
        link: Link,
        model: str,
        tag: str,
        version: int | None,
        follow: bool,
        on_offer: Callable[[Lease], None] | None,
    ) -> Lease:
        connection = link.connect()
        lease = Lease(link, model, tag, follow, on_offer, self._forget)
        connection.request(
            wire.OpenLease(id=0, model=model, tag=tag, version=version, follow=follow),
            wire.LeaseGranted,
            timeout=link.patience,
            on_reply=partial(self._granted, lease, connection),
            undo=lambda _: lease.release(),
        )
        return lease

    def renew(self, connection: Connection, timeout: float) -> None:
        """Ask a store that came back to honour every lease; those it refuses are lost.

        Raises:
            StoreGone: it went again.
            StoreSilent: it did not answer within `timeout` seconds.
        """
        for lease in list(self._live):
            request = lease.renewal()
            if request is None:
                continue
            try:
                connection.request(
                    request,
                    wire.LeaseGranted,
                    timeout=timeout,
                    on_reply=partial(self._granted, lease, connection),
                )
            except UsageError as error:
                lease.lose(error)

    def lose_all(self, error: WeightstoreError) -> None:
        for lease in list(self._live):
            lease.lose(error)

    def said(self, connection: Connection, message: wire.Unasked) -> None:
        lease = self._held.get((connection, message.lease))
        if lease is None:  # it was released while the message was on its way
            return
        if isinstance(message, wire.Offer):
            lease.offered(connection, message)
        else:
            lease.foretold(connection, message)

    def _forget(self, lease: Lease) -> None:
        with self._lock:
            self._live.discard(lease)
            self._held = {key: held for key, held in self._held.items() if held is not lease}

    def _granted(self, lease: Lease, connection: Connection, grant: wire.LeaseGranted) -> None:
        """On the I/O thread, before any offer for the lease can be looked at."""
        if lease.granted(connection, grant):
            with self._lock:
                self._held = {key: held for key, held in self._held.items() if not key[0].lost}
                self._held[connection, grant.lease] = lease
                self._live.add(lease)
        else:
            connection.post(wire.ReleaseLease(id=0, lease=grant.lease), wire.Done)
