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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import torch

from engine_hooks.backend import Image, Meanwhile, Run
from weightstore.bulk import Span, copy_spans, each
from weightstore.errors import DeviceError, DeviceMemoryError
from weightstore.mapping import ArenaMapping
from weightstore.types import align_up

_PAGE: Final = mmap.PAGESIZE
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
    """`DeviceBackend` on the CPU. Copies and comparisons run on `threads` threads (None: by the cores)."""

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        self._images: list[HostImage] = []
        self._closed = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def reserve(self, nbytes: int) -> HostImage:
        self._check_open()
        image = HostImage(nbytes)
        self._images.append(image)
        return image

    def wake(
        self,
        fills: Sequence[tuple[Image, Sequence[Run]]],
        source: ArenaMapping,
        meanwhile: Meanwhile | None = None,
    ) -> None:
        self._check_open()
        owned = [(self._own(image), runs) for image, runs in fills]
        fresh = [image for image, _ in owned if not image.mapped]
        _check_available(sum(image.nbytes for image in fresh))
        for image in fresh:
            image.mapped = True  # its pages come as they are written
        try:
            self._copy(owned, source)
            if meanwhile is not None:
                meanwhile()
        except BaseException:
            for image in fresh:
                image.drop()
            raise

    def update(
        self,
        fills: Sequence[tuple[Image, Sequence[Run]]],
        source: ArenaMapping,
        meanwhile: Meanwhile | None = None,
    ) -> None:
        self._check_open()
        owned = [(self._own(image), runs) for image, runs in fills]
        if any(not image.mapped for image, _ in owned):
            raise DeviceError("update of an image that is not mapped")
        self._copy(owned, source)
        if meanwhile is not None:
            meanwhile()

    def pin_ahead(self, source: ArenaMapping, ranges: Iterable[tuple[int, int]]) -> None:
        """Host memory is copied as it is."""

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

        def compare(span: Span) -> None:
            if _memcmp(span.target, span.source, span.nbytes):
                unequal.add(span.number)

        each(_spans([(own, runs)], source), compare, self._threads)
        return [run for index, run in enumerate(runs) if index in unequal]

    def memory_in_use(self) -> int:
        """This process's resident set in bytes, pages of the mapped arena included."""
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.unmap(self._images)
            self._images.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise DeviceError("the host backend is closed")

    def _own(self, image: Image) -> HostImage:
        if not isinstance(image, HostImage):
            raise DeviceError(f"a {type(image).__name__} is not an image of the host backend")
        return image

    def _copy(self, fills: Sequence[tuple[HostImage, Sequence[Run]]], source: ArenaMapping) -> None:
        copy_spans(_spans(fills, source), self._threads)


def _spans(fills: Sequence[tuple[HostImage, Sequence[Run]]], source: ArenaMapping) -> list[Span]:
    """The runs by address; `number` counts each image's runs. Raises DeviceError if one leaves its memory."""
    spans = []
    for image, runs in fills:
        for index, (offset, target, nbytes) in enumerate(runs):
            if min(offset, target) < 0 or target + nbytes > image.nbytes or offset + nbytes > source.nbytes:
                raise DeviceError(
                    f"a run of {nbytes} bytes from {offset} to {target} leaves the arena "
                    f"({source.nbytes} bytes) or the image ({image.nbytes} bytes)"
                )
            spans.append(Span(index, image.address + target, source.address + offset, nbytes))
    return spans


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
