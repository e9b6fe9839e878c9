"""Checked calls of the CUDA driver API, and the few handles built on them.

cuda-bindings is imported on first use, so this module loads on any machine; `available` says whether a
device can be used and, if not, why.

Invariants:
- no result code is dropped: every call goes through `call` (or `check`), and a failure is a DeviceError
  that names the call and CUDA's result;
- work runs in the device's primary context, the one torch uses, from any thread: `Device.current` makes it
  current for a block and puts back what was current before;
- a primary context stays retained until the process ends: images, registrations and torch's tensors
  all live in it, and releasing it under them is undefined.

Driver behaviour this relies on: cuda-bindings lets go of the GIL during calls; `cuMemHostRegister` and its
like leave no error pending in the runtime API when they fail (the runtime's own calls do).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Final

from weightstore.errors import DependencyMissing, DeviceError, DeviceMemoryError

LEGACY_STREAM: Final = 1
"""CU_STREAM_LEGACY: the default stream, which waits for and is waited for by every blocking stream."""

_INSTALL = (
    "install it with `pip install 'weightstore[cuda]'` (CUDA 12: `pip install 'cuda-bindings>=12.8,<13'`)"
)


@functools.cache
def api() -> Any:
    """The module cuda.bindings.driver. DependencyMissing if cuda-bindings is not installed."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DependencyMissing(f"CUDA needs the package cuda-bindings ({error}); {_INSTALL}") from None
    return driver


def check(name: str, code: Any) -> None:
    """Raise DeviceError (DeviceMemoryError when the device is out of memory) unless `code` is success."""
    if code != 0:
        raise _error(name, code)


def call(name: str, *args: Any) -> Any:
    """Call the driver function `name` and return what it gives: None, one value or a tuple.

    Raises:
        DeviceError: the call failed; `details` has `call` and `result`.
        DeviceMemoryError: the same, with CUDA_ERROR_OUT_OF_MEMORY.
    """
    try:
        code, *values = getattr(api(), name)(*args)
    except RuntimeError as error:  # how cuda-bindings says that libcuda cannot be loaded
        raise DeviceError(f"{name} failed: {error}", call=name, result=str(error)) from None
    if code != 0:
        raise _error(name, code)
    if len(values) == 1:
        return values[0]
    return tuple(values) if values else None


def _error(name: str, code: Any) -> DeviceError:
    driver = api()
    result = getattr(code, "name", str(code))
    found, text = driver.cuGetErrorString(code)
    meaning = f" ({text.decode(errors='replace')})" if not found and text else ""
    kind = DeviceMemoryError if code == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY else DeviceError
    return kind(f"{name} failed: {result}{meaning}", call=name, result=result)


@functools.cache
def available() -> tuple[bool, str]:
    """Whether a CUDA device can be used, and the reason if not. Creates no context."""
    try:
        call("cuInit", 0)
        count = call("cuDeviceGetCount")
    except (DeviceError, DependencyMissing) as error:
        return False, error.message
    return (True, "") if count else (False, "the CUDA driver sees no device (CUDA_VISIBLE_DEVICES?)")


@functools.cache
def device(ordinal: int = 0) -> Device:
    """The device of that number, counted as torch counts (CUDA_VISIBLE_DEVICES applies to both)."""
    usable, reason = available()
    if not usable:
        raise DeviceError(f"no CUDA device can be used: {reason}")
    return Device(ordinal)


class Device:
    """One GPU with its primary context; made by `device`. Usable from any thread."""

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal
        self.handle = call("cuDeviceGet", ordinal)
        self.context = call("cuDevicePrimaryCtxRetain", self.handle)
        self._context = int(self.context)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make this device's context the calling thread's current one for the block."""
        if int(call("cuCtxGetCurrent")) == self._context:
            yield
            return
        call("cuCtxPushCurrent", self.context)
        try:
            yield
        finally:
            call("cuCtxPopCurrent")

    def synchronize(self) -> None:
        """Wait for all work submitted to the device so far, on every stream of this process."""
        with self.current():
            call("cuCtxSynchronize")

    def memory(self) -> tuple[int, int]:
        """(free, total) device memory in bytes, as the driver counts all processes."""
        with self.current():
            free, total = call("cuMemGetInfo")
        return int(free), int(total)

    def attribute(self, name: str) -> int:
        """A device attribute by its name without the prefix CU_DEVICE_ATTRIBUTE_; 0 if the driver or the
        bindings do not know it."""
        attribute = getattr(api().CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}", None)
        if attribute is None:
            return 0
        try:
            return int(call("cuDeviceGetAttribute", attribute, self.handle))
        except DeviceError:
            return 0

    @property
    def name(self) -> str:
        text: bytes = call("cuDeviceGetName", 128, self.handle)
        return text.split(b"\0", 1)[0].decode(errors="replace")


class Stream:
    """A non-blocking stream of the highest priority, owned by whoever made it."""

    def __init__(self, device: Device) -> None:
        self.device = device
        with device.current():
            _, greatest = call("cuCtxGetStreamPriorityRange")
            flags = api().CUstream_flags.CU_STREAM_NON_BLOCKING
            self.handle = call("cuStreamCreateWithPriority", int(flags), greatest)

    def synchronize(self) -> None:
        """Wait for everything submitted to this stream; raises what went wrong in it."""
        with self.device.current():
            call("cuStreamSynchronize", self.handle)

    def wait(self, event: Event) -> None:
        """Have later work on this stream wait for the event as it is recorded now."""
        with self.device.current():
            call("cuStreamWaitEvent", self.handle, event.handle, 0)

    def close(self) -> None:
        """Destroy the stream; work still on it completes first. Idempotent."""
        handle, self.handle = self.handle, None
        if handle is not None:
            with self.device.current():
                call("cuStreamDestroy", handle)


class Event:
    """An event without timing, owned by whoever made it. May be recorded again and again."""

    def __init__(self, device: Device) -> None:
        self.device = device
        with device.current():
            self.handle = call("cuEventCreate", int(api().CUevent_flags.CU_EVENT_DISABLE_TIMING))

    def record(self, stream: Stream) -> None:
        with self.device.current():
            call("cuEventRecord", self.handle, stream.handle)

    def done(self) -> bool:
        """Whether the work recorded before this event has finished (true if never recorded)."""
        with self.device.current():
            (code,) = api().cuEventQuery(self.handle)
        if code == api().CUresult.CUDA_ERROR_NOT_READY:
            return False
        check("cuEventQuery", code)
        return True

    def synchronize(self) -> None:
        with self.device.current():
            call("cuEventSynchronize", self.handle)

    def close(self) -> None:
        """Destroy the event. Idempotent."""
        handle, self.handle = self.handle, None
        if handle is not None:
            with self.device.current():
                call("cuEventDestroy", handle)
