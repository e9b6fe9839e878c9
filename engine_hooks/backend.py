"""What an engine hook needs of a device: images on fixed addresses, filled from the arena.

Two implementations: `engine_hooks.host` (anonymous host memory) and `engine_hooks.cuda` (CUDA
virtual memory). Both pass the tests in tests/backend_conformance.py.

Lifecycle of an image: reserve → (map → unmap)* → close. The address is the same from reserve to
close; what lies there exists only while mapped. A backend is used by one thread at a time, but for
`pin_ahead`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from weightstore.mapping import ArenaMapping

Meanwhile = Callable[[], object]
"""What a caller has to do that needs none of the bytes, done while they are on their way."""


class Run(tuple[int, int, int]):
    """One contiguous copy: (arena offset, image offset, nbytes), all in bytes."""

    __slots__ = ()

    def __new__(cls, source: int, target: int, nbytes: int) -> Run:
        return super().__new__(cls, (source, target, nbytes))

    @property
    def source(self) -> int:
        return self[0]

    @property
    def target(self) -> int:
        return self[1]

    @property
    def nbytes(self) -> int:
        return self[2]


class Image(Protocol):
    """One reserved address range on the device."""

    @property
    def address(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Reserved bytes, rounded up to the device's granularity."""
        ...

    @property
    def mapped(self) -> bool: ...

    def tensor(self) -> torch.Tensor:
        """A uint8 tensor of shape (nbytes,) over the whole range. It may be made, and viewed, while
        the image is unmapped; its bytes may be touched only while mapped."""
        ...


class DeviceBackend(Protocol):
    """All methods raise DeviceError; those that map raise DeviceMemoryError when memory is short,
    leaving every image as it was."""

    @property
    def device(self) -> torch.device: ...

    def reserve(self, nbytes: int) -> Image:
        """Reserve an address range of at least `nbytes` bytes. Nothing is mapped."""
        ...

    def wake(
        self,
        fills: Sequence[tuple[Image, Sequence[Run]]],
        source: ArenaMapping,
        meanwhile: Meanwhile | None = None,
    ) -> None:
        """Map the unmapped images and copy the runs into them, as one pipeline; returns when kernels
        launched from now on, on any stream, see the bytes. On failure images mapped here are unmapped.

        `meanwhile` is called once, while copies are landing, and images may not be mapped as a whole yet;
        what it raises is a failure like any other.
        """
        ...

    def update(
        self,
        fills: Sequence[tuple[Image, Sequence[Run]]],
        source: ArenaMapping,
        meanwhile: Meanwhile | None = None,
    ) -> None:
        """Copy runs into mapped images, after all work submitted to the device so far and before any
        work submitted later; returns when the copies have landed. `meanwhile` as in `wake`; when it raises,
        the copies have landed all the same."""
        ...

    def pin_ahead(self, source: ArenaMapping, ranges: Iterable[tuple[int, int]]) -> None:
        """A wake to come will copy from these (offset, nbytes) ranges: whatever prepares for that and can be
        done in the background begins now. May be called by any thread, and does nothing once closed."""
        ...

    def unmap(self, images: Sequence[Image]) -> None:
        """Wait for submitted work, then give the images' memory back. Idempotent."""
        ...

    def differing(self, image: Image, runs: Sequence[Run], source: ArenaMapping) -> list[Run]:
        """The runs whose image bytes differ from the arena's, compared bit by bit with bounded scratch."""
        ...

    def memory_in_use(self) -> int:
        """Bytes in use now, as the operating system or driver counts them: for a GPU all of the
        device, for the host this process's resident set."""
        ...

    def close(self) -> None:
        """Unmap and free every image and let go of the arena. Idempotent."""
        ...
