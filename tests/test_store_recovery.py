"""A store killed at any byte it writes: the next one serves what was committed, old or new, never half.

The arena's buffer is replaced by one that stops, mid-write if need be, after a given number of bytes.
Then a new store is made on what is really in the shared memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from weightstore.admission import Admission
from weightstore.allocator import NoSpace
from weightstore.arena import Arena
from weightstore.catalog import Peer, Writer
from weightstore.errors import ArenaFull, ArenaUnusable, TagTorn
from weightstore.layout import MIB, ROOT_OFFSETS
from weightstore.store import Store
from weightstore.types import Extent, TensorSpec
from weightstore.wire import OpenRefit, Write

WINDOW = MIB
NAMES = {"t.w": 5000, "t.b": 64, "vae.w": 3000}
ALICE = Peer(1, Writer(os.getpid(), 1, "a"), "alice")


class Killed(Exception):
    """The store process ends here."""


class DyingBuffer:
    """Writes through to the arena until `left` bytes have been written."""

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self.left = 1 << 60
        self.written = 0

    def __getitem__(self, key: Any) -> Any:
        return self.buffer[key]

    def __setitem__(self, key: slice, data: bytes) -> None:
        n = min(len(data), self.left)
        self.buffer[key.start : key.start + n] = bytes(data)[:n]
        self.left -= n
        self.written += n
        if n < len(data):
            raise Killed

    def __buffer__(self, flags: int) -> memoryview:
        return self.buffer

    def release(self) -> None:
        self.buffer.release()


@pytest.fixture
def name() -> Iterator[str]:
    name = f"weightstore-test-recovery-{os.getpid()}"
    yield name
    try:
        os.unlink(f"/dev/shm/{name}")
    except FileNotFoundError:
        pass


def open_store(name: str, grace: float = 30.0) -> Store:
    return Store(Arena.open(name, 16 * MIB, WINDOW, Admission(0)), 0.0, grace)


def grown(store: Store, attempt: Callable[[], Any]) -> Any:
    while True:
        try:
            return attempt()
        except NoSpace as need:
            store.grown(store.commit_space(need, store.catalog.usage()))


def fill(store: Store, extent: Extent, value: int) -> None:
    store.arena.buffer[extent.offset : extent.end] = bytes([value]) * extent.nbytes


def begin(store: Store, **kwargs: Any) -> int:
    request = OpenRefit(id=0, **{"model": "m", "tag": "latest", **kwargs})
    refit = grown(store, lambda: store.open_refit(request, ALICE, 1.0))
    if refit.base is None:
        specs = [TensorSpec(n, "uint8", (size,), (1,)) for n, size in NAMES.items()]
        grown(store, lambda: store.reserve(refit.number, ALICE, specs))
    return int(refit.number)


def write(store: Store, number: int, value: int) -> list[Write]:
    targets = store.catalog.refits[number].targets
    for record in targets.values():
        fill(store, record.extent, value)
    return [Write(n) for n in targets]


def refit(store: Store, value: int, declare: bool = False, **kwargs: Any) -> None:
    number = begin(store, **kwargs)
    writes = write(store, number, value)
    if declare:
        store.declare_writes(number, ALICE, writes)
    store.commit(number, ALICE, None if declare else writes, 2.0)


def declare_and_abort(store: Store) -> None:
    number = begin(store)
    store.declare_writes(number, ALICE, write(store, number, 8))
    store.abort_refit(number, ALICE, "")


def visible(store: Store) -> dict[str, Any]:
    """What a reader could get: each tag's version, with the bytes of its tensors."""
    seen: dict[str, Any] = {}
    for model in store.catalog.models:
        if model.names is not None:
            seen[f"{model.name} names"] = model.names
        for tag, number in model.tags.items():
            version = model.versions[number]
            content = {}
            for record in version.records.values():
                data = store.arena.buffer[record.offset : record.offset + record.nbytes].tobytes()
                assert len(set(data)) == 1, f"{record.name} of version {number} is half written"
                content[record.name] = data[0]
            seen[f"{model.name}:{tag}"] = (number, sorted(version.torn), content)
    return seen


