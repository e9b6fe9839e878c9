"""Making ready what the first refits would wait for, against a real service."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import weightstore
from weightstore.client import Store
from weightstore.errors import ArenaFull, CoverageError, RefitConflict, UnknownModel, UsageError
from weightstore.local import local_store

MIB = 1 << 20


@pytest.fixture
def store() -> Iterator[Store]:
    with local_store(12 * MIB, window=MIB) as store:
        yield store


def publish(store: Store, value: float = 1.0) -> None:
    """4 MiB that are trained, two names for 1 MiB of them, and 1 MiB that is not."""
    with store.refit("m") as refit:
        refit.put_many(trained(value))
        refit.put("f.w", torch.ones(MIB // 4))


def trained(value: float) -> dict[str, torch.Tensor]:
    made = {f"t.w{i}": torch.full((MIB // 4,), value) for i in range(4)}
    return made | {"t.tied": made["t.w0"]}


@pytest.mark.parametrize("device", [None, "cpu", "cuda"])
def test_the_next_refit_finds_its_room(store: Store, device: str | None) -> None:
    """Also where the device is not to be had: then the put says so."""
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("is in tests/gpu")
    publish(store)
    before = store.status().arena
    assert store.prepare("m", components=["t"], device=device) == 4 * MIB
    after = store.status().arena
    assert after.committed >= before.committed + 4 * MIB and after.free >= 4 * MIB
    assert (after.used, after.pending, after.quarantined) == (before.used, 0, 0)
    assert store.tags("m") == {"latest": 1} and not store.status().refits
    with store.refit("m", components=["t"]) as refit:
        refit.put_many(trained(2.0))
    assert store.status().arena.committed == after.committed
    with store.lease("m") as snapshot:
        assert snapshot.version == 2 and bool((snapshot["t.tied"] == 2).all())


def test_a_second_time_takes_no_more(store: Store) -> None:
    publish(store)
    store.prepare("m", components=["t"])
    committed = store.status().arena.committed
    store.prepare("m", components=["t"])
    store.prepare("m", "policy", components=["t"])  # a tag to come starts from the same version
    assert store.status().arena.committed == committed
    assert store.tags("m") == {"latest": 1}


def test_all_ranks_may_prepare_at_once(store: Store) -> None:
    publish(store)
    with ThreadPoolExecutor(8) as ranks:
        others = [weightstore.connect(store.socket) for _ in range(8)]
        found = list(ranks.map(lambda other: other.prepare("m", components=["t"]), others))
    for other in others:
        other.close()
    assert found == [4 * MIB] * 8
    assert store.tags("m") == {"latest": 1} and not store.status().refits


def test_a_refit_that_ends_is_waited_for(store: Store) -> None:
    publish(store)
    refit = store.refit("m", components=["t"])
    with ThreadPoolExecutor(1) as pool, weightstore.connect(store.socket) as other:
        preparing = pool.submit(other.prepare, "m", components=["t"])
        refit.put_many(trained(2.0))
        assert refit.commit() == 2
        assert preparing.result(30) == 4 * MIB


def test_what_cannot_be_prepared_changes_nothing(store: Store) -> None:
    with pytest.raises(UnknownModel, match="no version yet"):
        store.prepare("m")
    assert store.models() == [] and not store.status().refits
    publish(store)
    before = store.status().arena
    with pytest.raises(CoverageError, match="no component nonsense"):
        store.prepare("m", components=["nonsense"])
    with store.refit("m", partial=True) as refit:
        with pytest.raises(RefitConflict):
            store.prepare("m", timeout=0.05)
        refit.put("f.w", torch.zeros(MIB // 4))
    with pytest.raises(UsageError, match="timeout of nan"):
        store.prepare("m", timeout=float("nan"))
    with pytest.raises(UsageError, match="no device 'gpu'"):
        store.prepare("m", device="gpu")
    with store.refit("other") as refit:
        refit.put("big.w", torch.zeros(3 * MIB // 4))
    with pytest.raises(ArenaFull):
        store.prepare("m")  # 5 MiB more than the 12 there are
    assert store.status().arena.committed <= before.capacity
    assert not store.status().refits and store.status().arena.quarantined == 0
