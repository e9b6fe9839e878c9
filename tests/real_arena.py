"""A small real arena without a service: shared memory filled with random bytes, mapped both ways."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from weightstore.admission import Admission
from weightstore.arena import Arena
from weightstore.layout import DATA_OFFSET
from weightstore.mapping import ArenaMapping

MIB = 1 << 20


@dataclass
class RealArena:
    """`start` is the arena offset of the first data byte; all of the data area is committed."""

    reader: ArenaMapping
    writer: ArenaMapping
    start: int
    nbytes: int

    def bytes(self, offset: int, nbytes: int) -> torch.Tensor:
        return self.reader.tensor[offset : offset + nbytes]


@contextmanager
def real_arena(nbytes: int, window: int, seed: int = 0) -> Iterator[RealArena]:
    arena = Arena.open(f"ws-test-{uuid.uuid4().hex[:12]}", nbytes, window, Admission(reserve=0))
    try:
        arena.commit_data(nbytes)
        mappings = []
        for fd, writable in ((arena.reader_fd(), False), (arena.writer_fd(), True)):
            mappings.append(ArenaMapping(fd, arena.nbytes, writable))
            os.close(fd)
        reader, writer = mappings
        data = writer.tensor[DATA_OFFSET : DATA_OFFSET + nbytes]
        data.view(torch.int64).random_(generator=torch.Generator().manual_seed(seed))
        yield RealArena(reader, writer, DATA_OFFSET, nbytes)
        reader.close()
        writer.close()
    finally:
        arena.unlink()
        arena.close()
