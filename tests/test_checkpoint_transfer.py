"""Pieces cover exactly what they were cut from, and moving them moves exactly those bytes."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightstore.checkpoint.transfer import (
    MAX_RANGES,
    Job,
    Piece,
    cut,
    is_row_major,
    move_all,
    move_piece,
    piece_job,
    strided_jobs,
)
from weightstore.errors import CheckpointError, StorageError
from weightstore.types import TensorRecord


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3), st.integers(0, 3)), max_size=20),
    st.integers(1, 50),
)
def test_pieces_cover_every_byte_once(sizes: list[tuple[int, int, int]], piece_bytes: int) -> None:
    placed, file_offset, arena_offset = [], 0, 0
    for nbytes, file_gap, arena_gap in sizes:
        placed.append((file_offset + file_gap, arena_offset + arena_gap, nbytes))
        file_offset += file_gap + nbytes
        arena_offset += arena_gap + nbytes
    expected = {f + i: a + i for f, a, n in placed for i in range(n)}
    got: dict[int, int] = {}
    for piece in cut(reversed(placed), piece_bytes):
        assert 0 < piece.nbytes <= piece_bytes and piece.nbytes == sum(n for _, n in piece.ranges)
        position = piece.offset
        for arena, nbytes in piece.ranges:
            for i in range(nbytes):
                assert position not in got
                got[position] = arena + i
                position += 1
    assert got == expected


def test_neighbours_in_file_and_arena_become_one_range() -> None:
    assert cut([(100, 1024, 256), (356, 1280, 256), (612, 1536, 10)]) == [Piece(100, 522, ((1024, 522),))]
    assert cut([(0, 0, 10), (10, 256, 10)]) == [Piece(0, 20, ((0, 10), (256, 10)))]
    assert len(cut([(i, 256 * i, 1) for i in range(MAX_RANGES + 1)])) == 2


def open_file(path: Path, data: bytes = b"") -> int:
    path.write_bytes(data)
    return os.open(path, os.O_RDWR)


def short(move: object, limit: int):  # type: ignore[no-untyped-def]
    """preadv or pwritev that moves at most `limit` bytes a call, as the kernel may."""

    def limited(fd: int, views: Sequence[memoryview], offset: int) -> int:
        taken, room = [], limit
        for view in views:
            taken.append(view[:room])
            room -= len(taken[-1])
        return move(fd, taken, offset)  # type: ignore[operator, no-any-return]

    return limited


def test_short_reads_and_writes_are_continued(tmp_path: Path) -> None:
    data = bytes(range(200))
    fd = open_file(tmp_path / "f", data)
    piece = Piece(20, 100, ((5, 30), (50, 0), (60, 1), (100, 69)))
    arena = memoryview(bytearray(300))
    move_piece(short(os.preadv, 7), fd, piece, arena, "f")
    assert bytes(arena[5:35]) == data[20:50]
    assert bytes(arena[60:61]) == data[50:51]
    assert bytes(arena[100:169]) == data[51:120]
    assert sum(arena) == sum(data[20:120]), "bytes outside the ranges were touched"
    out = open_file(tmp_path / "g")
    move_piece(short(os.pwritev, 11), out, piece, arena, "g")
    assert os.pread(out, 200, 20) == data[20:120]
    os.close(fd)
    os.close(out)


def test_whoever_prepares_the_arena_is_told_of_stretches_before_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(range(1, 101)))
    arena = memoryview(bytearray(2048))
    told: list[tuple[int, int, int]] = []

    def prepare(offset: int, nbytes: int) -> None:
        told.append((offset, nbytes, sum(arena)))

    fd = os.open(path, os.O_RDONLY)
    ranges = ((0, 10), (256, 20), (512, 30), (1024, 40))  # the last leaves more than alignment free
    piece_job(os.preadv, fd, Piece(0, 100, ranges), arena, "f", prepare).run()
    os.close(fd)
    assert told == [(0, 542, 0), (1024, 40, 0)]
    assert sum(arena) == sum(range(1, 101))


def test_a_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    fd = open_file(tmp_path / "f", b"x" * 50)
    with pytest.raises(CheckpointError, match="f: ends at byte 50, 10 bytes too early"):
        move_piece(os.preadv, fd, Piece(40, 20, ((0, 20),)), memoryview(bytearray(20)), "f")
    os.close(fd)


def test_an_io_error_names_the_file(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(StorageError, match="f: I/O error at byte 0: Is a directory"):
        move_piece(os.preadv, fd, Piece(0, 1, ((0, 1),)), memoryview(bytearray(1)), "f")
    os.close(fd)


@pytest.mark.parametrize(
    ("shape", "stride", "expected"),
    [
        ((), (), True),
        ((2, 3), (3, 1), True),
        ((2, 3), (1, 2), False),
        ((2, 1, 3), (3, 77, 1), True),
        ((1, 3, 2, 2), (12, 1, 6, 3), False),
        ((0, 3), (1, 9), True),
    ],
)
def test_row_major(shape: tuple[int, ...], stride: tuple[int, ...], expected: bool) -> None:
    assert is_row_major(shape, stride) is expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.complex64])
def test_strided_tensors_go_through_row_major_order_and_back(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightstore.checkpoint.transfer.PIECE_BYTES", 100)  # several pieces per tensor
    value = torch.arange(5 * 4 * 3 * 2).reshape(5, 4, 3, 2).to(dtype)
    last = value.to(memory_format=torch.channels_last)
    stored = last.permute(0, 2, 3, 1).contiguous().flatten().view(torch.uint8).numpy()  # memory order
    record = TensorRecord(
        "t", str(dtype).removeprefix("torch."), value.shape, last.stride(), 512, stored.nbytes
    )
    row_major = value.flatten().view(torch.uint8).numpy().tobytes()
    fd = open_file(tmp_path / "f", b"head" + row_major)
    arena = memoryview(bytearray(512 + stored.nbytes + 8))
    jobs = strided_jobs(os.preadv, fd, 4, record, arena, "f")
    assert len(jobs) > 1 and sum(job.nbytes for job in jobs) == stored.nbytes
    move_all(jobs, None, threads=2)
    assert bytes(arena[512 : 512 + stored.nbytes]) == stored.tobytes()
    assert not any(arena[:512]) and not any(arena[-8:])
    out = open_file(tmp_path / "g")
    move_all(strided_jobs(os.pwritev, out, 0, record, arena, "g"), None)
    assert os.pread(out, 10_000, 0) == row_major
    os.close(fd)
    os.close(out)
    assert np.frombuffer(arena, np.uint8).nbytes == len(arena)


def test_progress_comes_on_the_callers_thread_and_adds_up() -> None:
    seen: list[tuple[int, int, int]] = []
    ran: list[int] = []
    jobs = [Job(i, lambda i=i: ran.append(i)) for i in range(10)]
    move_all(jobs, lambda done, total: seen.append((done, total, threading.get_ident())), threads=3)
    assert sorted(ran) == list(range(10))
    assert seen[0][:2] == (0, 45) and seen[-1][:2] == (45, 45) and len(seen) == 11
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert {thread for _, _, thread in seen} == {threading.get_ident()}


def test_after_an_error_no_thread_is_still_moving(monkeypatch: pytest.MonkeyPatch) -> None:
    started, release, finished = threading.Event(), threading.Event(), threading.Event()

    class Pool(ThreadPoolExecutor):
        """Lets the running jobs go on only once the others are cancelled."""

        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            release.set()
            super().shutdown(wait=wait)

    monkeypatch.setattr("weightstore.checkpoint.transfer.ThreadPoolExecutor", Pool)

    def slow() -> None:
        started.set()
        release.wait()
        finished.set()

    def failing() -> None:
        started.wait()
        raise CheckpointError("broken")

    late: list[bool] = []
    jobs = [Job(1, slow), Job(1, failing), *[Job(1, lambda: late.append(release.wait())) for _ in range(50)]]
    with pytest.raises(CheckpointError, match="broken"):
        move_all(jobs, None, threads=2)
    assert finished.is_set(), "move_all returned while a job was running"
    assert len(late) <= 1, "jobs that had not begun were not cancelled"
    assert not [t for t in threading.enumerate() if t.name.startswith("weightstore-checkpoint")]
