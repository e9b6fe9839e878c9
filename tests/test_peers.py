"""Who connected, and when that process ends."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from pathlib import Path

import pytest

from weightstore.catalog import Writer
from weightstore.peers import Exits, open_pidfd, peer_credentials, peer_pidfd, reopen_pidfd, start_ticks


@pytest.fixture
def child() -> subprocess.Popen[bytes]:
    """A process that lives until its input is closed."""
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    yield process  # type: ignore[misc]
    process.communicate()


def writer_of(process: subprocess.Popen[bytes]) -> Writer:
    return Writer(process.pid, start_ticks(process.pid), "x")


def test_a_peer_is_known_by_the_kernels_word() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_credentials(ours) == (os.getpid(), os.getuid())
        pidfd = peer_pidfd(ours)
        assert pidfd is not None
        assert f"Pid:\t{os.getpid()}\n" in Path(f"/proc/self/fdinfo/{pidfd}").read_text()
        os.close(pidfd)


@pytest.mark.parametrize("pid", [0, -1, 1 << 22])
def test_there_is_no_pidfd_of_nobody(pid: int) -> None:
    """Pid 0 is what the kernel calls a process of another pid namespace."""
    assert open_pidfd(pid) is None


def test_a_later_process_of_the_same_number_is_not_the_writer(child: subprocess.Popen[bytes]) -> None:
    writer = writer_of(child)
    assert writer.started > 0
    pidfd = reopen_pidfd(writer)
    assert pidfd is not None
    os.close(pidfd)
    before = len(os.listdir("/proc/self/fd"))
    assert reopen_pidfd(Writer(child.pid, writer.started - 1, "x")) is None
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_exit_is_told_once_and_its_descriptor_closed(child: subprocess.Popen[bytes]) -> None:
    async def scenario() -> list[Writer]:
        told: list[Writer] = []
        heard = asyncio.Event()
        exits = Exits(lambda writer: (told.append(writer), heard.set())[0])
        writer = writer_of(child)
        exits.watch(writer, os.pidfd_open(child.pid))
        exits.watch(writer, os.pidfd_open(child.pid))  # from its second connection
        await asyncio.sleep(0.01)
        assert told == []
        assert child.stdin is not None
        child.stdin.close()
        await asyncio.wait_for(heard.wait(), 60.0)
        exits.close()
        return told

    before = len(os.listdir("/proc/self/fd"))
    writer = writer_of(child)
    assert asyncio.run(scenario()) == [writer]
    assert len(os.listdir("/proc/self/fd")) == before - 1  # the child's input


def test_who_owes_nothing_is_not_watched(child: subprocess.Popen[bytes]) -> None:
    async def scenario() -> None:
        asked: list[int] = []

        def owing() -> set[Writer]:
            asked.append(1)
            return {kept}

        exits = Exits(lambda writer: None)
        exits.keep_only(owing)
        assert asked == []
        kept, settled = writer_of(child), Writer(child.pid, 1, "y")
        pidfds = [os.pidfd_open(child.pid) for _ in range(2)]
        for writer, pidfd in zip((kept, settled), pidfds, strict=True):
            exits.watch(writer, pidfd)
        exits.keep_only(owing)
        os.fstat(pidfds[0])
        with pytest.raises(OSError):
            os.fstat(pidfds[1])
        exits.close()
        with pytest.raises(OSError):
            os.fstat(pidfds[0])

    asyncio.run(scenario())
