"""Copies between the arena and device addresses, at the speed of the link.

`split` is pure: it cuts copies at window borders, because a copy that spans two registrations is an error in
CUDA. `Copier` does them: asynchronously where the arena is pinned, through a small pinned bounce
buffer where it cannot be (said once in the log, and counted, so that reports can say it too).

Invariants:
- a copy is enqueued only after its windows are pinned, or has completed on the host's side when the
  call returns (staged);
- a bounce slot is reused only after the copy that used it last has finished.

Measured on an H100 host (bench/NOTES.md): cuMemcpyBatchAsync takes half the host's time of a loop over
cuMemcpyAsync and is the faster one from dozens of copies on; either holds the link's speed for large ones.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from weightstore.cuda.driver import Device, Event, Stream, api, call, check
from weightstore.cuda.pinning import PinnedArena
from weightstore.errors import DeviceError
from weightstore.layout import DATA_OFFSET

log = logging.getLogger(__name__)

Job = tuple[int, int, int]
"""One contiguous copy: device address, arena offset, nbytes."""

BATCH_COUNT: Final = 64
"""From this many copies in one request on a batched call beats a loop (1.2 to 2.1 µs a copy against 3.6)."""

SLOT: Final = 32 << 20
"""Bytes of one bounce slot."""
SLOTS: Final = 3
STAGING_THREADS: Final = 4
"""One thread copies about 10 GB/s of host memory."""

_libc = ctypes.CDLL(None)  # CDLL: memcpy runs without the GIL
_libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.memcpy.restype = ctypes.c_void_p


def split(jobs: Iterable[Job], window: int) -> list[Job]:
    """The same copies in the same order, none of which crosses a window border of the arena."""
    parts: list[Job] = []
    for address, offset, nbytes in jobs:
        while nbytes > 0:
            room = window - (offset - DATA_OFFSET) % window
            if nbytes <= room:
                parts.append((address, offset, nbytes))
                break
            parts.append((address, offset, room))
            address, offset, nbytes = address + room, offset + room, nbytes - room
    return parts


def split_rows(offset: int, rows: int, nbytes: int, pitch: int, window: int) -> list[tuple[int, int]]:
    """Cut rows of `nbytes` bytes every `pitch` bytes from arena `offset` on into (first row, count) blocks,
    each within one window; a row that itself crosses a border is a block of one."""
    blocks: list[tuple[int, int]] = []
    row = 0
    while row < rows:
        start = offset + row * pitch
        room = window - (start - DATA_OFFSET) % window
        count = min(1 + (room - nbytes) // pitch, rows - row) if nbytes <= room else 1
        blocks.append((row, count))
        row += count
    return blocks


class Copier:
    """Copies between one pinned arena and one device. Used by one thread at a time.

    Attributes (all since the last `begin`):
        staged_bytes: bytes that went through the bounce buffer.
        staged_reason: why, or None while everything could be pinned.
        pinned_new: bytes this copier's requests have registered.
    """

    def __init__(self, device: Device, arena: PinnedArena) -> None:
        self._device = device
        self._arena = arena
        self._bounce: _Bounce | None = None
        self._warned = False
        self.begin()

    def begin(self) -> None:
        """Start counting anew, and try pinning again if it was refused before."""
        self.staged_bytes = 0
        self.staged_reason: str | None = None
        self.pinned_new = 0

    def prepare(self, jobs: Iterable[Job]) -> bool:
        """Pin what the copies touch; False (and `staged_reason`) where that is impossible."""
        ranges = [(offset, nbytes) for _, offset, nbytes in jobs]
        self._arena.check(ranges)  # an error, and no reason to stage
        if self.staged_reason is not None:  # refused a moment ago: ask again only after `begin`
            return all(self._arena.is_pinned(offset, nbytes) for offset, nbytes in ranges)
        try:
            self.pinned_new += self._arena.ensure(ranges)
        except DeviceError as error:
            self.staged_reason = error.message
            if not self._warned:
                log.warning("copying through a bounce buffer, slower than the link: %s", error.message)
                self._warned = True
            return False
        return True

    def split(self, jobs: Iterable[Job]) -> list[Job]:
        """The same copies, cut at the borders of the arena's windows."""
        return split(jobs, self._arena.window)

    def host_address(self, offset: int) -> int:
        """The address of an arena offset for copies by the device, once its window is pinned."""
        return self._arena.address_of(offset)

    def to_device(self, jobs: Sequence[Job], stream: Stream | int) -> None:
        """Copy arena → device in stream order. Asynchronous where pinned; the arena's bytes must stay
        until the stream has been waited for."""
        for part in self._pinnable(self.split(jobs)):
            if self.prepare(part):
                where = self._arena.address_of
                self._enqueue([(address, where(offset), n) for address, offset, n in part], stream)
            else:
                self._staged().to_device(part, self._arena.address, stream)
                self.staged_bytes += sum(n for _, _, n in part)

    def to_arena(self, jobs: Sequence[Job], stream: Stream | int) -> None:
        """Copy device → arena in stream order. Asynchronous where pinned; the source must stay, and the
        arena's bytes are complete, until or once the stream has been waited for."""
        for part in self._pinnable(self.split(jobs)):
            if self.prepare(part):
                where = self._arena.address_of
                self._enqueue([(where(offset), address, n) for address, offset, n in part], stream)
            else:
                self._staged().to_arena(part, self._arena.address, stream)
                self.staged_bytes += sum(n for _, _, n in part)

    def rows_to_arena(
        self, source: int, offset: int, rows: int, nbytes: int, step: int, pitch: int, stream: Stream | int
    ) -> None:
        """Copy `rows` rows of `nbytes` bytes device → arena, `step` bytes apart at `source` and `pitch` bytes
        apart in the arena. As `to_arena`, but one call for all rows of a window."""
        blocks = split_rows(offset, rows, nbytes, pitch, self._arena.window)
        whole = [
            (source + first * step, offset + first * pitch, count) for first, count in blocks if count > 1
        ]
        single = [
            (source + first * step, offset + first * pitch, nbytes) for first, count in blocks if count == 1
        ]
        extents = [(at, start, (count - 1) * pitch + nbytes) for at, start, count in whole]
        if whole and self.prepare(extents):
            with self._device.current():
                for at, start, count in whole:
                    target = self._arena.address_of(start)
                    _copy_2d(at, target, count, nbytes, step, pitch, _handle(stream))
        else:
            single = [
                (at + row * step, start + row * pitch, nbytes)
                for at, start, count in whole
                for row in range(count)
            ] + single
        if single:
            self.to_arena(single, stream)

    def close(self) -> None:
        """Free the bounce buffer, after its copies. Idempotent. The pinned arena belongs to the caller."""
        if self._bounce is not None:
            self._bounce.close()
            self._bounce = None

    def _pinnable(self, jobs: Sequence[Job]) -> Iterator[Sequence[Job]]:
        """The copies in order, cut before each window that must be pinned first: what comes before it is
        under way while that is done."""
        pinned = self._arena.is_pinned
        start = 0
        last = -1
        for i, (_, offset, nbytes) in enumerate(jobs):
            window = (offset - DATA_OFFSET) // self._arena.window
            if window != last and start < i and not pinned(offset, nbytes):
                yield jobs[start:i]
                start = i
            last = window
        if start < len(jobs):
            yield jobs[start:]

    def _staged(self) -> _Bounce:
        if self._bounce is None:
            self._bounce = _Bounce(self._device)
        return self._bounce

    def _enqueue(self, copies: Sequence[tuple[int, int, int]], stream: Stream | int) -> None:
        with self._device.current():
            enqueue(copies, _handle(stream))


