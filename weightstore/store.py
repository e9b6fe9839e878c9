"""The store: the catalog, made durable. Each change is validated, applied, and then saved in one write.

A request that is refused changes neither the catalog nor the arena. Whatever can fail for want of
space (a version's records, the root's size) is written or checked before the catalog changes, so
that the final write, the root, cannot fail; a store killed before it has not made the change.

The store decides where bytes go and never touches them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, TypeVar

import msgspec

from weightstore.allocator import NoSpace
from weightstore.arena import Arena
from weightstore.catalog import Catalog, Lease, Peer, Refit, Usage, Version, VersionState, Writer
from weightstore.catalog.space import Debt
from weightstore.errors import ArenaFull, ArenaUnusable
from weightstore.layout import BLOBS_BYTES, DATA_OFFSET
from weightstore.persistence import Blob, Persistence, Root, SavedDebt, SavedModel, SavedVersion
from weightstore.types import Extent, TensorRecord, TensorSpec, align_up
from weightstore.wire import ArenaStatus, OpenRefit, Write, decode_records

_ROOT_SLACK: Final = 4096
"""Root bytes that one change can add at most: a version and a few tags."""
_BLOB_SLACK: Final = 2 << 20
"""Blob bytes one change can add besides a version's records: the places of its writers."""

T = TypeVar("T")


