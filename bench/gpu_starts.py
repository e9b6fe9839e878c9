"""`python -m bench.gpu_starts --out FILE`: how a wake and a relaunch begin, below the store's level.

Three questions. Why does the first mapping of a wake take 16 ms, however small it is, and what makes that
shorter? Do several threads register memory faster than one? What does registered memory take on the device?
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.gpu_common import GIB, MIB, Results, device_facts, raw_segment, touch_memory
from bench.rows import clock
from engine_hooks.cuda_image import CudaImage
from weightstore.cuda import driver
from weightstore.cuda.pinning import MADV_POPULATE_READ, _libc
from weightstore.layout import DATA_OFFSET

IMAGE = 24 * GIB
REGISTERED = 8 * GIB
STEPS = ("cuMemCreate", "cuMemMap", "cuMemRelease", "cuMemSetAccess")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", metavar="A,B", default="first,register,taken", help="some of these parts")
    options = parser.parse_args()
    parts = options.only.split(",")
    results = Results(options.out)
    torch.zeros(1, device="cuda")
    results.put("machine", **device_facts())
    results.put("memory", touch_seconds=touch_memory(2 * REGISTERED))
    device = driver.device(0)
    if "first" in parts:
        _first_mappings(results, device)
    with raw_segment(REGISTERED) as segment:
        if "register" in parts:
            _registering(results, segment, device)
        if "taken" in parts:
            _taken(results, segment, device)


# -- the first mapping ---------------------------------------------------------------------------------


@contextmanager
def _timed_calls() -> Iterator[dict[str, list[float]]]:
    """Milliseconds of each driver call that maps, in order."""
    import engine_hooks.cuda_image as image

    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    real: Callable[..., Any] = image.call

    def call(name: str, *arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return real(name, *arguments)
        finally:
            if name in seconds:
                seconds[name].append(round((time.perf_counter() - began) * 1e3, 3))

    image.call = call  # type: ignore[assignment]
    try:
        yield seconds
    finally:
        image.call = real  # type: ignore[assignment]


def _first_mappings(results: Results, device: driver.Device) -> None:
    """The first three pieces after all of an image was unmapped: after a while, with another block freed
    besides, and with something small mapped, or a piece mapped and unmapped, before the while."""
    image, small = CudaImage(device, IMAGE), CudaImage(device, 2 * MIB)
    for wait in (0.0, 0.1, 1.0, 2.0):
        for beside in ("nothing", "block freed", "small mapped", "small mapped and unmapped"):
            image.map_next(IMAGE)
            block = (
                torch.empty(20 * GIB, dtype=torch.uint8, device="cuda") if beside == "block freed" else None
            )
            device.synchronize()
            image.unmap()
            del block
            torch.cuda.empty_cache()
            if beside.startswith("small"):
                small.map_next(2 * MIB)
            if beside.endswith("unmapped"):
                small.unmap()
            time.sleep(wait)
            with _timed_calls() as milliseconds:
                pieces = [clock(image.map_next, nbytes) * 1e3 for nbytes in (2 * MIB, 128 * MIB, 2 * GIB)]
            results.put(
                "first",
                **{
                    f"after {wait:g} s, {beside}": {
                        "2 MiB, 128 MiB, 2 GiB": [round(ms, 3) for ms in pieces],
                        **milliseconds,
                    }
                },
            )
            image.unmap()
            small.unmap()
    image.close()
    small.close()


# -- registering -----------------------------------------------------------------------------------------


def _registering(results: Results, segment: Any, device: driver.Device) -> None:
    """GB/s of registering 8 GiB through a mapping that nobody has registered, in windows, by threads."""
    flags = driver.api().CU_MEMHOSTREGISTER_PORTABLE
    for writable in (False, True):
        for window in (256 * MIB, 512 * MIB, GIB, 2 * GIB):
            for threads in (1, 2, 4):
                mapping = segment.map(writable)
                address = mapping.address + DATA_OFFSET
                _libc.madvise(address, REGISTERED, MADV_POPULATE_READ)
                extra = 0 if writable else driver.api().CU_MEMHOSTREGISTER_READ_ONLY

                def register(at: int, window: int = window, extra: int = extra) -> None:
                    with device.current():
                        driver.call("cuMemHostRegister", at, window, flags | extra)

                starts = range(address, address + REGISTERED, window)
                name = f"{'rw' if writable else 'ro'} {window >> 20} MiB by {threads}"
                with ThreadPoolExecutor(threads) as pool:
                    began = time.perf_counter()
                    futures = [pool.submit(register, at) for at in starts]
                    failures = [str(f.exception()) for f in futures if f.exception() is not None]
                    took = time.perf_counter() - began
                found: Any = failures[:1] if failures else round(REGISTERED / took / 1e9, 1)
                results.put("register", **{name: found})
                with device.current():
                    for at, future in zip(starts, futures, strict=True):
                        if future.exception() is None:
                            driver.call("cuMemHostUnregister", at)
                mapping.close()


def _taken(results: Results, segment: Any, device: driver.Device) -> None:
    """Bytes of the device's memory that registering host memory takes: its page tables, in this context."""
    flags = driver.api().CU_MEMHOSTREGISTER_PORTABLE
    mapping = segment.map(True)
    starts = range(mapping.address + DATA_OFFSET, mapping.address + DATA_OFFSET + REGISTERED, GIB)
    free = [device.memory()[0]]
    with device.current():
        for start in starts:
            driver.call("cuMemHostRegister", start, GIB, flags)
            free.append(device.memory()[0])
        for start in starts:
            driver.call("cuMemHostUnregister", start)
    after = device.memory()[0]
    mapping.close()
    results.put(
        "taken",
        registered=REGISTERED,
        bytes_after_each_GiB=[free[0] - now for now in free[1:]],
        bytes_after_unregistering=free[0] - after,
    )


if __name__ == "__main__":
    main()
