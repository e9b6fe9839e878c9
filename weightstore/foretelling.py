"""Telling followers of a tag where its next version may come to lie.

The places of a refit that declares what it writes are known when it opens. Who follows the tag and has to
prepare for reading there, as an engine that pins memory, can do that while the refit is being written; who
comes to follow it later, at once.

Invariant: a follower is told of a window once for each component. So refits cost no message once their places
repeat, as they soon do. What followers of one tag have been told is mostly the same, and then exists once.
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
Spots = frozenset[Spot]
NOWHERE: Spots = frozenset()


class _News(NamedTuple):
    """What to tell those who have been told the same, and what they have been told then."""

    places: dict[str, list[tuple[int, int]]]
    after: Spots


class _Last(NamedTuple):
    """The last refit of a tag that had places when it was opened: its number; they with those of the version
    that the tag named then; and that as the news for a newcomer."""

    refit: int
    newcomer: _News


class Foretelling:
    """What each lease has been told. `start` is where windows begin and `end` where the arena does.

    The messages of `opened` and `followed` are to be sent: their leases count as told from then on.
    """

    def __init__(self, catalog: Catalog, start: int, end: int, window: int) -> None:
        self._catalog = catalog
        self._start, self._end, self._window = start, end, window
        self._told: WeakKeyDictionary[Lease, Spots] = WeakKeyDictionary()
        self._last: dict[tuple[str, str], _Last] = {}

    def opened(self, refit: Refit) -> Iterator[tuple[Lease, Places]]:
        """A refit was opened, or another rank has joined it."""
        key = refit.model, refit.tag
        last = self._last.get(key)
        if refit.base is None:  # a new model, maybe of an old one's name
            self._last.pop(key, None)
        if refit.declared.in_place or (last is not None and last.refit == refit.number):
            return  # the places are those of the version that is read, or were told when the first rank came
        spots = self._spots(refit.targets.values())
        if not spots:
            return
        self._remember(refit, spots)
        news: dict[Spots, _News] = {}
        for lease in self._catalog.leases:
            if lease.follow and (lease.model, lease.tag) == key:
                told = self._told.get(lease, NOWHERE)
                if told not in news:
                    news[told] = self._news(told, spots)
                yield from self._tell(lease, news[told])

    def followed(self, lease: Lease) -> Iterator[tuple[Lease, Places]]:
        """Somebody leases what he may follow."""
        last = self._last.get((lease.model, lease.tag))
        if last is not None and lease.follow:
            told = self._told.get(lease)  # of a refit that was opened a moment ago, maybe
            news = last.newcomer if told is None else self._news(told, last.newcomer.after)
            yield from self._tell(lease, news)

    def _tell(self, lease: Lease, news: _News) -> Iterator[tuple[Lease, Places]]:
        self._told[lease] = news.after
        if news.places:
            yield lease, Places(lease=lease.number, places=news.places)

    def _news(self, told: Spots, spots: Spots) -> _News:
        new = spots - told
        return _News(self._merged(sorted(new)), told | new if new else told)

    def _remember(self, refit: Refit, spots: Spots) -> None:
        """For newcomers. Versions take turns: the next will lie where this refit has its places, or where the
        version that it replaces has them."""
        model = self._catalog.models.find(refit.model)
        now = model.tags.get(refit.tag) if model is not None else None
        if model is not None and now in model.versions:
            records = model.versions[now].records
            spots |= self._spots([records[name] for name in refit.targets if name in records])
        being_written = {(open_.model, open_.tag) for open_ in self._catalog.open_refits()}
        self._last = {
            key: last for key, last in self._last.items() if key in being_written or self._exists(*key)
        }
        self._last[refit.model, refit.tag] = _Last(refit.number, self._news(NOWHERE, spots))

    def _exists(self, model: str, tag: str) -> bool:
        found = self._catalog.models.find(model)
        return found is not None and tag in found.tags

    def _spots(self, records: Iterable[TensorRecord]) -> Spots:
        start, window = self._start, self._window
        found: set[Spot] = set()
        latest: dict[str, int] = {}
        for record in records:  # maybe a hundred thousand, while the store answers nobody else
            nbytes = record.nbytes
            if not nbytes:
                continue
            offset = record.offset - start
            component = record.name.partition(".")[0]
            first, last = offset // window, (offset + nbytes - 1) // window
            if first == last:
                if latest.get(component) != first:
                    found.add((component, first))
                    latest[component] = first
            else:
                found.update((component, number) for number in range(first, last + 1))
        return frozenset(found)

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
