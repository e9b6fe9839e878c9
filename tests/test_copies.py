from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import pytest
import torch
from fake_store import FakeArena, record

from weightstore.copies import copy_all, ties_that_differ
from weightstore.errors import CoverageError, InvalidTensor
from weightstore.ledger import Ledger
from weightstore.mapping import ArenaMapping
from weightstore.sources import Source, gather, module_tensors
from weightstore.tensors import place_of


def sources_of(items: Iterable[tuple[str, torch.Tensor]]) -> list[Source]:
    return gather((name, value, None) for name, value in items).sources


@pytest.fixture
def mapping() -> Iterator[ArenaMapping]:
    arena = FakeArena()
    fd = arena.writer()
    with ArenaMapping(fd, arena.nbytes, True) as mapping:
        yield mapping
    os.close(fd)
    arena.close()


def test_tensors_over_the_same_memory_are_tied() -> None:
    a = torch.arange(6.0).reshape(2, 3)
    sources = sources_of(
        {
            "a": a,
            "again": torch.nn.Parameter(a),
            "turned": a.T,
            "part": a[0],
            "turned.too": a.T,
            "copy": a.clone(),
            "bits": a.view(torch.int32),
        }.items()
    )
    assert {s.name: s.tied_to for s in sources if s.tied_to} == {"again": "a", "turned.too": "turned"}
    assert {s.name: s.spec().alias_of for s in sources if s.spec().alias_of} == {
        "again": "a",
        "turned.too": "turned",
    }


def test_tensors_without_elements_are_never_tied() -> None:
    empty = torch.empty(0)
    assert [s.tied_to for s in sources_of([("a", empty), ("b", empty)])] == [None, None]


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(CoverageError) as caught:
        sources_of([("a", torch.zeros(1)), ("a", torch.ones(1))])
    assert caught.value.details == {"duplicate": ["a"]}


def test_one_bad_tensor_refuses_the_call() -> None:
    with pytest.raises(InvalidTensor, match="'b'"):
        sources_of([("a", torch.zeros(1)), ("b", torch.zeros(1, device="meta"))])


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 4)
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
        self.head = torch.nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.again = self.body[0]
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("lost", torch.ones(2), persistent=False)
        self.register_parameter("none", None)


def test_a_modules_tensors_have_their_state_dict_names() -> None:
    net = Net()
    found = dict(module_tensors(net))
    assert list(found) == list(net.state_dict())
    assert all(found[name].data_ptr() == value.data_ptr() for name, value in net.state_dict().items())
    assert list(dict(module_tensors(net, "transformer."))) == [f"transformer.{name}" for name in found]
    assert dict(module_tensors(net, "x_"))["x_embed.weight"] is net.embed.weight


def test_a_modules_ties_are_found() -> None:
    tied = {s.name: s.tied_to for s in sources_of(module_tensors(Net())) if s.tied_to}
    assert tied == {
        "head.weight": "embed.weight",
        "again.weight": "body.0.weight",
        "again.bias": "body.0.bias",
    }


def tied_ledger(mapping: ArenaMapping) -> Ledger:
    records = {name: record(name, 0, (3,)) for name in ("a", "b")} | {"c": record("c", 256, (3,))}
    ledger = Ledger("refit", records, True, None, False)
    ledger.places.update(records)
    return ledger


def test_ties_of_the_store_must_agree_bit_for_bit(mapping: ArenaMapping) -> None:
    ledger = tied_ledger(mapping)
    same = torch.tensor([1.0, float("nan"), -0.0])
    other = torch.tensor([1.0, float("nan"), 0.0])

    def differing(**tensors: torch.Tensor) -> dict[str, str]:
        return ties_that_differ(sources_of(tensors.items()), ledger, mapping, lambda: None)

    assert differing(a=same, b=same, c=other) == {}
    assert differing(a=same, b=same.clone()) == {}
    assert differing(a=same, b=other) == {"b": "a"}


def test_a_tie_written_earlier_is_compared_with_what_landed(mapping: ArenaMapping) -> None:
    ledger = tied_ledger(mapping)
    value = torch.tensor([1.0, 2.0, 3.0])
    ledger.enter("a")
    place_of(mapping, ledger.places["a"]).copy_(value)
    drained: list[bool] = []
    check = sources_of([("b", value.clone())])
    assert ties_that_differ(check, ledger, mapping, lambda: drained.append(True)) == {}
    assert drained == [True]
    assert ties_that_differ(sources_of([("b", value + 1)]), ledger, mapping, lambda: None) == {"b": "a"}


def test_copies_land_whatever_the_layouts(mapping: ArenaMapping) -> None:
    source = torch.randn(4, 6, requires_grad=True)
    straight = place_of(mapping, record("a", 0, (4, 6)))
    turned = place_of(mapping, record("b", 256, (6, 4))).T
    copy_all([(straight, source), (turned, source)], mapping)
    assert torch.equal(straight, source.detach()) and torch.equal(turned, source.detach())
    assert not straight.requires_grad
    copy_all([(turned, source[:1].expand(4, 6))], mapping)
    assert torch.equal(turned[3], source[0].detach())
