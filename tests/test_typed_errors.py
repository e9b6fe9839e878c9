"""Every failure the product promises to name: its class, what the message says to do, that nothing is lost.

Real processes and limits: the arena's capacity, a tmpfs that is full, a memory cgroup that is. What the
client refuses by itself is also sent past it, because the store has the last word.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import MIB, Service, contents, everything, fill, publish, require_balanced, specs

from weightstore import wire
from weightstore.admission import Admission
from weightstore.allocator import NoSpace
from weightstore.arena import Arena
from weightstore.catalog import Peer, Writer
from weightstore.client import Store, connect
from weightstore.errors import (
    ArenaFull,
    CircumstanceError,
    CoverageError,
    RefitConflict,
    StoreGone,
    UnknownVersion,
    UsageError,
)
from weightstore.store import Store as ServerStore
from weightstore.types import TensorSpec
from weightstore.wire import OpenRefit, Write

SIZES = {"t.w": (10, 20), "t.b": (20,), "vae.w": (6, 6)}

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting and cgroups need root")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("errors"), capacity="32MiB", window="4MiB") as service:
        yield service


@pytest.fixture
def store(service: Service) -> Iterator[Store]:
    """A store with one model `m`; after the test it is as before, with no byte astray."""
    with service.connect() as store:
        publish(store, "m", SIZES, 1)
        before = everything(store)
        yield store
        assert everything(store) == before
        assert store.verify("m").corrupt == []
        require_balanced(store)
        store.remove_model("m")


# -- no room -----------------------------------------------------------------------------------------


def test_full_arena(store: Store) -> None:
    publish(store, "x", {"t.w": 20 * MIB}, 2)
    held = store.lease("x")
    publish(store, "x", {"t.w": 1 * MIB}, 3, fresh=True)
    refit = store.refit("y")
    with pytest.raises(ArenaFull) as caught:
        refit.reserve(specs({"t.w": 20 * MIB}))
    error = caught.value
    assert isinstance(error, CircumstanceError)
    assert (error.details["needed"], error.details["capacity"]) == (20 * MIB, 32 * MIB)
    assert 0 < error.details["free"] < 12 * MIB
    assert "capacity of 32 MiB" in error.message
    assert "Remove versions, or restart the store with a larger --capacity" in error.message
    # Somebody holds what no tag needs: the message names version, bytes and holder.
    assert (
        "version 1 of 'x' (20 MiB of its own) by" in error.message and f"pid {os.getpid()}" in error.message
    )
    # The refit goes on, with what does fit; and once the holder lets go, with what did not.
    fill(refit, {"t.w": 2 * MIB}, 4)
    refit.commit()
    assert set(contents(store, "y")["t.w"]) == {4}
    held.release()
    publish(store, "y", {"t.w": 20 * MIB}, 5, fresh=True)
    for model in ("x", "y"):
        store.remove_model(model)


def test_full_dev_shm(tmp_path: Path) -> None:
    """A store whose shm file system is smaller than its capacity, and then filled by somebody else."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    private = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=48m tmpfs /dev/shm && exec "$@"', "sh"]
    with (
        Service(tmp_path, capacity="1GiB", window="4MiB", prefix=private) as service,
        service.connect() as store,
    ):
        publish(store, "m", SIZES, 1)
        before = everything(store)
        with pytest.raises(ArenaFull) as caught:
            publish(store, "big", {"t.w": 100 * MIB}, 2)
        error = caught.value
        assert error.details["limit"] == "/dev/shm"
        assert "of shared memory do not fit: /dev/shm has" in error.message
        assert "mount -o remount,size=SIZE /dev/shm" in error.message and "--shm-size" in error.message
        committed = store.status().arena.committed
        # Somebody else fills it to the last page.
        filler = Path(f"/proc/{service.pid}/root/dev/shm/filler")
        with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(MIB))
        with pytest.raises(ArenaFull, match="/dev/shm has 0 B"):
            publish(store, "big", {"t.w": 5 * MIB}, 2)
        publish(store, "m", {"t.w": SIZES["t.w"]}, 2, partial=True, tag="other")  # what is committed is there
        store.remove_tag("m", "other")
        assert everything(store) == before and store.status().arena.committed == committed
        filler.unlink()
        publish(store, "big", {"t.w": 5 * MIB}, 2)
        assert set(contents(store, "big")["t.w"]) == {2}
        require_balanced(store)
        assert "Traceback" not in service.log()


