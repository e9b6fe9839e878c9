"""SIGKILL at every step of the protocol: what was committed stays bit for bit, nothing leaks, others go on.

    victim    killed at
    trainer   connected, refit open, reserved, first tensor written, all written, declared, commit sent,
              committed, view in use, in-place refit open, half written in place, own part of a shared
              refit written, voted
    engine    attached, asleep, an offer unanswered (running or stopped), mid-wake, mid-refit, awake again
    store     idle, refit open, tensors half written, declared, at and right after a commit, half written
              in place, growing, lease held, engine asleep, engine awake with an offer, WaitFor pending,
              verify running

Real processes throughout; a child says at which step it is and waits to be told to go on, or is killed.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import actors
import pytest
from actors import MODEL, TRAINED
from children import Child
from processes import (
    MIB,
    PATIENCE,
    Service,
    contents,
    eventually,
    everything,
    fill,
    publish,
    require_balanced,
    specs,
    values,
)

from weightstore import wire
from weightstore.client import Store
from weightstore.errors import RefitAborted, StoreGone, TagTorn, VersionInUse, WeightstoreError

_numbers = itertools.count(1)


def all_of(value: int, trained: int | None = None) -> dict[str, set[int]]:
    """What a version holds that was written with `value`, its component `t` with `trained`."""
    return {n: {trained if trained is not None and n in TRAINED else value} for n in MODEL}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One store that outlives all trainers and engines."""
    with Service(tmp_path_factory.mktemp("kills"), window="1MiB") as service:
        with service.connect() as store:
            publish(store, "bystander", MODEL, 99)
        yield service
        assert "Traceback" not in service.log() and "bug" not in service.log()


class Trial:
    """A model of its own in the shared store, and a client that survives whatever happens to others."""

    def __init__(self, service: Service, store: Store) -> None:
        self.service = service
        self.store = store
        self.model = f"model-{next(_numbers)}"
        publish(store, self.model, MODEL, 1)
        self.before = everything(store)

    def nothing_changed(self) -> None:
        assert everything(self.store) == self.before

    def settled(self) -> None:
        """The victim is gone, and all it held with it."""

        def gone() -> bool:
            status = self.store.status()
            arena = status.arena
            return not (status.clients > 1 or status.refits or arena.pending or arena.quarantined)

        eventually(gone, "the victim's connection, refits and quarantined space are gone")
        require_balanced(self.store)

    def goes_on(self, value: int = 5) -> None:
        """The tag can be refitted by the next trainer, and then holds just that."""
        base = self.store.tags(self.model)["latest"]
        assert publish(self.store, self.model, MODEL, value, fresh=True) == base + 1
        assert values(contents(self.store, self.model)) == all_of(value)
        assert values(contents(self.store, "bystander")) == all_of(99)


@pytest.fixture
def trial(service: Service) -> Iterator[Trial]:
    with service.connect() as store:
        trial = Trial(service, store)
        yield trial
        assert service.alive
        store.remove_model(trial.model)
        trial.settled()


# -- the trainer dies ------------------------------------------------------------------------------

STEPS = ["connected", "refit open", "reserved", "first tensor written", "all written"]


@pytest.mark.parametrize("last", STEPS)
def test_a_trainer_killed_before_its_commit_changes_nothing(trial: Trial, last: str) -> None:
    with Child(actors.train, trial.service.socket, trial.model, 2) as child:
        for step in STEPS[: STEPS.index(last)]:
            child.reaches(step)
            child.go()
        child.reaches(last)
        status = trial.store.status()
        assert len(status.refits) == (last != "connected")
        assert bool(status.arena.pending) == (last != "connected")
        child.kill()
    trial.settled()
    trial.nothing_changed()
    trial.goes_on()


def test_a_trainer_killed_after_its_commit_has_committed(trial: Trial) -> None:
    with Child(actors.train, trial.service.socket, trial.model, 2) as child:
        for step in STEPS:
            child.reaches(step)
            child.go()
        child.reaches("committed")
        child.kill()
    trial.settled()
    assert values(contents(trial.store, trial.model)) == all_of(1, trained=2) | {"t.extra": {2}}
    trial.goes_on()


