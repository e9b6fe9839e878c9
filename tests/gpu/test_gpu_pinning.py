from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from gpu_segment import WINDOW, Segment, open_segment

from weightstore.cuda import driver
from weightstore.cuda.copies import Copier
from weightstore.cuda.pinning import PinnedArena
from weightstore.errors import DeviceError
from weightstore.layout import DATA_OFFSET
from weightstore.paths import pin_lock


def is_registered(address: int) -> bool:
    attribute = driver.api().CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
    code, _ = driver.api().cuPointerGetAttribute(attribute, address)
    return not code


@pytest.mark.parametrize("writable", [False, True])
def test_windows_are_registered_as_they_are_needed(
    segment: Segment, device: driver.Device, writable: bool
) -> None:
    mapping = segment.writer if writable else segment.reader
    arena = PinnedArena.share(mapping, device)
    with device.current():
        assert arena.pinned_bytes == 0
        border = DATA_OFFSET + 2 * WINDOW
        assert arena.ensure([(border - 10, 20)]) == 2 * WINDOW
        assert arena.ensure([(border - 10, 20)]) == 0
        assert [is_registered(arena.address + DATA_OFFSET + i * WINDOW) for i in range(4)] == [
            False,
            True,
            True,
            False,
        ]
        arena.close()
        assert not is_registered(arena.address + DATA_OFFSET + WINDOW)
    mapping.close()


def test_background_pins_what_is_committed_and_nothing_else(device: driver.Device) -> None:
    segment = open_segment(8 * WINDOW, committed=3 * WINDOW)
    try:
        arena = PinnedArena.share(segment.reader, device)
        arena.pin_ahead()
        arena.settle()
        assert arena.pinned_bytes == 3 * WINDOW
        with pytest.raises(DeviceError, match="committed data are bytes"):
            arena.ensure([(DATA_OFFSET, 5 * WINDOW)])
        segment.arena.commit_data(2 * WINDOW)
        arena.pin_ahead()
        arena.settle()
        assert arena.pinned_bytes == 5 * WINDOW
        arena.close()
    finally:
        segment.arena.unlink()
        segment.arena.close()


def test_a_refused_request_is_rolled_back(segment: Segment, device: driver.Device) -> None:
    arena = PinnedArena.share(segment.writer, device)
    arena.ensure([(DATA_OFFSET, 1)])
    base = arena.address + DATA_OFFSET
    with device.current():
        # Somebody else registered a page of window 3: registering the window must fail.
        driver.call("cuMemHostRegister", base + 3 * WINDOW, 4096, 0)
        with pytest.raises(DeviceError, match=f"{WINDOW} bytes at {DATA_OFFSET + 3 * WINDOW} of the arena"):
            arena.ensure([(DATA_OFFSET, 5 * WINDOW)])
        assert [is_registered(base + i * WINDOW) for i in range(5)] == [True, False, False, True, False]
        assert arena.pinned_bytes == WINDOW
        driver.call("cuMemHostUnregister", base + 3 * WINDOW)
        assert arena.ensure([(DATA_OFFSET, 5 * WINDOW)]) == 4 * WINDOW
    arena.close()
    torch.zeros(1, device="cuda")  # no pending error


def test_one_registration_serves_all_users(segment: Segment, device: driver.Device) -> None:
    first, second = (PinnedArena.share(segment.reader, device) for _ in range(2))
    assert first.ensure([(DATA_OFFSET, 1)]) == WINDOW
    assert second.ensure([(DATA_OFFSET, 1)]) == 0
    first.close()
    first.close()
    assert second.is_pinned(DATA_OFFSET, 1)
    second.close()
    third = PinnedArena.share(segment.reader, device)
    assert third.pinned_bytes == 0
    third.close()


