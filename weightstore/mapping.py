"""The arena in this process's address space, as memory, numpy or torch.

Invariants:
- a mapping shows the arena that was promised: header, identity and size are checked before anybody sees
  a byte;
- a read-only mapping comes from a read-only descriptor, so that no call can make it writable;
- nothing unmaps pages that somebody can still reach: every view keeps them, and `close` only lets go of
  the mapping's own hold.

numpy and torch are imported on first use: a command-line client maps the arena without them.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from weightstore.errors import ArenaUnusable, UsageError
from weightstore.layout import unpack_header
from weightstore.prefault import Prefault
from weightstore.types import ITEMSIZE

if TYPE_CHECKING:
    import numpy as np
    import torch


class _Pages:
    """Bytes of the mapping in numpy's terms, described as writable even where they are not.

    torch has no read-only tensors and warns of each array that is; that these pages are read-only is
    the kernel's word, and it holds without a flag.
    """

    def __init__(self, owner: mmap.mmap, address: int, nbytes: int) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (nbytes,),
            "data": (address, False),
        }


class ArenaMapping:
    """The whole segment behind `fd`, mapped shared. The descriptor stays the caller's.

    Args:
        fd: what the store sent: O_RDONLY for readers, O_RDWR for writers.
        nbytes: size of the segment, as the store's Welcome gives it.
        writable: whether to map for writing.
        uuid: identity the arena must have; None accepts any.

    Raises:
        ArenaUnusable: the object is shorter than `nbytes`, no arena, or another one.
    """

    def __init__(self, fd: int, nbytes: int, writable: bool, uuid: str | None = None) -> None:
        what = "the memory object the store sent"
        size = os.fstat(fd).st_size
        if size < nbytes:
            raise ArenaUnusable(f"{what} has {size} bytes instead of {nbytes}", nbytes=size, expected=nbytes)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            self._map: mmap.mmap | None = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, protection)
        except OSError as error:
            raise ArenaUnusable(
                f"mapping {nbytes} bytes of the arena failed: {error.strerror}; if it says memory, raise "
                "`ulimit -v`",
                nbytes=nbytes,
            ) from None
        header = unpack_header(memoryview(self._map)[:4096], what)
        if header.nbytes != nbytes or (uuid is not None and str(header.uuid) != uuid):
            raise ArenaUnusable(
                f"{what} is arena {header.uuid} of {header.nbytes} bytes; promised was {uuid} of {nbytes}",
                found=str(header.uuid),
                expected=uuid,
            )
        self.uuid = str(header.uuid)
        self.nbytes = nbytes
        self.window = header.window
        self.writable = writable
        with contextlib.suppress(OSError):  # acts where the file system has huge=advise, EINVAL elsewhere
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._before_close: list[Callable[[], None]] = []
        self._start: int | None = None
        self._prefault: Prefault | None = None
        self._typed: dict[str, torch.Tensor] = {}

    @property
    def closed(self) -> bool:
        return self._map is None

    @property
    def address(self) -> int:
        """Where the segment starts in this process."""
        pages = self._pages()
        if self._start is None and self.writable:
            self._start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        elif self._start is None:
            import numpy as np

            self._start = np.frombuffer(pages, np.uint8, 1).ctypes.data  # works for read-only pages too
        return self._start

    @property
    def buffer(self) -> memoryview:
        """The segment's bytes; read-only unless `writable`."""
        return memoryview(self._pages())

    def view(self, offset: int, nbytes: int) -> memoryview:
        """`nbytes` bytes from `offset`. UsageError outside the segment."""
        self.check_range(offset, nbytes)
        return memoryview(self._pages())[offset : offset + nbytes]

    def check_range(self, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise UsageError(
                f"bytes {offset} to {offset + nbytes} lie outside the arena's {self.nbytes}",
                offset=offset,
                nbytes=nbytes,
            )

    def prefault(self, offset: int, nbytes: int) -> None:
        """Map the pages of a range that is about to be written here, faster than writing to them would; does
        nothing on a read-only mapping. The range must have been committed."""
        if self.writable:
            if self._prefault is None:
                self._prefault = Prefault(self.address, self.nbytes)
            self._prefault(offset, nbytes)

    def array(self, offset: int, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """A uint8 array of shape (nbytes,). numpy believes it writable; the kernel decides."""
        import numpy as np

        self.check_range(offset, nbytes)
        return np.asarray(_Pages(self._pages(), self.address + offset, nbytes))

    @property
    def tensor(self) -> torch.Tensor:
        """A uint8 tensor of shape (nbytes,) over the whole segment. Reading beyond what a version's
        records name may fault; writing to a read-only mapping does."""
        return self.typed("uint8")

    def typed(self, dtype: str) -> torch.Tensor:
        """The segment as one flat tensor of `dtype`, made once: element i starts at byte i·itemsize."""
        self._pages()
        found = self._typed.get(dtype)
        if found is None:
            import torch

            whole = self.nbytes - self.nbytes % ITEMSIZE[dtype]
            found = torch.from_numpy(self.array(0, whole)).view(getattr(torch, dtype))
            self._typed[dtype] = found
        return found

    def before_close(self, action: Callable[[], None]) -> None:
        """Have `action` called before the segment is let go, for who pinned its pages with a device."""
        self._before_close.append(action)

    def close(self) -> None:
        """Let go of the segment; pages that a tensor, array or view shows stay with it. Idempotent."""
        actions, self._before_close = self._before_close, []
        for action in actions:
            action()
        self._map = None
        self._typed = {}

    def __enter__(self) -> ArenaMapping:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pages(self) -> mmap.mmap:
        if self._map is None:
            raise UsageError("this arena mapping was closed; connect again")
        return self._map
