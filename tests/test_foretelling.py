"""Followers learn where the next version of their tag may come to lie, each window once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence

import pytest
import torch
from test_catalog import ALICE, BOB, START, catalog, commit, opened, publish, refit_of, spec
from torch import nn

from engine_hooks import EngineHook
from engine_hooks.host import HostBackend
from weightstore.catalog import Catalog, Lease, Refit
from weightstore.client import Store
from weightstore.foretelling import Foretelling
from weightstore.local import local_store
from weightstore.mapping import ArenaMapping
from weightstore.types import ALIGN, TensorRecord

MIB = 1 << 20
WINDOW = 2 * ALIGN
Places = Mapping[str, Sequence[tuple[int, int]]]


def foretelling(c: Catalog, windows: float = 100) -> Foretelling:
    return Foretelling(c, START, START + int(windows * WINDOW), WINDOW)


def follower(c: Catalog, model: str = "m", tag: str = "latest", follow: bool = True) -> Lease:
    lease, _ = c.open_lease(BOB, model, tag, None, follow, 0.0)
    return lease


def reopened(c: Catalog, **kwargs: object) -> Refit:
    """A refit with places, given up at once: the next one finds the same."""
    refit = c.open_refit(opened(**kwargs), ALICE, 0.0)
    c.abort_refit(refit.number, ALICE, "")
    return refit


def told(f: Foretelling, refit: Refit) -> dict[int, dict[str, list[tuple[int, int]]]]:
    return {lease.number: message.places for lease, message in f.opened(refit)}


def lies_in(place: TensorRecord, stretches: Iterable[tuple[int, int]]) -> bool:
    return any(o <= place.offset and place.offset + place.nbytes <= o + n for o, n in stretches)


def test_windows_are_told_by_component_and_once() -> None:
    c = catalog()
    # Places of one ALIGN each; the components meet within the window that begins at START + 4 * ALIGN.
    publish(c, [spec("a.x", 1), spec("a.y", 1), spec("b.x", 1), spec("b.y", 1), spec("b.z", 1)])
    f, lease = foretelling(c), follower(c)
    refit = reopened(c)
    first = min(record.offset for record in refit.targets.values())
    assert first == START + 5 * ALIGN
    expected = {"a": [(START + 4 * ALIGN, 2 * WINDOW)], "b": [(START + 6 * ALIGN, 2 * WINDOW)]}
    assert told(f, refit) == {lease.number: expected}
    assert told(f, reopened(c)) == {}
    late = follower(c)
    assert told(f, reopened(c)) == {late.number: expected}


def test_who_comes_later_learns_at_once() -> None:
    c = catalog()
    publish(c)
    c.set_tag("m", "ref", 1)
    f = foretelling(c)
    assert list(f.followed(follower(c))) == []
    refit = reopened(c)
    assert told(f, refit)  # the one that is there
    late, other, still = follower(c), follower(c, tag="ref"), follower(c, follow=False)
    ((lease, message),) = f.followed(late)
    assert lease is late and message.lease == late.number and set(message.places) == {"t", "vae"}
    assert [list(f.followed(one)) for one in (late, other, still)] == [[], [], []]
    assert told(f, reopened(c)) == {}
    # Versions take turns: who comes now learns of this one's place, and of its base's, where the next goes.
    before = c.resolve("m", "latest", None)
    now = refit_of(c)
    newest = follower(c)
    (message,) = (message for _, message in f.followed(newest))
    for record in (*before.records.values(), *now.records.values()):
        assert lies_in(record, message.places[record.component]), record


def test_a_newcomer_learns_where_the_version_goes_that_replaces_the_tags_own() -> None:
    """Also where refits start from another tag's version."""
    c = catalog()
    publish(c)
    c.set_tag("m", "ref", 1)
    f = foretelling(c)
    places = []
    for _ in range(4):
        refit = c.open_refit(opened(base=1), ALICE, 0.0)
        list(f.opened(refit))
        places.append({r.offset for r in refit.targets.values()})
        newcomer = follower(c)
        ((_, message),) = f.followed(newcomer)
        c.release_lease(newcomer.number, BOB)
        commit(c, refit.number, list(refit.targets))
    assert places[1] == places[3] != places[2]
    for record in c.resolve("m", "latest", None).records.values():
        assert lies_in(record, message.places[record.component])
    told_of = [stretch for stretches in message.places.values() for stretch in stretches]
    assert all(any(o <= offset < o + n for o, n in told_of) for offset in places[2])


