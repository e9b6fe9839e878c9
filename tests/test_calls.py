from __future__ import annotations

import os
import threading
from typing import Any

import pytest

from weightstore import wire
from weightstore.calls import Call
from weightstore.errors import LeaseLost, StoreGone

PATIENCE = 20.0
REPLY = wire.Done(id=1)


class Told:
    """A call, and what became of it."""

    def __init__(self, posted: bool = False) -> None:
        self.undone: list[Any] = []
        self.failed: list[Exception] = []
        self.call = Call(wire.Done, None, self.failed.append, self.undone.append, posted)


def fd_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def some_fd() -> int:
    return os.open("/dev/null", os.O_RDONLY)


def test_the_waiter_gets_the_outcome_and_its_descriptors() -> None:
    told, fd = Told(), some_fd()
    threading.Thread(target=told.call.settle, args=(REPLY, [fd], None)).start()
    assert told.call.wait(PATIENCE)
    assert (told.call.reply, told.call.fds, told.call.error) == (REPLY, [fd], None)
    assert told.undone == [] and fd_open(fd)
    os.close(fd)


def test_an_outcome_after_giving_up_is_undone() -> None:
    told, fd = Told(), some_fd()
    assert not told.call.wait(0)
    told.call.settle(REPLY, [fd], None)
    assert told.undone == [REPLY] and not fd_open(fd)


def test_an_outcome_that_was_faster_than_giving_up_is_taken() -> None:
    told = Told()
    told.call.settle(REPLY, [], None)
    assert told.call.wait(0)
    assert told.undone == []


def test_a_failure_closes_descriptors_and_reaches_the_waiter() -> None:
    told, fd, error = Told(), some_fd(), LeaseLost("over")
    told.call.settle(REPLY, [fd], error)
    assert told.call.wait(0) and told.call.error is error
    assert told.failed == [] and not fd_open(fd)


def test_a_posted_call_tells_of_a_refusal_but_not_of_a_lost_connection() -> None:
    refused, lost = Told(posted=True), Told(posted=True)
    refused.call.settle(None, [], LeaseLost("over"))
    lost.call.settle(None, [], StoreGone("gone"), lost=True)
    assert [type(e) for e in refused.failed] == [LeaseLost] and lost.failed == []


@pytest.mark.parametrize("first", ["outcome", "interrupt"])
def test_an_interrupted_waiter_leaves_the_outcome_to_be_undone(first: str) -> None:
    told, fd = Told(), some_fd()

    class Interrupting:
        """The lock a waiter blocks on, at the moment of Ctrl-C."""

        def acquire(self, timeout: float) -> bool:
            if first == "outcome":
                told.call.settle(REPLY, [fd], None)
            raise KeyboardInterrupt

        def release(self) -> None:
            pass

    told.call._arrived = Interrupting()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        told.call.wait(None)
    if first == "interrupt":
        assert told.undone == []
        told.call.settle(REPLY, [fd], None)
    assert told.undone == [REPLY] and not fd_open(fd)
