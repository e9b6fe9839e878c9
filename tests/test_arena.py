"""The arena on real shared memory, with real processes, a real kill and a really full file system."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import posix_ipc
import pytest

from weightstore import arena as arena_module
from weightstore.admission import Admission
from weightstore.arena import Arena
from weightstore.errors import ArenaFull, ArenaUnusable, InvalidName, UsageError
from weightstore.layout import (
    BLOBS_OFFSET,
    COMMITTED_OFFSET,
    DATA_OFFSET,
    HEADER_BYTES,
    LAYOUT_VERSION,
    MIB,
    Header,
    pack_header,
    read_committed,
    unpack_header,
)
from weightstore.segment import lock_holder

Open = Callable[..., Arena]

HOLDER = f"""
import sys
from weightstore.admission import Admission
from weightstore.arena import Arena
arena = Arena.open(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Admission())
arena.commit_data(arena.window)
arena.buffer[{DATA_OFFSET}:{DATA_OFFSET} + 5] = b"alive"
arena.commit_meta({BLOBS_OFFSET} + 5)
arena.buffer[{BLOBS_OFFSET}:{BLOBS_OFFSET} + 5] = b"state"
print(arena.uuid, arena.adopted, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def name() -> Iterator[str]:
    name = f"weightstore-test-{uuid4().hex[:12]}"
    yield name
    path(name).unlink(missing_ok=True)


@pytest.fixture
def open_arena(name: str) -> Iterator[Open]:
    opened = []

    def open_(capacity: int = 64 * MIB, window: int = 4 * MIB, admission: Admission | None = None) -> Arena:
        opened.append(Arena.open(name, capacity, window, admission or Admission()))
        return opened[-1]

    yield open_
    for arena in opened:
        arena.close()


@pytest.fixture
def holder(name: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds an arena of this name, with bytes in it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, name, str(64 * MIB), str(4 * MIB)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        process.uuid = process.stdout.readline().split()[0]  # type: ignore[attr-defined]
        yield process
        process.kill()


def path(name: str) -> Path:
    return Path("/dev/shm") / name


def allocated(name: str) -> int:
    """Bytes the object really occupies."""
    return path(name).stat().st_blocks * 512


# -- creation -------------------------------------------------------------------------------------


def test_a_new_arena_is_private_sparse_and_described_by_its_header(open_arena: Open, name: str) -> None:
    arena = open_arena(capacity=64 * MIB, window=4 * MIB)
    assert (arena.name, arena.adopted, arena.committed) == (name, False, 0)
    assert (arena.capacity, arena.window, arena.nbytes) == (64 * MIB, 4 * MIB, DATA_OFFSET + 64 * MIB)
    stat = path(name).stat()
    assert stat.st_mode & 0o777 == 0o600
    assert stat.st_size == arena.nbytes == len(arena.buffer)
    header = unpack_header(arena.buffer)
    assert (str(header.uuid), header.capacity, header.window) == (arena.uuid, arena.capacity, arena.window)
    assert allocated(name) <= 2 * MIB, "creation must commit one page (one huge page with huge=always)"


def test_two_arenas_have_different_uuids(open_arena: Open) -> None:
    first = open_arena()
    first.unlink()
    assert open_arena().uuid != first.uuid


def test_capacity_and_window_become_whole_pages(open_arena: Open) -> None:
    arena = open_arena(capacity=10_000_001, window=1_000_001)
    assert (arena.capacity, arena.window) == (10_002_432, 1_003_520)


def test_impossible_arguments_are_refused_before_anything_exists(name: str) -> None:
    for bad in ("", "a/b", "../x", "-x", "x" * 200):
        with pytest.raises(InvalidName):
            Arena.open(bad, MIB, MIB, Admission())
    for capacity, window in ((0, MIB), (MIB, 0), (-1, MIB), (1 << 63, MIB), (MIB, 1 << 63)):
        with pytest.raises(UsageError, match=r"capacity .* and window .* must be"):
            Arena.open(name, capacity, window, Admission())
    assert not path(name).exists()


def test_a_capacity_that_cannot_be_mapped_leaves_nothing_behind(open_arena: Open, name: str) -> None:
    with pytest.raises(ArenaUnusable, match="lower --capacity"):
        open_arena(capacity=1 << 48)  # x86-64 and arm64 give a process 2**47 to 2**48 bytes of addresses
    assert not path(name).exists()
    arena = open_arena(capacity=MIB)
    arena.close()
    with pytest.raises(ArenaUnusable, match="lower --capacity"):
        open_arena(capacity=1 << 48)
    assert open_arena(capacity=2 * MIB).uuid == arena.uuid


def test_umask_does_not_decide_the_mode(open_arena: Open, name: str) -> None:
    old = os.umask(0o777)
    try:
        open_arena()
    finally:
        os.umask(old)
    assert path(name).stat().st_mode & 0o777 == 0o600


# -- committing -----------------------------------------------------------------------------------


def test_commit_adds_whole_windows_of_real_pages(open_arena: Open, name: str) -> None:
    arena = open_arena(capacity=64 * MIB, window=4 * MIB)
    assert arena.commit_data(1) == 4 * MIB
    assert arena.commit_data(5 * MIB) == 8 * MIB
    assert arena.commit_data(0) == 0
    assert arena.committed == read_committed(arena.buffer) == 12 * MIB
    assert 12 * MIB <= allocated(name) <= 16 * MIB
    end = DATA_OFFSET + arena.committed
    arena.buffer[end - 4 : end] = b"last"


def test_a_commit_larger_than_one_chunk_is_whole(open_arena: Open, name: str) -> None:
    nbytes = 2 * arena_module.POPULATE_CHUNK + 3 * MIB
    arena = open_arena(capacity=4 * nbytes, window=MIB)
    arena.commit_data(MIB)  # so that the next range does not start on a chunk
    assert arena.commit_data(nbytes) == nbytes
    assert allocated(name) >= nbytes + MIB


def test_the_capacity_cuts_the_last_window(open_arena: Open) -> None:
    arena = open_arena(capacity=6 * MIB, window=4 * MIB)
    assert arena.commit_data(MIB) == 4 * MIB
    assert arena.commit_data(MIB) == 2 * MIB
    with pytest.raises(
        ArenaFull, match=r"6 MiB of its capacity of 6 MiB are committed, 0 B are left"
    ) as caught:
        arena.commit_data(1)
    assert caught.value.details == {"requested": 1, "committed": 6 * MIB, "capacity": 6 * MIB}


def test_admission_refuses_before_a_page_is_touched(open_arena: Open, name: str, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100000 kB\nMemAvailable: 9000 kB\n")
    arena = open_arena(admission=Admission(proc_root=tmp_path, cgroup_root=tmp_path))
    before = allocated(name)
    with pytest.raises(ArenaFull, match="MemAvailable"):
        arena.commit_data(9 * MIB)
    with pytest.raises(ArenaFull, match="MemAvailable"):
        arena.commit_meta(30 * MIB)
    assert (allocated(name), arena.committed, read_committed(arena.buffer)) == (before, 0, 0)
    assert arena.commit_data(8 * MIB) == 8 * MIB  # what fits still works


def test_meta_pages_exist_once_committed_and_keep_their_bytes(open_arena: Open, name: str) -> None:
    arena = open_arena()
    arena.commit_meta(BLOBS_OFFSET)
    arena.buffer[BLOBS_OFFSET - 4 : BLOBS_OFFSET] = b"root"
    arena.commit_meta(BLOBS_OFFSET + MIB + 1)
    arena.commit_meta(0)
    assert bytes(arena.buffer[BLOBS_OFFSET - 4 : BLOBS_OFFSET]) == b"root"
    assert allocated(name) >= BLOBS_OFFSET + MIB + 4096
    with pytest.raises(ValueError, match="outside the meta area"):
        arena.commit_meta(DATA_OFFSET + 1)


def test_kernels_without_populate_write_allocate_through_the_file_system(
    open_arena: Open, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena_module, "MADV_POPULATE_WRITE", 9999)  # EINVAL, as before Linux 5.14
    arena = open_arena()
    assert arena.commit_data(8 * MIB) == 8 * MIB
    assert allocated(name) >= 8 * MIB


def test_populating_leaves_the_interpreter_running(open_arena: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside the kernel call another thread gets to run Python: the GIL is not held."""
    arena = open_arena()
    inside, answered = threading.Event(), threading.Event()
    real = arena_module._libc

    class Pausing:
        @staticmethod
        def madvise(address: int, nbytes: int, advice: int) -> int:
            inside.set()
            # A foreign call of the same library kind that blocks until Python code elsewhere has run.
            read, write = os.pipe()
            threading.Thread(target=lambda: (answered.set(), os.write(write, b"x"))).start()
            real.read(read, ctypes.create_string_buffer(1), 1)
            os.close(read)
            os.close(write)
            return int(real.madvise(address, nbytes, advice))

    monkeypatch.setattr(arena_module, "_libc", Pausing)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(arena.commit_data, 1).result(30) == 4 * MIB
    assert inside.is_set() and answered.is_set()


# -- in use, adopted, foreign ---------------------------------------------------------------------


def test_a_second_store_is_refused_and_told_who_holds_it(
    name: str, holder: subprocess.Popen[str], open_arena: Open
) -> None:
    with pytest.raises(ArenaUnusable, match=rf"in use by pid {holder.pid};") as caught:
        open_arena()
    assert caught.value.details["pid"] == holder.pid
    fd = os.open(path(name), os.O_RDONLY)
    assert lock_holder(fd) == holder.pid
    os.close(fd)
    assert path(name).exists()


def test_a_second_arena_in_the_same_process_is_refused(open_arena: Open) -> None:
    first = open_arena()
    with pytest.raises(ArenaUnusable, match=f"in use by pid {os.getpid()}"):
        open_arena()
    first.close()
    assert open_arena().adopted


def test_adopted_after_sigkill_with_bytes_and_identity(
    name: str, holder: subprocess.Popen[str], open_arena: Open
) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    arena = open_arena(capacity=MIB, window=MIB)
    assert (arena.adopted, arena.uuid) == (True, holder.uuid)  # type: ignore[attr-defined]
    assert (arena.capacity, arena.window) == (64 * MIB, 4 * MIB), "capacity never shrinks, the window stays"
    assert arena.committed == 4 * MIB
    assert bytes(arena.buffer[DATA_OFFSET : DATA_OFFSET + 5]) == b"alive"
    assert bytes(arena.buffer[BLOBS_OFFSET : BLOBS_OFFSET + 5]) == b"state"
    fd = os.open(path(name), os.O_RDONLY)
    assert lock_holder(fd) == os.getpid()
    os.close(fd)


def test_capacity_grows_on_adoption(open_arena: Open, name: str) -> None:
    first = open_arena(capacity=8 * MIB, window=4 * MIB)
    first.commit_data(8 * MIB)
    first.buffer[DATA_OFFSET : DATA_OFFSET + 4] = b"keep"
    first.close()
    grown = open_arena(capacity=32 * MIB, window=MIB)
    assert (grown.capacity, grown.nbytes, grown.committed) == (32 * MIB, DATA_OFFSET + 32 * MIB, 8 * MIB)
    assert grown.uuid == first.uuid
    assert path(name).stat().st_size == grown.nbytes
    assert bytes(grown.buffer[DATA_OFFSET : DATA_OFFSET + 4]) == b"keep"
    assert grown.commit_data(1) == 4 * MIB
    grown.close()
    assert open_arena(capacity=MIB).capacity == 32 * MIB


@pytest.mark.parametrize("left_behind", ["empty", "header only", "grown before its header was"])
def test_creation_or_growth_cut_short_is_completed(open_arena: Open, name: str, left_behind: str) -> None:
    header = Header(uuid4(), 8 * MIB, 4 * MIB, 1.0)
    page = pack_header(header).ljust(HEADER_BYTES, b"\0")
    path(name).write_bytes(b"" if left_behind == "empty" else page)
    if left_behind.startswith("grown"):
        os.truncate(path(name), header.nbytes + 8 * MIB)
    arena = open_arena(capacity=16 * MIB, window=4 * MIB)
    assert arena.adopted == (left_behind != "empty")
    assert (arena.uuid == str(header.uuid)) == arena.adopted
    assert (arena.capacity, path(name).stat().st_size) == (16 * MIB, arena.nbytes)
    assert arena.commit_data(16 * MIB) == 16 * MIB


def foreign_objects() -> dict[str, tuple[bytes, str]]:
    good = bytearray(pack_header(Header(uuid4(), MIB, MIB, 1.0)).ljust(HEADER_BYTES, b"\0"))
    whole = bytearray(DATA_OFFSET + MIB)
    other_layout, damaged, overcommitted = whole[:], whole[:], whole[:]
    for page in (other_layout, damaged, overcommitted):
        page[:HEADER_BYTES] = good
    other_layout[8] = LAYOUT_VERSION + 1
    damaged[40] ^= 1
    overcommitted[COMMITTED_OFFSET : COMMITTED_OFFSET + 8] = (MIB + 1).to_bytes(8, "little")
    return {
        "another program's": (b"somebody else's data" * 1000, "not a weightstore arena"),
        "tiny": (b"x", "too few for an arena header"),
        "zeros": (bytes(HEADER_BYTES), "not a weightstore arena"),
        "another layout": (bytes(other_layout), f"layout {LAYOUT_VERSION + 1}"),
        "damaged": (bytes(damaged), "damaged arena header"),
        "cut": (bytes(good) + b"rest", "it was cut"),
        "overcommitted": (bytes(overcommitted), "claims 1048577 committed bytes"),
    }


@pytest.mark.parametrize("kind", list(foreign_objects()))
def test_foreign_objects_are_refused_and_left_alone(open_arena: Open, name: str, kind: str) -> None:
    content, message = foreign_objects()[kind]
    path(name).write_bytes(content)
    before = path(name).stat()
    with pytest.raises(ArenaUnusable, match=message):
        open_arena(capacity=4 * MIB)
    after = path(name).stat()
    assert path(name).read_bytes() == content
    assert (before.st_ino, before.st_size, before.st_mode) == (after.st_ino, after.st_size, after.st_mode)
    # and its lock is not kept
    with path(name).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file to another user needs root")
def test_another_users_object_is_refused(open_arena: Open, name: str) -> None:
    path(name).touch()
    os.chown(path(name), 12345, 12345)
    with pytest.raises(ArenaUnusable, match=r"12345|another user"):
        open_arena()
    assert path(name).stat().st_size == 0


def test_an_object_unlinked_while_waiting_for_it_is_not_adopted(
    open_arena: Open, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last owner unlinks between our open and our lock: we must not end up on nameless memory."""
    first = open_arena()
    first.close()
    stale = path(name).stat().st_ino
    real = fcntl.flock

    def unlink_then_lock(fd: int, operation: int) -> None:
        if os.fstat(fd).st_ino == stale and operation & fcntl.LOCK_EX and path(name).exists():
            path(name).unlink()
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", unlink_then_lock)
    arena = open_arena()
    assert not arena.adopted and arena.uuid != first.uuid
    assert path(name).stat().st_ino != stale


def test_unlink_removes_its_own_object_only(open_arena: Open, name: str) -> None:
    arena = open_arena()
    arena.unlink()
    assert not path(name).exists()
    arena.unlink()
    successor = open_arena()
    arena.unlink()
    assert path(name).exists()
    arena.buffer[0:8] = b"still OK"  # unlinked memory lives as long as its mapping
    assert unpack_header(successor.buffer)


def test_close_is_idempotent_and_survives_views(open_arena: Open) -> None:
    arena = open_arena()
    arena.commit_data(1)
    view = arena.buffer[DATA_OFFSET : DATA_OFFSET + 4]
    view[:] = b"view"
    arena.close()
    arena.close()
    assert bytes(view) == b"view"
    assert open_arena().adopted, "a living view must not hold the lock"


# -- descriptors ----------------------------------------------------------------------------------


def test_a_reader_cannot_write_in_any_way(open_arena: Open) -> None:
    arena = open_arena()
    arena.commit_data(1)
    arena.buffer[DATA_OFFSET : DATA_OFFSET + 4] = b"safe"
    fd = arena.reader_fd()
    try:
        with pytest.raises(OSError) as written:
            os.pwrite(fd, b"evil", DATA_OFFSET)
        assert written.value.errno == errno.EBADF
        with pytest.raises(OSError):
            os.ftruncate(fd, 0)
        with pytest.raises(OSError) as mapped:
            mmap.mmap(fd, arena.nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        assert mapped.value.errno == errno.EACCES
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = (ctypes.c_void_p, *[ctypes.c_size_t] * 4, ctypes.c_long)
        libc.mprotect.argtypes = libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        address = libc.mmap(None, arena.nbytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        assert ctypes.string_at(address + DATA_OFFSET, 4) == b"safe"
        assert libc.mprotect(address, arena.nbytes, mmap.PROT_READ | mmap.PROT_WRITE) == -1
        assert ctypes.get_errno() == errno.EACCES
        libc.munmap(address, arena.nbytes)
    finally:
        os.close(fd)
    assert bytes(arena.buffer[DATA_OFFSET : DATA_OFFSET + 4]) == b"safe"


def test_writers_share_memory_but_not_the_lock(open_arena: Open) -> None:
    arena = open_arena()
    arena.commit_data(1)
    fd = arena.writer_fd()
    assert not os.get_inheritable(fd)
    os.pwrite(fd, b"hello", DATA_OFFSET)
    assert bytes(arena.buffer[DATA_OFFSET : DATA_OFFSET + 5]) == b"hello"
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)
    with pytest.raises(ArenaUnusable, match="in use"):
        open_arena()


def test_descriptors_work_after_the_name_is_gone(open_arena: Open) -> None:
    arena = open_arena()
    arena.unlink()
    fd = arena.reader_fd()
    assert os.fstat(fd).st_size == arena.nbytes
    os.close(fd)


# -- a really full file system --------------------------------------------------------------------

SMALL_SHM = """
import os, sys
from weightstore.admission import Admission
from weightstore.arena import Arena, DATA_OFFSET
from weightstore.errors import ArenaFull
from weightstore.layout import read_committed

class Blind(Admission):
    def check(self, nbytes):
        pass

MIB = 1 << 20
used = lambda: (lambda s: (s.f_blocks - s.f_bfree) * s.f_frsize)(os.statvfs("/dev/shm"))

def refused(call, *numbers):
    try:
        call()
    except ArenaFull as error:
        assert all(number in str(error) for number in numbers), error
        return error
    raise SystemExit("not refused")

# what admission sees
arena = Arena.open("full", 256 * MIB, 4 * MIB, Admission())
assert arena.commit_data(8 * MIB) == 8 * MIB
before = used()
refused(lambda: arena.commit_data(64 * MIB), "/dev/shm has", "64 MiB")
assert used() == before
arena.close()

# what the kernel says when admission was too hopeful: somebody else took the space in between
arena = Arena.open("full", 256 * MIB, 4 * MIB, Blind())
for madvise in (True, False):
    if not madvise:
        import weightstore.arena
        weightstore.arena.MADV_POPULATE_WRITE = 9999
    error = refused(lambda: arena.commit_data(200 * MIB), "200 MiB", "full")
    assert error.details["committed"] == 8 * MIB
    assert used() == before, (used(), before)
    assert arena.committed == read_committed(arena.buffer) == 8 * MIB
refused(lambda: arena.commit_meta(60 * MIB), "full")
assert used() == before
assert arena.commit_data(4 * MIB) == 4 * MIB
arena.buffer[DATA_OFFSET + 12 * MIB - 1] = 1
arena.unlink()
arena.close()

# not even a page
with open("/dev/shm/filler", "wb") as filler:
    try:
        while filler.write(b"x" * MIB):
            pass
    except OSError:
        pass
refused(lambda: Arena.open("new", MIB, MIB, Admission()), "/dev/shm")
refused(lambda: Arena.open("new", MIB, MIB, Blind()), "room")
print("ok")
"""


def in_private_shm(size: str, script: str) -> subprocess.CompletedProcess[str]:
    """Run `script` in a mount namespace whose /dev/shm is a fresh tmpfs of `size`; skips if not permitted."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("needs the unshare program to get a private /dev/shm")
    flags = ["--mount"] if os.geteuid() == 0 else ["--mount", "--map-root-user"]
    mount = f"mount -t tmpfs -o size={size} weightstore-test /dev/shm"
    if subprocess.run([unshare, *flags, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("a private mount namespace is not permitted here")
    return subprocess.run(
        [unshare, *flags, "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_full_shared_memory_is_an_error_not_a_crash() -> None:
    result = in_private_shm("32m", SMALL_SHM)
    assert result.returncode == 0, f"exit {result.returncode}: {result.stderr}"
    assert result.stdout == "ok\n"


def test_the_module_needs_no_numerics() -> None:
    code = "import weightstore.arena, sys; sys.exit(bool({'numpy', 'torch', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_posix_ipc_finds_the_same_object(open_arena: Open, name: str) -> None:
    arena = open_arena()
    memory = posix_ipc.SharedMemory(f"/{name}")
    assert memory.size == arena.nbytes
    memory.close_fd()


HUGE_SHM = """
import re
from weightstore.admission import Admission
from weightstore.arena import Arena, DATA_OFFSET
from weightstore.doctor import Host
from weightstore.doctor.memory import check_huge_pages

def huge():
    return int(re.search(r"ShmemHugePages: +(\\d+) kB", open("/proc/meminfo").read())[1])

(finding,) = check_huge_pages(Host())
assert finding.status == "ok", finding
before = huge()
arena = Arena.open("huge", 64 << 20, 32 << 20, Admission())
arena.commit_data(32 << 20)
print(huge() - before)
"""


def test_arena_pages_are_huge_where_the_mount_advises_it() -> None:
    knob = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    if not knob.exists() or "[deny]" in knob.read_text():
        pytest.skip("this kernel gives no huge pages to shared memory")
    result = in_private_shm("256m,huge=advise", HUGE_SHM)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 16 << 10, f"only {result.stdout} kB of 32 MiB came as huge pages"
