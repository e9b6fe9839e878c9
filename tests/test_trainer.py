"""Refits against a real service, and against a scripted one where it has to fail at the right moment."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_store import PATIENCE, FakeArena, FakeStore, record
from processes import Service

import weightstore.copies
import weightstore.writing
from weightstore import wire
from weightstore.client import Store
from weightstore.errors import (
    ArenaFull,
    CoverageError,
    InvalidTensor,
    ProtocolError,
    RefitAborted,
    RefitClosed,
    RefitConflict,
    StoreGone,
    UsageError,
)
from weightstore.tensors import DTYPES, same_bits
from weightstore.trainer import MOVES, State
from weightstore.types import TensorRecord, TensorSpec
from weightstore.writing import GROUP


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture
def store(service: Service) -> Iterator[Store]:
    with service.connect() as store:
        yield store
        for model in store.models():
            store.remove_model(model)


_made = count()


class _Name:
    """The model of the test that runs: a new one each time, so that version numbers start at 1."""

    value = ""

    def __call__(self) -> str:
        return self.value


MODEL = _Name()


@pytest.fixture(autouse=True)
def new_model() -> None:
    MODEL.value = f"m{next(_made)}"


def used(store: Store) -> int:
    """Bytes that are neither free nor part of a live version."""
    arena = store.status().arena
    return arena.pending + arena.quarantined


BASE = {"t.w": torch.arange(12.0).reshape(3, 4), "t.b": torch.ones(3), "v.w": torch.zeros(5)}


def publish(store: Store, tensors: dict[str, Any] = BASE, **options: Any) -> int:
    with store.refit(MODEL(), **options) as refit:
        refit.put_many(tensors)
    return refit.report.version


def read(store: Store, name: str, tag: str = "latest") -> torch.Tensor:
    with store.lease(MODEL(), tag) as snapshot:
        return snapshot[name].clone()


# -- what can be put --------------------------------------------------------------------------------


def test_every_dtype_and_shape_arrives_bit_for_bit(store: Store) -> None:
    tensors = {f"t.{name}": torch.arange(24).reshape(2, 3, 4).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {
        "t.scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "t.empty": torch.empty(0, 7),
        "t.one": torch.ones(1, 1),
        "t.nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "t.channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "t.turned": torch.randn(3, 4).T,
        "t.sliced": torch.randn(6, 8)[::2, 1::3],
        "t.expanded": torch.randn(3, 1).expand(3, 4),
    }
    publish(store, tensors)
    with store.lease(MODEL()) as snapshot:
        assert set(snapshot) == set(tensors)
        for name, tensor in tensors.items():
            assert (snapshot[name].shape, snapshot[name].dtype) == (tensor.shape, tensor.dtype), name
            assert same_bits(snapshot[name], tensor), name
        assert snapshot["t.channels_last"].stride() == (60, 1, 15, 3)
        assert snapshot["t.turned"].stride() == (1, 4)
        assert snapshot["t.sliced"].is_contiguous() and snapshot["t.expanded"].is_contiguous()


def test_large_tensors_arrive_whole(store: Store) -> None:
    large = torch.randn(3_000_000)
    publish(store, {"t.large": large, "t.offbeat": large[1:].to(torch.bfloat16)})
    assert torch.equal(read(store, "t.large"), large)
    assert torch.equal(read(store, "t.offbeat"), large[1:].bfloat16())


def test_numpy_and_parameters_are_put_like_tensors(store: Store) -> None:
    publish(store, {"t.n": np.arange(3, dtype=np.int16), "t.p": torch.nn.Parameter(torch.ones(2))})
    assert read(store, "t.n").tolist() == [0, 1, 2]
    assert read(store, "t.p").tolist() == [1, 1]


def test_with_a_base_the_stored_stride_wins(store: Store) -> None:
    image = torch.randn(2, 3, 4, 5)
    publish(store, {"t.conv": image.to(memory_format=torch.channels_last)})
    publish(store, {"t.conv": image + 1})
    with store.lease(MODEL()) as snapshot:
        assert snapshot["t.conv"].stride() == (60, 1, 15, 3)
        assert torch.equal(snapshot["t.conv"], image + 1)


def test_a_module_goes_in_and_comes_out_with_its_ties(store: Store) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
    net[2].weight = net[0].weight
    with store.refit(MODEL()) as refit:
        refit.put_module(net, prefix="transformer.")
    with store.lease(MODEL()) as snapshot:
        assert {n.removeprefix("transformer.") for n in snapshot} == set(net.state_dict())
        for name, value in net.state_dict().items():
            assert torch.equal(snapshot[f"transformer.{name}"], value)
        records = snapshot.records
        assert records["transformer.0.weight"].offset == records["transformer.2.weight"].offset
    distinct = {p.data_ptr(): p.nbytes for p in net.state_dict().values()}
    assert (refit.report.tensors, refit.report.nbytes) == (len(net.state_dict()), sum(distinct.values()))
    with store.refit(MODEL()) as refit:  # the same again, onto the base with its ties
        refit.put_module(net, prefix="transformer.")
    assert refit.report.base == 1


def test_many_tensors_need_one_reserve(tmp_path: Path) -> None:
    arena = FakeArena(16 << 20)
    fake = FakeStore(tmp_path / "s", arena)
    Scripted(fake)
    net = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2500))
    with Store(fake.path, PATIENCE) as store, store.refit(MODEL()) as refit:
        refit.put_module(net)
    assert [len(r.specs) for r in fake.of(wire.Reserve)] == [5000]
    assert len(fake.of(wire.CommitRefit)[0].writes) == 5000
    assert len(fake.received) <= 5  # hello, open, reserve, commit, and nothing per tensor
    fake.close()
    arena.close()


# -- early errors -----------------------------------------------------------------------------------


def test_every_wrong_name_is_told_before_a_byte_moves(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store)
    refit = store.refit(MODEL(), components=["t"])
    monkeypatch.setattr(weightstore.copies, "copy_all", lambda *_: pytest.fail("a byte moved"))
    wrong = {
        "t.w": torch.zeros(4, 3),
        "t.b": torch.ones(3).int(),
        "t.new": torch.ones(1),
        "v.w": torch.zeros(5),
    }
    with pytest.raises(CoverageError) as caught:
        refit.put_many(wrong)
    assert caught.value.details == {"mismatched": ["t.w", "t.b"], "unknown": ["t.new"], "undeclared": ["v.w"]}
    assert "given int32 [3], stored float32 [3]" in caught.value.message
    refit.abort()


def test_a_name_put_twice_is_refused(store: Store) -> None:
    refit = store.refit(MODEL())
    refit.put("t.w", torch.ones(2))
    with pytest.raises(CoverageError) as caught:
        refit.put("t.w", torch.zeros(2))
    assert caught.value.details == {"duplicate": ["t.w"]}
    refit.commit()
    assert read(store, "t.w").tolist() == [1, 1]


def test_a_forgotten_tensor_leaves_the_refit_open_to_be_completed(store: Store) -> None:
    publish(store)
    refit = store.refit(MODEL())
    refit.put_many({name: BASE[name] + 1 for name in ("t.w", "v.w")})
    with pytest.raises(CoverageError) as caught:
        refit.commit()
    assert caught.value.details["missing"] == ["t.b"]
    assert refit.state is State.OPEN
    refit.put("t.b", BASE["t.b"] + 1)
    assert refit.commit() == 2


def test_a_block_that_forgets_a_tensor_aborts(store: Store) -> None:
    publish(store)
    with pytest.raises(CoverageError), store.refit(MODEL()) as refit:
        refit.put("t.w", BASE["t.w"] + 1)
    assert refit.state is State.ABORTED
    assert store.tags(MODEL()) == {"latest": 1} and used(store) == 0
    assert torch.equal(read(store, "t.w"), BASE["t.w"])


def test_what_the_store_cannot_hold_is_refused_and_the_refit_goes_on(store: Store) -> None:
    with store.refit(MODEL()) as refit:
        with pytest.raises(InvalidTensor, match="complex128"):
            refit.put("t.c", torch.zeros(2, dtype=torch.complex128))
        refit.put("t.w", torch.ones(2))
    assert store.tags(MODEL()) == {"latest": 1}


def test_an_arena_that_is_full_says_so_and_nothing_is_lost(store: Store) -> None:
    publish(store)
    with pytest.raises(ArenaFull), store.refit(MODEL(), extend=True, partial=True) as refit:
        refit.view("t.huge", torch.empty(200 << 20, dtype=torch.uint8, device="meta"))
    assert refit.state is State.ABORTED
    assert torch.equal(read(store, "t.w"), BASE["t.w"]) and used(store) == 0


def test_components_given_as_one_string_are_refused(store: Store) -> None:
    with pytest.raises(UsageError, match=r"\['transformer'\]"):
        store.refit(MODEL(), components="transformer")


# -- ties -------------------------------------------------------------------------------------------


def test_ties_of_the_base_stay_ties_and_must_agree(store: Store) -> None:
    shared = torch.randn(4)
    publish(store, {"t.a": shared, "t.b": shared})
    with store.refit(MODEL()) as refit:
        refit.put_many({"t.a": shared + 1, "t.b": shared + 1})  # equal, though not the same memory
    with store.lease(MODEL()) as snapshot:
        assert snapshot.records["t.a"].offset == snapshot.records["t.b"].offset
    with store.refit(MODEL()) as refit:  # one name of a tie stands for all
        refit.put("t.b", shared + 2)
    assert torch.equal(read(store, "t.a"), shared + 2)
    with (
        pytest.raises(CoverageError, match=r"tied to t\.a, whose values differ"),
        store.refit(MODEL()) as refit,
    ):
        refit.put("t.a", shared)
        refit.put("t.b", shared + 1)
    assert torch.equal(read(store, "t.a"), shared + 2)


def test_a_partial_refit_moves_a_tie_whole(store: Store) -> None:
    shared = torch.randn(4)
    publish(store, {"t.a": shared, "t.b": shared, "t.c": shared + 1})
    publish(store, {"t.b": shared * 2}, partial=True)
    assert torch.equal(read(store, "t.a"), shared * 2) and torch.equal(read(store, "t.c"), shared + 1)


# -- other ways to write ----------------------------------------------------------------------------


def test_views_are_the_arena_itself(store: Store) -> None:
    publish(store)
    with store.refit(MODEL(), partial=True, extend=True) as refit:
        refit.view("t.b").copy_(torch.tensor([4.0, 5.0, 6.0]))
        refit.view("t.new", torch.empty(2, dtype=torch.int8, device="meta")).fill_(7)
        refit.view("t.more", TensorSpec("t.more", "float16", (2, 2), (1, 2))).fill_(0.5)
        refit.view("t.b")[0] = 9.0  # again is allowed
        with pytest.raises(CoverageError, match="give its dtype and shape"):
            refit.view("t.nothing")
        with pytest.raises(CoverageError, match="duplicate"):
            refit.put("t.b", torch.zeros(3))
    with store.lease(MODEL()) as snapshot:
        assert snapshot["t.b"].tolist() == [9, 5, 6]
        assert snapshot["t.new"].tolist() == [7, 7]
        assert snapshot["t.more"].stride() == (1, 2)
    assert refit.report.tensors == 3


def test_reserved_places_can_be_filled_without_tensors(store: Store) -> None:
    specs = [TensorSpec("t.a", "uint8", (4,), (1,)), TensorSpec("t.b", "uint8", (4,), (1,), alias_of="t.a")]
    with store.refit(MODEL()) as refit:
        a, b = refit.reserve(specs)
        assert a.extent == b.extent
        refit.mapping.view(a.offset, a.nbytes)[:] = b"abcd"
        with pytest.raises(CoverageError, match="no place was reserved"):
            refit.wrote(["t.c"])
        refit.wrote(["t.a"])
    assert bytes(read(store, "t.b").tolist()) == b"abcd"


def test_parts_make_up_a_tensor(store: Store) -> None:
    publish(store)
    whole = torch.randn(3, 4)
    with store.refit(MODEL(), components=["t"]) as refit:
        refit.put_part("t.w", whole[:, :1], at=(0, 0))
        with pytest.raises(CoverageError, match="overlapping"):
            refit.put_part("t.w", whole[:2], at=(0, 0))
        refit.put_part("t.w", whole[:, 1:], at=(0, 1))
        refit.put("t.b", BASE["t.b"])
        with pytest.raises(UsageError, match="dimensions"):
            refit.put_part("t.w", whole[0], at=(0, 0))
    assert torch.equal(read(store, "t.w"), whole)
    assert refit.report.nbytes == whole.nbytes + BASE["t.b"].nbytes


def test_several_ranks_share_a_refit(service: Service, store: Store) -> None:
    whole = torch.randn(6, 4)
    publish(store, {"t.w": torch.zeros(6, 4)})
    versions: dict[int, int] = {}

    def rank(number: int) -> None:
        with service.connect() as mine:
            with mine.refit(MODEL(), key="step-1", rank=number, world_size=3) as refit:
                refit.put_part("t.w", whole[2 * number : 2 * number + 2], at=(2 * number, 0))
            versions[number] = refit.report.version

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert versions == {0: 2, 1: 2, 2: 2}
    assert torch.equal(read(store, "t.w"), whole)


def test_a_rank_that_gives_up_ends_the_refit_for_all(service: Service, store: Store) -> None:
    publish(store)
    with service.connect() as other:
        mine = store.refit(MODEL(), key="k", rank=0, world_size=2)
        theirs = other.refit(MODEL(), key="k", rank=1, world_size=2)
        mine.put("t.w", BASE["t.w"])
        theirs.abort("out of memory")
        with pytest.raises(RefitAborted, match="out of memory"):
            mine.commit()
        assert mine.state is State.ABORTED
        with pytest.raises(RefitClosed, match="out of memory"):
            mine.put("t.b", BASE["t.b"])
        assert used(store) == 0  # both have said that nothing is landing
    with (
        pytest.raises(RefitAborted),
        service.connect() as other,
        store.refit(MODEL(), key="k", rank=0, world_size=2) as mine,
    ):
        other.refit(MODEL(), key="k", rank=1, world_size=2).abort()
        mine.reserve([TensorSpec("t.w", "float32", (3, 4), (4, 1))])
        mine.commit()
    assert used(store) == 0


# -- ending -----------------------------------------------------------------------------------------


def test_an_exception_aborts_and_is_not_hidden(store: Store) -> None:
    publish(store)
    with pytest.raises(ZeroDivisionError), store.refit(MODEL()) as refit:
        refit.put("t.w", torch.zeros(3, 4))
        _ = 1 / 0
    assert refit.state is State.ABORTED
    assert torch.equal(read(store, "t.w"), BASE["t.w"]) and used(store) == 0
    assert store.status().refits == []


def test_an_ended_refit_refuses_everything(store: Store) -> None:
    refit = store.refit(MODEL())
    refit.put("t.w", torch.ones(2))
    with pytest.raises(UsageError, match="is open; there is a report once"):
        str(refit.report)
    refit.commit()
    for use in (
        lambda: refit.put("t.b", torch.ones(1)),
        lambda: refit.view("t.w"),
        lambda: refit.reserve([]),
        lambda: refit.wrote([]),
        lambda: refit.mapping,
        refit.commit,
        refit.abort,
    ):
        with pytest.raises(RefitClosed, match="committed; open a new one"):
            use()
    aborted = store.refit(MODEL())
    aborted.abort("no need")
    aborted.abort()
    with pytest.raises(RefitClosed, match="no need"):
        aborted.commit()


def test_the_report_is_about_what_was_written(store: Store) -> None:
    publish(store)
    with store.refit(MODEL(), tag="policy", partial=True) as refit:
        refit.put("t.w", BASE["t.w"])
    report = refit.report
    assert (report.model, report.tag, report.version, report.base) == (MODEL(), "policy", 2, 1)
    assert (report.tensors, report.nbytes) == (1, 48)
    assert report.seconds > 0 and report.gb_per_s > 0
    assert str(report).startswith(f"{MODEL()}: policy is now version 2 on version 1: 1 tensor, 48 B")


def test_two_refits_of_a_tag_conflict(store: Store) -> None:
    first = store.refit(MODEL(), tag="policy")
    with pytest.raises(RefitConflict, match="already open"):
        store.refit(MODEL(), tag="policy")
    first.abort()
    store.refit(MODEL(), tag="policy").abort()


def test_every_state_is_in_the_table() -> None:
    assert set(MOVES) == set(State)
    assert all(moves <= set(State) for moves in MOVES.values())


def test_a_copy_that_fails_does_not_count_as_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store)
    refit = store.refit(MODEL())
    real = weightstore.copies.copy_all

    def fail(pairs: Any, mapping: Any) -> None:
        real(list(pairs)[:1], mapping)
        raise RuntimeError("the device fell off the bus")

    monkeypatch.setattr(weightstore.copies, "copy_all", fail)
    with pytest.raises(RuntimeError, match="fell off"):
        refit.put_many(BASE)
    monkeypatch.undo()
    with pytest.raises(CoverageError) as caught:
        refit.commit()
    assert set(caught.value.details["missing"]) == set(BASE)
    refit.put_many(BASE)
    assert refit.commit() == 2


@pytest.mark.parametrize("how", [{"partial": True}, {"skip_unchanged": True}], ids=str)
@pytest.mark.parametrize("value", [1.0, 2.0], ids=["unchanged", "changed"])
def test_a_new_tensor_may_be_tied_to_one_of_the_base(
    store: Store, how: dict[str, bool], value: float
) -> None:
    publish(store, {"t.old": torch.ones(6), "t.other": torch.zeros(3)})
    shared = torch.full((6,), value)
    with store.refit(MODEL(), extend=True, **how) as refit:  # type: ignore[arg-type]
        refit.put_many({"t.old": shared, "t.new": shared, "t.other": torch.zeros(3)})
    assert torch.equal(read(store, "t.old"), shared) and torch.equal(read(store, "t.new"), shared)


def test_what_was_not_declared_is_called_so_by_every_way_of_writing(store: Store) -> None:
    publish(store, {"t.w": torch.ones(6), "vae.w": torch.ones(6)})
    refit = store.refit(MODEL(), components=["t"])
    for write in (
        lambda: refit.put("vae.w", torch.zeros(6)),
        lambda: refit.put_part("vae.w", torch.zeros(2), (0,)),
        lambda: refit.view("vae.w"),
        lambda: refit.view("vae.w", torch.zeros(6)),
    ):
        with pytest.raises(CoverageError) as caught:
            write()
        assert caught.value.details == {"undeclared": ["vae.w"]}
    refit.abort()


MANY = {f"t.w{i}": torch.full((3,), float(i)) for i in range(2 * GROUP + 10)}


@pytest.fixture
def in_groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What is done for tensors of a device, done for the CPU's; how many tensors each copy was of."""
    copied: list[int] = []
    real = weightstore.copies.copy_all

    def copy_all(pairs: Any, mapping: Any) -> None:
        pairs = list(pairs)
        copied.append(len(pairs))
        real(pairs, mapping)

    monkeypatch.setattr(weightstore.writing, "copied_later", lambda tensor: True)
    monkeypatch.setattr(weightstore.copies, "copy_all", copy_all)
    return copied


