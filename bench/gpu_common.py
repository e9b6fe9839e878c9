"""What the GPU benchmarks share: memory, an arena without a store, real models' modules, and the limit.

Every rate is compared with a limit measured in the same process and the same round: one cuMemcpyAsync of
the same bytes between pinned host memory and device memory (`Limit`).
"""

from __future__ import annotations

import json
import mmap
import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.rows import clock
from bench.shapes import modules_of
from weightstore.admission import Admission
from weightstore.arena import Arena
from weightstore.cuda import driver
from weightstore.mapping import ArenaMapping
from weightstore.types import TensorSpec

GIB = 1 << 30
MIB = 1 << 20


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


def device_facts() -> dict[str, Any]:
    """The GPU and the software that drives it."""
    from cuda.bindings import __version__ as bindings

    version = Path("/proc/driver/nvidia/version")
    found = version.read_text().split("\n", 1)[0] if version.exists() else ""
    return {
        "device": torch.cuda.get_device_name(0),
        "driver": next((word for word in found.split() if word[:1].isdigit() and "." in word), found),
        "driver_cuda": driver.call("cuDriverGetVersion"),
        "torch_cuda": torch.version.cuda,
        "cuda_bindings": bindings,
        "shm": _mount_of("/dev/shm"),
    }


def _mount_of(path: str) -> str:
    lines = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return next((f"{fields[2]} {fields[3]}" for fields in lines if fields[1] == path), "")


def populate(memory: mmap.mmap) -> None:
    """Have every page of `memory` allocated, by several threads."""
    threads = max(len(os.sched_getaffinity(0)), 1)
    share = -(-len(memory) // threads // (2 * MIB)) * 2 * MIB
    starts = range(0, len(memory), share)
    workers = [
        threading.Thread(target=memory.madvise, args=(23, at, min(share, len(memory) - at)))  # POPULATE_WRITE
        for at in starts
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def touch_memory(nbytes: int) -> float:
    """Touch and free that much anonymous memory: on virtual machines whose memory grows on first touch this
    keeps the growing out of the measurements. Seconds taken."""
    with mmap.mmap(-1, nbytes) as memory:
        return clock(populate, memory)


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
    """One copy between pinned memory and the device, either way. Up to `nbytes` bytes; `close` it."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = -(-nbytes // (2 * MIB)) * 2 * MIB
        self._device = driver.device(0)
        self._memory = mmap.mmap(-1, self.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        populate(self._memory)
        self._host = np.frombuffer(self._memory, np.uint8, 1).ctypes.data
        with self._device.current():
            driver.call("cuMemHostRegister", self._host, self.nbytes, 0)
        self._block: torch.Tensor | None = None

    def h2d(self, nbytes: int) -> float:
        """Seconds of one host-to-device copy, from and to an idle device."""
        return clock(self._copy, self._on_device(nbytes), self._host, nbytes)

    def d2h(self, nbytes: int) -> float:
        return clock(self._copy, self._host, self._on_device(nbytes), nbytes)

    def free_device(self) -> None:
        """Give the device's side back."""
        self._block = None
        torch.cuda.empty_cache()

    def close(self) -> None:
        self.free_device()
        with self._device.current():
            driver.call("cuMemHostUnregister", self._host)

    def _on_device(self, nbytes: int) -> int:
        if self._block is None or self._block.nbytes < nbytes:
            self.free_device()
            self._block = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
            self._copy(self._block.data_ptr(), self._host, nbytes)  # new device memory is slower once
        torch.cuda.synchronize()
        return self._block.data_ptr()

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        with self._device.current():
            driver.call("cuMemcpyAsync", target, source, nbytes, driver.LEGACY_STREAM)
            driver.call("cuStreamSynchronize", driver.LEGACY_STREAM)


def random_modules(specs: Iterable[TensorSpec]) -> dict[str, nn.Module]:
    """Modules on the GPU with these tensors by component, of random bytes."""
    modules = modules_of(specs, "cuda")
    for module in modules.values():
        scramble(module.parameters())
    return modules


def scramble(tensors: Iterable[torch.Tensor]) -> None:
    """New random bytes, in place."""
    with torch.no_grad():
        for tensor in tensors:
            if tensor.dim():
                tensor.data.view(torch.uint8).random_(0, 256)


def large_and_small(count: int, large: int, large_bytes: int, small_bytes: int) -> list[TensorSpec]:
    """Specs of one component: `large` tensors of `large_bytes`, the others of up to `small_bytes`, mixed as
    the weights and norms of a transformer are."""
    every = max(count // large, 1)
    specs = []
    for i in range(count):
        nbytes = large_bytes if i % every == 0 else 256 + (i * 7919) % small_bytes // 256 * 256
        specs.append(TensorSpec(f"transformer.t{i}.weight", "bfloat16", (nbytes // 2,), (1,)))
    return specs
