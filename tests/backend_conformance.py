"""What every device backend must do; `test_backends.py` runs it on each there is.

The tests only use `engine_hooks.backend`'s protocol, and look at images through their tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from real_arena import MIB, RealArena, real_arena

from engine_hooks.attach import make_backend
from engine_hooks.backend import DeviceBackend, Image, Run
from weightstore.cuda import driver
from weightstore.errors import WeightstoreError
from weightstore.types import ALIGN

WINDOW = 16 * MIB
CROSSING = 5 * MIB + 777
"""A run of this size placed around a window's end, to be split there by backends that must."""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Iterator[DeviceBackend]:
    if request.param == "cuda":
        usable, reason = driver.available()
        if not (usable and torch.cuda.is_available()):
            pytest.skip(f"no GPU: {reason or 'this torch has no CUDA'}")
    backend = make_backend(request.param)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def arena() -> Iterator[RealArena]:
    with real_arena(4 * WINDOW, WINDOW) as arena:
        yield arena


def held(image: Image, run: Run) -> torch.Tensor:
    return image.tensor()[run.target : run.target + run.nbytes].cpu()


def holds(image: Image, runs: list[Run], arena: RealArena) -> bool:
    return all(torch.equal(held(image, run), arena.bytes(run.source, run.nbytes)) for run in runs)