STEPS: dict[str, Callable[[Store], None]] = {
    "first version": lambda s: refit(s, 1),
    "component refit": lambda s: refit(s, 2, components=["t"]),
    "declared ahead": lambda s: refit(s, 2, declare=True, components=["t"]),
    "declared and aborted": declare_and_abort,
    "new tag": lambda s: s.set_tag("m", "ref", 3),
    "refit elsewhere": lambda s: refit(s, 3, tag="policy", components=["t"]),
    "refit frees the last": lambda s: refit(s, 4, tag="policy", components=["t"]),
    "open and abort": lambda s: s.abort_refit(begin(s), ALICE, ""),
    "open and vanish": lambda s: (begin(s), s.drop_peer(ALICE), None)[-1],
    "settle": lambda s: s.settle(ALICE.writer),
    "names": lambda s: s.publish_names("m", '{"prefix":"t."}'),
    "other names": lambda s: s.publish_names("m", '{"prefix":"vae."}'),
    "names ahead": lambda s: s.publish_names("later", "{}"),
    "names taken back": lambda s: s.publish_names("later", None),
    "tag moves back": lambda s: s.set_tag("m", "policy", 3),
    "tag goes": lambda s: s.remove_tag("m", "policy"),
    "checksums": lambda s: (
        v := s.catalog.resolve("m", "ref", None),
        s.record_checksums(v, dict.fromkeys(v.extents, 7)),
        None,
    )[-1],
    "model goes": lambda s: s.remove_model("m"),
    "a new first version": lambda s: refit(s, 5),
}


