"""The shared-memory segment: created or adopted, committed window by window, handed out as descriptors.

This is the service's side. The segment is a POSIX shared memory object of fixed virtual size whose pages
do not exist until they are committed. Touching an uncommitted page on a full file system is SIGBUS
and in a full cgroup a kill, so nobody ever does: `commit_data` and `commit_meta` first ask admission,
then have the kernel allocate the pages through a call that reports failure, and only then count them.

Invariants:
- the store that owns an arena holds an exclusive flock on its own open file description until it closes
  or dies; descriptors given to others are new descriptions, so no client can hold or drop that lock;
- `committed` in the header grows only after the pages below it exist, so after a kill it may be too
  small (committing again is harmless) but never too large;
- an object that `segment` does not recognise as ours is left exactly as it was.

Kernel behaviour this relies on: MADV_POPULATE_WRITE (Linux 5.14) reports EFAULT where a touch would
raise SIGBUS; MADV_REMOVE on a shared mapping frees the pages of the object itself; a MAP_SHARED mapping of
an O_RDONLY description cannot be made writable by mprotect.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import TracebackType
from typing import Final
from uuid import uuid4

import posix_ipc

from weightstore.admission import Admission
from weightstore.errors import ArenaFull, ArenaUnusable, UsageError
from weightstore.layout import (
    BLOBS_BYTES,
    BLOBS_OFFSET,
    COMMITTED_OFFSET,
    DATA_OFFSET,
    HEADER_BYTES,
    MIB,
    PAGE,
    Header,
    pack_committed,
    pack_header,
    read_committed,
)
from weightstore.segment import adopt, create, names, open_locked
from weightstore.sizes import format_size
from weightstore.types import MAX_NBYTES, align_up, check_name

MADV_REMOVE: Final = 9
MADV_HUGEPAGE: Final = 14
MADV_POPULATE_WRITE: Final = 23  # not in Python's mmap module

POPULATE_CHUNK: Final = 64 * MIB
"""Bytes one madvise call populates: small enough to spread a window over the threads and to stop soon
after a failure, a multiple of every huge page size that shmem uses."""
POPULATE_THREADS: Final = 8
"""Beyond this the kernel's page clearing is limited by memory bandwidth."""

_libc = ctypes.CDLL(None, use_errno=True)  # CDLL, not PyDLL: the GIL is released during a call
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.restype = ctypes.c_int


