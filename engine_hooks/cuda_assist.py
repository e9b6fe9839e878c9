"""A second way over the link: a kernel that copies while the copy engine is held up.

Memory that was freed a moment ago is scrubbed by the driver, on the copy engines, for some 50 ms after a
sleep of 24 GB. Copies enqueued meanwhile run at half the link's speed. A kernel on a few multiprocessors that
reads pinned memory beside them takes the other half. Once the scrubbing is over the engine alone
fills the link (bench/NOTES.md has the numbers, and what else was tried).

The kernel is compiled in the background the first time anybody sleeps, and is an optimisation only: without
it the engine does all the copying.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from typing import Any, Final

from weightstore.cuda.driver import Device, call
from weightstore.errors import DeviceError

log = logging.getLogger(__name__)

VECTOR: Final = 16
"""Bytes per access: addresses and sizes that the kernel gets must be multiples of it."""
THREADS: Final = 512

_SOURCE: Final = b"""
typedef unsigned long long u64;
extern "C" __global__ void copy_vectors(const uint4* __restrict__ source, uint4* __restrict__ target,
                                        u64 count) {
    const u64 step = (u64)gridDim.x * blockDim.x;
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    // Four loads in flight per thread: what hides the latency of the link.
    for (; i + 3 * step < count; i += 4 * step) {
        const uint4 a = source[i], b = source[i + step], c = source[i + 2 * step], d = source[i + 3 * step];
        target[i] = a;
        target[i + step] = b;
        target[i + 2 * step] = c;
        target[i + 3 * step] = d;
    }
    for (; i < count; i += step) target[i] = source[i];
}
"""


class Assist:
    """The copy kernel of one device; loads itself when first asked for. Thread-safe."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._function: Any = None
        self._loading: threading.Thread | None = None

    @property
    def ready(self) -> bool:
        return self._function is not None

    def load(self, wait: bool = False) -> None:
        """Compile and load the kernel in the background. A failure is logged, and `ready` stays false."""
        if self._loading is None:
            self._loading = threading.Thread(target=self._load, name="weightstore-assist", daemon=True)
            self._loading.start()
        if wait:
            self._loading.join()

    def copy(self, target: int, source: int, nbytes: int, stream: Any, blocks: int) -> None:
        """Enqueue a copy from pinned memory; all numbers are multiples of VECTOR."""
        with self._device.current():
            values = (source, target, nbytes // VECTOR)
            types = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulonglong)
            call("cuLaunchKernel", self._function, blocks, 1, 1, THREADS, 1, 1, 0, stream, (values, types), 0)

    def _load(self) -> None:
        try:
            major = self._device.attribute("COMPUTE_CAPABILITY_MAJOR")
            minor = self._device.attribute("COMPUTE_CAPABILITY_MINOR")
            image = _compile(f"sm_{major}{minor}")
            with self._device.current():
                module = call("cuModuleLoadData", image)
                self._function = call("cuModuleGetFunction", module, b"copy_vectors")
        except (DeviceError, ImportError, RuntimeError) as error:
            log.info("waking without the copy kernel: %s", error)


@functools.cache
def assist(device: Device) -> Assist:
    """The one of the device: modules are loaded once per context."""
    return Assist(device)


def _compile(architecture: str) -> bytes:
    """The kernel as machine code. DeviceError with the compiler's words if it refuses."""
    from cuda.bindings import nvrtc

    def checked(result: Any) -> Any:
        code, *values = result
        if code != 0:
            raise DeviceError(f"compiling the copy kernel failed: {getattr(code, 'name', code)}")
        return values[0] if values else None

    program = checked(nvrtc.nvrtcCreateProgram(_SOURCE, b"copy_vectors.cu", 0, [], []))
    options = [f"--gpu-architecture={architecture}".encode()]
    checked(nvrtc.nvrtcCompileProgram(program, len(options), options))
    image = b" " * int(checked(nvrtc.nvrtcGetCUBINSize(program)))
    checked(nvrtc.nvrtcGetCUBIN(program, image))
    checked(nvrtc.nvrtcDestroyProgram(program))
    return image
