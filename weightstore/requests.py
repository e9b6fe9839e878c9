"""What each request means: the store's answer, at once or after something has happened.

A handler runs on the event loop in one step, or is a coroutine that waits in between: for space, for
other ranks, for followers to learn of an in-place refit, for a tag to move. After whatever may have
changed the catalog it announces that, so that offers go out and others that wait look again.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from weightstore import status, wire
from weightstore.allocator import NoSpace
from weightstore.catalog import Lease, Peer, Refit, RefitState
from weightstore.changes import Changes
from weightstore.checksums import Checksummer
from weightstore.errors import (
    ArenaFull,
    RefitAborted,
    StoreTimeout,
    UsageError,
    VersionInUse,
    WeightstoreError,
)
from weightstore.store import Store
from weightstore.types import check_name, check_name_map

OFFER_PATIENCE: Final = 2.0
"""Seconds a refit short of space waits for sleeping engines to let go of the version before."""
IN_PLACE_PATIENCE: Final = 30.0
"""Seconds an in-place refit waits for its followers to learn that they must not read."""

MAX_LEASES: Final = 1024
MAX_REFITS: Final = 64
"""What one connection may hold at a time."""

T = TypeVar("T")
Handler = Callable[[Peer, Any], "wire.Reply | Coroutine[Any, Any, wire.Reply]"]


def check_fields(request: wire.Request) -> None:
    """Refuse what decodes and cannot be meant, before it is compared with anything or repeated in a message.
    (The catalog looks at what declares a refit and its tensors.)

    Raises:
        InvalidName, UsageError.
    """
    if isinstance(request, _NAMED):
        check_name("model", request.model)
    if isinstance(request, _TAGGED):
        check_name("tag", request.tag)
    if isinstance(request, wire.WaitFor) and request.timeout is not None and math.isnan(request.timeout):
        raise UsageError("timeout is not a number of seconds")
    if isinstance(request, wire.PublishNames) and request.names is not None:
        check_name_map(request.model, request.names)


_TAGGED: Final = (
    wire.OpenRefit,
    wire.OpenLease,
    wire.RenewLease,
    wire.WaitFor,
    wire.SetTag,
    wire.RemoveTag,
    wire.VerifyVersion,
)
_NAMED: Final = (*_TAGGED, wire.RemoveModel, wire.PublishNames, wire.GetNames)


class Requests:
    """The handlers. `close` waits for the thread that grows the arena."""

    def __init__(
        self,
        store: Store,
        changes: Changes,
        checksummer: Checksummer,
        clock: Callable[[], float],
        count_clients: Callable[[], int],
        foretell: Callable[[Refit | Lease], None],
    ) -> None:
        self._store = store
        self._catalog = store.catalog
        self._changes = changes
        self._checksummer = checksummer
        self._clock = clock
        self._started = clock()
        self._count_clients = count_clients
        self._foretell = foretell
        self._growing = asyncio.Lock()
        self._growth_thread = ThreadPoolExecutor(1, "weightstore-grow")
        self._table: dict[type, Handler] = {
            wire.OpenRefit: self._open_refit,
            wire.Reserve: self._reserve,
            wire.DeclareWrites: self._declare_writes,
            wire.CommitRefit: self._commit_refit,
            wire.AbortRefit: self._abort_refit,
            wire.Drained: self._drained,
            wire.OpenLease: self._open_lease,
            wire.RenewLease: self._renew_lease,
            wire.TakeOffer: self._take_offer,
            wire.ParkLease: self._park_lease,
            wire.ReleaseLease: self._release_lease,
            wire.WaitFor: self._wait_for,
            wire.SetTag: self._set_tag,
            wire.RemoveTag: self._remove_tag,
            wire.RemoveModel: self._remove_model,
            wire.PublishNames: self._publish_names,
            wire.GetNames: self._get_names,
            wire.GetStatus: self._get_status,
            wire.VerifyVersion: self._verify_version,
        }

    def answer(self, peer: Peer, request: wire.Request) -> wire.Reply | Coroutine[Any, Any, wire.Reply]:
        """The reply, or a coroutine that waits for it. Raises WeightstoreError, having changed nothing."""
        check_fields(request)
        return self._table[type(request)](peer, request)

    def close(self) -> None:
        self._growth_thread.shutdown()

    # -- refits ------------------------------------------------------------------------------------

    async def _with_space(self, model: str, attempt: Callable[[], T]) -> T:
        """Run an attempt that may raise NoSpace, making space for it. Raises ArenaFull if there is none."""
        try:
            return attempt()
        except NoSpace:
            # Sleeping engines answer an offer within moments, and their last version's space comes back.
            await self._changes.until(lambda: not self._catalog.leases.answering(model), OFFER_PATIENCE)
        async with self._growing:
            while True:
                try:
                    return attempt()
                except NoSpace as need:
                    usage = self._catalog.usage()
                    growth = asyncio.get_running_loop().run_in_executor(
                        self._growth_thread, self._store.commit_space, need, usage
                    )
                    try:
                        # Shielded: the pages exist even if the client that asked for them has gone.
                        added = await asyncio.shield(growth)
                    except asyncio.CancelledError:
                        growth.add_done_callback(self._adopt_growth)
                        raise
                    except ArenaFull as full:
                        raise self._explain(full) from None
                    self._store.grown(added)

    def _adopt_growth(self, growth: Awaitable[int]) -> None:
        assert isinstance(growth, asyncio.Future)
        if not growth.cancelled() and growth.exception() is None:
            self._store.grown(growth.result())

    def _explain(self, full: ArenaFull) -> ArenaFull:
        """Add what holds space that nobody's tag names: often the answer to why the arena is full."""
        held = status.held_back(self._catalog)
        return ArenaFull(f"{full.message}. {held}" if held else full.message, **full.details)

    async def _open_refit(self, peer: Peer, request: wire.OpenRefit) -> wire.Reply:
        if sum(refit.rank_of(peer) is not None for refit in self._catalog.refits.values()) >= MAX_REFITS:
            raise UsageError(f"this connection has {MAX_REFITS} refits open; commit or abort some")
        if request.in_place:  # a trainer that died a moment ago may still have copies landing
            await self._changes.until(lambda: not self._catalog.overwriting(request.model), OFFER_PATIENCE)
        refit = await self._with_space(
            request.model, lambda: self._store.open_refit(request, peer, self._clock())
        )
        self._changes.announce()
        told = await self._changes.until(
            lambda: refit.state is not RefitState.OPEN or not self._catalog.unaware(refit), IN_PLACE_PATIENCE
        )
        if not told:
            slow = ", ".join(str(lease.peer) for lease in self._catalog.unaware(refit))
            self._store.abort_refit(refit.number, peer, f"{slow} did not stop reading")
            self._changes.announce()
            raise VersionInUse(
                f"{slow} did not acknowledge within {IN_PLACE_PATIENCE:g} s that the tag's bytes are about "
                "to be overwritten; is that process stopped?",
                holder=slow,
            )
        self._catalog.begin_writing(refit.number, peer)
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self._foretell, refit)  # when the writer's answer is on its way
        base = refit.base
        return wire.RefitOpened(
            id=request.id,
            refit=refit.number,
            base=base.number if base is not None else 0,
            base_records=wire.encode_records([]) if base is None or request.all_placed else base.encoded,
            targets=list(refit.targets.values()),
            names=refit.names,
        )

    async def _reserve(self, peer: Peer, request: wire.Reserve) -> wire.Reply:
        refit = self._catalog.refit_of(request.refit, peer)
        records = await self._with_space(
            refit.model, lambda: self._store.reserve(request.refit, peer, request.specs)
        )
        return wire.Reserved(id=request.id, records=records)

    def _declare_writes(self, peer: Peer, request: wire.DeclareWrites) -> wire.Reply:
        self._store.declare_writes(request.refit, peer, request.writes)
        return wire.Done(id=request.id)

    async def _commit_refit(self, peer: Peer, request: wire.CommitRefit) -> wire.Reply:
        refit = self._catalog.refit_of(request.refit, peer)
        try:
            self._store.commit(request.refit, peer, request.writes, self._clock())
        finally:
            # Before the answer: once the writer knows of its commit, every reader's socket holds the offer,
            # so that a sleeping engine wakes on the newest version even if this process dies the next moment.
            self._changes.announce()
        await self._changes.until(lambda: refit.state is not RefitState.OPEN, None)
        if refit.state is RefitState.ABORTED:
            raise RefitAborted(f"{refit.describe()} was aborted: {refit.reason}", refit=refit.number)
        return wire.Committed(id=request.id, version=refit.version)

    def _abort_refit(self, peer: Peer, request: wire.AbortRefit) -> wire.Reply:
        self._store.abort_refit(request.refit, peer, request.reason[:500])
        self._changes.announce()
        return wire.Done(id=request.id)

    def _drained(self, peer: Peer, request: wire.Drained) -> wire.Reply:
        self._store.settle(peer.writer)
        self._changes.announce()
        return wire.Done(id=request.id)

    # -- leases ------------------------------------------------------------------------------------

    def _require_few_leases(self, peer: Peer) -> None:
        if self._catalog.leases.count(peer) >= MAX_LEASES:
            raise UsageError(f"this connection holds {MAX_LEASES} leases; release some")

    def _open_lease(self, peer: Peer, request: wire.OpenLease) -> wire.Reply:
        self._require_few_leases(peer)
        lease, version = self._store.open_lease(
            peer, request.model, request.tag, request.version, request.follow, self._clock()
        )
        asyncio.get_running_loop().call_soon(self._foretell, lease)  # once its holder has its number
        return wire.LeaseGranted(
            id=request.id, lease=lease.number, version=version.number, records=version.encoded
        )

    def _renew_lease(self, peer: Peer, request: wire.RenewLease) -> wire.Reply:
        self._require_few_leases(peer)
        lease, version = self._catalog.leases.renew(
            peer,
            request.model,
            request.tag,
            request.version,
            request.follow,
            request.parked,
            request.torn,
            self._clock(),
        )
        # A new connection knows nothing of the offers to the last one: the loop's next turn repeats them,
        # after this answer has told the client the lease's new number.
        asyncio.get_running_loop().call_soon(self._changes.announce)
        asyncio.get_running_loop().call_soon(self._foretell, lease)
        return wire.LeaseGranted(
            id=request.id, lease=lease.number, version=version.number, records=version.encoded
        )

    def _take_offer(self, peer: Peer, request: wire.TakeOffer) -> wire.Reply:
        self._store.take_offer(request.lease, peer, request.version)
        self._changes.announce()
        return wire.Done(id=request.id)

    def _park_lease(self, peer: Peer, request: wire.ParkLease) -> wire.Reply:
        had = self._catalog.leases.get(request.lease, peer).version
        version = self._store.park_lease(request.lease, peer, request.parked)
        self._changes.announce()
        known = request.parked or bool(version.torn) or version.number == had
        return wire.LeaseState(
            id=request.id,
            version=version.number,
            torn=bool(version.torn),
            records=wire.encode_records(None) if known else version.encoded,
        )

    def _release_lease(self, peer: Peer, request: wire.ReleaseLease) -> wire.Reply:
        self._store.release_lease(request.lease, peer)
        self._changes.announce()
        return wire.Done(id=request.id)

    # -- tags --------------------------------------------------------------------------------------

    async def _wait_for(self, peer: Peer, request: wire.WaitFor) -> wire.Reply:
        def newer() -> int | None:
            model = self._catalog.models.find(request.model)
            number = model.tags.get(request.tag, 0) if model is not None else 0
            return number if number > request.after else None

        version = await self._changes.until(newer, request.timeout)
        if version is None:
            raise StoreTimeout(
                f"tag {request.tag!r} of {request.model!r} named nothing newer than version {request.after} "
                f"within {request.timeout:g} s",
                after=request.after,
            )
        return wire.VersionIs(id=request.id, version=version)

    def _set_tag(self, peer: Peer, request: wire.SetTag) -> wire.Reply:
        self._store.set_tag(request.model, request.tag, request.version)
        self._changes.announce()
        return wire.Done(id=request.id)

    def _remove_tag(self, peer: Peer, request: wire.RemoveTag) -> wire.Reply:
        self._store.remove_tag(request.model, request.tag)
        self._changes.announce()
        return wire.Done(id=request.id)

    def _remove_model(self, peer: Peer, request: wire.RemoveModel) -> wire.Reply:
        self._store.remove_model(request.model)
        self._changes.announce()
        return wire.Done(id=request.id)

    # -- names -------------------------------------------------------------------------------------

    def _publish_names(self, peer: Peer, request: wire.PublishNames) -> wire.Reply:
        self._store.publish_names(request.model, request.names)
        return wire.Done(id=request.id)

    def _get_names(self, peer: Peer, request: wire.GetNames) -> wire.Reply:
        model = self._catalog.models.find(request.model)
        return wire.NamesAre(id=request.id, names=model.names if model is not None else None)

    # -- looking -----------------------------------------------------------------------------------

    def _get_status(self, peer: Peer, request: wire.GetStatus) -> wire.Reply:
        return status.build(self._store, request.id, self._started, self._clock(), self._count_clients())

    async def _verify_version(self, peer: Peer, request: wire.VerifyVersion) -> wire.Reply:
        """The version is leased while its bytes are read, so it stays what it is."""
        lease, version = self._store.open_lease(
            peer, request.model, request.tag, request.version, False, self._clock()
        )
        try:
            return await self._checksummer.verify(request.id, version)
        finally:
            with contextlib.suppress(WeightstoreError):  # the connection may be gone, and the lease with it
                self._store.release_lease(lease.number, peer)
                self._changes.announce()
