"""Reading: leases that hold a version and follow a tag.

    held ──offer──► pending ──advance()──► held         an awake reader moves when it says so
    parked ──offer──► parked, newer version             a sleeping one moves at once, on the I/O thread
    parked ──torn offer──► torn ──offer──► parked       and lets an in-place refit overwrite what it held
    any ──► released | lost                             for good

Invariants:
- what a lease says it holds, the store keeps: `version` changes only to what was offered or granted, and
  the store frees the old version only after the answer;
- a parked lease knows the newest version without its owner's help, so it is right even if the store dies
  the next moment;
- tensors taken from a snapshot cannot be called back: whoever advances, parks or releases has finished
  with them;
- state changes happen under the lease's lock, which is never held while waiting for the store.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Final, NamedTuple

import msgspec

from weightstore import wire
from weightstore.connection import Connection, on_io_thread
from weightstore.errors import (
    CircumstanceError,
    LeaseLost,
    ProtocolError,
    StoreGone,
    StoreSilent,
    TagTorn,
    UsageError,
    WeightstoreError,
)
from weightstore.link import Link
from weightstore.mapping import ArenaMapping
from weightstore.records import end_of, read_records
from weightstore.snapshot import Snapshot
from weightstore.types import TensorRecord

_log = logging.getLogger("weightstore")

ATTEMPTS: Final = 5
"""How often a lease is parked or unparked anew whose connections end one after another."""


Places = Mapping[str, Sequence[tuple[int, int]]]
"""By component, (offset, nbytes) of stretches of the arena."""


class Offered(NamedTuple):
    """What the store offered. `records` is None for a torn version."""

    version: int
    torn: bool
    records: dict[str, TensorRecord] | None


def _decoded(raw: msgspec.Raw) -> dict[str, TensorRecord] | None:
    records = read_records(raw)
    return None if records is None else {record.name: record for record in records}


class Lease:
    """A hold on one version of a model; made by `Store.lease`. Thread-safe.

    As a context manager it gives its snapshot and releases itself at the end.

    Attributes:
        model, tag: what was asked for.
        follow: whether the lease moves with its tag.
        on_offer: called with the lease when an offer is pending, on the connection's thread: it may
            call `advance`, and must hand anything else over to another thread.
        on_records: called on that thread with the version and records of every offer, also one that a parked
            lease takes at once, before anybody can see it: to look at them while nobody waits.
        on_places: called on that thread with the lease when the store says where the next version may come to
            lie: in windows where refits of the tag have places. On one connection each is named once, and
            after a reconnection again. See `places`.
    """

    def __init__(
        self,
        link: Link,
        model: str,
        tag: str,
        follow: bool,
        on_offer: Callable[[Lease], None] | None,
        ended: Callable[[Lease], None],
    ) -> None:
        """Holds nothing until `granted`. `ended` is told when it holds nothing any more."""
        self.model = model
        self.tag = tag
        self.follow = follow
        self.on_offer = on_offer
        self.on_records: Callable[[int, Mapping[str, TensorRecord]], None] | None = None
        self.on_places: Callable[[Lease, Places], None] | None = None
        self._places: dict[str, list[tuple[int, int]]] = {}
        self._ended = ended
        self._link = link
        self._lock = threading.Lock()
        self._version = 0
        self._records: Mapping[str, TensorRecord] = {}
        self._mapping: ArenaMapping | None = None
        self._offer: Offered | None = None
        self._parked = False
        self._wanted = False
        """Whether the owner wants it parked: he may have given up waiting for the store's answer."""
        self._torn = False
        self._released = False
        self._lost: WeightstoreError | None = None
        self._held_by: tuple[Connection, int] | None = None

    # -- what is known -----------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The version held; while parked, the newest the store has told of."""
        return self._version

    @property
    def records(self) -> Mapping[str, TensorRecord]:
        """The version's tensors by name. Read it once: it is replaced when the lease moves."""
        return self._records

    @property
    def mapping(self) -> ArenaMapping:
        """The arena the records point into."""
        assert self._mapping is not None
        return self._mapping

    @property
    def pending(self) -> int | None:
        """The version offered and not yet taken."""
        offer = self._offer
        return None if offer is None else offer.version

    @property
    def offer(self) -> Offered | None:
        """What is pending. The store keeps it until it is taken and this lease moves on from it, so that its
        bytes may be read already."""
        return self._offer

    @property
    def places(self) -> Places:
        """All that `on_places` was called with on this connection, or would have been."""
        with self._lock:
            return {component: tuple(stretches) for component, stretches in self._places.items()}

    @property
    def parked(self) -> bool:
        """Also if the store has not answered yet."""
        return self._parked or self._wanted

    @property
    def torn(self) -> bool:
        """Whether an in-place refit has been let loose on the bytes and has not committed."""
        return self._torn

    @property
    def lost(self) -> bool:
        """Whether the store no longer honours the lease. Its mapping stays readable."""
        return self._lost is not None

    @property
    def released(self) -> bool:
        return self._released

    @property
    def snapshot(self) -> Snapshot:
        """The held version, readable until the lease moves or ends.

        Raises:
            LeaseLost: released, or no longer honoured.
            TagTorn: an in-place refit has not committed.
            UsageError: parked.
        """
        with self._lock:
            self._require_readable()
            return Snapshot(self.model, self._version, self._records, self.mapping, self.require_readable)

    def require_readable(self, version: int) -> None:
        """Raise what `snapshot` raises, or LeaseLost if the lease holds another version than `version`."""
        with self._lock:
            self._require_readable()
            if version != self._version:
                raise LeaseLost(
                    f"this snapshot shows version {version} of {self.model!r}, and its lease has moved on to "
                    f"{self._version}; use lease.snapshot",
                    version=version,
                    held=self._version,
                )

    def require_whole(self) -> None:
        """Raise LeaseLost or TagTorn if there is nothing to read, now or, while parked, after `unpark`."""
        with self._lock:
            self._require_whole()

    # -- what its owner does -----------------------------------------------------------------------

    def advance(self, version: int | None = None) -> bool:
        """Take the pending offer: the lease then holds that version, and the store may free the old one,
        so nothing of the old snapshot may be in use any more. False if nothing is pending.

        Args:
            version: take no offer but of this version. (A store that was away may have offered another.)

        Raises:
            LeaseLost: released, or no longer honoured.
        """
        with self._lock:
            self._require_live()
            offer, held_by = self._offer, self._held_by
            if offer is None or version not in (None, offer.version):
                return False
            self._take(offer)
        if held_by is not None:
            self._answer(*held_by, offer.version)
        return True

    def park(self) -> None:
        """Promise to read no bytes until `unpark`. From now on offers are taken at once, and an in-place
        refit may overwrite the version. Works while the store is away (it is told when it returns).

        Raises:
            UsageError: the lease follows no tag.
            LeaseLost: released, or no longer honoured.
            StoreSilent: the store is connected and hangs; the lease is parked once it goes on.
        """
        self._park_or_unpark(parked=True)

    def unpark(self) -> None:
        """Read again, from the newest version; one round trip. With the store away: from the newest it
        told of, which cannot have changed since.

        Raises:
            TagTorn: an in-place refit overwrote the bytes and has not committed; still parked.
            StoreSilent: the store is connected and hangs, and what it promised to others is not known; still
                parked.
            LeaseLost, UsageError: as `park`.
        """
        self._park_or_unpark(parked=False)

    def release(self) -> None:
        """Give the version back. Tensors of its snapshots must not be used any more. Idempotent."""
        with self._lock:
            held_by, self._held_by = self._held_by, None
            ended = self._released or self.lost
            self._released = True
            self._offer = None
        self._ended(self)
        if ended or held_by is None:
            return
        connection, number = held_by
        message = wire.ReleaseLease(id=0, lease=number)
        if on_io_thread():
            connection.post(message, wire.Done)
            return
        try:
            connection.request(message, wire.Done, timeout=self._link.patience)
        except StoreSilent:
            pass  # it hangs, and will find the message when it goes on
        except StoreGone:
            pass  # the hold ended with the connection
        except LeaseLost:
            pass  # the store had ended it already

    def __enter__(self) -> Snapshot:
        return self.snapshot

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        state = "released" if self._released else "lost" if self.lost else "torn" if self._torn else "held"
        parked = ", parked" if self._parked else ""
        return f"<Lease on {self.model!r} tag {self.tag!r} version {self._version}, {state}{parked}>"

    # -- parking -----------------------------------------------------------------------------------

    def _park_or_unpark(self, parked: bool) -> None:
        if not self.follow:
            raise UsageError(
                f"a lease on a fixed version cannot be parked; lease {self.tag!r} with follow=True"
            )
        with self._lock:
            self._require_live()
            self._wanted = parked
        try:
            self._have_parked(parked)
        except BaseException:
            if not parked:
                self._stay_parked()
            raise

    def _have_parked(self, parked: bool) -> None:
        """Have the store's answer, or the decision taken here while there is no store."""
        attempts = 0
        while True:
            attempts += 1
            reached = False
            try:
                connection = self._link.connect()
                reached = True
                with self._lock:
                    self._require_live()
                    held_by = self._held_by
                if held_by is None or held_by[0] is not connection:
                    raise StoreGone("the connection changed hands meanwhile")
                connection.request(
                    wire.ParkLease(id=0, lease=held_by[1], parked=parked),
                    wire.LeaseState,
                    timeout=self._link.patience,
                    on_reply=partial(self._parking_answered, connection, parked),
                )
            except StoreSilent:
                raise
            except (CircumstanceError, ProtocolError):
                if reached:  # a connection that ended says nothing of the store: it may live, and be asked
                    if attempts == ATTEMPTS:
                        raise
                    continue
                # Decided while no connection can be made, so that a renewal tells the store what holds.
                if not self._link.while_down(lambda: self._park_alone(parked)):
                    continue
            except LeaseLost as error:
                self.lose(error)
                raise
            with self._lock:
                if parked:
                    return
                self._require_whole()
                if not self._parked or self._wanted:
                    return
            # It was torn when the store answered, so the lease is parked still, and whole by now: once more.

    def _stay_parked(self) -> None:
        """Unparking failed, or nobody waits for it any more."""
        with self._lock:
            self._wanted = True
            if not self._parked:
                self._park_again()

    def _park_again(self) -> None:
        """The lock is held, so that whoever unparks it next sends that after this."""
        self._parked = True
        self._take_parked()
        if self._held_by is not None:
            connection, number = self._held_by
            connection.post(
                wire.ParkLease(id=0, lease=number, parked=True), wire.LeaseState, on_failed=self.lose
            )

    def _take_parked(self) -> None:
        """A parked lease takes its offer at once. The lock is held, as for `_park_again`."""
        offer = self._offer
        if offer is None:
            return
        self._take(offer)
        if self._held_by is not None:
            connection, number = self._held_by
            message = wire.TakeOffer(id=0, lease=number, version=offer.version)
            connection.post(message, wire.Done, on_failed=self.lose)

    def _park_alone(self, parked: bool) -> None:
        with self._lock:
            self._require_live()
            if self._offer is not None:
                self._take(self._offer)
            self._parked = parked or self._torn

    def _parking_answered(self, connection: Connection, parked: bool, state: wire.LeaseState) -> None:
        """On the I/O thread, between the offers from before and after."""
        with self._lock:
            if self._held_by is None or self._held_by[0] is not connection:
                return
            if parked:
                self._parked = True
                if self._wanted:  # else an unparking is on its way, which makes the offer void
                    self._take_parked()
                return
            self._offer = None
            self._move(state.version, state.torn, _decoded(state.records))
            self._parked = state.torn
            if self._wanted or state.torn:
                # Nobody waits for it any more, or it failed: the store is to go on as with any sleeper.
                self._park_again()

    # -- moving ------------------------------------------------------------------------------------

    def _take(self, offer: Offered) -> None:
        self._offer = None
        self._move(offer.version, offer.torn, offer.records)

    def _move(self, version: int, torn: bool, records: dict[str, TensorRecord] | None) -> None:
        """Hold `version` from here on. The lock is held."""
        if records is not None:
            mapping = self._mapping
            end = end_of(records.values())
            if mapping is None or end > mapping.nbytes:
                mapping = self._link.mapping
                if end > mapping.nbytes:
                    raise ProtocolError(
                        f"version {version} of {self.model!r} reaches byte {end} of {mapping.nbytes}"
                    )
            self._mapping = mapping
            self._records = MappingProxyType(records)
        elif torn:
            self._torn = True  # whatever it is called, it cannot be read
            return
        elif version != self._version:
            raise ProtocolError(f"the store moved a lease to version {version} without its records")
        self._version = version
        self._torn = torn

    def _answer(self, connection: Connection, number: int, version: int) -> None:
        message = wire.TakeOffer(id=0, lease=number, version=version)
        if on_io_thread():
            connection.post(message, wire.Done, on_failed=self.lose)
            return
        try:
            connection.request(message, wire.Done, timeout=self._link.patience)
        except StoreSilent as error:
            _log.warning("going on without the store: %s", error)  # it has the message
        except StoreGone:
            pass  # a renewal will name the version held now
        except LeaseLost as error:
            self.lose(error)
            raise

    # -- what the store says, on the I/O thread ----------------------------------------------------

    def offered(self, connection: Connection, said: wire.Offer) -> None:
        # Decoded now, while nobody waits: whoever takes the offer is in a hurry.
        offer = Offered(said.version, said.torn, _decoded(said.records))
        if self.on_records is not None and offer.records is not None:
            try:
                self.on_records(offer.version, offer.records)
            except Exception:
                _log.exception("on_records of %r failed", self)
        with self._lock:
            if self._held_by != (connection, said.lease):
                return
            at_once = self._parked or self._torn or offer.torn
            if at_once:
                self._take(offer)
            else:
                self._offer = offer
        if at_once:
            connection.post(
                wire.TakeOffer(id=0, lease=said.lease, version=offer.version), wire.Done, on_failed=self.lose
            )
        elif self.on_offer is not None:
            try:
                self.on_offer(self)
            except Exception:
                _log.exception("on_offer of %r failed", self)

    def foretold(self, connection: Connection, said: wire.Places) -> None:
        with self._lock:
            if self._held_by != (connection, said.lease):
                return
            for component, stretches in said.places.items():
                self._places.setdefault(component, []).extend(stretches)
        if self.on_places is not None:
            try:
                self.on_places(self, said.places)
            except Exception:
                _log.exception("on_places of %r failed", self)

    def granted(self, connection: Connection, grant: wire.LeaseGranted) -> bool:
        """A lease or its renewal was granted. False if it was released meanwhile."""
        with self._lock:
            if self._released:
                return False
            if grant.version != self._version:
                # As torn as the renewal claimed: if that is wrong, the store's next offer says so.
                self._move(grant.version, self._torn, _decoded(grant.records))
            self._held_by = (connection, grant.lease)
            self._places = {}  # another lease to the store, which begins anew
            return True

    def renewal(self) -> wire.RenewLease | None:
        """What to ask a returned store for. From here until it answers no offer is pending."""
        with self._lock:
            if self._released or self.lost:
                return None
            self._offer = None
            self._held_by = None
            self._parked = self.parked  # what was asked of a store that did not answer holds from here
            return wire.RenewLease(
                id=0,
                model=self.model,
                tag=self.tag,
                version=self._version,
                follow=self.follow,
                parked=self._parked,
                torn=self._torn,
            )

    def lose(self, error: WeightstoreError) -> None:
        with self._lock:
            self._held_by = self._offer = None
            if self._lost is None and not self._released:
                self._lost = error
        self._ended(self)

    # -- checks, under the lock --------------------------------------------------------------------

    def _require_live(self) -> None:
        what = f"the lease on version {self._version} of {self.model!r}"
        if self._released:
            raise LeaseLost(f"{what} was released; open a new one", version=self._version)
        if self._lost is not None:
            raise LeaseLost(f"{what} is lost: {self._lost.message}", version=self._version)

    def _require_whole(self) -> None:
        self._require_live()
        if self._torn:
            raise self._torn_error()

    def _require_readable(self) -> None:
        self._require_whole()
        if self.parked:
            raise UsageError(
                f"the lease on {self.model!r} tag {self.tag!r} is parked, its bytes may change; call unpark()"
            )

    def _torn_error(self) -> TagTorn:
        return TagTorn(
            f"tag {self.tag!r} of {self.model!r} is torn: an in-place refit overwrote version "
            f"{self._version} and has not committed. Wait for its commit if it is running; otherwise write "
            "the same components whole with a new refit of the tag (in_place=True needs no more room), or "
            f"load the model again (`weightstore load {self.model} …`)",
            model=self.model,
            tag=self.tag,
            version=self._version,
        )
