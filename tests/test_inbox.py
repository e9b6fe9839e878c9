from __future__ import annotations

import array
import os
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightstore import wire
from weightstore.errors import ProtocolError
from weightstore.inbox import MAX_FDS, Inbox


def welcome(number: int, fds: int = 1) -> wire.Welcome:
    return wire.Welcome(id=number, arena="a", capacity=1, window=1, nbytes=1, server="s", pid=1, fds=fds)


def rights(fds: list[int]) -> list[tuple[int, int, bytes]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())]


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**40), max_size=8), st.lists(st.integers(1, 40), max_size=60))
def test_messages_come_out_whole_however_the_bytes_are_cut(ids: list[int], cuts: list[int]) -> None:
    stream = b"".join(wire.frame(wire.Committed(id=i, version=i)) for i in ids)
    inbox = Inbox("peer", 1000)
    got: list[int] = []
    for cut in [*cuts, len(stream)]:
        got += [message.version for message, _ in inbox.take(stream[:cut])]
        stream = stream[cut:]
    assert got == ids


def test_descriptors_go_to_the_frames_that_announce_them() -> None:
    pipes = [os.pipe() for _ in range(2)]
    fds = [fd for pipe in pipes for fd in pipe]
    inbox = Inbox("peer", 1000)
    inbox.take_fds(rights(fds[:2]), False)
    stream = wire.frame(welcome(1)) + wire.frame(wire.Done(id=2)) + wire.frame(welcome(3))
    assert [(m.id, f) for m, f in inbox.take(stream)] == [(1, [fds[0]]), (2, []), (3, [fds[1]])]
    inbox.take_fds(rights(fds[2:]), False)
    inbox.close()
    inbox.close()
    for fd in fds[2:]:
        with pytest.raises(OSError):
            os.fstat(fd)
    for fd in fds[:2]:
        os.close(fd)


@pytest.mark.parametrize("count", [1, -1, 2**62])
def test_a_false_count_of_descriptors_is_refused(count: int) -> None:
    with pytest.raises(ProtocolError):
        list(Inbox("peer", 1000).take(wire.frame(welcome(1, fds=count))))


def test_more_descriptors_than_any_frame_needs_are_refused_and_closed() -> None:
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(MAX_FDS + 1)]
    inbox = Inbox("peer", 1000)
    with pytest.raises(ProtocolError, match=str(MAX_FDS)):
        inbox.take_fds(rights(fds), False)
    inbox.close()
    with pytest.raises(OSError):
        os.fstat(fds[0])


def test_truncated_ancillary_data_is_refused() -> None:
    with pytest.raises(ProtocolError):
        Inbox("peer", 1000).take_fds([], True)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_messages_or_a_protocol_error(data: bytes) -> None:
    inbox = Inbox("peer", 1 << 20)
    try:
        messages = [message for message, _ in inbox.take(data)]
    except ProtocolError:
        return
    assert all(isinstance(message.id, int) for message in messages if not isinstance(message, wire.Unasked))