def test_a_trainer_killed_before_it_reads_that_it_committed_has_committed(trial: Trial) -> None:
    with Child(actors.commit_and_not_listen, trial.service.socket, trial.model, 2) as child:
        child.reaches("commit sent")
        child.kill()
    trial.settled()
    assert trial.store.tags(trial.model)["latest"] == 2
    assert values(contents(trial.store, trial.model)) == all_of(1, trained=2)
    trial.goes_on()


@pytest.mark.parametrize("last", ["declared", "committed"])
def test_a_trainer_killed_between_the_two_steps_of_a_commit_has_not_committed(
    trial: Trial, last: str
) -> None:
    """And the records written ahead of the commit take no room for ever."""

    def records() -> int | None:
        status = trial.store.status()
        summed = all(v.checksummed for model in status.models for v in model.versions)
        return status.arena.meta_used if summed else None

    before = eventually(records, "every version is checksummed")
    with Child(actors.declare_first, trial.service.socket, trial.model, 2) as child:
        child.reaches("declared")
        trial.nothing_changed()
        if last == "committed":
            child.go()
            child.reaches("committed")
        child.kill()
    trial.settled()
    if last == "declared":
        trial.nothing_changed()
        eventually(lambda: records() == before, "the records of the version that never was are gone")
    else:
        assert values(contents(trial.store, trial.model)) == all_of(1, trained=2)
    trial.goes_on()


def test_a_trainer_killed_while_it_computes_on_the_arena_harms_nothing(trial: Trial) -> None:
    with Child(actors.train_in_a_view, trial.service.socket, trial.model, 2) as child:
        child.reaches("view in use")
        child.kill()
    trial.settled()
    trial.nothing_changed()
    trial.goes_on()


def test_space_of_a_trainer_that_only_hung_up_waits_for_its_process(trial: Trial) -> None:
    """Its last copies may still be landing: nobody else gets those bytes before it is gone."""
    with Child(actors.hang_up_and_live, trial.service.socket, trial.model, 2) as child:
        child.reaches("hung up")
        arena = eventually(
            lambda: (a := trial.store.status().arena).quarantined and a, "the space is quarantined"
        )
        assert arena.pending == 0
        assert arena.free + arena.reachable + arena.quarantined == arena.committed
        trial.goes_on()
        assert trial.store.status().arena.quarantined == arena.quarantined
        child.kill()
    trial.settled()


@pytest.mark.parametrize("last", ["in-place refit open", "half written"])
def test_a_trainer_killed_in_place_leaves_a_torn_tag_that_a_refit_mends(trial: Trial, last: str) -> None:
    with Child(actors.train_in_place, trial.service.socket, trial.model, 2) as child:
        for step in ("in-place refit open", "half written"):
            child.reaches(step)
            if step == last:
                break
            child.go()
        child.kill()
    eventually(lambda: not trial.store.status().refits, "the refit is gone")
    (status,) = [m for m in trial.store.status().models if m.name == trial.model]
    assert status.torn == ["latest"]
    with pytest.raises(TagTorn, match="a new refit"):
        trial.store.lease(trial.model)
    with pytest.raises(TagTorn):
        trial.store.refit(trial.model, components=["vae"])
    assert values(contents(trial.store, "bystander")) == all_of(99)
    publish(trial.store, trial.model, TRAINED, 3, components=["t"], in_place=True)
    assert values(contents(trial.store, trial.model)) == all_of(1, trained=3)
    trial.settled()
    trial.goes_on()


