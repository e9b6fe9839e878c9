"""Mappings of a real segment, real descriptors, and what the kernel allows through them."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import mmap
import os
import signal
import warnings
from collections.abc import Iterator
from uuid import uuid4

import numpy as np
import pytest
import torch
from fake_store import MIB, FakeArena

from weightstore.errors import ArenaUnusable, UsageError
from weightstore.layout import DATA_OFFSET
from weightstore.mapping import ArenaMapping


@pytest.fixture
def arena() -> Iterator[FakeArena]:
    arena = FakeArena()
    arena.write(DATA_OFFSET, bytes(range(256)))
    yield arena
    arena.close()


def reader(arena: FakeArena) -> ArenaMapping:
    fd = arena.reader()
    try:
        return ArenaMapping(fd, arena.nbytes, False, str(arena.uuid))
    finally:
        os.close(fd)


def writer(arena: FakeArena) -> ArenaMapping:
    fd = arena.writer()
    try:
        return ArenaMapping(fd, arena.nbytes, True, str(arena.uuid))
    finally:
        os.close(fd)


def mapped_bytes(address: int) -> bool:
    """Whether anything is mapped at `address`, by the kernel's word."""
    with open("/proc/self/maps") as maps:
        ranges = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in maps]
    return any(start <= address < end for start, end in ranges)


def test_the_same_bytes_as_memory_array_and_tensor(arena: FakeArena) -> None:
    mapping = reader(arena)
    want = bytes(range(256))
    assert bytes(mapping.view(DATA_OFFSET, 256)) == want
    assert bytes(mapping.buffer[DATA_OFFSET : DATA_OFFSET + 256]) == want
    assert mapping.array(DATA_OFFSET, 256).tobytes() == want
    assert bytes(mapping.tensor[DATA_OFFSET : DATA_OFFSET + 256].tolist()) == want
    assert ctypes.string_at(mapping.address + DATA_OFFSET, 256) == want
    assert mapping.tensor.data_ptr() == mapping.address
    assert mapping.tensor.numel() == mapping.nbytes == arena.nbytes
    assert (mapping.uuid, mapping.window, mapping.writable) == (str(arena.uuid), MIB, False)


def test_making_tensors_of_read_only_pages_warns_of_nothing(arena: FakeArena) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mapping = reader(arena)
        assert mapping.typed("int64")[DATA_OFFSET // 8].item() == 0x0706050403020100


def test_a_writer_writes_and_a_reader_sees_it(arena: FakeArena) -> None:
    source, target = writer(arena), reader(arena)
    source.tensor[DATA_OFFSET : DATA_OFFSET + 4] = torch.tensor([9, 8, 7, 6], dtype=torch.uint8)
    assert bytes(target.view(DATA_OFFSET, 4)) == b"\x09\x08\x07\x06"
    source.view(DATA_OFFSET, 1)[0] = 42
    assert target.tensor[DATA_OFFSET].item() == 42


def test_the_kernel_keeps_readers_from_writing(arena: FakeArena) -> None:
    mapping = reader(arena)
    with pytest.raises(TypeError):
        mapping.view(DATA_OFFSET, 1)[0] = 1
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        ctypes.memset(mapping.address + DATA_OFFSET, 0, 1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGSEGV
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.mprotect(ctypes.c_void_p(mapping.address), ctypes.c_size_t(4096), mmap.PROT_WRITE)
    assert failed == -1  # nor can the protection be lifted
    fd = arena.reader()
    with pytest.raises(ArenaUnusable, match="Permission denied"):
        ArenaMapping(fd, arena.nbytes, True)
    os.close(fd)


def test_what_was_handed_out_keeps_the_pages(arena: FakeArena) -> None:
    mapping = reader(arena)
    address = mapping.address
    views = [
        mapping.view(DATA_OFFSET, 256),
        mapping.array(DATA_OFFSET, 256),
        mapping.tensor[DATA_OFFSET : DATA_OFFSET + 256],
    ]
    mapping.close()
    mapping.close()
    del mapping
    while views:
        gc.collect()
        assert mapped_bytes(address)
        assert all(bytes(bytearray(view)) == bytes(range(256)) for view in views)
        views.pop()
    gc.collect()
    assert not mapped_bytes(address)


def test_a_closed_mapping_says_so(arena: FakeArena) -> None:
    with reader(arena) as mapping:
        assert not mapping.closed
    assert mapping.closed
    for use in (lambda: mapping.tensor, lambda: mapping.address, lambda: mapping.buffer):
        with pytest.raises(UsageError, match="closed"):
            use()


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, -1), (DATA_OFFSET + MIB, 1), (0, 1 << 60)])
def test_ranges_outside_are_refused(arena: FakeArena, offset: int, nbytes: int) -> None:
    mapping = reader(arena)
    with pytest.raises(UsageError):
        mapping.view(offset, nbytes)
    with pytest.raises(UsageError):
        mapping.array(offset, nbytes)


def test_another_arena_than_promised_is_refused(arena: FakeArena) -> None:
    fd = arena.reader()
    with pytest.raises(ArenaUnusable, match="promised was"):
        ArenaMapping(fd, arena.nbytes, False, str(uuid4()))
    with pytest.raises(ArenaUnusable, match="instead of"):
        ArenaMapping(fd, arena.nbytes + 4096, False, str(arena.uuid))
    with pytest.raises(ArenaUnusable, match="promised was"):
        ArenaMapping(fd, arena.nbytes - 4096, False, str(arena.uuid))
    os.close(fd)


def test_what_is_no_arena_is_refused() -> None:
    fd = os.memfd_create("no-arena")
    os.ftruncate(fd, 1 << 20)
    with pytest.raises(ArenaUnusable, match="not a weightstore arena"):
        ArenaMapping(fd, 1 << 20, False)
    os.close(fd)


def test_the_descriptor_stays_the_callers(arena: FakeArena) -> None:
    fd = arena.reader()
    ArenaMapping(fd, arena.nbytes, False).close()
    os.fstat(fd)
    os.close(fd)


def test_typed_views_cover_the_segment_and_are_made_once(arena: FakeArena) -> None:
    mapping = reader(arena)
    for dtype in ("bfloat16", "float8_e5m2", "complex64", "bool"):
        whole = mapping.typed(dtype)
        assert whole.data_ptr() == mapping.address
        assert whole.numel() * whole.element_size() == mapping.nbytes
        assert mapping.typed(dtype) is whole
    assert mapping.array(DATA_OFFSET, 8).dtype == np.uint8