def test_many_tensors_of_a_device_are_looked_at_in_groups(store: Store, in_groups: list[int]) -> None:
    publish(store, MANY)
    assert in_groups == [len(MANY)]  # places had to be found first
    new = {name: tensor + 0.5 for name, tensor in MANY.items()}
    publish(store, new)
    assert in_groups[1:] == [GROUP, GROUP, 10]
    for name, tensor in new.items():
        assert torch.equal(read(store, name), tensor)


@pytest.mark.parametrize("mistake", ["unknown", "twice", "mismatched", "dtype"])
def test_a_mistake_in_a_late_group_undoes_the_call(store: Store, in_groups: list[int], mistake: str) -> None:
    publish(store, MANY)
    given: list[tuple[str, Any]] = list(MANY.items())
    if mistake == "unknown":
        given[5] = ("t.early", torch.ones(3))
        given.append(("t.late", torch.ones(3)))
    elif mistake == "twice":
        given.append(given[0])
    elif mistake == "mismatched":
        given[-1] = (given[-1][0], torch.ones(4))
    else:
        given[-1] = (given[-1][0], torch.full((3,), 1e39, dtype=torch.float64))
    refit = store.refit(MODEL())
    with pytest.raises(UsageError) as caught:
        refit.put_many(given)
    if mistake == "unknown":
        assert caught.value.details == {"unknown": ["t.early", "t.late"]}
    with pytest.raises(CoverageError) as missing:
        refit.commit()
    assert set(missing.value.details["missing"]) == set(MANY)
    refit.put_many({name: tensor * 2 for name, tensor in MANY.items()})
    refit.commit()
    assert all(torch.equal(read(store, name), tensor * 2) for name, tensor in list(MANY.items())[::50])


