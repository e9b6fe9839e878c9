"""The store's own records in the arena: what was committed survives the store process.

Two kinds of things are written. A *blob* (a version's records, its checksums, a name map, the
list of open writers) goes to fresh space and is never overwritten while a root refers to it. The *root* names
the blobs and everything small; it has two slots, written in turn. A commit is the root's last
24 bytes: until they are there, the other slot is the newer believable one, so a kill at any
instant leaves either the old catalog or the new one.

    slot:  sequence u64 │ payload bytes u64 │ xxh3-64 of both and the payload │ payload (msgpack Root)

Shared memory outlives processes but not the host, so no write needs flushing; it only needs an
order, which stores from one process to one mapping keep.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct
from typing import Final

import msgspec
import xxhash

from weightstore.allocator import Allocator, NoSpace
from weightstore.arena import Arena
from weightstore.catalog import Writer
from weightstore.errors import ArenaFull, ArenaUnusable
from weightstore.layout import BLOBS_BYTES, BLOBS_OFFSET, ROOT_BYTES, ROOT_OFFSETS
from weightstore.types import Extent

_SLOT: Final = Struct("<QQQ")
_PAIR: Final = Struct("<QQ")
ROOT_ROOM: Final = ROOT_BYTES - _SLOT.size
"""Bytes a root's payload may have: more than 10,000 versions."""


class Blob(msgspec.Struct, frozen=True, array_like=True):
    """Bytes in the blob area, with their xxh3-64."""

    offset: int
    nbytes: int
    checksum: int

    @property
    def extent(self) -> Extent:
        return Extent(self.offset, self.nbytes)


class SavedVersion(msgspec.Struct, frozen=True, array_like=True):
    """`writers` were, or might have been, overwriting it in place when the root was saved."""

    number: int
    parent: int
    created: float
    torn: list[str]
    records: Blob
    checksums: Blob | None
    writers: list[Writer] = []


class SavedModel(msgspec.Struct, frozen=True, array_like=True):
    """`names` is the published name map. Roots written before there were any end without it."""

    name: str
    next_number: int
    tags: dict[str, int]
    versions: list[SavedVersion]
    names: Blob | None = None


class SavedDebt(msgspec.Struct, frozen=True, array_like=True):
    """Space that writers were writing to, or might still be, when the root was saved."""

    writers: list[Writer]
    extents: list[Extent]


class Root(msgspec.Struct, frozen=True, array_like=True):
    models: list[SavedModel]
    debts: Blob | None


