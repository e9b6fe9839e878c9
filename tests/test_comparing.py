"""Refits that leave alone what has not changed: which tensors are equal, and what becomes of the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hooked import fresh_model
from hypothesis import example, given, settings
from hypothesis import strategies as st

import weightstore as ws
from engine_hooks import EngineHook
from weightstore import copies
from weightstore.catalog import Catalog, Peer, Writer
from weightstore.comparing import unchanged
from weightstore.errors import CastRefused, CoverageError, TagTorn, UsageError
from weightstore.names import NameMap
from weightstore.types import Box, TensorSpec
from weightstore.wire import OpenRefit, Write

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def store() -> Iterator[ws.Store]:
    with ws.local_store("128MiB", window="16MiB") as store:
        yield store


@pytest.fixture
def model() -> str:
    return fresh_model()


def publish(store: ws.Store, model: str, tensors: State) -> None:
    with store.refit(model, fresh=True) as refit:
        refit.put_many(tensors)


def places(store: ws.Store, model: str) -> dict[str, int]:
    with store.lease(model) as snapshot:
        return {name: record.offset for name, record in snapshot.records.items()}


def moved(store: ws.Store, model: str, before: dict[str, int]) -> set[str]:
    return {name for name, offset in places(store, model).items() if offset != before[name]}


# -- equal or not -------------------------------------------------------------------------------------


def same(store: ws.Store, model: str, tensors: State) -> dict[str, bool]:
    with store.lease(model) as snapshot:
        pairs = [(snapshot.records[name], tensor) for name, tensor in tensors.items()]
        return dict(zip(tensors, unchanged(pairs, store.mapping), strict=True))


def test_bits_are_compared_not_values(store: ws.Store, model: str) -> None:
    odd = torch.tensor([0.0, math.nan, 1.0])
    publish(store, model, {f"t.{i}": odd for i in range(3)} | {"t.empty": torch.empty(0, 3)})
    given_ = {"t.0": odd.clone(), "t.1": torch.tensor([-0.0, math.nan, 1.0]), "t.2": odd + 1}
    assert same(store, model, given_) == {"t.0": True, "t.1": False, "t.2": False}
    assert same(store, model, {"t.empty": torch.empty(0, 3)}) == {"t.empty": True}


@pytest.mark.parametrize("at", [0, 1, 12_345, 2_000_000, 2_999_999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_element_anywhere_makes_the_difference(
    store: ws.Store, model: str, at: int, dtype: torch.dtype
) -> None:
    # Alike, turned and cast take ways of their own; all are longer than what is compared in one go.
    master = torch.randn(3000, 1000)
    publish(store, model, {"t.w": master.to(dtype), "t.turned": master.to(dtype)})
    equal = {"t.w": master, "t.turned": master.T.contiguous().T}
    assert same(store, model, equal) == {"t.w": True, "t.turned": True}
    other = master.clone()
    other.view(-1)[at] += 1
    different = {"t.w": other, "t.turned": other.T.contiguous().T}
    assert same(store, model, different) == {"t.w": False, "t.turned": False}


def test_the_stored_layout_does_not_matter(store: ws.Store, model: str) -> None:
    image = torch.randn(2, 3, 4, 5)
    publish(store, model, {"t.conv": image.to(memory_format=torch.channels_last)})
    assert same(store, model, {"t.conv": image}) == {"t.conv": True}
    assert same(store, model, {"t.conv": image.flip(0)}) == {"t.conv": False}


# -- refits -------------------------------------------------------------------------------------------

BASE: State = {f"t.{i}": torch.randn(257, 63) for i in range(8)} | {"v.w": torch.randn(9)}


def test_only_what_changed_is_written(store: ws.Store, model: str) -> None:
    publish(store, model, BASE)
    before = places(store, model)
    used = store.status().arena.used
    after = BASE | {"t.3": BASE["t.3"] + 1, "t.6": BASE["t.6"] * 2}
    with store.refit(model, skip_unchanged=True) as refit:
        refit.put_many(after)
    assert moved(store, model, before) == {"t.3", "t.6"}
    report = refit.report
    assert (report.tensors, report.unchanged, report.nbytes) == (2, 7, 2 * 257 * 63 * 4)
    assert str(report).endswith("GB/s), 7 unchanged")
    with store.lease(model) as snapshot:
        assert all(torch.equal(snapshot[name], tensor) for name, tensor in after.items())
    assert store.status().arena.used == used  # the old two are gone again
    assert store.verify(model).corrupt == []


@settings(max_examples=30, deadline=None)
@example(kinds=["left out"] * 6, partial=True)
@given(st.lists(st.sampled_from(["same", "other", "left out"]), min_size=6, max_size=6), st.booleans())
def test_what_lands_is_what_an_ordinary_refit_would_write(
    store: ws.Store, kinds: list[str], partial: bool
) -> None:
    model = fresh_model()
    publish(store, model, {name: BASE[name] for name in list(BASE)[:6]})
    kinds = kinds if partial else ["other" if kind == "left out" else kind for kind in kinds]
    given_ = {
        name: BASE[name] + (kind == "other")
        for name, kind in zip(BASE, kinds, strict=False)
        if kind != "left out"
    }
    before = places(store, model)
    if not given_:
        nothing = store.refit(model, partial=True, skip_unchanged=True)
        with pytest.raises(UsageError, match="wrote no tensor"):
            nothing.commit()
        nothing.abort()
        store.remove_model(model)
        return
    with store.refit(model, partial=partial, skip_unchanged=True) as refit:
        refit.put_many(given_)
    assert moved(store, model, before) == {n for n, k in zip(BASE, kinds, strict=False) if k == "other"}
    with store.lease(model) as snapshot:
        for name in list(BASE)[:6]:
            assert torch.equal(snapshot[name], given_.get(name, BASE[name]))
    store.remove_model(model)


def test_a_refit_without_any_change_is_a_version_that_shares_everything(store: ws.Store, model: str) -> None:
    # Whoever waits for a version after each step gets one; an engine that follows copies nothing.
    publish(store, model, BASE)
    before = places(store, model)
    module = torch.nn.ParameterDict({f"{i}": torch.empty(257, 63, device="meta") for i in range(8)})
    vae = torch.nn.ParameterDict({"w": torch.empty(9, device="meta")})
    with EngineHook.attach(store, model, {"t": module, "v": vae}) as hook:
        with store.refit(model, skip_unchanged=True) as refit:
            refit.put_many(BASE)
        report = hook.refit()
        assert (hook.version, report.copied_bytes) == (2, 0)
    assert (refit.report.version, refit.report.tensors, refit.report.unchanged) == (2, 0, len(BASE))
    assert moved(store, model, before) == set() and store.wait_for(model, after=1, timeout=0) == 2


def test_every_declared_tensor_has_to_be_given_all_the_same(store: ws.Store, model: str) -> None:
    publish(store, model, BASE)
    refit = store.refit(model, components=["t"], skip_unchanged=True)
    refit.put_many({name: tensor for name, tensor in BASE.items() if name not in ("t.2", "t.5", "v.w")})
    with pytest.raises(CoverageError) as caught:
        refit.commit()
    assert caught.value.details == {"missing": ["t.2", "t.5"]}
    refit.put("t.2", BASE["t.2"])
    refit.put("t.5", BASE["t.5"] + 1)
    with pytest.raises(CoverageError, match=r"duplicate \(t\.2\)"):
        refit.put("t.2", BASE["t.2"])
    assert refit.commit() == 2


def test_ties_stay_or_move_together(store: ws.Store, model: str) -> None:
    shared = torch.randn(31)
    publish(store, model, {"t.a": shared, "t.b": shared, "t.c": shared + 1})
    before = places(store, model)
    with store.refit(model, skip_unchanged=True) as refit:
        refit.put("t.a", shared.clone())
        refit.put("t.b", shared.clone())  # the other name, later
        refit.put("t.c", shared)
    assert moved(store, model, before) == {"t.c"} and refit.report.unchanged == 2
    with store.refit(model, skip_unchanged=True) as refit:
        refit.put_many({"t.a": shared * 2, "t.b": shared * 2, "t.c": shared})
    after = places(store, model)
    assert after["t.a"] == after["t.b"] != before["t.a"]
    with (
        pytest.raises(CoverageError, match=r"tied to t\.a"),
        store.refit(model, skip_unchanged=True) as refit,
    ):
        refit.put("t.a", shared * 2)
        refit.put("t.b", shared * 3)


def test_what_is_viewed_or_put_in_parts_moves(store: ws.Store, model: str) -> None:
    publish(store, model, BASE)
    before = places(store, model)
    with store.refit(model, partial=True, skip_unchanged=True) as refit:
        refit.put("t.0", BASE["t.0"])
        refit.view("t.0").copy_(BASE["t.0"])  # kept before, written now
        refit.view("t.1").copy_(BASE["t.1"])
        refit.put_part("t.2", BASE["t.2"][:100], (0, 0))
        refit.put_part("t.2", BASE["t.2"][100:], (100, 0))
        refit.put("t.3", BASE["t.3"])
    assert moved(store, model, before) == {"t.0", "t.1", "t.2"}
    assert (refit.report.tensors, refit.report.unchanged) == (3, 1)
    with store.lease(model) as snapshot:
        assert all(torch.equal(snapshot[name], tensor) for name, tensor in BASE.items())


def test_casts_and_name_maps_are_compared_as_stored(store: ws.Store, model: str) -> None:
    master = {name: torch.randn(300, 7) for name in ("q", "k", "out")}
    publish(store, model, {f"t.{name}": tensor.bfloat16() for name, tensor in master.items()})
    names = NameMap(prefix="t.")
    stepped = {f"module.{name}": tensor + (name == "k") for name, tensor in master.items()}
    with store.refit(model, names=names, skip_unchanged=True) as refit:
        refit.put_many(stepped)
    assert (refit.report.tensors, refit.report.unchanged) == (1, 2)
    with pytest.raises(CastRefused), store.refit(model, names=names, skip_unchanged=True) as refit:
        refit.put_many({**stepped, "module.q": torch.full((300, 7), 3.4e38)})


def test_a_copy_that_fails_leaves_nothing_entered(
    store: ws.Store, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, model, BASE)
    refit = store.refit(model, skip_unchanged=True)

    def fail(*_: object) -> None:
        raise RuntimeError("the device fell off the bus")

    with monkeypatch.context() as patch:
        patch.setattr(copies, "copy_all", fail)
        with pytest.raises(RuntimeError):
            refit.put_many(BASE | {"t.0": BASE["t.0"] + 1})
    refit.put_many(BASE)  # "t.0" has got a place of its own by now
    assert refit.commit() == 2
    assert (refit.report.tensors, refit.report.unchanged) == (1, len(BASE) - 1)


def test_the_first_version_has_nothing_to_be_compared_with(store: ws.Store, model: str) -> None:
    with store.refit(model, skip_unchanged=True) as refit:
        refit.put_many(BASE)
    assert (refit.report.tensors, refit.report.unchanged) == (len(BASE), 0)


def test_in_place_and_fresh_refits_have_nothing_to_leave_alone(store: ws.Store, model: str) -> None:
    publish(store, model, BASE)
    for options in ({"in_place": True}, {"fresh": True}):
        with pytest.raises(UsageError, match="skip_unchanged leaves tensors where the base has them"):
            store.refit(model, skip_unchanged=True, **options)  # type: ignore[arg-type]


# -- what the store makes of it -----------------------------------------------------------------------

PEERS = [Peer(n, Writer(100 + n, 1, "")) for n in range(2)]
SPECS = [TensorSpec(name, "uint8", (100,), (1,)) for name in ("t.a", "t.b", "t.c")]


def catalog() -> Catalog:
    """One model of three tensors in a space that is large enough."""
    made = Catalog(0, committed=1 << 20)
    refit = made.open_refit(OpenRefit(id=0, model="m", tag="latest"), PEERS[0], 0.0)
    made.reserve(refit.number, PEERS[0], SPECS)
    version = made.prepare_commit(refit.number, PEERS[0], [Write(spec.name) for spec in SPECS], 0.0)
    assert version is not None
    made.apply_commit(refit.number, version)
    return made


def delta(made: Catalog, rank: int = 0, world_size: int = 1, **options: bool) -> int:
    key = "k" if world_size > 1 else None
    request = OpenRefit(
        id=0,
        model="m",
        tag="latest",
        skip_unchanged=True,
        key=key,
        rank=rank,
        world_size=world_size,
        **options,
    )
    return made.open_refit(request, PEERS[rank], 0.0).number


def problems(made: Catalog, number: int, *writes: Write) -> dict[str, list[str]]:
    with pytest.raises(CoverageError) as caught:
        made.prepare_commit(number, PEERS[0], list(writes), 0.0)
    return caught.value.details


def kept(*names: str) -> list[Write]:
    return [Write(name, kept=True) for name in names]


def test_nothing_is_reserved_until_it_is_asked_for() -> None:
    made = catalog()
    before = made.usage()
    number = delta(made)
    assert made.usage() == before
    version = made.prepare_commit(number, PEERS[0], kept("t.a", "t.b", "t.c"), 0.0)
    assert version is not None
    made.apply_commit(number, version)
    assert made.usage() == before and made.models.get("m").tags == {"latest": 2}


def test_a_writer_cannot_keep_what_it_may_not() -> None:
    made = catalog()
    number = delta(made)
    assert problems(made, number, *kept("t.a", "t.b")) == {"missing": ["t.c"]}
    assert problems(made, number, *kept("t.a", "t.b", "t.c", "t.c")) == {"duplicate": ["t.c"]}
    assert problems(made, number, *kept("t.a", "t.b", "t.c", "t.d")) == {"unknown": ["t.d"]}
    # A place was asked for, and then nothing written there.
    made.reserve(number, PEERS[0], SPECS[:1])
    assert problems(made, number, *kept("t.a", "t.b", "t.c")) == {"duplicate": ["t.a"], "missing": ["t.a"]}
    # What has no place cannot have been written.
    assert problems(made, number, Write("t.a"), Write("t.b"), *kept("t.c")) == {
        "unknown": ["t.b"],
        "missing": ["t.b"],
    }
    halves = [Write("t.b", Box((0,), (50,)), kept=True), Write("t.b", Box((50,), (99,)), kept=True)]
    assert problems(made, number, Write("t.a"), *kept("t.c"), *halves) == {"holes": ["t.b"]}


def test_only_who_said_so_may_keep() -> None:
    made = catalog()
    number = made.open_refit(OpenRefit(id=0, model="m", tag="latest"), PEERS[0], 0.0).number
    assert "duplicate" in problems(made, number, *kept("t.a", "t.b", "t.c"))
    made.abort_refit(number, PEERS[0], "")
    number = made.open_refit(OpenRefit(id=0, model="m", tag="latest", partial=True), PEERS[0], 0.0).number
    assert problems(made, number, *kept("t.a")) == {"unknown": ["t.a"]}


def test_ranks_keep_and_write_between_them() -> None:
    made = catalog()
    number = delta(made, 0, 2)
    assert delta(made, 1, 2) == number
    made.reserve(number, PEERS[1], SPECS[2:])
    assert made.prepare_commit(number, PEERS[0], kept("t.a"), 0.0) is None
    version = made.prepare_commit(number, PEERS[1], [*kept("t.b"), Write("t.c")], 0.0)
    assert version is not None
    base = made.models.get("m").tagged("latest")
    assert {n for n, r in version.records.items() if r != base.records[n]} == {"t.c"}


def test_one_rank_keeping_what_another_writes_is_a_duplicate() -> None:
    made = catalog()
    number = delta(made, 0, 2, partial=True)
    delta(made, 1, 2, partial=True)
    made.reserve(number, PEERS[1], SPECS[:1])
    made.prepare_commit(number, PEERS[0], kept("t.a"), 0.0)
    with pytest.raises(CoverageError) as caught:
        made.prepare_commit(number, PEERS[1], [Write("t.a")], 0.0)
    assert caught.value.details == {"duplicate": ["t.a"]}


def test_half_overwritten_bytes_are_not_kept() -> None:
    made = catalog()
    torn = made.open_refit(OpenRefit(id=0, model="m", tag="latest", in_place=True), PEERS[0], 0.0).number
    made.abort_refit(torn, PEERS[0], "")
    with pytest.raises(TagTorn):
        delta(made)
