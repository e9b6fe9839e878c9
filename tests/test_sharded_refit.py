"""Trainers of several ranks: FSDP2, tensor and data parallel models, real processes, a real store.

What lands is compared with what torch gathers of the same model.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Service, eventually
from ranks import Group, RankFailed, Zygote
from safetensors.torch import load_file

from weightstore.client import Store
from weightstore.names import NameMap
from weightstore.tensors import same_bits

WIDE = 1501 * 503 * 4
"""Bytes of the one tensor that is large enough to be shared out."""


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    with Zygote(tmp_path_factory.mktemp("ranks")) as zygote:
        yield zygote


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("service"), capacity="96MiB") as service:
        yield service


@pytest.fixture
def store(service: Service) -> Iterator[Store]:
    with service.connect() as store:
        yield store
        for model in store.models():
            store.remove_model(model)


@pytest.fixture(scope="module")
def two(zygote: Zygote, service: Service) -> Iterator[Group]:
    with zygote.group(2, service.socket) as group:
        yield group


@pytest.fixture(scope="module")
def four(zygote: Zygote, service: Service) -> Iterator[Group]:
    with zygote.group(4, service.socket) as group:
        yield group


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return tmp_path / "whole.safetensors"


def landed(store: Store, model: str, reference: Path, prefix: str = "t.") -> dict[str, torch.Tensor]:
    """What the store holds, once it is what torch gathered."""
    expected = {f"{prefix}{name}": tensor for name, tensor in load_file(reference).items()}
    with store.lease(model) as snapshot:
        assert set(snapshot) == set(expected)
        for name, tensor in expected.items():
            assert same_bits(snapshot[name], tensor.to(snapshot[name].dtype)), name
    return expected


def nbytes_of(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of these, the tied pair once."""
    return sum(tensor.nbytes for name, tensor in tensors.items() if name != "t.head.weight")