def _handle(stream: Stream | int) -> Any:
    return stream.handle if isinstance(stream, Stream) else stream


def _copy_2d(source: int, target: int, rows: int, nbytes: int, step: int, pitch: int, stream: Any) -> None:
    driver = api()
    shape = driver.CUDA_MEMCPY2D()
    shape.srcMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
    shape.srcDevice = source
    shape.srcPitch = step
    shape.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_HOST
    shape.dstHost = target
    shape.dstPitch = pitch
    shape.WidthInBytes = nbytes
    shape.Height = rows
    call("cuMemcpy2DAsync", shape, stream)


def enqueue(copies: Sequence[tuple[int, int, int]], stream: Any) -> None:
    """Submit (destination, source, nbytes) copies between addresses to a stream of the current context."""
    if len(copies) >= BATCH_COUNT and int(stream) > LEGACY_STREAMS and batched_copies():
        enqueue_batch(copies, stream)
    else:
        enqueue_loop(copies, stream)


LEGACY_STREAMS: Final = 2
"""Stream handles up to this are the default streams, which the batched call refuses."""


def enqueue_loop(copies: Sequence[tuple[int, int, int]], stream: Any) -> None:
    copy = api().cuMemcpyAsync
    for target, source, nbytes in copies:
        (code,) = copy(target, source, nbytes, stream)
        if code != 0:
            check("cuMemcpyAsync", code)


