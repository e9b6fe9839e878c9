"""The service as a process: what clients without manners can do to it, how it ends, and what it leaves.

The clients here are raw sockets; the product's own would be too polite.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import MIB, PATIENCE, ROOT, Raw, Service, contents, eventually, publish, specs

from weightstore import wire
from weightstore.errors import ArenaFull, ProtocolError, StoreGone, WeightstoreError
from weightstore.paths import arena_name, pin_lock
from weightstore.types import Box, TensorSpec
from weightstore.wire import Write

SERVE = [sys.executable, "-m", "weightstore", "serve", "--capacity", "64MiB", "--reserve", "0", "--socket"]
SIZES = {"t.w": 5000, "t.b": 64, "vae.w": 3000}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One store for all tests that must not be able to hurt it."""
    with Service(tmp_path_factory.mktemp("service")) as service:
        with service.connect() as store:
            publish(store, "m", SIZES, 7)
        yield service
        with service.connect() as store:
            assert contents(store, "m") == {name: bytes([7]) * size for name, size in SIZES.items()}
        assert "bug" not in service.log() and "Traceback" not in service.log()


@pytest.fixture(autouse=True)
def unharmed(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test on the shared store: same process, same descriptors, nothing held."""
    if "service" not in request.fixturenames:
        yield
        return
    service: Service = request.getfixturevalue("service")
    service.settled()
    pid, fds = service.pid, service.fds()
    yield
    assert service.alive and service.pid == pid
    service.settled()
    eventually(lambda: service.fds() <= fds, f"{service.fds()} descriptors go back to {fds}")


def refused(raw: Raw) -> str:
    """Why the store hung up."""
    last = raw.last_words()
    assert last is not None and last.error == "ProtocolError", last
    return last.message


# -- frames that are none -------------------------------------------------------------------------

GARBAGE = {
    "zero length": (b"\x00\x00\x00\x00", "frame of 0 bytes announced"),
    "4 GiB announced": (b"\xff\xff\xff\xff", "frame of 4294967295 bytes announced"),
    "one over the cap": ((wire.MAX_REQUEST + 1).to_bytes(4, "little"), "announced; allowed are 1 to"),
    "http": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "bytes announced"),
    "not msgpack": (b"\x04\x00\x00\x00\xc1\xc1\xc1\xc1", "malformed"),
    "no struct": (b"\x01\x00\x00\x00\x90", "malformed"),
    "a reply": (wire.frame(wire.Done(id=1)), "malformed"),
    "deep nesting": (b"\x00\x10\x00\x00" + b"\x91" * 4096, "malformed"),
    "trailing bytes": (b"\x0f\x00\x00\x00" + wire.frame(wire.Drained(id=0))[4:] + b"\x00", "malformed"),
}


@pytest.mark.parametrize("greeted", [False, True], ids=["before Hello", "after Hello"])
@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_ends_the_connection_with_a_reason(service: Service, case: str, greeted: bool) -> None:
    data, complaint = GARBAGE[case]
    with Raw(service.socket) as raw:
        if greeted:
            raw.hello()
        raw.send(data)
        assert complaint in refused(raw)


def test_before_hello_frames_are_small(service: Service) -> None:
    with Raw(service.socket) as raw:
        raw.send((4097).to_bytes(4, "little"))
        assert "allowed are 1 to 4096" in refused(raw)


def test_the_first_message_must_be_hello_and_only_the_first(service: Service) -> None:
    with Raw(service.socket) as raw:
        raw.send(wire.GetStatus(id=1))
        assert "first message on a connection must be Hello" in refused(raw)
    with service.raw() as raw:
        raw.send(wire.Hello(id=2, protocol=wire.PROTOCOL))
        assert "only once" in refused(raw)


def test_another_protocol_version_is_told_both_numbers(service: Service) -> None:
    with Raw(service.socket) as raw:
        raw.send(wire.Hello(id=1, protocol=99))
        expected = f"this store speaks protocol {wire.PROTOCOL}, the client 99; use the same weightstore"
        assert expected in refused(raw)


def test_an_unfinished_frame_holds_nobody_up(service: Service) -> None:
    big = wire.frame(wire.CommitRefit(id=1, refit=1, writes=[Write(f"name.{i}") for i in range(10_000)]))
    with service.raw() as half, service.raw() as other:
        half.send(big[: len(big) // 2])
        assert other.status().clients == 2
        half.send(big[len(big) // 2 :])
        assert half.reply(1).error == "RefitClosed"


def test_frames_split_and_joined_anywhere_are_the_same_frames(service: Service) -> None:
    with service.raw() as raw:
        stream = b"".join(wire.frame(wire.GetStatus(id=i)) for i in range(100, 140))
        for start in range(0, len(stream), 7):
            raw.send(stream[start : start + 7])
        assert [raw.read().id for _ in range(40)] == list(range(100, 140))


# -- who does not read, does not write, or does too much ---------------------------------------------


def test_a_client_that_never_reads_is_cut_off_alone(service: Service) -> None:
    """Replies pile up to a bound; then it loses its connection, and the memory comes back."""
    model = {f"layer.{i:05d}.weight": 1 for i in range(20_000)}
    with service.connect() as store:
        publish(store, "wide", model, 1)
    with service.raw() as deaf, service.raw() as other:
        lease = wire.OpenLease(id=1, model="wide", tag="latest")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(100_000):
                deaf.send(lease)
        other.status()
    with service.connect() as store:
        store.remove_model("wide")


def test_a_flood_of_requests_leaves_room_for_others(service: Service) -> None:
    """A client that keeps the store's receive buffer full gets its turn, and so does everybody else."""
    stop = threading.Event()
    with service.raw() as flooding, service.raw() as other:
        burst = b"".join(wire.frame(wire.GetStatus(id=i)) for i in range(1, 2000))

        def flood() -> None:
            while not stop.is_set():
                try:
                    flooding.sock.sendall(burst)
                except OSError:
                    return

        def drain() -> None:
            while not stop.is_set():
                try:
                    if not flooding.sock.recv(1 << 20):
                        return
                except OSError:
                    return

        threads = [threading.Thread(target=flood), threading.Thread(target=drain)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(20):
                assert other.status().pid == service.pid
        finally:
            stop.set()
            flooding.sock.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(PATIENCE)


def test_half_open_connections_cost_nothing_for_long(service: Service) -> None:
    """Clients that shut their sending side are gone; those that shut the receiving side too, once sent to."""
    fds = service.fds()
    for _ in range(50):
        with Raw(service.socket) as raw:
            raw.sock.shutdown(socket.SHUT_WR)
            assert raw.last_words() is None
    raws = [service.raw() for _ in range(50)]
    for raw in raws:
        raw.sock.shutdown(socket.SHUT_RD)
        raw.send(wire.GetStatus(id=1))
    eventually(lambda: service.fds() <= fds, "connections that cannot be answered are closed")
    for raw in raws:
        raw.close()


def test_too_many_waiting_requests_are_a_breach(service: Service) -> None:
    with service.raw() as raw:
        for i in range(300):
            raw.send(wire.WaitFor(id=i, model="m", tag="never"))
        assert "more than 256 requests of one connection are waiting" in refused(raw)


def test_waiting_requests_end_with_their_connection(service: Service) -> None:
    for _ in range(20):
        with service.raw() as raw:
            for i in range(200):
                raw.send(wire.WaitFor(id=i, model="m", tag="never"))
            raw.status()


def test_descriptors_sent_to_the_store_are_dropped(service: Service) -> None:
    with service.raw() as raw:
        before = service.fds()
        inside, outside = os.pipe()
        raw._last_id += 1
        raw.send(wire.GetStatus(id=raw._last_id), [outside] * 100)
        raw.reply(raw._last_id)
        os.close(outside)
        assert os.read(inside, 1) == b""  # nobody else holds the other end
        os.close(inside)
        assert service.fds() <= before


def test_a_thousand_connections_leave_nothing(service: Service) -> None:
    fds = service.fds()
    for _ in range(10):
        raws = [service.raw() if i % 2 else Raw(service.socket) for i in range(100)]
        raws[1].ask(wire.OpenLease(id=0, model="m", tag="latest", follow=True))
        raws[3].ask(wire.OpenRefit(id=0, model="m", tag="latest"))
        for raw in raws:
            raw.close()
        service.settled()
    eventually(lambda: service.fds() <= fds, f"{service.fds()} descriptors go back to {fds}")


def test_connections_leave_no_task_behind(tmp_path: Path) -> None:
    """The same in this process, where tasks can be counted."""
    from weightstore.admission import Admission
    from weightstore.arena import Arena
    from weightstore.listener import listening
    from weightstore.service import Clock, Service, ServiceConfig
    from weightstore.store import Store

    config = ServiceConfig(tmp_path / "s", f"weightstore-test-tasks-{os.getpid()}", MIB, MIB)

    def clients() -> None:
        for _ in range(50):
            with Raw(str(config.socket)) as raw:
                raw.hello()
                for i in range(10):
                    raw.send(wire.WaitFor(id=i, model="m", tag="t"))
                raw.status()
            with Raw(str(config.socket)) as raw:
                raw.send(b"\xff" * 8)
                raw.last_words()

    async def scenario(store: Store) -> tuple[int, int]:
        started = asyncio.Event()
        clock = Clock()
        with listening(config.socket, False) as listener:
            service = Service(config, store, clock)
            serving = asyncio.create_task(service.serve(listener, lambda _: started.set()))
            await started.wait()
            before = len(asyncio.all_tasks())
            await asyncio.to_thread(clients)
            for _ in range(1000):
                if len(asyncio.all_tasks()) <= before:
                    break
                await asyncio.sleep(0.005)
            after = len(asyncio.all_tasks())
            os.kill(os.getpid(), signal.SIGTERM)
            await serving
            return before, after

    with Arena.open(config.arena, MIB, MIB, Admission(0)) as arena:
        try:
            before, after = asyncio.run(scenario(Store(arena, 0.0, 0.0)))
        finally:
            arena.unlink()
    assert after == before


# -- fields that decode and make no sense ------------------------------------------------------------


def test_a_wait_of_not_a_number_seconds_is_refused(service: Service) -> None:
    with service.raw() as raw:
        failed = raw.ask(wire.WaitFor(id=0, model="m", tag="x", timeout=math.nan))
        assert failed.error == "UsageError" and "timeout" in failed.message
        for timeout in (-1.0, 0.0, 1e-9):
            assert raw.ask(wire.WaitFor(id=0, model="m", tag="x", timeout=timeout)).error == "StoreTimeout"
        raw.post(wire.WaitFor(id=0, model="m", tag="x", timeout=math.inf))
        raw.post(wire.WaitFor(id=0, model="m", tag="x", timeout=1e300))
        raw.status()


def test_absurd_refits_are_refused_at_once(service: Service) -> None:
    def opening(**how: object) -> wire.OpenRefit:
        return wire.OpenRefit(id=0, **{"model": "new", "tag": "latest", **how})

    with service.raw() as raw:
        for timeout in (math.nan, 0.0, -1.0):
            assert raw.ask(opening(timeout=timeout)).error == "UsageError"
        failed = raw.ask(opening(key="k", world_size=1 << 60, timeout=0.001))
        assert failed.error == "UsageError" and "world_size" in failed.message
        failed = raw.ask(opening(components=[f"c{i}" for i in range(100_000)]))
        assert failed.error == "UsageError" and "components" in failed.message
        failed = raw.ask(opening(key="k" * 100_000))
        assert failed.error == "UsageError" and len(failed.message) < 1000
        assert raw.status().refits == []


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "x" * 129, "x" * 10_000_000, "ü", "a\x00b"])
def test_impossible_names_are_refused_briefly_everywhere(service: Service, name: str) -> None:
    requests: list[wire.Request] = [
        wire.OpenRefit(id=0, model=name, tag="t"),
        wire.OpenRefit(id=0, model="m", tag=name),
        wire.OpenRefit(id=0, model="m", tag="t", components=[name]),
        wire.OpenLease(id=0, model=name, tag="t"),
        wire.RenewLease(id=0, model=name, tag="t", version=1, follow=True, parked=True),
        wire.WaitFor(id=0, model=name, tag="t", timeout=0),
        wire.WaitFor(id=0, model="m", tag=name, timeout=0),
        wire.SetTag(id=0, model=name, tag="t", version=1),
        wire.SetTag(id=0, model="m", tag=name, version=1),
        wire.RemoveTag(id=0, model=name, tag="t"),
        wire.RemoveModel(id=0, model=name),
        wire.VerifyVersion(id=0, model=name, tag="t"),
    ]
    with service.raw() as raw:
        for request in requests[:3] if len(name) > 1_000_000 else requests:
            failed = raw.ask(request)
            assert failed.error == "InvalidName", (request, failed)
            assert len(wire.frame(failed)) < 2000


