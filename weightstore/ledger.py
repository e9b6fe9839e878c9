"""What a refit may write, and what it has written: the writer's half of exact coverage, as pure logic.

The store checks coverage again at commit and has the last word; here mistakes are found before a byte
moves, with the caller's own line in the traceback.

Invariants:
- a name has one expectation: its place in this refit, else the base version's record;
- what shares an extent in the base shares one in every version built on it, so tied names are one *item*:
  it is written once and reported once.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Final

import msgspec

from weightstore.casts import Cast, refusal
from weightstore.errors import CoverageError
from weightstore.types import ITEMSIZE, Box, TensorRecord, TensorSpec, component_of
from weightstore.wire import Write

_SHOWN: Final = 8


class Item(msgspec.Struct, gc=False):
    """Something written: whole, or in parts; or `kept`, as what was given is what the base has. `record` is
    its place, `names` those it was put under."""

    record: TensorRecord
    names: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    kept: bool = False

    @property
    def nbytes(self) -> int:
        if self.kept:
            return 0
        if not self.boxes:
            return self.record.nbytes
        return sum(box.numel for box in self.boxes) * ITEMSIZE[self.record.dtype]


class Ledger:
    """`what` names the refit in messages. `base` may be left out (not so `has_base`) if all of it that may be
    written has one of the `places`."""

    def __init__(
        self,
        what: str,
        base: dict[str, TensorRecord],
        has_base: bool,
        components: Sequence[str] | None,
        extend: bool,
        places: Iterable[TensorRecord] = (),
    ) -> None:
        self.places: dict[str, TensorRecord] = {}
        self._what = what
        self._base = base
        self._moved: dict[int, int] = {}
        """Offsets of places of the base's tensors, and where the base has them."""
        self.place(places)
        self._closed = has_base and not extend
        self._components = None if components is None else frozenset(components)
        self._items: dict[Hashable, Item] = {}
        self._first: dict[int, str] = {}
        for record in base.values():
            if record.nbytes:
                self._first.setdefault(record.offset, record.name)

    @property
    def known(self) -> Mapping[str, TensorRecord]:
        """What names have to look like, now and later: the base's records, then places of new ones."""
        return ChainMap(self._base, self.places)

    @property
    def untied(self) -> bool:
        """Whether no two names are known to share their bytes."""
        known = self._base or self.places
        offsets = [record.offset for record in known.values() if record.nbytes]
        return len(set(offsets)) == len(offsets)

    def place(self, records: Iterable[TensorRecord]) -> None:
        """Here is where these tensors are to be written."""
        for record in records:
            self.places[record.name] = record
            before = self._base.get(record.name)
            if before is not None and record.nbytes:
                self._moved[record.offset] = before.offset

    def expected(self, name: str) -> TensorRecord | None:
        """The dtype, shape and stride `name` has to have; None for a new name."""
        return self.places.get(name) or self._base.get(name)

    def tie(self, name: str) -> Hashable:
        """What `name` shares with the names tied to it, and with no other."""
        record = self._base.get(name) or self.places.get(name)
        if record is None or not record.nbytes:
            return name
        # A new name may be tied to one of the base's, in the place that has got.
        return record.offset if name in self._base else self._moved.get(record.offset, record.offset)

    def first_name(self, name: str) -> str:
        """A name that is the same for `name` and those tied to it in the base, in every process."""
        record = self._base.get(name)
        return name if record is None else self._first.get(record.offset, name)

    def item(self, name: str) -> Item | None:
        """What was written as `name` or as a name tied to it."""
        return self._items.get(self.tie(name))

    def check(
        self,
        wanted: Iterable[tuple[str, str, tuple[int, ...]]],
        again: bool = False,
        parts: Iterable[tuple[str, str, Box, TensorSpec | None]] = (),
        others: Iterable[TensorSpec] = (),
        cast: Cast = "never",
    ) -> None:
        """May these (name, dtype, shape) be written whole, now (or `again`), and these (name, dtype, box,
        spec) in part? A part's `spec` describes the whole of the tensor that it is a part of. Of `others`
        nothing is written here. Dtypes may differ as far as `cast` allows.

        Raises:
            CoverageError: naming all that may not, by kind; `overlapping` are parts of which something was
                written before, or is given twice here.
        """
        problems = Problems(self._what)
        wanted, parts = list(wanted), list(parts)
        for name, dtype, shape in wanted:
            self._judge(problems, name, dtype, shape, cast)
        if self._items:
            for name, _, _ in wanted:
                item = self.item(name)
                if item is not None and (item.boxes or (name in item.names and not again)):
                    problems.add("duplicate", name)
        whole = {self.tie(name) for name, _, _ in wanted} if parts else set()
        here: dict[Hashable, list[Box]] = {}
        for name, dtype, box, spec in parts:
            key = self.tie(name)
            self._judge_part(problems, name, dtype, box, spec, key in whole, here.setdefault(key, []), cast)
        for other in others:
            self._judge(problems, other.name, other.dtype, other.shape, cast)
        problems.raise_any(self.known)

    def _judge(
        self, problems: Problems, name: str, dtype: str, shape: tuple[int, ...], cast: Cast
    ) -> TensorRecord | None:
        """Enter what is wrong with a tensor of this name, dtype and shape; its expectation if nothing is."""
        expected = self.expected(name)
        if not self.in_scope(name):
            problems.add("undeclared", name)
        elif expected is not None and expected.dtype == dtype and expected.shape == shape:
            return expected
        elif expected is None:
            if self._closed:
                problems.add("unknown", name)
        else:
            why = refusal(dtype, expected.dtype, cast)
            if expected.shape == shape and not why:
                return expected
            given, stored = f"{dtype} {list(shape)}", f"{expected.dtype} {list(expected.shape)}"
            note = f"; {why}" if why and cast != "never" else ""
            problems.add("mismatched", name, f"given {given}, stored {stored}{note}")
        return None

    def _judge_part(
        self,
        problems: Problems,
        name: str,
        dtype: str,
        box: Box,
        spec: TensorSpec | None,
        whole_here: bool,
        boxes_here: list[Box],
        cast: Cast,
    ) -> None:
        """As `check`, of one part, in a call that writes the whole too (`whole_here`) or `boxes_here`, to
        which `box` is added if it may be written."""
        if not self.in_scope(name):
            problems.add("undeclared", name)
            return
        stored = self.expected(name)
        if stored is None and (spec is None or self._closed):
            problems.add("unknown", name, "a tensor the base lacks must be reserved before its parts are put")
            return
        expected = stored or spec
        assert expected is not None
        if spec is not None and spec.shape != expected.shape:
            self._judge(problems, name, dtype, spec.shape, cast)
            return
        inside = len(box.lo) == len(expected.shape) and all(
            0 <= lo and hi <= size for lo, hi, size in zip(box.lo, box.hi, expected.shape, strict=True)
        )
        why = refusal(dtype, expected.dtype, cast)
        if why or not inside:
            part = f"{dtype} {list(box.lo)} to {list(box.hi)}"
            note = f"; {why}" if why and cast != "never" else ""
            problems.add(
                "mismatched", name, f"given {part}, stored {expected.dtype} {list(expected.shape)}{note}"
            )
            return
        item = self.item(name)
        written = () if item is None else item.boxes
        if whole_here or (item is not None and not item.boxes):
            problems.add("duplicate", name)
        elif any(box.intersects(other) for other in (*written, *boxes_here)):
            problems.add("overlapping", name, f"{list(box.lo)} to {list(box.hi)}")
        else:
            boxes_here.append(box)

    def in_scope(self, name: str) -> bool:
        return self._components is None or component_of(name) in self._components

    def without_place(self, specs: Iterable[TensorSpec]) -> list[TensorSpec]:
        return [spec for spec in specs if spec.name not in self.places]

    def enter(self, name: str) -> bool:
        """`name` is being written whole, at its place. False if that was done under a tied name."""
        key = self.tie(name)
        item = self._items.get(key)
        if item is None or (item.kept and name in self.places):
            names = () if item is None else tuple(other for other in item.names if other != name)
            self._items[key] = Item(self.places[name], (*names, name))
            return True
        item.names = (*item.names, name)
        return False

    def movable(self, name: str) -> bool:
        """Whether `name` may stay where the base has it."""
        item = self.item(name)
        return name in self._base and name not in self.places and (item is None or item.kept)

    def keep(self, name: str) -> bool:
        """`name` was given with the base's bytes and stays there. False if a tied name was before."""
        key = self.tie(name)
        item = self._items.get(key)
        if item is None:
            self._items[key] = Item(self._base[name], (name,), kept=True)
            return True
        item.names = (*item.names, name)
        return False

    def enter_part(self, name: str, box: Box) -> None:
        item = self._items.setdefault(self.tie(name), Item(self.places[name], (name,)))
        item.boxes = (*item.boxes, box)

    def add_name(self, name: str) -> None:
        """What was entered in parts was given under `name` too."""
        item = self.item(name)
        if item is not None and name not in item.names:
            item.names = (*item.names, name)

    def withdraw(self, name: str, box: Box | None = None) -> None:
        """What was entered did not get written."""
        key = self.tie(name)
        item = self._items.get(key)
        if item is not None:
            item.boxes = tuple(other for other in item.boxes if other is not box)
            if not item.boxes:
                del self._items[key]

    def writes(self) -> list[Write]:
        writes = []
        for item in self._items.values():
            if item.boxes:
                writes += [Write(item.record.name, box) for box in item.boxes]
            else:
                writes.append(Write(item.record.name, kept=item.kept))
        return writes

    @property
    def tensors(self) -> int:
        """Names written, each tied one counted."""
        return sum(len(item.names) for item in self._items.values() if not item.kept)

    @property
    def unchanged(self) -> int:
        """Names given and left where the base has them."""
        return sum(len(item.names) for item in self._items.values() if item.kept)

    @property
    def nbytes(self) -> int:
        """Bytes written, those of tied names once."""
        return sum(item.nbytes for item in self._items.values())


class Problems:
    """Names a refit refuses, by kind, and the one error about all of them."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._names: dict[str, list[str]] = {}
        self._notes: dict[str, str] = {}

    def add(self, kind: str, name: str, note: str = "") -> None:
        self._names.setdefault(kind, []).append(name)
        if note:
            self._notes[name] = note

    def raise_any(self, known: Collection[str] = ()) -> None:
        """`known`: names that may have been meant."""
        if self._names:
            raise self.error(known)

    def error(self, known: Collection[str] = ()) -> CoverageError:
        from weightstore.names.hints import prefix_advice

        reasons = [f"{len(names)} {kind} ({self._shown(names)})" for kind, names in self._names.items()]
        kinds = (self._names.get(kind, ()) for kind in ("unknown", "undeclared"))
        astray = [name for names in kinds for name in names if name not in known]
        if advice := prefix_advice(astray, known):
            reasons.append(advice)
        return CoverageError(
            f"{self._what}: {'; '.join(reasons)}; nothing was written by this call", **self._names
        )

    def _shown(self, names: list[str]) -> str:
        shown = [f"{name}: {self._notes[name]}" if name in self._notes else name for name in names[:_SHOWN]]
        return ", ".join(shown) + (", …" if len(names) > _SHOWN else "")
