"""One connection on the store's side, on a real socket pair and event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightstore import session as session_module
from weightstore import wire
from weightstore.catalog import Peer, Writer
from weightstore.errors import ProtocolError
from weightstore.session import Budget, Session

T = TypeVar("T")
PATIENCE = 60.0
SOMEBODY = Peer(1, Writer(1, 1, ""), "somebody")


def run(scenario: Callable[[], Awaitable[T]]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(scenario(), PATIENCE)

    return asyncio.run(bounded())


class Ends:
    """A session on one end of a socket pair, and the other end."""

    def __init__(
        self, greeted: bool = True, unfinished: Budget | None = None, unsent: Budget | None = None
    ) -> None:
        ours, self.far = socket.socketpair()
        ours.setblocking(False)
        self.far.setblocking(False)
        self.session = Session(
            ours, None, unfinished or Budget(1 << 30, "requests"), unsent or Budget(1 << 30, "replies")
        )
        self.session.peer = SOMEBODY if greeted else None
        self.requests: list[wire.Request] = []
        self.receiving = asyncio.create_task(self.session.receive(self.handle))
        self.sending = asyncio.create_task(self.session.transmit())

    def handle(self, session: Session, request: wire.Request) -> None:
        self.requests.append(request)

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.far, data)

    async def read(self, nbytes: int = 1 << 20) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.far, nbytes)

    async def read_all(self) -> bytes:
        """Everything up to the end."""
        data = bytearray()
        while piece := await self.read():
            data += piece
        return bytes(data)

    async def close(self) -> None:
        for task in (self.receiving, self.sending):
            task.cancel()
        await asyncio.gather(self.receiving, self.sending, return_exceptions=True)
        self.session.close()
        self.far.close()


async def turns(condition: Callable[[], Any]) -> None:
    """Give way until `condition` holds."""
    while not condition():
        await asyncio.sleep(0)


def status(number: int) -> bytes:
    return wire.frame(wire.GetStatus(id=number))


# -- receiving -----------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 300), max_size=20),
    cuts=st.lists(st.integers(1, 50), min_size=1, max_size=40),
)
def test_a_stream_cut_anywhere_gives_the_same_requests(sizes: list[int], cuts: list[int]) -> None:
    sent = [wire.AbortRefit(id=i, refit=i, reason="x" * n) for i, n in enumerate(sizes)]
    stream = b"".join(map(wire.frame, sent))

    async def scenario() -> list[wire.Request]:
        ends = Ends()
        start = 0
        for i in range(len(stream)):
            if start >= len(stream):
                break
            end = start + cuts[i % len(cuts)]
            await ends.send(stream[start:end])
            await asyncio.sleep(0)
            start = end
        ends.far.shutdown(socket.SHUT_WR)
        await ends.receiving
        await ends.close()
        return ends.requests

    assert run(scenario) == sent


def test_a_peer_that_always_has_more_to_say_does_not_keep_the_loop() -> None:
    """Between two turns of anybody else at most TURN requests are handled."""
    flood = memoryview(b"".join(status(i) for i in range(10_000)))
    most = session_module.TURN

    async def scenario() -> int:
        ends = Ends()
        seen = longest = sent = 0

        def refill() -> None:  # at once, as a process on another core does
            nonlocal sent
            with contextlib.suppress(BlockingIOError):
                sent += ends.far.send(flood[sent:])

        def handle(session: Session, request: wire.Request) -> None:
            ends.requests.append(request)
            assert len(ends.requests) - seen <= 10 * most, "nobody else has had a turn"
            refill()

        ends.receiving.cancel()
        refill()
        ends.receiving = asyncio.create_task(ends.session.receive(handle))
        while len(ends.requests) < 3000:
            longest = max(longest, len(ends.requests) - seen)
            seen = len(ends.requests)
            await asyncio.sleep(0)
            assert not ends.receiving.done(), ends.receiving.exception()
        await ends.close()
        return longest

    assert 0 < run(scenario) <= most


def test_who_trickles_a_greeting_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "HELLO_SECONDS", 0.05)

    async def scenario() -> None:
        ends = Ends(greeted=False)
        hello = wire.frame(wire.Hello(id=1, protocol=1, client="x" * 200))
        with pytest.raises(ProtocolError, match="nothing was asked within"):
            for i in range(len(hello) - 1):  # never the last byte
                with contextlib.suppress(BrokenPipeError):
                    await ends.send(hello[i : i + 1])
                await asyncio.sleep(0.001)
            await ends.receiving
        await ends.close()

    run(scenario)


def test_a_greeted_peer_may_be_silent_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "HELLO_SECONDS", 0.01)

    async def scenario() -> list[wire.Request]:
        ends = Ends(greeted=False)

        def handle(session: Session, request: wire.Request) -> None:
            session.peer = SOMEBODY
            ends.requests.append(request)

        ends.receiving.cancel()
        ends.receiving = asyncio.create_task(ends.session.receive(handle))
        await ends.send(status(1))
        await asyncio.sleep(0.05)
        await ends.send(status(2))
        await turns(lambda: len(ends.requests) == 2)
        await ends.close()
        return ends.requests

    assert [request.id for request in run(scenario)] == [1, 2]


def test_frames_are_capped_before_they_arrive() -> None:
    async def scenario(greeted: bool) -> str:
        ends = Ends(greeted)
        await ends.send((session_module.MAX_HELLO + 1).to_bytes(4, "little"))
        if greeted:
            await ends.send(b"\0" * 100)
            await asyncio.sleep(0)
            assert not ends.receiving.done()
            await ends.close()
            return ""
        with pytest.raises(ProtocolError) as caught:
            await ends.receiving
        await ends.close()
        return caught.value.message

    assert "allowed are 1 to 4096" in run(lambda: scenario(False))
    assert run(lambda: scenario(True)) == ""


def test_of_too_many_unfinished_frames_the_stalest_pays() -> None:
    """Clients that never finish a large frame cost a later one nothing."""
    budget = Budget(1000, "requests")
    large = wire.frame(wire.AbortRefit(id=7, refit=1, reason="x" * 600))

    async def scenario() -> None:
        idle = [Ends(unfinished=budget) for _ in range(3)]
        for ends in idle:
            await ends.send(large[:400])
            await turns(lambda e=ends: e.session in budget._held or e.receiving.done())
        with pytest.raises(ProtocolError, match="too many bytes of requests"):
            await idle[0].receiving
        assert not idle[1].receiving.done() and not idle[2].receiving.done()
        await idle[1].send(large[400:410])  # it moves, so now the third is the stalest
        await turns(lambda: budget._held.get(idle[1].session) == 410)
        honest = Ends(unfinished=budget)
        await honest.send(large[:500])
        await turns(lambda: honest.session in budget._held)
        await honest.send(large[500:])
        await turns(lambda: honest.requests)
        with pytest.raises(ProtocolError, match="too many bytes of requests"):
            await idle[2].receiving
        assert not idle[1].receiving.done()
        for ends in (*idle, honest):
            await ends.close()

    run(scenario)
    assert budget.left == 1000 and not budget._held


def test_requests_after_a_breach_are_not_looked_at() -> None:
    async def scenario() -> list[wire.Request]:
        ends = Ends()

        def handle(session: Session, request: wire.Request) -> None:
            ends.requests.append(request)
            session.cut(ProtocolError("enough"))

        ends.receiving.cancel()
        ends.receiving = asyncio.create_task(ends.session.receive(handle))
        await ends.send(status(1) + status(2) + status(3))
        with pytest.raises(ProtocolError, match="enough"):
            await ends.receiving
        await ends.close()
        return ends.requests

    assert [request.id for request in run(scenario)] == [1]


# -- sending -------------------------------------------------------------------------------------


def message(number: int, nbytes: int) -> wire.Failed:
    return wire.Failed(id=number, error="UsageError", message="x" * nbytes)


def test_replies_larger_than_the_socket_arrive_whole_and_in_order() -> None:
    messages = [message(i, 300_000 * (i % 3) + i) for i in range(12)]

    async def scenario() -> bytes:
        ends = Ends()
        for reply in messages:
            ends.session.send(reply)
        ends.session.finish()
        reading = asyncio.create_task(ends.read_all())
        await ends.sending
        ends.session.close()
        data = await reading
        await ends.close()
        return data

    assert run(scenario) == b"".join(map(wire.frame, messages))


def test_who_leaves_too_much_unread_is_cut_off_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "MAX_UNSENT", 1 << 20)

    async def scenario() -> None:
        deaf, other = Ends(), Ends()
        for i in range(20):
            deaf.session.send(message(i, 100_000))
            other.session.send(message(i, 100))
        with pytest.raises(ProtocolError, match="replies have not been read"):
            await deaf.receiving
        assert len(await other.read()) > 0
        assert not other.receiving.done()
        await deaf.close()
        await other.close()

    run(scenario)


def test_of_too_many_unread_replies_the_stalest_reader_pays() -> None:
    budget = Budget(3 << 20, "replies")

    async def scenario() -> None:
        deaf, slow = Ends(unsent=budget), Ends(unsent=budget)
        deaf.session.send(message(0, 1 << 20))
        slow.session.send(message(0, 1 << 20))
        for _ in range(20):  # reads, however slowly; and its queue is refilled
            slow.session.send(message(1, 100))
            await slow.read()
            await asyncio.sleep(0)
        await turns(lambda: slow.session._unsent_bytes < 1 << 20)
        slow.session.send(message(2, 2 << 20))
        with pytest.raises(ProtocolError, match="too many bytes of replies"):
            await deaf.receiving
        assert not slow.receiving.done()
        await deaf.close()
        await slow.close()

    run(scenario)
    assert budget.left == 3 << 20


def test_a_peer_that_cannot_be_answered_loses_its_connection() -> None:
    """It shut its receiving side and goes on asking."""

    async def scenario() -> None:
        ends = Ends()
        ends.far.shutdown(socket.SHUT_RD)
        await ends.send(status(1))
        await turns(lambda: ends.requests)
        ends.session.send(message(1, 10))
        await ends.receiving
        with pytest.raises(OSError):
            await ends.sending
        await ends.close()

    run(scenario)


def test_descriptors_travel_with_their_message_and_are_closed_in_any_case() -> None:
    async def scenario() -> None:
        ends = Ends()
        inside, outside = os.pipe()
        ends.session.send(message(1, 10), [outside])
        await turns(lambda: not _is_open(outside))
        data, fds, _, _ = socket.recv_fds(ends.far, 1000, 4)
        assert data == wire.frame(message(1, 10)) and len(fds) == 1
        os.write(fds[0], b"x")
        assert os.read(inside, 1) == b"x"
        os.close(fds[0])

        stuck = Ends()
        stuck.session.send(message(0, 4 << 20))
        waiting = [os.dup(inside) for _ in range(3)]
        for fd in waiting:
            stuck.session.send(message(1, 10), [fd])
        for _ in range(10):
            await asyncio.sleep(0)
        assert all(map(_is_open, waiting))
        await stuck.close()
        assert not any(map(_is_open, waiting))
        late = os.dup(inside)
        stuck.session.send(message(1, 10), [late])  # to a connection that has ended
        assert not _is_open(late)
        os.close(inside)
        await ends.close()

    run(scenario)


def test_closing_twice_closes_the_pidfd_once() -> None:
    async def scenario() -> None:
        ours, far = socket.socketpair()
        pidfd = os.pidfd_open(os.getpid())
        session = Session(ours, pidfd, Budget(1, ""), Budget(1, ""))
        session.close()
        session.close()
        assert not _is_open(pidfd)
        ours, pidfd = far, os.pidfd_open(os.getpid())
        session = Session(ours, pidfd, Budget(1, ""), Budget(1, ""))
        assert session.take_pidfd() == pidfd
        session.close()
        assert _is_open(pidfd)
        os.close(pidfd)

    run(scenario)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
