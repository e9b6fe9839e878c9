"""The host backend on its own: that memory really goes and comes, and what only the host can refuse."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_arena import MIB, RealArena, real_arena

from engine_hooks.backend import Run
from engine_hooks.host import HostBackend
from weightstore.errors import DeviceError, DeviceMemoryError

SIZE = 48 * MIB


@pytest.fixture
def backend() -> Iterator[HostBackend]:
    backend = HostBackend(threads=3)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def arena() -> Iterator[RealArena]:
    with real_arena(SIZE, 16 * MIB) as arena:
        yield arena


def anonymous_bytes() -> int:
    """Exactly what the kernel counts as this process's private anonymous memory."""
    return (
        int(re.findall(r"^Anonymous: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.M)[0]) * 1024
    )


def available_bytes() -> int:
    return int(re.findall(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())[0]) * 1024


def test_sleeping_gives_every_page_back_cycle_after_cycle(backend: HostBackend, arena: RealArena) -> None:
    image = backend.reserve(SIZE)
    run = Run(arena.start, 0, SIZE)
    backend.wake([(image, [run])], arena.reader)
    backend.unmap([image])
    asleep = anonymous_bytes()
    for _ in range(5):
        backend.wake([(image, [run])], arena.reader)
        assert anonymous_bytes() - asleep > 0.99 * SIZE
        assert backend.differing(image, [run], arena.reader) == []
        backend.unmap([image])
        assert abs(anonymous_bytes() - asleep) < MIB


def test_a_reservation_far_beyond_the_host_is_fine_until_it_is_woken(
    backend: HostBackend, arena: RealArena
) -> None:
    image = backend.reserve(available_bytes() * 4)
    with pytest.raises(DeviceMemoryError, match="available") as caught:
        backend.wake([(image, [Run(arena.start, 0, 4096)])], arena.reader)
    assert caught.value.details["wanted"] == image.nbytes
    assert not image.mapped


def test_an_address_space_that_does_not_exist_is_a_device_error(backend: HostBackend) -> None:
    with pytest.raises(DeviceError, match="address space"):
        backend.reserve(1 << 60)


@pytest.mark.parametrize(
    "run",
    [Run(-4096, 0, 4096), Run(0, -1, 4096), Run(0, 0, 2 * MIB), Run(1 << 40, 0, 1)],
    ids=["before the arena", "before the image", "behind the image", "behind the arena"],
)
def test_no_run_reaches_outside(backend: HostBackend, arena: RealArena, run: Run) -> None:
    image = backend.reserve(MIB)
    with pytest.raises(DeviceError, match="leaves the arena"):
        backend.wake([(image, [run])], arena.reader)
    assert not image.mapped


def test_images_of_another_backend_are_refused(backend: HostBackend, arena: RealArena) -> None:
    class Foreign:
        address, nbytes, mapped = 0, 4096, True

        def tensor(self) -> None: ...

    with pytest.raises(DeviceError, match="Foreign is not an image"):
        backend.unmap([Foreign()])  # type: ignore[list-item]


def test_tensors_outlive_the_backend(arena: RealArena) -> None:
    backend = HostBackend()
    tensor = backend.reserve(MIB).tensor()
    backend.close()
    assert int(tensor.sum()) == 0  # zero pages, not a fault
