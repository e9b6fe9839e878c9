"""How a client finds its store again."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_store import PATIENCE, FakeArena, FakeStore

from weightstore import link as link_module
from weightstore import wire
from weightstore.connection import Connection
from weightstore.errors import AccessDenied, ArenaUnusable, ProtocolError, StoreGone, StoreSilent, UsageError
from weightstore.link import Link, client_name


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeStore]:
    arena = FakeArena()
    fake = FakeStore(tmp_path / "s", arena)
    yield fake
    fake.close()
    arena.close()


class Watched:
    """A link, what greeted through it, and whether anybody wants it back."""

    def __init__(self, path: str, timeout: float = PATIENCE) -> None:
        self.greeted: list[tuple[Connection, bool]] = []
        self.wanted = False
        self.refuse: Exception | None = None
        self.link = Link(path, timeout, lambda *_: None, self.greet, lambda: self.wanted)

    def greet(self, connection: Connection, same: bool) -> None:
        if self.refuse is not None:
            raise self.refuse
        connection.request(wire.Drained(id=0), wire.Done)
        self.greeted.append((connection, same))


@pytest.fixture
def watched(fake: FakeStore) -> Iterator[Watched]:
    watched = Watched(fake.path)
    yield watched
    watched.link.close()


def test_one_connection_is_shared_and_greeted_first(fake: FakeStore, watched: Watched) -> None:
    assert watched.link.connection is None
    first = watched.link.connect()
    assert watched.link.connect() is first is watched.link.connection
    assert watched.greeted == [(first, True)]
    assert fake.of(wire.Hello)[0].client == client_name()


def test_every_thread_gets_the_same_connection(fake: FakeStore, watched: Watched) -> None:
    together = threading.Barrier(8, timeout=PATIENCE)
    got: list[Connection] = []

    def connect() -> None:
        together.wait()
        got.append(watched.link.connect())

    threads = [threading.Thread(target=connect) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(got) == 8 and len(set(map(id, got))) == len(fake.of(wire.Hello)) == 1


def test_nothing_comes_back_by_itself_unless_wanted(fake: FakeStore, watched: Watched) -> None:
    first = watched.link.connect()
    fake.lose(watched.link)
    assert watched.link._reviver is None
    second = watched.link.connect()
    assert second is not first and len(watched.greeted) == 2


def test_who_is_wanted_comes_back_by_itself_when_the_store_does(fake: FakeStore, watched: Watched) -> None:
    watched.wanted = True
    watched.link.connect()
    fake.stop()
    fake.start()
    fake.wait(wire.Hello, 2)
    assert watched.link.connect() is watched.link.connection
    assert [same for _, same in watched.greeted] == [True, True]
    hellos = fake.of(wire.Hello)
    assert hellos[0].instance == hellos[1].instance != ""


def test_it_goes_on_trying_ever_more_slowly(
    fake: FakeStore, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "FIRST_RETRY", 0.001)
    monkeypatch.setattr(link_module, "LAST_RETRY", 0.01)
    watched.wanted = True
    watched.link.connect()
    watched.refuse = ProtocolError("not yet")
    fake.drop()
    fake.wait(wire.Hello, 6)
    assert watched.link.connection is None
    watched.refuse = None
    assert watched.link.connect() is not None


def test_a_greeting_that_fails_is_no_connection(fake: FakeStore, watched: Watched) -> None:
    watched.refuse = StoreGone("went again")
    with pytest.raises(StoreGone, match="went again"):
        watched.link.connect()
    assert watched.link.connection is None
    fake.wait_ended()


def test_requests_with_nobody_there_fail_after_one_attempt(fake: FakeStore, watched: Watched) -> None:
    fake.stop()
    with pytest.raises(StoreGone, match=f"weightstore serve --socket {fake.path}"):
        watched.link.connect()
    fake.start()
    watched.link.connect()


def test_a_store_that_does_not_answer_the_greeting_is_silent(fake: FakeStore) -> None:
    fake.answers[wire.Hello] = lambda r: None
    watched = Watched(fake.path, timeout=0.05)
    with pytest.raises(StoreSilent, match=r"did not answer Hello.*stopped or overloaded"):
        watched.link.connect()
    watched.link.close()


def test_a_store_that_refuses_says_why(fake: FakeStore, watched: Watched) -> None:
    fake.answers[wire.Hello] = lambda r: wire.Failed(id=0, error="AccessDenied", message="uid 7 may not")
    with pytest.raises(AccessDenied, match="uid 7"):
        watched.link.connect()


def test_an_arena_that_is_not_what_was_promised_is_refused(fake: FakeStore, watched: Watched) -> None:
    def lie(hello: wire.Hello) -> tuple[wire.Message, list[int]]:
        other = FakeArena()
        fd = other.reader()
        other.close()
        return fake.welcome(hello)[0], [fd]

    fake.answers[wire.Hello] = lie
    with pytest.raises(ArenaUnusable):
        watched.link.connect()


def test_the_mapping_stays_while_the_arena_does(fake: FakeStore, watched: Watched) -> None:
    watched.link.connect()
    mapping = watched.link.mapping
    fake.lose(watched.link)
    watched.link.connect()
    assert watched.link.mapping is mapping
    other = FakeArena()
    fake.arena = other
    fake.lose(watched.link)
    watched.link.connect()
    assert watched.link.mapping is not mapping and not mapping.closed
    assert [same for _, same in watched.greeted] == [True, True, False]
    other.close()


def test_the_writers_mapping_is_made_once_and_its_descriptor_closed(
    fake: FakeStore, watched: Watched
) -> None:
    watched.link.connect()
    fds = [fake.arena.writer() for _ in range(2)]
    first, second = (watched.link.open_writer(fd) for fd in fds)
    assert first is second and first.writable
    for fd in fds:
        with pytest.raises(OSError):
            os.fstat(fd)


def test_while_down_runs_only_while_down(fake: FakeStore, watched: Watched) -> None:
    ran: list[int] = []
    assert watched.link.while_down(lambda: ran.append(1))
    watched.link.connect()
    assert not watched.link.while_down(lambda: ran.append(2))
    assert ran == [1]


def test_closing_ends_every_connection_and_thread(fake: FakeStore, watched: Watched) -> None:
    before = set(threading.enumerate())
    fake.answers[wire.WaitFor] = lambda r: None
    watched.link.connect()
    errors: list[Exception] = []

    def wait() -> None:
        try:
            with watched.link.separate() as connection:
                connection.request(wire.WaitFor(id=0, model="m", tag="t"), wire.VersionIs)
        except StoreGone as error:
            errors.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    fake.wait(wire.WaitFor)
    watched.link.close()
    watched.link.close()
    waiter.join(PATIENCE)
    assert len(errors) == 1
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("weightstore")]
    for use in (watched.link.connect, lambda: watched.link.mapping):
        with pytest.raises(UsageError, match="closed"):
            use()


def test_closing_while_away_ends_the_attempts(fake: FakeStore, watched: Watched) -> None:
    before = set(threading.enumerate())
    watched.wanted = True
    watched.link.connect()
    fake.stop()
    watched.link.close()
    assert not [t for t in set(threading.enumerate()) - before if t.name == "weightstore-reconnect"]


def test_a_fork_is_told_to_connect_itself(fake: FakeStore, watched: Watched) -> None:
    watched.link.connect()
    inside, outside = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            watched.link.connect()
        except UsageError as error:
            os.write(outside, error.message.encode())
        watched.link.close()
        os._exit(0)
    os.waitpid(pid, 0)
    assert b"connect() in the child" in os.read(inside, 1000)
    os.close(inside)
    os.close(outside)
    watched.link.connect().request(wire.Drained(id=0), wire.Done)


def test_a_client_is_named_after_its_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/opt/train/train.py", "--lr"])
    assert client_name() == "train.py"
    monkeypatch.setattr("sys.argv", ["-c"])
    assert client_name().startswith("python")