class Arena:
    """One open arena; made by `Arena.open`. Not thread-safe: one commit at a time, by the owner.

    Attributes:
        name: name of the shared memory object, without a leading slash.
        uuid: identity of the segment, kept when a later store adopts it.
        capacity: data bytes that can be committed.
        window: unit of committing and pinning in bytes.
        nbytes: size of the whole segment.
        committed: data bytes committed, a multiple of `window` unless the capacity cut the last one.
        adopted: whether the segment was left behind by an earlier store.
        buffer: writable view of the whole segment. Only committed ranges may be touched.
    """

    def __init__(self, name: str, fd: int, header: Header, adopted: bool, admission: Admission) -> None:
        """Takes over `fd`, which must be locked and sized; callers use `open`."""
        self.name = name
        self.uuid = str(header.uuid)
        self.capacity = header.capacity
        self.window = header.window
        self.nbytes = header.nbytes
        self.adopted = adopted
        self._admission = admission
        self._fd = fd
        try:
            self._map = mmap.mmap(fd, self.nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise ArenaUnusable(
                f"{format_size(self.nbytes)} of addresses for arena {name!r} are not to be had "
                f"({error.strerror}); lower --capacity, or raise the address space limit (ulimit -v)"
            ) from None
        self.buffer = memoryview(self._map)
        anchor = ctypes.c_char.from_buffer(self._map)
        self._address = ctypes.addressof(anchor)
        del anchor  # it would keep the mapping from being closed
        self._meta_end = HEADER_BYTES
        # Takes effect where the mount has huge=advise; EINVAL (a kernel without huge pages) changes nothing.
        self._madvise(0, self.nbytes, MADV_HUGEPAGE)
        self.committed = read_committed(self.buffer)

    @classmethod
    def open(cls, name: str, capacity: int, window: int, admission: Admission) -> Arena:
        """Create the arena `name`, or adopt what an earlier store of this user left under that name.

        `capacity` and `window` are rounded up to whole pages. An adopted arena keeps its window and
        uuid, and its capacity where that is the larger one.

        Raises:
            InvalidName, UsageError: an impossible name, capacity or window.
            ArenaUnusable: the object exists and is in use, foreign, damaged or of another layout.
            ArenaFull: no room for even the header page.
        """
        check_name("arena", name)
        if not (0 < capacity <= MAX_NBYTES and 0 < window <= MAX_NBYTES):
            raise UsageError(
                f"capacity ({capacity}) and window ({window}) must be 1 to {MAX_NBYTES} bytes each"
            )
        fresh = Header(uuid4(), align_up(capacity, PAGE), align_up(window, PAGE), time.time())
        what = f"shared memory object /dev/shm/{name}"
        fd = open_locked(name, what)
        # A kill between the creation of an object and its header leaves an empty one.
        adopted = os.fstat(fd).st_size > 0
        try:
            header = adopt(fd, fresh, what) if adopted else create(fd, fresh, admission)
            arena = cls(name, fd, header, adopted, admission)
        except BaseException:
            if not adopted:
                posix_ipc.unlink_shared_memory(f"/{name}")  # ours, and empty a moment ago
            os.close(fd)
            raise
        # Last: a header may promise less than the object holds, never more than could be mapped.
        # Through the file, where a kill cannot leave half of it.
        os.pwrite(fd, pack_header(header), 0)
        return arena

    def commit_data(self, nbytes: int) -> int:
        """Commit at least `nbytes` more data bytes, in whole windows, and return how many were added.

        Blocks while pages are populated (about 5 GB/s, 19 with huge pages), without the GIL. On failure
        the pages are given back and nothing has changed.

        Raises:
            ArenaFull: beyond the capacity, refused by admission, or the file system filled up meanwhile.
        """
        if nbytes <= 0:
            return 0
        start, left = self.committed, self.capacity - self.committed
        if nbytes > left:
            raise ArenaFull(
                f"{format_size(nbytes)} ({nbytes} bytes) more do not fit in arena {self.name!r}: "
                f"{format_size(start)} of its capacity of {format_size(self.capacity)} are committed, "
                f"{format_size(left)} are left. Remove versions, or restart the store with a larger "
                "--capacity: an arena that --keep leaves is adopted and grows (without --keep a store that "
                "is stopped removes its arena: `weightstore save` first)",
                requested=nbytes,
                committed=start,
                capacity=self.capacity,
            )
        end = min(align_up(start + nbytes, self.window), self.capacity)
        self._admission.check(end - start)
        self._populate(DATA_OFFSET + start, DATA_OFFSET + end)
        self.committed = end
        self.buffer[COMMITTED_OFFSET : COMMITTED_OFFSET + 8] = pack_committed(end)
        return end - start

    def commit_meta(self, end: int) -> None:
        """Make the pages of the meta area from 0 up to the segment offset `end` usable.

        Raises:
            ArenaFull: refused by admission or by the file system; nothing has changed.
            ValueError: `end` lies beyond the meta area.
        """
        if not 0 <= end <= BLOBS_OFFSET + BLOBS_BYTES:
            raise ValueError(f"{end} is outside the meta area of {BLOBS_OFFSET + BLOBS_BYTES} bytes")
        end = align_up(end, PAGE)
        if end <= self._meta_end:
            return
        self._admission.check(end - self._meta_end)
        self._allocate(self._meta_end, end)
        self._meta_end = end

    def reader_fd(self) -> int:
        """A new read-only descriptor of the segment; the caller closes it."""
        return self._reopen(os.O_RDONLY)

    def writer_fd(self) -> int:
        """A new read-write descriptor of the segment; the caller closes it."""
        return self._reopen(os.O_RDWR)

    def unlink(self) -> None:
        """Remove the name; the memory is freed when the last mapping goes. An object that has taken the
        name since is not touched."""
        if names(self.name, self._fd):
            posix_ipc.unlink_shared_memory(f"/{self.name}")

    def close(self) -> None:
        """Give up the lock and the mapping; the segment stays, for another store to adopt. Idempotent.

        Views of `buffer` that are still alive keep the pages mapped until they are dropped.
        """
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        self.buffer.release()
        with contextlib.suppress(BufferError):  # somebody's view: the mapping goes when it does
            self._map.close()
        # Explicitly, since mmap keeps a duplicate of the description for as long as views live.
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)

    def __enter__(self) -> Arena:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- pages --------------------------------------------------------------------------------------

    def _populate(self, start: int, end: int) -> None:
        """Have every page of [start, end) allocated, or none and ArenaFull."""
        edges = [start, *range(align_up(start + 1, POPULATE_CHUNK), end, POPULATE_CHUNK), end]
        chunks = list(pairwise(edges))
        failed = threading.Event()

        def populate(chunk: tuple[int, int]) -> int:
            if failed.is_set():
                return 0
            code = self._madvise(chunk[0], chunk[1] - chunk[0], MADV_POPULATE_WRITE)
            if code:
                failed.set()
            return code

        threads = min(POPULATE_THREADS, len(os.sched_getaffinity(0)), len(chunks))
        with ThreadPoolExecutor(threads, "weightstore-populate") as pool:
            codes = set(pool.map(populate, chunks)) - {0}
        # Every thread has returned: nobody is populating what is given back below.
        if codes == {errno.EINVAL}:  # kernel before 5.14
            self._allocate(start, end)
        elif codes:
            self._give_back(start, end)
            code = max(codes)
            raise ArenaFull(
                f"the kernel could not give arena {self.name!r} {format_size(end - start)} of shared memory "
                f"({os.strerror(code)}): /dev/shm or a memory limit filled up in the meantime. Enlarge it, "
                "free memory, or remove versions",
                requested=end - start,
                committed=self.committed,
                errno=code,
            )

    def _allocate(self, start: int, end: int) -> None:
        """Have every page of [start, end) allocated by the file system, or none and ArenaFull."""
        try:
            _retry(lambda: os.posix_fallocate(self._fd, start, end - start))
        except OSError as error:
            raise ArenaFull(
                f"/dev/shm could not give {format_size(end - start)} for arena {self.name!r} "
                f"({error.strerror}). Enlarge it (mount -o remount,size=SIZE /dev/shm) or remove versions",
                requested=end - start,
                committed=self.committed,
                errno=error.errno,
            ) from None

    def _give_back(self, start: int, end: int) -> None:
        code = self._madvise(start, end - start, MADV_REMOVE)
        if code:
            raise ArenaUnusable(
                f"arena {self.name!r} ran out of memory while committing, and the kernel did not take "
                f"{format_size(end - start)} back ({os.strerror(code)}); restart the store to adopt it afresh"
            )

    def _madvise(self, start: int, nbytes: int, advice: int) -> int:
        """errno of madvise on a range of the segment, or 0."""
        while True:
            if _libc.madvise(self._address + start, nbytes, advice) == 0:
                return 0
            code = ctypes.get_errno()
            if code not in (errno.EINTR, errno.EAGAIN):
                return code

    def _reopen(self, flags: int) -> int:
        # Through /proc: the name may be gone, and dup would share the description with its lock and its
        # write access.
        return os.open(f"/proc/self/fd/{self._fd}", flags | os.O_CLOEXEC)


def _retry(call: Callable[[], None]) -> None:
    while True:
        try:
            return call()
        except InterruptedError:
            continue
