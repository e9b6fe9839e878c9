"""Below the store: the link, pinning, mapping, and how fast a just-freed GPU can be filled again.

These answer the questions the design stands on, and what was tried against the driver's scrubbing of
freed memory. No store is needed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu_common import GIB, Limit, Results, device_facts, raw_segment, touch_memory
from bench.rows import clock
from engine_hooks.backend import Run
from engine_hooks.cuda import CudaBackend
from engine_hooks.cuda_image import CudaImage
from weightstore.cuda import driver
from weightstore.cuda.copies import enqueue_batch, enqueue_loop
from weightstore.cuda.pinning import MADV_POPULATE_READ, PinnedArena, _libc
from weightstore.cuda.upload import Uploader
from weightstore.layout import DATA_OFFSET

TRANSFORMER = 23_802_816_640 + 1160 * 128  # FLUX.1-dev's transformer with its alignment padding, in bytes
PIPELINE = int(31.4 * GIB)


def run(results: Results) -> None:
    device = driver.device(0)
    torch.zeros(1, device="cuda")
    results.put("machine", **device_facts())
    results.put("memory", touch_seconds=touch_memory(88 * GIB))
    limit = Limit(TRANSFORMER)
    best = {
        "h2d": min(limit.h2d(TRANSFORMER) for _ in range(4)),
        "d2h": min(limit.d2h(TRANSFORMER) for _ in range(4)),
    }
    results.put(
        "limit",
        nbytes=TRANSFORMER,
        h2d_gbps=TRANSFORMER / best["h2d"] / 1e9,
        d2h_gbps=TRANSFORMER / best["d2h"] / 1e9,
        h2d_ms=best["h2d"] * 1e3,
        d2h_ms=best["d2h"] * 1e3,
    )
    limit.close()
    with raw_segment(34 * GIB) as segment:
        results.put(
            "commit", gib=34, seconds=segment.commit_seconds, gbps=34 * GIB / segment.commit_seconds / 1e9
        )
        data = segment.map(True)
        block = data.tensor[DATA_OFFSET : DATA_OFFSET + GIB]
        block.view(torch.int64).random_()
        for window in range(1, 34):
            data.tensor[DATA_OFFSET + window * GIB :][:GIB].copy_(block)
        _pinning(results, segment, device)
        reader = segment.map(False)
        arena = PinnedArena.share(reader, device)
        took = clock(arena.ensure, [(DATA_OFFSET, 34 * GIB)])
        results.put("pin", read_only_34_gib_s=took, read_only_34_gib_gbps=34 * GIB / took / 1e9)
        _vmm(results, device)
        _wakes(results, reader, best["h2d"])
        _small(results, reader, arena, device)
        _upload(results, data, best["d2h"])
        _scrub(results, reader, device, best["h2d"])
        arena.close()


def _pinning(results: Results, segment: Any, device: driver.Device) -> None:
    """Rates of registering 2 windows, with and without page tables filled first, both kinds of mapping."""
    flags = driver.api().CU_MEMHOSTREGISTER_PORTABLE
    for writable, populate in ((False, False), (False, True), (True, False), (True, True)):
        mapping = segment.map(writable)
        address = mapping.address + DATA_OFFSET
        extra = 0 if writable else driver.api().CU_MEMHOSTREGISTER_READ_ONLY
        filled = clock(_libc.madvise, address, 2 * GIB, MADV_POPULATE_READ) if populate else 0.0
        with device.current():
            took = clock(
                lambda a=address, e=extra: [
                    driver.call("cuMemHostRegister", a + i * GIB, GIB, flags | e) for i in range(2)
                ]
            )
            gone = clock(
                lambda a=address: [driver.call("cuMemHostUnregister", a + i * GIB) for i in range(2)]
            )
        name = f"{'rw' if writable else 'ro'}{'_populated' if populate else ''}"
        results.put(
            "pin",
            **{
                f"{name}_gbps": 2 * GIB / took / 1e9,
                f"{name}_populate_s_per_gib": filled / 2,
                f"{name}_unregister_s_per_gib": gone / 2,
                f"{name}_aligned_2mib": mapping.address % (2 << 20) == 0,
            },
        )
        mapping.close()


def _vmm(results: Results, device: driver.Device) -> None:
    """Host time of mapping and unmapping 31.4 GiB by piece size, right after a free and a while later."""
    image = CudaImage(device, PIPELINE)
    for piece in (256 << 20, 512 << 20, GIB, 2 * GIB):
        maps, unmaps, late = [], [], []
        for wait in (2.0, 0.0, 0.0):
            time.sleep(wait)

            def map_all(piece: int) -> None:
                while not image.mapped:
                    image.map_next(piece)

            (late if wait else maps).append(clock(map_all, piece) * 1e3)
            unmaps.append(clock(image.unmap) * 1e3)
        results.put(
            "vmm",
            **{f"piece_{piece >> 20}_mib": {"map_ms": maps, "map_after_2s_ms": late, "unmap_ms": unmaps}},
        )
    image.close()


def _wakes(results: Results, reader: Any, limit: float) -> None:
    """The backend's whole wake and unmap."""
    for name, nbytes in (("transformer", TRANSFORMER), ("pipeline", PIPELINE)):
        bound = limit * nbytes / TRANSFORMER
        for piece in (512 << 20, 2 * GIB) if name == "transformer" else (512 << 20,):
            backend = CudaBackend(0, piece=piece)
            image = backend.reserve(nbytes)
            runs = [Run(DATA_OFFSET, 0, nbytes)]
            cold = clock(backend.wake, [(image, runs)], reader)
            rows: dict[str, list[float]] = {}
            sleeps = []
            for wait in (2.0, 0.0, 2.0, 0.0, 2.0, 0.0, 0.5):
                sleeps.append(clock(backend.unmap, [image]) * 1e3)
                time.sleep(wait)
                took = clock(backend.wake, [(image, runs)], reader)
                rows.setdefault(f"after_{wait}s", []).append(bound / took)
            verify = clock(backend.differing, image, runs, reader)
            before = backend.memory_in_use()
            backend.unmap([image])
            back = before - backend.memory_in_use()
            results.put(
                "wake",
                **{
                    f"{name}_piece_{piece >> 20}": {
                        "of_limit": rows,
                        "first_ms": cold * 1e3,
                        "sleep_ms": sleeps,
                        "freed": back / nbytes,
                        "verify_of_limit": bound / verify,
                    }
                },
            )
            backend.close()