class TestBackend:
    def test_an_image_is_reserved_unmapped_and_aligned(self, backend: DeviceBackend) -> None:
        image = backend.reserve(3 * MIB + 1)
        assert not image.mapped
        assert image.nbytes >= 3 * MIB + 1
        assert image.address % ALIGN == 0
        tensor = image.tensor()
        assert tensor.shape == (image.nbytes,)
        assert tensor.dtype == torch.uint8
        assert tensor.device == backend.device
        assert tensor.data_ptr() == image.address

    def test_reserving_takes_no_memory_and_unmapping_gives_it_back(
        self, backend: DeviceBackend, arena: RealArena
    ) -> None:
        warm = backend.reserve(MIB)  # whatever a backend sets up once
        run = Run(arena.start, 0, MIB)
        backend.wake([(warm, [run])], arena.reader)
        whole = [Run(arena.start, 0, 2 * WINDOW)]
        arena.bytes(arena.start, 2 * WINDOW).sum()  # its pages count as ours from here on
        before = backend.memory_in_use()
        image = backend.reserve(2 * WINDOW)
        reserved = backend.memory_in_use()
        backend.wake([(image, whole)], arena.reader)
        awake = backend.memory_in_use()
        backend.unmap([image])
        asleep = backend.memory_in_use()
        assert reserved - before < MIB
        assert awake - before > 1.9 * WINDOW
        assert awake - asleep > 1.9 * WINDOW
        assert not image.mapped
        assert holds(warm, [run], arena)

    def test_wake_fills_several_images_from_scattered_runs(
        self, backend: DeviceBackend, arena: RealArena
    ) -> None:
        edge = arena.start + WINDOW
        first = [
            Run(edge - 2 * MIB - 511, 0, CROSSING),  # over a window's end
            Run(arena.start + 3, CROSSING + 5, 1),  # a single odd byte
            Run(edge + 4096, 6 * MIB, MIB),
        ]
        second = [
            Run(arena.start + i * 4096, 9000 * (40 - i), 8191) for i in range(40)
        ]  # many, overlapping sources
        one, other = backend.reserve(8 * MIB), backend.reserve(MIB)
        backend.wake([(one, first), (other, second)], arena.reader)
        assert one.mapped
        assert other.mapped
        assert holds(one, first, arena)
        assert holds(other, second, arena)

    def test_the_address_survives_cycles_and_so_do_views(
        self, backend: DeviceBackend, arena: RealArena
    ) -> None:
        image = backend.reserve(2 * MIB)
        view = image.tensor()[4096 : 4096 + 64].view(torch.int32).as_strided((4, 4), (1, 4))
        address = image.address
        for cycle in range(5):
            run = Run(arena.start + cycle * MIB, 0, 2 * MIB)
            backend.wake([(image, [run])], arena.reader)
            there = arena.bytes(run.source + 4096, 64).view(torch.int32).as_strided((4, 4), (1, 4))
            assert image.address == address
            assert view.data_ptr() == address + 4096
            assert torch.equal(view.cpu(), there)
            backend.unmap([image])

    def test_waking_a_mapped_image_fills_it_again(self, backend: DeviceBackend, arena: RealArena) -> None:
        image, other = backend.reserve(MIB), backend.reserve(MIB)
        backend.wake([(image, [Run(arena.start, 0, MIB)])], arena.reader)
        runs = [Run(arena.start + 2 * MIB, 0, MIB)]
        backend.wake([(image, runs), (other, runs)], arena.reader)
        assert holds(image, runs, arena)
        assert holds(other, runs, arena)

    def test_what_no_run_covers_keeps_its_bytes_while_mapped(
        self, backend: DeviceBackend, arena: RealArena
    ) -> None:
        image = backend.reserve(MIB)
        backend.wake([(image, [Run(arena.start, 0, 4096)])], arena.reader)
        behind = image.tensor()[8192:12288]
        behind.fill_(7)
        backend.update([(image, [Run(arena.start + 1, 4096, 4096)])], arena.reader)
        backend.wake([(image, [Run(arena.start + 9, 0, 8192)])], arena.reader)
        assert bool((behind == 7).all())

    def test_update_copies_its_runs_and_nothing_else(self, backend: DeviceBackend, arena: RealArena) -> None:
        image = backend.reserve(8 * MIB)
        whole = Run(arena.start, 0, 8 * MIB)
        backend.wake([(image, [whole])], arena.reader)
        edge = arena.start + 2 * WINDOW
        changes = [Run(edge - MIB - 3, 257, 2 * MIB), Run(edge + 3 * MIB, 5 * MIB + 1, 1)]
        expected = arena.bytes(whole.source, whole.nbytes).clone()
        for run in changes:
            expected[run.target : run.target + run.nbytes] = arena.bytes(run.source, run.nbytes)
        backend.update([(image, changes)], arena.reader)
        assert torch.equal(held(image, whole), expected)

    def test_the_caller_may_do_something_while_the_bytes_come(
        self, backend: DeviceBackend, arena: RealArena
    ) -> None:
        image = backend.reserve(MIB)
        run, other = Run(arena.start, 0, MIB), Run(arena.start + MIB, 0, MIB)
        backend.pin_ahead(arena.reader, [(run.source, run.nbytes)])
        seen = []
        backend.wake([(image, [run])], arena.reader, meanwhile=lambda: seen.append(image.mapped))
        backend.update([(image, [other])], arena.reader, meanwhile=lambda: seen.append(image.mapped))
        backend.update([], arena.reader, meanwhile=lambda: seen.append(image.mapped))
        assert seen == [True, True, True]
        assert holds(image, [other], arena)

    def test_what_goes_wrong_meanwhile_fails_the_wake_but_not_the_copies_of_an_update(
        self, backend: DeviceBackend, arena: RealArena
    ) -> None:
        def fail() -> None:
            raise LookupError("meanwhile")

        image = backend.reserve(MIB)
        run, other = Run(arena.start, 0, MIB), Run(arena.start + MIB, 0, MIB)
        with pytest.raises(LookupError):
            backend.wake([(image, [run])], arena.reader, meanwhile=fail)
        assert not image.mapped
        backend.wake([(image, [run])], arena.reader)
        with pytest.raises(LookupError):
            backend.update([(image, [other])], arena.reader, meanwhile=fail)
        assert holds(image, [other], arena)

    def test_update_of_an_unmapped_image_is_refused(self, backend: DeviceBackend, arena: RealArena) -> None:
        image = backend.reserve(MIB)
        with pytest.raises(WeightstoreError, match="mapped"):
            backend.update([(image, [Run(arena.start, 0, 4096)])], arena.reader)
        assert not image.mapped

    def test_unmap_is_idempotent_and_takes_any_mix(self, backend: DeviceBackend, arena: RealArena) -> None:
        one, other = backend.reserve(MIB), backend.reserve(MIB)
        backend.wake([(one, [Run(arena.start, 0, MIB)])], arena.reader)
        backend.unmap([one, other])
        backend.unmap([one, other])
        backend.unmap([])
        assert not one.mapped
        assert not other.mapped

    def test_differing_finds_every_byte_and_only_those_runs(
        self, backend: DeviceBackend, arena: RealArena
    ) -> None:
        image = backend.reserve(8 * MIB)
        runs = [
            Run(arena.start + 5, 3, 1),
            Run(arena.start + 4096, 256, 4097),
            Run(arena.start + WINDOW - MIB, MIB, CROSSING),
            Run(arena.start + 64, 7 * MIB, 255),
        ]
        backend.wake([(image, runs)], arena.reader)
        assert backend.differing(image, runs, arena.reader) == []
        for run in runs:
            for place in {run.target, run.target + run.nbytes // 2, run.target + run.nbytes - 1}:
                image.tensor()[place] += 1
                assert backend.differing(image, runs, arena.reader) == [run]
                image.tensor()[place] -= 1
        image.tensor()[2] += 1  # in no run
        assert backend.differing(image, runs, arena.reader) == []

    def test_differing_compares_bits_not_numbers(self, backend: DeviceBackend, arena: RealArena) -> None:
        start = arena.start + 3 * WINDOW
        there = arena.writer.tensor[start : start + 16].view(torch.float32)
        before = there.clone()
        try:
            there.copy_(torch.tensor([0.0, float("nan"), 1.0, float("inf")]))
            image = backend.reserve(4096)
            run = Run(start, 0, 16)
            backend.wake([(image, [run])], arena.reader)
            assert backend.differing(image, [run], arena.reader) == []  # NaN is the same NaN
            image.tensor()[:4].view(torch.float32)[0] = -0.0
            assert backend.differing(image, [run], arena.reader) == [run]  # -0.0 is not 0.0
        finally:
            there.copy_(before)

    def test_a_failed_wake_maps_nothing_and_can_be_retried(
        self, backend: DeviceBackend, arena: RealArena
    ) -> None:
        mapped, asleep = backend.reserve(MIB), backend.reserve(MIB)
        good = [Run(arena.start, 0, MIB)]
        beyond = [Run(arena.reader.nbytes - 4096, 0, 8192)]
        backend.wake([(mapped, good)], arena.reader)
        with pytest.raises(WeightstoreError):
            backend.wake([(asleep, good), (mapped, beyond)], arena.reader)
        assert mapped.mapped
        assert not asleep.mapped
        backend.wake([(asleep, good)], arena.reader)
        assert holds(asleep, good, arena)

    def test_close_frees_everything_and_is_idempotent(self, backend: DeviceBackend, arena: RealArena) -> None:
        image = backend.reserve(2 * WINDOW)
        backend.wake([(image, [Run(arena.start, 0, 2 * WINDOW)])], arena.reader)
        before = backend.memory_in_use()
        backend.close()
        backend.close()
        assert not image.mapped
        assert before - backend.memory_in_use() > 1.9 * WINDOW
        with pytest.raises(WeightstoreError, match="closed"):
            backend.reserve(4096)