@pytest.fixture
def memory_cgroup() -> Iterator[Path]:
    """A cgroup of 160 MiB below ours, of whichever kind the host has."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    name = f"weightstore-test-{uuid.uuid4().hex[:8]}"
    for _, controllers, path in lines:
        if "memory" in controllers.split(","):
            parent, limit = Path("/sys/fs/cgroup/memory") / path.lstrip("/"), "memory.limit_in_bytes"
            break
    else:
        parent, limit = Path("/sys/fs/cgroup") / lines[0][2].lstrip("/"), "memory.max"
    cgroup = parent / name
    try:
        cgroup.mkdir()
        (cgroup / limit).write_text(str(160 * MIB))
    except OSError as error:
        if cgroup.exists():
            cgroup.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield cgroup
    cgroup.rmdir()


@needs_root
def test_cgroup_limit_of_a_real_cgroup(tmp_path: Path, memory_cgroup: Path) -> None:
    """The store runs where the kernel would kill it beyond 160 MiB: it refuses before that."""

    def enter() -> None:
        (memory_cgroup / "cgroup.procs").write_text(str(os.getpid()))

    with Service(tmp_path, "--reserve", "32MiB", capacity="1GiB", window="4MiB", preexec_fn=enter) as service:
        with service.connect() as store:
            publish(store, "m", SIZES, 1)
            before = everything(store)
            for size in (500 * MIB, 150 * MIB):
                with pytest.raises(ArenaFull) as caught:
                    publish(store, "big", {"t.w": size}, 2)
                error = caught.value
                assert error.details["limit"].startswith("cgroup ")
                assert (
                    memory_cgroup.name in error.message
                    and "of 160 MiB left, 32 MiB of that reserved" in error.message
                )
                assert "Raise the memory limit of this cgroup" in error.message
            for n in range(40):  # up to the brim, in small steps
                try:
                    publish(store, f"part{n}", {"t.w": 4 * MIB}, 3)
                except ArenaFull:
                    break
            assert 3 < n < 32
            assert everything(store).items() >= before.items()
            require_balanced(store)
            status = service.status()
            assert status.pid == service.pid
        service.end()


def test_cgroup_limit(tmp_path: Path) -> None:
    """A cgroup tree made of files, so that it runs everywhere; an ancestor is the tightest."""
    proc, tree = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/pod/container\n")
    (proc / "meminfo").write_text(f"MemTotal: {1 << 30} kB\nMemAvailable: {1 << 30} kB\n")
    for directory, limit, used in (("pod", 64 * MIB, 40 * MIB), ("pod/container", "max", MIB)):
        (tree / directory).mkdir(parents=True)
        (tree / directory / "memory.max").write_text(f"{limit}\n")
        (tree / directory / "memory.current").write_text(f"{used}\n")
        (tree / directory / "memory.stat").write_text("inactive_file 0\n")
    admission = Admission(8 * MIB, proc_root=proc, cgroup_root=tree)
    peer = Peer(1, Writer(os.getpid(), 1, "a"), "trainer")
    with Arena.open(f"weightstore-test-{uuid.uuid4().hex[:8]}", 256 * MIB, 4 * MIB, admission) as arena:
        try:
            server = ServerStore(arena, 0.0, 0.0)
            refit = server.open_refit(OpenRefit(id=0, model="m", tag="latest"), peer, 0.0)

            def reserve(nbytes: int) -> Any:
                while True:
                    try:
                        return server.reserve(refit.number, peer, specs({f"t.{nbytes}": nbytes}))
                    except NoSpace as need:
                        server.grown(server.commit_space(need, server.catalog.usage()))

            with pytest.raises(ArenaFull) as caught:
                reserve(17 * MIB)  # 24 are left, 8 of them reserved
            error = caught.value
            assert error.details["limit"] == f"cgroup {tree / 'pod' / 'memory.max'}"
            assert error.details["usable"] == 16 * MIB and error.details["requested"] == 20 * MIB
            assert "24 MiB of 64 MiB left, 8 MiB of that reserved" in error.message
            assert (
                "Raise the memory limit of this cgroup (container), remove versions, or lower"
                in error.message
            )
            assert arena.committed == 0
            (record,) = reserve(12 * MIB)
            server.commit(refit.number, peer, [Write(record.name)], 1.0)
            usage = server.catalog.usage()
            assert usage.pending == 0 and usage.free + usage.reachable == usage.committed == 12 * MIB
        finally:
            arena.unlink()


# -- names, shapes, dtypes ---------------------------------------------------------------------------


def put(store: Store, tensors: dict[str, Any], **how: Any) -> CoverageError:
    """The error of a refit of `m` that puts these arrays."""
    with pytest.raises(CoverageError) as caught, store.refit("m", **how) as refit:
        refit.put_many(tensors)
    assert isinstance(caught.value, UsageError)
    assert store.status().refits == []
    return caught.value


def right() -> dict[str, Any]:
    return {name: np.zeros(shape, np.float32) for name, shape in SIZES.items()}


def send(service: Service, writes: list[Write], spec: TensorSpec | None = None) -> wire.Failed:
    """What the store itself says to a refit of `m` that writes, or reserves, this."""
    with service.raw() as raw:
        opened = raw.ask(wire.OpenRefit(id=0, model="m", tag="latest"))
        if spec is not None:
            failed = raw.ask(wire.Reserve(id=0, refit=opened.refit, specs=[spec]))
        else:
            failed = raw.ask(wire.CommitRefit(id=0, refit=opened.refit, writes=writes))
        assert isinstance(raw.ask(wire.AbortRefit(id=0, refit=opened.refit)), wire.Done)
        assert failed.error == "CoverageError"
        return failed


WHOLE = [Write(name) for name in SIZES]


def test_unknown_name(store: Store, service: Service) -> None:
    error = put(store, right() | {"t.wieght": np.zeros(3, np.float32), "lora.a": np.zeros(3, np.float32)})
    assert error.details["unknown"] == ["t.wieght", "lora.a"]
    assert "2 unknown (t.wieght" in error.message and "nothing was written" in error.message
    failed = send(service, [*WHOLE, Write("nope")])
    assert failed.details == {"unknown": ["nope"]} and "nothing was changed" in failed.message
    failed = send(service, [], TensorSpec("nope", "float32", (3,), (1,)))
    assert failed.details == {"unknown": ["nope"]}


def test_missing_names(store: Store, service: Service) -> None:
    tensors = right()
    del tensors["t.b"], tensors["vae.w"]
    error = put(store, tensors)
    assert error.details["missing"] == ["t.b", "vae.w"]
    assert "2 missing (t.b, vae.w); nothing of vae was written" in error.message
    assert "components=['t']" in error.message and "nothing was changed" in error.message
    # A lone writer may still complete it.
    with store.refit("m", tag="later") as refit:
        refit.put_many(tensors)
        with pytest.raises(CoverageError):
            refit.commit()
        refit.put_many({name: array for name, array in right().items() if name not in tensors})
    store.remove_tag("m", "later")
    assert send(service, WHOLE[:1]).details == {"missing": ["t.b", "vae.w"]}


def test_mis_shaped(store: Store, service: Service) -> None:
    error = put(store, right() | {"t.w": np.zeros((20, 10), np.float32)})
    assert error.details["mismatched"] == ["t.w"]
    assert "given float32 [20, 10], stored float32 [10, 20]" in error.message
    failed = send(service, [], TensorSpec("t.w", "float32", (20, 10), (10, 1)))
    assert failed.details == {"mismatched": ["t.w"]}


def test_wrong_dtype(store: Store, service: Service) -> None:
    error = put(store, right() | {"t.w": np.zeros((10, 20), np.int32), "t.b": np.zeros(20, np.bool_)})
    assert error.details["mismatched"] == ["t.w", "t.b"]
    assert "t.w: given int32 [10, 20], stored float32 [10, 20]" in error.message
    failed = send(service, [], TensorSpec("t.w", "float16", (10, 20), (20, 1)))
    assert failed.details == {"mismatched": ["t.w"]}


def test_duplicate_name(store: Store, service: Service) -> None:
    with pytest.raises(CoverageError) as caught, store.refit("m") as refit:
        refit.put_many(right())
        refit.put("t.b", np.ones(20, np.float32))
    assert caught.value.details["duplicate"] == ["t.b"]
    assert "1 duplicate (t.b); nothing was written by this call" in caught.value.message
    assert send(service, [*WHOLE, Write("t.b")]).details == {"duplicate": ["t.b"]}


# -- others were faster, or are gone --------------------------------------------------------------------


def test_two_refits_of_one_tag(store: Store, service: Service) -> None:
    first = store.refit("m")
    with service.connect() as other:
        with pytest.raises(RefitConflict) as caught:
            other.refit("m")
        error = caught.value
        assert isinstance(error, UsageError)
        assert f"pid {os.getpid()}" in error.details["holder"] and error.details["holder"] in error.message
        assert "wait for it to commit or abort, or use another tag" in error.message
        for change in (
            lambda: other.tag("m", "latest", "latest"),
            lambda: other.remove_tag("m", "latest"),
            lambda: other.remove_model("m"),
        ):
            with pytest.raises(RefitConflict, match="wait until it ends"):
                change()
        with other.refit("m", tag="other") as second:  # another tag is free
            fill(second, SIZES, 1)
        other.remove_tag("m", "other")
    first.put_many(right())
    first.abort()


def test_version_gone(store: Store) -> None:
    publish(store, "gone", {"t.w": 10}, 1)
    publish(store, "gone", {"t.w": 10}, 2)
    attempts: list[Callable[[], Any]] = [
        lambda: store.lease("gone", version=1),
        lambda: store.tag("gone", "old", 1),
        lambda: store.refit("gone", base=1),
        lambda: store.verify("gone", version=1),
    ]
    for attempt in attempts:
        with pytest.raises(UnknownVersion) as caught:
            attempt()
        assert isinstance(caught.value, UsageError)
        assert "version 1 of model 'gone' has been freed; live versions: 2" in caught.value.message
        assert caught.value.details == {"model": "gone", "version": 1}
    with pytest.raises(UnknownVersion, match="never existed; live versions: 2"):
        store.lease("gone", version=7)
    assert store.tags("gone") == {"latest": 2} and set(contents(store, "gone")["t.w"]) == {2}
    store.remove_model("gone")


def test_store_gone(tmp_path: Path) -> None:
    with Service(tmp_path) as service:
        start = f"weightstore serve --socket {service.socket}"
        with service.connect() as store:
            publish(store, "m", SIZES, 1)
            before = everything(store)
            lease = store.lease("m")
            refit = store.refit("m")
            service.kill()
            attempts: list[Callable[[], Any]] = [
                store.status,
                lambda: store.lease("m"),
                lambda: store.refit("m"),
                lambda: store.wait_for("m", after=1, timeout=1.0),
                lambda: connect(service.socket),
            ]
            for attempt in attempts:
                with pytest.raises(StoreGone) as caught:
                    attempt()
                assert isinstance(caught.value, CircumstanceError)
                assert start in caught.value.message and caught.value.details["socket"] == service.socket
            with pytest.raises(
                StoreGone, match="nothing was committed; begin a new one when the store is back"
            ):
                refit.put_many(right())
            record = lease.records["t.w"]
            assert set(lease.mapping.view(record.offset, record.nbytes)) == {
                1
            }  # what is mapped stays readable
            service.start()
            assert everything(store) == before
            lease.release()
    with pytest.raises(StoreGone) as caught:
        connect(service.socket)
    assert start in caught.value.message
