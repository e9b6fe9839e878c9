"""Who writes which elements, against what torch itself makes of a tensor, a mesh and placements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import (
    DeviceMesh,
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.placement_types import _StridedShard

from weightstore.dtensors import Holding, holding_of
from weightstore.errors import InvalidTensor, UsageError
from weightstore.names import Given, NameMap, Stored
from weightstore.names.resolve import resolve
from weightstore.names.router import Router
from weightstore.sharding import SHARED_BYTES, Split, pieces_of, rank_of, share, slices
from weightstore.sources import Call, Writers, gather
from weightstore.types import Box


def mesh_of(sizes: Sequence[int], rank: int) -> DeviceMesh:
    """A mesh as the process of `rank` sees it, without processes."""
    return DeviceMesh("cpu", torch.arange(prod(sizes)).view(*sizes), _init_backend=False, _rank=rank)


def distributed(whole: torch.Tensor, sizes: Sequence[int], placements: list[Placement]) -> Iterator[DTensor]:
    """What each rank of the mesh gets of `whole`, by torch."""
    for rank in range(prod(sizes)):
        yield distribute_tensor(whole, mesh_of(sizes, rank), placements, src_data_rank=None)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], list[Placement]]:
    """Shape of a tensor, shape of a mesh, and a placement for each of its dimensions."""
    shape = tuple(draw(st.lists(st.integers(0, 11), min_size=0, max_size=3)))
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    dims = st.integers(0, len(shape) - 1)
    kinds: list[st.SearchStrategy[Placement]] = [st.just(Replicate())]
    if shape:
        kinds.append(st.builds(Shard, dims))
        kinds.append(st.builds(lambda d, n: _StridedShard(d, split_factor=n), dims, st.integers(2, 4)))
    return shape, mesh, [draw(st.one_of(kinds)) for _ in mesh]


@settings(max_examples=250, deadline=None)
@given(layouts())
def test_what_each_rank_holds_is_what_torch_gave_it(
    layout: tuple[tuple[int, ...], tuple[int, ...], list[Placement]],
) -> None:
    shape, mesh, placements = layout
    whole = torch.arange(prod(shape)).view(shape)
    for tensor in distributed(whole, mesh, placements):
        holding = holding_of("w", tensor)
        assert sum(part.numel() for _, part in holding.parts) == tensor.to_local().numel()
        for box, part in holding.parts:
            assert torch.equal(part, whole[slices(box)])


@settings(max_examples=250, deadline=None)
@given(layouts(), st.booleans())
def test_all_ranks_together_write_every_element_once(
    layout: tuple[tuple[int, ...], tuple[int, ...], list[Placement]], large: bool
) -> None:
    shape, mesh, placements = layout
    written = torch.zeros(shape, dtype=torch.int64)
    calls = 0
    for tensor in distributed(torch.arange(prod(shape)).view(shape), mesh, placements):
        holding = holding_of("w", tensor)
        for held, _ in holding.parts:
            item = SHARED_BYTES if large else 1  # tensors below that size are not cut up
            box = share(held, item, holding.replica, holding.replicas, "w")
            if box is not None:
                written[slices(box)] += 1
                calls += 1
    assert bool((written == 1).all())
    assert calls >= 1  # also of a tensor without elements somebody has to say that it is written


def test_rows_that_lie_apart_are_several_pieces() -> None:
    # Seven rows in two halves of 4 and 3, of each of which this rank has the first half.
    pieces = pieces_of((7, 6), (2,), (0,), [Split(0, factor=2)])
    assert [(piece.box, piece.at) for piece in pieces] == [
        (Box((0, 0), (2, 6)), (0, 0)),
        (Box((4, 0), (6, 6)), (2, 0)),
    ]
    # Sharded once more, as by tensor parallelism under FSDP, they lie together.
    assert [p.box for p in pieces_of((8, 6), (2, 2), (1, 0), [Split(0, 2), Split(0)])] == [
        Box((2, 0), (4, 6))
    ]


@given(
    st.lists(st.integers(1, 40), max_size=3), st.integers(1, 9), st.sampled_from([1, SHARED_BYTES]), st.text()
)
def test_replicas_share_out_what_each_of_them_has(
    shape: list[int], replicas: int, itemsize: int, key: str
) -> None:
    whole = Box((3,) * len(shape), tuple(3 + size for size in shape))
    shares = [share(whole, itemsize, replica, replicas, key) for replica in range(replicas)]
    boxes = [box for box in shares if box is not None]
    assert sum(box.numel for box in boxes) == prod(shape)
    assert not any(a.intersects(b) for i, a in enumerate(boxes) for b in boxes[:i])
    if itemsize * prod(shape) >= SHARED_BYTES and max(shape, default=1) >= replicas:
        sizes = [box.numel for box in boxes]
        assert len(boxes) == replicas and max(sizes) <= 2 * min(sizes)
    else:
        assert boxes == [whole]


def test_small_replicas_are_spread_over_the_ranks() -> None:
    box = Box((0,), (8,))
    owners = [
        next(rank for rank in range(4) if share(box, 4, rank, 4, f"blocks.{i}.norm.weight"))
        for i in range(200)
    ]
    assert all(owners.count(rank) > 20 for rank in range(4))


# -- what cannot be told ------------------------------------------------------------------------------


def test_values_that_are_not_summed_up_are_refused_by_name() -> None:
    tensor = DTensor.from_local(torch.ones(4), mesh_of((2,), 0), [Partial()], run_check=False)
    with pytest.raises(InvalidTensor, match=r"'blocks\.w' is placed as Partial.*not summed up"):
        holding_of("blocks.w", tensor)


def test_a_placement_of_an_unknown_kind_is_refused() -> None:
    class Spiral(Shard):
        pass

    tensor = DTensor.from_local(torch.ones(4), mesh_of((2,), 0), [Spiral(0)], run_check=False)
    with pytest.raises(InvalidTensor, match="of a kind unknown here"):
        holding_of("w", tensor)


def test_a_shard_of_another_size_than_its_placement_says_is_refused() -> None:
    tensor = DTensor.from_local(
        torch.ones(3, 2),
        mesh_of((2,), 0),
        [Shard(0)],
        run_check=False,
        shape=torch.Size((8, 2)),
        stride=(2, 1),
    )
    with pytest.raises(InvalidTensor, match=r"holds \[3, 2\] of \[8, 2\]"):
        holding_of("w", tensor)


def test_a_rank_outside_the_mesh_holds_nothing() -> None:
    mesh = DeviceMesh("cpu", torch.tensor([0, 1]), _init_backend=False, _rank=5)
    tensor = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)], src_data_rank=None)
    assert holding_of("w", tensor) == Holding((4, 2), (2, 1), "float32", [])


# -- one call, seen from every rank -------------------------------------------------------------------


def calls(world: int, *items: tuple[str, Any], replicated: bool = False) -> list[Call]:
    """What each rank writes of `items`; an item's value may be a list with one value a rank."""

    def of(rank: int) -> Call:
        mine = ((name, value[rank] if isinstance(value, list) else value, None) for name, value in items)
        return gather(mine, Writers(rank, world, replicated))

    return [of(rank) for rank in range(world)]


