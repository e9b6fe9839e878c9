"""The CUDA backend on its own: what the conformance tests, which both backends share, cannot ask."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from gpu_segment import MIB, WINDOW, Segment

from engine_hooks.backend import Run
from engine_hooks.cuda import CudaBackend
from engine_hooks.cuda_assist import assist
from engine_hooks.cuda_compare import CHUNK
from engine_hooks.cuda_memory import device_memory
from weightstore.cuda import driver
from weightstore.errors import DeviceError, DeviceMemoryError, UsageError
from weightstore.layout import DATA_OFFSET


@pytest.fixture
def backend() -> Iterator[CudaBackend]:
    backend = CudaBackend(0, piece=8 * MIB)
    yield backend
    backend.close()


def expected(segment: Segment, runs: list[Run], before: torch.Tensor) -> torch.Tensor:
    out = before.clone()
    for source, target, nbytes in runs:
        out[target : target + nbytes] = segment.bytes(source, nbytes)
    return out


RUNS = [
    Run(DATA_OFFSET + 3, 1, 5 * MIB),
    Run(DATA_OFFSET + WINDOW - 100, 5 * MIB + 256, 40 * MIB),
    Run(DATA_OFFSET + 6 * WINDOW, 46 * MIB, 1),
    Run(DATA_OFFSET + 4 * WINDOW - 1, 46 * MIB + 1, 30 * MIB),
]


def test_wake_fills_every_run_and_keeps_the_address(segment: Segment, backend: CudaBackend) -> None:
    image = backend.reserve(80 * MIB)
    tensor, address = image.tensor(), image.address
    for seed in range(3):
        segment.fill(seed)
        backend.wake([(image, RUNS)], segment.reader)
        assert (image.address, tensor.data_ptr(), image.mapped) == (address, address, True)
        found = tensor.cpu()
        assert torch.equal(found, expected(segment, RUNS, found))
        assert backend.differing(image, RUNS, segment.reader) == []
        assert backend.transfer.copied_bytes == sum(run.nbytes for run in RUNS)
        backend.unmap([image])
        assert not image.mapped
        backend.unmap([image])


def test_the_kernel_beside_the_engine_copies_the_same(segment: Segment, device: driver.Device) -> None:
    assist(device).load(wait=True)
    assert assist(device).ready
    backend = CudaBackend(0, piece=8 * MIB, assist_bytes=40 * MIB)
    # Besides runs that the kernel may share: unaligned ones, and some too short for it.
    aligned = [Run(DATA_OFFSET + 4096, 0, 50 * MIB), Run(DATA_OFFSET + 48, 60 * MIB, 33 * MIB + 7)]
    for runs in (RUNS, aligned, [Run(DATA_OFFSET, 0, 15), Run(DATA_OFFSET, 256, 33)]):
        image = backend.reserve(100 * MIB)
        backend.wake([(image, runs)], segment.reader)
        found = image.tensor().cpu()
        assert torch.equal(found, expected(segment, runs, found))
        backend.unmap([image])
    backend.close()


def test_sleep_gives_the_memory_back(segment: Segment, backend: CudaBackend, device: driver.Device) -> None:
    images = [backend.reserve(64 * MIB), backend.reserve(3 * MIB)]
    torch.cuda.synchronize()
    asleep = backend.memory_in_use()
    run = [Run(DATA_OFFSET, 0, 3 * MIB)]
    backend.wake([(image, run) for image in images], segment.reader)
    # Granules of 2 MiB; page tables may take a little more.
    assert asleep + 68 * MIB <= backend.memory_in_use() <= asleep + 72 * MIB
    memory = device_memory(0, images)
    assert memory.images == 68 * MIB
    assert memory.elsewhere > 0
    assert memory.in_use == memory.images + memory.torch_allocated + memory.torch_cached + memory.elsewhere
    backend.unmap(images)
    assert backend.memory_in_use() <= asleep + 4 * MIB
    assert device_memory(0, images).images == 0


def test_views_made_while_unmapped_show_the_image(segment: Segment, backend: CudaBackend) -> None:
    image = backend.reserve(4 * MIB)
    view = image.tensor()[1024 : 1024 + 4096].view(torch.bfloat16).view(32, 64)
    backend.wake([(image, [Run(DATA_OFFSET, 0, 4 * MIB)])], segment.reader)
    assert torch.equal(view.cpu().view(torch.uint8), segment.bytes(DATA_OFFSET + 1024, 4096).view(32, 128))


def test_update_is_ordered_after_submitted_work_and_before_later_work(
    segment: Segment, backend: CudaBackend
) -> None:
    image = backend.reserve(32 * MIB)
    whole = [Run(DATA_OFFSET, 0, 32 * MIB)]
    backend.wake([(image, whole)], segment.reader)
    first = segment.bytes(DATA_OFFSET, 32 * MIB).clone()
    segment.fill(1)
    second = segment.bytes(DATA_OFFSET, 32 * MIB).clone()
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        backend.update([(image, whole)], segment.reader)
        segment.fill(0)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(300_000_000)  # some 150 ms during which the readers below are only enqueued
            early = image.tensor().clone()
        backend.update([(image, whole)], segment.reader)
        with torch.cuda.stream(stream):
            late = image.tensor().clone()
        stream.synchronize()
        assert torch.equal(early.cpu(), second)
        assert torch.equal(late.cpu(), first)
        segment.fill(1)


def test_update_refuses_an_unmapped_image(segment: Segment, backend: CudaBackend) -> None:
    image = backend.reserve(2 * MIB)
    with pytest.raises(UsageError, match="mapped"):
        backend.update([(image, [Run(DATA_OFFSET, 0, 1)])], segment.reader)


def test_differing_names_exactly_the_runs_that_differ(segment: Segment, backend: CudaBackend) -> None:
    image = backend.reserve(90 * MIB)
    # Sizes around word borders, unaligned targets, gaps of all kinds, and arena order unlike image order.
    runs, target = [], 0
    for i in range(200):
        nbytes = (1, 7, 8, 9, 64, 4095, 100_003)[i % 7]
        runs.append(Run(DATA_OFFSET + (i % 3) * WINDOW + target, target, nbytes))
        target += nbytes + (0, 1, 5, 256, 5000)[i % 5]
    runs.append(Run(DATA_OFFSET + 3 * WINDOW + 1, 40 * MIB + 1, 40 * MIB))
    backend.wake([(image, runs)], segment.reader)
    tensor = image.tensor()
    assert backend.differing(image, runs, segment.reader) == []
    generator = torch.Generator().manual_seed(5)
    for _ in range(12):
        chosen = sorted(set(torch.randint(0, len(runs), (3,), generator=generator).tolist()))
        for index in chosen:
            run = runs[index]
            at = run.target + int(torch.randint(0, run.nbytes, (1,), generator=generator))
            tensor[at] ^= 1
        assert backend.differing(image, runs, segment.reader) == [runs[i] for i in chosen]
        backend.update([(image, [runs[i] for i in chosen])], segment.reader)
    # Bytes outside every run may be anything.
    covered = torch.zeros(image.nbytes, dtype=torch.bool)
    for run in runs:
        covered[run.target : run.target + run.nbytes] = True
    tensor[~covered.cuda()] ^= 0xFF
    assert backend.differing(image, runs, segment.reader) == []


def test_differing_needs_bounded_scratch(segment: Segment, backend: CudaBackend) -> None:
    image = backend.reserve(8 * WINDOW)
    runs = [Run(DATA_OFFSET, 0, 8 * WINDOW)]
    backend.wake([(image, runs)], segment.reader)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert backend.differing(image, runs, segment.reader) == []
    assert torch.cuda.max_memory_allocated() - before < 2.2 * CHUNK


def test_too_little_memory_leaves_everything_unmapped_and_can_be_retried(
    segment: Segment, backend: CudaBackend, device: driver.Device
) -> None:
    images = [backend.reserve(16 * MIB), backend.reserve(64 * MIB)]
    run = [Run(DATA_OFFSET, 0, 16 * MIB)]
    torch.cuda.empty_cache()
    free, _ = device.memory()
    hog = torch.empty(free - 48 * MIB, dtype=torch.uint8, device="cuda")
    with pytest.raises(DeviceMemoryError, match=r"needs 80 MiB .* only .* are free") as caught:
        backend.wake([(image, run) for image in images], segment.reader)
    assert caught.value.details["needed"] == 80 * MIB
    assert caught.value.details["free"] < 80 * MIB
    assert not any(image.mapped for image in images)
    del hog
    torch.cuda.empty_cache()
    backend.wake([(image, run) for image in images], segment.reader)
    assert torch.equal(images[1].tensor()[: 16 * MIB].cpu(), segment.bytes(DATA_OFFSET, 16 * MIB))


def test_memory_that_runs_out_half_way_is_rolled_back(
    segment: Segment, backend: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = backend.reserve(64 * MIB)
    in_use = backend.memory_in_use()
    torch.cuda.empty_cache()
    # What another process takes between our look and our need, the look cannot know.
    monkeypatch.setattr(CudaBackend, "_require_memory", lambda self, asleep: None)
    free, _ = driver.device(0).memory()
    hog = torch.empty(free - 32 * MIB, dtype=torch.uint8, device="cuda")
    with pytest.raises(DeviceMemoryError, match="cuMemCreate failed: CUDA_ERROR_OUT_OF_MEMORY"):
        backend.wake([(image, [Run(DATA_OFFSET, 0, 64 * MIB)])], segment.reader)
    assert image.mapped_bytes == 0
    del hog
    torch.cuda.empty_cache()
    assert backend.memory_in_use() <= in_use
    backend.wake([(image, [Run(DATA_OFFSET, 0, 64 * MIB)])], segment.reader)
    assert backend.differing(image, [Run(DATA_OFFSET, 0, 64 * MIB)], segment.reader) == []


def test_a_run_beyond_the_arena_rolls_the_wake_back(segment: Segment, backend: CudaBackend) -> None:
    image = backend.reserve(32 * MIB)
    beyond = DATA_OFFSET + 8 * WINDOW
    runs = [Run(DATA_OFFSET, 0, 16 * MIB), Run(beyond, 16 * MIB, 16 * MIB)]
    with pytest.raises(DeviceError, match="committed data are bytes"):
        backend.wake([(image, runs)], segment.reader)
    assert image.mapped_bytes == 0
    backend.wake([(image, runs[:1])], segment.reader)


def test_the_address_outlives_the_image_while_a_tensor_needs_it(segment: Segment) -> None:
    backend = CudaBackend(0)
    image = backend.reserve(6 * MIB)
    tensor, address, reservation = image.tensor()[100:200], image.address, weakref.ref(image._range)
    backend.close()
    backend.close()
    with pytest.raises(DeviceError, match="closed"):
        image.tensor()
    with pytest.raises(UsageError):
        backend.reserve(1)
    del image
    gc.collect()
    assert reservation() is not None
    assert tensor.data_ptr() == address + 100
    device = driver.device(0)
    with device.current():  # the address is not to be had, even by asking for it
        taken = int(driver.call("cuMemAddressReserve", 6 * MIB, 0, address, 0))
        driver.call("cuMemAddressFree", taken, 6 * MIB)
    assert taken != address
    del tensor
    gc.collect()
    assert reservation() is None
