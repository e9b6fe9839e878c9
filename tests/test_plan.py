"""Plans are checked by carrying them out: an arena and an image as byte arrays, runs as slice copies."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_hooks.backend import Run
from engine_hooks.plan import (
    Layout,
    Slot,
    by_component,
    changed_slots,
    lay_out,
    matcher,
    misfits,
    runs_for,
    runs_of,
    slot_runs,
    total_bytes,
)
from weightstore.types import ALIGN, TensorRecord, align_up

ARENA = 1 << 15


def record(name: str, offset: int, nbytes: int) -> TensorRecord:
    return TensorRecord(name, "uint8", (nbytes,), (1,), offset, nbytes)


def contiguous(sizes: Sequence[int], start: int = 0, prefix: str = "c.t") -> dict[str, TensorRecord]:
    records = {}
    for index, nbytes in enumerate(sizes):
        records[f"{prefix}{index}"] = record(f"{prefix}{index}", start, nbytes)
        start = align_up(start + nbytes)
    return records


def noise(seed: int) -> bytes:
    return random.Random(seed).randbytes(ARENA)


def carry_out(runs: Sequence[Run], arena: bytes, image: bytearray) -> bytearray:
    for source, target, nbytes in runs:
        image[target : target + nbytes] = arena[source : source + nbytes]
    return image


def assert_holds(layout: Layout, image: bytearray, records: dict[str, TensorRecord], arena: bytes) -> None:
    offsets = layout.offsets()
    for name, r in records.items():
        at = offsets[name]
        assert image[at : at + r.nbytes] == arena[r.offset : r.offset + r.nbytes], name


sizes = st.lists(st.integers(0, 1500), min_size=1, max_size=12)


@st.composite
def placed(draw: st.DrawFn) -> dict[str, TensorRecord]:
    """Records at random non-overlapping aligned places, some tied, some empty, in shuffled order."""
    records: dict[str, TensorRecord] = {}
    cursor = 0
    for index in range(draw(st.integers(1, 12))):
        name = f"c.t{index}"
        if records and draw(st.integers(0, 5)) == 0:
            twin = draw(st.sampled_from(sorted(records)))
            records[name] = record(name, records[twin].offset, records[twin].nbytes)
            continue
        cursor += draw(st.sampled_from([0, 0, 0, ALIGN, 3 * ALIGN]))
        nbytes = draw(st.integers(0, 1500))
        records[name] = record(name, cursor, nbytes)
        cursor = align_up(cursor + nbytes)
    names = draw(st.permutations(sorted(records)))
    return {name: records[name] for name in names}


def moved(records: dict[str, TensorRecord], picked: set[int], start: int) -> dict[str, TensorRecord]:
    """A next version: the picked extents (by index of their offset) lie elsewhere; ties go along."""
    extents = sorted({(r.offset, r.nbytes) for r in records.values()})
    places = {}
    for index, extent in enumerate(extents):
        if index in picked and extent[1]:
            places[extent] = start
            start = align_up(start + extent[1])
    return {
        name: record(name, places.get((r.offset, r.nbytes), r.offset), r.nbytes)
        for name, r in records.items()
    }


class TestLayout:
    @given(sizes, st.integers(0, 20))
    def test_a_contiguous_component_is_one_run(self, sizes: list[int], start: int) -> None:
        records = contiguous(sizes, start * ALIGN)
        layout = lay_out(records.values())
        runs = runs_of(layout, records)
        filled = [r for r in records.values() if r.nbytes]
        if filled:
            first, last = filled[0], filled[-1]
            assert runs == [Run(first.offset, 0, last.offset + last.nbytes - first.offset)]
        else:
            assert runs == []

    @given(placed())
    def test_slots_are_aligned_disjoint_and_hold_every_tensor(self, records: dict[str, TensorRecord]) -> None:
        layout = lay_out(records.values())
        end = 0
        for slot in layout.slots:
            assert slot.offset % ALIGN == 0
            assert slot.offset >= end
            end = slot.offset + slot.nbytes
        assert layout.nbytes == align_up(end)
        assert sorted(name for slot in layout.slots for name in slot.names) == sorted(records)
        arena = noise(1)
        image = carry_out(runs_of(layout, records), arena, bytearray(layout.nbytes))
        assert_holds(layout, image, records, arena)

    @given(placed())
    def test_names_share_a_slot_exactly_when_they_share_an_extent(
        self, records: dict[str, TensorRecord]
    ) -> None:
        offsets = lay_out(records.values()).offsets()
        filled = [r for r in records.values() if r.nbytes]
        for a in filled:
            for b in filled:
                assert (offsets[a.name] == offsets[b.name]) == (a.offset == b.offset)

    @given(placed())
    def test_runs_write_nothing_behind_the_weights(self, records: dict[str, TensorRecord]) -> None:
        layout = lay_out(records.values())
        for run in runs_of(layout, records):
            assert 0 <= run.target
            assert run.target + run.nbytes <= layout.nbytes


class TestVersions:
    @given(placed(), st.sets(st.integers(0, 12)))
    def test_copying_what_changed_is_as_good_as_copying_all(
        self, old: dict[str, TensorRecord], picked: set[int]
    ) -> None:
        new = moved(old, picked, ARENA // 2)
        layout = lay_out(old.values())
        arena = noise(2)
        image = carry_out(runs_of(layout, old), arena, bytearray(layout.nbytes))
        slots = changed_slots(layout, old, new)
        delta = runs_for(slots, new)
        assert_holds(layout, carry_out(delta, arena, image), new, arena)
        changed = {name for slot in slots for name in slot.names}
        assert changed == {n for n in old if old[n].offset != new[n].offset}
        # Nothing but changed tensors and the padding between neighbours of them is copied.
        assert total_bytes(delta) <= sum(align_up(slot.nbytes) for slot in slots)

    @given(placed(), st.sets(st.integers(0, 12)))
    def test_a_version_elsewhere_still_fits_and_fills(
        self, old: dict[str, TensorRecord], picked: set[int]
    ) -> None:
        new = moved(old, picked, ARENA // 2)
        layout = lay_out(old.values())
        assert misfits(layout, new) == []
        arena = noise(3)
        image = carry_out(runs_of(layout, new), arena, bytearray(layout.nbytes))
        assert_holds(layout, image, new, arena)
        assert [run for _, run in slot_runs(layout.slots, new)] == [
            Run(new[s.names[0]].offset, s.offset, s.nbytes) for s in layout.slots if s.nbytes
        ]

    def test_every_way_not_to_fit_is_named(self) -> None:
        old = contiguous([256, 256, 256])
        layout = lay_out(old.values())
        new = dict(old)
        del new["c.t0"]
        new["c.t1"] = TensorRecord("c.t1", "int8", (256,), (1,), 256, 256)
        new["c.extra"] = record("c.extra", 4096, 8)
        reasons = misfits(layout, new)
        assert len(reasons) == 3
        assert any("c.extra is new" in line for line in reasons)
        assert any("c.t0 is missing" in line for line in reasons)
        assert any("c.t1 is int8[256]" in line and "was uint8[256]" in line for line in reasons)

    @pytest.mark.parametrize(
        "changed",
        [
            TensorRecord("c.t", "float32", (4, 2), (2, 1), 0, 32),
            TensorRecord("c.t", "float32", (2, 4), (1, 2), 0, 32),
            TensorRecord("c.t", "float32", (2, 4), (4, 1), 0, 24, "packed"),
        ],
        ids=["shape", "stride", "encoding"],
    )
    def test_one_differing_field_is_enough(self, changed: TensorRecord) -> None:
        layout = lay_out([TensorRecord("c.t", "float32", (2, 4), (4, 1), 0, 32)])
        assert len(misfits(layout, {"c.t": changed})) == 1

    def test_a_tie_that_ended_does_not_fit_and_a_new_one_does(self) -> None:
        tied = {"c.a": record("c.a", 0, 64), "c.b": record("c.b", 0, 64)}
        apart = {"c.a": record("c.a", 0, 64), "c.b": record("c.b", 256, 64)}
        assert any("no longer tied" in line for line in misfits(lay_out(tied.values()), apart))
        assert misfits(lay_out(apart.values()), tied) == []


class TestRuns:
    @given(placed(), st.sets(st.integers(0, 12)))
    def test_joining_loses_no_byte_and_reads_only_padding_besides(
        self, records: dict[str, TensorRecord], picked: set[int]
    ) -> None:
        slots = [slot for index, slot in enumerate(lay_out(records.values()).slots) if index not in picked]
        for version in (records, moved(records, picked, ARENA // 2)):
            single = [run for _, run in slot_runs(slots, version)]
            joined = runs_for(slots, version)
            for run in single:
                assert any(
                    j.target <= run.target
                    and run.target + run.nbytes <= j.target + j.nbytes
                    and run.source - j.source == run.target - j.target
                    for j in joined
                )
            for one, other in pairwise(joined):
                assert other.target - one.target - one.nbytes >= ALIGN or (
                    other.source - one.source != other.target - one.target
                )
            extra = total_bytes(joined) - total_bytes(single)
            assert extra == sum(-run.nbytes % ALIGN for run in single) - sum(
                -j.nbytes % ALIGN for j in joined
            )

    def test_a_gap_of_a_whole_unit_is_never_bridged(self) -> None:
        # Between these two lies somebody else's tensor: copying across would read it into nobody's slot.
        slots = [Slot(0, 256, ("c.a",)), Slot(512, 256, ("c.b",))]
        assert len(runs_for(slots, {"c.a": record("c.a", 0, 256), "c.b": record("c.b", 512, 256)})) == 2

    def test_neighbours_in_the_image_but_not_in_the_arena_stay_apart(self) -> None:
        slots = [Slot(0, 256, ("c.a",)), Slot(256, 256, ("c.b",))]
        assert len(runs_for(slots, {"c.a": record("c.a", 0, 256), "c.b": record("c.b", 512, 256)})) == 2


class TestNames:
    def test_records_are_grouped_by_component_and_ignored_names_left_out(self) -> None:
        records = {n: record(n, 0, 1) for n in ("a.x", "a.y.z", "b.x", "ab.x")}
        grouped = by_component(records, ["a", "b", "none"], matcher(["*.z"]))
        assert {name: sorted(group) for name, group in grouped.items()} == {
            "a": ["a.x"],
            "b": ["b.x"],
            "none": [],
        }

    @pytest.mark.parametrize(
        ("patterns", "name", "expected"),
        [
            ((), "a.b", False),
            (("a.*",), "a.b.c", True),
            (("a.?",), "a.bc", False),
            (("x", "*.lora_[AB].*"), "t.q.lora_A.weight", True),
            (("a.b",), "A.b", False),
            (("a.b",), "a.b.c", False),
        ],
    )
    def test_patterns(self, patterns: tuple[str, ...], name: str, expected: bool) -> None:
        assert matcher(patterns)(name) is expected
