"""The public object, against a real service."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_store import PATIENCE
from processes import Service, eventually

import weightstore
from weightstore.client import Store, connect
from weightstore.errors import (
    LeaseLost,
    ProtocolError,
    StoreGone,
    StoreTimeout,
    UnknownModel,
    UnknownTag,
    UnknownVersion,
    UsageError,
)


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


def publish(store: Store, model: str, tag: str = "latest", value: float = 1.0) -> int:
    with store.refit(model, tag=tag) as refit:
        refit.put("t.w", torch.full((4,), value))
    return refit.report.version


def test_the_public_names_are_there() -> None:
    assert set(weightstore.__all__) <= set(dir(weightstore))
    for name in weightstore.__all__:
        assert getattr(weightstore, name) is not None
    assert weightstore.connect is connect and weightstore.Store is Store
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        weightstore.nonsense  # noqa: B018


def test_connecting_by_argument_and_by_environment(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTSTORE_SOCKET", service.socket)
    for path in (service.socket, Path(service.socket), None):
        with connect(path) as store:
            assert store.socket == service.socket
            assert store.status().pid == service.pid
            assert "connected" in repr(store)
    assert "not connected" in repr(store)


def test_connecting_to_nothing_says_what_to_start(tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(StoreGone, match=f"weightstore serve --socket {tmp_path}/none"):
        connect(tmp_path / "none")
    assert threading.active_count() == before


def test_connecting_to_something_else_is_a_protocol_error(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()

        def answer() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                peer.recv(4096)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ProtocolError):
            connect(tmp_path / "s")
        thread.join(PATIENCE)


def test_models_and_tags(store: Store) -> None:
    assert store.models() == []
    publish(store, "flux")
    publish(store, "wan")
    second = publish(store, "wan", tag="policy", value=2.0)
    assert sorted(store.models()) == ["flux", "wan"]
    assert store.tags("wan") == {"latest": second - 1, "policy": second}
    with pytest.raises(UnknownModel, match=r"no model 'flix'; it has .*flux"):
        store.tags("flix")


def test_tags_move_by_number_and_by_name(store: Store) -> None:
    first = publish(store, "t")
    second = publish(store, "t", tag="policy", value=2.0)
    assert store.tag("t", "old", first) == first
    assert store.tag("t", "ema", "policy") == second
    assert store.tags("t") == {"latest": first, "policy": second, "old": first, "ema": second}
    store.remove_tag("t", "policy")
    assert "policy" not in store.tags("t")
    with store.lease("t", tag="ema") as snapshot:
        assert snapshot["t.w"][0] == 2.0
    for wrong, error in ((99, UnknownVersion), ("nobody", UnknownTag)):
        with pytest.raises(error):
            store.tag("t", "x", wrong)
    assert store.status().leases == []


def test_removing_a_model_frees_it_once_nobody_reads(store: Store) -> None:
    publish(store, "gone")
    with store.lease("gone") as snapshot:
        store.remove_model("gone")
        assert snapshot["t.w"][0] == 1.0
    assert "gone" not in store.models()
    with pytest.raises(UnknownModel):
        store.lease("gone")
    assert store.status().arena.reachable == 0


def test_leases_of_what_is_not_there(store: Store) -> None:
    publish(store, "l")
    for options, error in (
        ({"model": "x"}, UnknownModel),
        ({"model": "l", "tag": "x"}, UnknownTag),
        ({"model": "l", "version": 999}, UnknownVersion),
    ):
        with pytest.raises(error):
            store.lease(**options)  # type: ignore[arg-type]
    assert store.status().leases == []


def test_verify_compares_the_bytes(service: Service, store: Store) -> None:
    version = publish(store, "v")
    first = store.verify("v")
    assert (first.version, first.tensors, first.corrupt) == (version, 1, [])
    with store.refit("other") as refit:  # a writer can reach every byte: what verify is there to find
        refit.put("t.w", torch.zeros(4))
        record = store.lease("v").records["t.w"]
        refit.mapping.view(record.offset, 1)[0] ^= 1
    assert store.verify("v", version=version).corrupt == ["t.w"]


def test_waiting_ends_with_the_version(service: Service, store: Store) -> None:
    seen: list[int] = []
    waiting = threading.Thread(target=lambda: seen.append(store.wait_for("w", timeout=PATIENCE)))
    waiting.start()
    with service.connect() as trainer:
        version = publish(trainer, "w")
    waiting.join(PATIENCE)
    assert seen == [version]
    assert store.wait_for("w", after=version - 1, timeout=0) == version


def test_waiting_gives_up_in_time(store: Store) -> None:
    for timeout in (0, 0.01):
        with pytest.raises(StoreTimeout):
            store.wait_for("nothing", timeout=timeout)


def test_waiting_holds_nobody_up(store: Store) -> None:
    errors: list[Exception] = []

    def wait() -> None:
        try:
            store.wait_for("never")
        except (StoreGone, UsageError) as error:  # closed while it waits, or before it has begun to
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    publish(store, "busy")
    assert store.tags("busy")
    store.close()
    waiting.join(PATIENCE)
    assert len(errors) == 1
    store.link = connect(store.socket).link  # so that the fixture can tidy up


def test_several_threads_use_one_store(store: Store) -> None:
    publish(store, "shared")
    problems: list[Exception] = []

    def work(number: int) -> None:
        try:
            for step in range(5):
                with store.refit("shared", tag=f"tag{number}") as refit:
                    refit.put("t.w", torch.full((4,), float(10 * number + step)))
                with store.lease("shared", tag=f"tag{number}") as snapshot:
                    assert snapshot["t.w"][0] == 10 * number + step
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert problems == []
    assert len(store.tags("shared")) == 7 and store.status().leases == []


def test_closing_ends_everything_and_is_idempotent(service: Service) -> None:
    with service.connect() as observer:
        store = service.connect()
        publish(store, "c")
        lease = store.lease("c")
        tensor = lease.snapshot["t.w"]
        refit = store.refit("c")
        before = threading.active_count()
        fds = len(os.listdir("/proc/self/fd"))
        store.close()
        store.close()
        assert threading.active_count() < before
        assert len(os.listdir("/proc/self/fd")) < fds
        assert tensor.tolist() == [1, 1, 1, 1]
        for use, error in (
            (store.status, UsageError),
            (lambda: store.lease("c"), UsageError),
            (lambda: store.wait_for("c"), UsageError),
            (lambda: lease.snapshot, LeaseLost),
            (lambda: refit.put("t.w", tensor), StoreGone),
        ):
            with pytest.raises(error):
                use()
        lease.release()
        refit.abort()
        observer.wait_for("c", timeout=PATIENCE)
        status = observer.status()
        assert (status.leases, status.refits) == ([], [])
        observer.remove_model("c")


def test_a_fork_has_to_connect_itself(store: Store) -> None:
    publish(store, "f")
    lease = store.lease("f")
    inside, outside = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            store.status()
        except UsageError as error:
            os.write(outside, error.message.encode())
        store.close()
        with connect(store.socket) as mine:
            os.write(outside, f" {mine.tags('f')}".encode())
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    said = os.read(inside, 4096).decode()
    assert "is a fork of it" in said and "{'latest': 1}" in said
    os.close(inside)
    os.close(outside)
    assert lease.snapshot["t.w"][0] == 1.0 and len(store.status().leases) == 1
    lease.release()


def test_the_store_returns_and_leases_follow_without_being_asked(tmp_path: Path) -> None:
    with Service(tmp_path) as service, service.connect() as store:
        publish(store, "m")
        lease = store.lease("m")
        service.kill()
        with pytest.raises(StoreGone):
            store.tags("m")
        service.start()
        eventually(lambda: store.link.connection is not None, "the store is back")
        with service.connect() as observer:
            assert [each.version for each in observer.status().leases] == [1]
        lease.release()


def test_a_new_arena_loses_leases_and_says_so(tmp_path: Path) -> None:
    with Service(tmp_path) as service, service.connect() as store:
        publish(store, "m", value=3.0)
        lease = store.lease("m")
        tensor = lease.snapshot["t.w"]
        service.end()  # a clean end removes the arena
        service.start()
        eventually(lambda: store.link.connection is not None, "the store is back")
        assert lease.lost
        with pytest.raises(LeaseLost, match="another arena"):
            lease.require_readable(1)
        assert tensor.tolist() == [3.0] * 4
        assert store.models() == []
        assert publish(store, "m", value=4.0) == 1
        with store.lease("m") as snapshot:
            assert snapshot["t.w"][0] == 4.0
        assert tensor.tolist() == [3.0] * 4