def test_what_a_writer_pinned_serves_readers_but_not_the_other_way(
    segment: Segment, device: driver.Device
) -> None:
    reader = PinnedArena.share(segment.reader, device)
    reader.ensure([(DATA_OFFSET, 1)])
    writer = PinnedArena.share(segment.writer, device)
    assert writer.ensure([(DATA_OFFSET, 2 * WINDOW)]) == 2 * WINDOW
    assert reader.ensure([(DATA_OFFSET, 3 * WINDOW)]) == WINDOW  # through the writable mapping, for both
    assert writer.is_pinned(DATA_OFFSET, 3 * WINDOW)
    assert reader.pinned_bytes == 3 * WINDOW
    assert reader.address_of(DATA_OFFSET + WINDOW) == writer.address + DATA_OFFSET + WINDOW
    writer.close()  # its registrations stay for the reader, and its pages with them
    segment.writer.close()
    copier, stream = Copier(device, reader), driver.Stream(device)
    out = torch.zeros(3 * WINDOW, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    copier.to_device([(out.data_ptr(), DATA_OFFSET, 3 * WINDOW)], stream)
    stream.synchronize()
    assert torch.equal(out.cpu(), segment.bytes(DATA_OFFSET, 3 * WINDOW))
    assert (copier.pinned_new, copier.staged_bytes) == (0, 0)
    reader.close()
    with device.current():
        assert not is_registered(writer.address + DATA_OFFSET)
        assert not is_registered(reader.address + DATA_OFFSET)


def test_requests_from_many_threads_pin_each_window_once(segment: Segment, device: driver.Device) -> None:
    arena = PinnedArena.share(segment.reader, device)
    added: list[int] = []

    def work() -> None:
        added.append(arena.ensure([(DATA_OFFSET, 8 * WINDOW)]))

    arena.pin_ahead()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    arena.settle()
    assert arena.pinned_bytes == 8 * WINDOW
    assert sum(added) <= 8 * WINDOW
    arena.close()


def test_the_background_gives_way_to_a_process_that_is_registering(
    segment: Segment, device: driver.Device
) -> None:
    arena = PinnedArena.share(segment.reader, device)
    arena.ensure([(DATA_OFFSET, 1)])  # which makes the lock file, too
    with open(pin_lock(segment.arena.uuid)) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        arena.pin_ahead([(DATA_OFFSET, 3 * WINDOW)])
        arena.pin_ahead([(DATA_OFFSET + 5 * WINDOW, 1)])
        # Who needs a window waits for the lock only, and not for a background thread that waits for it.
        needed = threading.Thread(target=arena.ensure, args=([(DATA_OFFSET + 7 * WINDOW, 1)],))
        needed.start()
        assert arena.pinned_bytes == WINDOW
        fcntl.flock(other, fcntl.LOCK_UN)
        needed.join()
        assert arena.is_pinned(DATA_OFFSET + 7 * WINDOW, 1)
    arena.settle()
    assert arena.pinned_bytes == 5 * WINDOW
    with open(pin_lock(segment.arena.uuid)) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        arena.pin_ahead()
        arena.close()  # does not wait for the other process
    segment.reader.close()


CHILD = """
import os, sys
from weightstore.cuda import driver
from weightstore.cuda.copies import Copier
from weightstore.cuda.pinning import PinnedArena
from weightstore.layout import DATA_OFFSET
from weightstore.mapping import ArenaMapping
fd, nbytes = int(sys.argv[1]), int(sys.argv[2])
mapping = ArenaMapping(fd, nbytes, False)
device = driver.device(0)
arena = PinnedArena.share(mapping, device)
arena.ensure([(DATA_OFFSET, nbytes - DATA_OFFSET)])
print(arena.pinned_bytes, flush=True)
sys.stdin.read()
"""


def test_processes_pin_the_same_arena_at_once_and_a_killed_one_leaves_nothing(
    segment: Segment, device: driver.Device
) -> None:
    fd = segment.arena.reader_fd()
    command = [sys.executable, "-c", CHILD, str(fd), str(segment.arena.nbytes)]
    children = [
        subprocess.Popen(command, pass_fds=[fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            assert int(child.stdout.readline()) == 8 * WINDOW
        children[0].kill()
        children[0].wait(30)
        # The lock file is free and the pages can be registered here, with a killed and a living neighbour.
        arena = PinnedArena.share(segment.writer, device)
        assert arena.ensure([(DATA_OFFSET, 8 * WINDOW)]) == 8 * WINDOW
        arena.close()
    finally:
        for child in children:
            child.kill()
            child.communicate()
        os.close(fd)
        Path(pin_lock(segment.arena.uuid)).unlink(missing_ok=True)
