"""The CUDA device backend: images in GPU virtual memory, filled from the pinned arena at link speed.

Ordering, and who may do what meanwhile:
- `wake` is a pipeline of one thread: map a piece, enqueue its copies on a stream of our own, go on to the
  next piece while the copies run. Mapping never waits for copies. At its start a kernel copies beside
  the engine (`cuda_assist` says why). It returns when the last copy has landed, so any kernel launched
  later, on any stream, sees the bytes.
- `update` first waits for the whole device, so work submitted so far has read its last old byte, on
  whatever stream. The copies then go to the legacy default stream, so work submitted meanwhile to it or to
  a stream that synchronises with it runs after them; and the call returns when they have landed. What
  CUDA cannot order is another thread submitting to a non-blocking stream during the call: the hook
  keeps forwards out for that long.
- `unmap` waits for the whole device before the memory goes: kernels of any stream may still be reading it.

Invariants:
- a failed `wake` leaves no image mapped that it found unmapped, after its copies have ended;
- windows are pinned before copies of them are enqueued, and unpinned only at `close`, after a wait for
  the device (`weightstore.cuda.pinning`).
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, cast

import torch

from engine_hooks.backend import Image, Meanwhile, Run
from engine_hooks.cuda_assist import VECTOR, assist
from engine_hooks.cuda_compare import differing_runs
from engine_hooks.cuda_image import CudaImage, granularity
from weightstore.cuda import driver
from weightstore.cuda.copies import Copier, Job
from weightstore.cuda.pinning import PinnedArena
from weightstore.errors import DeviceError, DeviceMemoryError, UsageError
from weightstore.mapping import ArenaMapping
from weightstore.sizes import format_size

PIECE: Final = 2 << 30
"""Bytes mapped at once: 256 MiB to 2 GiB wake equally fast, and large pieces are unmapped faster."""
FIRST_PIECE: Final = 128 << 20
"""Bytes of a wake's first piece, so that copies begin soon; each that follows is twice the one before."""
LEAD: Final = 6 << 30
"""Bytes submitted before a caller's own work is done: a tenth of a second in which copies go on without us.
At the end it would come too late where windows are pinned in the background: the last of them ends a wake."""
ASSIST_BYTES: Final = 6 << 30
"""Bytes at the start of a wake that engine and kernel copy side by side: about what the driver scrubs
meanwhile, if the memory was freed just before."""
ASSIST_BLOCKS: Final = 16
"""Blocks of the copy kernel: enough for half of the link."""


class Transfer(NamedTuple):
    """What the last wake or update moved, for reports."""

    copied_bytes: int
    pinned_bytes: int
    staged_bytes: int
    staged_reason: str | None


@dataclass
class _Pace:
    """How a wake goes on: bytes to map next, bytes that engine and kernel still copy side by side, and bytes
    still to submit before `meanwhile`, if that has not been called."""

    piece: int
    beside: int
    lead: int
    meanwhile: Meanwhile | None

    def call_meanwhile(self) -> None:
        call, self.meanwhile = self.meanwhile, None
        if call is not None:
            call()


class _Source(NamedTuple):
    mapping: ArenaMapping
    arena: PinnedArena
    copier: Copier


