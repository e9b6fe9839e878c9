"""The shared memory object behind an arena: opened, locked, recognised, created or completed.

Every function here works on one object of one name and decides a single question: is this ours to use?
`Arena.open` asks them in order.

Invariants:
- whoever holds the exclusive flock on an object owns it; nothing is read from it or changed before;
- an object that is not an arena of this layout, or belongs to another user, is left exactly as it was;
- creation writes the header page in one write before the object gets its size, and growth sets the size
  before the header, so a kill at any instant leaves something that the next store recognises and completes.
"""

from __future__ import annotations

import fcntl
import os
import re

import posix_ipc

from weightstore.admission import Admission
from weightstore.errors import ArenaFull, ArenaUnusable
from weightstore.layout import HEADER_BYTES, Header, pack_header, read_committed, unpack_header
from weightstore.sizes import format_size


def open_locked(name: str, what: str) -> int:
    """Descriptor of the object `name`, created if absent, exclusively locked, and still under its name."""
    while True:
        try:
            # size stays 0: posix_ipc resizes whatever exists to the size it is given.
            fd = int(posix_ipc.SharedMemory(f"/{name}", posix_ipc.O_CREAT, mode=0o600).fd)
        except (posix_ipc.Error, OSError) as error:
            raise ArenaUnusable(
                f"{what} cannot be opened ({error}); if it is another user's, choose another --arena name"
            ) from None
        try:
            _check_owner(fd, what)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = lock_holder(fd)
                who = f"pid {holder}" if holder else "another process"
                raise ArenaUnusable(
                    f"{what} is in use by {who}; connect to that store, stop it, or choose another --arena",
                    pid=holder,
                ) from None
            # Between open and lock its last owner may have unlinked it: then this memory is nameless.
            if names(name, fd):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _check_owner(fd: int, what: str) -> None:
    owner = os.fstat(fd).st_uid
    if owner != os.geteuid():
        raise ArenaUnusable(
            f"{what} belongs to uid {owner}, this process runs as uid {os.geteuid()}; choose another --arena "
            "name"
        )


def create(fd: int, header: Header, admission: Admission) -> Header:
    """Turn an empty object into an arena."""
    admission.check(HEADER_BYTES)
    os.fchmod(fd, 0o600)  # whatever the umask or an unlucky earlier creator made of it
    page = pack_header(header).ljust(HEADER_BYTES, b"\0")
    try:
        written = os.pwrite(fd, page, 0)
    except OSError as error:
        raise ArenaFull(
            f"/dev/shm has no room for even one page ({error.strerror}); enlarge it or free space",
            requested=HEADER_BYTES,
        ) from None
    if written != HEADER_BYTES:
        raise ArenaFull("/dev/shm took only a part of the header page; free space", requested=HEADER_BYTES)
    _resize(fd, header)
    return header


def adopt(fd: int, wanted: Header, what: str) -> Header:
    """Validate a leftover, grow the object to the wanted capacity and return the header it should have.
    Raises ArenaUnusable before any change."""
    size = os.fstat(fd).st_size
    page = os.pread(fd, HEADER_BYTES, 0)
    found = unpack_header(page, what)
    if size != HEADER_BYTES and size < found.nbytes:
        raise ArenaUnusable(
            f"{what} is {size} bytes, its header says {found.nbytes}: it was cut and is left alone; remove "
            "it if its weights are not needed"
        )
    committed = read_committed(page) if len(page) == HEADER_BYTES else 0
    if committed > found.capacity or (size == HEADER_BYTES and committed):
        raise ArenaUnusable(
            f"{what} claims {committed} committed bytes of {min(size, found.capacity)}: its header is damaged"
        )
    capacity = max(found.capacity, wanted.capacity)
    header = Header(found.uuid, capacity, found.window, found.created)
    if size < header.nbytes:
        _resize(fd, header)
    return header


def _resize(fd: int, header: Header) -> None:
    try:
        os.ftruncate(fd, header.nbytes)
    except OSError as error:
        raise ArenaUnusable(
            f"the system refuses a shared memory object of {format_size(header.nbytes)} ({error.strerror}); "
            "lower --capacity"
        ) from None


def names(name: str, fd: int) -> bool:
    """Whether `name` still refers to the object behind `fd`."""
    try:
        other = int(posix_ipc.SharedMemory(f"/{name}").fd)
    except (posix_ipc.ExistentialError, posix_ipc.PermissionsError):
        return False
    try:
        return os.path.samestat(os.fstat(other), os.fstat(fd))
    finally:
        os.close(other)


def lock_holder(fd: int) -> int | None:
    """Pid that holds a flock on the file behind `fd`, or None if nobody in this pid namespace does."""
    stat = os.fstat(fd)
    device = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"
    pattern = re.compile(rf"\d+: FLOCK +\S+ +\S+ +(\d+) {re.escape(device)} ")
    try:
        with open("/proc/locks") as locks:
            found = [match for line in locks if (match := pattern.match(line))]
    except OSError:
        return None
    return int(found[0][1]) or None if found else None
