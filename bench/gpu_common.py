"""What the GPU benchmarks share: results written as they come, the machine's facts, memory, and the limit.

Every rate is compared with a limit measured in the same process: one cuMemcpyAsync between a pinned
buffer and one device allocation of the same size (`Limit`).
"""

from __future__ import annotations

import json
import mmap
import os
import platform
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightstore.admission import Admission
from weightstore.arena import Arena
from weightstore.cuda import driver
from weightstore.mapping import ArenaMapping

GIB = 1 << 30


class Results:
    """A JSON file of measurements that is complete after every `put`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def put(self, section: str, **values: Any) -> None:
        self.data.setdefault(section, {}).update(values)
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.data, indent=1, default=str) + "\n")
        scratch.replace(self.path)
        print(f"[{section}]", json.dumps(values, default=str), flush=True)


def clock(work: Callable[..., object], *args: object) -> float:
    """Wall-clock seconds of `work(*args)`."""
    start = time.perf_counter()
    work(*args)
    return time.perf_counter() - start


def median(values: list[float]) -> float:
    return statistics.median(values)


def machine() -> dict[str, Any]:
    from cuda.bindings import __version__ as bindings

    smi = Path("/proc/driver/nvidia/version")
    return {
        "device": torch.cuda.get_device_name(0),
        "driver": smi.read_text().splitlines()[0].strip() if smi.exists() else "",
        "cuda_driver_version": driver.call("cuDriverGetVersion"),
        "cuda_bindings": bindings,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)),
        "shm": _mount_of("/dev/shm"),
    }


def _mount_of(path: str) -> str:
    lines = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return next((f"{fields[2]} {fields[3]}" for fields in lines if fields[1] == path), "")


def touch_memory(nbytes: int) -> float:
    """Touch and free that much anonymous memory: on virtual machines whose memory grows on first touch this
    keeps the growing out of the measurements. Seconds taken."""
    start = time.perf_counter()
    threads = max(len(os.sched_getaffinity(0)), 1)
    share = nbytes // threads // 4096 * 4096

    def touch() -> None:
        with mmap.mmap(-1, share) as part:
            part.madvise(23)  # MADV_POPULATE_WRITE

    workers = [threading.Thread(target=touch) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start


@dataclass
class Segment:
    """An arena without a store, for measurements below the store's level."""

    arena: Arena
    commit_seconds: float

    def map(self, writable: bool) -> ArenaMapping:
        fd = self.arena.writer_fd() if writable else self.arena.reader_fd()
        try:
            return ArenaMapping(fd, self.arena.nbytes, writable)
        finally:
            os.close(fd)


@contextmanager
def raw_segment(nbytes: int, window: int = GIB) -> Iterator[Segment]:
    """A committed arena of `nbytes` data bytes, removed at the end."""
    arena = Arena.open(f"ws-bench-{uuid.uuid4().hex[:12]}", nbytes, window, Admission(reserve=0))
    try:
        start = time.perf_counter()
        arena.commit_data(nbytes)
        yield Segment(arena, time.perf_counter() - start)
    finally:
        arena.unlink()
        arena.close()


class Limit:
    """The time of one copy of exactly `nbytes` bytes between pinned memory and the device, either way."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._device = driver.device(0)
        with self._device.current():
            start = time.perf_counter()
            self._host = int(driver.call("cuMemHostAlloc", nbytes, 0))
            self.alloc_seconds = time.perf_counter() - start

    def measure(self, samples: int = 4) -> dict[str, float]:
        """Best seconds of each direction, of some samples (the first touches new device memory)."""
        block = torch.empty(self.nbytes, dtype=torch.uint8, device="cuda")
        times: dict[str, list[float]] = {"h2d": [], "d2h": []}
        torch.cuda.synchronize()
        with self._device.current():
            for _ in range(samples):
                for name, target, source in (
                    ("h2d", block.data_ptr(), self._host),
                    ("d2h", self._host, block.data_ptr()),
                ):
                    times[name].append(clock(self._copy, target, source))
        del block
        torch.cuda.empty_cache()
        return {name: min(found) for name, found in times.items()}

    def _copy(self, target: int, source: int) -> None:
        driver.call("cuMemcpyAsync", target, source, self.nbytes, driver.LEGACY_STREAM)
        driver.call("cuStreamSynchronize", driver.LEGACY_STREAM)

    def close(self) -> None:
        with self._device.current():
            driver.call("cuMemFreeHost", self._host)
