"""The host device: images in anonymous memory, for engines on the CPU and for tests without a GPU.

Memory behaviour this relies on (madvise(2), mmap(2)):
- MADV_DONTNEED on a private anonymous mapping frees its pages at once, so the resident set really
  falls, and the range reads as zeros until it is written again;
- the address range itself stays reserved until the mapping goes, and a mapping cannot go while a
  tensor over it lives (the tensor holds the mmap object).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Final

import torch

from engine_hooks.backend import Image, Run
from weightstore.errors import DeviceError, DeviceMemoryError
from weightstore.mapping import ArenaMapping
from weightstore.types import align_up

_PAGE: Final = mmap.PAGESIZE
_PIECE: Final = 16 << 20
"""Bytes one task copies: long enough to hide the hand-over, short enough to spread over threads."""

_FLAGS: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
"""With MAP_NORESERVE (Python names it from 3.11 on): reserving addresses promises no memory."""

_libc = ctypes.CDLL(None, use_errno=True)
_memcmp = _libc.memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcmp.restype = ctypes.c_int


class HostImage:
    """One private anonymous mapping. `mapped` says whether its bytes mean anything."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = align_up(max(nbytes, 1), _PAGE)
        try:
            self._memory = mmap.mmap(-1, self.nbytes, flags=_FLAGS)
        except (OSError, ValueError, OverflowError) as error:
            raise DeviceError(f"cannot reserve {self.nbytes} bytes of address space: {error}") from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                self._memory.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                pass  # a kernel built without transparent huge pages: 4 KiB pages do as well
        self._tensor = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.address = self._tensor.data_ptr()
        self.mapped = False

    def tensor(self) -> torch.Tensor:
        return self._tensor

    def drop(self) -> None:
        """Give the pages back; the addresses stay."""
        self.mapped = False
        try:
            self._memory.madvise(mmap.MADV_DONTNEED)
        except OSError as error:
            raise DeviceError(f"madvise(MADV_DONTNEED) of {self.nbytes} bytes failed: {error}") from error


class HostBackend:
    """`DeviceBackend` on the CPU. Copies and comparisons run on `threads` threads, outside the GIL."""

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or min(8, len(os.sched_getaffinity(0)))
        self._images: list[HostImage] = []
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def reserve(self, nbytes: int) -> HostImage:
        self._check_open()
        image = HostImage(nbytes)
        self._images.append(image)
        return image

    def wake(self, fills: Sequence[tuple[Image, Sequence[Run]]], source: ArenaMapping) -> None:
        self._check_open()
        owned = [(self._own(image), runs) for image, runs in fills]
        fresh = [image for image, _ in owned if not image.mapped]
        _check_available(sum(image.nbytes for image in fresh))
        for image in fresh:
            image.mapped = True  # its pages come as they are written
        try:
            self._copy(owned, source)
        except BaseException:
            for image in fresh:
                image.drop()
            raise

    def update(self, fills: Sequence[tuple[Image, Sequence[Run]]], source: ArenaMapping) -> None:
        self._check_open()
        owned = [(self._own(image), runs) for image, runs in fills]
        if any(not image.mapped for image, _ in owned):
            raise DeviceError("update of an image that is not mapped")
        self._copy(owned, source)

    def unmap(self, images: Sequence[Image]) -> None:
        for image in images:
            own = self._own(image)
            if own.mapped:
                own.drop()

    def differing(self, image: Image, runs: Sequence[Run], source: ArenaMapping) -> list[Run]:
        self._check_open()
        own = self._own(image)
        if not own.mapped:
            raise DeviceError("comparison with an image that is not mapped")
        unequal: set[int] = set()

        def compare(index: int, target: int, address: int, nbytes: int) -> None:
            if _memcmp(target, address, nbytes):
                unequal.add(index)

        self._each_piece([(own, runs)], source, compare)
        return [run for index, run in enumerate(runs) if index in unequal]

    def memory_in_use(self) -> int:
        """This process's resident set in bytes, pages of the mapped arena included."""
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.unmap(self._images)
            self._images.clear()
            if self._pool is not None:
                self._pool.shutdown()

    def _check_open(self) -> None:
        if self._closed:
            raise DeviceError("the host backend is closed")

    def _own(self, image: Image) -> HostImage:
        if not isinstance(image, HostImage):
            raise DeviceError(f"a {type(image).__name__} is not an image of the host backend")
        return image

    def _copy(self, fills: Sequence[tuple[HostImage, Sequence[Run]]], source: ArenaMapping) -> None:
        def copy(index: int, target: int, address: int, nbytes: int) -> None:
            ctypes.memmove(target, address, nbytes)

        self._each_piece(fills, source, copy)

    def _each_piece(
        self,
        fills: Sequence[tuple[HostImage, Sequence[Run]]],
        source: ArenaMapping,
        work: Callable[[int, int, int, int], None],
    ) -> None:
        """Do `work(run index, target address, source address, nbytes)` for every piece, and wait.

        Pieces go to the threads; small runs are batched so that a task is never tiny. ctypes lets go of
        the GIL during each call.
        """
        batches: list[list[tuple[int, int, int, int]]] = [[]]
        room = _PIECE
        for image, runs in fills:
            for index, (offset, target, nbytes) in enumerate(runs):
                if (
                    min(offset, target) < 0
                    or target + nbytes > image.nbytes
                    or offset + nbytes > source.nbytes
                ):
                    raise DeviceError(
                        f"a run of {nbytes} bytes from {offset} to {target} leaves the arena "
                        f"({source.nbytes} bytes) or the image ({image.nbytes} bytes)"
                    )
                done = 0
                while done < nbytes:
                    step = min(nbytes - done, room)
                    batches[-1].append(
                        (index, image.address + target + done, source.address + offset + done, step)
                    )
                    done += step
                    room -= step
                    if not room:
                        batches.append([])
                        room = _PIECE

        def run_batch(batch: list[tuple[int, int, int, int]]) -> None:
            for piece in batch:
                work(*piece)

        if len(batches) == 1 or self._threads == 1:
            for batch in batches:
                run_batch(batch)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="weightstore-host")
        tasks: list[Future[None]] = [self._pool.submit(run_batch, batch) for batch in batches]
        wait(tasks)  # all of them, also if one failed: none may still touch the memory afterwards
        for task in tasks:
            task.result()


def _check_available(nbytes: int) -> None:
    """Raise DeviceMemoryError if the host plainly lacks `nbytes`: better than the OOM killer."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            if nbytes > available:
                raise DeviceMemoryError(
                    f"{nbytes} bytes to map, but only {available} bytes of host memory are available; the "
                    "engine stays asleep, free memory and wake again",
                    wanted=nbytes,
                    available=available,
                )
