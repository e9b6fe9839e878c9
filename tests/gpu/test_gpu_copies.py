from __future__ import annotations

import logging

import pytest
import torch
from gpu_segment import MIB, WINDOW, Segment

from weightstore.cuda import copies, driver
from weightstore.cuda.copies import Copier
from weightstore.cuda.pinning import PinnedArena, Window
from weightstore.errors import DeviceError
from weightstore.layout import DATA_OFFSET


class Unpinnable(PinnedArena):
    """A pinned arena whose every registration the driver refuses."""

    def _register(self, window: Window) -> None:
        raise DeviceError(f"window at {window.start} refused")


@pytest.fixture(params=["pinned", "staged"])
def arena_class(request: pytest.FixtureRequest) -> type[PinnedArena]:
    return PinnedArena if request.param == "pinned" else Unpinnable


def test_to_device_across_windows(
    segment: Segment, device: driver.Device, arena_class: type[PinnedArena]
) -> None:
    arena = arena_class.share(segment.reader, device)
    copier, stream = Copier(device, arena), driver.Stream(device)
    out = torch.zeros(5 * WINDOW + 13, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    source = DATA_OFFSET + WINDOW - 7
    copier.to_device(
        [(out.data_ptr(), source, 5 * WINDOW), (out.data_ptr() + 5 * WINDOW, DATA_OFFSET, 13)], stream
    )
    stream.synchronize()
    assert torch.equal(out[: 5 * WINDOW].cpu(), segment.bytes(source, 5 * WINDOW))
    assert torch.equal(out[5 * WINDOW :].cpu(), segment.bytes(DATA_OFFSET, 13))
    copier.close()
    arena.close()


def test_to_arena_across_windows(
    segment: Segment, device: driver.Device, arena_class: type[PinnedArena]
) -> None:
    arena = arena_class.share(segment.writer, device)
    copier, stream = Copier(device, arena), driver.Stream(device)
    before = segment.bytes(DATA_OFFSET, 8 * WINDOW).clone()
    data = torch.randint(0, 256, (5 * WINDOW,), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    target = DATA_OFFSET + WINDOW + 3
    copier.to_arena([(data.data_ptr(), target, 5 * WINDOW)], stream)
    stream.synchronize()
    after = segment.bytes(DATA_OFFSET, 8 * WINDOW)
    assert torch.equal(after[WINDOW + 3 : 6 * WINDOW + 3], data.cpu())
    assert torch.equal(after[: WINDOW + 3], before[: WINDOW + 3])
    assert torch.equal(after[6 * WINDOW + 3 :], before[6 * WINDOW + 3 :])
    copier.close()
    arena.close()


def test_rows_to_arena_across_windows(
    segment: Segment, device: driver.Device, arena_class: type[PinnedArena]
) -> None:
    arena = arena_class.share(segment.writer, device)
    copier, stream = Copier(device, arena), driver.Stream(device)
    rows, width, step, pitch = 300, 70_000, 80_000, 200_000
    data = torch.randint(0, 256, (rows, step), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    offset = DATA_OFFSET + 5 * MIB
    expected = segment.bytes(offset, rows * pitch).clone().view(rows, pitch)
    expected[:, :width] = data[:, :width].cpu()
    copier.rows_to_arena(data.data_ptr(), offset, rows, width, step, pitch, stream)
    stream.synchronize()
    assert torch.equal(segment.bytes(offset, rows * pitch).view(rows, pitch), expected)
    copier.close()
    arena.close()


def test_staging_says_so_once_and_pins_again_when_it_can(
    segment: Segment, device: driver.Device, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = Unpinnable.share(segment.reader, device)
    copier, stream = Copier(device, arena), driver.Stream(device)
    out = torch.zeros(100, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            copier.begin()
            copier.to_device([(out.data_ptr(), DATA_OFFSET, 100)], stream)
    stream.synchronize()
    assert [record.message for record in caplog.records if "bounce buffer" in record.message] == [
        f"copying through a bounce buffer, slower than the link: window at {DATA_OFFSET} refused"
    ]
    assert copier.staged_bytes == 100
    assert copier.staged_reason == f"window at {DATA_OFFSET} refused"
    monkeypatch.setattr(Unpinnable, "_register", PinnedArena._register)
    copier.begin()
    copier.to_device([(out.data_ptr(), DATA_OFFSET, 100)], stream)
    stream.synchronize()
    assert copier.staged_bytes == 0
    assert copier.pinned_new == WINDOW
    copier.close()
    arena.close()


def test_batched_and_looped_calls_copy_the_same(segment: Segment, device: driver.Device) -> None:
    if not copies.batched_copies():
        pytest.skip("the bindings or the driver have no cuMemcpyBatchAsync of CUDA 13")
    arena = PinnedArena.share(segment.reader, device)
    arena.ensure([(DATA_OFFSET, WINDOW)])
    stream = driver.Stream(device)
    count, size = 3000, 2048
    with device.current():
        for submit in (copies.enqueue_loop, copies.enqueue_batch):
            out = torch.zeros(count * size, dtype=torch.uint8, device="cuda")
            torch.cuda.synchronize()
            base = arena.address + DATA_OFFSET
            # In reverse order, so that a copy to the wrong place shows.
            submit(
                [(out.data_ptr() + i * size, base + (count - 1 - i) * size, size) for i in range(count)],
                stream.handle,
            )
            stream.synchronize()
            expected = segment.bytes(DATA_OFFSET, count * size).view(count, size).flip(0)
            assert torch.equal(out.cpu().view(count, size), expected)
    arena.close()