@pytest.mark.parametrize(
    ("victim", "step"), [(actors.train_rank, "own part written"), (actors.vote_and_not_listen, "voted")]
)
@pytest.mark.parametrize("survivor_votes", ["first", "last"])
def test_a_rank_killed_in_a_shared_refit_ends_it_for_all(
    trial: Trial, victim: Callable[..., Any], step: str, survivor_votes: str
) -> None:
    arguments = (trial.service.socket, trial.model, 2)
    with Child(actors.train_rank, *arguments, 0, 2) as survivor, Child(victim, *arguments, 1, 2) as child:
        survivor.reaches("own part written")
        child.reaches(step)
        voted = int(step == "voted")
        if survivor_votes == "first" and not voted:  # else the survivor's vote would commit
            survivor.go()
            eventually(lambda: trial.store.status().refits[0].committed == 1, "the survivor has voted")
        child.kill()
        if survivor_votes == "last" or voted:
            eventually(lambda: not trial.store.status().refits, "the refit has been aborted")
            survivor.go()
        error = survivor.error()
        assert error.startswith("RefitAborted") and "rank 1" in error and "disconnected" in error
    trial.settled()
    trial.nothing_changed()
    trial.goes_on()


def test_a_shared_refit_of_which_both_ranks_live_commits(trial: Trial) -> None:
    """What the tests above kill does work when nobody is killed."""
    arguments = (trial.service.socket, trial.model, 2)
    with Child(actors.train_rank, *arguments, 0, 2) as one, Child(actors.train_rank, *arguments, 1, 2) as two:
        for rank in (one, two):
            rank.reaches("own part written")
            rank.go()
        assert (one.result(), two.result()) == (2, 2)
    assert values(contents(trial.store, trial.model)) == all_of(1, trained=2)


# -- an engine dies --------------------------------------------------------------------------------


def engine(trial: Trial) -> Child:
    return Child(actors.serve_images, trial.service.socket, trial.model)


def versions(trial: Trial) -> list[int]:
    (status,) = [m for m in trial.store.status().models if m.name == trial.model]
    return [version.number for version in status.versions]


def order(child: Child, what: str) -> Any:
    """Have an engine do something, and what it then says."""
    child.go(what)
    return child.reaches(what.partition(",")[0])


def test_an_engine_that_is_not_killed_does_what_the_others_are_killed_at(trial: Trial) -> None:
    with engine(trial) as child:
        assert child.reaches("attached") == (1, all_of(1))
        assert order(child, "sleep") == 1
        publish(trial.store, trial.model, TRAINED, 2, components=["t"])
        assert order(child, "wake") == (2, all_of(1, trained=2))
        publish(trial.store, trial.model, TRAINED, 3, components=["t"])
        assert versions(trial) == [2, 3]
        assert order(child, "refit") == (3, all_of(1, trained=3))
        assert order(child, "verify") == ()
        child.go("sleep")
        child.reaches("sleep")
        child.go("wake, stopping half way")
        child.reaches("mid-copy")
        child.go()
        assert child.reaches("wake") == (3, all_of(1, trained=3))
        child.go("end")
        child.result()
    assert versions(trial) == [3]


@pytest.mark.parametrize(
    "last", ["attached", "asleep", "offer unanswered", "mid-wake", "mid-refit", "awake again"]
)
def test_a_killed_engine_holds_nothing(trial: Trial, last: str) -> None:
    with engine(trial) as other, engine(trial) as child:
        child.reaches("attached")
        other.reaches("attached")
        if last not in ("attached", "offer unanswered", "mid-refit"):
            order(child, "sleep")
        order(other, "sleep")
        if last != "attached":
            publish(trial.store, trial.model, TRAINED, 2, components=["t"])
        if last == "offer unanswered":
            eventually(
                lambda: any(lease.offered == 2 for lease in trial.store.status().leases), "an offer is out"
            )
            assert versions(trial) == [1, 2]
        elif last in ("mid-wake", "mid-refit"):
            child.go(f"{last[4:]}, stopping half way")
            child.reaches("mid-copy")
        elif last == "awake again":
            assert order(child, "wake") == (2, all_of(1, trained=2))
        child.kill()
        newest = 1 if last == "attached" else 2
        eventually(lambda: versions(trial) == [newest], "what only the victim held is freed")
        assert order(other, "wake") == (newest, all_of(1, trained=newest))
        assert order(other, "verify") == ()
        other.go("end")
        other.result()
    trial.settled()
    trial.goes_on()


