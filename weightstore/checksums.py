"""Checksums of committed versions: xxh3-64 of every extent, computed behind the readers' backs.

Hashing takes memory bandwidth that refits and wakes could use, so it happens while the store is calm: no
refit open and nothing changed for `CALM` seconds, asked again after every batch. It runs on one thread
of its own, in pieces, so that it does not delay the event loop. The thread's priority is everybody's: one
that a busy host lets wait would now and then do so with the interpreter lock in its hands, and the
event loop with it (measured: up to 1.6 s).

A version freed meanwhile may have its bytes reused under the hash; the result is then thrown away, because
the store keeps checksums only of versions that are still there.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import xxhash

from weightstore.catalog import Version, VersionState
from weightstore.store import Store
from weightstore.types import Extent, TensorRecord
from weightstore.wire import Verified

PIECE: Final = 64 << 20
"""Bytes hashed between two looks at `cancelled`: about 5 ms."""
BATCH: Final = 256 << 20
"""Bytes hashed between two looks at whether the store is still calm."""
CALM: Final = 1.0
"""Seconds without a change before hashing begins: engines that wake on a commit have done so by then."""


def hash_extents(
    buffer: memoryview, extents: Iterable[Extent], cancelled: threading.Event
) -> dict[Extent, int] | None:
    """xxh3-64 of each extent's bytes; None when cancelled."""
    sums = {}
    for extent in extents:
        digest = xxhash.xxh3_64()
        for start in range(extent.offset, extent.end, PIECE):
            if cancelled.is_set():
                return None
            digest.update(buffer[start : min(start + PIECE, extent.end)])
        sums[extent] = digest.intdigest()
    return sums


def batches(extents: Iterable[Extent]) -> Iterator[list[Extent]]:
    """The extents in their order, in lists of at least `BATCH` bytes (but the last)."""
    batch: list[Extent] = []
    nbytes = 0
    for extent in extents:
        batch.append(extent)
        nbytes += extent.nbytes
        if nbytes >= BATCH:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


def content_digest(records: Iterable[TensorRecord], checksums: dict[Extent, int]) -> str:
    """32 hex digits that depend on every tensor's name, type, shape, stride and bytes, but not on
    where they lie: equal for equal versions in any arena."""
    digest = xxhash.xxh3_128()
    for record in sorted(records, key=lambda r: r.name):
        content = checksums.get(record.extent, 0) if record.nbytes else 0
        digest.update(
            f"{record.name}|{record.dtype}|{record.shape}|{record.stride}|{content:016x}\n".encode()
        )
    return digest.hexdigest()


class Checksummer:
    """Sums every committed version once, newest first, and verifies on request."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._cancelled = threading.Event()
        self._pool = ThreadPoolExecutor(1, "weightstore-sum")
        self._changed = asyncio.Event()
        self._last_change = 0.0
        self._given_up: set[Version] = set()

    def wake(self) -> None:
        """Something changed: there may be a version without checksums, and the store is not calm."""
        self._last_change = asyncio.get_running_loop().time()
        self._changed.set()

    def close(self) -> None:
        """Stop hashing and wait until the thread no longer reads the arena."""
        self._cancelled.set()
        self._pool.shutdown(cancel_futures=True)

    async def run(self) -> None:
        while True:
            self._changed.clear()
            version = self._next()
            if version is None:
                await self._changed.wait()
                continue
            sums = dict(version.checksums)
            for batch in batches([e for e in version.extents if e not in sums]):
                await self._calm()
                if version.state is VersionState.FREED or version.torn:
                    break
                sums |= await self._hash(batch)
            if not self._store.record_checksums(version, sums):
                self._given_up.add(version)

    async def _calm(self) -> None:
        """Wait until no refit is open and nothing has changed for a while."""
        while True:
            self._changed.clear()
            if next(self._store.catalog.open_refits(), None) is not None:
                await self._changed.wait()
                continue
            left = self._last_change + CALM - asyncio.get_running_loop().time()
            if left <= 0:
                return
            await asyncio.sleep(left)

    def _next(self) -> Version | None:
        versions = [v for v in self._store.catalog.models.versions() if not v.checksummed and not v.torn]
        self._given_up &= set(versions)
        todo = [v for v in versions if v not in self._given_up]
        return max(todo, key=lambda v: v.created, default=None)

    async def verify(self, request: int, version: Version) -> Verified:
        """Sum all bytes of a version that stays leased meanwhile, and compare with the sums kept."""
        sums = await self._hash(version.extents)
        kept = version.checksums
        corrupt = [r.name for r in version.records.values() if r.nbytes and _differs(r, kept, sums)]
        if not corrupt and not version.checksummed:
            self._store.record_checksums(version, sums)
        return Verified(
            id=request,
            version=version.number,
            tensors=len(version.records),
            nbytes=version.nbytes,
            compared=len(kept.keys() & sums.keys()),
            computed=len(sums.keys() - kept.keys()),
            corrupt=corrupt,
            digest=content_digest(version.records.values(), sums),
        )

    async def _hash(self, extents: Iterable[Extent]) -> dict[Extent, int]:
        loop = asyncio.get_running_loop()
        buffer = self._store.arena.buffer
        hashing = loop.run_in_executor(self._pool, hash_extents, buffer, extents, self._cancelled)
        sums = await hashing
        if sums is None:
            raise asyncio.CancelledError  # only `close` cancels a hash
        return sums


def _differs(record: TensorRecord, kept: dict[Extent, int], found: dict[Extent, int]) -> bool:
    extent = record.extent
    return extent in kept and kept[extent] != found[extent]