def test_plain_tensors_are_the_callers_unless_they_are_replicated() -> None:
    tensor = torch.arange(3 * SHARED_BYTES // 4).float().view(3, -1)
    for call in calls(2, ("w", tensor)):
        assert [source.shape for source in call.sources] == [tuple(tensor.shape)] and not call.parts
    first, second = calls(2, ("w", tensor), ("b", torch.ones(3)), replicated=True)
    assert [part.box.lo[0] for part in (*first.parts, *second.parts)] == [0, 1]
    assert all(part.whole is not None and part.whole.shape == tuple(tensor.shape) for part in first.parts)
    assert len(first.sources) + len(second.sources) == 1  # one of them writes the small one
    others = [spec.name for call in (first, second) for spec in call.others]
    assert others == ["b"]


def test_what_is_tied_belongs_to_one_rank_under_all_names() -> None:
    shared = torch.ones(5)
    for ranks in (2, 3, 4):
        for call in calls(ranks, ("first", shared), ("second", shared), replicated=True):
            assert [s.name for s in call.sources] in ([], ["first", "second"])
            assert [s.tied_to for s in call.sources] in ([], [None, "first"])


def test_shards_over_the_same_memory_are_tied() -> None:
    tensors = list(distributed(torch.arange(20.0).view(5, 4), (3,), [Shard(0)]))
    alike = [  # as a state dict has them
        DTensor.from_local(
            t.to_local(), t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=(4, 1)
        )
        for t in tensors
    ]
    for call in calls(3, ("a", tensors), ("b", alike)):
        wholes = {part.name: part.whole for part in call.parts}
        assert wholes["a"] is not None and wholes["a"].alias_of is None
        assert wholes["b"] is not None and wholes["b"].alias_of == "a"


def test_a_single_writer_cannot_write_shards() -> None:
    sharded = next(distributed(torch.ones(4, 2), (2,), [Shard(0)]))
    whole = next(distributed(torch.ones(4, 2), (2,), [Replicate()]))
    small = next(distributed(torch.ones(4, 2), (1,), [Shard(0)]))
    with pytest.raises(UsageError, match=r"1 tensors are sharded .*\(b\).*same key") as caught:
        gather([("a", whole, None), ("b", sharded, None)])
    assert caught.value.details["sharded"] == ["b"]
    assert [s.name for s in gather([("a", whole, None), ("c", small, None)]).sources] == ["a", "c"]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 1))
def test_shards_of_fused_tensors_land_in_their_slices(world: int, q: int, k: int, dim: int) -> None:
    wholes = {"q": torch.arange(q * 6).view(q, 6), "k": 1000 + torch.arange(k * 6).view(k, 6)}
    into = Stored("refit", {}, None, closed=False)
    rows = resolve(
        Router(NameMap().fuse(["q", "k"], "qk")),
        [Given(n, "int64", tuple(t.shape)) for n, t in wholes.items()],
        into,
    )
    shards = {name: list(distributed(whole, (world,), [Shard(dim)])) for name, whole in wholes.items()}
    landed = torch.full((q + k, 6), -1)
    for rank in range(world):
        items = [(str(row.target), shards[str(row.source)][rank], row) for row in rows]
        call = gather(items, Writers(rank, max(world, 2)))
        for part in call.parts:
            assert bool((landed[slices(part.box)] == -1).all())
            landed[slices(part.box)] = part.tensor
            assert part.whole is not None and part.whole.shape == (q + k, 6) and part.whole.alias_of is None
    assert torch.equal(landed, torch.cat([wholes["q"], wholes["k"]]))


# -- who am I -----------------------------------------------------------------------------------------


def test_a_refit_without_key_has_one_writer() -> None:
    assert rank_of(None, None, None) == (0, 1)


def test_rank_and_world_size_are_given_or_torch_distributeds() -> None:
    assert rank_of("k", 1, 3) == (1, 3)
    with pytest.raises(UsageError, match="not initialised here: give rank= and world_size="):
        rank_of("k", 1, None)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert rank_of("k", None, None) == (0, 1)
        assert rank_of("k", 2, None) == (2, 1)
        assert rank_of(None, None, None) == (0, 1)
    finally:
        dist.destroy_process_group()
