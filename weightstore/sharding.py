"""Sharded tensors: which elements of the whole this rank holds, and which of those it is the one to write.

How a tensor lies over a mesh of ranks is known to each of them. From that every rank works out its own part
alone, so nothing is gathered and no rank waits for another.

Invariant: over all ranks of the mesh, what `pieces_of` gives and `share` leaves of it is every element
exactly once.

Pure: mesh, placements and shapes are plain numbers here; `dtensors.py` takes them from a DTensor.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any, Final, NamedTuple
from zlib import crc32

from weightstore.errors import UsageError
from weightstore.types import Box

SHARED_BYTES: Final = 1 << 20
"""A tensor of which several ranks have a copy is cut up among them from this size on."""

Run = tuple[int, int]


class Split(NamedTuple):
    """How one dimension of a mesh cuts dimension `dim` of a tensor: into a chunk for each of its ranks; with
    a `factor` above 1 each of that many chunks anew, so that a rank's rows lie apart in the whole."""

    dim: int
    factor: int = 1


class Piece(NamedTuple):
    """The elements `box` of the whole tensor; `at` is where they start in the local one."""

    box: Box
    at: tuple[int, ...]

    def within(self) -> Box:
        """The same elements, counted in the local tensor."""
        sizes = map(int.__sub__, self.box.hi, self.box.lo)
        return Box(self.at, tuple(map(int.__add__, self.at, sizes)))


def pieces_of(
    shape: Sequence[int], mesh: Sequence[int], coordinate: Sequence[int], splits: Sequence[Split | None]
) -> list[Piece]:
    """What the rank at `coordinate` of a mesh of that shape holds, in pieces that lie together in the whole.

    `splits` has one entry per mesh dimension, from left to right as they are applied; None has a replica
    on each of its ranks. Chunks are those of `torch.chunk`: of equal size, the last ones smaller or empty.
    """
    if 0 in shape:
        # Without elements there is nothing to divide, but somebody has to say that it is written.
        first = all(not rank for rank, split in zip(coordinate, splits, strict=True) if split is not None)
        return [Piece(Box((0,) * len(shape), tuple(shape)), (0,) * len(shape))] if first else []
    runs: list[list[Run]] = [[(0, size)] for size in shape]
    for ranks, rank, split in zip(mesh, coordinate, splits, strict=True):
        if split is not None:
            runs[split.dim] = _cut(runs[split.dim], ranks, rank, split.factor)
    starts = [_starts(dim) for dim in runs]
    pieces = []
    for chosen in product(*(range(len(dim)) for dim in runs)):
        ends = [runs[dim][i] for dim, i in enumerate(chosen)]
        box = Box(tuple(lo for lo, _ in ends), tuple(hi for _, hi in ends))
        pieces.append(Piece(box, tuple(starts[dim][i] for dim, i in enumerate(chosen))))
    return pieces


def _cut(runs: list[Run], ranks: int, rank: int, factor: int) -> list[Run]:
    """Of the positions that `runs` list one after another, those of `rank`."""
    total = sum(hi - lo for lo, hi in runs)
    mine: list[Run] = []
    for i in range(factor):
        start, end = _chunk(total, factor, i)
        lo, hi = _chunk(end - start, ranks, rank)
        for run in _slice(runs, start + lo, start + hi):
            if mine and mine[-1][1] == run[0]:
                mine[-1] = (mine[-1][0], run[1])
            else:
                mine.append(run)
    return mine


def _chunk(size: int, count: int, index: int) -> Run:
    """Chunk `index` of `count`, as torch.chunk cuts `size`."""
    step = -(-size // count)
    return min(index * step, size), min((index + 1) * step, size)


def _slice(runs: list[Run], start: int, end: int) -> list[Run]:
    """Positions `start` to `end` of those that `runs` list one after another."""
    found = []
    at = 0
    for lo, hi in runs:
        first, last = max(start, at), min(end, at + hi - lo)
        if first < last:
            found.append((lo + first - at, lo + last - at))
        at += hi - lo
    return found


def _starts(runs: list[Run]) -> list[int]:
    starts, at = [], 0
    for lo, hi in runs:
        starts.append(at)
        at += hi - lo
    return starts


def share(box: Box, itemsize: int, replica: int, replicas: int, key: str) -> Box | None:
    """Of the elements that `replicas` ranks have each, those that number `replica` writes; None for nothing.

    Large ones are cut along the first dimension that has enough rows; of the others each belongs to one
    rank, chosen by `key`, which must be the same on all ranks.
    """
    if replicas == 1:
        return box
    sizes = [hi - lo for lo, hi in zip(box.lo, box.hi, strict=True)]
    dim = next((dim for dim, size in enumerate(sizes) if size >= replicas), None)
    if dim is None or prod(sizes) * itemsize < SHARED_BYTES:
        return box if crc32(key.encode()) % replicas == replica else None
    lo, hi = list(box.lo), list(box.hi)
    lo[dim] = box.lo[dim] + sizes[dim] * replica // replicas
    hi[dim] = box.lo[dim] + sizes[dim] * (replica + 1) // replicas
    return Box(tuple(lo), tuple(hi))


def slices(box: Box, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
    """Indices of the elements of `box`, counted from `origin` (None: from 0)."""
    zero = origin or (0,) * len(box.lo)
    return tuple(slice(lo - at, hi - at) for lo, hi, at in zip(box.lo, box.hi, zero, strict=True))


# -- torch.distributed --------------------------------------------------------------------------------


def rank_of(key: str | None, rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and world size of a refit that is shared under `key`: those given, else torch.distributed's.

    Raises:
        UsageError: not given, and torch.distributed is not initialised.
    """
    if key is None:
        return rank or 0, 1 if world_size is None else world_size
    if rank is None or world_size is None:
        torch_distributed: Any = sys.modules.get("torch.distributed")
        if (
            torch_distributed is None
            or not torch_distributed.is_available()
            or not torch_distributed.is_initialized()
        ):
            raise UsageError(
                f"refit {key!r} is shared, and torch.distributed is not initialised here: give rank= and "
                "world_size="
            )
        rank = torch_distributed.get_rank() if rank is None else rank
        world_size = torch_distributed.get_world_size() if world_size is None else world_size
    return rank, world_size


def is_dtensor(value: Any) -> bool:
    """Whether `value` is a DTensor; never imports the module that would say so."""
    for name in ("torch.distributed.tensor", "torch.distributed._tensor"):  # the latter until torch 2.5
        found = getattr(sys.modules.get(name), "DTensor", None)
        if found is not None:
            return isinstance(value, found)
    return False
