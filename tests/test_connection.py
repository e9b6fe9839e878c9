"""The connection against a scripted peer on a real socket."""

from __future__ import annotations

import gc
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_store import PATIENCE, FakeArena, FakeStore

from weightstore import wire
from weightstore.connection import Connection
from weightstore.errors import (
    AccessDenied,
    ArenaFull,
    ProtocolError,
    StoreGone,
    StoreTimeout,
    UnknownModel,
    UsageError,
    WeightstoreError,
)


class Client:
    """A connection, and what its callbacks were told."""

    def __init__(self, path: str) -> None:
        self.offers: list[wire.Offer] = []
        self.lost: list[WeightstoreError] = []
        self.changed = threading.Condition()
        self.connection = Connection.open(path, PATIENCE, self.on_offer, self.on_lost)

    def on_offer(self, connection: Connection, offer: wire.Offer) -> None:
        self._note(self.offers, offer)

    def on_lost(self, connection: Connection, error: WeightstoreError) -> None:
        self._note(self.lost, error)

    def _note(self, where: list[Any], what: Any) -> None:
        with self.changed:
            where.append(what)
            self.changed.notify_all()

    def wait(self, where: list[Any]) -> Any:
        with self.changed:
            assert self.changed.wait_for(lambda: bool(where), PATIENCE)
            return where[0]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FakeStore]:
    arena = FakeArena()
    store = FakeStore(tmp_path / "s", arena)
    yield store
    store.close()
    arena.close()


@pytest.fixture
def client(store: FakeStore) -> Iterator[Client]:
    client = Client(store.path)
    yield client
    client.connection.close()


def hello() -> wire.Hello:
    return wire.Hello(id=0, protocol=wire.PROTOCOL)


def status_request() -> wire.GetStatus:
    return wire.GetStatus(id=0)


def offer(version: int = 2) -> wire.Offer:
    return wire.Offer(lease=1, version=version, torn=False, records=wire.encode_records([]))


def open_fds() -> set[str]:
    gc.collect()
    return set(os.listdir("/proc/self/fd"))