class Persistence:
    """Reads and writes roots and blobs of one arena. Not thread-safe."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._buffer = arena.buffer
        self._blobs = Allocator(BLOBS_OFFSET, BLOBS_BYTES)
        self._sequence = 0
        self.root_bytes = 0
        arena.commit_meta(BLOBS_OFFSET)

    @property
    def blob_bytes(self) -> int:
        """Bytes of the blob area in use."""
        return self._blobs.used_bytes

    # -- root --------------------------------------------------------------------------------------

    def load(self) -> Root | None:
        """The newest believable root, its blobs marked as used; None on a fresh arena.

        Raises:
            ArenaUnusable: records were written, but none of them is whole.
        """
        slots = [self._read_slot(offset) for offset in ROOT_OFFSETS]
        best = max((slot for slot in slots if slot is not None), default=None, key=lambda slot: slot[0])
        if best is None:
            if any(self._buffer[o : o + _SLOT.size].tobytes().strip(b"\0") for o in ROOT_OFFSETS):
                raise ArenaUnusable(
                    f"arena {self._arena.name!r} has no whole root record: its catalog is damaged. It is "
                    "left as it is; remove it if its weights are not needed"
                )
            return None
        self._sequence, payload = best
        self.root_bytes = len(payload)
        try:
            root = msgspec.msgpack.decode(payload, type=Root)
            self._blobs.claim(blob.extent for blob in _blobs_of(root))
        except (msgspec.DecodeError, ValueError) as error:
            raise ArenaUnusable(f"arena {self._arena.name!r} has an unreadable catalog: {error}") from None
        return root

    def require_room(self, root_bytes: int, blob_bytes: int) -> None:
        """Raise ArenaFull unless the next root may grow by `root_bytes` and `blob_bytes` more of blobs
        can be written: then neither `save` nor those `write_blob` calls will."""
        if self.root_bytes + root_bytes > ROOT_ROOM:
            raise _root_full(self.root_bytes + root_bytes)
        self._blobs.release([self._reserve_blob(blob_bytes)])

    def save(self, root: Root) -> None:
        """Make `root` the one a later store will find. The commit point of every change.

        Raises:
            ArenaFull: it is too large; the last root still stands.
        """
        payload = msgspec.msgpack.encode(root)
        if len(payload) > ROOT_ROOM:
            raise _root_full(len(payload))
        sequence = self._sequence + 1
        offset = ROOT_OFFSETS[sequence % 2]
        self._buffer[offset + _SLOT.size : offset + _SLOT.size + len(payload)] = payload
        checksum = _slot_checksum(sequence, payload)
        self._buffer[offset : offset + _SLOT.size] = _SLOT.pack(sequence, len(payload), checksum)
        self._sequence = sequence
        self.root_bytes = len(payload)

    def _read_slot(self, offset: int) -> tuple[int, bytes] | None:
        sequence, nbytes, checksum = _SLOT.unpack_from(self._buffer, offset)
        if not sequence or nbytes > ROOT_ROOM:
            return None
        start = offset + _SLOT.size
        payload = self._buffer[start : start + nbytes].tobytes()
        return (sequence, payload) if _slot_checksum(sequence, payload) == checksum else None

    # -- blobs -------------------------------------------------------------------------------------

    def write_blob(self, data: bytes | memoryview) -> Blob:
        """Put `data` in fresh space; it counts only once a saved root refers to it. Raises ArenaFull."""
        extent = self._reserve_blob(len(data))
        self._buffer[extent.offset : extent.end] = data
        return Blob(extent.offset, extent.nbytes, xxhash.xxh3_64_intdigest(data))

    def _reserve_blob(self, nbytes: int) -> Extent:
        """Free blob space whose pages exist."""
        try:
            (extent,) = self._blobs.reserve([nbytes])
        except NoSpace:
            raise ArenaFull(
                f"the catalog area cannot hold {nbytes} more bytes: {self._blobs.free_bytes} of "
                f"{BLOBS_BYTES} are free. Remove versions that are not needed",
                requested=nbytes,
                free=self._blobs.free_bytes,
                capacity=BLOBS_BYTES,
            ) from None
        try:
            self._arena.commit_meta(extent.end)
        except ArenaFull:
            self._blobs.release([extent])
            raise
        return extent

    def read_blob(self, blob: Blob) -> bytes:
        """Raises ArenaUnusable if the bytes are not those that were written."""
        data = self._buffer[blob.offset : blob.offset + blob.nbytes].tobytes()
        if xxhash.xxh3_64_intdigest(data) != blob.checksum:
            raise ArenaUnusable(
                f"arena {self._arena.name!r}: records at {blob.offset} ({blob.nbytes} bytes) are damaged; it "
                "is left as it is"
            )
        return data

    def free_blobs(self, blobs: Iterable[Blob | None]) -> None:
        """Reuse blobs that the last saved root no longer refers to."""
        self._blobs.release(blob.extent for blob in blobs if blob is not None)


def _root_full(nbytes: int) -> ArenaFull:
    return ArenaFull(
        f"the catalog's root needs {nbytes} bytes of {ROOT_ROOM}: too many versions and tags; remove some",
        requested=nbytes,
        capacity=ROOT_ROOM,
    )


def _slot_checksum(sequence: int, payload: bytes) -> int:
    digest = xxhash.xxh3_64(_PAIR.pack(sequence, len(payload)))
    digest.update(payload)
    return digest.intdigest()


def _blobs_of(root: Root) -> Iterable[Blob]:
    for model in root.models:
        if model.names is not None:
            yield model.names
        for version in model.versions:
            yield version.records
            if version.checksums is not None:
                yield version.checksums
    if root.debts is not None:
        yield root.debts
