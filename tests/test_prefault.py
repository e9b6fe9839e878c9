"""Prefaulting maps pages and changes nothing else."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_store import FakeArena

from weightstore.layout import DATA_OFFSET
from weightstore.mapping import ArenaMapping
from weightstore.prefault import GRAIN, Prefault

PAGE = mmap.PAGESIZE


def resident(address: int) -> int:
    """Bytes of the mapping at `address` that this process has page-table entries for."""
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        start, end = (int(n, 16) for n in block.split(" ", 1)[0].split("-"))
        if start <= address < end:
            found = re.search(r"^Rss:\s+(\d+) kB", block, re.MULTILINE)
            assert found is not None
            return int(found[1]) * 1024
    raise AssertionError(f"no mapping at {address:#x}")


class Mapped:
    """Shared pages that exist, in a mapping that has touched none of them."""

    def __init__(self, nbytes: int) -> None:
        self.fd = os.memfd_create("weightstore-test")
        self.content = bytes(range(256)) * (nbytes // 256)
        os.write(self.fd, self.content)
        self.pages = mmap.mmap(self.fd, nbytes)
        self.pages.madvise(mmap.MADV_NOHUGEPAGE)
        self.address = np.frombuffer(self.pages, np.uint8).ctypes.data

    def resident(self) -> int:
        return resident(self.address)


@pytest.fixture
def mapped() -> Iterator[Mapped]:
    mapped = Mapped(4 * GRAIN)
    yield mapped
    assert bytes(mapped.pages) == mapped.content
    os.close(mapped.fd)


def test_exactly_the_pages_asked_for_are_mapped(mapped: Mapped) -> None:
    assert mapped.resident() == 0
    prefault = Prefault(mapped.address, 4 * GRAIN)
    prefault(10 * PAGE + 100, 20 * PAGE)
    assert mapped.resident() == 21 * PAGE
    prefault(GRAIN - PAGE, GRAIN + 2 * PAGE)
    assert mapped.resident() == 21 * PAGE + GRAIN + 2 * PAGE
    prefault(0, 4 * GRAIN)
    assert mapped.resident() == 4 * GRAIN


def test_what_was_done_is_not_done_again(mapped: Mapped, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "weightstore.prefault._madvise", lambda at, n, _: asked.append((at - mapped.address, n))
    )
    prefault = Prefault(mapped.address, 4 * GRAIN)
    prefault(GRAIN, 2 * GRAIN)
    prefault(GRAIN + 5, 2 * GRAIN - 5)
    assert asked == [(GRAIN, 2 * GRAIN)]
    prefault(PAGE + 1, 4 * GRAIN - PAGE - 1)
    assert asked[1:] == [(PAGE, GRAIN - PAGE), (3 * GRAIN, GRAIN)]
    prefault(PAGE, GRAIN)  # the first part was done only from a page on, so it is asked for again
    assert asked[3:] == [(PAGE, GRAIN - PAGE)]


def test_nothing_is_fine(mapped: Mapped) -> None:
    Prefault(mapped.address, 4 * GRAIN)(GRAIN + 1, 0)
    assert mapped.resident() == 0


def test_a_reader_of_the_arena_needs_none() -> None:
    arena = FakeArena()
    for fd, writable in ((arena.reader(), False), (arena.writer(), True)):
        with ArenaMapping(fd, arena.nbytes, writable, str(arena.uuid)) as mapping:
            mapping.prefault(DATA_OFFSET, PAGE)
            before = resident(mapping.address + DATA_OFFSET)
            mapping.prefault(DATA_OFFSET + 100 * PAGE, 50 * PAGE)
            assert resident(mapping.address + DATA_OFFSET) - before == (50 * PAGE if writable else 0)
        os.close(fd)
    arena.close()
