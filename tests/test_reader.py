"""Leases, step by step against a scripted store, then against the service, dead and alive."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_store import PATIENCE, FakeArena, FakeStore, record
from processes import Service, eventually

from weightstore import wire
from weightstore.client import Store
from weightstore.connection import Connection
from weightstore.errors import LeaseLost, ProtocolError, StoreGone, TagTorn, UsageError, VersionInUse
from weightstore.reader import Lease
from weightstore.types import TensorRecord

OLD = [record("t.w", 0)]
NEW = [record("t.w", 256)]
LEASE = 11


@pytest.fixture
def arena() -> Iterator[FakeArena]:
    arena = FakeArena()
    yield arena
    arena.close()


@pytest.fixture
def fake(tmp_path: Path, arena: FakeArena) -> Iterator[FakeStore]:
    fake = FakeStore(tmp_path / "s", arena)
    fake.answers[wire.OpenLease] = grant
    yield fake
    fake.close()


@pytest.fixture
def store(fake: FakeStore) -> Iterator[Store]:
    with Store(fake.path, PATIENCE) as store:
        yield store


def grant(request: Any, version: int = 1, records: list[TensorRecord] = OLD) -> wire.LeaseGranted:
    return wire.LeaseGranted(
        id=request.id, lease=LEASE, version=version, records=wire.encode_records(records)
    )


def state(
    request: Any, version: int = 1, torn: bool = False, records: list[TensorRecord] | None = None
) -> wire.LeaseState:
    return wire.LeaseState(id=request.id, version=version, torn=torn, records=wire.encode_records(records))


def offer(
    version: int, torn: bool = False, records: list[TensorRecord] | None = NEW, lease: int = LEASE
) -> wire.Offer:
    return wire.Offer(lease=lease, version=version, torn=torn, records=wire.encode_records(records))


def hear(fake: FakeStore, store: Store, message: wire.Message) -> None:
    """Send something unasked and come back when the client has looked at it."""
    fake.push(message)
    store.link.connect().request(wire.Drained(id=0), wire.Done)


def follow(fake: FakeStore, store: Store, on_offer: Callable[[Lease], None] | None = None) -> Lease:
    fake.answers[wire.ParkLease] = lambda r: state(r)
    return store.lease("m", follow=True, on_offer=on_offer)


# -- an awake reader --------------------------------------------------------------------------------


def test_a_lease_shows_its_version_and_ends_with_its_block(fake: FakeStore, store: Store) -> None:
    with store.lease("m", tag="policy") as snapshot:
        assert (snapshot.model, snapshot.version, dict(snapshot.records)) == ("m", 1, {"t.w": OLD[0]})
        assert snapshot["t.w"].shape == (4,)
    assert [r.lease for r in fake.of(wire.ReleaseLease)] == [LEASE]
    with pytest.raises(LeaseLost, match="released"):
        snapshot["t.w"]


def test_releasing_twice_is_one_release(fake: FakeStore, store: Store) -> None:
    lease = store.lease("m")
    lease.release()
    lease.release()
    assert lease.released and len(fake.of(wire.ReleaseLease)) == 1


def test_an_offer_waits_until_its_reader_advances(fake: FakeStore, store: Store) -> None:
    called: list[Lease] = []
    lease = follow(fake, store, called.append)
    snapshot = lease.snapshot
    assert not lease.advance()
    hear(fake, store, offer(2))
    assert called == [lease] and lease.pending == 2
    assert (lease.version, snapshot["t.w"].shape) == (1, (4,))  # nothing moves by itself
    assert lease.advance()
    assert fake.of(wire.TakeOffer)[0].version == 2
    assert (lease.version, lease.pending, dict(lease.records)) == (2, None, {"t.w": NEW[0]})
    with pytest.raises(LeaseLost, match=r"shows version 1 .* has moved on to 2"):
        snapshot["t.w"]
    assert lease.snapshot.version == 2


def test_a_newer_offer_replaces_one_not_taken(fake: FakeStore, store: Store) -> None:
    lease = follow(fake, store)
    hear(fake, store, offer(2))
    hear(fake, store, offer(3))
    assert lease.pending == 3
    lease.advance()
    assert [taken.version for taken in fake.of(wire.TakeOffer)] == [3]


def test_the_callback_may_advance_and_may_not_ask_the_store(fake: FakeStore, store: Store) -> None:
    errors: list[Exception] = []

    def on_offer(lease: Lease) -> None:
        lease.advance()
        for ask in (lease.park, store.status):
            try:
                ask()
            except UsageError as error:
                errors.append(error)

    lease = follow(fake, store, on_offer)
    hear(fake, store, offer(2))
    assert lease.version == 2
    fake.wait(wire.TakeOffer)
    assert len(errors) == 2 and "another thread" in str(errors[0])


def test_a_callback_that_fails_harms_nobody(
    fake: FakeStore, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    def on_offer(lease: Lease) -> None:
        raise RuntimeError("in the user's callback")

    lease = follow(fake, store, on_offer)
    hear(fake, store, offer(2))
    assert lease.advance()
    assert "in the user's callback" in caplog.text


def test_offers_for_a_lease_just_released_are_ignored(fake: FakeStore, store: Store) -> None:
    lease = follow(fake, store)
    lease.release()
    hear(fake, store, offer(2))
    assert fake.of(wire.TakeOffer) == []


# -- a sleeping reader ------------------------------------------------------------------------------


def test_parked_takes_offers_at_once_without_its_owners_thread(fake: FakeStore, store: Store) -> None:
    called: list[Lease] = []
    lease = follow(fake, store, called.append)
    lease.park()
    # This thread only waits for the answer to reach the store: nobody calls anything.
    fake.push(offer(2))
    assert fake.wait(wire.TakeOffer)[0].version == 2
    fake.lose(store.link, stop=True)
    assert (lease.version, dict(lease.records), lease.pending) == (2, {"t.w": NEW[0]}, None)
    assert called == []


def test_the_answer_to_an_offer_does_not_wait_for_its_reply(fake: FakeStore, store: Store) -> None:
    lease = follow(fake, store)
    lease.park()
    fake.answers[wire.TakeOffer] = lambda r: None
    for version in (2, 3, 4):
        hear(fake, store, offer(version))
    assert [taken.version for taken in fake.wait(wire.TakeOffer, 3)] == [2, 3, 4]
    assert lease.version == 4


def test_parking_takes_what_was_pending(fake: FakeStore, store: Store) -> None:
    lease = follow(fake, store)
    hear(fake, store, offer(2))
    lease.park()
    assert fake.wait(wire.TakeOffer)[0].version == 2
    assert (lease.parked, lease.version, lease.pending) == (True, 2, None)


def test_a_parked_lease_shows_no_bytes(fake: FakeStore, store: Store) -> None:
    lease = follow(fake, store)
    snapshot = lease.snapshot
    lease.park()
    for use in (lambda: snapshot["t.w"], lambda: lease.snapshot):
        with pytest.raises(UsageError, match=r"parked.*unpark"):
            use()
    lease.unpark()
    assert snapshot["t.w"].shape == (4,)


def test_unparking_moves_to_the_newest_in_one_round_trip(fake: FakeStore, store: Store) -> None:
    lease = follow(fake, store)
    lease.park()
    fake.answers[wire.ParkLease] = lambda r: state(r, version=5, records=NEW)
    before = len(fake.received)
    lease.unpark()
    assert len(fake.received) == before + 1
    assert (lease.version, lease.snapshot.version, dict(lease.records)) == (5, 5, {"t.w": NEW[0]})


def test_an_offer_older_than_the_unparking_is_void(fake: FakeStore, store: Store) -> None:
    lease = follow(fake, store)
    hear(fake, store, offer(2))
    fake.answers[wire.ParkLease] = lambda r: state(r, version=3, records=NEW)
    lease.unpark()
    assert (lease.version, lease.pending) == (3, None)


def test_only_following_leases_park(fake: FakeStore, store: Store) -> None:
    with pytest.raises(UsageError, match="follow=True"):
        store.lease("m").park()


# -- torn -------------------------------------------------------------------------------------------


def test_a_torn_offer_is_acknowledged_and_reading_refused_until_one_heals_it(
    fake: FakeStore, store: Store
) -> None:
    lease = follow(fake, store)
    lease.park()
    hear(fake, store, offer(1, torn=True, records=OLD))
    assert fake.wait(wire.TakeOffer)[0].version == 1
    assert lease.torn
    fake.answers[wire.ParkLease] = lambda r: state(r, version=1, torn=not r.parked)
    with pytest.raises(TagTorn, match=r"tag 'latest' of 'm' is torn.*new refit.*load the model again"):
        lease.unpark()
    assert lease.parked  # and the store is told so: it goes on as with any sleeping holder
    assert [r.parked for r in fake.wait(wire.ParkLease, 3)] == [True, False, True]
    with pytest.raises(TagTorn):
        lease.require_readable(1)
    hear(fake, store, offer(2))
    assert not lease.torn and lease.version == 2
    fake.answers[wire.ParkLease] = lambda r: state(r, version=2)
    lease.unpark()
    assert lease.snapshot.version == 2


def test_torn_is_believed_with_the_store_away(fake: FakeStore, store: Store) -> None:
    lease = follow(fake, store)
    lease.park()
    hear(fake, store, offer(1, torn=True, records=None))
    fake.lose(store.link, stop=True)
    with pytest.raises(TagTorn):
        lease.unpark()
    assert lease.parked


# -- the store goes and comes -----------------------------------------------------------------------


def test_park_unpark_advance_and_reading_work_with_the_store_away(fake: FakeStore, store: Store) -> None:
    lease = follow(fake, store)
    hear(fake, store, offer(2))
    fake.lose(store.link, stop=True)
    assert lease.advance() and lease.version == 2
    lease.park()
    assert lease.parked
    lease.unpark()
    assert lease.snapshot["t.w"].shape == (4,)
    lease.release()


def test_leases_are_renewed_as_they_are(fake: FakeStore, store: Store) -> None:
    lease = follow(fake, store)
    fake.answers[wire.OpenLease] = lambda r: wire.LeaseGranted(
        id=r.id, lease=LEASE + 1, version=1, records=wire.encode_records(OLD)
    )
    fixed = store.lease("m", version=1)
    hear(fake, store, offer(2))
    lease.advance()
    fake.answers[wire.RenewLease] = lambda r: wire.LeaseGranted(
        id=r.id, lease=20 + r.version, version=r.version, records=wire.encode_records(NEW)
    )
    fake.lose(store.link, stop=True)
    lease.park()
    fake.start()
    renewed = {(r.version, r.follow, r.parked) for r in fake.wait(wire.RenewLease, 2)}
    assert renewed == {(2, True, True), (1, False, False)}
    store.link.connect()
    hear(fake, store, offer(3, lease=22))  # the new connection's number
    assert lease.version == 3 and fixed.version == 1 and not fixed.lost


def test_offers_of_an_earlier_connection_are_not_taken_on_the_next(fake: FakeStore, store: Store) -> None:
    lease = follow(fake, store)
    hear(fake, store, offer(2))
    fake.answers[wire.RenewLease] = lambda r: grant(r)
    fake.lose(store.link, stop=True)
    fake.start()
    fake.wait(wire.RenewLease)
    store.link.connect()
    assert lease.pending is None and not lease.advance()


def test_a_parked_lease_may_be_granted_a_newer_version(fake: FakeStore, store: Store) -> None:
    lease = follow(fake, store)
    lease.park()
    fake.answers[wire.RenewLease] = lambda r: grant(r, 7, NEW)
    fake.lose(store.link)
    fake.wait(wire.RenewLease)
    store.link.connect()
    assert (lease.version, dict(lease.records)) == (7, {"t.w": NEW[0]})


def test_a_renewal_says_what_is_believed_torn_and_keeps_believing_it(fake: FakeStore, store: Store) -> None:
    lease = follow(fake, store)
    lease.park()
    hear(fake, store, offer(1, torn=True))
    fake.answers[wire.RenewLease] = lambda r: grant(r, 2, NEW)
    fake.lose(store.link)
    assert fake.wait(wire.RenewLease)[0].torn
    store.link.connect()
    assert lease.torn and lease.version == 2
    hear(fake, store, offer(2))
    assert not lease.torn


def test_a_refused_renewal_loses_the_lease(fake: FakeStore, store: Store) -> None:
    lease = store.lease("m")
    snapshot = lease.snapshot
    fake.answers[wire.RenewLease] = lambda r: wire.Failed(
        id=r.id, error="LeaseLost", message="version 1 is gone"
    )
    fake.lose(store.link)
    fake.wait(wire.RenewLease)
    store.link.connect()
    assert lease.lost
    with pytest.raises(LeaseLost, match="version 1 is gone"):
        snapshot["t.w"]
    lease.release()
    assert fake.of(wire.ReleaseLease) == []


def test_another_arena_loses_the_lease_and_keeps_its_mapping(fake: FakeStore, store: Store) -> None:
    lease = follow(fake, store)
    old_tensor, old_mapping = lease.snapshot["t.w"], lease.mapping
    other = FakeArena()
    fake.lose(store.link, stop=True)
    fake.arena = other
    fake.start()
    store.link.connect()
    assert lease.lost and fake.of(wire.RenewLease) == []
    for use in (lease.unpark, lease.park, lease.advance, lambda: lease.snapshot):
        with pytest.raises(LeaseLost, match="another arena; load its models again"):
            use()
    assert old_tensor.sum().item() == 0 and bytes(old_mapping.view(OLD[0].offset, 4)) == bytes(4)
    assert store.mapping.uuid == str(other.uuid) != lease.mapping.uuid
    other.close()


def test_a_lease_released_while_its_renewal_is_out_is_given_back(fake: FakeStore, store: Store) -> None:
    lease = store.lease("m")
    renewing, released = threading.Event(), threading.Event()

    def answer(request: wire.RenewLease) -> wire.Message:
        renewing.set()
        assert released.wait(PATIENCE)
        return grant(request)

    fake.answers[wire.RenewLease] = answer
    fake.lose(store.link)
    assert renewing.wait(PATIENCE)
    lease.release()
    released.set()
    assert fake.wait(wire.ReleaseLease)[0].lease == LEASE


def test_closing_the_store_loses_its_leases(fake: FakeStore, store: Store) -> None:
    lease = store.lease("m")
    tensor = lease.snapshot["t.w"]
    store.close()
    with pytest.raises(LeaseLost, match="closed by this process"):
        lease.require_readable(1)
    assert tensor.tolist() == [0, 0, 0, 0]


# -- a store that lies ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        offer(2, records=[record("t.w", 1 << 30)]),
        offer(2, records=None),
        wire.Offer(lease=LEASE, version=2, torn=False, records=wire.encode_records([])),
    ],
    ids=["beyond the arena", "without records", "fine"],
)
def test_an_offer_that_cannot_be_is_a_protocol_error(fake: FakeStore, store: Store, bad: wire.Offer) -> None:
    lease = follow(fake, store)
    hear(fake, store, bad)
    if bad.records == wire.encode_records([]):
        assert lease.advance()
        return
    with pytest.raises(ProtocolError):
        lease.advance()
    assert lease.version == 1  # as before


# -- the real thing ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("service")) as service:
        yield service


def write(store: Store, model: str, value: float, **options: Any) -> int:
    with store.refit(model, **options) as refit:
        refit.put("t.w", torch.full((1000,), value))
    return refit.report.version


def newest(lease: Lease) -> float:
    return float(lease.snapshot["t.w"][0].item())


def test_a_follower_through_refits_asleep_and_awake(service: Service) -> None:
    with service.connect() as trainer, service.connect() as engine:
        write(trainer, "follow", 1.0)
        offered = threading.Event()
        lease = engine.lease("follow", follow=True, on_offer=lambda lease: offered.set())
        assert newest(lease) == 1.0
        write(trainer, "follow", 2.0)
        assert offered.wait(PATIENCE)
        assert newest(lease) == 1.0  # what it holds stays what it was
        lease.advance()
        assert newest(lease) == 2.0
        lease.park()
        for value in (3.0, 4.0, 5.0):
            write(trainer, "follow", value)
        lease.unpark()
        assert (newest(lease), lease.version) == (5.0, 5)
        status = trainer.status()
        numbers = [v.number for m in status.models if m.name == "follow" for v in m.versions]
        assert numbers == [5]  # nothing older is kept alive
        lease.release()


def test_an_in_place_refit_goes_on_under_a_sleeper_and_heals(service: Service) -> None:
    with service.connect() as trainer, service.connect() as engine:
        write(trainer, "place", 1.0)
        lease = engine.lease("place", follow=True)
        lease.park()
        refit = trainer.refit("place", in_place=True)
        refit.put("t.w", torch.full((1000,), 9.0))
        with pytest.raises(TagTorn):
            lease.unpark()
        refit.commit()
        lease.unpark()
        assert newest(lease) == 9.0
        lease.release()


def test_a_sleeper_that_is_healed_while_it_unparks_is_unparked(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store's answer was torn, and the commit's offer is taken before anybody looks at that answer."""
    with service.connect() as trainer, service.connect() as engine:
        write(trainer, "healed", 1.0)
        lease = engine.lease("healed", follow=True)
        lease.park()
        refit = trainer.refit("healed", in_place=True)
        refit.put("t.w", torch.full((1000,), 2.0))
        request, answers = Connection.request, []

        def late(connection: Connection, message: Any, *args: Any, **how: Any) -> Any:
            answer = request(connection, message, *args, **how)
            if isinstance(message, wire.ParkLease):
                answers.append(answer.torn)
                if answer.torn:
                    refit.commit()
                    eventually(lambda: not lease.torn, "the offer of the commit is taken")
            return answer

        monkeypatch.setattr(Connection, "request", late)
        lease.unpark()
        assert answers == [True, False]
        assert (newest(lease), lease.version) == (2.0, 2)
        with pytest.raises(VersionInUse, match="put that engine to sleep"):
            trainer.refit("healed", in_place=True)
        lease.release()


