from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from gpu_segment import MIB, WINDOW, Segment

from weightstore.cuda import upload
from weightstore.cuda.upload import Uploader
from weightstore.errors import DeviceError
from weightstore.layout import DATA_OFFSET


@pytest.fixture
def uploader(segment: Segment) -> Iterator[Uploader]:
    uploader = Uploader(segment.writer, torch.device("cuda", 0))
    yield uploader
    uploader.close()


def place(segment: Segment, shape: tuple[int, ...], dtype: torch.dtype, at: int = 0) -> torch.Tensor:
    """A contiguous view of the writable arena."""
    count = torch.Size(shape).numel() * dtype.itemsize
    return segment.writer.tensor[DATA_OFFSET + at :][:count].view(dtype).view(shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_a_contiguous_tensor_lands_across_windows(segment: Segment, uploader: Uploader) -> None:
    source = torch.randn(3 * WINDOW // 4, device="cuda")
    target = place(segment, source.shape, source.dtype, at=WINDOW - 4 * MIB)
    uploader.put([(target, source)])
    uploader.drain()
    assert torch.equal(target, source.cpu())
    assert uploader.nbytes == 3 * WINDOW
    assert uploader.staged_reason is None


def test_put_waits_for_the_producers_stream(segment: Segment, uploader: Uploader) -> None:
    target = place(segment, (MIB,), torch.float32)
    side = torch.cuda.Stream()
    for stream in (torch.cuda.current_stream(), side):
        with torch.cuda.stream(stream):
            source = torch.zeros(MIB, device="cuda")
            torch.cuda._sleep(200_000_000)
            source.fill_(7)
            uploader.put([(target, source)])
        uploader.drain()
        assert bool((target == 7).all())
        target.zero_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool])
def test_other_dtypes_are_cast_on_the_gpu(
    segment: Segment, uploader: Uploader, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "SCRATCH", 1 << 16)  # several pieces
    source = torch.randn(300, 1000, device="cuda", dtype=torch.float32)
    target = place(segment, (300, 1000), dtype)
    uploader.put([(target, source)])
    uploader.drain()
    assert same_bits(target, source.to(dtype).cpu())


def layouts() -> Iterator[tuple[str, torch.Tensor, tuple[int, ...]]]:
    """(name, source on the GPU, stride of the dense target)."""
    base = torch.randn(6, 20, 30, 40, device="cuda")
    yield "transposed source", base.permute(3, 1, 0, 2), (3600, 180, 30, 1)
    yield "every second", torch.randn(100, 1000, device="cuda")[::2, ::3], (334, 1)
    yield "padded rows", torch.randn(500, 1100, device="cuda")[:, 50:1050], (1000, 1)
    yield "broadcast", torch.randn(1, 1000, device="cuda").expand(200, 1000), (1000, 1)
    yield "channels last target", base, (24000, 1, 800, 20)
    yield "both channels last", base.to(memory_format=torch.channels_last), (24000, 1, 800, 20)
    yield "conjugate", torch.randn(50, 60, dtype=torch.complex64, device="cuda").conj(), (60, 1)
    yield "scalar", torch.tensor(3.5, device="cuda"), ()
    yield "one element view", torch.randn(4, 4, device="cuda")[2:3, 1:2], (1, 1)


def test_any_layout_is_gathered_into_the_targets(
    segment: Segment, uploader: Uploader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "SCRATCH", 1 << 17)
    for name, source, stride in layouts():
        flat = place(segment, (source.numel(),), source.dtype, at=WINDOW - 1024)
        target = flat.as_strided(source.shape, stride)
        flat.zero_()
        uploader.put([(target, source)])
        uploader.drain()
        assert torch.equal(target, source.cpu()), name


def test_a_box_of_a_larger_tensor_leaves_the_rest_alone(segment: Segment, uploader: Uploader) -> None:
    whole = place(segment, (64, 96, 1000), torch.float32)
    boxes = [
        (slice(0, 64), slice(10, 20), slice(0, 1000)),
        (slice(3, 9), slice(0, 96), slice(100, 900)),
        (slice(0, 64), slice(0, 96), slice(999, 1000)),
        (slice(5, 6), slice(5, 6), slice(5, 6)),
    ]
    for box, cast in itertools.product(boxes, (False, True)):
        whole.fill_(-1)
        wanted = whole.clone()
        source = torch.randn(whole[box].shape, device="cuda", dtype=torch.float64 if cast else torch.float32)
        wanted[box] = source.float().cpu()
        uploader.put([(whole[box], source)])
        uploader.drain()
        assert torch.equal(whole, wanted)


def test_sources_are_let_go_while_uploading(
    segment: Segment, uploader: Uploader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "GROUP", 4 * MIB)
    monkeypatch.setattr(upload, "PENDING", 16 * MIB)
    target = place(segment, (MIB,), torch.float32)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for i in range(100):
        uploader.put([(target, torch.full((MIB,), float(i), device="cuda"))])  # nobody else keeps the source
    uploader.drain()
    assert bool((target == 99).all())
    assert torch.cuda.max_memory_allocated() - before <= 32 * MIB
    assert torch.cuda.memory_allocated() == before


def test_gathering_takes_bounded_scratch(segment: Segment, uploader: Uploader) -> None:
    source = torch.randn(WINDOW // 4, 6, device="cuda").t()
    target = place(segment, source.shape, torch.float32)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    uploader.put([(target, source)])
    uploader.drain()
    assert torch.equal(target, source.cpu())
    assert torch.cuda.max_memory_allocated() - before <= 2 * upload.SCRATCH


def test_uploads_refuse_what_is_not_theirs(segment: Segment, uploader: Uploader) -> None:
    with pytest.raises(DeviceError, match="writable"):
        Uploader(segment.reader, torch.device("cuda", 0))
    with pytest.raises(DeviceError, match="does not lie in the arena"):
        uploader.put([(torch.zeros(4), torch.zeros(4, device="cuda"))])
    with pytest.raises(DeviceError, match="cannot upload"):
        uploader.put([(place(segment, (4,), torch.float32), torch.zeros(4))])
    uploader.close()
    with pytest.raises(DeviceError, match="closed"):
        uploader.put([(place(segment, (4,), torch.float32), torch.zeros(4, device="cuda"))])