def test_replies_find_their_requests_whatever_their_order(store: FakeStore, client: Client) -> None:
    held: list[wire.WaitFor] = []
    both = threading.Barrier(2, timeout=PATIENCE)

    def answer(request: wire.WaitFor) -> bytes | None:
        held.append(request)
        if len(held) < 2:
            return None
        return b"".join(wire.frame(wire.VersionIs(id=r.id, version=r.after + 1)) for r in reversed(held))

    store.answers[wire.WaitFor] = answer
    results: dict[int, int] = {}

    def ask(after: int) -> None:
        both.wait()
        request = wire.WaitFor(id=0, model="m", tag="t", after=after)
        results[after] = client.connection.request(request, wire.VersionIs).version

    threads = [threading.Thread(target=ask, args=(after,)) for after in (10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert results == {10: 11, 20: 21}


def test_a_failure_is_raised_as_the_class_it_had(store: FakeStore, client: Client) -> None:
    store.answers[wire.GetStatus] = lambda r: wire.Failed(
        id=r.id, error="ArenaFull", message="no room", details={"needed": 7}
    )
    with pytest.raises(ArenaFull, match="no room") as caught:
        client.connection.request(status_request(), wire.Status)
    assert caught.value.details == {"needed": 7}


def test_a_descriptor_comes_with_its_reply_and_is_close_on_exec(store: FakeStore, client: Client) -> None:
    welcome, fd = client.connection.request_fd(hello(), wire.Welcome)
    try:
        assert os.fstat(fd).st_size == welcome.nbytes
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


def test_descriptors_nobody_wants_are_closed(store: FakeStore, client: Client) -> None:
    client.connection.request(hello(), wire.Welcome)
    before = open_fds()
    for _ in range(5):
        client.connection.request(hello(), wire.Welcome)
    assert open_fds() == before


def test_offers_arrive_in_order_between_replies(store: FakeStore) -> None:
    seen: list[str] = []
    store.answers[wire.ReleaseLease] = lambda r: (
        wire.frame(offer(1)) + wire.frame(wire.Done(id=r.id)) + wire.frame(offer(2))
    )
    connection = Connection.open(
        store.path, PATIENCE, lambda _, o: seen.append(f"offer {o.version}"), lambda *_: None
    )
    connection.request(wire.ReleaseLease(id=0, lease=1), wire.Done, on_reply=lambda _: seen.append("reply"))
    connection.request(wire.Drained(id=0), wire.Done)
    assert seen == ["offer 1", "reply", "offer 2"]
    connection.close()


def test_the_end_of_the_stream_releases_every_waiter(store: FakeStore, client: Client) -> None:
    store.answers[wire.GetStatus] = lambda r: None
    errors: list[WeightstoreError] = []

    def ask() -> None:
        try:
            client.connection.request(status_request(), wire.Status)
        except WeightstoreError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    store.wait(wire.GetStatus, 3)
    store.drop()
    for thread in threads:
        thread.join(PATIENCE)
    assert [type(e) for e in errors] == [StoreGone] * 3
    assert len({id(e) for e in errors}) == 3
    assert store.path in errors[0].message and "weightstore serve" in errors[0].message
    assert isinstance(client.wait(client.lost), StoreGone)
    assert client.connection.lost
    with pytest.raises(StoreGone):
        client.connection.request(status_request(), wire.Status)
    client.connection.post(wire.Drained(id=0), wire.Done)  # has nobody to go to, and says nothing


@pytest.mark.parametrize(
    ("garbage", "complaint"),
    [
        (b"\x00\x00\x00\x00", "0 bytes announced"),
        (b"\xff\xff\xff\xff", "announced"),
        (b"\x04\x00\x00\x00\xc1\xc1\xc1\xc1", "malformed"),
        (b"\x01\x00\x00\x00\x90", "malformed"),
        (wire.frame(wire.Done(id=99)), "never made"),
        (wire.frame(wire.Hello(id=1, protocol=1)), "malformed"),
    ],
)
def test_garbage_ends_the_connection_and_tells_everyone(
    store: FakeStore, client: Client, garbage: bytes, complaint: str
) -> None:
    store.answers[wire.GetStatus] = lambda r: garbage
    with pytest.raises(ProtocolError, match=complaint):
        client.connection.request(status_request(), wire.Status)
    assert isinstance(client.wait(client.lost), ProtocolError)


def test_a_frame_above_the_cap_is_refused_before_it_is_read(store: FakeStore) -> None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(store.path)
    connection = Connection(sock, store.path, lambda *_: None, lambda *_: None, cap=1000)
    store.answers[wire.GetStatus] = lambda r: (1001).to_bytes(4, "little")
    with pytest.raises(ProtocolError, match="1001 bytes announced; allowed are 1 to 1000"):
        connection.request(status_request(), wire.Status)
    connection.close()


def test_a_reply_of_another_kind_is_a_protocol_error(store: FakeStore, client: Client) -> None:
    with pytest.raises(ProtocolError, match="answered Done, not Status"):
        client.connection.request(status_request(), wire.Status)
    client.wait(client.lost)


def test_announced_descriptors_that_do_not_come_are_a_protocol_error(
    store: FakeStore, client: Client
) -> None:
    store.answers[wire.Hello] = lambda r: store.welcome(r)[0]
    with pytest.raises(ProtocolError, match="announced 1 descriptors and sent 0"):
        client.connection.request_fd(hello(), wire.Welcome)


def test_too_many_descriptors_are_a_protocol_error_and_none_leaks(store: FakeStore, client: Client) -> None:
    client.connection.request(wire.Drained(id=0), wire.Done)
    before = open_fds()
    store.push(wire.frame(offer()), [store.arena.reader() for _ in range(40)])
    assert isinstance(client.wait(client.lost), ProtocolError)
    client.connection.close()
    assert open_fds() <= before


def test_the_stores_parting_words_are_the_reason(store: FakeStore, client: Client) -> None:
    store.answers[wire.GetStatus] = lambda r: wire.Failed(id=0, error="AccessDenied", message="uid 7 may not")
    with pytest.raises(AccessDenied, match="uid 7 may not"):
        client.connection.request(status_request(), wire.Status)


def test_a_timeout_leaves_the_connection_usable_and_undoes_a_late_reply(
    store: FakeStore, client: Client
) -> None:
    late: list[wire.GetStatus] = []
    store.answers[wire.GetStatus] = lambda r: late.append(r)  # type: ignore[func-returns-value]
    undone = threading.Event()
    with pytest.raises(StoreTimeout, match=r"did not answer GetStatus within 0\.01 s"):
        client.connection.request(status_request(), wire.Done, timeout=0.01, undo=lambda _: undone.set())
    store.wait(wire.GetStatus)
    assert not undone.is_set()
    store.push(wire.Done(id=late[0].id))
    assert undone.wait(PATIENCE)
    client.connection.request(wire.Drained(id=0), wire.Done)


def test_a_descriptor_that_comes_too_late_is_closed(store: FakeStore, client: Client) -> None:
    late: list[wire.Hello] = []
    store.answers[wire.Hello] = lambda r: late.append(r)  # type: ignore[func-returns-value]
    with pytest.raises(StoreTimeout):
        client.connection.request_fd(hello(), wire.Welcome, timeout=0.01)
    store.wait(wire.Hello)
    before = open_fds()
    store.push(*store.welcome(late[0]))
    client.connection.request(wire.Drained(id=0), wire.Done)
    assert open_fds() == before


def test_posting_works_on_the_io_thread_and_requesting_there_is_refused(store: FakeStore) -> None:
    outcome: list[object] = []
    told = threading.Event()

    def on_offer(connection: Connection, offer: wire.Offer) -> None:
        connection.post(wire.TakeOffer(id=0, lease=offer.lease, version=offer.version), wire.Done)
        try:
            connection.request(wire.Drained(id=0), wire.Done)
        except UsageError as error:
            outcome.append(error)
        told.set()

    connection = Connection.open(store.path, PATIENCE, on_offer, lambda *_: None)
    connection.request(wire.Drained(id=0), wire.Done)
    store.push(offer(5))
    assert store.wait(wire.TakeOffer)[0].version == 5
    assert told.wait(PATIENCE)
    assert "another thread" in str(outcome[0])
    connection.close()


def test_a_refused_post_is_reported_to_its_callback(store: FakeStore, client: Client) -> None:
    store.answers[wire.TakeOffer] = lambda r: wire.Failed(id=r.id, error="UnknownModel", message="gone")
    refused: list[WeightstoreError] = []
    client.connection.post(wire.TakeOffer(id=0, lease=1, version=1), wire.Done, on_failed=refused.append)
    client.connection.request(wire.Drained(id=0), wire.Done)
    assert [type(e) for e in refused] == [UnknownModel]


def test_frames_larger_than_the_socket_takes_go_out_while_replies_come_in(
    store: FakeStore, client: Client
) -> None:
    # The peer answers nothing before it has the whole frame, and offers flood in meanwhile.
    writes = [wire.Write(f"transformer.{i:06d}.weight") for i in range(60_000)]
    seen: list[int] = []

    def answer(request: wire.CommitRefit) -> wire.Message:
        seen.append(len(request.writes))
        for i in range(200):
            store.push(offer(i))
        return wire.Committed(id=request.id, version=9)

    store.answers[wire.CommitRefit] = answer
    client.connection.request(wire.Drained(id=0), wire.Done)
    threads = [
        threading.Thread(target=lambda: client.connection.request(wire.Drained(id=0), wire.Done))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    reply = client.connection.request(wire.CommitRefit(id=0, refit=1, writes=writes), wire.Committed)
    for thread in threads:
        thread.join(PATIENCE)
    assert (reply.version, seen, len(client.offers)) == (9, [60_000], 200)


def test_closing_joins_the_thread_releases_waiters_and_is_idempotent(
    store: FakeStore, client: Client
) -> None:
    store.answers[wire.GetStatus] = lambda r: None
    errors: list[WeightstoreError] = []

    def ask() -> None:
        try:
            client.connection.request(status_request(), wire.Status)
        except WeightstoreError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    store.wait(wire.GetStatus)
    before = threading.active_count()
    client.connection.close()
    client.connection.close()
    thread.join(PATIENCE)
    assert threading.active_count() <= before - 1
    assert "closed here" in errors[0].message
    assert client.lost == []  # it was no loss


def test_nobody_listening_is_store_gone_with_what_to_do(tmp_path: Path) -> None:
    path = str(tmp_path / "nobody")
    with pytest.raises(StoreGone, match="No such file") as caught:
        Connection.open(path, 1.0, lambda *_: None, lambda *_: None)
    assert f"weightstore serve --socket {path}" in caught.value.message


def test_a_fork_cannot_use_the_connection_and_does_not_keep_it_open(store: FakeStore, client: Client) -> None:
    client.connection.request(wire.Drained(id=0), wire.Done)
    inside, outside = os.pipe()
    go_in, go_out = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            client.connection.request(wire.Drained(id=0), wire.Done)
        except UsageError as error:
            os.write(outside, error.message.encode())
        client.connection.close()
        os.read(go_in, 1)
        os._exit(0)
    try:
        message = os.read(inside, 4096).decode()
        assert f"belongs to process {os.getpid()}" in message and "connect() in the child" in message
        client.connection.request(wire.Drained(id=0), wire.Done)  # the parent's goes on
        # The child still lives; the store sees the parent's end nevertheless.
        client.connection.close()
        store.wait_ended()
    finally:
        os.write(go_out, b"x")
        os.waitpid(pid, 0)
        for fd in (inside, outside, go_in, go_out):
            os.close(fd)