# -- what lands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fsdp", "layers", "ddp", "columns"])
def test_two_ranks_write_one_model(two: Group, store: Store, reference: Path, kind: str) -> None:
    two.all("build", kind=kind)
    prefix = "t." if kind != "ddp" else ""
    options: dict[str, Any] = {} if kind != "ddp" else {"names": NameMap(prefix="t.").to_json()}
    for version in (1, 2):  # a first one, and one on a base
        if kind != "columns":
            two.all("train")
        two.all("save", path=str(reference))
        reports = two.all("write", model=kind, prefix=prefix, **options)
        whole = landed(store, kind, reference)
        assert [report["version"] for report in reports] == [version] * 2
        assert [report["collectives"] for report in reports] == [0, 0]
        assert sum(report["nbytes"] for report in reports) == nbytes_of(whole)
        if kind != "columns":
            assert all(report["nbytes"] >= WIDE // 2 - 503 * 4 for report in reports)


@pytest.mark.parametrize("kind", ["fsdp", "hsdp", "fsdp_tp", "ddp"])
def test_four_ranks_write_one_model(four: Group, store: Store, reference: Path, kind: str) -> None:
    # Of most tensors some ranks hold nothing: 4 ranks, and as few as 1 row.
    layout = "\n".join(four.all("build", kind=kind)[0])
    assert ("_StridedShard" in layout) == (kind == "fsdp_tp")
    assert ("Replicate" in layout) == (kind in ("hsdp", "fsdp_tp"))
    options: dict[str, Any] = {"prefix": ""} if kind == "ddp" else {}
    names = NameMap(prefix="t.") if kind == "ddp" else NameMap()
    four.all("save", path=str(reference))
    reports = four.all("write", model=kind, names=names.to_json(), **options)
    whole = landed(store, kind, reference)
    assert sum(report["nbytes"] for report in reports) == nbytes_of(whole)
    assert [report["collectives"] for report in reports] == [0] * 4
    # Also of what all of them have nobody writes it all.
    assert max(report["nbytes"] for report in reports) < WIDE // 2
    with store.lease(kind) as snapshot:
        ties = {name: record.offset for name, record in snapshot.records.items()}
    assert ties["t.head.weight"] == ties["t.embed.weight"]


def test_gathered_parameters_of_a_lower_precision_are_not_what_is_written(
    two: Group, store: Store, reference: Path
) -> None:
    # After a forward FSDP2 shows what it computed with: whole tensors, in bfloat16.
    two.all("build", kind="mixed")
    two.all("train")
    assert two.all("shown") == [["Parameter"]] * 2
    two.all("write", model="mixed")
    assert two.all("shown") == [["DTensor"]] * 2
    two.all("save", path=str(reference))
    landed(store, "mixed", reference)
    with store.lease("mixed") as snapshot:
        wide = snapshot["t.wide"]
        assert wide.dtype == torch.float32 and not torch.equal(wide, wide.bfloat16().float())


def test_masters_are_cast_to_the_stored_dtype_by_the_rank_that_has_them(
    two: Group, store: Store, reference: Path
) -> None:
    two.all("build", kind="ddp", dtype="bfloat16")
    names = {"prefix": "", "names": NameMap(prefix="t.").to_json()}
    two.all("write", model="cast", **names)
    two.all("build", kind="fsdp", seed=1)
    two.all("save", path=str(reference))
    two.all("write", model="cast")
    whole = landed(store, "cast", reference)
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    with store.lease("cast") as snapshot:
        assert {snapshot[name].dtype for name in snapshot} == {torch.bfloat16}


def test_shards_go_through_a_name_map(two: Group, store: Store, reference: Path) -> None:
    two.all("build", kind="fsdp")
    two.all("save", path=str(reference))
    names = (
        NameMap(prefix="dit.")
        .rename("^down", "mlp.out")
        .fuse(["up.weight", "embed.weight"], "table")
        .split("wide", ["left", "right"], dim=1, shares=[500, 3])
        .drop("^freqs")
    )
    for version in (1, 2):
        reports = two.all("write", model="mapped", prefix="", names=names.to_json())
        assert [report["version"] for report in reports] == [version] * 2
        whole = load_file(reference)
        with store.lease("mapped") as snapshot:
            assert torch.equal(snapshot["dit.mlp.out.weight"], whole["down.weight"])
            table = torch.cat([whole["up.weight"], whole["embed.weight"]])
            assert torch.equal(snapshot["dit.table"], table)
            assert torch.equal(torch.cat([snapshot["dit.left"], snapshot["dit.right"]], dim=1), whole["wide"])
            assert not [name for name in snapshot if "freqs" in name]


def test_stages_of_a_pipeline_are_each_written_by_their_rank(two: Group, store: Store) -> None:
    two.all("build", kind="stages")
    two.all("open", model="stages")
    two.all("put", replicated=False)
    assert [report["tensors"] for report in two.all("commit")] == [2, 2]
    with store.lease("stages") as snapshot:
        assert set(snapshot) == {f"t.stage{i}.{leaf}" for i in (0, 1) for leaf in ("weight", "bias")}


def test_unchanged_tensors_are_found_by_whoever_writes_them(two: Group, store: Store) -> None:
    two.all("write_mine", model="delta", count=6, scale=1.0)
    with store.lease("delta") as snapshot:
        before = {name: record.offset for name, record in snapshot.records.items()}
    reports = two.all("write_mine", model="delta", count=6, scale=7.0)
    assert reports == [{"tensors": 0, "unchanged": 3}, {"tensors": 1, "unchanged": 2}]
    with store.lease("delta") as snapshot:
        moved = {name for name, record in snapshot.records.items() if record.offset != before[name]}
        assert moved == {"t.3"} and snapshot["t.3"].tolist() == [21.0] * 5


# -- what goes wrong ------------------------------------------------------------------------------------


def failures(outcomes: list[Any]) -> list[tuple[str, str]]:
    return [(o.error, o.message) if isinstance(o, RankFailed) else ("", "") for o in outcomes]


def test_what_one_rank_cannot_write_the_others_are_told(two: Group, store: Store) -> None:
    two.all("build", kind="partial")
    two.all("open", model="bad")
    for error, message in failures(two.each("put")):
        assert error == "InvalidTensor" and "'t.w' is placed as Partial" in message
    two.ranks[1].ask("abort", reason="cannot write t.w")
    with pytest.raises(RankFailed, match=r"RefitAborted.*rank 1 aborted it: cannot write t\.w"):
        two.ranks[0].ask("commit")
    assert store.models() == []


def test_a_rank_that_puts_nothing_leaves_holes_that_are_named(two: Group, store: Store) -> None:
    two.all("build", kind="fsdp")
    two.all("open", model="holes")
    two.ranks[0].ask("put")
    outcomes = failures(two.each("commit"))
    assert {error for error, _ in outcomes} == {"CoverageError", "RefitAborted"}
    assert all("holes" in message and "t.wide" in message for _, message in outcomes)
    assert store.models() == []


def test_both_ranks_putting_whole_tensors_is_an_overlap(two: Group, store: Store) -> None:
    two.all("build", kind="ddp")
    two.all("open", model="twice", names=NameMap(prefix="t.").to_json())
    two.all("put", prefix="", replicated=False)
    assert all("duplicate" in message for _, message in failures(two.each("commit")))


def test_without_a_key_there_is_one_writer_also_under_torch_distributed(two: Group, store: Store) -> None:
    two.all("build", kind="fsdp")
    alone = two.ranks[0]
    with pytest.raises(RankFailed, match=r"are sharded over several ranks.*same key=") as caught:
        alone.ask("write", model="alone", key=None)
    assert caught.value.error == "UsageError" and "t.wide" in caught.value.details["sharded"]


# -- ranks that are killed ------------------------------------------------------------------------------


_models = count()


class Mortal(Group):
    """Two ranks of which one is going to die, with `model` in the store and its next version at hand."""

    model = ""


@pytest.fixture
def mortal(zygote: Zygote, service: Service, store: Store) -> Iterator[Mortal]:
    with zygote.group(2, service.socket) as group:
        mortal = Mortal(group.ranks)
        mortal.model = f"m{next(_models)}"
        mortal.all("build", kind="fsdp")
        mortal.all("write", model=mortal.model)
        mortal.all("build", kind="fsdp", seed=1)
        yield mortal


def contents(store: Store, model: str) -> dict[str, torch.Tensor]:
    with store.lease(model) as snapshot:
        return {name: snapshot[name].clone() for name in snapshot}


class Before:
    """The store before a rank is killed, to be compared with it afterwards."""

    def __init__(self, store: Store, model: str) -> None:
        self._store, self._model = store, model
        self._arena = eventually(self._quiet, "the first refit is done")
        self._contents = contents(store, model)

    def _quiet(self) -> Any:
        arena = self._store.status().arena
        return None if arena.pending or arena.quarantined else arena

    def is_back(self) -> None:
        """The version is what it was, the space is free, and a refit can be opened."""
        assert self._store.tags(self._model) == {"latest": 1}
        after = contents(self._store, self._model)
        assert set(after) == set(self._contents)
        assert all(same_bits(after[name], tensor) for name, tensor in self._contents.items())
        arena = eventually(self._quiet, "the space of the dead rank is back")
        assert (arena.used, arena.reachable) == (self._arena.used, self._arena.reachable)
        self._store.refit(self._model).abort()


def survivor_is_told(group: Group, survivor: int, says: str) -> None:
    with pytest.raises(RankFailed, match=says) as caught:
        group.ranks[survivor].hear()
    assert caught.value.error == "RefitAborted"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_before_it_joins(mortal: Mortal, store: Store, victim: int) -> None:
    before = Before(store, mortal.model)
    survivor = mortal.ranks[1 - victim]
    mortal.ranks[victim].kill()
    survivor.ask("open", model=mortal.model, timeout=0.5)
    survivor.ask("put")
    survivor.tell("commit")
    survivor_is_told(mortal, 1 - victim, rf"ranks \[{victim}\] never joined within 0\.5 s")
    before.is_back()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_after_it_joined(mortal: Mortal, store: Store, victim: int) -> None:
    before = Before(store, mortal.model)
    mortal.all("open", model=mortal.model)
    mortal.ranks[1 - victim].ask("put")
    mortal.ranks[1 - victim].tell("commit")
    mortal.ranks[victim].kill()
    survivor_is_told(
        mortal, 1 - victim, rf"rank {victim}, .*\(pid {mortal.ranks[victim].pid}\), disconnected"
    )
    before.is_back()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_half_way(mortal: Mortal, store: Store, victim: int) -> None:
    before = Before(store, mortal.model)
    mortal.all("open", model=mortal.model)
    mortal.ranks[1 - victim].ask("put")
    assert mortal.ranks[victim].ask("put_half") > 0
    mortal.ranks[1 - victim].tell("commit")
    mortal.ranks[victim].kill()
    survivor_is_told(mortal, 1 - victim, rf"rank {victim}, .*disconnected")
    before.is_back()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_after_its_own_vote(mortal: Mortal, store: Store, victim: int) -> None:
    before = Before(store, mortal.model)
    mortal.all("open", model=mortal.model)
    mortal.all("put")
    mortal.ranks[victim].tell("commit")
    eventually(lambda: [r.committed for r in store.status().refits] == [1], "the victim has voted")
    mortal.ranks[victim].kill()
    # It learns with its own next request, whatever that is.
    eventually(lambda: not store.status().refits, "the refit has ended")
    mortal.ranks[1 - victim].tell("commit")
    survivor_is_told(mortal, 1 - victim, rf"rank {victim}, .*disconnected")
    before.is_back()


def test_a_rank_that_hangs_ends_it_for_all_in_time(mortal: Mortal, store: Store) -> None:
    before = Before(store, mortal.model)
    mortal.all("open", model=mortal.model, timeout=1.0)
    mortal.ranks[0].ask("put")
    mortal.ranks[0].tell("commit")
    survivor_is_told(mortal, 0, r"ranks \[1\] did not commit within 1 s")
    mortal.ranks[1].ask("put")  # it has its places; it is told when it asks the store
    with pytest.raises(RankFailed, match="did not commit within 1 s"):
        mortal.ranks[1].ask("commit")
    mortal.ranks[1].ask("abort", reason="")
    before.is_back()


def test_ranks_begin_anew_after_one_died(
    mortal: Mortal, zygote: Zygote, service: Service, store: Store
) -> None:
    mortal.all("open", model=mortal.model)
    mortal.ranks[1].kill()
    with pytest.raises(RankFailed, match="rank 1, "):
        mortal.ranks[0].ask("put")
        mortal.ranks[0].ask("commit")
    with zygote.group(2, service.socket) as group:
        group.all("build", kind="fsdp", seed=2)
        assert [report["version"] for report in group.all("write", model=mortal.model)] == [2, 2]
