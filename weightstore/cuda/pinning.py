"""The arena registered with the CUDA driver, window by window, so that copies run at link speed.

A window of the arena is registered when a copy first needs it (`ensure`) or ahead of that by a background
thread (`pin_ahead`), which gives way to whoever needs one, in any process. All users of one arena in this
process, on whatever mapping and device, share what is registered (registrations are portable): a window that
a trainer writes through its writable mapping is not registered again for an engine that reads it in the same
process. It stays registered until the last of them has closed.

Invariants:
- a window is registered as a whole and only once it is committed, so registrations never share a page and
  never populate memory that admission did not allow;
- a request pins all windows it needs or none: what it registered before failing is unregistered again;
- one registration at a time: in this process by a lock, across processes by a lock file named after
  the arena (concurrent registrations of one mapping can fail, and do not run faster);
- before anything is unregistered, every device that copied from or to the arena has been waited for; the
  pages of a mapping are held (a view of its buffer) until the last window is unregistered.

Driver behaviour this relies on: a mapping without write permission needs the READ_ONLY flag, which a device
may lack; page tables filled beforehand (MADV_POPULATE_*) make registering faster; a copy must not span two
registrations (see `copies.split`); one process can register about as much as the host has memory, counting
pages twice that it registers through two mappings.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple, Protocol

from weightstore.cuda.driver import Device, api, call
from weightstore.errors import DeviceError, UsageError
from weightstore.layout import DATA_OFFSET, read_committed, unpack_header
from weightstore.paths import pin_lock, private_directory

log = logging.getLogger(__name__)

MADV_POPULATE_READ: Final = 22
MADV_POPULATE_WRITE: Final = 23
TURN: Final = 0.005
"""Seconds after which a background thread looks again whether no process is registering; one window takes
some 25 ms."""

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


class Window(NamedTuple):
    """A window as offsets in the segment. The last one is shorter where the capacity cuts it, and another
    window once a store has adopted the arena with a larger capacity."""

    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class _Pages(NamedTuple):
    """One mapping's pages, held by `view`."""

    address: int
    writable: bool
    view: memoryview


class _Registrations:
    """What this process has registered of one arena: window → address of the mapping it went through."""

    all: dict[str, _Registrations] = {}  # noqa: RUF012 - by the arena's uuid, guarded by `guard`
    guard = threading.Lock()

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid
        self.users = 0
        self.devices: set[Device] = set()
        self.lock = threading.Lock()  # held while registering: one request at a time
        self.turn = threading.Condition()
        self.requests = 0  # requests waiting or under way; background threads give way to them
        self._pages: dict[int, _Pages] = {}
        self._for_reading: dict[Window, int] = {}
        self._for_writing: dict[Window, int] = {}  # which serves reading as well

    def find(self, window: Window, writable: bool) -> int | None:
        """Address of a mapping through which `window` is registered; None if it is not."""
        found = self._for_writing.get(window)
        return found if found is not None or writable else self._for_reading.get(window)

    @property
    def windows(self) -> list[Window]:
        return list(self._for_reading.keys() | self._for_writing.keys())

    def add_pages(self, mapping: Mapping) -> memoryview:
        pages = self._pages.get(mapping.address)
        if pages is None:
            pages = self._pages[mapping.address] = _Pages(
                mapping.address, mapping.writable, mapping.buffer[:]
            )
        return pages.view

    def register(self, window: Window, through: int, device: Device, patient: bool) -> bool:
        """Register `window` through the mapping at `through`, or better through a writable one, which serves
        both. The caller holds `lock`. If he is not `patient` and another process is registering, False."""
        pages = self._pages[through]
        if not pages.writable:
            # Of equal length, so that the window is the same one there.
            same = (p for p in self._pages.values() if p.writable and len(p.view) == len(pages.view))
            pages = next(same, pages)
        flags = api().CU_MEMHOSTREGISTER_PORTABLE
        if not pages.writable:
            if not device.attribute("READ_ONLY_HOST_REGISTER_SUPPORTED"):
                raise DeviceError(
                    f"{device.name} cannot register memory that is mapped read-only "
                    "(READ_ONLY_HOST_REGISTER_SUPPORTED is 0)"
                )
            flags |= api().CU_MEMHOSTREGISTER_READ_ONLY
        address = pages.address + window.start
        populate = MADV_POPULATE_WRITE if pages.writable else MADV_POPULATE_READ
        with _file_lock(pin_lock(self.uuid), patient) as locked, device.current():
            if not locked:
                return False
            # Advice only: without it the driver faults the pages in itself, slower, or reports why it cannot.
            _libc.madvise(address, window.nbytes, populate)
            try:
                call("cuMemHostRegister", address, window.nbytes, flags)
            except DeviceError as error:
                raise DeviceError(
                    f"{window.nbytes} bytes at {window.start} of the arena cannot be pinned: "
                    f"{error.message}. {len(self.windows)} windows are pinned",
                    **error.details,
                ) from None
        (self._for_writing if pages.writable else self._for_reading)[window] = pages.address
        return True

    def unregister(self, window: Window, writable: bool) -> None:
        table = self._for_writing if writable else self._for_reading
        with next(iter(self.devices)).current():
            call("cuMemHostUnregister", table[window] + window.start)
        del table[window]

    def release(self) -> None:
        """Nobody uses the arena any more: wait for the devices, then unregister everything and let go of the
        pages. `guard` is held, so that nobody begins to use it meanwhile."""
        with self.lock:
            for device in self.devices:
                device.synchronize()  # whoever copies to or from the arena does it on one of these
            for window in list(self._for_reading):
                self.unregister(window, writable=False)
            for window in list(self._for_writing):
                self.unregister(window, writable=True)
            for pages in self._pages.values():
                pages.view.release()
            self._pages.clear()


