"""The catalog as a whole: operations that touch more than one of its tables.

Every method either does all it says or raises and changes nothing. Methods that end something call
`collect`, so space is back when they return. See the package docstring for the theory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightstore.catalog.coverage import check_coverage
from weightstore.catalog.inplace import require_sole_use, require_torn_covered, torn_error
from weightstore.catalog.leases import Lease, Leases
from weightstore.catalog.placing import place
from weightstore.catalog.refits import (
    Refit,
    RefitState,
    check_declaration,
    check_request,
    same_transaction,
)
from weightstore.catalog.space import Space, Usage
from weightstore.catalog.versions import Models, Version, VersionState
from weightstore.catalog.writers import Peer, Writer
from weightstore.errors import (
    RefitAborted,
    RefitClosed,
    RefitConflict,
    UnknownModel,
    UnknownTag,
    UsageError,
    VersionInUse,
)
from weightstore.types import TensorRecord, TensorSpec, check_name, check_spec
from weightstore.wire import OpenRefit, Write, encode_records


class Catalog:
    """All state of one store, without its bytes.

    `space_start` is the arena offset of the data area. `freed` collects versions freed since it was
    last emptied by the store. While `grace_until` lies in the future no version is freed.
    """

    def __init__(self, space_start: int, committed: int = 0, grace_until: float = 0.0) -> None:
        self.space = Space(space_start, committed)
        self.models = Models()
        self.refits: dict[int, Refit] = {}
        self.leases = Leases(self.models)
        self.freed: list[Version] = []
        self.grace_until = grace_until
        self._last_number = 0

    # -- reading -----------------------------------------------------------------------------------

    def usage(self) -> Usage:
        return self.space.usage()

    def resolve(self, model: str, tag: str, version: int | None) -> Version:
        """The version a reader means. Raises UnknownModel, UnknownTag, UnknownVersion or TagTorn."""
        found = self.models.get(model)
        chosen = found.version(version) if version is not None else found.tagged(tag)
        if chosen.torn:
            raise torn_error(model, tag, chosen)
        return chosen

    def open_refits(self) -> Iterator[Refit]:
        return (refit for refit in self.refits.values() if refit.state is RefitState.OPEN)

    # -- refits ------------------------------------------------------------------------------------

    def _refuse_parts_of_nothing(self, name: str) -> UsageError:
        """Far likelier a mistyped name than a model's beginning."""
        how = "a new model is begun with all of its components (without components=), or with fresh=True"
        try:
            self.models.get(name)
        except UnknownModel as error:
            return UnknownModel(f"{error.message}; {how}", **error.details)
        return UnknownTag(f"no tag of model {name!r} is left to take the other components from; {how}")

    def open_refit(self, request: OpenRefit, peer: Peer, now: float) -> Refit:
        """Begin a refit, or join the one with the same key.

        Raises:
            InvalidName, UsageError, UnknownVersion, UnknownTag, CoverageError: a bad declaration.
            RefitConflict: another refit of this model and tag is open.
            VersionInUse: in place, and somebody else reads or names those bytes.
            TagTorn: a new version would inherit torn bytes.
            NoSpace: grow the space by its shortfall and call again.
        """
        check_request(request)
        for other in self.open_refits():
            if (other.model, other.tag) == (request.model, request.tag):
                return self._join(other, request, peer)
        model = self.models.find(request.model)
        base = None if request.fresh or model is None else model.base_for(request.tag, request.base)
        if base is None and not request.fresh:
            if request.base is not None:
                self.models.get(request.model)
            elif request.components:
                raise self._refuse_parts_of_nothing(request.model)
        check_declaration(request, model, base)
        refit = Refit(self._number(), request.model, request.tag, base, request, now)
        refit.names = model.names if model is not None else None
        if base is not None and base.torn:
            require_torn_covered(refit, base)
        if request.in_place and base is not None:
            self._tear(refit, base)
        elif base is not None:
            place(self.space, refit, [base.records[n] for n in refit.declared_names()], [])
        refit.joined[request.rank] = peer
        self.refits[refit.number] = refit
        return refit

    def _tear(self, refit: Refit, base: Version) -> None:
        """From here on `base` may not be read: its components in scope are torn until a commit."""
        if self.grace_until:
            raise VersionInUse(
                "the store was restarted, and readers of its last process may still come back; an in-place "
                "refit is possible when the grace period has ended"
            )
        model = self.models.get(refit.model)
        readers = self.leases.on(refit.model, base.number)
        require_sole_use(refit, base, model, self.space, readers, self.open_refits())
        refit.torn_before = base.torn
        base.torn = base.torn | {r.component for n, r in base.records.items() if refit.in_scope(n)}
        refit.targets = {n: base.records[n] for n in refit.declared_names()}
        refit.written = not self.unaware(refit)

    def unaware(self, refit: Refit) -> list[Lease]:
        """Readers of an in-place refit's base that have not acknowledged yet that it is being
        overwritten: nothing may be written until this is empty."""
        if not refit.declared.in_place or refit.base is None:
            return []
        return [lease for lease in self.leases.on(refit.model, refit.base.number) if not lease.torn]

    def begin_writing(self, number: int, peer: Peer) -> None:
        """`peer` is about to be told where to write: from here on an abort leaves an in-place refit's base
        torn, also if somebody has come since who is `unaware`. Raises RefitClosed or RefitAborted."""
        self.refit_of(number, peer).written = True

    def _join(self, refit: Refit, request: OpenRefit, peer: Peer) -> Refit:
        taken = refit.joined.get(request.rank)
        if request.key is None or request.key != refit.declared.key:
            holder = ", ".join(str(p) for p in refit.joined.values())
            raise RefitConflict(
                f"a refit of {request.model!r} tag {request.tag!r} is already open, held by {holder}; wait "
                "for it to commit or abort, or use another tag",
                holder=holder,
                refit=refit.number,
            )
        if not same_transaction(refit.declared, request):
            raise RefitConflict(
                f"rank {request.rank} declares refit {request.key!r} differently from the rank that opened "
                "it; all ranks must give the same base, components, mode and world_size",
                refit=refit.number,
            )
        if taken is not None:
            raise RefitConflict(
                f"rank {request.rank} of refit {request.key!r} is already taken by {taken}",
                refit=refit.number,
            )
        if refit.rank_of(peer) is not None:
            raise RefitConflict(
                f"this connection is already rank {refit.rank_of(peer)} of refit {request.key!r}; each rank "
                "needs a connection of its own",
                refit=refit.number,
            )
        refit.joined[request.rank] = peer
        return refit

    def reserve(self, number: int, peer: Peer, specs: Sequence[TensorSpec]) -> list[TensorRecord]:
        """Places for more tensors of an open refit, one record per spec; known names keep theirs.

        Raises:
            RefitClosed, RefitAborted: the refit has ended.
            InvalidName, InvalidTensor, CoverageError: tensors it may not write.
            NoSpace: as in `open_refit`.
        """
        refit = self.refit_of(number, peer)
        for spec in specs:
            check_spec(spec)
        refit.check_specs(specs)
        refit.draft = None
        base = refit.base
        if refit.declared.in_place and base is not None:
            names = refit.with_ties(spec.name for spec in specs)
            refit.targets.update((n, base.records[n]) for n in names)
        else:
            known = base.records if base is not None else {}
            moved = refit.with_ties(s.name for s in specs if s.name in known)
            old = [known[n] for n in moved if n in known and n not in refit.targets]
            new = [s for s in specs if s.name not in known and s.name not in refit.targets]
            place(self.space, refit, old, new)
        return [refit.targets[spec.name] for spec in specs]

    def declare_writes(self, number: int, peer: Peer, writes: list[Write]) -> Version:
        """Draft the version of a lone writer before its copies have landed.

        Raises:
            RefitClosed, RefitAborted, CoverageError; UsageError if other ranks take part.
        """
        refit = self.refit_of(number, peer)
        if refit.declared.world_size > 1:
            raise UsageError("writes can be declared ahead only by a refit's single writer")
        self._check_coverage(refit, writes)
        refit.draft = self._draft(refit)
        return refit.draft

    def prepare_commit(
        self, number: int, peer: Peer, writes: list[Write] | None, now: float
    ) -> Version | None:
        """Cast a rank's vote. With the last one, the version that `apply_commit` would make.

        Returns None while other ranks are still writing. `writes` None stands for what was declared. A
        coverage error of a lone writer leaves the refit open, so that it can write what is missing; with
        several writers it aborts the refit.

        Raises:
            RefitClosed, RefitAborted, CoverageError; UsageError if nothing was declared.
        """
        refit = self.refit_of(number, peer)
        rank = refit.rank_of(peer)
        if rank is None:
            raise RefitClosed(f"refit {number} is not yours to commit: join it first", refit=number)
        version = refit.draft
        if writes is None and version is None:
            raise UsageError(f"{refit.describe()} was to commit what was declared, but nothing was")
        if writes is not None:
            refit.votes[rank] = writes
            if not refit.complete():
                return None
            try:
                self._check_coverage(refit, refit.all_writes())
            except UsageError as error:
                if refit.declared.world_size > 1:
                    self._abort(refit, str(error))
                refit.votes.clear()
                raise
            version = self._draft(refit)
        assert version is not None
        model = self.models.find(refit.model)
        version.number = model.next_number if model is not None else 1
        version.created = now
        return version

    def _check_coverage(self, refit: Refit, writes: list[Write]) -> None:
        check_coverage(refit.targets, writes, refit.describe(), refit.staying(writes))
        if not writes:
            raise UsageError(f"{refit.describe()} wrote no tensor; nothing was changed")

    def _draft(self, refit: Refit) -> Version:
        """The version the refit would make, as yet without number and time."""
        base = refit.base
        records = dict(base.records) if base is not None else {}
        records.update(refit.targets)
        return Version(
            model=refit.model,
            number=0,
            parent=base.number if base is not None else 0,
            created=0.0,
            records=records,
            encoded=encode_records(records.values()),
            checksums=dict(base.checksums) if base is not None else {},
        )

    def apply_commit(self, number: int, version: Version) -> None:
        """Make the prepared version real, move the tag, free what that leaves behind. Cannot fail."""
        refit = self.refits[number]
        refit.move(RefitState.COMMITTED)
        refit.version = version.number
        model = self.models.ensure(refit.model)
        model.next_number = version.number + 1
        model.versions[version.number] = version
        self.space.publish(refit.owned)
        self.space.refer(version.extents)
        kept = version.extents - set(refit.owned or [record.extent for record in refit.targets.values()])
        version.checksums = {e: c for e, c in version.checksums.items() if e in kept}
        model.tags[refit.tag] = version.number
        if refit.declared.in_place and refit.base is not None:
            # Its bytes are now the new version's; require_sole_use made sure that nobody else reads it.
            refit.base.torn = frozenset()
            self._free(refit.base)
        del self.refits[number]
        self.collect()

    def abort_refit(self, number: int, peer: Peer, reason: str) -> None:
        """A writer gives up, none of its copies landing any more. For an ended refit: it has drained."""
        refit = self.refits.get(number)
        if refit is None or refit.rank_of(peer) is None:
            raise RefitClosed(f"refit {number} is not open", refit=number)
        if refit.state is RefitState.OPEN:
            rank = refit.rank_of(peer)
            self._abort(refit, f"rank {rank} aborted it{': ' + reason if reason else ''}")
        self._leave(refit, peer)
        self.space.settle(peer.writer, refit.number)
        if refit.base is not None:
            refit.base.writers.discard(peer.writer)
        self.collect()

    def _abort(self, refit: Refit, reason: str) -> None:
        refit.move(RefitState.ABORTED, reason)
        self.space.give_up(refit.number, refit.owned, refit.writing())
        refit.owned = []
        if refit.declared.in_place and refit.base is not None:
            if refit.written:
                refit.base.writers |= refit.writing()
            else:
                refit.base.torn = refit.torn_before

    def _leave(self, refit: Refit, peer: Peer) -> None:
        """An ended refit is remembered until every rank has learnt of its end."""
        rank = refit.rank_of(peer)
        if rank is not None:
            del refit.joined[rank]
        if not refit.joined:
            del self.refits[refit.number]

    def expire(self, now: float) -> list[Refit]:
        """Abort shared refits whose deadline has passed; those aborted."""
        late = [r for r in self.open_refits() if r.declared.world_size > 1 and now >= r.deadline]
        for refit in late:
            everyone = range(refit.declared.world_size)
            absent = [rank for rank in everyone if rank not in refit.joined]
            slow = [rank for rank in refit.joined if rank not in refit.votes]
            who = f"{_ranks(absent)} never joined" if absent else f"{_ranks(slow)} did not commit"
            self._abort(refit, f"{who} within {refit.declared.timeout:g} s")
        self.collect()
        return late

    def refit_of(self, number: int, peer: Peer) -> Refit:
        """The open refit `peer` takes part in. Raises RefitClosed or RefitAborted."""
        refit = self.refits.get(number)
        if refit is None or refit.rank_of(peer) is None:
            raise RefitClosed(f"refit {number} is not open on this connection", refit=number)
        if refit.state is RefitState.ABORTED:
            raise RefitAborted(f"{refit.describe()} was aborted: {refit.reason}", refit=number)
        refit.require_open()
        return refit

    # -- leases ------------------------------------------------------------------------------------

    def open_lease(
        self, peer: Peer, model: str, tag: str, version: int | None, follow: bool, now: float
    ) -> tuple[Lease, Version]:
        """Raises UnknownModel, UnknownTag, UnknownVersion, TagTorn, UsageError."""
        if follow and version is not None:
            raise UsageError("a lease either follows a tag or holds a given version, not both")
        chosen = self.resolve(model, tag, version)
        return self.leases.grant(peer, tag, chosen, follow, now), chosen

    def take_offer(self, number: int, peer: Peer, version: int) -> None:
        """The holder of a following lease has moved on. Raises LeaseLost."""
        self.leases.take(number, peer, version)
        self.collect()

    def park_lease(self, number: int, peer: Peer, parked: bool) -> Version:
        """See Leases.park."""
        version = self.leases.park(number, peer, parked)
        self.collect()
        return version

    def release_lease(self, number: int, peer: Peer) -> None:
        """Raises LeaseLost."""
        self.leases.release(number, peer)
        self.collect()

    # -- tags --------------------------------------------------------------------------------------

    def set_tag(self, model: str, tag: str, version: int) -> None:
        """Raises InvalidName, UnknownModel, UnknownVersion, TagTorn, RefitConflict."""
        check_name("tag", tag)
        found = self.models.get(model)
        chosen = found.version(version)
        if chosen.torn:
            raise torn_error(model, tag, chosen)
        self._require_no_refit(model, tag)
        found.tags[tag] = version
        self.collect()

    def remove_tag(self, model: str, tag: str) -> None:
        """Raises UnknownModel, UnknownTag, RefitConflict."""
        found = self.models.get(model)
        found.tagged(tag)
        self._require_no_refit(model, tag)
        del found.tags[tag]
        self.collect()

    def remove_model(self, model: str) -> None:
        """Remove every tag, and the name map. Raises UnknownModel, RefitConflict."""
        found = self.models.find(model)
        if found is None or found.names is None:
            found = self.models.get(model)
        for tag in found.tags:
            self._require_no_refit(model, tag)
        found.tags.clear()
        found.names = None
        self.models.forget_if_void(model)
        self.collect()

    def publish_names(self, model: str, names: str | None) -> None:
        """Keep a name map with a model, which need not have a version; None takes it back."""
        if names is not None:
            self.models.ensure(model).names = names
        elif (found := self.models.find(model)) is not None:
            found.names = None
            self.models.forget_if_void(model)

    def _require_no_refit(self, model: str, tag: str) -> None:
        for refit in self.open_refits():
            if (refit.model, refit.tag) == (model, tag):
                holder = ", ".join(str(p) for p in refit.joined.values())
                raise RefitConflict(
                    f"a refit of {model!r} tag {tag!r} is open, held by {holder}; wait until it ends",
                    holder=holder,
                    refit=refit.number,
                )

    # -- ends --------------------------------------------------------------------------------------

    def drop_peer(self, peer: Peer) -> None:
        """The connection is gone: its leases end; refits it takes part in abort, and their space waits
        until `settle` says that its process writes no more."""
        self.leases.drop_peer(peer)
        for refit in list(self.refits.values()):
            rank = refit.rank_of(peer)
            if rank is not None:
                if refit.state is RefitState.OPEN:
                    self._abort(refit, f"rank {rank}, {peer}, disconnected")
                self._leave(refit, peer)
        self.collect()

    def settle(self, writer: Writer) -> bool:
        """No copy of `writer` is in flight. True if space came back."""
        for version in self.models.versions():
            version.writers.discard(writer)
        return self.space.settle(writer)

    def holdouts(self) -> set[Writer]:
        """Writers of ended refits that may still be writing, to space of their own or in place."""
        return self.space.holdouts().union(*(version.writers for version in self.models.versions()))

    def overwriting(self, model: str) -> set[Writer]:
        """Those of them that were overwriting a version of `model`."""
        found = self.models.find(model)
        return set() if found is None else set().union(*(v.writers for v in found.versions.values()))

    def collect(self) -> None:
        """Free every version that is not live, unless the grace period still runs."""
        held = self.leases.held()
        held |= {(r.model, r.base.number) for r in self.open_refits() if r.base is not None}
        for model in self.models:
            tagged = set(model.tags.values())
            for version in list(model.versions.values()):
                if version.number in tagged:
                    version.move(VersionState.COMMITTED)
                elif (model.name, version.number) in held or self.grace_until:
                    version.move(VersionState.RETIRED)
                else:
                    self._free(version)

    def end_grace(self) -> None:
        """Every reader of the last store process has had its chance to renew."""
        self.grace_until = 0.0
        self.collect()

    def _free(self, version: Version) -> None:
        version.move(VersionState.FREED)
        model = self.models.ensure(version.model)
        del model.versions[version.number]
        if not model.versions:
            model.names = None
        self.space.drop(version.extents, version.writers)
        self.freed.append(version)

    def _number(self) -> int:
        self._last_number += 1
        return self._last_number


def _ranks(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"ranks {list(ranks[:8])}{more}"
