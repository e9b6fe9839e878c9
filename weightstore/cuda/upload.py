"""A trainer's CUDA tensors copied straight into pinned arena memory, asynchronously.

A tensor that already has the target's dtype and memory order is one DMA. Anything else (another dtype, a
transposed or strided view, a target that is a box of a larger tensor) is first gathered on the GPU into a
small scratch buffer in the target's order, piece by piece, and each piece is one DMA.

Streams and lifetimes:
- the gather stream and the copy stream both wait for what the caller's current stream held when `put` was
  called, so whatever produced the tensor there has finished when it is read;
- a source is kept alive until the event after its last copy has passed; sources whose copies are done are let
  go with every group, and `put` waits once `PENDING` bytes are on their way, so that temporaries (an
  all-gathered tensor) do not pile up. A caller that overwrites a source in place must `fence` first;
- a scratch slot is gathered into only after the copy that read it last, and copied only after its gather.

The same slots serve to compare tensors with bytes of the arena on the GPU (`unchanged`): there the copy
stream fills a slot and the gather stream reads it, each after the other's last use of it.

Nothing lands after `drain` (or `close`) returned: a commit calls it first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import torch

from weightstore.cuda import driver
from weightstore.cuda.copies import Copier, Job
from weightstore.cuda.pinning import Mapping, PinnedArena
from weightstore.errors import DeviceError
from weightstore.tensors import bits_of, tiles

SCRATCH: Final = 64 << 20
"""Bytes of one of the two scratch slots; allocated only when something must be gathered."""
PENDING: Final = 4 << 30
"""Bytes that may be on their way before `put` waits."""
GROUP: Final = 256 << 20
"""Bytes of copies covered by one event."""
HEAD: Final = 1 << 20
"""Bytes of a tensor that are compared before all of it is."""

_cuda: Any = (
    torch.cuda
)  # its streams and events are partly untyped, and which parts depends on torch's version


class Strides(NamedTuple):
    """One dimension of a copy: size, and steps in elements in the target and in the source."""

    size: int
    target: int
    source: int


def merge(shape: Sequence[int], target: Sequence[int], source: Sequence[int]) -> list[Strides]:
    """The fewest dimensions that describe copying `source` strides to `target` strides, in the target's
    memory order. Pure. An empty list is a single element; a size of 0 never appears with others."""
    if 0 in shape:
        return [Strides(0, 1, 1)]
    dims = sorted(
        (Strides(*d) for d in zip(shape, target, source, strict=True) if d[0] != 1),
        key=lambda d: (d.target, d.source),
        reverse=True,
    )
    merged: list[Strides] = []
    for dim in dims:
        if merged:
            outer = merged[-1]
            if outer.target == dim.size * dim.target and outer.source == dim.size * dim.source:
                merged[-1] = Strides(outer.size * dim.size, dim.target, dim.source)
                continue
        merged.append(dim)
    return merged


def _has_rows(dims: Sequence[Strides]) -> bool:
    """Whether both sides consist of contiguous rows of the innermost dimension that do not overlap."""
    if not dims:
        return True
    row = dims[-1]
    return row.target == row.source == 1 and all(outer.source >= row.size for outer in dims[:-1])


def _same_bytes(source: torch.Tensor, place: torch.Tensor) -> bool:
    """Whether the copy is one of bytes: equal dtype, and the same elements in the same order, gapless."""
    if source.dtype != place.dtype or source.is_conj() or source.is_neg():
        return False
    return source.is_contiguous() and place.is_contiguous()


class Uploader:
    """Copies from one CUDA device into one writable mapping. Used by one thread at a time.

    Attributes:
        nbytes: bytes handed to `put` so far.
    """

    def __init__(self, mapping: Mapping, device: torch.device) -> None:
        """Raises DeviceError if the device cannot be used, DependencyMissing without cuda-bindings."""
        if not mapping.writable:
            raise DeviceError("tensors can be uploaded only through a writable mapping of the arena")
        ordinal = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", ordinal)
        self.nbytes = 0
        self._driver = driver.device(ordinal)
        self._base = mapping.address
        self._span = mapping.nbytes
        self._arena = PinnedArena.share(mapping, self._driver)
        self._copier = Copier(self._driver, self._arena)
        self._copy = _cuda.Stream(self.device)
        self._gather = _cuda.Stream(self.device)
        self._produced = _cuda.Event()
        self._scratch: list[_Slot] = []
        self._turn = 0
        self._group: list[torch.Tensor] = []
        self._group_bytes = 0
        self._pending: deque[tuple[Any, list[torch.Tensor], int]] = deque()
        self._pending_bytes = 0
        self._closed = False

    @property
    def staged_reason(self) -> str | None:
        """Why copies went through a bounce buffer, or None."""
        return self._copier.staged_reason

    def pin_ahead(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Pin the windows of (offset, nbytes) ranges of the arena in the background."""
        self._arena.pin_ahead(ranges)

    def put(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Enqueue `place.copy_(source)` for each (place, source): a view of the mapping and a tensor on this
        device, of equal shapes.

        The sources are read after the work now on the caller's current stream, and kept alive until then.
        They must not be overwritten before `fence` or `drain`.

        Raises:
            DeviceError: a place is not in the mapping, or the driver refused.
        """
        if self._closed:
            raise DeviceError("the uploader is closed")
        self._retire()
        self._produced.record(torch.cuda.current_stream(self.device))
        self._copy.wait_event(self._produced)
        whole: list[Job] = []
        for place, source in pairs:
            if source.shape != place.shape or source.device != self.device:
                raise DeviceError(
                    f"cannot upload {tuple(source.shape)} on {source.device} to {tuple(place.shape)}: this "
                    f"uploader serves {self.device}"
                )
            nbytes = place.numel() * place.element_size()
            if not nbytes:
                continue
            source = source.detach()
            if _same_bytes(source, place):
                whole.append((source.data_ptr(), self._offset(place), nbytes))
            elif not self._direct(source, place):
                self._gathered(source, place)
            self._group.append(source)
            self._group_bytes += nbytes
            self.nbytes += nbytes
            if self._group_bytes >= GROUP:
                self._submit(whole)
        self._submit(whole)

    def unchanged(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[bool]:
        """For each (place in the mapping, source on this device), equal in shape: does the place hold the
        bits that `put` would give it? Sources are not read back; nothing is under way on return.

        The head of every tensor is compared first: after a training step that settles nearly all of them.

        Raises:
            DeviceError: a place is not in the mapping, or the driver refused.
        """
        found = self._compare(pairs, HEAD)
        alike = [number for number, equal in enumerate(found) if equal]
        for number, equal in zip(alike, self._compare([pairs[n] for n in alike], 0), strict=True):
            found[number] = equal
        return found

    def fence(self) -> None:
        """Have later work on the caller's current stream wait for everything put so far, so that sources may
        be overwritten there."""
        fence = _cuda.Event()
        fence.record(self._copy)  # which has waited for every gather
        torch.cuda.current_stream(self.device).wait_event(fence)

    def drain(self) -> None:
        """Wait until everything put so far has landed, and let go of the sources.

        Raises:
            DeviceError: a copy failed; what the targets hold is undefined.
        """
        self._group, self._group_bytes = [], 0
        try:
            with self._driver.current():
                driver.call("cuStreamSynchronize", self._gather.cuda_stream)
                driver.call("cuStreamSynchronize", self._copy.cuda_stream)
        finally:
            # On failure the context is lost and nothing reads the sources any more.
            self._pending.clear()
            self._pending_bytes = 0

    def close(self) -> None:
        """Drain, free the scratch buffers and end this user's share of the pinned arena. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            self.drain()
        finally:
            self._scratch.clear()
            self._copier.close()
            self._arena.close()

    # -- copies --------------------------------------------------------------------------------------

    def _direct(self, source: torch.Tensor, target: torch.Tensor) -> bool:
        """DMA from the source itself, if its rows are the target's rows."""
        if source.dtype != target.dtype or source.is_conj() or source.is_neg():
            return False
        dims = merge(source.shape, target.stride(), source.stride())
        if not _has_rows(dims):
            return False
        self._rows(dims, source.data_ptr(), self._offset(target), source.element_size())
        return True

    def _gathered(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """DMA from scratch slots into which the source is gathered in the target's memory order and dtype."""
        order = sorted(range(target.dim()), key=target.stride, reverse=True)
        source, target = source.permute(order), target.permute(order)
        self._gather.wait_event(self._produced)
        for tile in tiles(target.shape, SCRATCH // target.element_size()):
            part = target[tile]
            slot = self._slot()
            self._gather.wait_event(slot.copied)
            with torch.cuda.device(self.device), torch.cuda.stream(self._gather):
                flat = slot.buffer[: part.numel() * part.element_size()].view(part.dtype)
                dense = flat.view(part.shape)
                dense.copy_(source[tile])
            slot.filled.record(self._gather)
            self._copy.wait_event(slot.filled)
            dims = merge(part.shape, part.stride(), dense.stride())
            self._rows(dims, dense.data_ptr(), self._offset(part), part.element_size())
            slot.copied.record(self._copy)

    def _compare(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], head: int) -> list[bool]:
        """As `unchanged`, of the first `head` bytes only unless that is 0."""
        self._produced.record(torch.cuda.current_stream(self.device))
        self._gather.wait_event(self._produced)
        with torch.no_grad(), torch.cuda.device(self.device), torch.cuda.stream(self._gather):
            differs = torch.zeros(len(pairs), dtype=torch.bool, device=self.device)
            for number, (place, source) in enumerate(pairs):
                if not place.numel():
                    continue
                order = sorted(range(place.dim()), key=place.stride, reverse=True)
                place, source = place.permute(order), source.permute(order)
                for tile in tiles(place.shape, (head or SCRATCH) // place.element_size()):
                    part = place[tile]
                    slot = self._slot()
                    flat = slot.buffer[: part.numel() * part.element_size()]
                    self._copy.wait_event(slot.filled)
                    self._copier.to_device(
                        [(flat.data_ptr(), self._offset(part), flat.numel())], self._copy.cuda_stream
                    )
                    slot.copied.record(self._copy)
                    self._gather.wait_event(slot.copied)
                    there = bits_of(flat.view(part.dtype).view(part.shape))
                    differs[number] |= (there != bits_of(source[tile].to(part.dtype))).any()
                    slot.filled.record(self._gather)
                    if head:
                        break
            return [not different for different in differs.tolist()]

    def _rows(self, dims: Sequence[Strides], source: int, offset: int, item: int) -> None:
        """Enqueue the copies of `dims` from a source whose rows are contiguous."""
        if dims and (dims[-1].target != 1 or dims[-1].source != 1):
            dims = [*dims, Strides(1, 1, 1)]  # rows of one element, as in a single column of a matrix
        stream = self._copy.cuda_stream
        if len(dims) <= 1:
            nbytes = (dims[0].size if dims else 1) * item
            self._copier.to_arena([(source, offset, nbytes)], stream)
        elif len(dims) == 2:
            rows, row = dims
            self._copier.rows_to_arena(
                source, offset, rows.size, row.size * item, rows.source * item, rows.target * item, stream
            )
        else:
            outer = dims[0]
            for i in range(outer.size):
                self._rows(dims[1:], source + i * outer.source * item, offset + i * outer.target * item, item)

    def _offset(self, target: torch.Tensor) -> int:
        offset = target.data_ptr() - self._base
        if not 0 <= offset < self._span:
            raise DeviceError("the target of an upload does not lie in the arena")
        return offset

    def _slot(self) -> _Slot:
        if not self._scratch:
            self._scratch = [_Slot(self.device, self._gather) for _ in range(2)]
        self._turn = 1 - self._turn
        return self._scratch[self._turn]

    # -- lifetimes -----------------------------------------------------------------------------------

    def _submit(self, whole: list[Job]) -> None:
        """Enqueue the copies collected in `whole`, in one request, and remember the group's sources."""
        if whole:
            self._copier.to_arena(whole, self._copy.cuda_stream)
            whole.clear()
        if self._group_bytes >= GROUP:
            event = _cuda.Event()
            event.record(self._copy)  # the copy stream has waited for every gather of the group
            self._pending.append((event, self._group, self._group_bytes))
            self._pending_bytes += self._group_bytes
            self._group, self._group_bytes = [], 0
            self._retire()

    def _retire(self) -> None:
        """Let go of sources whose copies are done; wait for the oldest if too many bytes are on their way."""
        while self._pending:
            event, _, nbytes = self._pending[0]
            if not event.query():
                if self._pending_bytes < PENDING:
                    return
                event.synchronize()
            self._pending.popleft()
            self._pending_bytes -= nbytes


class _Slot:
    """One scratch buffer, the event after its last gather and the event after its last copy."""

    def __init__(self, device: torch.device, gather: Any) -> None:
        self.buffer = torch.empty(SCRATCH, dtype=torch.uint8, device=device)
        # The allocator's memory may come with work pending on the current stream.
        gather.wait_stream(torch.cuda.current_stream(device))
        self.filled = _cuda.Event()
        self.copied = _cuda.Event()
