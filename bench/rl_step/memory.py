"""Memory of the device and of the host while ways are compared: a curve that costs nothing, and exact points.

The curve is what the machine as a whole uses, sampled in a thread: the device by NVML, the host as
MemTotal - MemAvailable, which also has what a driver pins for a process and no PSS counts; page cache is not
in it. Points are sums over the processes that take part: what each has for itself by PSS, and the pages of
the arena once. They walk page tables, so they are taken between timed phases only.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

EVERY: Final = 0.02
KEPT: Final = 200
"""Points of a curve that are kept, about."""
_KIB: Final = 1024


class Device:
    """The memory in use on the first GPU, over all processes; None where there is none to ask."""

    def __init__(self, device: str) -> None:
        self._nvml: Any = None
        if device != "cpu":
            with contextlib.suppress(ImportError):
                import pynvml

                pynvml.nvmlInit()
                self._nvml = pynvml
                self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)

    def used(self) -> int | None:
        if self._nvml is None:
            return None
        used: int = self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used
        return used


def host_used() -> int:
    """Bytes of the machine's memory that are in use and cannot be reclaimed."""
    found: dict[str, int] = {}
    with open("/proc/meminfo") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name in ("MemTotal", "MemAvailable"):
                found[name] = int(rest.split()[0]) * _KIB
                if len(found) == 2:
                    break
    return found["MemTotal"] - found["MemAvailable"]


class Sampler:
    """A thread that samples from its start to its end; a context manager."""

    def __init__(self, device: str) -> None:
        self._device = Device(device)
        self._points: list[tuple[float, int | None, int]] = []
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def begin(self) -> None:
        """Forget what was sampled so far."""
        with self._lock:
            self._points.clear()

    def curve(self, origin: float) -> dict[str, list[Any]]:
        """What was sampled since `begin`, thinned; seconds count from `origin` (a `time.perf_counter`)."""
        with self._lock:
            points = list(self._points)
        step = max(1, len(points) // KEPT)
        points = points[::step]
        return {
            "seconds": [round(at - origin, 3) for at, _, _ in points],
            "device": [device for _, device, _ in points],
            "host": [host for _, _, host in points],
        }

    def _run(self) -> None:
        while not self._ended.wait(EVERY):
            point = (time.perf_counter(), self._device.used(), host_used())
            with self._lock:
                self._points.append(point)

    def device_used(self) -> int | None:
        return self._device.used()


def point(pids: Iterable[int], arena: Path | None) -> dict[str, int]:
    """Bytes of host memory: `processes` is what they have for themselves by PSS, `arena` its pages, once."""
    total = 0
    for pid in pids:
        found = rollup(pid)
        total += found.get("Pss", 0) - (found.get("Pss_Shmem", 0) if arena is not None else 0)
    pages = arena.stat().st_blocks * 512 if arena is not None and arena.exists() else 0
    return {"processes": total, "arena": pages, "used": host_used()}


def rollup(pid: int) -> dict[str, int]:
    """Bytes by kind from /proc/PID/smaps_rollup; nothing for a process that has ended."""
    sums: dict[str, int] = {}
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name in ("Pss", "Pss_Anon", "Pss_File", "Pss_Shmem"):
                sums[name] = int(rest.split()[0]) * _KIB
    return sums


def mapped_share(pids: Iterable[int], path: str) -> int:
    """Bytes of one mapped file by PSS, summed: each page is divided among the processes that map it."""
    total = 0
    for pid in pids:
        inside = False
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            head = line.split(None, 1)[0]
            if "-" in head and not head.endswith(":"):
                inside = line.rstrip().endswith(path) or line.rstrip().endswith(f"{path} (deleted)")
            elif inside and head == "Pss:":
                total += int(line.split()[1]) * _KIB
    return total


def drop_cache(paths: Iterable[Path]) -> str | None:
    """Have the page cache forget files, which must be on a disk by then; None, or why it could not."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            return f"{path.name}: {error}"
        finally:
            os.close(handle)
    return None


def cached_share(paths: Iterable[Path]) -> float:
    """The share of files' pages that the page cache has."""
    import ctypes
    import mmap

    libc = ctypes.CDLL(None, use_errno=True)
    page = mmap.PAGESIZE
    there = total = 0
    for path in paths:
        size = path.stat().st_size
        if not size:
            continue
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), size) as memory:
            count = -(-size // page)
            state = (ctypes.c_ubyte * count)()
            first = ctypes.c_char.from_buffer(memory)
            failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), state)
            del first
            if failed:
                raise OSError(ctypes.get_errno(), "mincore")
            there += bytes(state).count(1)
            total += count
    return there / total if total else 0.0
