"""Who holds how much memory, sampled while the roles work.

Private memory and the arena are sampled apart, because the arena's pages belong to nobody alone: a
process's resident set counts them again in every process that maps them.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from weightstore.errors import DeviceError

Source = Callable[[], int]


def private_bytes(pid: int) -> int:
    """Bytes of anonymous memory in RAM that process `pid` has; 0 once it is gone."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass  # it ended: it holds nothing
    return 0


def segment_bytes(name: str) -> int:
    """Bytes of the POSIX shared-memory object `name` that exist as pages; 0 once it is gone."""
    try:
        return os.stat(f"/dev/shm/{name.lstrip('/')}").st_blocks * 512
    except FileNotFoundError:
        return 0


def gpu_bytes() -> int:
    """Bytes of the first GPU in use, by everyone, as the driver counts them."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        return int(answer.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise DeviceError(f"nvidia-smi does not tell the GPU memory in use: {error}") from None


@dataclass
class MemorySampler:
    """Calls every source about `interval` seconds apart on a thread of its own, from start to close.

    `times` are seconds since `origin` (of time.monotonic); `series[label]` has one value per time,
    0 before the source was added.
    """

    origin: float
    interval: float = 0.05
    times: list[float] = field(default_factory=list)
    series: dict[str, list[int]] = field(default_factory=dict)
    _sources: dict[str, Source] = field(default_factory=dict)
    _done: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _thread: threading.Thread | None = None

    def watch(self, label: str, source: Source) -> None:
        with self._lock:
            self._sources[label] = source
            self.series[label] = [0] * len(self.times)

    def start(self) -> MemorySampler:
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(self.interval):
            with self._lock:
                self.times.append(time.monotonic() - self.origin)
                for label, source in self._sources.items():
                    self.series[label].append(source())