class Store:
    """Composition of arena, catalog and persistence. Not thread-safe.

    An adopted arena's committed versions are there again; while the grace period runs nothing of
    theirs is freed, so that readers of the last store process can renew their leases.

    Raises:
        ArenaUnusable: the adopted arena's records are damaged.
    """

    def __init__(self, arena: Arena, now: float, grace: float) -> None:
        self.arena = arena
        self._persistence = Persistence(arena)
        self._records: dict[Version, Blob] = {}
        self._checksums: dict[Version, Blob] = {}
        self._names: dict[str, Blob] = {}
        """By model: its published name map."""
        self._drafts: dict[int, tuple[Version, Blob]] = {}
        """By refit: a version that may come, its records written but not referred to by any root."""
        self._debts: tuple[object, Blob | None] = (((), ()), None)
        root = self._persistence.load()
        self.catalog = Catalog(DATA_OFFSET, arena.committed, now + grace if root is not None else 0.0)
        if root is not None:
            self._recover(root)
        self._save()

    # -- recovery ----------------------------------------------------------------------------------

    def _recover(self, root: Root) -> None:
        debts: list[Debt] = []
        if root.debts is not None:
            saved = self._decode(root.debts, list[SavedDebt])
            debts = [Debt(0, tuple(debt.extents), set(debt.writers)) for debt in saved]
            self._debts = (None, root.debts)
        versions = []
        for saved_model in root.models:
            model = self.catalog.models.ensure(saved_model.name)
            model.next_number = saved_model.next_number
            model.tags = dict(saved_model.tags)
            if saved_model.names is not None:
                model.names = self._persistence.read_blob(saved_model.names).decode()
                self._names[model.name] = saved_model.names
            for saved_version in saved_model.versions:
                version = self._recover_version(saved_model.name, saved_version)
                model.versions[version.number] = version
                versions.append(version)
        try:
            self.catalog.space.recover((v.extents for v in versions), debts)
        except ValueError as error:
            raise ArenaUnusable(
                f"arena {self.arena.name!r} has a catalog that contradicts itself: {error}"
            ) from None
        self.catalog.collect()

    def _recover_version(self, model: str, saved: SavedVersion) -> Version:
        encoded = msgspec.Raw(self._persistence.read_blob(saved.records))
        records = decode_records(encoded) or []
        version = Version(
            model=model,
            number=saved.number,
            parent=saved.parent,
            created=saved.created,
            records={r.name: r for r in records},
            encoded=encoded,
            torn=frozenset(saved.torn),
            writers=set(saved.writers),
        )
        self._records[version] = saved.records
        if saved.checksums is not None:
            pairs = self._decode(saved.checksums, list[tuple[Extent, int]])
            version.checksums = dict(pairs)
            version.checksummed = True
            self._checksums[version] = saved.checksums
        return version

    def _decode(self, blob: Blob, kind: type[T]) -> T:
        try:
            return msgspec.msgpack.decode(self._persistence.read_blob(blob), type=kind)
        except msgspec.DecodeError as error:
            raise ArenaUnusable(f"arena {self.arena.name!r} has unreadable records: {error}") from None

    # -- saving ------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write the catalog as it is now, then reuse the blobs that only the last root needed."""
        freed, self.catalog.freed = self.catalog.freed, []
        garbage: list[Blob | None] = []
        for version in freed:
            garbage += [self._records.pop(version), self._checksums.pop(version, None)]
        open_refits = {refit.number for refit in self.catalog.open_refits()}
        for number in self._drafts.keys() - open_refits:
            garbage.append(self._drafts.pop(number)[1])
        named = {model.name for model in self.catalog.models if model.names is not None}
        garbage += [self._names.pop(name) for name in self._names.keys() - named]
        garbage += self._save_debts()
        overwriting = {
            refit.base: refit.writing() for refit in self.catalog.open_refits() if refit.declared.in_place
        }
        models = [
            SavedModel(
                m.name,
                m.next_number,
                m.tags,
                [self._saved(v, overwriting) for v in m.versions.values()],
                self._names.get(m.name),
            )
            for m in self.catalog.models
        ]
        self._persistence.save(Root(models, self._debts[1]))
        self._persistence.free_blobs(garbage)

    def _saved(self, v: Version, overwriting: Mapping[Version | None, set[Writer]]) -> SavedVersion:
        writers = sorted(v.writers | overwriting.get(v, set()), key=repr)
        return SavedVersion(
            v.number, v.parent, v.created, sorted(v.torn), self._records[v], self._checksums.get(v), writers
        )

    def _save_debts(self) -> list[Blob | None]:
        """Write down who may be writing where; returns the blob this replaces."""
        refits = [refit for refit in self.catalog.open_refits() if refit.owned]
        debts = self.catalog.space.debts
        key = (
            tuple((r.number, len(r.owned), frozenset(r.writing())) for r in refits),
            tuple((d.refit, d.extents, frozenset(d.holdouts)) for d in debts),
        )
        old_key, old = self._debts
        if key == old_key:
            return []
        saved = [SavedDebt(sorted(r.writing(), key=repr), merge(r.owned)) for r in refits]
        saved += [SavedDebt(sorted(d.holdouts, key=repr), merge(d.extents)) for d in debts]
        try:
            blob = self._persistence.write_blob(msgspec.msgpack.encode(saved)) if saved else None
        except ArenaFull:
            # _change made sure that new places fit, so this change only gives places back: the old list
            # quarantines too much after a crash, never too little.
            return []
        self._debts = (key, blob)
        return [old]

    def _change(self, change: Callable[[], T]) -> T:
        """Apply a change and save it, having made sure that saving cannot fail. Raises ArenaFull."""
        self._persistence.require_room(_ROOT_SLACK, _BLOB_SLACK)
        result = change()
        self._save()
        return result

    # -- refits ------------------------------------------------------------------------------------

    def open_refit(self, request: OpenRefit, peer: Peer, now: float) -> Refit:
        """As Catalog.open_refit, including NoSpace."""
        return self._change(lambda: self.catalog.open_refit(request, peer, now))

    def reserve(self, number: int, peer: Peer, specs: Sequence[TensorSpec]) -> list[TensorRecord]:
        """As Catalog.reserve, including NoSpace."""
        return self._change(lambda: self.catalog.reserve(number, peer, specs))

    def declare_writes(self, number: int, peer: Peer, writes: list[Write]) -> None:
        """As Catalog.declare_writes; the version's records are written down too. Raises ArenaFull."""
        self._write_draft(number, self.catalog.declare_writes(number, peer, writes))

    def _write_draft(self, number: int, version: Version) -> Blob:
        """Where the records of the version that a refit would make are written down. Raises ArenaFull."""
        drafted, blob = self._drafts.pop(number, (None, None))
        if drafted is not version or blob is None:
            self._persistence.free_blobs([blob])
            blob = self._persistence.write_blob(bytes(version.encoded))
        self._drafts[number] = (version, blob)
        return blob

    def commit(self, number: int, peer: Peer, writes: list[Write] | None, now: float) -> Version | None:
        """As Catalog.prepare_commit; the version it returns is committed and durable.

        Raises ArenaFull too, when the version's records do not fit; then the refit is still open.
        """
        version = self.catalog.prepare_commit(number, peer, writes, now)
        if version is None:
            return None
        blob = self._write_draft(number, version)

        def apply() -> None:
            self._records[version] = blob
            del self._drafts[number]
            self.catalog.apply_commit(number, version)

        self._change(apply)
        return version

    def abort_refit(self, number: int, peer: Peer, reason: str) -> None:
        self.catalog.abort_refit(number, peer, reason)
        self._save()

    def expire(self, now: float) -> list[Refit]:
        """Abort shared refits past their deadline; end the grace period when it is over."""
        late = self.catalog.expire(now)
        over = 0 < self.catalog.grace_until <= now
        if over:
            self.catalog.end_grace()
        if late or over:
            self._save()
        return late

    def commit_space(self, need: NoSpace, usage: Usage) -> int:
        """Have the arena commit what a request that raised NoSpace needs; the bytes added.

        Blocks, and touches nothing but the arena, so it may run on another thread; `grown` follows.
        `usage` is the catalog's at the time of the request.

        Raises:
            ArenaFull: with the numbers of both the arena and its free space.
        """
        try:
            return self.arena.commit_data(need.shortfall)
        except ArenaFull as full:
            # Contiguous is better, scattered will do: what is missing in all may be less.
            deficit = need.needed - usage.free
            if 0 < deficit < need.shortfall:
                try:
                    return self.arena.commit_data(deficit)
                except ArenaFull:
                    pass  # the first refusal says it all
            full.details.update(free=usage.free, largest_free=usage.largest_free, needed=need.needed)
            raise

    def grown(self, nbytes: int) -> None:
        self.catalog.space.grow(nbytes)

    # -- leases and tags ---------------------------------------------------------------------------

    def open_lease(
        self, peer: Peer, model: str, tag: str, version: int | None, follow: bool, now: float
    ) -> tuple[Lease, Version]:
        return self.catalog.open_lease(peer, model, tag, version, follow, now)

    def take_offer(self, number: int, peer: Peer, version: int) -> None:
        self.catalog.take_offer(number, peer, version)
        self._save_if_freed()

    def park_lease(self, number: int, peer: Peer, parked: bool) -> Version:
        version = self.catalog.park_lease(number, peer, parked)
        self._save_if_freed()
        return version

    def release_lease(self, number: int, peer: Peer) -> None:
        self.catalog.release_lease(number, peer)
        self._save_if_freed()

    def set_tag(self, model: str, tag: str, version: int) -> None:
        self._change(lambda: self.catalog.set_tag(model, tag, version))

    def remove_tag(self, model: str, tag: str) -> None:
        self.catalog.remove_tag(model, tag)
        self._save()

    def remove_model(self, model: str) -> None:
        self.catalog.remove_model(model)
        self._save()

    def publish_names(self, model: str, names: str | None) -> None:
        """As Catalog.publish_names. Raises ArenaFull, having kept what was published before."""
        if names is None:
            self.catalog.publish_names(model, None)
            self._save()
            return
        blob = self._persistence.write_blob(names.encode())
        old = self._names.get(model)

        def apply() -> None:
            self.catalog.publish_names(model, names)
            self._names[model] = blob

        try:
            self._change(apply)
        except ArenaFull:
            self._persistence.free_blobs([blob])
            raise
        self._persistence.free_blobs([old])

    def drop_peer(self, peer: Peer) -> None:
        self.catalog.drop_peer(peer)
        self._save()

    def settle(self, writer: Writer) -> None:
        """No copy of `writer` is in flight any more."""
        if self.catalog.settle(writer):
            self._save()

    def _save_if_freed(self) -> None:
        # Who reads what is not saved, only what exists; most lease traffic frees nothing.
        if self.catalog.freed:
            self._save()

    # -- checksums ---------------------------------------------------------------------------------

    def record_checksums(self, version: Version, checksums: dict[Extent, int]) -> bool:
        """Keep the xxh3-64 of a version's extents. False if it was freed or torn meanwhile, or there is
        no room to keep them durably (they are then computed again when needed)."""
        if version.state is VersionState.FREED or version.torn:
            return False
        try:
            blob = self._persistence.write_blob(msgspec.msgpack.encode(list(checksums.items())))
        except ArenaFull:
            return False
        version.checksums = dict(checksums)
        version.checksummed = True
        self._checksums[version] = blob
        self._save()
        return True

    # -- status ------------------------------------------------------------------------------------

    def arena_status(self) -> ArenaStatus:
        usage = self.catalog.usage()
        return ArenaStatus(
            name=self.arena.name,
            uuid=self.arena.uuid,
            capacity=self.arena.capacity,
            window=self.arena.window,
            committed=usage.committed,
            used=usage.committed - usage.free,
            free=usage.free,
            reachable=usage.reachable,
            pending=usage.pending,
            quarantined=usage.quarantined,
            largest_free=usage.largest_free,
            meta_used=self._persistence.blob_bytes,
            meta_capacity=BLOBS_BYTES,
        )


def merge(extents: Iterable[Extent]) -> list[Extent]:
    """Sorted extents with neighbours (up to alignment) joined, each a multiple of the alignment."""
    merged: list[Extent] = []
    start = end = -1
    for offset, span in sorted([(extent.offset, align_up(extent.nbytes)) for extent in extents]):
        if offset != end:
            if start != end:
                merged.append(Extent(start, end - start))
            start = offset
        end = offset + span
    if start != end:
        merged.append(Extent(start, end - start))
    return merged
