"""Checksums of committed versions: xxh3-64 of every extent, computed behind the readers' backs.

Hashing runs on one thread of its own, in pieces, so that it neither delays the event loop nor a
refit. The thread's priority is everybody's: one that a busy host lets wait would now and then do so with
the interpreter lock in its hands, and the event loop with it (measured: up to 1.6 s). A version freed meanwhile may have its bytes reused under the hash; the result is then thrown
away, because the store keeps checksums only of versions that are still there.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import xxhash

from weightstore.catalog import Version
from weightstore.store import Store
from weightstore.types import Extent, TensorRecord
from weightstore.wire import Verified

PIECE: Final = 64 << 20
"""Bytes hashed between two looks at `cancelled`: about 5 ms."""
HEAD_START: Final = 0.1
"""Seconds that whoever waits for a commit, and followers, get before hashing competes with them."""


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
        self._wanted = asyncio.Event()
        self._given_up: set[Version] = set()

    def wake(self) -> None:
        """There may be a version without checksums."""
        self._wanted.set()

    def close(self) -> None:
        """Stop hashing and wait until the thread no longer reads the arena."""
        self._cancelled.set()
        self._pool.shutdown(cancel_futures=True)

    async def run(self) -> None:
        while True:
            self._wanted.clear()
            version = self._next()
            if version is None:
                await self._wanted.wait()
                await asyncio.sleep(HEAD_START)
                continue
            sums = await self._hash(version, [e for e in version.extents if e not in version.checksums])
            if not self._store.record_checksums(version, {**version.checksums, **sums}):
                self._given_up.add(version)

    def _next(self) -> Version | None:
        versions = [v for v in self._store.catalog.models.versions() if not v.checksummed and not v.torn]
        self._given_up &= set(versions)
        todo = [v for v in versions if v not in self._given_up]
        return max(todo, key=lambda v: v.created, default=None)

    async def verify(self, request: int, version: Version) -> Verified:
        """Sum all bytes of a version that stays leased meanwhile, and compare with the sums kept."""
        sums = await self._hash(version, version.extents)
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

    async def _hash(self, version: Version, extents: Iterable[Extent]) -> dict[Extent, int]:
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
