"""Plain memory and plain copies: what the store's own copies are compared with.

Every buffer has been written once before a copy is timed, unless its `drop` was called, which is the point
of it then.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from types import TracebackType

import torch

from bench.rows import clock

COPIES = {
    "memmove": "one ctypes.memmove of all bytes, on one thread",
    "torch": "one torch copy_ of one flat tensor, on torch's threads",
}
"""The plain copies; the faster one of a run is the reference."""


class Buffer:
    """`nbytes` bytes of this process's memory; a context manager.

    Args:
        shared: memory of the kind the arena is made of (shared memory in a tmpfs), instead of private
            anonymous memory.
        huge: ask for huge pages, as images on the host backend do; acts on private memory only where the
            kernel has them, on shared memory only where the tmpfs has them too.
    """

    def __init__(self, nbytes: int, shared: bool = False, huge: bool = False) -> None:
        self.nbytes = nbytes
        if shared:
            self.fd = os.memfd_create("weightstore-bench")
            os.ftruncate(self.fd, nbytes)
            self._memory = mmap.mmap(self.fd, nbytes)
        else:
            self.fd = -1
            self._memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if huge:
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._memory)
        self.tensor = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.tensor.fill_(1)

    def drop(self) -> None:
        """Give the pages back (private memory): the next write to each takes a page fault."""
        self._memory.madvise(mmap.MADV_DONTNEED)

    def unmapped(self) -> torch.Tensor:
        """The same shared bytes mapped anew: the pages exist, but this mapping has touched none of them."""
        return torch.frombuffer(mmap.mmap(self.fd, self.nbytes), dtype=torch.uint8)

    def __enter__(self) -> Buffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        del self.tensor
        self.view.release()
        # The mapping goes with the last tensor over it.


def copy(way: str, target: torch.Tensor, source: torch.Tensor) -> float:
    """Seconds of one plain copy (see `COPIES`) between flat uint8 tensors of equal size."""
    if way == "memmove":
        return clock(ctypes.memmove, target.data_ptr(), source.data_ptr(), source.numel())
    return clock(target.copy_, source)
