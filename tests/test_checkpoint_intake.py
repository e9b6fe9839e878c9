"""Checkpoints through a name map: every byte lands where the map says, however it lies in file and arena."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import weightstore as ws
from weightstore.checkpoint.load import LoadReport, load_checkpoint
from weightstore.checkpoint.save import save_checkpoint
from weightstore.errors import CheckpointError
from weightstore.names import NameMap


@pytest.fixture(scope="module")
def store() -> Iterator[ws.Store]:
    with ws.local_store("96MiB", window="8MiB") as store:
        yield store


def load(store: ws.Store, path: Path, names: NameMap, tensors: dict[str, torch.Tensor]) -> LoadReport:
    save_file(tensors, path)
    return load_checkpoint(store, "m", path, names=names)


def counting(*shape: int, dtype: torch.dtype = torch.float32, start: int = 0) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return torch.arange(start, start + count).to(dtype).reshape(shape)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_pieces_land_along_any_dimension(
    store: ws.Store, tmp_path: Path, dim: int, dtype: torch.dtype
) -> None:
    sizes = (3, 1, 4)
    pieces = {
        f"x.{name}": counting(*(size if d == dim % 3 else 5 for d in range(3)), dtype=dtype, start=7 * i)
        for i, (name, size) in enumerate(zip("qkv", sizes, strict=True))
    }
    names = NameMap(prefix="t.").fuse(["q", "k", "v"], "qkv", dim=dim)
    report = load(store, tmp_path / "a.safetensors", names, {**pieces, "w": counting(3)})
    with store.lease("m") as snapshot:
        assert torch.equal(snapshot["t.x.qkv"], torch.cat(list(pieces.values()), dim))
        assert torch.equal(snapshot["t.w"], counting(3))
        assert set(snapshot) == {"t.x.qkv", "t.w"}
    assert (report.tensors, report.ties) == (2, 0)
    assert report.nbytes == sum(p.nbytes for p in pieces.values()) + 12
    assert store.verify("m").corrupt == []


def test_large_pieces_cross_the_pieces_of_reading(store: ws.Store, tmp_path: Path) -> None:
    make = torch.Generator().manual_seed(0)
    pieces = {name: torch.randint(0, 255, (3001, 2047), dtype=torch.uint8, generator=make) for name in "qk"}
    for dim in (0, 1):
        load(store, tmp_path / "a.safetensors", NameMap().fuse(["q", "k"], "qk", dim=dim), pieces)
        with store.lease("m") as snapshot:
            assert torch.equal(snapshot["qk"], torch.cat(list(pieces.values()), dim))


def test_a_split_reads_ranges_of_the_file(store: ws.Store, tmp_path: Path) -> None:
    whole = counting(7, 3)
    load(
        store,
        tmp_path / "a.safetensors",
        NameMap().split("qkv", ["q", "k", "v"], shares=[4, 1, 2]),
        {"qkv": whole},
    )
    with store.lease("m") as snapshot:
        parts = [snapshot[name] for name in "qkv"]
        assert [tuple(part.shape) for part in parts] == [(4, 3), (1, 3), (2, 3)]
        assert torch.equal(torch.cat(parts), whole)


def test_a_split_across_rows_is_refused_unless_the_rows_are_one(store: ws.Store, tmp_path: Path) -> None:
    names = NameMap().split("ab", ["a", "b"], dim=1)
    with pytest.raises(CheckpointError, match="Split along dimension 0"):
        load(store, tmp_path / "a.safetensors", names, {"ab": counting(2, 4)})
    load(store, tmp_path / "a.safetensors", names, {"ab": counting(1, 4)})
    with store.lease("m") as snapshot:
        assert torch.equal(snapshot["b"], torch.tensor([[2.0, 3.0]]))


def test_drops_are_not_read_and_keep_reads_twice(store: ws.Store, tmp_path: Path) -> None:
    names = NameMap().drop("lora").fuse(["q", "k"], "qk", keep=True)
    given = {"q": counting(2), "k": counting(3), "lora": counting(9)}
    report = load(store, tmp_path / "a.safetensors", names, given)
    with store.lease("m") as snapshot:
        assert set(snapshot) == {"q", "k", "qk"}
        assert torch.equal(snapshot["qk"], torch.cat([snapshot["q"], snapshot["k"]]))
    assert report.nbytes == 2 * 5 * 4


def test_ties_and_strides_go_through(store: ws.Store, tmp_path: Path) -> None:
    table, conv = counting(4, 2), counting(2, 3, 4, 4).to(memory_format=torch.channels_last)
    with store.refit("source", fresh=True) as refit:
        refit.put_many({"t.embed": table, "t.head": table, "t.conv": conv})
    save_checkpoint(store, "source", tmp_path / "tied.safetensors")
    report = load_checkpoint(store, "m", tmp_path / "tied.safetensors", names=NameMap().rename("^t", "u"))
    with store.lease("m") as snapshot:
        assert set(snapshot) == {"u.embed", "u.head", "u.conv"}
        assert snapshot.records["u.embed"].extent == snapshot.records["u.head"].extent
        assert torch.equal(snapshot["u.head"], table) and torch.equal(snapshot["u.conv"], conv)
        assert snapshot["u.conv"].stride() == conv.stride()
    assert (report.tensors, report.ties) == (2, 1)


@pytest.mark.parametrize(
    "names",
    [
        NameMap().fuse(["head", "embed"], "both"),
        NameMap().drop("embed"),
        NameMap().drop("head"),
        NameMap().split("head", ["a", "b"]),
        NameMap().split("embed", ["a", "b"]),
    ],
)
def test_a_tie_that_the_map_takes_apart_gets_bytes_of_its_own(
    store: ws.Store, tmp_path: Path, names: NameMap
) -> None:
    table = counting(4, 2)
    with store.refit("source", fresh=True) as refit:
        refit.put_many({"t.embed": table, "t.head": table})
    save_checkpoint(store, "source", tmp_path / "tied.safetensors")
    load_checkpoint(store, "m", tmp_path / "tied.safetensors", names=names)
    expected = {
        "t.both": torch.cat([table, table]),
        "t.embed": table,
        "t.head": table,
        "t.a": table[:2],
        "t.b": table[2:],
    }
    with store.lease("m") as snapshot:
        for name in snapshot:
            assert torch.equal(snapshot[name], expected[name]), name
        assert sum(snapshot[name].numel() for name in snapshot) in (8, 16)


def test_another_view_of_the_same_bytes_stays_with_them(store: ws.Store, tmp_path: Path) -> None:
    table = counting(4, 2)
    with store.refit("source", fresh=True) as refit:
        refit.reserve(
            [
                ws.TensorSpec("t.embed", "float32", (4, 2), (2, 1)),
                ws.TensorSpec("t.flipped", "float32", (2, 4), (1, 2), "t.embed"),
            ]
        )
        refit.put("t.embed", table)
    save_checkpoint(store, "source", tmp_path / "tied.safetensors")
    load_checkpoint(store, "m", tmp_path / "tied.safetensors", names=NameMap().rename("^t", "u"))
    with store.lease("m") as snapshot:
        assert torch.equal(snapshot["u.flipped"], table.T)
    with pytest.raises(CheckpointError, match=r"another view of 't\.embed'"):
        load_checkpoint(store, "m", tmp_path / "tied.safetensors", names=NameMap().drop("embed"))