def test_a_sleeping_engine_that_is_stopped_and_then_killed_gives_back_what_it_was_offered(
    trial: Trial,
) -> None:
    """It cannot answer; the refits go on, and its death frees what waited for its answer."""
    with engine(trial) as child:
        child.reaches("attached")
        order(child, "sleep")
        child.stop()
        for value in (2, 3, 4):
            publish(trial.store, trial.model, TRAINED, value, components=["t"])
        assert versions(trial) == [1, 2, 4]  # held, offered, newest
        child.kill()
    eventually(lambda: versions(trial) == [4], "what it held and was offered is freed")
    trial.settled()
    trial.goes_on()


# -- the store dies --------------------------------------------------------------------------------


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Service]:
    """A store to be killed, with two tags, a retired version that nobody holds, and free space between."""
    with Service(tmp_path, window="1MiB") as service:
        with service.connect() as store:
            publish(store, "m", MODEL, 1)
            publish(store, "m", MODEL, 2)
            store.tag("m", "ref", 2)
            publish(store, "m", TRAINED, 3, components=["t"])
            publish(store, "bystander", MODEL, 99)
        yield service


LATEST = all_of(2, trained=3)


def killed(service: Service, restarted: bool = True) -> None:
    service.kill()
    if restarted:
        service.start()


def same_after(service: Service, before: dict[Any, Any]) -> None:
    """A new client finds what was there, can refit it, and no byte is lost."""
    with service.connect() as store:
        assert everything(store) == before
        assert store.verify("m", "ref").corrupt == []
        publish(store, "m", MODEL, 7)
        assert values(contents(store, "m")) == all_of(7)
        assert contents(store, "m", "ref") == before["m", "ref"][1]
        require_balanced(store)


def test_an_idle_store_serves_the_same_after_a_kill(mortal: Service) -> None:
    with mortal.connect() as store:
        before = everything(store)
        uuid = store.status().arena.uuid
        digest = store.verify("m").digest
        for _ in range(2):  # also when it is killed in its grace period
            killed(mortal)
            assert store.verify("m").digest == digest  # the same client, which reconnects when asked
            assert store.status().arena.uuid == uuid
    same_after(mortal, before)


@pytest.mark.parametrize("written", ["nothing", "half a tensor", "everything"])
@pytest.mark.parametrize("trainer", ["comes back", "dies meanwhile"])
def test_a_store_killed_under_a_refit_forgets_it(mortal: Service, written: str, trainer: str) -> None:
    steps = STEPS[1 : {"nothing": 2, "half a tensor": 4, "everything": 5}[written]]
    with mortal.connect() as store:
        before = everything(store)
        with Child(actors.train, mortal.socket, "m", 6) as child:
            child.reaches("connected")
            for step in steps:
                child.go()
                child.reaches(step)
            mortal.kill()
            if trainer == "dies meanwhile":
                child.kill()
            mortal.start()
            if trainer == "comes back":
                assert (
                    store.status().arena.quarantined > 0
                )  # it may be writing there, for all the store knows
                assert everything(store) == before
                child.go()
                error = child.error()
                assert error.startswith("StoreGone") and "nothing was committed" in error
        eventually(lambda: not store.status().arena.quarantined, "the refit's space is free again")
        assert everything(store) == before
        require_balanced(store)
    same_after(mortal, before)


def test_a_trainer_that_reconnects_gives_back_what_its_lost_refit_held(mortal: Service) -> None:
    """It need not die for that: its client promises that nothing is landing any more."""
    with mortal.connect() as store:
        before = everything(store)
        refit = store.refit("m", components=["t"])
        killed(mortal)
        with mortal.raw() as other:
            assert other.status().arena.quarantined > 0
        with pytest.raises(StoreGone, match="nothing was committed; begin a new one"):
            refit.reserve(specs(TRAINED))
            fill(refit, TRAINED, 9)
            refit.commit()
        with pytest.raises(WeightstoreError):
            refit.commit()
        with store.refit("m", components=["t"]) as again:
            assert store.status().arena.quarantined == 0
            again.abort()
        assert everything(store) == before
    same_after(mortal, before)