def test_a_sleeper_knows_the_last_commit_of_a_store_that_died(tmp_path: Path) -> None:
    with Service(tmp_path) as service, service.connect() as trainer, service.connect() as engine:
        write(trainer, "m", 1.0)
        lease = engine.lease("m", follow=True)
        lease.park()
        version = write(trainer, "m", 2.0)
        engine.wait_for("m", after=version - 1, timeout=0)  # the offer has come
        service.kill()
        lease.unpark()
        assert (lease.version, newest(lease)) == (2, 2.0)
        service.start()
        write(trainer, "m", 3.0)
        assert engine.wait_for("m", after=2, timeout=PATIENCE) == 3
        lease.unpark()
        assert newest(lease) == 3.0


def test_a_reader_reads_on_while_the_store_is_dead_and_holds_on_when_it_returns(tmp_path: Path) -> None:
    with Service(tmp_path) as service, service.connect() as store:
        write(store, "m", 1.0)
        write(store, "m", 1.5, tag="old")
        with store.lease("m") as snapshot:
            service.kill()
            assert snapshot["t.w"][0] == 1.0
            with pytest.raises(StoreGone):
                store.status()
            service.start()
            assert [(lease.version, lease.model) for lease in store.status().leases] == [(1, "m")]
            write(store, "m", 2.0)
            assert snapshot["t.w"][0] == 1.0
        assert store.status().leases == []


def test_a_readers_process_cannot_write(service: Service) -> None:
    with service.connect() as store:
        write(store, "guard", 1.0)
        with store.lease("guard") as snapshot:
            pid = os.fork()
            if pid == 0:
                faulthandler.disable()
                snapshot["t.w"].fill_(2.0)
                os._exit(0)
            _, status = os.waitpid(pid, 0)
            assert os.WTERMSIG(status) == signal.SIGSEGV
            assert snapshot["t.w"][0] == 1.0