def run_to(store: Store, last: str) -> tuple[dict[str, Any], Callable[[Store], None]]:
    """Do every step before `last`; the state then, and the step."""
    for step, do in STEPS.items():
        if step == last:
            return visible(store), do
        do(store)
    raise KeyError(last)


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_byte_of(step: str, name: str):
    with_all = open_store(name)
    before, do = run_to(with_all, step)
    buffer = DyingBuffer(with_all.arena.buffer)
    with_all._persistence._buffer = buffer  # type: ignore[assignment]
    do(with_all)
    after, total = visible(with_all), buffer.written
    with_all.arena.unlink()
    with_all.arena.close()
    seen = set()
    # Every byte of small writes, and of large ones the ends and some in between.
    points = (
        range(total) if total < 400 else [*range(60), *range(60, total - 200, 97), *range(total - 200, total)]
    )
    chosen = [*list(points)[:: max(1, len(points) // 30)], total - 1, total]
    for point in chosen:
        store = open_store(name)
        run_to(store, step)
        dying = DyingBuffer(store.arena.buffer)
        dying.left = point
        store._persistence._buffer = dying  # type: ignore[assignment]
        try:
            do(store)
        except Killed:
            pass
        store.arena.close()  # the process is gone; the segment stays
        survivor = open_store(name)
        assert survivor.arena.adopted
        state = visible(survivor)
        assert state in (before, after), f"killed after {point} of {total} bytes"
        seen.add(state == after)
        assert not survivor.catalog.refits
        survivor.settle(ALICE.writer)
        survivor.expire(1000.0)
        usage = survivor.catalog.usage()
        assert usage.pending == usage.quarantined == 0
        live = {e for v in survivor.catalog.models.versions() for e in v.extents}
        assert usage.reachable == sum(-(-e.nbytes // 256) * 256 for e in live)
        refit(survivor, 9, model="fresh")
        assert visible(survivor)["fresh:latest"][2] == dict.fromkeys(NAMES, 9)
        survivor.arena.unlink()
        survivor.arena.close()
    assert True in seen  # the last point is past the end: the change had happened


def test_a_writer_of_the_last_process_is_kept_out_of_reused_space(name: str):
    store = open_store(name)
    refit(store, 1)
    number = begin(store)
    places = {r.extent for r in store.catalog.refits[number].targets.values()}
    store.arena.close()
    survivor = open_store(name)
    assert survivor.catalog.space.holdouts() == {ALICE.writer}
    again = begin(survivor)
    reused = {r.extent for r in survivor.catalog.refits[again].targets.values()} & places
    assert not reused
    survivor.abort_refit(again, ALICE, "")
    survivor.settle(ALICE.writer)
    assert survivor.catalog.usage().quarantined == 0
    survivor.arena.unlink()
    survivor.arena.close()


def test_retired_versions_outlive_a_kill_until_the_grace_period_ends(name: str):
    store = open_store(name)
    refit(store, 1)
    store.open_lease(ALICE, "m", "latest", None, False, 0.0)
    refit(store, 2)
    store.arena.close()
    survivor = open_store(name, grace=30.0)
    assert sorted(survivor.catalog.models.get("m").versions) == [1, 2]
    lease, _ = survivor.catalog.leases.renew(ALICE, "m", "latest", 1, False, False, False, 5.0)
    assert survivor.expire(29.0) == [] and survivor.catalog.grace_until
    survivor.expire(30.0)
    assert sorted(survivor.catalog.models.get("m").versions) == [1, 2]
    survivor.release_lease(lease.number, ALICE)
    assert sorted(survivor.catalog.models.get("m").versions) == [2]
    survivor.arena.unlink()
    survivor.arena.close()


def test_a_torn_tag_stays_torn_across_a_kill(name: str):
    store = open_store(name)
    refit(store, 1)
    number = begin(store, in_place=True, components=["t"])
    write(store, number, 2)
    store.arena.close()
    survivor = open_store(name)
    with pytest.raises(TagTorn, match="an in-place refit of t "):
        survivor.open_lease(ALICE, "m", "latest", None, False, 0.0)
    refit(survivor, 3, components=["t"])
    assert visible(survivor)["m:latest"] == (2, [], {"t.w": 3, "t.b": 3, "vae.w": 1})
    survivor.arena.unlink()
    survivor.arena.close()


def test_damaged_records_are_refused_and_left_alone(name: str):
    store = open_store(name)
    refit(store, 1)
    buffer = store.arena.buffer
    for offset in ROOT_OFFSETS:
        buffer[offset + 30] ^= 0xFF
    store.arena.close()
    with pytest.raises(ArenaUnusable, match="no whole root record"):
        open_store(name)
    assert os.path.exists(f"/dev/shm/{name}")


def test_damaged_tensor_records_are_refused(name: str):
    store = open_store(name)
    refit(store, 1)
    (blob,) = store._records.values()
    store.arena.buffer[blob.offset + 5] ^= 0xFF
    store.arena.close()
    with pytest.raises(ArenaUnusable, match="are damaged"):
        open_store(name)


def test_one_damaged_root_leaves_the_other(name: str):
    store = open_store(name)
    refit(store, 1)
    state = visible(store)
    store.set_tag("m", "extra", 1)
    newest = max(ROOT_OFFSETS, key=lambda o: int.from_bytes(store.arena.buffer[o : o + 8], "little"))
    store.arena.buffer[newest + 40] ^= 0xFF
    store.arena.close()
    survivor = open_store(name)
    assert visible(survivor) == state
    survivor.arena.unlink()
    survivor.arena.close()


def test_drafts_leave_no_records_behind(name: str):
    store = open_store(name)
    refit(store, 1)
    used = store._persistence.blob_bytes
    declare_and_abort(store)
    number = begin(store)
    for value in (2, 3):
        store.declare_writes(number, ALICE, write(store, number, value))
    store.drop_peer(ALICE)
    store.settle(ALICE.writer)
    assert store._persistence.blob_bytes == used
    store.arena.unlink()
    store.arena.close()


def test_models_that_were_but_a_name_map_leave_nothing_behind(name: str):
    """The root has room for so many models, and one that had a version is remembered for ever."""
    store = open_store(name)
    refit(store, 1)
    before = (store.arena_status().meta_used, store._persistence.root_bytes)
    for number in range(20):
        store.publish_names(f"taken-back-{number}", '{"prefix":"a."}')
        store.publish_names(f"removed-{number}", '{"prefix":"b."}')
        store.publish_names(f"taken-back-{number}", None)
        store.remove_model(f"removed-{number}")
    assert (store.arena_status().meta_used, store._persistence.root_bytes) == before
    store.publish_names("m", "{}")
    store.remove_model("m")
    refit(store, 2)
    assert visible(store) == {"m:latest": (2, [], dict.fromkeys(NAMES, 2))}
    store.arena.close()


def test_a_full_catalog_area_fails_the_commit_and_loses_nothing(name: str):
    store = open_store(name)
    refit(store, 1)
    state = visible(store)
    number = begin(store)
    persistence = store._persistence
    filler = persistence.write_blob(bytes(persistence._blobs.largest_free - 4096))
    with pytest.raises(ArenaFull, match="catalog area cannot hold"):
        store.commit(number, ALICE, write(store, number, 2), 2.0)
    assert visible(store) == state
    persistence.free_blobs([filler])
    store.commit(number, ALICE, write(store, number, 2), 2.0)
    assert visible(store)["m:latest"][0] == 2
    store.arena.unlink()
    store.arena.close()