class CudaBackend:
    """`engine_hooks.backend.DeviceBackend` for one GPU. Used by one thread at a time.

    Attributes:
        transfer: what the last wake or update moved.
    """

    def __init__(
        self,
        device: torch.device | int = 0,
        *,
        piece: int = PIECE,
        assist_bytes: int = ASSIST_BYTES,
        assist_blocks: int = ASSIST_BLOCKS,
    ) -> None:
        """Raises DeviceError if the GPU cannot be used, DependencyMissing without cuda-bindings."""
        index = device if isinstance(device, int) else cast("int | None", device.index)
        ordinal = torch.cuda.current_device() if index is None else index
        self._device = driver.device(ordinal)
        if not self._device.attribute("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED"):
            raise DeviceError(f"{self._device.name} has no virtual memory management; use device='cpu'")
        self._piece = max(piece // granularity(self._device), 1) * granularity(self._device)
        self._stream = driver.Stream(self._device)
        self._beside = driver.Stream(self._device)
        self._assist = assist(self._device)
        self._assist_bytes, self._assist_blocks = assist_bytes, assist_blocks
        self._images: list[CudaImage] = []
        self._source: _Source | None = None
        self._choosing = threading.Lock()
        """Held while `_source` changes: `pin_ahead` may be called by any thread."""
        self._closed = False
        self.transfer = Transfer(0, 0, 0, None)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self._device.ordinal)

    def reserve(self, nbytes: int) -> CudaImage:
        self._check_open()
        image = CudaImage(self._device, nbytes)
        self._images.append(image)
        return image

    def wake(
        self,
        fills: Sequence[tuple[Image, Sequence[Run]]],
        source: ArenaMapping,
        meanwhile: Meanwhile | None = None,
    ) -> None:
        self._check_open()
        todo = [(self._own(image), sorted(runs, key=lambda run: run.target)) for image, runs in fills]
        asleep = [image for image, _ in todo if not image.mapped]
        self._require_memory(asleep)
        copier = self._copier(source)
        if len(asleep) < len(todo):
            self._device.synchronize()  # kernels may still read the images that stayed mapped
        try:
            with self._device.current():
                beside = self._assist_bytes if self._assist.ready else 0
                pace = _Pace(min(FIRST_PIECE, self._piece), beside, LEAD, meanwhile)
                for image, runs in todo:
                    self._fill(image, runs, copier, pace)
                pace.call_meanwhile()
                self._stream.synchronize()
                self._beside.synchronize()
        except BaseException as error:
            self._roll_back(asleep, error)
            raise
        self._note(copier, todo)

    def update(
        self,
        fills: Sequence[tuple[Image, Sequence[Run]]],
        source: ArenaMapping,
        meanwhile: Meanwhile | None = None,
    ) -> None:
        self._check_open()
        todo = [(self._own(image), runs) for image, runs in fills]
        if any(not image.mapped for image, _ in todo):
            raise UsageError("an image must be mapped to be updated; wake it instead")
        copier = self._copier(source)
        jobs = [job for image, runs in todo for job in _jobs(image, runs)]
        copier.prepare(jobs)  # first, since registering memory may take long
        self._device.synchronize()
        copier.to_device(jobs, driver.LEGACY_STREAM)
        try:
            if meanwhile is not None:
                meanwhile()
        finally:
            with self._device.current():
                driver.call("cuStreamSynchronize", driver.LEGACY_STREAM)
        self._note(copier, todo)

    def unmap(self, images: Sequence[Image]) -> None:
        mapped = [image for image in map(self._own, images) if image.mapped_bytes]
        if not mapped:
            return
        self._device.synchronize()
        for image in mapped:
            image.unmap()
        if self._assist_bytes:
            self._assist.load()

    def differing(self, image: Image, runs: Sequence[Run], source: ArenaMapping) -> list[Run]:
        self._check_open()
        own = self._own(image)
        if not own.mapped:
            raise UsageError("an image must be mapped to be compared")
        copier = self._copier(source)
        self._device.synchronize()  # whoever wrote the image last, on whatever stream
        return differing_runs(own.tensor(), runs, copier, self._device)

    def memory_in_use(self) -> int:
        free, total = self._device.memory()
        return total - free

    def pin_ahead(self, source: ArenaMapping, ranges: Iterable[tuple[int, int]]) -> None:
        """Register the windows of these (offset, nbytes) ranges in the background. Once anything was copied
        from an arena, those of another are left to the first copy from it."""
        with self._choosing:
            if self._closed:
                return
            if self._source is None:
                self._source = self._open_source(source)
            if self._source.mapping is source:
                self._source.arena.pin_ahead(ranges)

    def close(self) -> None:
        if self._closed:
            return
        with self._choosing:
            self._closed = True
            last, self._source = self._source, None
        self._device.synchronize()
        for image in self._images:
            image.close()
        self._images.clear()
        if last is not None:
            _close_source(last)
        self._stream.close()
        self._beside.close()

    # -- internals -----------------------------------------------------------------------------------

    def _fill(self, image: CudaImage, runs: Sequence[Run], copier: Copier, pace: _Pace) -> None:
        """Map what is unmapped and enqueue the copies, piece by piece. `runs` are sorted by target."""
        if image.mapped:
            copier.to_device(list(_jobs(image, runs)), self._stream)
            return
        targets = [run.target for run in runs]
        while image.mapped_bytes < image.nbytes:
            start, end = image.map_next(pace.piece)
            pace.piece = min(2 * pace.piece, self._piece)
            # The run before the first that starts here may reach into this piece.
            first = max(bisect.bisect_left(targets, start) - 1, 0)
            last = bisect.bisect_left(targets, end)
            jobs = list(_jobs(image, _clip(runs[first:last], start, end)))
            if pace.beside > 0:
                jobs, taken = self._share(jobs, copier)
                pace.beside -= taken
            copier.to_device(jobs, self._stream)
            pace.lead -= end - start
            if pace.lead <= 0:
                pace.call_meanwhile()

    def _share(self, jobs: Sequence[Job], copier: Copier) -> tuple[list[Job], int]:
        """Give the kernel half of each copy, where it can; what is left for the engine, and bytes shared."""
        rest: list[Job] = []
        shared = 0
        for address, offset, nbytes in copier.split(jobs):
            half = nbytes // 2 // VECTOR * VECTOR
            if (
                address % VECTOR
                or offset % VECTOR
                or not half
                or not copier.prepare([(address, offset, half)])
            ):
                rest.append((address, offset, nbytes))
                continue
            source = copier.host_address(offset)
            self._assist.copy(address, source, half, self._beside.handle, self._assist_blocks)
            rest.append((address + half, offset + half, nbytes - half))
            shared += nbytes
        return rest, shared

    def _roll_back(self, images: Sequence[CudaImage], error: BaseException) -> None:
        try:
            self._device.synchronize()  # copies already enqueued write to the pieces mapped so far
            for image in images:
                image.unmap()
        except DeviceError as undo:
            raise DeviceError(f"{error}; and unmapping after it failed: {undo.message}") from error

    def _require_memory(self, asleep: Sequence[CudaImage]) -> None:
        needed = sum(image.nbytes - image.mapped_bytes for image in asleep)
        free, total = self._device.memory()
        if needed <= free:
            return
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        raise DeviceMemoryError(
            f"waking needs {format_size(needed)} of memory on {self.device} ({self._device.name}), but only "
            f"{format_size(free)} of {format_size(total)} are free (this process's torch caches "
            f"{format_size(cached)} it does not use: torch.cuda.empty_cache() frees that). Free memory and "
            "wake again",
            needed=needed,
            free=free,
            total=total,
            torch_cached=cached,
        )

    def _copier(self, source: ArenaMapping) -> Copier:
        """The copier for `source`; letting go of the arena before it, if that was another."""
        while True:
            with self._choosing:
                last = self._source
                if last is None:
                    last = self._source = self._open_source(source)
                if last.mapping is source:
                    last.copier.begin()
                    return last.copier
                self._source = None
            _close_source(last)  # which takes long; `pin_ahead` is not to wait for it

    def _open_source(self, mapping: ArenaMapping) -> _Source:
        arena = PinnedArena.share(mapping, self._device)
        return _Source(mapping, arena, Copier(self._device, arena))

    def _note(self, copier: Copier, todo: Iterable[tuple[CudaImage, Sequence[Run]]]) -> None:
        copied = sum(run.nbytes for _, runs in todo for run in runs)
        self.transfer = Transfer(copied, copier.pinned_new, copier.staged_bytes, copier.staged_reason)

    def _own(self, image: Image) -> CudaImage:
        if not isinstance(image, CudaImage) or image not in self._images:
            raise UsageError("the image was not reserved by this backend, or the backend is closed")
        return image

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the backend is closed")


def _close_source(source: _Source) -> None:
    source.copier.close()
    source.arena.close()


def _jobs(image: CudaImage, runs: Iterable[Run]) -> Iterable[Job]:
    return ((image.address + target, source, nbytes) for source, target, nbytes in runs)


def _clip(runs: Iterable[Run], start: int, end: int) -> Iterable[Run]:
    """The parts of the runs whose targets lie in [start, end)."""
    for source, target, nbytes in runs:
        skip = max(start - target, 0)
        stop = min(target + nbytes, end) - target
        if skip < stop:
            yield Run(source + skip, target + skip, stop - skip)
