"""Best fit, coalescing and growth; a state machine checks the bookkeeping against plain sets."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from weightstore.allocator import Allocator, NoSpace
from weightstore.types import ALIGN, Extent, align_up


def test_a_refit_is_contiguous_and_in_order():
    allocator = Allocator(4096, 64 * ALIGN)
    extents = allocator.reserve([100, ALIGN, 3 * ALIGN, 1])
    assert [e.offset - 4096 for e in extents] == [0, ALIGN, 2 * ALIGN, 5 * ALIGN]
    assert [e.nbytes for e in extents] == [100, ALIGN, 3 * ALIGN, 1]


def test_the_smallest_block_that_fits_is_used():
    allocator = Allocator(0, 20 * ALIGN)
    a, b, c, d = allocator.reserve([8 * ALIGN, ALIGN, 4 * ALIGN, ALIGN])
    allocator.release([a])
    allocator.release([c])
    (fitted,) = allocator.reserve([3 * ALIGN])
    assert fitted.offset == c.offset
    assert {b.offset, d.offset} == {8 * ALIGN, 13 * ALIGN}


def test_scattered_blocks_serve_when_none_holds_all():
    allocator = Allocator(0, 9 * ALIGN)
    blocks = allocator.reserve([ALIGN] * 9)
    allocator.release(blocks[::2])
    places = allocator.reserve([ALIGN] * 5)
    assert sorted(places) == blocks[::2]
    assert allocator.free_bytes == 0


def test_a_refusal_says_how_much_to_grow_and_changes_nothing():
    allocator = Allocator(0, 8 * ALIGN)
    (first,) = allocator.reserve([6 * ALIGN])
    with pytest.raises(NoSpace) as refusal:
        allocator.reserve([3 * ALIGN, 2 * ALIGN])
    assert refusal.value.shortfall == 3 * ALIGN  # two of five are free at the end
    assert allocator.free_blocks() == [Extent(6 * ALIGN, 2 * ALIGN)]
    allocator.grow(refusal.value.shortfall)
    assert [e.offset for e in allocator.reserve([3 * ALIGN, 2 * ALIGN])] == [6 * ALIGN, 9 * ALIGN]
    assert first.offset == 0


def test_empty_tensors_take_no_space():
    allocator = Allocator(ALIGN, 0)
    assert allocator.reserve([0, 0]) == [Extent(ALIGN, 0)] * 2


@pytest.mark.parametrize("extent", [Extent(0, ALIGN), Extent(2 * ALIGN, ALIGN), Extent(ALIGN, 3 * ALIGN)])
def test_releasing_what_is_not_in_use_is_a_bug(extent: Extent):
    allocator = Allocator(0, 4 * ALIGN)
    allocator.claim([Extent(ALIGN, ALIGN)])
    before = allocator.free_blocks()
    with pytest.raises(ValueError, match="not in use"):
        allocator.release([extent])
    assert allocator.free_blocks() == before


def test_claiming_what_is_in_use_is_refused():
    allocator = Allocator(0, 4 * ALIGN)
    allocator.claim([Extent(ALIGN, 2 * ALIGN)])
    with pytest.raises(ValueError, match="not free"):
        allocator.claim([Extent(2 * ALIGN, ALIGN)])


class AllocatorMachine(RuleBasedStateMachine):
    """Whatever is asked in whatever order: no overlap, maximal free blocks, exact sums."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = Allocator(2 * ALIGN, 0)
        self.used: set[int] = set()

    @rule(units=st.integers(0, 12))
    def grow(self, units: int) -> None:
        self.allocator.grow(units * ALIGN)

    @rule(target=held, sizes=st.lists(st.integers(0, 5 * ALIGN), max_size=6))
    def reserve(self, sizes: list[int]) -> list[Extent]:
        total = sum(align_up(n) for n in sizes)
        before = self.allocator.free_blocks()
        try:
            extents = self.allocator.reserve(sizes)
        except NoSpace as refusal:
            assert max((b.nbytes for b in before), default=0) < total
            assert self.allocator.free_blocks() == before
            assert refusal.shortfall > 0
            return []
        assert [e.nbytes for e in extents] == sizes
        if any(b.nbytes >= total for b in before):
            filled = [e for e in extents if e.nbytes]
            assert all(align_up(a.end) == b.offset for a, b in pairwise(filled))
        for extent in extents:
            units = set(range(extent.offset, extent.offset + align_up(extent.nbytes), ALIGN))
            assert not units & self.used
            self.used |= units
        return extents

    @rule(extents=consumes(held), cut=st.integers(0, 6))
    def release(self, extents: list[Extent], cut: int) -> None:
        for part in (extents[:cut], extents[cut:]):
            self.allocator.release(part)
        for extent in extents:
            self.used -= set(range(extent.offset, extent.offset + align_up(extent.nbytes), ALIGN))

    @invariant()
    def free_is_the_complement_of_used(self) -> None:
        everything = set(range(self.allocator.start, self.allocator.end, ALIGN))
        blocks = self.allocator.free_blocks()
        free = {u for b in blocks for u in range(b.offset, b.end, ALIGN)}
        assert free == everything - self.used
        assert all(a.end < b.offset for a, b in pairwise(blocks))
        assert self.allocator.free_bytes + self.allocator.used_bytes == self.allocator.size
        assert self.allocator.largest_free == max((b.nbytes for b in blocks), default=0)


AllocatorMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_any_order_of_calls = AllocatorMachine.TestCase
