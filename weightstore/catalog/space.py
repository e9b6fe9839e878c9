"""Whose every byte of the data area is.

Invariants: free + reachable + pending + quarantined = committed; no extent is in two hands; an
extent shared by several versions is counted once and freed with the last of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weightstore.allocator import Allocator
from weightstore.catalog.writers import Writer
from weightstore.types import ALIGN, Extent


@dataclass(frozen=True)
class Usage:
    """Bytes of the committed data area by hand."""

    committed: int
    free: int
    reachable: int
    pending: int
    quarantined: int
    largest_free: int


@dataclass
class Debt:
    """Extents of refit `refit` (0: of a version that was overwritten in place) that come back once none of
    `holdouts` can still be writing to them."""

    refit: int
    extents: tuple[Extent, ...]
    holdouts: set[Writer]


class Space:
    def __init__(self, start: int, committed: int = 0) -> None:
        self._allocator = Allocator(start, committed)
        self._references: dict[Extent, int] = {}
        self._reachable = 0
        self._pending = 0
        self.debts: list[Debt] = []

    # -- growth and accounting ---------------------------------------------------------------------

    @property
    def committed(self) -> int:
        return self._allocator.size

    def grow(self, nbytes: int) -> None:
        self._allocator.grow(nbytes)

    def usage(self) -> Usage:
        return Usage(
            committed=self._allocator.size,
            free=self._allocator.free_bytes,
            reachable=self._reachable,
            pending=self._pending,
            quarantined=sum(_bytes_taken(debt.extents) for debt in self.debts),
            largest_free=self._allocator.largest_free,
        )

    def free_blocks(self) -> list[Extent]:
        return self._allocator.free_blocks()

    def references(self) -> dict[Extent, int]:
        return dict(self._references)

    # -- a refit's hand ----------------------------------------------------------------------------

    def reserve(self, sizes: Sequence[int]) -> list[Extent]:
        """Space for an open refit. Raises NoSpace."""
        extents = self._allocator.reserve(sizes)
        self._pending += _bytes_taken(extents)
        return extents

    def give_up(self, refit: int, extents: Sequence[Extent], holdouts: Iterable[Writer]) -> None:
        """An open refit ends in nothing: free its (non-empty) extents, or quarantine them while writers
        hold out."""
        self._pending -= _bytes_taken(extents)
        waiting = set(holdouts)
        if waiting and extents:
            self.debts.append(Debt(refit, tuple(extents), waiting))
        else:
            self._allocator.release(extents)

    def settle(self, writer: Writer, refit: int | None = None) -> bool:
        """`writer` has no copy in flight any more: into that refit, or (its process is gone, or it has
        drained everything) into any. True if space came back."""
        for debt in self.debts:
            if refit is None or debt.refit == refit:
                debt.holdouts.discard(writer)
        paid = [debt for debt in self.debts if not debt.holdouts]
        self.debts = [debt for debt in self.debts if debt.holdouts]
        for debt in paid:
            self._allocator.release(debt.extents)
        return bool(paid)

    def holdouts(self) -> set[Writer]:
        return {writer for debt in self.debts for writer in debt.holdouts}

    # -- the versions' hand ------------------------------------------------------------------------

    def publish(self, pending: Iterable[Extent]) -> None:
        """Extents of a refit that now commits leave its hand; `refer` must follow."""
        self._pending -= _bytes_taken(pending)

    def refer(self, extents: Iterable[Extent]) -> None:
        """One more live version refers to these (distinct, non-empty) extents."""
        extents = list(extents)
        counts = list(map(self._references.get, extents))
        new = [extent for extent, count in zip(extents, counts, strict=True) if count is None]
        self._references.update((e, c + 1) for e, c in zip(extents, counts, strict=True) if c is not None)
        self._references.update(dict.fromkeys(new, 1))
        self._reachable += _bytes_taken(new)

    def drop(self, extents: Iterable[Extent], holdouts: Iterable[Writer] = ()) -> None:
        """One version fewer refers to these extents; the last reference frees them, or puts them into
        quarantine while writers hold out that were overwriting them."""
        extents = list(extents)
        counts = list(map(self._references.pop, extents))
        freed = [extent for extent, count in zip(extents, counts, strict=True) if count == 1]
        self._references.update((e, c - 1) for e, c in zip(extents, counts, strict=True) if c > 1)
        self._reachable -= _bytes_taken(freed)
        waiting = set(holdouts)
        if waiting and freed:
            self.debts.append(Debt(0, tuple(freed), waiting))
        else:
            self._allocator.release(freed)

    def shared(self, extents: Iterable[Extent]) -> bool:
        """Whether more than one live version refers to any of these extents."""
        return any(self._references.get(e, 0) > 1 for e in extents)

    # -- recovery ----------------------------------------------------------------------------------

    def recover(self, versions: Iterable[Iterable[Extent]], debts: Iterable[Debt]) -> None:
        """Take the extents of recovered versions and debts out of the free space.

        Raises:
            ValueError: they overlap or lie outside the committed range.
        """
        for extents in versions:
            extents = list(extents)
            self._allocator.claim(e for e in extents if e not in self._references)
            self.refer(extents)
        for debt in debts:
            self._allocator.claim(debt.extents)
            self.debts.append(debt)


def _bytes_taken(extents: Iterable[Extent]) -> int:
    return sum([-(-extent.nbytes // ALIGN) for extent in extents]) * ALIGN
