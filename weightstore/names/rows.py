"""What is asked and what is answered: tensors given, what they are to be written into, and a row for each.

Pure values; `resolve` makes the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final

import msgspec

from weightstore.casts import Cast
from weightstore.types import Box, TensorRecord, component_of


class Given(msgspec.Struct, frozen=True):
    """A tensor of the trainer. `shape` is that of the whole tensor, also of a sharded one."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Stored(msgspec.Struct, frozen=True):
    """What a refit writes into: the base's `records` (none for a first or fresh version) and the declaration.

    `what` names it in messages. `components` None means all. With `closed` a name that is not in `records`
    may not be written; with `partial` any subset of them may. `cast` says which dtypes may differ.
    """

    what: str
    records: Mapping[str, TensorRecord]
    components: frozenset[str] | None = None
    closed: bool = True
    partial: bool = False
    cast: Cast = "never"

    def bytes_of(self, name: str) -> object:
        """What `name` shares with the names tied to it, and with no other."""
        record = self.records.get(name)
        return record.offset if record is not None and record.nbytes else name

    def in_scope(self, name: str) -> bool:
        return self.components is None or component_of(name) in self.components


class Kind(Enum):
    """What becomes of a tensor. The first five are as they should be."""

    MATCHED = "matched"
    RENAMED = "renamed"
    FUSED = "fused"
    SPLIT = "split"
    DROPPED = "dropped"
    MISSING = "missing"
    UNKNOWN = "unknown"
    UNDECLARED = "undeclared"
    MISMATCHED = "mismatched"
    CONFLICT = "conflict"


WRITTEN: Final = frozenset({Kind.MATCHED, Kind.RENAMED, Kind.FUSED, Kind.SPLIT})
PROBLEMS: Final = frozenset(Kind) - WRITTEN - {Kind.DROPPED}


class Row(msgspec.Struct, frozen=True, omit_defaults=True):
    """One tensor's way, or one piece's.

    Attributes:
        source: name given; None where nothing was given for `target` (MISSING).
        target: stored name; None for DROPPED.
        dtype, shape: of the source; of the target for MISSING.
        part: which elements of the source go to `target`; None for all.
        box: which elements of `target` they become; None for all.
        whole: shape of `target`, where `box` is given.
        note: what is wrong, which rule dropped it, or to which dtype it is cast.
        hint: a name that was perhaps meant.
        rules: numbers of the rules that matched.
    """

    kind: Kind
    source: str | None
    target: str | None
    dtype: str
    shape: tuple[int, ...]
    part: Box | None = None
    box: Box | None = None
    whole: tuple[int, ...] | None = None
    note: str = ""
    hint: str | None = None
    rules: tuple[int, ...] = ()

    def place(self, held: Box) -> tuple[Box, Box] | None:
        """Of the elements `held` of the source: those that go to `target`, and what they become there.

        Both boxes count from the origin of their whole tensor. None if there are none.
        """
        part = self.part or Box((0,) * len(self.shape), self.shape)
        lo = tuple(map(max, held.lo, part.lo))
        hi = tuple(map(min, held.hi, part.hi))
        inside = all(a <= b for a, b in zip(lo, hi, strict=True))
        if not inside or (0 in map(int.__sub__, hi, lo) and held.numel and part.numel):
            return None
        origin = self.box.lo if self.box is not None else (0,) * len(lo)
        shift = tuple(map(int.__sub__, origin, part.lo))
        return Box(lo, hi), Box(tuple(map(int.__add__, lo, shift)), tuple(map(int.__add__, hi, shift)))
