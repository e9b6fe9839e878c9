"""The arena registered with the CUDA driver, window by window, so that copies run at link speed.

A window of the arena is registered when a copy first needs it (`ensure`) or ahead of that by a background
thread (`pin_ahead`); it stays registered until `close`. One `PinnedArena` serves all users of one
mapping in this process and all devices (registrations are portable).

Invariants:
- a window is registered as a whole and only once it is committed, so registrations never share a page and
  never populate memory that admission did not allow;
- a request pins all windows it needs or none: what it registered before failing is unregistered again;
- one registration at a time: in this process by a lock, across processes by a lock file named after
  the arena (concurrent registrations of one mapping can fail, and do not run faster);
- before anything is unregistered, every device that copied from or to the arena has been waited for; the
  mapping's pages are held (a view of its buffer) until the last window is unregistered.

Driver behaviour this relies on: a mapping without write permission needs the READ_ONLY flag, which a device
may lack; page tables filled beforehand (MADV_POPULATE_*) make registering faster; a copy must not span two
registrations (see `copies.split`).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Protocol

from weightstore.cuda.driver import Device, api, call
from weightstore.errors import DeviceError, UsageError
from weightstore.layout import DATA_OFFSET, read_committed, unpack_header
from weightstore.paths import default_socket, private_directory

log = logging.getLogger(__name__)

MADV_HUGEPAGE: Final = 14
MADV_POPULATE_READ: Final = 22
MADV_POPULATE_WRITE: Final = 23

_libc = ctypes.CDLL(None, use_errno=True)  # CDLL, not PyDLL: the GIL is released during a call
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.restype = ctypes.c_int


class Mapping(Protocol):
    """What is needed of a weightstore.mapping.ArenaMapping."""

    @property
    def address(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def buffer(self) -> memoryview: ...

    @property
    def writable(self) -> bool: ...

    @property
    def uuid(self) -> str: ...


class PinnedArena:
    """The registered windows of one mapping. Thread-safe. Made by `share`, ended by `close`."""

    _shared: dict[int, PinnedArena] = {}  # noqa: RUF012 - by address of the mapping, guarded by _guard
    _guard = threading.Lock()

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping
        self.address = mapping.address
        self._pages = mapping.buffer[:]  # keeps the pages mapped until close
        header = unpack_header(self._pages)
        self.window = header.window
        self._end = min(mapping.nbytes, header.nbytes)
        self._lock_path = lock_path(mapping.uuid)
        self._pinned: set[int] = set()
        self._devices: set[Device] = set()
        self._register = threading.Lock()  # held while registering: one request at a time
        self._turn = threading.Condition()
        self._requests = 0  # requests waiting or under way; the background thread gives way to them
        self._ahead: threading.Thread | None = None
        self._closing = False
        self._users = 1

    @classmethod
    def share(cls, mapping: Mapping, device: Device) -> PinnedArena:
        """The pinned arena of `mapping`, made on first use; each `share` is ended by one `close`."""
        with cls._guard:
            arena = cls._shared.get(mapping.address)
            if arena is None:
                arena = cls._shared[mapping.address] = cls(mapping)
            else:
                arena._users += 1
            arena._devices.add(device)
            return arena

    @property
    def pinned_bytes(self) -> int:
        return sum(end - start for start, end in map(self._extent, tuple(self._pinned)))

    @property
    def committed_windows(self) -> int:
        """Number of windows that are committed, hence can be pinned, now."""
        # A store that adopted the arena with a larger capacity may have committed beyond this mapping.
        return -(-min(read_committed(self._pages), self._end - DATA_OFFSET) // self.window)

    def windows(self, offset: int, nbytes: int) -> range:
        """Numbers of the windows that `nbytes` bytes at `offset` of the segment touch."""
        first = (offset - DATA_OFFSET) // self.window
        return range(first, -(-(offset + nbytes - DATA_OFFSET) // self.window) if nbytes else first)

    def check(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Raise DeviceError unless the (offset, nbytes) ranges lie in committed windows: touching others
        would be SIGBUS."""
        end = min(DATA_OFFSET + self.committed_windows * self.window, self._end)
        for offset, nbytes in ranges:
            if not DATA_OFFSET <= offset <= offset + nbytes <= end:
                raise DeviceError(
                    f"bytes {offset} to {offset + nbytes} of arena {self._mapping.uuid} were to be copied, "
                    f"but its committed data are bytes {DATA_OFFSET} to {end}"
                )

    def is_pinned(self, offset: int, nbytes: int) -> bool:
        return all(window in self._pinned for window in self.windows(offset, nbytes))

    def ensure(self, ranges: Iterable[tuple[int, int]], device: Device) -> int:
        """Pin the windows that the (offset, nbytes) ranges touch; return the bytes newly registered.

        Blocks while registering: 13 to 40 GB/s on an H100 host, fastest with huge pages.

        Raises:
            DeviceError: not committed, or the driver refused; none of this request's windows stays
                registered.
        """
        ranges = tuple(ranges)
        self.check(ranges)
        wanted = {window for offset, nbytes in ranges for window in self.windows(offset, nbytes)}
        if wanted <= self._pinned:
            return 0
        with self._turn:
            self._requests += 1
        try:
            with self._register:
                return self._pin(sorted(wanted - self._pinned), device)
        finally:
            with self._turn:
                self._requests -= 1
                self._turn.notify_all()

    def pin_ahead(self, device: Device) -> None:
        """Have a background thread pin every committed window. Returns at once; call it again when the
        arena has grown. A refusal by the driver ends the thread and is logged; copies then meet it too."""
        with self._turn:
            if self._closing or (self._ahead is not None and self._ahead.is_alive()):
                return
            self._ahead = threading.Thread(
                target=self._pin_ahead, args=(device,), name="weightstore-pin", daemon=True
            )
            self._ahead.start()

    def settle(self) -> None:
        """Wait for the background thread, if one is running."""
        thread = self._ahead
        if thread is not None:
            thread.join()

    def close(self) -> None:
        """End one user's share; the last one waits for the devices, then unregisters every window.

        Raises:
            DeviceError: a device cannot be waited for, or a window cannot be unregistered; the windows
                left registered stay so (and their pages mapped) until the process ends.
        """
        with self._guard:
            self._users -= 1
            if self._users > 0:
                return
            if self._shared.get(self.address) is self:
                del self._shared[self.address]
        with self._turn:
            self._closing = True
            self._turn.notify_all()
        self.settle()
        with self._register:
            for device in self._devices:
                device.synchronize()  # whoever copies to or from the arena does it on one of these
            for window in sorted(self._pinned):
                self._unregister(window)
        self._pages.release()

    # -- one window ----------------------------------------------------------------------------------

    def _extent(self, window: int) -> tuple[int, int]:
        start = DATA_OFFSET + window * self.window
        return start, min(start + self.window, self._end)

    def _pin(self, windows: list[int], device: Device) -> int:
        """Register all of `windows` or none. The caller holds `_register`."""
        done: list[int] = []
        try:
            for window in windows:
                if self._closing:
                    raise DeviceError(f"arena {self._mapping.uuid} is being unpinned")
                self._register_window(window, device)
                done.append(window)
        except DeviceError as error:
            for window in reversed(done):
                # Nobody has copied through these: requests are served one at a time, and this one failed.
                try:
                    self._unregister(window)
                except DeviceError as undo:
                    raise DeviceError(f"{error.message}; and rolling back failed: {undo.message}") from error
            raise
        return sum(end - start for start, end in map(self._extent, done))

    def _register_window(self, window: int, device: Device) -> None:
        start, end = self._extent(window)
        driver = api()
        flags = driver.CU_MEMHOSTREGISTER_PORTABLE
        if not self._mapping.writable:
            if not device.attribute("READ_ONLY_HOST_REGISTER_SUPPORTED"):
                raise DeviceError(
                    f"{device.name} cannot register memory that is mapped read-only "
                    "(READ_ONLY_HOST_REGISTER_SUPPORTED is 0)"
                )
            flags |= driver.CU_MEMHOSTREGISTER_READ_ONLY
        address, nbytes = self.address + start, end - start
        # Advice only: without it the driver faults the pages in itself, slower, or reports why it cannot.
        _libc.madvise(address, nbytes, MADV_POPULATE_WRITE if self._mapping.writable else MADV_POPULATE_READ)
        with _file_lock(self._lock_path), device.current():
            try:
                call("cuMemHostRegister", address, nbytes, flags)
            except DeviceError as error:
                raise DeviceError(
                    f"window {window} of the arena ({nbytes} bytes) cannot be pinned: {error.message}. "
                    f"{len(self._pinned)} windows are pinned",
                    **error.details,
                ) from None
        self._pinned.add(window)

    def _unregister(self, window: int) -> None:
        device = next(iter(self._devices))
        with device.current():
            call("cuMemHostUnregister", self.address + self._extent(window)[0])
        self._pinned.discard(window)

    def _pin_ahead(self, device: Device) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._closing or not self._requests)
                if self._closing:
                    return
            missing = [w for w in range(self.committed_windows) if w not in self._pinned]
            if not missing:
                return
            try:
                with self._register:
                    self._pin([w for w in missing[:1] if w not in self._pinned], device)
            except DeviceError as error:
                if not self._closing:
                    log.warning("pinning ahead stopped: %s", error.message)
                return


def lock_path(uuid: str) -> Path:
    """The file that keeps processes of one user from registering the arena `uuid` at the same time."""
    return Path(default_socket()).parent / f"pin-{uuid}.lock"


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive flock on `path` for the block; a file that cannot be opened is no lock."""
    try:
        private_directory(str(path.parent))
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except (OSError, UsageError) as error:
        # Registering without the lock works unless two processes collide, which the driver reports.
        log.info("registering without a lock between processes: %s: %s", path, error)
        yield
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
