"""Prefaulting maps pages and changes nothing else."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import numpy as np
import pytest

from weightstore.checkpoint.prefault import prefault

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


@pytest.mark.parametrize("writable", [True, False])
def test_the_pages_of_a_writable_view_are_mapped_and_as_they_were(tmp_path: Path, writable: bool) -> None:
    path = Path("/dev/shm") / f"prefault-{tmp_path.name}"
    content = bytes(range(256)) * (64 * PAGE // 256)
    path.write_bytes(content)
    try:
        with open(path, "r+b") as file:
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            pages = mmap.mmap(file.fileno(), 64 * PAGE, access=access)
    finally:
        path.unlink()
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    view = memoryview(pages)
    address = np.frombuffer(view, np.uint8).ctypes.data
    assert resident(address) == 0
    prefault(view[10 * PAGE + 100 : 30 * PAGE + 1])
    assert resident(address) == (21 * PAGE if writable else 0)
    assert bytes(view) == content


def test_nothing_and_odd_places_are_fine() -> None:
    data = bytearray(b"abc")
    prefault(memoryview(data)[1:1])
    prefault(memoryview(data)[1:2])
    assert data == b"abc"
