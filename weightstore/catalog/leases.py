"""Leases: a reader's hold on a version, and how a following one moves on.

A lease holds `version` and, while an offer is out, `offered` as well: between the offer's sending
and the holder's answer either may be the one it reads, so both stay alive. One offer is out at a
time; what the tag did meanwhile is offered next. A *parked* holder (a sleeping engine) reads no
bytes: it answers every offer at once and lets an in-place refit overwrite what it holds, having
been told first (a torn offer).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from weightstore.catalog.versions import Models, Version
from weightstore.catalog.writers import Peer
from weightstore.errors import LeaseLost, UsageError


@dataclass(eq=False)
class Lease:
    """`torn` means the holder has been told, and has acknowledged, that its bytes are not a version."""

    number: int
    peer: Peer
    model: str
    tag: str
    version: int
    follow: bool
    since: float
    parked: bool = False
    torn: bool = False
    offered: int = 0
    offered_torn: bool = False

    @property
    def offer_out(self) -> bool:
        return self.offered != 0

    def holds(self) -> set[int]:
        """Versions this lease keeps alive."""
        return {self.version, self.offered} - {0}

    def wants(self, version: int, torn: bool) -> bool:
        """Whether the holder should be offered `version` in that condition now."""
        return self.follow and not self.offer_out and (version, torn) != (self.version, self.torn)

    def offer(self, version: int, torn: bool) -> None:
        self.offered, self.offered_torn = version, torn

    def take(self, version: int) -> bool:
        """The holder answered the offer of `version`. False if that is not what is out (an answer to
        an offer from before a reconnection): nothing changes."""
        if version == 0 or version != self.offered:
            return False
        self.version, self.torn = self.offered, self.offered_torn
        self.offered, self.offered_torn = 0, False
        return True


class Leases:
    """All leases of a store by number. Freeing what a change leaves behind is the catalog's part."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._leases: dict[int, Lease] = {}
        self._of: dict[Peer, set[int]] = {}
        self._last_number = 0

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._leases.values())

    def __len__(self) -> int:
        return len(self._leases)

    def count(self, peer: Peer) -> int:
        """How many leases `peer` holds."""
        return len(self._of.get(peer, ()))

    def on(self, model: str, version: int) -> list[Lease]:
        return [lease for lease in self if lease.model == model and version in lease.holds()]

    def held(self) -> set[tuple[str, int]]:
        return {(lease.model, version) for lease in self for version in lease.holds()}

    def get(self, number: int, peer: Peer) -> Lease:
        lease = self._leases.get(number)
        if lease is None or lease.peer != peer:
            raise LeaseLost(f"lease {number} is not held on this connection; open a new one", lease=number)
        return lease

    def grant(self, peer: Peer, tag: str, version: Version, follow: bool, now: float) -> Lease:
        self._last_number += 1
        lease = Lease(self._last_number, peer, version.model, tag, version.number, follow, now)
        self._leases[lease.number] = lease
        self._of.setdefault(peer, set()).add(lease.number)
        return lease

    def renew(
        self,
        peer: Peer,
        model: str,
        tag: str,
        version: int,
        follow: bool,
        parked: bool,
        torn: bool,
        now: float,
    ) -> tuple[Lease, Version]:
        """Hold again what an earlier connection held. Raises LeaseLost if that version is gone, or
        is being overwritten and the holder takes it for readable.

        A parked follower reads no bytes, so it gets what its tag names now. `torn` is what the holder
        believes; if that is wrong, the next offer says so.
        """
        found = self._models.find(model)
        held = found.versions.get(version) if found is not None else None
        if held is None and parked and found is not None and tag in found.tags:
            held = found.tagged(tag)
        if held is None or (held.torn and not (parked or torn)):
            # Who comes back late may be reading what an in-place refit has begun to overwrite since.
            why = "is no longer in the store" if held is None else "was overwritten by an in-place refit"
            raise LeaseLost(
                f"version {version} of {model!r} {why}; open a new lease", model=model, version=version
            )
        lease = self.grant(peer, tag, held, follow, now)
        lease.parked, lease.torn = parked, torn
        return lease, held

    def take(self, number: int, peer: Peer, version: int) -> None:
        """The holder answered an offer. Raises LeaseLost."""
        self.get(number, peer).take(version)

    def park(self, number: int, peer: Peer, parked: bool) -> Version:
        """Park or unpark; the version the holder is to use (see `Version.torn`).

        Unparking moves the lease to the newest version at once; an offer still out is void.

        Raises:
            LeaseLost, UsageError.
        """
        lease = self.get(number, peer)
        if not lease.follow:
            raise UsageError("only a lease that follows a tag can be parked")
        version = self._newest(lease)
        if version is None:
            raise LeaseLost(f"what lease {number} held was removed; open a new one", lease=number)
        lease.parked = parked
        if not parked:
            lease.version, lease.torn = version.number, bool(version.torn)
            lease.offered, lease.offered_torn = 0, False
        return version

    def release(self, number: int, peer: Peer) -> None:
        """Raises LeaseLost."""
        self.get(number, peer)
        del self._leases[number]
        self._of[peer].discard(number)

    def drop_peer(self, peer: Peer) -> None:
        for number in self._of.pop(peer, ()):
            del self._leases[number]

    def make_offers(self) -> list[tuple[Lease, Version]]:
        """Offers that are due now, with the version offered; each is out from here on."""
        due = []
        for lease in self:
            version = self._newest(lease)
            if version is not None and lease.wants(version.number, bool(version.torn)):
                lease.offer(version.number, bool(version.torn))
                due.append((lease, version))
        return due

    def answering(self, model: str) -> bool:
        """Whether a parked follower of `model` owes an answer: space may come back any moment."""
        return any(lease.model == model and lease.parked and lease.offer_out for lease in self)

    def _newest(self, lease: Lease) -> Version | None:
        """What the followed tag names; without the tag, what the lease was offered or holds."""
        model = self._models.find(lease.model)
        if model is None:
            return None
        for number in (model.tags.get(lease.tag, 0), lease.offered, lease.version):
            if number in model.versions:
                return model.versions[number]
        return None
