"""Registering ahead of need, on a driver that only keeps count: the threads, processes and files are real."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from types import SimpleNamespace

import pytest

from weightstore.admission import Admission
from weightstore.arena import Arena
from weightstore.cuda import pinning
from weightstore.cuda.driver import Device
from weightstore.cuda.pinning import PinnedArena
from weightstore.errors import DeviceError
from weightstore.layout import DATA_OFFSET
from weightstore.mapping import ArenaMapping
from weightstore.paths import pin_lock

WINDOW = 1 << 16


class Driver:
    """Registers pages, one caller at a time, each page once."""

    name = "a device"

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.order: list[int] = []
        self.refuse: Callable[[int], Exception | None] = lambda address: None
        self._busy = threading.Lock()

    def call(self, name: str, address: int, *arguments: int) -> None:
        assert self._busy.acquire(blocking=False), "two at once"
        try:
            if name == "cuMemHostRegister":
                if error := self.refuse(address):
                    raise error
                assert address not in self.registered, "twice"
                self.registered[address] = arguments[0]
                self.order.append(address)
            else:
                assert name == "cuMemHostUnregister"
                del self.registered[address]
        finally:
            self._busy.release()

    def attribute(self, name: str) -> int:
        return 1

    def synchronize(self) -> None:
        pass

    @contextmanager
    def current(self) -> Iterator[None]:
        yield


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    flags = SimpleNamespace(CU_MEMHOSTREGISTER_PORTABLE=1, CU_MEMHOSTREGISTER_READ_ONLY=8)
    monkeypatch.setattr(pinning, "call", driver.call)
    monkeypatch.setattr(pinning, "api", lambda: flags)
    return driver


class Mapped:
    """An arena of 16 windows, of which some are committed, and holds on it."""

    def __init__(self, driver: Driver, windows: float = 16) -> None:
        self._device: Device = driver  # type: ignore[assignment]
        self.arena = Arena.open(f"ws-test-{uuid.uuid4().hex[:12]}", 16 * WINDOW, WINDOW, Admission(reserve=0))
        self.arena.commit_data(int(windows * WINDOW))

    def mapping(self, writable: bool = False) -> ArenaMapping:
        fd = self.arena.writer_fd() if writable else self.arena.reader_fd()
        try:
            return ArenaMapping(fd, self.arena.nbytes, writable, self.arena.uuid)
        finally:
            os.close(fd)

    def hold(self, mapping: ArenaMapping | None = None) -> PinnedArena:
        return PinnedArena.share(mapping or self.mapping(), self._device)

    def close(self) -> None:
        self.arena.unlink()
        self.arena.close()
        os.unlink(pin_lock(self.arena.uuid))


@pytest.fixture
def mapped(driver: Driver) -> Iterator[Mapped]:
    mapped = Mapped(driver)
    yield mapped
    mapped.close()


def at(*windows: float) -> list[tuple[int, int]]:
    """A byte in each of these windows."""
    return [(DATA_OFFSET + int(number * WINDOW), 1) for number in windows]


def numbers(hold: PinnedArena, driver: Driver) -> list[int]:
    """The windows in the order in which they were registered."""
    return [(address - hold.address - DATA_OFFSET) // WINDOW for address in driver.order]


@contextmanager
def another_registers(mapped: Mapped) -> Iterator[None]:
    """As long as the block lasts: the lock is the file's, not the process's."""
    with pinning._file_lock(pin_lock(mapped.arena.uuid), patient=True) as got:
        assert got
        yield


def test_calls_are_served_in_order_and_each_window_once(mapped: Mapped, driver: Driver) -> None:
    hold = mapped.hold()
    with another_registers(mapped):
        hold.pin_ahead(at(5, 3))
        hold.pin_ahead(at(9, 3, 0.5))
        for _ in range(50):
            hold.pin_ahead(at(5, 9))
        assert not driver.registered and len(hold._wanted) == 4
    hold.settle()
    assert numbers(hold, driver) == [3, 5, 0, 9]
    hold.pin_ahead(at(0, 3, 5, 9))
    hold.pin_ahead([(DATA_OFFSET + WINDOW - 1, 2)])
    hold.settle()
    assert numbers(hold, driver) == [3, 5, 0, 9, 1]
    hold.close()
    assert not driver.registered


def test_what_is_not_committed_as_a_whole_is_left_out(
    mapped: Mapped, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As after the adoption of an arena whose capacity cut its last window, with a larger one.
    monkeypatch.setattr(pinning, "read_committed", lambda pages: 3 * WINDOW + WINDOW // 2)
    hold = mapped.hold()
    hold.pin_ahead()
    hold.pin_ahead([(DATA_OFFSET + 2 * WINDOW, 1 << 40), (0, 1), (DATA_OFFSET + 40 * WINDOW, 1)])
    hold.settle()
    assert numbers(hold, driver) == [0, 1, 2]
    hold.close()


def test_it_gives_way_and_who_needs_a_window_waits_for_the_lock_alone(mapped: Mapped, driver: Driver) -> None:
    hold = mapped.hold()
    needed = threading.Thread(target=hold.ensure, args=(at(7),))
    with another_registers(mapped):
        hold.pin_ahead(at(1, 2))
        needed.start()
        hold.pin_ahead(at(3))
        assert not driver.registered
    needed.join(30)
    assert hold.is_pinned(*at(7)[0])
    hold.settle()
    assert sorted(numbers(hold, driver)) == [1, 2, 3, 7]
    with another_registers(mapped):
        hold.pin_ahead()
        hold.close()  # does not wait for the other
    assert not driver.registered
    hold.pin_ahead(at(4))
    hold.settle()
    assert not driver.registered


@pytest.mark.parametrize("error", [DeviceError("refused"), OSError("no locks left")])
def test_a_refusal_ends_what_was_asked_for_and_nothing_else(
    mapped: Mapped, driver: Driver, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    hold = mapped.hold()
    refused = hold.address + DATA_OFFSET + 2 * WINDOW
    driver.refuse = lambda address: error if address == refused else None
    with caplog.at_level(logging.WARNING):
        hold.pin_ahead(at(1, 2, 3))
        hold.settle()
    assert numbers(hold, driver) == [1] and str(error) in caplog.text
    driver.refuse = lambda address: None
    hold.pin_ahead(at(2))
    hold.settle()
    assert numbers(hold, driver) == [1, 2]
    hold.close()


def test_holds_that_come_and_go_in_many_threads_leave_nothing(mapped: Mapped, driver: Driver) -> None:
    """`Driver` says when anything is registered twice, or two at once."""
    mappings = [mapped.mapping(), mapped.mapping(writable=True)]
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        random = Random(seed)
        try:
            for _ in range(40):
                hold = mapped.hold(random.choice(mappings))
                for _ in range(random.randrange(6)):
                    chosen = at(*random.sample(range(16), random.randrange(1, 6)))
                    random.choice([hold.pin_ahead, hold.ensure])(chosen)
                    if random.random() < 0.2:
                        hold.settle()
                hold.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures and not any(thread.is_alive() for thread in threads)
    assert not driver.registered