COPY_KERNEL = """
typedef unsigned long long u64;
extern "C" __global__ void copy16(const uint4* __restrict__ src, uint4* __restrict__ dst, u64 n) {
    u64 step = (u64)gridDim.x * blockDim.x;
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 3 * step < n; i += 4 * step) {
        uint4 a = src[i], b = src[i + step], c = src[i + 2 * step], d = src[i + 3 * step];
        dst[i] = a; dst[i + step] = b; dst[i + 2 * step] = c; dst[i + 3 * step] = d;
    }
    for (; i < n; i += step) dst[i] = src[i];
}
"""


def _scrub(results: Results, reader: Any, device: driver.Device, limit: float) -> None:
    """Waking right after a sleep: where the time goes, and what was tried."""
    import cupy

    kernel = cupy.RawKernel(COPY_KERNEL, "copy16")
    image = CudaImage(device, TRANSFORMER)
    base = reader.address + DATA_OFFSET
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    piece = GIB

    def by_kernel(at: int, nbytes: int, stream: Any, blocks: int) -> None:
        with cupy.cuda.ExternalStream(stream.cuda_stream):
            addresses = (np.uint64(base + at), np.uint64(image.address + at), np.uint64(nbytes // 16))
            kernel((blocks,), (512,), addresses)

    def by_engine(at: int, nbytes: int, stream: Any) -> None:
        driver.call("cuMemcpyAsync", image.address + at, base + at, nbytes, stream.cuda_stream)

    def fill(way: str, marks: list[Any] | None = None) -> None:
        blocks = int(way.split("_")[-1]) if "kernel" in way else 0
        if way == "map_all_first":
            while not image.mapped:
                image.map_next(piece)
        for at in range(0, TRANSFORMER, piece):
            nbytes = min(piece, TRANSFORMER - at)
            if not image.mapped:
                image.map_next(piece)
            if way.startswith("kernel"):
                by_kernel(at, nbytes, first, blocks)
            elif way.startswith("half"):  # half of each piece by the engine, half by a kernel beside it
                half = nbytes // 2 // 16 * 16
                by_engine(at, half, first)
                by_kernel(at + half, nbytes - half, second, blocks)
            elif way.startswith("start"):  # a kernel for the first quarter of the image, then the engine
                if at < TRANSFORMER // 4:
                    by_kernel(at, nbytes, first, blocks)
                else:
                    by_engine(at, nbytes, first)
            elif way.startswith("part"):  # for the first 6 GiB: a quarter of each piece by kernel
                share = nbytes // 4 // 16 * 16 if at < 6 * GIB else 0
                by_engine(at, nbytes - share, first)
                if share:
                    by_kernel(at + nbytes - share, share, second, blocks)
            elif way == "two_streams":
                by_engine(at, nbytes, (first, second)[at // piece % 2])
            else:
                by_engine(at, nbytes, first)
            if marks is not None:
                mark: Any = torch.cuda.Event(enable_timing=True)
                mark.record(first)
                marks.append(mark)
        first.synchronize()
        second.synchronize()

    with device.current():
        fill("kernel_32")  # compiles
        for wait in (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0):
            ratios = []
            for _ in range(3):
                image.unmap()
                time.sleep(wait)
                ratios.append(limit / clock(fill, "engine"))
            results.put("scrub_wait", **{f"{wait}s": ratios})
        for wait in (0.0, 2.0):
            image.unmap()
            time.sleep(wait)
            start: Any = torch.cuda.Event(enable_timing=True)
            start.record(first)
            marks: list[Any] = [start]
            fill("engine", marks)
            results.put(
                "scrub_profile",
                **{
                    f"gbps_by_gib_after_{wait}s": [
                        round(piece / a.elapsed_time(b) / 1e6, 1) for a, b in itertools.pairwise(marks)
                    ]
                },
            )
        ways = (
            "engine",
            "map_all_first",
            "two_streams",
            "kernel_16",
            "kernel_64",
            "start_kernel_64",
            "half_kernel_16",
            "half_kernel_64",
            "part_kernel_16",
            "part_kernel_64",
        )
        for way in ways:
            ratios = []
            for _ in range(4):
                image.unmap()
                ratios.append(limit / clock(fill, way))
            results.put("scrub_ways", **{way: ratios})
        image.unmap()
        time.sleep(2)
        results.put("scrub_ways", kernel_64_after_2s=limit / clock(fill, "kernel_64"))
        ratios = []
        for _ in range(3):
            image.unmap()
            hog = torch.empty(TRANSFORMER, dtype=torch.uint8, device="cuda")
            hog.fill_(1)
            torch.cuda.synchronize()
            del hog
            torch.cuda.empty_cache()
            ratios.append(limit / clock(fill, "engine"))
        results.put("scrub_ways", engine_after_another_allocation_was_freed=ratios)
    image.close()


def _small(results: Results, reader: Any, arena: PinnedArena, device: driver.Device) -> None:
    """Looped against batched calls by copy size, host and total time, from the arena to one buffer."""
    stream = driver.Stream(device)
    out = torch.empty(4 * GIB, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    base = arena.address + DATA_OFFSET
    with device.current():
        for size, count in (
            (512, 5000),
            (4096, 20000),
            (16384, 5000),
            (65536, 5000),
            (262144, 2000),
            (1 << 22, 900),
        ):
            window = GIB // (size * 2)  # copies with gaps, so that none could be joined
            copies = [
                (out.data_ptr() + i * size, base + (i // window) * GIB + (i % window) * size * 2, size)
                for i in range(count)
            ]
            row = {}
            for name, submit in (("loop", enqueue_loop), ("batch", enqueue_batch)):
                host, total = [], []
                for _ in range(3):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    submit(copies, stream.handle)
                    host.append((time.perf_counter() - start) * 1e3)
                    stream.synchronize()
                    total.append((time.perf_counter() - start) * 1e3)
                row[name] = {"host_ms": statistics.median(host), "total_ms": statistics.median(total)}
            results.put("small", **{f"{count}x{size}": row})
    stream.close()
    del out
    torch.cuda.empty_cache()


def _upload(results: Results, data: Any, limit: float) -> None:
    """A trainer's put: 1160 tensors of the transformer's total size, direct and cast."""
    count = 1160
    size = TRANSFORMER // count // 512 * 512
    bound = limit * size * count / TRANSFORMER
    views = [data.tensor[DATA_OFFSET + i * size :][:size].view(torch.bfloat16) for i in range(count)]
    uploader = Uploader(data, torch.device("cuda", 0))
    for name, dtype in (("direct", torch.bfloat16), ("cast", torch.float32)):
        sources = [torch.empty(size // 2, dtype=dtype, device="cuda") for _ in range(count)]

        def put_all(sources: list[torch.Tensor]) -> None:
            for source, view in zip(sources, views, strict=True):
                uploader.put([(view, source)])
            uploader.drain()

        times = [clock(put_all, sources) for _ in range(4)]
        results.put(
            "put", **{f"{name}_first_ms": times[0] * 1e3, f"{name}_of_limit": [bound / t for t in times]}
        )
        sources.clear()
        torch.cuda.empty_cache()
    uploader.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    run(Results(parser.parse_args().out))


if __name__ == "__main__":
    main()
