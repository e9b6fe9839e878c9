"""Which bytes of a growing range are free: best fit, with coalescing.

Pure bookkeeping over offsets; the caller owns the memory. Invariants, checked by the tests:
- blocks handed out never overlap, start at multiples of `align` and lie inside the managed range;
- free blocks are maximal (no two touch), so ``free_bytes + used_bytes == size`` always;
- a call that raises has changed nothing.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

from weightstore.types import ALIGN, Extent, align_up


class NoSpace(Exception):
    """The free space cannot hold the request; growing by `shortfall` bytes would.

    Internal: the store turns it into more committed windows or into ArenaFull.
    """

    def __init__(self, needed: int, shortfall: int) -> None:
        super().__init__(f"{needed} bytes needed, {shortfall} more than the free space can hold")
        self.needed = needed
        self.shortfall = shortfall


class Allocator:
    """Hands out extents of ``[start, start + size)``; the range grows at its end."""

    def __init__(self, start: int, size: int = 0, align: int = ALIGN) -> None:
        if start % align:
            raise ValueError(f"start {start} is not a multiple of {align}")
        self.start = start
        self.align = align
        self.size = 0
        self._starts: list[int] = []
        self._blocks: dict[int, int] = {}
        self.free_bytes = 0
        self.grow(size)

    @property
    def end(self) -> int:
        return self.start + self.size

    @property
    def used_bytes(self) -> int:
        return self.size - self.free_bytes

    @property
    def largest_free(self) -> int:
        return max(self._blocks.values(), default=0)

    def free_blocks(self) -> list[Extent]:
        return [Extent(s, self._blocks[s]) for s in self._starts]

    def grow(self, nbytes: int) -> None:
        """Append `nbytes` (a multiple of the alignment) of free space to the range."""
        if nbytes < 0 or nbytes % self.align:
            raise ValueError(f"cannot grow by {nbytes}: not a multiple of {self.align}")
        if nbytes:
            end = self.end
            self.size += nbytes
            self._insert(end, nbytes)

    def reserve(self, sizes: Sequence[int]) -> list[Extent]:
        """One extent per size, in the order given, contiguous where any free block can hold them all.

        Empty sizes get an empty extent at the range's start, which need not be released.

        Raises:
            NoSpace: the free blocks cannot hold the sizes.
        """
        spans = [align_up(n, self.align) for n in sizes]
        total = sum(spans)
        if total == 0:
            return [Extent(self.start, 0) for _ in sizes]
        block = self._best_fit(total)
        places = self._contiguous(block, spans) if block is not None else self._scattered(spans)
        if places is None:
            raise NoSpace(total, self.shortfall(total))
        for offset, span in _merged(list(zip(places, spans, strict=True))):
            self._take(offset, span)
        return [Extent(p if n else self.start, n) for p, n in zip(places, sizes, strict=True)]

    def shortfall(self, total: int) -> int:
        """Bytes to grow by so that `total` bytes fit contiguously at the end of the range."""
        total = align_up(total, self.align)
        tail = 0
        if self._starts:
            last = self._starts[-1]
            if last + self._blocks[last] == self.end:
                tail = self._blocks[last]
        return max(0, total - tail)

    def claim(self, extents: Iterable[Extent]) -> None:
        """Mark ranges that must be free now as used (when a catalog is recovered).

        Raises:
            ValueError: a range is not wholly free. Ranges before it stay claimed.
        """
        for offset, span in _merged([(e.offset, align_up(e.nbytes, self.align)) for e in extents]):
            self._take(offset, span)

    def release(self, extents: Iterable[Extent]) -> None:
        """Give extents back.

        Raises:
            ValueError: an extent is not wholly in use (our own bug). Nothing is released.
        """
        ranges = _merged([(e.offset, align_up(e.nbytes, self.align)) for e in extents])
        for offset, span in ranges:
            i = bisect_left(self._starts, offset)
            before = self._starts[i - 1] if i else None
            clash = (before is not None and before + self._blocks[before] > offset) or (
                i < len(self._starts) and self._starts[i] < offset + span
            )
            if clash or offset < self.start or offset + span > self.end:
                raise ValueError(f"range {offset}+{span} is not in use")
        for offset, span in ranges:
            self._insert(offset, span)

    # -- internals ----------------------------------------------------------------------------------

    def _best_fit(self, total: int) -> int | None:
        fitting = ((size, start) for start, size in self._blocks.items() if size >= total)
        best = min(fitting, default=None)
        return None if best is None else best[1]

    @staticmethod
    def _contiguous(offset: int, spans: Sequence[int]) -> list[int]:
        places = []
        for span in spans:
            places.append(offset)
            offset += span
        return places

    def _scattered(self, spans: Sequence[int]) -> list[int] | None:
        """Fill the largest blocks first, keeping neighbours together where they fit."""
        if sum(spans) > self.free_bytes:
            return None
        places = [self.start] * len(spans)
        waiting = [i for i, span in enumerate(spans) if span]
        for start, size in sorted(self._blocks.items(), key=lambda block: -block[1]):
            offset, left, passed = start, size, []
            for i in waiting:
                if spans[i] <= left:
                    places[i] = offset
                    offset += spans[i]
                    left -= spans[i]
                else:
                    passed.append(i)
            waiting = passed
            if not waiting:
                return places
        return None

    def _take(self, offset: int, span: int) -> None:
        i = bisect_left(self._starts, offset + 1) - 1
        start = self._starts[i] if i >= 0 else -1
        size = self._blocks.get(start, 0)
        if start < 0 or offset + span > start + size:
            raise ValueError(f"range {offset}+{span} is not free")
        del self._starts[i], self._blocks[start]
        if start < offset:
            insort(self._starts, start)
            self._blocks[start] = offset - start
        if offset + span < start + size:
            insort(self._starts, offset + span)
            self._blocks[offset + span] = start + size - offset - span
        self.free_bytes -= span

    def _insert(self, offset: int, span: int) -> None:
        self.free_bytes += span
        i = bisect_left(self._starts, offset)
        if i < len(self._starts) and self._starts[i] == offset + span:
            span += self._blocks.pop(self._starts.pop(i))
        if i and self._starts[i - 1] + self._blocks[self._starts[i - 1]] == offset:
            self._blocks[self._starts[i - 1]] += span
            return
        self._starts.insert(i, offset)
        self._blocks[offset] = span


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Non-empty (offset, span) ranges, sorted, with touching ones joined: fewer list operations."""
    merged: list[tuple[int, int]] = []
    start = end = -1
    for offset, span in sorted(ranges):
        if span and offset == end:
            end += span
        elif span:
            if end > start:
                merged.append((start, end - start))
            start, end = offset, offset + span
    if end > start:
        merged.append((start, end - start))
    return merged