def test_a_store_killed_at_a_commit_has_made_it_or_not(mortal: Service) -> None:
    """Whichever it was, the version before or the one after is there as a whole; the client says that it
    cannot know."""
    outcomes = set()
    for round in range(6):
        with mortal.connect() as store:
            number = store.tags("m")["latest"]
            before = everything(store)
            refit = store.refit("m", components=["t"])
            value = 10 + round
            fill(refit, TRAINED, value)
            pid = mortal.pid
            if round % 2:  # at once, or as soon as the answer is there
                threading.Thread(target=os.kill, args=(pid, signal.SIGKILL)).start()
            try:
                assert refit.commit() == number + 1
                committed = True
            except StoreGone as error:
                assert error.details["outcome"] in ("unknown", "aborted")
                committed = None if error.details["outcome"] == "unknown" else False
            killed(mortal)
            now = store.tags("m")["latest"]
            outcomes.add(now - number)
            assert now == number + 1 if committed else now == number if committed is False else True
            if now == number:
                assert everything(store) == before
            else:
                assert now == number + 1 and values(contents(store, "m")) == all_of(2, trained=value)
                rest = everything(store)
                assert {k: v for k, v in rest.items() if k != ("m", "latest")} == {
                    k: v for k, v in before.items() if k != ("m", "latest")
                }
    assert 1 in outcomes


def test_a_store_killed_between_the_two_steps_of_a_commit_has_not_committed(mortal: Service) -> None:
    with mortal.connect() as store:
        before = everything(store)
        with Child(actors.declare_first, mortal.socket, "m", 6) as child:
            child.reaches("declared")
            killed(mortal)
            child.kill()
        assert everything(store) == before
        eventually(lambda: not store.status().arena.quarantined, "the refit's space is free again")
    same_after(mortal, before)


def test_a_store_killed_while_it_grows_starts_again(mortal: Service) -> None:
    with mortal.connect() as store:
        before = everything(store)
    for _ in range(3):
        with mortal.raw() as raw:
            opened = raw.ask(wire.OpenRefit(id=0, model="big", tag="latest"))
            raw.post(wire.Reserve(id=0, refit=opened.refit, specs=specs({"t.w": 30 * MIB})))
            killed(mortal)
    with mortal.raw() as raw:
        raw.ask(wire.Drained(id=0))
    same_after(mortal, before)


def test_a_store_killed_half_way_in_place_knows_that_the_tag_is_torn(mortal: Service) -> None:
    with mortal.connect() as store:
        store.remove_tag("m", "ref")
        before = everything(store)
        with Child(actors.train_in_place, mortal.socket, "m", 4) as child:
            child.reaches("in-place refit open")
            child.go()
            child.reaches("half written")
            killed(mortal)
            with pytest.raises(TagTorn, match="new refit"):
                store.lease("m")
            with pytest.raises(TagTorn):
                store.tag("m", "copy", 3)
            with pytest.raises(VersionInUse, match="grace period"):
                store.refit("m", components=["t"], in_place=True)
            child.go()
            assert child.error().startswith("StoreGone")
        publish(store, "m", TRAINED, 5, components=["t"])
        assert values(contents(store, "m")) == all_of(2, trained=5)
        del before["m", "latest"]
        assert {key: everything(store)[key] for key in before} == before