def enqueue_batch(copies: Sequence[tuple[int, int, int]], stream: Any) -> None:
    driver = api()
    pointer = driver.CUdeviceptr
    attributes = driver.CUmemcpyAttributes()
    attributes.srcAccessOrder = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
    call(
        "cuMemcpyBatchAsync",
        [pointer(target) for target, _, _ in copies],
        [pointer(source) for _, source, _ in copies],
        [nbytes for _, _, nbytes in copies],
        len(copies),
        [attributes],
        [0],
        1,
        stream,
    )


@functools.cache
def batched_copies() -> bool:
    """Whether bindings and driver have cuMemcpyBatchAsync in the form of CUDA 13."""
    return (
        hasattr(api(), "cuMemcpyBatchAsync")
        and int(call("cuDriverGetVersion")) >= 13000
        and _bindings() >= 13
    )


def _bindings() -> int:
    from cuda.bindings import __version__

    return int(str(__version__).split(".", 1)[0])


class _Bounce:
    """A few pinned slots between pageable host memory and the device; host copies run in threads."""

    def __init__(self, device: Device) -> None:
        self._device = device
        with device.current():
            self._address = int(call("cuMemHostAlloc", SLOT * SLOTS, 0))
        self._events = [Event(device) for _ in range(SLOTS)]
        self._next = 0
        threads = min(STAGING_THREADS, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(threads, "weightstore-staging")
        self._part = -(-SLOT // threads)

    def to_device(self, jobs: Iterable[Job], base: int, stream: Stream | int) -> None:
        for address, offset, nbytes in _chunks(jobs):
            slot, event = self._take()
            self._copy(slot, base + offset, nbytes)
            self._submit(address, slot, nbytes, stream, event)

    def to_arena(self, jobs: Iterable[Job], base: int, stream: Stream | int) -> None:
        landing: list[tuple[Event, int, int, int]] = []
        for address, offset, nbytes in _chunks(jobs):
            if len(landing) == SLOTS:
                self._land(landing.pop(0))
            slot, event = self._take()
            self._submit(slot, address, nbytes, stream, event)
            landing.append((event, base + offset, slot, nbytes))
        for copy in landing:
            self._land(copy)

    def close(self) -> None:
        for event in self._events:
            event.synchronize()
            event.close()
        self._pool.shutdown()
        with self._device.current():
            call("cuMemFreeHost", self._address)

    def _take(self) -> tuple[int, Event]:
        index, self._next = self._next, (self._next + 1) % SLOTS
        self._events[index].synchronize()
        return self._address + index * SLOT, self._events[index]

    def _submit(self, target: int, source: int, nbytes: int, stream: Stream | int, event: Event) -> None:
        with self._device.current():
            enqueue_loop([(target, source, nbytes)], _handle(stream))
            call("cuEventRecord", event.handle, _handle(stream))

    def _land(self, copy: tuple[Event, int, int, int]) -> None:
        event, target, slot, nbytes = copy
        event.synchronize()
        self._copy(target, slot, nbytes)

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        starts = range(0, nbytes, self._part)
        parts = [
            self._pool.submit(_libc.memcpy, target + at, source + at, min(self._part, nbytes - at))
            for at in starts
        ]
        for part in parts:
            part.result()


def _chunks(jobs: Iterable[Job]) -> Iterable[Job]:
    for address, offset, nbytes in jobs:
        for at in range(0, nbytes, SLOT):
            yield address + at, offset + at, min(SLOT, nbytes - at)
