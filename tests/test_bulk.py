"""Spans are covered exactly, on however many threads, and nothing runs on after a return."""

from __future__ import annotations

import ctypes
import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightstore.bulk import BATCH_BYTES, SMALL_BYTES, Span, batches, copy_spans, each

sizes = st.lists(st.integers(0, 50), max_size=20)


@given(sizes, st.integers(1, 64))
def test_batches_cover_the_spans_exactly_and_in_order(lengths: list[int], room: int) -> None:
    spans, at = [], 0
    for index, nbytes in enumerate(lengths):
        spans.append(Span(index, 1000 + at, 9000 + at, nbytes))
        at += nbytes
    found = batches(spans, room)
    assert all(sum(span.nbytes for span in batch) == room for batch in found[:-1])
    assert all(0 < sum(span.nbytes for span in batch) <= room for batch in found)
    bytes_found = [
        (index, target + i, source + i)
        for batch in found
        for index, target, source, nbytes in batch
        for i in range(nbytes)
    ]
    assert bytes_found == [
        (span.number, span.target + i, span.source + i) for span in spans for i in range(span.nbytes)
    ]


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_copies_of_all_sizes_land_and_nothing_beside_them(threads: int | None) -> None:
    lengths = [0, 1, 255, SMALL_BYTES - 1, SMALL_BYTES, SMALL_BYTES + 1, 2 * BATCH_BYTES + 12345]
    total = sum(lengths) + len(lengths)
    source = random.Random(1).randbytes(total)
    given_bytes = ctypes.create_string_buffer(source, total)
    target = ctypes.create_string_buffer(b"\xee" * total, total)
    spans, expected, at = [], bytearray(b"\xee" * total), 0
    for index, nbytes in enumerate(lengths):
        start = ctypes.addressof(target) + at
        spans.append(Span(index, start, ctypes.addressof(given_bytes) + at, nbytes))
        expected[at : at + nbytes] = source[at : at + nbytes]
        at += nbytes + 1  # one byte between them stays
    copy_spans(spans, threads)
    assert target.raw == bytes(expected)


def test_every_large_piece_is_announced_before_it_is_copied() -> None:
    source = ctypes.create_string_buffer(b"x" * (BATCH_BYTES + SMALL_BYTES), BATCH_BYTES + SMALL_BYTES)
    target = ctypes.create_string_buffer(len(source))
    told: list[tuple[int, int, bytes]] = []

    def before(span: Span) -> None:
        offset = span.target - ctypes.addressof(target)
        told.append((offset, span.nbytes, target.raw[offset : offset + 1]))

    spans = [Span(0, ctypes.addressof(target), ctypes.addressof(source), len(source))]
    copy_spans(spans, 1, before)
    assert told == [(0, BATCH_BYTES, b"\0"), (BATCH_BYTES, SMALL_BYTES, b"\0")]
    assert target.raw == source.raw


@pytest.mark.parametrize("here", [True, False])
def test_an_error_is_raised_after_all_threads_have_ended(here: bool) -> None:
    """An error on the caller's thread (`here`) or on another."""
    started, done = threading.Barrier(2), []

    def work(span: Span) -> None:
        started.wait(10)
        if (threading.current_thread() is threading.main_thread()) is here:
            raise ValueError("broken")
        done.append(span.number)

    with pytest.raises(ValueError, match="broken"):
        each([Span(0, 0, 0, BATCH_BYTES), Span(1, 0, 0, BATCH_BYTES)], work, threads=2)
    assert len(done) == 1
    assert not [t for t in threading.enumerate() if t.name.startswith("weightstore-bulk")]
