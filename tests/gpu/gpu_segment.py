"""A small real arena for the GPU tests, mapped both ways."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass

import torch

from weightstore.admission import Admission
from weightstore.arena import Arena
from weightstore.layout import DATA_OFFSET
from weightstore.mapping import ArenaMapping

MIB = 1 << 20
WINDOW = 16 * MIB


@dataclass
class Segment:
    """An arena with every window committed and filled with random bytes, and its two kinds of mapping."""

    arena: Arena
    reader: ArenaMapping
    writer: ArenaMapping

    def fill(self, seed: int = 0) -> None:
        data = self.writer.tensor[DATA_OFFSET : DATA_OFFSET + self.arena.committed]
        # As words, since torch draws one number an element.
        data.view(torch.int64).random_(generator=torch.Generator().manual_seed(seed))

    def bytes(self, offset: int, nbytes: int) -> torch.Tensor:
        return self.reader.tensor[offset : offset + nbytes]


def open_segment(nbytes: int, window: int = WINDOW, committed: int | None = None) -> Segment:
    arena = Arena.open(f"ws-gputest-{uuid.uuid4().hex[:12]}", nbytes, window, Admission(reserve=0))
    arena.commit_data(nbytes if committed is None else committed)
    mappings = []
    for fd, writable in ((arena.reader_fd(), False), (arena.writer_fd(), True)):
        mappings.append(ArenaMapping(fd, arena.nbytes, writable))
        os.close(fd)
    return Segment(arena, *mappings)