def test_a_model_that_was_removed_and_one_of_its_name_are_two() -> None:
    c = catalog()
    publish(c)
    f = foretelling(c)
    list(f.opened(reopened(c)))
    assert list(f.followed(follower(c)))
    c.leases.drop_peer(BOB)
    c.remove_model("m")
    list(f.opened(c.open_refit(opened(), ALICE, 0.0)))
    assert not f._last


def test_tags_that_are_being_written_first_are_remembered_too() -> None:
    c = catalog()
    publish(c)
    f = foretelling(c)
    for tag in ("a", "b", "c"):
        list(f.opened(c.open_refit(opened(tag=tag), ALICE, 0.0)))
    assert {tag for _, tag in f._last} == {"a", "b", "c"}


def test_what_many_have_been_told_exists_once() -> None:
    c = catalog()
    publish(c)
    f = foretelling(c)
    leases = [follower(c) for _ in range(50)]
    messages = [message for _, message in f.opened(reopened(c))]
    assert len(messages) == 50 and len({id(message.places) for message in messages}) == 1
    assert len({id(f._told[lease]) for lease in leases}) == 1
    newcomers = [follower(c) for _ in range(50)]
    assert len({id(m.places) for lease in newcomers for _, m in f.followed(lease)}) == 1


def test_what_is_remembered_is_bounded_by_the_tags_there_are() -> None:
    c = catalog()
    publish(c)
    f = foretelling(c)
    for step in range(50):
        tag = f"step-{step}"
        assert list(f.opened(reopened(c, tag=tag))) == []
        c.set_tag("m", tag, 1)
        c.remove_tag("m", tag)
    assert len(f._last) <= 1
    c.remove_model("m")
    publish(c, model="other")
    list(f.opened(reopened(c, model="other")))
    assert list(f._last) == [("other", "latest")]


def test_only_followers_of_the_tag_are_told() -> None:
    c = catalog()
    publish(c)
    c.set_tag("m", "ref", 1)
    publish(c, model="other")
    follower(c, follow=False), follower(c, tag="ref"), follower(c, model="other")
    f = foretelling(c)
    assert told(f, reopened(c)) == {}
    mine = follower(c)
    assert set(told(f, reopened(c))) == {mine.number}


def test_a_refit_without_places_or_in_place_tells_nothing() -> None:
    c = catalog()
    publish(c)
    f = foretelling(c)
    follower(c)
    assert told(f, reopened(c, partial=True)) == {}
    other = c.open_refit(opened(model="empty"), ALICE, 0.0)
    assert told(f, other) == {}
    c.leases.drop_peer(BOB)
    assert told(f, reopened(c, in_place=True)) == {}


def test_apart_stretches_stay_apart_and_the_last_window_ends_with_the_arena() -> None:
    c = catalog(8)
    publish(c, [spec("a.x", 1)])
    f, lease = foretelling(c, windows=3.5), follower(c)
    refit = c.open_refit(opened(partial=True, extend=True), ALICE, 0.0)
    names = ["a.p", "b.p", "c.p", "d.p", "e.p", "a.q"]  # the places after the first, in this order
    c.reserve(refit.number, ALICE, [spec(name, 1) for name in names])
    assert told(f, refit)[lease.number] == {
        "a": [(START, WINDOW), (START + 3 * WINDOW, ALIGN)],
        "b": [(START + WINDOW, WINDOW)],
        "c": [(START + WINDOW, WINDOW)],
        "d": [(START + 2 * WINDOW, WINDOW)],
        "e": [(START + 2 * WINDOW, WINDOW)],
    }


# -- with a real service and engine ---------------------------------------------------------------


