"""The promise that nothing is landing: when it is given, and when not yet."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_store import PATIENCE, FakeArena, FakeStore, record
from processes import Service

import weightstore.copies
from weightstore import wire
from weightstore.client import Store
from weightstore.errors import ArenaUnusable, StoreGone, StoreTimeout


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeStore]:
    arena = FakeArena()
    fake = FakeStore(tmp_path / "s", arena)
    targets = [record("t.w", 0, (3,))]
    fake.answers[wire.OpenRefit] = lambda r: (
        wire.RefitOpened(
            id=r.id, refit=5, base=1, base_records=wire.encode_records(targets), targets=targets
        ),
        [arena.writer()],
    )
    yield fake
    fake.close()
    arena.close()


@pytest.fixture
def store(fake: FakeStore) -> Iterator[Store]:
    with Store(fake.path, PATIENCE) as store:
        store.link.connect()
        yield store


def promises(fake: FakeStore, store: Store) -> int:
    """How often Drained has been said, not counting the asking that `fake.lose` does."""
    store.link.connect()
    return len(fake.of(wire.Drained))


def test_the_first_connection_promises_nothing(fake: FakeStore, store: Store) -> None:
    assert promises(fake, store) == 0


def test_every_reconnection_promises_once(fake: FakeStore, store: Store) -> None:
    fake.lose(store.link)
    before = len(fake.of(wire.Drained))
    assert promises(fake, store) == before + 1
    assert promises(fake, store) == before + 1


def test_the_promise_waits_for_copies(fake: FakeStore, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    refit = store.refit("m")
    copying, go_on = threading.Event(), threading.Event()
    real = weightstore.copies.copy_all

    def slow(pairs: Any, mapping: Any) -> None:
        copying.set()
        assert go_on.wait(PATIENCE)
        real(pairs, mapping)

    monkeypatch.setattr(weightstore.copies, "copy_all", slow)
    putting = threading.Thread(target=refit.put, args=("t.w", torch.ones(3)))
    putting.start()
    assert copying.wait(PATIENCE)
    fake.lose(store.link)
    before = len(fake.of(wire.Drained))
    coming = threading.Thread(target=store.link.connect)
    coming.start()
    fake.wait(wire.Hello, 2)
    coming.join(0.05)
    assert coming.is_alive() and len(fake.of(wire.Drained)) == before
    go_on.set()
    coming.join(PATIENCE)
    putting.join(PATIENCE)
    assert len(fake.of(wire.Drained)) == before + 1
    with pytest.raises(StoreGone):
        refit.put("t.w", torch.ones(3))  # and none begins afterwards


def test_a_view_puts_the_promise_off_until_its_owner_knows(fake: FakeStore, store: Store) -> None:
    refit = store.refit("m")
    view = refit.view("t.w")
    fake.lose(store.link)
    before = len(fake.of(wire.Drained))
    assert promises(fake, store) == before
    view.fill_(1.0)  # somebody who does not know yet may do this
    refit.abort()
    assert promises(fake, store) == before + 1


def test_an_owner_who_knew_first_does_not_put_it_off(fake: FakeStore, store: Store) -> None:
    with pytest.raises(StoreGone), store.refit("m") as refit:
        refit.view("t.w").fill_(1.0)
        fake.lose(store.link)
        before = len(fake.of(wire.Drained))
        refit.commit()
    assert promises(fake, store) == before + 1


def test_a_promise_that_did_not_arrive_is_made_again(fake: FakeStore, store: Store) -> None:
    fake.lose(store.link)
    fake.answers[wire.Drained] = lambda r: fake.drop()  # type: ignore[func-returns-value]
    with pytest.raises(StoreGone):
        store.link.connect()
    del fake.answers[wire.Drained]
    before = len(fake.of(wire.Drained))
    assert promises(fake, store) == before + 1


def test_a_refit_whose_opener_stopped_waiting_is_aborted(fake: FakeStore, store: Store) -> None:
    late: list[wire.OpenRefit] = []
    opening = fake.answers[wire.OpenRefit]
    fake.answers[wire.OpenRefit] = late.append
    connection = store.link.connect()
    real = connection.request_fd
    connection.request_fd = lambda *a, **k: real(*a, timeout=0.01, **k)  # type: ignore[method-assign, assignment]
    with pytest.raises(StoreTimeout):
        store.refit("m")
    fake.wait(wire.OpenRefit)
    fake.push(*opening(late[0]))  # type: ignore[misc]
    assert fake.wait(wire.AbortRefit)[0].refit == 5


def test_the_space_of_a_refit_that_died_with_the_store_comes_back(tmp_path: Path) -> None:
    with Service(tmp_path) as service, service.connect() as store:
        with store.refit("m") as refit:
            refit.put("t.w", torch.ones(1000))
        with pytest.raises(StoreGone), store.refit("m") as refit:
            refit.put("t.w", torch.zeros(1000))
            service.kill()
            service.start()
            refit.commit()
        arena = store.status().arena
        assert (arena.pending, arena.quarantined) == (0, 0)
        with store.lease("m") as snapshot:
            assert (snapshot.version, snapshot["t.w"].sum().item()) == (1, 1000)


def test_a_refit_that_cannot_be_mapped_does_not_stay_open(fake: FakeStore, store: Store) -> None:
    elsewhere = FakeArena()
    fake.answers[wire.OpenRefit] = lambda r: (
        wire.RefitOpened(id=r.id, refit=5, base=0, base_records=wire.encode_records([]), targets=[]),
        [elsewhere.writer()],
    )
    with pytest.raises(ArenaUnusable):
        store.refit("m")
    assert [request.refit for request in fake.wait(wire.AbortRefit)] == [5]
    elsewhere.close()