def test_sizes_beyond_any_arena_are_refused(service: Service) -> None:
    huge = [TensorSpec(f"t.{i}", "uint8", (1 << 48 >> 1,), (1,)) for i in range(200_000)]
    with service.raw() as raw:
        refit = raw.ask(wire.OpenRefit(id=0, model="huge", tag="latest")).refit
        failed = raw.ask(wire.Reserve(id=0, refit=refit, specs=huge[:1]))
        assert failed.error == "ArenaFull"
        failed = raw.ask(wire.Reserve(id=0, refit=refit, specs=huge))  # the sum has more than 64 bits
        assert failed.error == "InvalidTensor" and "more than the store can address" in failed.message
        assert raw.ask(wire.Reserve(id=0, refit=refit, specs=specs({"t.ok": 8}))).records[0].nbytes == 8


def test_a_tensor_cut_into_very_many_parts_does_not_stop_the_store(service: Service) -> None:
    """100,000 columns of one tensor: checking every pair would take hours."""
    n = 100_000
    with service.raw() as raw:
        refit = raw.ask(wire.OpenRefit(id=0, model="cut", tag="latest")).refit
        raw.ask(wire.Reserve(id=0, refit=refit, specs=[TensorSpec("t.w", "uint8", (2, n), (n, 1))]))
        columns = [Write("t.w", Box((0, i), (2, i + 1))) for i in range(n)]
        failed = raw.ask(wire.CommitRefit(id=0, refit=refit, writes=columns[:-1]))
        assert failed.details == {"holes": ["t.w"]}
        failed = raw.ask(wire.CommitRefit(id=0, refit=refit, writes=[*columns, columns[n // 2]]))
        assert failed.details == {"overlapping": ["t.w"]}
        assert raw.ask(wire.CommitRefit(id=0, refit=refit, writes=columns)).version == 1
        raw.ask(wire.RemoveModel(id=0, model="cut"))


def test_one_connection_holds_only_so_many_leases_and_refits(service: Service) -> None:
    with service.raw() as raw:
        for _ in range(2000):
            raw.post(wire.OpenLease(id=0, model="m", tag="latest"))
        replies = [raw.read() for _ in range(2000)]
        failed = [reply for reply in replies if isinstance(reply, wire.Failed)]
        assert 0 < len(failed) < 1000 and failed[0].error == "UsageError" and "leases" in failed[0].message
        granted = next(reply for reply in replies if isinstance(reply, wire.LeaseGranted))
        raw.ask(wire.ReleaseLease(id=0, lease=granted.lease))
        assert isinstance(raw.ask(wire.OpenLease(id=0, model="m", tag="latest")), wire.LeaseGranted)
    with service.raw() as raw:
        outcomes = [
            raw.ask(wire.OpenRefit(id=0, model="m", tag=f"t{i}", base=1, partial=True)) for i in range(100)
        ]
        failed = [reply for reply in outcomes if isinstance(reply, wire.Failed)]
        assert 0 < len(failed) < 100 and failed[0].error == "UsageError" and "refits" in failed[0].message


def test_when_a_writer_hears_of_its_commit_every_reader_has_the_offer(service: Service) -> None:
    """In its socket, that is: a store killed right after the answer leaves no sleeping engine behind."""
    with service.connect() as store, contextlib.ExitStack() as stack:
        readers = [stack.enter_context(service.raw()) for _ in range(20)]
        for reader in readers:
            granted = reader.ask(wire.OpenLease(id=0, model="m", tag="latest", follow=True))
            reader.ask(wire.ParkLease(id=0, lease=granted.lease, parked=True))
        writer = stack.enter_context(service.raw())
        for _ in range(5):
            opened = writer.ask(wire.OpenRefit(id=0, model="m", tag="latest"))
            mapping = store.link.open_writer(writer.fds.pop())
            for reader in readers:
                reader.status()  # by now it has read where the places are
            for target in opened.targets:
                mapping.view(target.offset, target.nbytes)[:] = b"\x07" * target.nbytes
            names = [Write(target.name) for target in opened.targets]
            committed = writer.ask(wire.CommitRefit(id=0, refit=opened.refit, writes=names))
            readable, _, _ = select.select([reader.sock for reader in readers], [], [], 0)
            assert len(readable) == len(readers)
            for reader in readers:
                offer = reader.read()
                assert isinstance(offer, wire.Offer) and offer.version == committed.version
                reader.ask(wire.TakeOffer(id=0, lease=offer.lease, version=offer.version))


# -- the log ---------------------------------------------------------------------------------------


def test_breaches_are_logged_at_the_1st_10th_100th(tmp_path: Path) -> None:
    with Service(tmp_path) as service:
        for _ in range(250):
            with Raw(service.socket) as raw:
                raw.send(b"\xff" * 8)
                raw.last_words()
        lines = [line for line in service.log().splitlines() if "refused pid" in line]
        assert [n for n in (1, 10, 100) if any(f"(number {n} of" in line for line in lines)] == [1, 10, 100]
        assert len(service.log().splitlines()) == 3


def test_what_a_client_does_on_purpose_does_not_fill_the_log(tmp_path: Path) -> None:
    """Shared refits that expire, and connections beyond the descriptors there are."""

    def few_descriptors() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    with Service(tmp_path, preexec_fn=few_descriptors) as service:
        with service.raw() as raw:
            for i in range(30):
                opened = raw.ask(
                    wire.OpenRefit(id=0, model="m", tag=f"t{i}", key="k", world_size=2, timeout=1e-6)
                )
                assert isinstance(opened, wire.RefitOpened)
            eventually(lambda: not raw.status().refits, "the refits expire")
        raws = []
        for _ in range(200):
            raw = Raw(service.socket)
            raw.sock.setblocking(False)
            raws.append(raw)
            if len(raws) > 100:
                break
        for raw in raws:
            raw.close()

        def settled() -> wire.Status | None:
            try:
                return service.settled()
            except EOFError:
                return None  # it has not closed the others yet, and has no descriptor for this one

        eventually(settled, "the store takes connections again")
        assert len(service.log().splitlines()) < 12, service.log()


# -- how it ends -----------------------------------------------------------------------------------


def test_sigterm_ends_it_cleanly_whatever_clients_do(tmp_path: Path) -> None:
    with Service(tmp_path) as service, service.connect() as store:
        publish(store, "m", SIZES, 1)
        lease = store.lease("m", follow=True)
        refit = store.refit("m")
        shm, path = service.shm, Path(service.socket)
        assert shm.exists() and path.exists()
        with Raw(service.socket) as silent, service.raw() as waiting, service.raw() as verifying:
            silent.send(b"\x10")
            waiting.send(wire.WaitFor(id=9, model="m", tag="never"))
            waiting.status()
            verifying.send(wire.VerifyVersion(id=9, model="m", tag="latest"))
            assert service.end() == 0
            assert waiting.last_words() is None
        assert not shm.exists() and not path.exists()
        assert service.log() == ""
        record = lease.records["t.w"]
        assert lease.mapping.view(record.offset, record.nbytes).tobytes() == b"\x01" * 5000
        with pytest.raises(StoreGone, match="nothing was committed"):
            refit.reserve(specs({"t.w": 5000}))


def test_a_kept_arena_serves_the_next_store_and_leases_are_renewed(tmp_path: Path) -> None:
    with Service(tmp_path, "--keep", grace=600) as service, service.connect() as store:
        publish(store, "m", SIZES, 1)
        publish(store, "m", SIZES, 2)
        lease = store.lease("m", version=2)
        publish(store, "m", SIZES, 3)
        uuid = store.status().arena.uuid
        assert service.end() == 0
        assert service.shm.exists() and not Path(service.socket).exists()
        service.start()
        eventually(lambda: store.link.connection, "the client reconnects by itself")
        status = store.status()
        assert status.arena.uuid == uuid
        assert [(held.model, held.version) for held in status.leases] == [("m", 2)]
        assert not lease.lost and contents(store, "m", version=2)["t.w"] == b"\x02" * 5000
        assert contents(store, "m")["t.w"] == b"\x03" * 5000
        assert service.end() == 0


def test_a_second_store_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    with Service(tmp_path) as service, service.connect() as store:
        publish(store, "m", SIZES, 1)
        second = subprocess.run([*SERVE, service.socket], cwd=ROOT, capture_output=True, text=True)
        assert second.returncode == 1
        assert f"a store already serves on {service.socket}" in second.stderr
        other = str(tmp_path / "other")
        second = subprocess.run(
            [*SERVE, other, "--arena", service.shm.name], cwd=ROOT, capture_output=True, text=True
        )
        assert second.returncode == 1
        assert f"in use by pid {service.pid}" in second.stderr
        assert not os.path.exists(other)
        assert contents(store, "m")["t.w"] == b"\x01" * 5000
        assert service.status().pid == service.pid


def test_of_many_stores_started_at_once_one_serves(tmp_path: Path) -> None:
    """Whoever loses the race leaves the winner its socket."""
    path = tmp_path / "s"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    stores = [
        subprocess.Popen(
            [*SERVE, str(path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    try:
        said = [store.stdout.readline() for store in stores if store.stdout is not None]
        serving = [store for store, line in zip(stores, said, strict=True) if line.startswith("serving")]
        assert len(serving) == 1
        for store in stores:
            if store is not serving[0]:
                assert store.wait(PATIENCE) == 1
        with Raw(str(path)) as raw:
            assert raw.hello().pid == serving[0].pid
    finally:
        for store in stores:
            store.terminate()
            store.communicate(timeout=PATIENCE)
    assert not path.exists()


def test_a_stale_socket_is_replaced_and_anything_else_is_not(tmp_path: Path) -> None:
    with Service(tmp_path) as service:
        service.kill()
        assert stat.S_ISSOCK(os.stat(service.socket).st_mode)
        service.start()
        assert service.status().pid == service.pid
        service.end()
        Path(service.socket).write_text("mine")
        with pytest.raises(AssertionError, match="exists and is not a socket"):
            service.start()
        assert Path(service.socket).read_text() == "mine"
        service.wait()


def test_it_ends_with_whoever_holds_the_other_end_of_until_eof(tmp_path: Path) -> None:
    inside, outside = os.pipe()
    with Service(tmp_path, "--until-eof", str(inside), pass_fds=[inside]) as service:
        os.close(inside)
        os.write(outside, b"noise is no end")
        service.status()
        shm = service.shm
        os.close(outside)
        assert service.wait() == 0
        assert not shm.exists() and not os.path.exists(service.socket)


@pytest.mark.parametrize("fd", ["closed", "/dev/null", "the writing end"])
def test_a_useless_until_eof_is_a_usage_error(tmp_path: Path, fd: str) -> None:
    path = tmp_path / "s"
    inside, outside = os.pipe()
    with open("/dev/null") as null:
        number = {"closed": 777, "/dev/null": null.fileno(), "the writing end": outside}[fd]
        result = subprocess.run(
            [*SERVE, str(path), "--until-eof", str(number)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            pass_fds=[null.fileno(), outside],
            timeout=PATIENCE,
        )
    os.close(inside)
    os.close(outside)
    assert result.returncode == 1 and f"--until-eof {number}" in result.stderr
    assert "Traceback" not in result.stderr
    assert not path.exists() and not Path("/dev/shm", arena_name(str(path))).exists()


def test_a_writer_of_another_pid_namespace_does_not_keep_the_store_from_starting(tmp_path: Path) -> None:
    """Its pid is 0 here, and nobody can tell when it ends: its space stays out of use."""
    from weightstore.admission import Admission
    from weightstore.arena import Arena
    from weightstore.catalog import Peer, Writer
    from weightstore.store import Store

    with Service(tmp_path, capacity="8MiB") as service:
        service.kill()
        with Arena.open(service.shm.name, 8 * MIB, 4 * MIB, Admission(0)) as arena:
            store = Store(arena, 0.0, 0.0)
            stranger = Peer(1, Writer(0, 0, "elsewhere"))
            refit = store.open_refit(wire.OpenRefit(id=0, model="m", tag="t"), stranger, 0.0)
            store.grown(arena.commit_data(MIB))
            store.reserve(refit.number, stranger, specs({"t.w": 1000}))
        service.start()
        assert service.status().arena.quarantined == 1024


@pytest.mark.parametrize("options", [(), ("--keep",)])
def test_the_lock_file_of_its_arena_goes_with_the_arena(tmp_path: Path, options: tuple[str, ...]) -> None:
    with Service(tmp_path, *options) as service, service.connect() as store:
        lock = Path(pin_lock(store.mapping.uuid))
        lock.parent.mkdir(mode=0o700, exist_ok=True)
        lock.touch()
        service.end(signal.SIGTERM)
        assert lock.exists() == service.shm.exists() == bool(options)
    lock.unlink(missing_ok=True)


# -- what it is made of ----------------------------------------------------------------------------


def test_the_process_holds_no_numerics(service: Service) -> None:
    maps = Path(f"/proc/{service.pid}/maps").read_text()
    assert "msgpack" in maps or "msgspec" in maps  # it is the right process, and it shows what it loaded
    assert not [line for line in maps.splitlines() if "torch" in line or "numpy" in line]


def test_importing_the_service_imports_no_numerics() -> None:
    code = (
        "import sys, weightstore.service, weightstore.cli.serve\n"
        "sys.exit(str(sorted({'torch', 'numpy', 'rich', 'safetensors'} & set(sys.modules))) "
        "if {'torch', 'numpy', 'rich', 'safetensors'} & set(sys.modules) else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_what_it_serves_is_private(service: Service) -> None:
    assert stat.S_IMODE(os.stat(service.socket).st_mode) == 0o600
    assert stat.S_IMODE(service.shm.stat().st_mode) == 0o600


def test_a_refusal_is_the_class_the_store_raised(service: Service) -> None:
    with service.raw() as raw:
        with pytest.raises(ProtocolError, match="Hello may be said only once"):
            raw.ask(wire.Hello(id=0, protocol=wire.PROTOCOL))
    with service.connect() as store, pytest.raises(ArenaFull) as full:
        publish(store, "big", {"t.w": 65 * MIB}, 1)
    assert isinstance(full.value, WeightstoreError) and full.value.details["capacity"] == 64 * MIB
