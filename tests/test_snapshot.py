from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from fake_store import FakeArena, record

from weightstore.errors import LeaseLost, UnknownTensor, UsageError
from weightstore.layout import DATA_OFFSET
from weightstore.mapping import ArenaMapping
from weightstore.snapshot import Snapshot
from weightstore.types import TensorRecord

RECORDS = {
    r.name: r
    for r in (
        record("t.w", 0, (2, 3)),
        record("t.half", 256, (4,), "bfloat16"),
        record("t.byte", 512, (4,), "float8_e4m3fn"),
        TensorRecord("t.turned", "float32", (3, 2), (1, 3), DATA_OFFSET, 24),
        record("t.scalar", 768, (), "complex64"),
        record("t.empty", 0, (0, 3)),
    )
}


@pytest.fixture
def mapping() -> Iterator[ArenaMapping]:
    arena = FakeArena()
    arena.write(DATA_OFFSET, np.arange(6, dtype=np.float32).tobytes())
    arena.write(DATA_OFFSET + 256, torch.arange(4).bfloat16().view(torch.int16).numpy().tobytes())
    fd = arena.reader()
    with ArenaMapping(fd, arena.nbytes, False) as mapping:
        yield mapping
    os.close(fd)
    arena.close()


@pytest.fixture
def snapshot(mapping: ArenaMapping) -> Snapshot:
    return Snapshot("m", 3, RECORDS, mapping, lambda version: None)


def test_it_is_a_mapping_of_names_to_tensors(snapshot: Snapshot) -> None:
    assert snapshot.names == list(snapshot) == list(RECORDS)
    assert len(snapshot) == 6 and "t.w" in snapshot and "t.v" not in snapshot
    assert snapshot["t.w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert snapshot["t.turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert snapshot["t.half"].tolist() == [0, 1, 2, 3]
    assert {name: tensor.shape for name, tensor in snapshot.items()} == {
        n: r.shape for n, r in RECORDS.items()
    }
    assert "version 3" in repr(snapshot)


def test_numpy_shows_the_same_bytes_and_refuses_writing(snapshot: Snapshot, mapping: ArenaMapping) -> None:
    array = snapshot.numpy("t.w")
    assert array.ctypes.data == mapping.address + DATA_OFFSET == snapshot["t.w"].data_ptr()
    assert array.tolist() == snapshot["t.w"].tolist()
    assert snapshot.numpy("t.turned").tolist() == snapshot["t.turned"].tolist()
    assert not array.flags.writeable
    with pytest.raises(ValueError):
        array.flags.writeable = True
    assert snapshot.numpy("t.scalar").shape == () and snapshot.numpy("t.empty").shape == (0, 3)


def test_dtypes_numpy_lacks_come_as_their_bits(snapshot: Snapshot) -> None:
    assert snapshot.numpy("t.half").dtype == np.uint16
    assert snapshot.numpy("t.half").tolist() == [0x0000, 0x3F80, 0x4000, 0x4040]
    assert snapshot.numpy("t.byte").dtype == np.uint8
    assert snapshot.numpy("t.scalar").dtype == np.complex64


def test_an_unknown_name_is_both_ours_and_a_key_error(snapshot: Snapshot) -> None:
    for error in (UnknownTensor, UsageError, KeyError):
        with pytest.raises(error, match=r"^version 3 of 'm' has no tensor 't\.v'"):
            snapshot["t.v"]
    with pytest.raises(UnknownTensor):
        snapshot.numpy("t.v")
    assert snapshot.get("t.v") is None


def test_every_access_asks_whether_the_bytes_may_still_be_read(mapping: ArenaMapping) -> None:
    asked: list[int] = []

    def refuse(version: int) -> None:
        asked.append(version)
        raise LeaseLost("over")

    snapshot = Snapshot("m", 7, RECORDS, mapping, refuse)
    for access in (snapshot.__getitem__, snapshot.numpy):
        with pytest.raises(LeaseLost):
            access("t.w")
    assert asked == [7, 7]
    assert snapshot.records["t.w"].shape == (2, 3)  # what it was may still be told


def test_snapshots_are_compared_without_reading_weights(snapshot: Snapshot, mapping: ArenaMapping) -> None:
    assert snapshot != Snapshot("m", 3, RECORDS, mapping, lambda version: None)
    assert snapshot in {snapshot}


def test_tensors_outlive_everything_they_came_from(mapping: ArenaMapping) -> None:
    tensor = Snapshot("m", 3, RECORDS, mapping, lambda version: None)["t.w"]
    array = Snapshot("m", 3, RECORDS, mapping, lambda version: None).numpy("t.w")
    mapping.close()
    assert tensor.sum().item() == array.sum() == 15