@pytest.mark.parametrize("killed_store", [False, True], ids=["store alive", "store killed"])
def test_bytes_that_a_lost_in_place_refit_may_write_to_are_given_to_nobody(
    tmp_path: Path, killed_store: bool
) -> None:
    """The version is replaced by a whole one while the trainer that was overwriting it still lives."""
    with Service(tmp_path, window="1MiB", grace=0.0) as service, service.connect() as store:
        publish(store, "m", MODEL, 1)
        with Child(actors.train_in_place_unheard, service.socket, "m", 4) as child:
            child.reaches("half written")
            if killed_store:
                killed(service)
                eventually(lambda: not store.status().grace_until, "the grace period is over")
            else:
                child.go()
                child.reaches("hung up")
                eventually(lambda: not store.status().refits, "its refit is aborted")
            publish(store, "m", TRAINED, 5, components=["t"])
            arena = store.status().arena
            assert arena.quarantined >= sum(rows * columns * 4 for rows, columns in TRAINED.values())
            assert values(contents(store, "m")) == all_of(1, trained=5)
            child.kill()
        eventually(lambda: not store.status().arena.quarantined, "the writer is gone")
        require_balanced(store)


def test_a_held_lease_is_renewed_and_keeps_its_version(mortal: Service) -> None:
    """Also one on a version that no tag names any more; in the grace period nothing is freed."""
    with mortal.connect() as store:
        fixed, following = store.lease("m", version=3), store.lease("m", follow=True)
        publish(store, "m", TRAINED, 4, components=["t"])
        assert eventually(lambda: following.pending, "the new version is offered") == 4
        before = everything(store)
        held = contents(store, "m", version=3)
        mortal.kill()
        assert {n: bytes(fixed.mapping.view(r.offset, r.nbytes)) for n, r in fixed.records.items()} == held
        mortal.start()
        eventually(lambda: len(store.status().leases) == 2, "both leases have been renewed")
        assert everything(store) == before
        assert contents(store, "m", version=3) == held
        assert eventually(lambda: following.pending, "the offer is repeated") == 4
        assert following.advance() and values(contents(store, "m")) == all_of(2, trained=4)
        fixed.release()
        following.release()
    same_after(mortal, before)


def test_a_lease_that_comes_too_late_is_lost_and_says_so(tmp_path: Path) -> None:
    with Service(tmp_path, grace=0.0) as service, service.connect() as store:
        publish(store, "m", MODEL, 1)
        with Child(actors.hold, service.socket, "m") as child:
            assert child.reaches("holding") == 1
            publish(store, "m", MODEL, 2)
            child.stop()
            killed(service)
            eventually(lambda: not store.status().grace_until, "the grace period is over")
            assert [version.number for version in store.status().models[0].versions] == [2]
            child.go()
            child.resume()
            error = child.error()
            assert error.startswith("LeaseLost") and "no longer in the store; open a new lease" in error
        assert values(contents(store, "m")) == all_of(2)


def test_an_engine_wakes_with_the_store_dead_and_finds_it_again(mortal: Service) -> None:
    with mortal.connect() as store, Child(actors.serve_images, mortal.socket, "m") as child:
        assert child.reaches("attached") == (3, LATEST)
        order(child, "sleep")
        publish(store, "m", TRAINED, 4, components=["t"])
        eventually(
            lambda: [lease.version for lease in store.status().leases] == [4],
            "the sleeping engine took version 4",
        )
        before = everything(store)
        mortal.kill()
        assert order(child, "wake") == (4, all_of(2, trained=4))
        assert order(child, "verify") == ()
        order(child, "sleep")
        assert order(child, "wake") == (4, all_of(2, trained=4))
        mortal.start()
        eventually(lambda: [lease.version for lease in store.status().leases] == [4], "its lease is renewed")
        assert everything(store) == before
        publish(store, "m", TRAINED, 5, components=["t"])
        assert order(child, "refit") == (5, all_of(2, trained=5))
        assert order(child, "sleep") == 5
        publish(store, "m", TRAINED, 6, components=["t"])
        assert order(child, "wake") == (6, all_of(2, trained=6))
        assert order(child, "reconnected") == mortal.pid
        child.go("end")
        child.result()


