"""Where a component's weights lie in its image, and which copies bring a version there.

Pure: records in, runs out; no device, no torch. All offsets and sizes are bytes.

Invariants:
- a slot starts at a multiple of ALIGN and slots stand in the order their extents had in the arena at
  attach, so a component that is contiguous there is one run;
- a run never covers anything but slots and the alignment padding (under ALIGN bytes) between two of
  them, so engine state behind the weights is never written;
- the layout outlives versions: a later version may lie anywhere in the arena, it only takes more runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate

import msgspec

from engine_hooks.backend import Run
from weightstore.types import ALIGN, TensorRecord, align_up, component_of

Records = Mapping[str, TensorRecord]


class Slot(msgspec.Struct, frozen=True, gc=False):
    """A range of the image that one extent fills; several names when they are tied."""

    offset: int
    nbytes: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """The weights of one component: slots by rising offset, and the records they were laid out from."""

    slots: tuple[Slot, ...]
    records: Records
    nbytes: int

    def offsets(self) -> dict[str, int]:
        """Image offset of every name."""
        return {name: slot.offset for slot in self.slots for name in slot.names}


def lay_out(records: Iterable[TensorRecord]) -> Layout:
    """Give every distinct extent of `records` a slot; `nbytes` ends at a multiple of ALIGN."""
    by_name: dict[str, TensorRecord] = {}
    by_extent: dict[tuple[int, int], list[str]] = {}
    for record in records:
        by_name[record.name] = record
        # Empty tensors share nothing, wherever the store says that they lie.
        key = (record.offset, record.nbytes) if record.nbytes else (-1, -len(by_name))
        by_extent.setdefault(key, []).append(record.name)
    slots = []
    cursor = 0
    for (_, nbytes), names in sorted(by_extent.items()):
        slots.append(Slot(cursor, max(nbytes, 0), tuple(sorted(names))))
        cursor = align_up(cursor + max(nbytes, 0))
    return Layout(tuple(slots), by_name, cursor)


def runs_of(layout: Layout, records: Records) -> list[Run]:
    """The runs that fill the whole layout from `records`."""
    return runs_for(layout.slots, records)


def changed_slots(layout: Layout, old: Records, new: Records) -> list[Slot]:
    """The slots whose extent differs between two versions.

    Sound only while the old version was held until the new one existed: otherwise its extents may
    have been freed and given to other bytes, and an equal offset proves nothing.
    """
    return [
        slot
        for slot in layout.slots
        if slot.nbytes and old[slot.names[0]].offset != new[slot.names[0]].offset
    ]


def runs_for(slots: Sequence[Slot], records: Records) -> list[Run]:
    """The runs that fill just these slots, given by rising offset. Neighbours that are equally far apart on
    both sides are joined, across padding only; in one pass, since this is on the path of every wake."""
    runs: list[Run] = []
    source = target = end = -ALIGN
    for slot in slots:
        if slot.nbytes:
            offset = records[slot.names[0]].offset
            if offset - source != slot.offset - target or slot.offset - end >= ALIGN:
                if end >= 0:
                    runs.append(Run(source, target, end - target))
                source, target = offset, slot.offset
            end = slot.offset + slot.nbytes
    if end >= 0:
        runs.append(Run(source, target, end - target))
    return runs


def slot_runs(slots: Sequence[Slot], records: Records) -> list[tuple[Slot, Run]]:
    """One run for each slot that has bytes, not joined."""
    return [
        (slot, Run(records[slot.names[0]].offset, slot.offset, slot.nbytes)) for slot in slots if slot.nbytes
    ]


def total_bytes(runs: Iterable[Run]) -> int:
    return sum(run.nbytes for run in runs)


def matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Whether a name matches one of the shell-style patterns (`*`, `?`, `[…]`), case-sensitively."""
    if not patterns:
        return lambda name: False
    compiled = re.compile("|".join(f"(?:{translate(pattern)})" for pattern in patterns))
    return lambda name: compiled.match(name) is not None


def by_component(
    records: Records, components: Iterable[str], ignored: Callable[[str], bool]
) -> dict[str, dict[str, TensorRecord]]:
    """The records of each named component, less the ignored names."""
    grouped: dict[str, dict[str, TensorRecord]] = {name: {} for name in components}
    for name, record in records.items():
        group = grouped.get(component_of(name))
        if group is not None and not ignored(name):
            group[name] = record
    return grouped


def misfits(layout: Layout, records: Records) -> list[str]:
    """Why a version (its records of this component) cannot fill this layout; empty if it can."""
    known = layout.records
    reasons = [f"{name} is new in it" for name in sorted(records.keys() - known.keys())]
    reasons += [f"{name} is missing from it" for name in sorted(known.keys() - records.keys())]
    for name, record in records.items():
        was = known.get(name)
        if was is not None and (
            was.shape != record.shape
            or was.dtype != record.dtype
            or was.stride != record.stride
            or was.encoding != record.encoding
        ):
            reasons.append(f"{name} is {describe(record)} in it, was {describe(was)}")
    if not reasons:
        for slot in layout.slots:
            if slot.nbytes and len(slot.names) > 1 and len({records[n].offset for n in slot.names}) > 1:
                reasons.append(f"{', '.join(slot.names)} are no longer tied in it")
    return reasons


def describe(record: TensorRecord) -> str:
    encoding = "" if record.encoding == "raw" else f", encoding {record.encoding}"
    return f"{record.dtype}{list(record.shape)} stride {list(record.stride)}{encoding}"