@pytest.fixture
def landing_late(in_groups: list[int], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A device whose copies land when they are waited for, and no earlier. Copies that wait; what is of dtype
    float32 is the device's."""
    waiting: list[Any] = []
    real = weightstore.copies.copy_all

    def copy_all(pairs: Any, mapping: Any) -> None:
        for place, source in list(pairs):
            if source.dtype == torch.float32:
                waiting.append((place, source))
            else:
                real([(place, source)], mapping)

    def drain(mapping: Any) -> None:
        while waiting:
            real([waiting.pop(0)], mapping)

    monkeypatch.setattr(weightstore.copies, "copy_all", copy_all)
    monkeypatch.setattr(weightstore.transaction, "drain_uploads", drain)
    monkeypatch.setattr(weightstore.writing, "drain_uploads", drain)
    return waiting


def test_what_a_mistake_left_under_way_does_not_land_on_what_is_put_next(
    store: Store, landing_late: list[Any]
) -> None:
    publish(store, MANY)
    with store.refit(MODEL()) as refit:
        with pytest.raises(CoverageError, match="unknown"):
            refit.put_many([*MANY.items(), ("t.late", torch.ones(3))])
        refit.put_many({name: (tensor + 0.5).double() for name, tensor in MANY.items()})
    for name, tensor in MANY.items():
        assert torch.equal(read(store, name), tensor + 0.5)


def test_what_is_under_way_does_not_land_on_a_view(store: Store, landing_late: list[Any]) -> None:
    publish(store, MANY)
    with store.refit(MODEL()) as refit:
        refit.put_many(MANY)
        assert landing_late
        refit.view("t.w7").fill_(9.0)
    assert torch.equal(read(store, "t.w7"), torch.full((3,), 9.0))


def test_tied_tensors_are_looked_at_together(store: Store, in_groups: list[int]) -> None:
    shared = torch.arange(4.0)
    publish(store, {**MANY, "t.first": shared, "t.last": shared})
    in_groups.clear()
    publish(store, {"t.first": shared, **MANY, "t.last": shared})
    assert in_groups == [len(MANY) + 1]


def test_commit_and_abort_wait_for_copies(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store)
    real = weightstore.copies.copy_all
    for end in ("commit", "abort"):
        refit = store.refit(MODEL())
        copying, go_on, ended = threading.Event(), threading.Event(), threading.Event()

        def slow(pairs: Any, mapping: Any, copying: Any = copying, go_on: Any = go_on) -> None:
            copying.set()
            assert go_on.wait(PATIENCE)
            real(pairs, mapping)

        monkeypatch.setattr(weightstore.copies, "copy_all", slow)
        putting = threading.Thread(target=refit.put_many, args=(BASE,))
        putting.start()
        assert copying.wait(PATIENCE)
        finish = getattr(refit, end)
        ending = threading.Thread(target=lambda finish=finish, ended=ended: (finish(), ended.set()))
        ending.start()
        assert not ended.wait(0.05)
        go_on.set()
        putting.join(PATIENCE)
        ending.join(PATIENCE)
        assert ended.is_set()
        monkeypatch.undo()
    assert store.tags(MODEL()) == {"latest": 2} and used(store) == 0


def test_a_refit_is_filled_from_several_threads(store: Store) -> None:
    tensors = {f"t.{i}": torch.full((257,), float(i)) for i in range(64)}
    with store.refit(MODEL()) as refit:
        threads = [
            threading.Thread(target=lambda i=i: [refit.put(n, tensors[n]) for n in list(tensors)[i::4]])
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    with store.lease(MODEL()) as snapshot:
        assert all(torch.equal(snapshot[name], tensor) for name, tensor in tensors.items())


# -- the store goes away ----------------------------------------------------------------------------


class Scripted:
    """Gives a fake store a refit that works: places in the order they are reserved."""

    def __init__(self, fake: FakeStore, targets: list[TensorRecord] | None = None) -> None:
        self.fake = fake
        self.used = 0
        fake.answers[wire.OpenRefit] = lambda r: (
            wire.RefitOpened(
                id=r.id,
                refit=5,
                base=1 if targets else 0,
                base_records=wire.encode_records(targets or []),
                targets=targets or [],
            ),
            [fake.arena.writer()],
        )
        fake.answers[wire.Reserve] = self.reserve
        fake.answers[wire.CommitRefit] = lambda r: wire.Committed(id=r.id, version=2)

    def reserve(self, request: wire.Reserve) -> wire.Reserved:
        records = []
        for spec in request.specs:
            made = record(spec.name, self.used, spec.shape, spec.dtype)
            records.append(made)
            self.used += -(-made.nbytes // 256) * 256
        return wire.Reserved(id=request.id, records=records)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeStore]:
    arena = FakeArena()
    fake = FakeStore(tmp_path / "s", arena)
    yield fake
    fake.close()
    arena.close()


@pytest.fixture
def scripted(fake: FakeStore) -> Iterator[Store]:
    Scripted(fake)
    with Store(fake.path, PATIENCE) as store:
        yield store


def test_a_store_that_dies_during_the_commit_leaves_the_outcome_open(
    fake: FakeStore, scripted: Store
) -> None:
    fake.answers[wire.CommitRefit] = lambda r: fake.drop()  # type: ignore[func-returns-value]
    refit = scripted.refit("m", tag="policy")
    refit.put("t.w", torch.ones(3))
    with pytest.raises(
        StoreGone, match=r"may or may not have become a version.*store\.tags\('m'\)"
    ) as caught:
        refit.commit()
    assert caught.value.details["outcome"] == "unknown"
    assert (caught.value.details["model"], caught.value.details["tag"]) == ("m", "policy")
    assert refit.state is State.ABORTED


def test_a_store_that_dies_before_the_commit_has_committed_nothing(fake: FakeStore, scripted: Store) -> None:
    for use in (
        lambda refit: refit.put("t.b", torch.ones(3)),
        lambda refit: refit.view("t.w"),
        lambda refit: refit.commit(),
    ):
        with pytest.raises(StoreGone, match="nothing was committed; begin a new one") as caught:
            with scripted.refit("m") as refit:
                refit.put("t.w", torch.ones(3))
                fake.lose(scripted.link)
                use(refit)
        assert caught.value.details["outcome"] == "aborted"
        assert refit.state is State.ABORTED
    scripted.refit("m")  # the next one finds the store again


def test_interrupting_a_commit_gives_the_refit_up(fake: FakeStore, scripted: Store) -> None:
    refit = scripted.refit("m")
    refit.put("t.w", torch.ones(3))
    asked = threading.Event()
    fake.answers[wire.CommitRefit] = lambda r: asked.set()  # type: ignore[func-returns-value]
    connection = scripted.link.connect()
    real = connection.request

    def interrupted(message: Any, expect: Any, **options: Any) -> Any:
        if isinstance(message, wire.CommitRefit):
            connection.request = real  # type: ignore[method-assign]
            raise KeyboardInterrupt
        return real(message, expect, **options)

    connection.request = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        refit.commit()
    assert fake.of(wire.AbortRefit)[0].refit == 5
    assert refit.state is State.ABORTED


@pytest.mark.parametrize(
    "records",
    [[record("t.w", 1 << 40, (3,))], [record("t.other", 0, (3,))], []],
    ids=["beyond the arena", "another name", "too few"],
)
def test_a_store_that_lies_about_places_is_not_believed(
    fake: FakeStore, scripted: Store, records: list[TensorRecord]
) -> None:
    fake.answers[wire.Reserve] = lambda r: wire.Reserved(id=r.id, records=records)
    refit = scripted.refit("m")
    with pytest.raises(ProtocolError):
        refit.put("t.w", torch.ones(3))
    refit.abort()
