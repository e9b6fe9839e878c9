"""Telling followers of a tag where its next version may come to lie.

The places of a refit are known when it opens. Who follows the tag and has to prepare for reading there, as
an engine that pins memory, can do that while the refit is being written; who comes to follow it later, at
once.

Invariant: a follower is told of a window once for each component. So refits cost no message once their places
repeat, as they soon do, and what is owed to a follower that reads nothing is bounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple
from weakref import WeakKeyDictionary

from weightstore.catalog import Catalog, Lease, Refit
from weightstore.types import TensorRecord
from weightstore.wire import Places

Spot = tuple[str, int]
"""A component, and the number of a window in which it has a place."""


class _Last(NamedTuple):
    """The last refit of a tag that had places when it was opened: its number, and they with its base's."""

    refit: int
    spots: set[Spot]


class Foretelling:
    """What each lease has been told. `start` is where windows begin and `end` where the arena does.

    The messages of `opened` and `followed` are to be sent: their leases count as told from then on.
    """

    def __init__(self, catalog: Catalog, start: int, end: int, window: int) -> None:
        self._catalog = catalog
        self._start, self._end, self._window = start, end, window
        self._told: WeakKeyDictionary[Lease, set[Spot]] = WeakKeyDictionary()
        self._last: dict[tuple[str, str], _Last] = {}

    def opened(self, refit: Refit) -> Iterator[tuple[Lease, Places]]:
        """A refit was opened, or another rank has joined it."""
        last = self._last.get((refit.model, refit.tag))
        if refit.declared.in_place or (last is not None and last.refit == refit.number):
            return  # the places are those of the version that is read, or were told when the first rank came
        spots = self._spots(refit.targets.values())
        if not spots:
            return
        self._remember(refit, spots)
        for lease in self._catalog.leases:
            if (lease.model, lease.tag) == (refit.model, refit.tag):
                yield from self._tell(lease, spots)

    def followed(self, lease: Lease) -> Iterator[tuple[Lease, Places]]:
        """Somebody leases what he may follow."""
        last = self._last.get((lease.model, lease.tag))
        if last is not None:
            yield from self._tell(lease, last.spots)

    def _tell(self, lease: Lease, spots: set[Spot]) -> Iterator[tuple[Lease, Places]]:
        told = self._told.setdefault(lease, set())
        new = sorted(spots - told)
        if new and lease.follow:
            told.update(new)
            yield lease, Places(lease=lease.number, places=self._merged(new))

    def _remember(self, refit: Refit, spots: set[Spot]) -> None:
        """For who comes later. Versions take turns: the next lies there, or where this refit's base does."""
        base = refit.base.records if refit.base is not None else {}
        before = self._spots([base[name] for name in refit.targets if name in base])
        self._last = {key: known for key, known in self._last.items() if self._exists(*key)}
        self._last[refit.model, refit.tag] = _Last(refit.number, spots | before)

    def _exists(self, model: str, tag: str) -> bool:
        found = self._catalog.models.find(model)
        return found is not None and tag in found.tags

    def _spots(self, records: Iterable[TensorRecord]) -> set[Spot]:
        start, window = self._start, self._window
        found: set[Spot] = set()
        prefix, component, latest = "", "", -1
        for record in records:  # a hundred thousand, while the store answers nobody else
            offset, nbytes, name = record.offset - start, record.nbytes, record.name
            if not nbytes:
                continue
            if not prefix or not name.startswith(prefix):
                component, latest = record.component, -1
                prefix = component + "."
            first, last = offset // window, (offset + nbytes - 1) // window
            if first != latest or last != latest:
                found.update((component, number) for number in range(first, last + 1))
                latest = last
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