def test_an_engine_that_slept_through_a_kill_and_a_refit_wakes_on_the_newest(mortal: Service) -> None:
    with mortal.connect() as store, Child(actors.serve_images, mortal.socket, "m") as child:
        child.reaches("attached")
        order(child, "sleep")
        killed(mortal)
        publish(store, "m", TRAINED, 4, components=["t"])
        publish(store, "m", TRAINED, 5, components=["t"])
        assert order(child, "wake") == (5, all_of(2, trained=5))
        assert order(child, "verify") == ()
        child.go("end")
        child.result()


def test_an_engine_awake_through_a_kill_keeps_its_version_and_gets_the_offer(mortal: Service) -> None:
    with mortal.connect() as store, Child(actors.serve_images, mortal.socket, "m") as child:
        child.reaches("attached")
        publish(store, "m", TRAINED, 4, components=["t"])
        eventually(lambda: any(lease.offered for lease in store.status().leases), "an offer is out")
        mortal.kill()
        assert order(child, "verify") == ()
        assert order(child, "refit")[0] in (
            3,
            4,
        )  # what it had been offered it may take, without the store too
        mortal.start()
        eventually(lambda: store.status().leases, "its lease is renewed")
        assert order(child, "refit") == (4, all_of(2, trained=4))
        child.go("end")
        child.result()


def test_a_wait_ends_with_the_store_and_can_be_begun_again(mortal: Service) -> None:
    with mortal.connect() as store:
        ended: list[WeightstoreError | int] = []

        def wait() -> None:
            try:
                ended.append(store.wait_for("m", after=3, timeout=PATIENCE))
            except WeightstoreError as error:
                ended.append(error)

        for _ in range(2):
            thread = threading.Thread(target=wait)
            thread.start()
            if not ended:
                eventually(lambda: mortal.status().clients == 3, "it waits on a connection of its own")
                killed(mortal)
            else:
                publish(store, "m", TRAINED, 4, components=["t"])
            thread.join(PATIENCE)
        assert isinstance(ended[0], StoreGone) and mortal.socket in ended[0].message
        assert ended[1] == 4


def test_a_store_killed_while_it_verifies_loses_nothing(mortal: Service) -> None:
    with mortal.connect() as store:
        publish(store, "wide", {"t.w": 24 * MIB}, 8)
        before = everything(store)
        with mortal.raw() as raw:
            asked = [raw.post(wire.VerifyVersion(id=0, model="wide", tag="latest")) for _ in range(20)]
            raw.reply(asked[0])
            killed(mortal)
            assert raw.last_words() is None
        assert everything(store) == before
        verified = store.verify("wide")
        assert verified.corrupt == [] and verified.nbytes == 24 * MIB
    same_after(mortal, before)


def test_a_store_that_dies_with_all_its_clients_leaves_an_arena_that_serves(mortal: Service) -> None:
    with mortal.connect() as store:
        before = everything(store)
    with (
        Child(actors.train, mortal.socket, "m", 6) as trainer,
        Child(actors.serve_images, mortal.socket, "m") as engine,
    ):
        trainer.reaches("connected")
        trainer.go()
        trainer.reaches("refit open")
        engine.reaches("attached")
        trainer.kill()
        mortal.kill()
        engine.kill()
    mortal.start()
    same_after(mortal, before)


def test_refits_aborted_by_a_death_name_it(trial: Trial) -> None:
    """The error that survivors get is typed, and says which rank went and why nothing was committed."""
    refit = trial.store.refit(trial.model, components=["t"], key="k", rank=0, world_size=2)
    with trial.service.raw() as raw:
        raw.ask(
            wire.OpenRefit(
                id=0, model=trial.model, tag="latest", components=["t"], key="k", rank=1, world_size=2
            )
        )
    with pytest.raises(RefitAborted, match=r"rank 1, .* disconnected") as aborted:
        fill(refit, TRAINED, 3)
        refit.commit()
    assert aborted.value.details["refit"]
    with trial.service.raw() as raw:
        raw.ask(wire.Drained(id=0))
    trial.nothing_changed()
