"""The service: an asyncio shell around the store. It accepts, dispatches, waits and cleans up.

One process, one event loop; every decision is made on the loop in one step, so the catalog needs no
locks. What blocks runs on threads that touch nothing of the catalog: committing windows (one at a
time) and checksums (one at a time, lowest priority).

A request is either answered at once, in the order of arrival, or becomes a task that waits: for
space, for other ranks, for followers to learn of an in-place refit, for a tag to move. When a connection
ends, its tasks are cancelled first, then its leases and refits end in the catalog.

This module imports neither torch nor numpy: the process starts in a fraction of a second and stays
small.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import stat
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import weightstore
from weightstore import status, wire
from weightstore.admission import Admission
from weightstore.allocator import NoSpace
from weightstore.arena import Arena
from weightstore.catalog import Peer, RefitState, Writer
from weightstore.checksums import Checksummer
from weightstore.errors import (
    AccessDenied,
    ArenaFull,
    ArenaUnusable,
    ProtocolError,
    RefitAborted,
    StoreTimeout,
    VersionInUse,
    WeightstoreError,
)
from weightstore.layout import MIB
from weightstore.peers import open_pidfd, peer_credentials, peer_pidfd, start_ticks
from weightstore.session import Budget, Session
from weightstore.store import Store

log = logging.getLogger("weightstore.service")

MAX_CLIENTS: Final = 2048
MAX_WAITING: Final = 256
"""Requests of one connection that may be waiting at a time."""
UNFINISHED_BYTES: Final = 512 * MIB
OFFER_PATIENCE: Final = 2.0
"""Seconds a refit short of space waits for sleeping engines to let go of the version before."""
IN_PLACE_PATIENCE: Final = 30.0
"""Seconds an in-place refit waits for its followers to learn that they must not read."""

T = TypeVar("T")


@dataclass(frozen=True)
class ServiceConfig:
    """How to serve. Sizes in bytes, times in seconds.

    Attributes:
        socket: path of the Unix socket; its directory is made private if it does not exist.
        arena: name of the shared memory object.
        keep: leave the arena behind on a clean end, for the next store to adopt.
        reserve: host memory that committing never eats into.
        grace: how long after adopting an arena readers may renew their leases.
        allow_uids: user ids that may connect besides this process's own and root.
        until_eof: a descriptor; the service ends when it reaches end of file.
    """

    socket: Path
    arena: str
    capacity: int
    window: int
    keep: bool = False
    reserve: int = 512 * MIB
    grace: float = 30.0
    allow_uids: frozenset[int] = frozenset()
    until_eof: int | None = None


def run(config: ServiceConfig, ready: Callable[[Store], None] = lambda store: None) -> None:
    """Serve until SIGTERM, SIGINT or the end of `until_eof`; `ready` is called once connectable.

    Raises:
        ArenaUnusable, ArenaFull, UsageError: the arena or the socket cannot be had.
    """
    asyncio.run(_serve(config, ready))


async def _serve(config: ServiceConfig, ready: Callable[[Store], None]) -> None:
    admission = Admission(config.reserve)
    with Arena.open(config.arena, config.capacity, config.window, admission) as arena:
        clock = Clock()
        store = Store(arena, clock(), config.grace)
        listener = listen(config.socket, bool(config.allow_uids))
        try:
            service = Service(config, store, clock)
            with contextlib.closing(listener):
                await service.serve(listener, ready)
        finally:
            config.socket.unlink(missing_ok=True)
        if not config.keep:
            arena.unlink()


def listen(path: Path, shared: bool) -> socket.socket:
    """A listening Unix socket at `path`, replacing one that nobody answers on.

    Raises:
        ArenaUnusable: a store already answers there, or the path cannot be used.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and not stat.S_ISSOCK(path.lstat().st_mode):
            raise ArenaUnusable(f"{path} exists and is not a socket; choose another --socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                path.unlink(missing_ok=True)
            else:
                raise ArenaUnusable(f"a store already serves on {path}; use it, stop it, or choose another --socket")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # The mode is set before anyone can connect; allowed strangers are told apart by their credentials.
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
        if shared:
            path.chmod(0o666)
    except OSError as error:
        raise ArenaUnusable(f"cannot serve on {path}: {error.strerror or error}") from None
    listener.listen(128)
    listener.setblocking(False)
    return listener


class Clock:
    """Wall-clock seconds that never jump: the time at the start plus a monotonic difference."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def __call__(self) -> float:
        return self._offset + time.monotonic()


class Service:
    def __init__(self, config: ServiceConfig, store: Store, clock: Clock) -> None:
        self._config = config
        self._store = store
        self._catalog = store.catalog
        self._clock = clock
        self._started = clock()
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._changed = asyncio.Event()
        self._growing = asyncio.Lock()
        self._growth_thread = ThreadPoolExecutor(1, "weightstore-grow")
        self._sessions: dict[int, Session] = {}
        self._conversations: set[asyncio.Task[None]] = set()
        self._last_peer = 0
        self._budget = Budget(UNFINISHED_BYTES)
        self._watched: dict[Writer, int] = {}
        self._deadline: asyncio.TimerHandle | None = None
        self._misbehaved = 0
        self._checksummer = Checksummer(store)
        self._handlers: dict[type, Callable[[Session, Peer, Any], Any]] = {
            wire.OpenRefit: self._open_refit,
            wire.Reserve: self._reserve,
            wire.CommitRefit: self._commit_refit,
            wire.AbortRefit: self._abort_refit,
            wire.Drained: self._drained,
            wire.OpenLease: self._open_lease,
            wire.RenewLease: self._renew_lease,
            wire.TakeOffer: self._take_offer,
            wire.ParkLease: self._park_lease,
            wire.ReleaseLease: self._release_lease,
            wire.WaitFor: self._wait_for,
            wire.SetTag: self._set_tag,
            wire.RemoveTag: self._remove_tag,
            wire.RemoveModel: self._remove_model,
            wire.GetStatus: self._get_status,
            wire.VerifyVersion: self._verify_version,
        }

    # -- life --------------------------------------------------------------------------------------

    async def serve(self, listener: socket.socket, ready: Callable[[Store], None]) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop.set)
        if self._config.until_eof is not None:
            self._loop.add_reader(self._config.until_eof, self._on_lifeline, self._config.until_eof)
        for writer in self._catalog.space.holdouts():
            self._watch(writer, self._reopen_pidfd(writer))
        accepting = asyncio.create_task(self._accept(listener))
        summing = asyncio.create_task(self._checksummer.run())
        self._after_change()
        ready(self._store)
        try:
            await self._stop.wait()
        finally:
            for task in (accepting, summing):
                task.cancel()
            self._checksummer.close()
            for session in self._sessions.values():
                session.abort()
            await asyncio.gather(accepting, summing, *self._conversations, return_exceptions=True)
            if self._deadline is not None:
                self._deadline.cancel()
            self._growth_thread.shutdown()
            for pidfd in self._watched.values():
                os.close(pidfd)

    def _on_lifeline(self, fd: int) -> None:
        if not os.read(fd, 4096):
            self._stop.set()

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = await self._loop.sock_accept(listener)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED, errno.ENOMEM):
                    raise
                log.warning("cannot accept a connection: %s", error)
                await asyncio.sleep(0.1)  # descriptors come back when connections end
                continue
            try:
                sock.setblocking(False)
                pid, uid = peer_credentials(sock)
                session = Session(sock, peer_pidfd(sock), self._budget)
            except OSError as error:
                log.warning("dropped a connection: %s", error)
                sock.close()
                continue
            task = asyncio.create_task(self._converse(session, pid, uid))
            self._conversations.add(task)
            task.add_done_callback(self._conversations.discard)
            task.add_done_callback(_report_bug)

    async def _converse(self, session: Session, pid: int, uid: int) -> None:
        """Serve one connection from its first byte to its last."""
        number, self._last_peer = self._last_peer + 1, self._last_peer + 1
        self._sessions[number] = session
        sending = asyncio.create_task(session.transmit())
        session.tasks.add(sending)

        def handle(session: Session, request: wire.Request) -> None:
            self._handle(session, request, number, pid)

        try:
            self._admit(uid)
            await session.receive(handle)
        except (ProtocolError, AccessDenied) as error:
            self._complain(session, pid, error)
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(sending, 1.0)
        except (OSError, asyncio.TimeoutError):
            pass  # it hung up, or never said who it is
        finally:
            for task in session.tasks:
                task.cancel()
            await asyncio.gather(*session.tasks, return_exceptions=True)
            # Kept on purpose, the arena goes to the next store, and its readers' leases with it.
            if session.peer is not None and not (self._stop.is_set() and self._config.keep):
                self._part(session, session.peer)
            del self._sessions[number]
            session.close()

    def _admit(self, uid: int) -> None:
        if uid not in {os.geteuid(), 0} | self._config.allow_uids:
            raise AccessDenied(
                f"user id {uid} may not use this store, which runs as user id {os.geteuid()}; start it with "
                f"--allow-uid {uid}, or connect as that user",
                uid=uid,
            )
        if len(self._sessions) > MAX_CLIENTS:
            raise AccessDenied(f"the store already serves {MAX_CLIENTS} connections; close some")

    def _complain(self, session: Session, pid: int, error: WeightstoreError) -> None:
        """Tell the peer once, and the log rarely: a hostile client must not fill the disk."""
        self._misbehaved += 1
        if str(self._misbehaved).strip("0") == "1":  # the 1st, 10th, 100th, …
            log.warning("refused pid %d (refusal number %d): %s", pid, self._misbehaved, error)
        session.send(_failure(0, error))
        session.finish()

    def _part(self, session: Session, peer: Peer) -> None:
        """The connection has ended: so do its leases and refits."""
        self._store.drop_peer(peer)
        if peer.writer in self._catalog.space.holdouts():
            self._watch(peer.writer, session.take_pidfd())
        self._after_change()

    # -- writers that may still be writing -----------------------------------------------------------

    def _reopen_pidfd(self, writer: Writer) -> int | None:
        pidfd = open_pidfd(writer.pid)
        if pidfd is not None and start_ticks(writer.pid) != writer.started:
            os.close(pidfd)  # a later process with the same number
            return None
        return pidfd

    def _watch(self, writer: Writer, pidfd: int | None) -> None:
        """Settle the writer's debts when its process is gone."""
        if pidfd is None:
            if writer.pid > 0:
                self._store.settle(writer)
            else:
                log.warning("a writer in another pid namespace went; its space stays quarantined until a restart")
            return
        previous = self._watched.pop(writer, None)
        if previous is not None:
            self._loop.remove_reader(previous)
            os.close(previous)
        self._watched[writer] = pidfd
        self._loop.add_reader(pidfd, self._on_exit, writer)

    def _on_exit(self, writer: Writer) -> None:
        pidfd = self._watched.pop(writer)
        self._loop.remove_reader(pidfd)
        os.close(pidfd)
        self._store.settle(writer)
        self._after_change()

    # -- dispatch ----------------------------------------------------------------------------------

    def _handle(self, session: Session, request: wire.Request, number: int, pid: int) -> None:
        """Answer a request now, or start the task that will."""
        if isinstance(request, wire.Hello):
            self._hello(session, request, number, pid)
            return
        peer = session.peer
        if peer is None:
            raise ProtocolError("the first message on a connection must be Hello")
        try:
            answer = self._handlers[type(request)](session, peer, request)
        except WeightstoreError as error:
            answer = _failure(request.id, error)
        except Exception as error:
            answer = _bug(request, error)
        if asyncio.iscoroutine(answer):
            if len(session.tasks) > MAX_WAITING:
                answer.close()
                raise ProtocolError(f"more than {MAX_WAITING} requests of one connection are waiting")
            task = asyncio.create_task(self._answer_later(session, request, answer))
            session.tasks.add(task)
            task.add_done_callback(session.tasks.discard)
        else:
            session.send(answer)

    async def _answer_later(
        self, session: Session, request: wire.Request, waiting: Coroutine[Any, Any, wire.Reply]
    ) -> None:
        try:
            answer = await waiting
        except WeightstoreError as error:
            answer = _failure(request.id, error)
        except Exception as error:
            answer = _bug(request, error)
        fds = [self._store.arena.writer_fd()] if isinstance(answer, wire.RefitOpened) else []
        session.send(answer, fds)

    def _hello(self, session: Session, request: wire.Hello, number: int, pid: int) -> None:
        if session.peer is not None:
            raise ProtocolError("Hello may be said only once")
        if request.protocol != wire.PROTOCOL:
            raise ProtocolError(
                f"this store speaks protocol {wire.PROTOCOL}, the client {request.protocol}; use the same "
                "weightstore on both sides"
            )
        writer = Writer(pid, start_ticks(pid), request.instance[:64])
        session.peer = Peer(number, writer, request.client[:200])
        arena = self._store.arena
        welcome = wire.Welcome(
            id=request.id,
            arena=arena.uuid,
            capacity=arena.capacity,
            window=arena.window,
            nbytes=arena.nbytes,
            server=weightstore.__version__,
            pid=os.getpid(),
        )
        session.send(welcome, [arena.reader_fd()])

    def _after_change(self) -> None:
        """The catalog may have changed: make offers, wake those who wait, plan the next deadline."""
        for lease, version in self._catalog.leases.make_offers():
            offer = wire.Offer(
                lease=lease.number,
                version=version.number,
                torn=bool(version.torn),
                records=wire.encode_records(None) if version.torn else version.encoded,
            )
            self._sessions[lease.peer.number].send(offer)
        self._checksummer.wake()
        waiting, self._changed = self._changed, asyncio.Event()
        waiting.set()
        if self._deadline is not None:
            self._deadline.cancel()
        due = [r.deadline for r in self._catalog.open_refits() if r.declared.world_size > 1]
        if self._catalog.grace_until:
            due.append(self._catalog.grace_until)
        self._deadline = (
            self._loop.call_later(max(0.0, min(due) - self._clock()) + 0.01, self._expire) if due else None
        )

    def _expire(self) -> None:
        for refit in self._store.expire(self._clock()):
            log.warning("%s was aborted: %s", refit.describe(), refit.reason)
        self._after_change()

    async def _until(self, condition: Callable[[], T | None], timeout: float | None) -> T | None:
        """The first true value of `condition`, looked at after every change; None after `timeout` seconds."""
        end = None if timeout is None else self._loop.time() + timeout
        while True:
            value = condition()
            if value:
                return value
            left = None if end is None else end - self._loop.time()
            if left is not None and left <= 0:
                return None
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)

    # -- refits ------------------------------------------------------------------------------------

    async def _with_space(self, model: str, attempt: Callable[[], T]) -> T:
        """Run an attempt that may raise NoSpace, making space for it. Raises ArenaFull if there is none."""
        try:
            return attempt()
        except NoSpace:
            # Sleeping engines answer an offer within moments, and their last version's space comes back.
            await self._until(lambda: not self._catalog.leases.answering(model), OFFER_PATIENCE)
        async with self._growing:
            while True:
                try:
                    return attempt()
                except NoSpace as need:
                    usage = self._catalog.usage()
                    growth = self._loop.run_in_executor(
                        self._growth_thread, self._store.commit_space, need, usage
                    )
                    try:
                        # Shielded: the pages exist even if the client that asked for them has gone.
                        added = await asyncio.shield(growth)
                    except asyncio.CancelledError:
                        growth.add_done_callback(self._adopt_growth)
                        raise
                    except ArenaFull as full:
                        raise self._explain(full) from None
                    self._store.grown(added)

    def _adopt_growth(self, growth: Awaitable[int]) -> None:
        assert isinstance(growth, asyncio.Future)
        if not growth.cancelled() and growth.exception() is None:
            self._store.grown(growth.result())

    def _explain(self, full: ArenaFull) -> ArenaFull:
        """Add what holds space that nobody's tag names: often the answer to why the arena is full."""
        held = status.held_back(self._catalog)
        return ArenaFull(f"{full.message}. {held}" if held else full.message, **full.details)

    async def _open_refit(self, session: Session, peer: Peer, request: wire.OpenRefit) -> wire.Reply:
        refit = await self._with_space(
            request.model, lambda: self._store.open_refit(request, peer, self._clock())
        )
        self._after_change()
        told = await self._until(
            lambda: refit.state is not RefitState.OPEN or not self._catalog.unaware(refit), IN_PLACE_PATIENCE
        )
        if not told:
            slow = ", ".join(str(lease.peer) for lease in self._catalog.unaware(refit))
            self._store.abort_refit(refit.number, peer, f"{slow} did not stop reading")
            self._after_change()
            raise VersionInUse(
                f"{slow} did not acknowledge within {IN_PLACE_PATIENCE:g} s that the tag's bytes are about to be "
                "overwritten; is that process stopped?",
                holder=slow,
            )
        self._catalog.refit_of(refit.number, peer)
        base = refit.base
        return wire.RefitOpened(
            id=request.id,
            refit=refit.number,
            base=base.number if base is not None else 0,
            base_records=base.encoded if base is not None else wire.encode_records([]),
            targets=list(refit.targets.values()),
        )

    async def _reserve(self, session: Session, peer: Peer, request: wire.Reserve) -> wire.Reply:
        refit = self._catalog.refit_of(request.refit, peer)
        records = await self._with_space(
            refit.model, lambda: self._store.reserve(request.refit, peer, request.specs)
        )
        return wire.Reserved(id=request.id, records=records)

    async def _commit_refit(self, session: Session, peer: Peer, request: wire.CommitRefit) -> wire.Reply:
        refit = self._catalog.refit_of(request.refit, peer)
        try:
            self._store.commit(request.refit, peer, request.writes, self._clock())
        finally:
            self._after_change()
        await self._until(lambda: refit.state is not RefitState.OPEN, None)
        if refit.state is RefitState.ABORTED:
            raise RefitAborted(f"{refit.describe()} was aborted: {refit.reason}", refit=refit.number)
        return wire.Committed(id=request.id, version=refit.version)

    def _abort_refit(self, session: Session, peer: Peer, request: wire.AbortRefit) -> wire.Reply:
        self._store.abort_refit(request.refit, peer, request.reason[:500])
        self._after_change()
        return wire.Done(id=request.id)

    def _drained(self, session: Session, peer: Peer, request: wire.Drained) -> wire.Reply:
        self._store.settle(peer.writer)
        self._after_change()
        return wire.Done(id=request.id)

    # -- leases ------------------------------------------------------------------------------------

    def _open_lease(self, session: Session, peer: Peer, request: wire.OpenLease) -> wire.Reply:
        lease, version = self._store.open_lease(
            peer, request.model, request.tag, request.version, request.follow, self._clock()
        )
        return wire.LeaseGranted(
            id=request.id, lease=lease.number, version=version.number, records=version.encoded
        )

    def _renew_lease(self, session: Session, peer: Peer, request: wire.RenewLease) -> wire.Reply:
        lease, version = self._catalog.leases.renew(
            peer,
            request.model,
            request.tag,
            request.version,
            request.follow,
            request.parked,
            self._clock(),
        )
        # A new connection knows nothing of the offers to the last one: the loop's next turn repeats them,
        # after this answer has told the client the lease's new number.
        self._loop.call_soon(self._after_change)
        return wire.LeaseGranted(
            id=request.id, lease=lease.number, version=version.number, records=version.encoded
        )

    def _take_offer(self, session: Session, peer: Peer, request: wire.TakeOffer) -> wire.Reply:
        self._store.take_offer(request.lease, peer, request.version)
        self._after_change()
        return wire.Done(id=request.id)

    def _park_lease(self, session: Session, peer: Peer, request: wire.ParkLease) -> wire.Reply:
        had = self._catalog.leases.get(request.lease, peer).version
        version = self._store.park_lease(request.lease, peer, request.parked)
        self._after_change()
        known = request.parked or bool(version.torn) or version.number == had
        return wire.LeaseState(
            id=request.id,
            version=version.number,
            torn=bool(version.torn),
            records=wire.encode_records(None) if known else version.encoded,
        )

    def _release_lease(self, session: Session, peer: Peer, request: wire.ReleaseLease) -> wire.Reply:
        self._store.release_lease(request.lease, peer)
        self._after_change()
        return wire.Done(id=request.id)

    # -- tags --------------------------------------------------------------------------------------

    async def _wait_for(self, session: Session, peer: Peer, request: wire.WaitFor) -> wire.Reply:
        def newer() -> int | None:
            model = self._catalog.models.find(request.model)
            number = model.tags.get(request.tag, 0) if model is not None else 0
            return number if number > request.after else None

        version = await self._until(newer, request.timeout)
        if version is None:
            raise StoreTimeout(
                f"tag {request.tag!r} of {request.model!r} named nothing newer than version {request.after} within "
                f"{request.timeout:g} s",
                after=request.after,
            )
        return wire.VersionIs(id=request.id, version=version)

    def _set_tag(self, session: Session, peer: Peer, request: wire.SetTag) -> wire.Reply:
        self._store.set_tag(request.model, request.tag, request.version)
        self._after_change()
        return wire.Done(id=request.id)

    def _remove_tag(self, session: Session, peer: Peer, request: wire.RemoveTag) -> wire.Reply:
        self._store.remove_tag(request.model, request.tag)
        self._after_change()
        return wire.Done(id=request.id)

    def _remove_model(self, session: Session, peer: Peer, request: wire.RemoveModel) -> wire.Reply:
        self._store.remove_model(request.model)
        self._after_change()
        return wire.Done(id=request.id)

    # -- looking -----------------------------------------------------------------------------------

    def _get_status(self, session: Session, peer: Peer, request: wire.GetStatus) -> wire.Reply:
        clients = sum(1 for s in self._sessions.values() if s.peer is not None)
        return status.build(self._store, request.id, self._started, self._clock(), clients)

    async def _verify_version(self, session: Session, peer: Peer, request: wire.VerifyVersion) -> wire.Reply:
        """The version is leased while its bytes are read, so it stays what it is."""
        lease, version = self._store.open_lease(
            peer, request.model, request.tag, request.version, False, self._clock()
        )
        try:
            return await self._checksummer.verify(request.id, version)
        finally:
            with contextlib.suppress(WeightstoreError):  # the connection may be gone, and the lease with it
                self._store.release_lease(lease.number, peer)
                self._after_change()


def _failure(request: int, error: WeightstoreError) -> wire.Failed:
    return wire.Failed(id=request, error=type(error).__name__, message=error.message, details=error.details)


def _bug(request: wire.Request, error: Exception) -> wire.Failed:
    log.error("a %s request failed for no fault of the client", type(request).__name__, exc_info=error)
    return wire.Failed(
        id=request.id,
        error="WeightstoreError",
        message=f"the store failed on {type(request).__name__} ({type(error).__name__}: {error}); this is a "
        "bug, its log has the details",
    )


def _report_bug(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a connection ended by a bug", exc_info=error)