class PinnedArena:
    """One user's hold on the registered windows of an arena, by its own mapping. Thread-safe. Made by
    `share`, ended by `close`.

    Attributes:
        address: where the mapping starts in this process.
        window: bytes of a window.
    """

    def __init__(self, mapping: Mapping, device: Device, registrations: _Registrations) -> None:
        self.address = mapping.address
        self._writable = mapping.writable
        self._registrations = registrations
        self._device = device
        self._pages = registrations.add_pages(mapping)
        header = unpack_header(self._pages)
        self.window = header.window
        self._end = min(mapping.nbytes, header.nbytes)
        self._wanted: dict[Window, None] = {}  # by the background thread, in order; guarded by `turn`
        self._ahead: threading.Thread | None = None
        self._closed = False

    @classmethod
    def share(cls, mapping: Mapping, device: Device) -> PinnedArena:
        """A hold for copies between `mapping` and `device`. What is registered already is shared."""
        with _Registrations.guard:
            registrations = _Registrations.all.get(mapping.uuid)
            if registrations is None:
                registrations = _Registrations.all[mapping.uuid] = _Registrations(mapping.uuid)
            registrations.users += 1
            registrations.devices.add(device)
            try:
                return cls(mapping, device, registrations)
            except BaseException:
                registrations.users -= 1
                raise

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the arena that are registered in this process, through whatever mapping."""
        return sum(window.nbytes for window in self._registrations.windows)

    @property
    def committed_end(self) -> int:
        """Where the committed data ends now, as an offset in the segment."""
        # A store that adopted the arena with a larger capacity may have committed beyond this mapping.
        return min(DATA_OFFSET + read_committed(self._pages), self._end)

    def windows(self, offset: int, nbytes: int) -> Iterator[Window]:
        """The windows that `nbytes` bytes at `offset` of the segment touch."""
        end = offset + nbytes
        while offset < end:
            window = self._window_at(offset)
            yield window
            offset = window.end

    def check(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Raise DeviceError unless the (offset, nbytes) ranges lie in committed windows: touching others
        would be SIGBUS."""
        end = self.committed_end
        for offset, nbytes in ranges:
            if not DATA_OFFSET <= offset <= offset + nbytes <= end:
                raise DeviceError(
                    f"bytes {offset} to {offset + nbytes} of arena {self._registrations.uuid} were to be "
                    f"copied, but its committed data are bytes {DATA_OFFSET} to {end}"
                )

    def is_pinned(self, offset: int, nbytes: int) -> bool:
        find, writable = self._registrations.find, self._writable
        return all(find(window, writable) is not None for window in self.windows(offset, nbytes))

    def address_of(self, offset: int) -> int:
        """The address of an arena offset that copies have to use: where its window is registered, or that
        of this hold's own mapping while it is not."""
        found = self._registrations.find(self._window_at(offset), self._writable)
        return (self.address if found is None else found) + offset

    def ensure(self, ranges: Iterable[tuple[int, int]]) -> int:
        """Pin the windows that the (offset, nbytes) ranges touch; return the bytes newly registered.

        Blocks while registering: 13 to 40 GB/s on an H100 host, fastest with huge pages.

        Raises:
            DeviceError: not committed, or the driver refused; none of this request's windows stays
                registered.
        """
        if self._closed:
            raise DeviceError("this hold on the pinned arena was closed")
        ranges = tuple(ranges)
        self.check(ranges)
        registrations = self._registrations
        wanted = {window for offset, nbytes in ranges for window in self.windows(offset, nbytes)}
        if all(registrations.find(window, self._writable) is not None for window in wanted):
            return 0
        with registrations.turn:
            registrations.requests += 1
        try:
            with registrations.lock:
                return self._pin(sorted(wanted))
        finally:
            with registrations.turn:
                registrations.requests -= 1
                registrations.turn.notify_all()

    def pin_ahead(self, ranges: Iterable[tuple[int, int]] | None = None) -> None:
        """Have a background thread pin the windows that the (offset, nbytes) ranges touch, in order, after
        those of earlier calls; all committed ones by default. Returns at once; does nothing once closed.

        A window that is not committed as a whole, or lies beyond this mapping, is left out. A refusal by the
        driver ends all that was asked for so far and is logged; copies then meet it too.
        """
        if self._closed:
            return
        end = self.committed_end
        if ranges is None:
            ranges = [(DATA_OFFSET, end - DATA_OFFSET)]
        registrations = self._registrations
        missing = sorted(
            {
                window
                for offset, nbytes in ranges
                if offset >= DATA_OFFSET
                for window in self.windows(offset, min(nbytes, end - offset))
                if window.end <= end and registrations.find(window, self._writable) is None
            }
        )
        with registrations.turn:
            if self._closed or not missing:
                return
            self._wanted.update(dict.fromkeys(missing))
            if self._ahead is None:
                thread = threading.Thread(target=self._pin_ahead, name="weightstore-pin", daemon=True)
                thread.start()
                self._ahead = thread

    def settle(self) -> None:
        """Wait for the background thread, if one is running."""
        thread = self._ahead
        if thread is not None:
            thread.join()

    def close(self) -> None:
        """End this hold; the arena's last one waits for the devices, then unregisters every window.
        Idempotent.

        Raises:
            DeviceError: a device cannot be waited for, or a window cannot be unregistered; the windows
                left registered stay so (and their pages mapped) until the process ends.
        """
        registrations = self._registrations
        with registrations.turn:
            if self._closed:
                return
            self._closed = True
            self._wanted.clear()
            registrations.turn.notify_all()
        self.settle()
        with _Registrations.guard:
            registrations.users -= 1
            if not registrations.users:
                del _Registrations.all[registrations.uuid]
                registrations.release()

    # -- one request ---------------------------------------------------------------------------------

    def _window_at(self, offset: int) -> Window:
        start = offset - (offset - DATA_OFFSET) % self.window
        return Window(start, min(start + self.window, self._end))

    def _pin(self, windows: list[Window]) -> int:
        """Register all of `windows` that are not, or none. The caller holds the registrations' lock."""
        registrations = self._registrations
        done: list[Window] = []
        try:
            for window in windows:
                if registrations.find(window, self._writable) is None:
                    self._register(window)
                    done.append(window)
        except DeviceError as error:
            for window in reversed(done):
                # Nobody has copied through these: requests are served one at a time, and this one failed.
                try:
                    registrations.unregister(window, registrations.find(window, True) is not None)
                except DeviceError as undo:
                    raise DeviceError(f"{error.message}; and rolling back failed: {undo.message}") from error
            raise
        return sum(window.nbytes for window in done)

    def _register(self, window: Window) -> None:
        self._registrations.register(window, self.address, self._device, patient=True)

    def _pin_ahead(self) -> None:
        registrations = self._registrations
        while True:
            with registrations.turn:
                registrations.turn.wait_for(lambda: not (self._wanted and registrations.requests))
                if not self._wanted:
                    self._ahead = None
                    return
                window = next(iter(self._wanted))
            try:
                done = self._pin_if_free(window)
            except Exception as error:  # of the driver, or of the lock file
                log.warning("pinning ahead stopped: %s", error)
                with registrations.turn:
                    self._wanted.clear()
                continue
            with registrations.turn:
                if done:
                    self._wanted.pop(window, None)  # gone if closed meanwhile
                else:
                    registrations.turn.wait(TURN)

    def _pin_if_free(self, window: Window) -> bool:
        """Register `window` unless it is; False if another process is registering just now."""
        registrations = self._registrations
        with registrations.lock:
            if registrations.find(window, self._writable) is not None:
                return True
            return registrations.register(window, self.address, self._device, patient=False)


@contextlib.contextmanager
def _file_lock(path: str, patient: bool) -> Iterator[bool]:
    """Hold an exclusive flock on `path` for the block; False if somebody else has it and the caller is not
    `patient`. A file that cannot be opened is no lock."""
    try:
        private_directory(os.path.dirname(path))
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except (OSError, UsageError) as error:
        # Registering without the lock works unless two processes collide, which the driver reports.
        log.info("registering without a lock between processes: %s: %s", path, error)
        yield True
        return
    try:
        locked = True
        try:
            # Those who wait are served before those who ask again.
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if patient else fcntl.LOCK_NB))
        except BlockingIOError:
            locked = False
        yield locked
    finally:
        os.close(fd)