@pytest.fixture
def store() -> Iterator[Store]:
    with local_store(16 * MIB, window=MIB) as store:
        with store.refit("m") as refit:
            refit.put_many(weights(1.0))
        yield store


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"t.weight": torch.full((MIB, 1), value), "vae.weight": torch.full((MIB // 4, 1), value)}


def hear(store: Store) -> None:
    """A round trip on the store's connection: what it was told before has been handled."""
    store.status()


def test_preparing_tells_followers_and_refits_soon_repeat_nothing(store: Store) -> None:
    heard: list[Places] = []
    lease = store.lease("m", follow=True, on_offer=lambda lease: bool(lease.advance()))
    lease.on_places = lambda lease, places: heard.append(places)
    store.prepare("m", components=["t"])
    hear(store)
    assert len(heard) == 1 and set(heard[0]) == {"t"}
    for value in (2.0, 3.0, 4.0, 5.0):
        with store.refit("m", components=["t"]) as refit:
            places = refit.places
            refit.put("t.weight", weights(value)["t.weight"])
        hear(store)
        assert all(lies_in(place, (s for one in heard for s in one["t"])) for place in places)
    assert len(heard) <= 2  # one place after the other
    lease.release()


def test_an_engine_prepares_for_its_own_components(store: Store) -> None:
    asked: list[list[tuple[int, int]]] = []

    class Watching(HostBackend):
        def pin_ahead(self, source: ArenaMapping, ranges: Iterable[tuple[int, int]]) -> None:
            asked.append(list(ranges))

    module = nn.Linear(1, MIB // 4, bias=False, device="meta")
    with EngineHook.attach(store, "m", {"vae": module}, ignore=["t.*"], backend=Watching()) as hook:
        asked.clear()
        store.prepare("m", components=["t"])
        hear(store)
        assert asked == []
        hook.sleep()
        store.prepare("m")
        hear(store)
        assert len(asked) == 1 and sum(nbytes for _, nbytes in asked[0]) <= 2 * MIB
        with store.refit("m") as refit:
            places = refit.places
            refit.put_many(weights(2.0))
        assert [lies_in(place, asked[0]) for place in places] == [False, True]
        hook.wake()
        assert bool((module.weight == 2).all())
        hook.close()
    asked.clear()
    with EngineHook.attach(store, "m", {"vae": module}, ignore=["t.*"], backend=Watching()):
        hear(store)  # a relaunched engine: where its version is, and where the next one will be
        told = [stretch for ranges in asked for stretch in ranges]
        with store.refit("m") as refit:
            assert lies_in(places[1], told) and lies_in(refit.places[1], told)
            refit.abort("these were the places")


def test_a_connection_that_is_made_anew_is_told_anew(store: Store) -> None:
    heard: list[Places] = []
    lease = store.lease("m", follow=True)
    lease.on_places = lambda lease, places: heard.append(places)
    store.prepare("m")
    hear(store)
    known = lease.places
    assert len(heard) == 1 and set(known) == {"t", "vae"}
    assert store.link.connection is not None
    store.link.connection.close()
    hear(store)  # reconnects, and renews the lease
    hear(store)
    assert not lease.lost and len(heard) == 2
    for component, stretches in known.items():
        assert set(stretches) <= set(lease.places[component]) and len(lease.places[component]) < 4
    lease.release()


def test_a_closed_hook_keeps_nothing_alive(store: Store) -> None:
    module = nn.Linear(1, MIB // 4, bias=False, device="meta")
    backend = HostBackend()
    seen = weakref.ref(backend)
    hook = EngineHook.attach(store, "m", {"vae": module}, ignore=["t.*"], backend=backend)
    store.prepare("m")
    hear(store)
    gc.collect()
    gc.disable()
    try:
        hook.close()
        del hook, backend
        assert seen() is None
    finally:
        gc.enable()


def test_what_a_listener_raises_ends_nothing(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    def fail(lease: object, places: Places) -> None:
        raise LookupError("listener")

    lease = store.lease("m", follow=True)
    lease.on_places = fail
    store.prepare("m")
    hear(store)
    assert any("on_places" in record.message for record in caplog.records)
    assert lease.version == 1 and not lease.lost
    lease.release()
