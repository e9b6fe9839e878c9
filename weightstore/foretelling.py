"""Telling followers of a tag where its next version may come to lie.

The places of a refit are known when it opens. Who follows the tag and has to prepare for reading there, as
an engine that pins memory, can do that while the refit is being written.

Invariant: a follower is told of a window once for each component. So refits cost no message once their places
repeat, as they soon do, and what is owed to a follower that reads nothing is bounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from weakref import WeakKeyDictionary

from weightstore.catalog import Lease, Refit
from weightstore.wire import Places

Spot = tuple[str, int]
"""A component, and the number of a window in which it has a place."""


class Foretelling:
    """What each lease has been told. `start` is where windows begin and `end` where the arena does."""

    def __init__(self, leases: Iterable[Lease], start: int, end: int, window: int) -> None:
        self._leases = leases
        self._start, self._end, self._window = start, end, window
        self._told: WeakKeyDictionary[Lease, set[Spot]] = WeakKeyDictionary()

    def due(self, refit: Refit) -> Iterator[tuple[Lease, Places]]:
        """What followers have to be told of the places that `refit` has now; they have been from here on."""
        if refit.declared.in_place:
            return  # its places are those of the version that they read
        followers = [
            lease
            for lease in self._leases
            if lease.follow and (lease.model, lease.tag) == (refit.model, refit.tag)
        ]
        spots = self._spots(refit) if followers else set()
        for lease in followers:
            told = self._told.setdefault(lease, set())
            new = sorted(spots - told)
            if new:
                told.update(new)
                yield lease, Places(lease=lease.number, places=self._merged(new))

    def _spots(self, refit: Refit) -> set[Spot]:
        start, window = self._start, self._window
        found: set[Spot] = set()
        for record in refit.targets.values():
            if record.nbytes:
                first, last = record.offset - start, record.offset + record.nbytes - 1 - start
                found.update((record.component, n) for n in range(first // window, last // window + 1))
        return found

    def _merged(self, spots: Iterable[Spot]) -> dict[str, list[tuple[int, int]]]:
        """Stretches of whole windows, as (offset, nbytes) by component; `spots` are sorted."""
        places: dict[str, list[tuple[int, int]]] = {}
        for component, numbers in groupby(spots, key=lambda spot: spot[0]):
            stretches = places.setdefault(component, [])
            for _, number in numbers:
                offset = self._start + number * self._window
                nbytes = min(self._window, self._end - offset)
                if stretches and sum(stretches[-1]) == offset:
                    stretches[-1] = (stretches[-1][0], stretches[-1][1] + nbytes)
                else:
                    stretches.append((offset, nbytes))
        return places
