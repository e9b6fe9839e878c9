"""Models, their versions and tags.

A version is an immutable, numbered set of tensor records. Numbers of a model rise and are never
used again. A tag is a movable name for one version.

    COMMITTED  a tag names it
    RETIRED    no tag names it, somebody still holds it
    FREED      gone; its number answers UnknownVersion

An in-place refit overwrites a version's bytes. From its first reservation until a later commit the
components it may have touched are *torn*: the version keeps its records, so that a new refit knows
what to write, but nobody may read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum
from functools import cached_property
from typing import Final

import msgspec

from weightstore.catalog.writers import Writer
from weightstore.errors import UnknownModel, UnknownTag, UnknownVersion
from weightstore.types import DEFAULT_TAG, Extent, TensorRecord


class VersionState(Enum):
    COMMITTED = "committed"
    RETIRED = "retired"
    FREED = "freed"


VERSION_MOVES: Final[dict[VersionState, frozenset[VersionState]]] = {
    VersionState.COMMITTED: frozenset({VersionState.RETIRED, VersionState.FREED}),
    VersionState.RETIRED: frozenset({VersionState.COMMITTED, VersionState.FREED}),
    VersionState.FREED: frozenset(),
}


@dataclass(eq=False)
class Version:
    """A committed snapshot. `encoded` is `records` as readers receive them (wire.encode_records).

    `checksums` maps an extent to the xxh3-64 of its bytes once the service has computed it. `writers` were
    overwriting it in place when that was aborted, and may not have stopped.
    """

    model: str
    number: int
    parent: int
    created: float
    records: dict[str, TensorRecord]
    encoded: msgspec.Raw
    state: VersionState = VersionState.COMMITTED
    torn: frozenset[str] = frozenset()
    checksums: dict[Extent, int] = field(default_factory=dict)
    checksummed: bool = False
    writers: set[Writer] = field(default_factory=set)

    def __post_init__(self) -> None:
        places = [Extent(r.offset, r.nbytes) for r in self.records.values() if r.nbytes]
        # A set that keeps the records' order, which mostly is the arena's: what is done to all of them then
        # finds them sorted.
        self.extents: Set[Extent] = dict.fromkeys(places).keys()
        self.nbytes = sum([e.nbytes for e in self.extents])

    def move(self, state: VersionState) -> None:
        if state is self.state:
            return
        if state not in VERSION_MOVES[self.state]:
            raise ValueError(f"version {self.number} cannot go from {self.state.value} to {state.value}")
        self.state = state

    @cached_property
    def components(self) -> dict[str, int]:
        """Bytes of each component; an extent shared by several names counts for the first."""
        sizes: dict[str, int] = {}
        seen: set[Extent] = set()
        for record in self.records.values():
            component = record.component
            sizes.setdefault(component, 0)
            if record.extent not in seen:
                seen.add(record.extent)
                sizes[component] += record.nbytes
        return sizes


@dataclass(eq=False)
class Model:
    """`names` is the published name map as JSON, which is the clients' to read. It may be there before the
    first version, and goes with the last."""

    name: str
    next_number: int = 1
    versions: dict[int, Version] = field(default_factory=dict)
    tags: dict[str, int] = field(default_factory=dict)
    names: str | None = None

    def tagged(self, tag: str) -> Version:
        """The version `tag` names. Raises UnknownTag."""
        number = self.tags.get(tag)
        if number is None:
            known = ", ".join(sorted(self.tags)) or "none"
            raise UnknownTag(
                f"model {self.name!r} has no tag {tag!r}; its tags: {known}", model=self.name, tag=tag
            )
        return self.versions[number]

    def version(self, number: int) -> Version:
        """The live version of that number. Raises UnknownVersion."""
        version = self.versions.get(number)
        if version is None:
            why = "has been freed" if 0 < number < self.next_number else "never existed"
            live = ", ".join(map(str, sorted(self.versions))) or "none"
            raise UnknownVersion(
                f"version {number} of model {self.name!r} {why}; live versions: {live}",
                model=self.name,
                version=number,
            )
        return version

    def base_for(self, tag: str, base: int | None) -> Version | None:
        """The version a refit of `tag` starts from: `base`, else the tag's, else that of `latest`;
        None for a model that has no version yet."""
        if base is not None:
            return self.version(base)
        for candidate in (tag, DEFAULT_TAG):
            if candidate in self.tags:
                return self.tagged(candidate)
        if not self.tags:
            return None
        known = ", ".join(sorted(self.tags))
        neither = f"no tag {tag!r}" if tag == DEFAULT_TAG else f"neither a tag {tag!r} nor {DEFAULT_TAG!r}"
        raise UnknownTag(
            f"model {self.name!r} has {neither} to start from; say which "
            f"version is the base (base=…); its tags: {known}",
            model=self.name,
            tag=tag,
        )

    def tags_of(self, number: int) -> list[str]:
        return sorted(tag for tag, named in self.tags.items() if named == number)


class Models:
    """All models by name. One whose last version was freed is unknown to callers, but remembered, so
    that its version numbers go on rising."""

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def find(self, name: str) -> Model | None:
        return self._models.get(name)

    def get(self, name: str) -> Model:
        """Raises UnknownModel, naming close matches."""
        model = self._models.get(name)
        if model is None or not model.versions:
            known = [m.name for m in self if m.versions]
            close = get_close_matches(name, known, n=3)
            hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
            like = {"close": close} if close else {}
            raise UnknownModel(f"the store has no model {name!r}{hint}", model=name, **like)
        return model

    def ensure(self, name: str) -> Model:
        return self._models.setdefault(name, Model(name))

    def forget_if_void(self, name: str) -> None:
        """Forget a model that never had a version and has no name map (any more): no number depends on it."""
        model = self._models.get(name)
        if model is not None and model.next_number == 1 and model.names is None:
            del self._models[name]

    def versions(self) -> Iterable[Version]:
        for model in self._models.values():
            yield from model.versions.values()
