"""Who may write what, and who may come in: the kernel's answers, not ours."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from children import Child, Step
from processes import ROOT, Raw, Service, contents, publish, specs

from weightstore import wire
from weightstore.client import connect
from weightstore.errors import WeightstoreError
from weightstore.layout import DATA_OFFSET

SIZES = {"t.w": 5000, "t.b": 64}
NOBODY = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("access")) as service:
        with service.connect() as store:
            publish(store, "m", SIZES, 7)
        yield service
        with service.connect() as store:
            assert contents(store, "m") == {name: b"\x07" * size for name, size in SIZES.items()}
            assert store.verify("m").corrupt == []


@pytest.fixture
def reader(service: Service) -> Iterator[int]:
    """The descriptor that a store gives to whoever connects."""
    with Raw(service.socket) as raw:
        raw.hello()
        (fd,) = raw.fds
        yield fd


# -- a reader cannot write -------------------------------------------------------------------------


def test_a_readers_descriptor_refuses_every_way_of_writing(reader: int) -> None:
    assert fcntl.fcntl(reader, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    for write in (
        lambda: os.write(reader, b"x"),
        lambda: os.pwrite(reader, b"x", DATA_OFFSET),
        lambda: os.pwritev(reader, [b"x"], DATA_OFFSET),
        lambda: os.ftruncate(reader, 0),
        lambda: os.posix_fallocate(reader, 0, 1 << 40),
    ):
        with pytest.raises(OSError):
            write()


def test_a_readers_descriptor_cannot_be_mapped_for_writing(reader: int) -> None:
    size = os.fstat(reader).st_size
    for protection in (mmap.PROT_WRITE, mmap.PROT_READ | mmap.PROT_WRITE):
        with pytest.raises(PermissionError):
            mmap.mmap(reader, size, mmap.MAP_SHARED, protection)


def test_a_readers_mapping_cannot_be_made_writable(service: Service) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with service.connect() as store:
        mapping = store.mapping
        assert libc.mprotect(mapping.address, mapping.nbytes, mmap.PROT_READ | mmap.PROT_WRITE) == -1
        assert ctypes.get_errno() == 13  # EACCES
        with pytest.raises(TypeError, match="read-only"):
            mapping.buffer[DATA_OFFSET] = 1


def write_to_a_snapshot(step: Step, socket: str, how: str) -> None:
    with connect(socket) as store, store.lease("m") as snapshot:
        step("holding")
        if how == "torch":
            snapshot["t.w"].fill_(0)
        elif how == "memset":
            record = snapshot.records["t.w"]
            ctypes.memset(snapshot._mapping.address + record.offset, 0, record.nbytes)
        else:
            array = snapshot.numpy("t.w")
            array.flags.writeable = True  # numpy may refuse; the kernel must not be needed to agree
            array[:] = 0


@pytest.mark.parametrize("how", ["torch", "memset"])
def test_a_write_through_a_snapshot_kills_the_writer_and_nothing_else(service: Service, how: str) -> None:
    with Child(write_to_a_snapshot, service.socket, how) as child:
        child.reaches("holding")
        child.go()
        assert child.exitcode() == -signal.SIGSEGV


def test_numpy_arrays_of_a_snapshot_stay_read_only(service: Service) -> None:
    with Child(write_to_a_snapshot, service.socket, "numpy") as child:
        child.reaches("holding")
        child.go()
        assert "cannot set WRITEABLE flag to True" in child.error()


def test_no_descriptor_given_out_holds_or_drops_the_stores_lock(service: Service, tmp_path: Path) -> None:
    with service.raw() as raw:
        opened = raw.ask(wire.OpenRefit(id=0, model="new", tag="latest"))
        assert isinstance(opened, wire.RefitOpened)
        for fd in raw.fds:
            with pytest.raises(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(fd, fcntl.LOCK_UN)
        second = subprocess.run(
            [
                sys.executable,
                "-m",
                "weightstore",
                "serve",
                "--arena",
                service.shm.name,
                "--socket",
                str(tmp_path / "s"),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert f"in use by pid {service.pid}" in second.stderr


def test_only_a_writer_gets_a_descriptor_to_write_with(service: Service) -> None:
    with service.raw() as raw:
        assert isinstance(raw.ask(wire.OpenLease(id=0, model="m", tag="latest")), wire.LeaseGranted)
        refused = raw.ask(wire.OpenRefit(id=0, model="m", tag="latest", base=99))
        assert refused.error == "UnknownVersion"
        assert len(raw.fds) == 1
        raw.ask(wire.OpenRefit(id=0, model="m", tag="latest"))
        assert [fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE for fd in raw.fds] == [os.O_RDONLY, os.O_RDWR]
        assert os.fstat(raw.fds[0]).st_ino == os.fstat(raw.fds[1]).st_ino
        raw.ask(wire.AbortRefit(id=0, refit=1))


# -- who may come in ---------------------------------------------------------------------------------


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that other users can pass through, as pytest's cannot."""
    directory = Path(tempfile.mkdtemp(prefix="weightstore-test-", dir="/tmp"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def mode(path: Path | str) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def try_everything(step: Step, socket: str, uid: int) -> dict[str, Any]:
    """As user `uid`: what connecting, reading, writing and reopening give."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    found: dict[str, Any] = {}
    try:
        with Raw(socket) as raw:
            with contextlib.suppress(BrokenPipeError):  # refused before it has said a word
                raw.send(wire.Hello(id=1, protocol=wire.PROTOCOL))
            first = raw.read()
            found["first"] = type(first).__name__
            found["said"] = getattr(first, "message", "")
            found["fds"] = len(raw.fds)
            if raw.fds:
                try:
                    os.close(os.open(f"/proc/self/fd/{raw.fds[0]}", os.O_RDWR))
                    found["reopened"] = True
                except PermissionError:
                    found["reopened"] = False
    except PermissionError:
        found["first"] = "no way to the socket"
    try:
        with connect(socket) as store:
            found["contents"] = set(contents(store, "m")["t.w"])
            with store.refit("m") as refit:
                refit.reserve(specs({"t.w": 5000}))
                refit.abort()
            found["wrote"] = True
    except WeightstoreError as error:
        found["error"] = f"{type(error).__name__}: {error.message}"
    return found


def as_nobody(socket: str) -> dict[str, Any]:
    with Child(try_everything, socket, NOBODY) as child:
        found: dict[str, Any] = child.result()
        return found


@needs_root
def test_another_user_does_not_even_reach_the_socket(public: Path) -> None:
    """The directory that a store makes for its socket is closed to others."""
    directory = public / "run"
    with Service(public, "--socket", str(directory / "s")) as service:
        service.socket = str(directory / "s")
        assert mode(directory) == 0o700
        assert mode(service.socket) == 0o600
        assert mode(service.shm) == 0o600
        found = as_nobody(service.socket)
        assert found["first"] == "no way to the socket"
        assert found["error"].startswith(f"AccessDenied: uid {NOBODY} may not use the store's socket")


@needs_root
def test_the_sockets_own_mode_keeps_others_out(public: Path) -> None:
    with Service(public) as service:
        assert mode(public) == 0o755 and mode(service.socket) == 0o600
        found = as_nobody(service.socket)
        assert found["first"] == "no way to the socket"
        assert found["error"].startswith("AccessDenied")


@needs_root
def test_another_user_who_reaches_the_socket_is_refused_and_gets_no_descriptor(public: Path) -> None:
    """Somebody else was let in, so the socket is open to all; credentials decide."""
    with Service(public, "--allow-uid", "12345") as service, service.connect() as store:
        publish(store, "m", SIZES, 7)
        found = as_nobody(service.socket)
        assert (found["first"], found["fds"]) == ("Failed", 0)
        assert f"user id {NOBODY} may not use this store" in found["said"]
        assert f"--allow-uid {NOBODY}" in found["said"]
        assert found["error"].startswith("AccessDenied: user id")
        assert store.status().clients == 1


@needs_root
def test_a_user_who_was_let_in_reads_and_writes_but_cannot_turn_a_reader_into_a_writer(public: Path) -> None:
    directory = public / "run"
    socket = str(directory / "s")
    with Service(public, "--socket", socket, "--allow-uid", str(NOBODY)) as service:
        service.socket = socket
        assert mode(directory) == 0o711 and mode(socket) == 0o666
        assert mode(service.shm) == 0o600
        with service.connect() as store:
            publish(store, "m", SIZES, 7)
            found = as_nobody(socket)
            assert (found["first"], found["fds"], found["contents"], found["wrote"]) == (
                "Welcome",
                1,
                {7},
                True,
            )
            assert found["reopened"] is False
            assert store.status().arena.pending == 0


@needs_root
def test_a_directory_that_keeps_out_whom_allow_uid_lets_in_is_pointed_out(public: Path) -> None:
    directory = public / "run"
    directory.mkdir(mode=0o700)
    socket = str(directory / "s")
    with Service(public, "--socket", socket, "--allow-uid", str(NOBODY)) as service:
        service.socket = socket
        assert mode(directory) == 0o700  # somebody's directory is not opened behind his back
        assert f"may not pass through {directory}; chmod o+x" in service.log()


@needs_root
@pytest.mark.parametrize("what", ["others can write", "another user's", "a link"])
def test_a_socket_is_not_put_where_somebody_could_replace_it(public: Path, what: str) -> None:
    directory = public / "run"
    if what == "a link":
        (public / "target").mkdir(mode=0o700)
        directory.symlink_to(public / "target")
    else:
        directory.mkdir()
        directory.chmod(0o777 if what == "others can write" else 0o700)
        if what == "another user's":
            os.chown(directory, NOBODY, NOBODY)
    with pytest.raises(
        AssertionError, match=f"{directory} (is writable by others|belongs to uid|is not a dir)"
    ):
        Service(public, "--socket", str(directory / "s"))
    assert os.listdir(directory) == []
