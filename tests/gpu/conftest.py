"""What the GPU tests share: a skip that says why, a device and a small real arena."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_segment import WINDOW, Segment, open_segment

from weightstore.cuda import driver


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    usable, reason = driver.available()
    if usable and not torch.cuda.is_available():
        usable, reason = False, "this torch has no CUDA"
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if not usable:
                item.add_marker(pytest.mark.skip(reason=f"no GPU: {reason}"))


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = open_segment(8 * WINDOW)
    segment.fill()
    yield segment
    segment.reader.close()
    segment.writer.close()
    segment.arena.unlink()
    segment.arena.close()


@pytest.fixture
def device() -> driver.Device:
    return driver.device(0)
