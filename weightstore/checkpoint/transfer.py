"""Moving bytes between files and the arena: cut into pieces once, then moved by several threads.

A file's tensors lie gapless one after another; in the arena they start at multiples of 256. So a
piece is one range of the file and one or more ranges of the arena, and `preadv`/`pwritev` scatter or
gather them in one call, with no buffer in between. Tensors whose memory order is not row-major go
through numpy, a bounded number of rows at a time.

Invariant: when `move_all` returns or raises, no thread touches the arena or a file any more.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import msgspec

from weightstore.errors import CheckpointError, StorageError
from weightstore.types import ALIGN, ITEMSIZE, TensorRecord

if TYPE_CHECKING:
    import numpy as np

PIECE_BYTES: Final = 16 << 20
"""Bytes per piece: large enough that a call's overhead vanishes, small enough to keep threads busy."""
MAX_RANGES: Final = os.sysconf("SC_IOV_MAX")
"""Arena ranges that one preadv or pwritev may name."""

Progress = Callable[[int, int], None]
"""Called on the caller's thread with (bytes moved, bytes in all), the first time with zero moved."""

Mover = Callable[[int, Sequence[memoryview], int], int]
"""os.preadv or os.pwritev: (descriptor, buffers, file offset) → bytes moved."""

Prepare = Callable[[int, int], object]
"""Told (arena offset, nbytes) of what is about to be written."""


class Piece(msgspec.Struct, frozen=True):
    """`nbytes` bytes at `offset` of a file, and the arena ranges (offset, nbytes) they belong to."""

    offset: int
    nbytes: int
    ranges: tuple[tuple[int, int], ...]


class Job(msgspec.Struct, frozen=True):
    """One unit of work for a thread: `nbytes` is what it reports as moved."""

    nbytes: int
    run: Callable[[], None]


def cut(placed: Iterable[tuple[int, int, int]], piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """Cut (file offset, arena offset, nbytes) triples into pieces of at most `piece_bytes` bytes.

    Triples that follow each other in the file share a piece; if they also do so in the arena, a range.
    """
    pieces: list[Piece] = []
    start = end = 0
    ranges: list[tuple[int, int]] = []

    def flush() -> None:
        if ranges:
            pieces.append(Piece(start, end - start, tuple(ranges)))
            ranges.clear()

    for file_offset, arena_offset, nbytes in sorted(placed):
        done = 0
        while done < nbytes:
            position = file_offset + done
            if position != end or end - start >= piece_bytes or len(ranges) >= MAX_RANGES:
                flush()
                start = end = position
            take = min(nbytes - done, piece_bytes - (end - start))
            place = arena_offset + done
            if ranges and sum(ranges[-1]) == place:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + take)
            else:
                ranges.append((place, take))
            end += take
            done += take
    flush()
    return pieces


def move_piece(move: Mover, fd: int, piece: Piece, arena: memoryview, file: str) -> None:
    """Move one piece; short reads and writes are continued. CheckpointError if the file ends early."""
    move_ranges(move, fd, piece.offset, [arena[at : at + n] for at, n in piece.ranges], file)


def piece_job(
    move: Mover, fd: int, piece: Piece, arena: memoryview, file: str, prepare: Prepare | None = None
) -> Job:
    """A job that moves one piece; `prepare` is called before with each stretch of the arena it goes to."""

    def run() -> None:
        if prepare is not None:
            for offset, nbytes in stretches(piece.ranges):
                prepare(offset, nbytes)
        move_piece(move, fd, piece, arena, file)

    return Job(piece.nbytes, run)


def stretches(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges with those joined that follow each other but for alignment."""
    joined: list[tuple[int, int]] = []
    for offset, nbytes in ranges:
        if joined and 0 <= offset - sum(joined[-1]) < ALIGN:
            joined[-1] = (joined[-1][0], offset + nbytes - joined[-1][0])
        else:
            joined.append((offset, nbytes))
    return joined


def move_ranges(move: Mover, fd: int, offset: int, views: Iterable[memoryview], file: str) -> None:
    waiting = deque(views)
    while waiting:
        try:
            moved = move(fd, tuple(waiting), offset)
        except OSError as error:
            raise StorageError(f"{file}: I/O error at byte {offset}: {error.strerror}", file=file) from None
        if moved == 0:
            missing = sum(v.nbytes for v in waiting)
            raise CheckpointError(
                f"{file}: ends at byte {offset}, {missing} bytes too early; it changed while it was read",
                file=file,
            )
        offset += moved
        while waiting and moved >= waiting[0].nbytes:
            moved -= waiting.popleft().nbytes
        if moved:
            waiting[0] = waiting[0][moved:]


def is_row_major(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether a dense tensor's bytes lie in row-major order (strides of size-1 dimensions mean nothing)."""
    steps = [step for size, step in zip(shape, stride, strict=True) if size != 1]
    return 0 in shape or all(a >= b for a, b in pairwise(steps))


def strided_jobs(
    move: Mover, fd: int, offset: int, record: TensorRecord, arena: memoryview, file: str
) -> list[Job]:
    """Jobs that move a tensor between row-major bytes at `offset` of a file and its own order in memory."""
    import numpy as np

    if not record.nbytes:
        return []
    itemsize = ITEMSIZE[record.dtype]
    flat = np.frombuffer(arena, dtype=f"u{itemsize}", count=record.nbytes // itemsize, offset=record.offset)
    tensor = np.lib.stride_tricks.as_strided(flat, record.shape, [step * itemsize for step in record.stride])
    row_bytes = record.nbytes // record.shape[0]
    rows = max(1, PIECE_BYTES // row_bytes)

    def job(first: int) -> Job:
        part = tensor[first : first + rows]
        at = offset + first * row_bytes
        return Job(len(part) * row_bytes, lambda: _move_rows(move, fd, at, part, file))

    return [job(first) for first in range(0, record.shape[0], rows)]


def _move_rows(move: Mover, fd: int, offset: int, part: np.ndarray[Any, Any], file: str) -> None:
    import numpy as np

    reading = move is os.preadv
    rows = np.empty(part.shape, part.dtype) if reading else np.ascontiguousarray(part)
    move_ranges(move, fd, offset, [rows.reshape(-1).view(np.uint8).data], file)
    if reading:
        part[...] = rows


def move_all(jobs: Sequence[Job], progress: Progress | None, threads: int | None = None) -> None:
    """Run the jobs on `threads` threads (None: by the number of cores); the first error ends the rest."""
    total = sum(job.nbytes for job in jobs)
    moved = 0
    if progress is not None:
        progress(0, total)
    pool = ThreadPoolExecutor(threads or default_threads(), thread_name_prefix="weightstore-checkpoint")
    try:
        waiting = {pool.submit(job.run): job.nbytes for job in jobs}
        for future in as_completed(waiting):
            future.result()
            moved += waiting[future]
            if progress is not None:
                progress(moved, total)
    finally:
        # Also on KeyboardInterrupt: whoever unmaps or aborts next relies on the threads being gone.
        pool.shutdown(wait=True, cancel_futures=True)


def default_threads() -> int:
    """Enough to keep an NVMe drive's queue full, also where there are few cores."""
    return min(16, max(4, len(os.sched_getaffinity(0))))
