"""The service: an asyncio shell around the store. It accepts, dispatches, waits and cleans up.

One process, one event loop; every decision is made on the loop in one step, so the catalog needs no
locks. What blocks runs on threads that touch nothing of the catalog: committing windows (one at a
time) and checksums (one at a time).

A request is either answered at once, in the order of arrival, or becomes a task that waits
(weightstore.requests says what each means). When a connection ends, its tasks are cancelled first,
then its leases and refits end in the catalog.

This module imports neither torch nor numpy: the process starts in a fraction of a second and stays
small.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import resource
import signal
import socket
import stat
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import weightstore
from weightstore import wire
from weightstore.admission import Admission
from weightstore.arena import Arena
from weightstore.catalog import Lease, Peer, Refit, Writer
from weightstore.changes import Changes
from weightstore.checksums import Checksummer
from weightstore.errors import (
    AccessDenied,
    ArenaFull,
    ArenaUnusable,
    ProtocolError,
    UsageError,
    WeightstoreError,
)
from weightstore.foretelling import Foretelling
from weightstore.layout import DATA_OFFSET, MIB
from weightstore.listener import listening
from weightstore.paths import pin_lock
from weightstore.peers import Exits, peer_credentials, peer_pidfd, reopen_pidfd, start_ticks
from weightstore.requests import Requests
from weightstore.session import Budget, Session
from weightstore.store import Store

log = logging.getLogger("weightstore.service")

MAX_CLIENTS: Final = 2048
MAX_WAITING: Final = 256
"""Requests of one connection that may be waiting at a time."""
UNFINISHED_BYTES: Final = 512 * MIB
"""Requests that have arrived in part, over all connections."""
UNSENT_BYTES: Final = 1024 * MIB
"""Replies that have not been read, over all connections."""


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
        ArenaUnusable, ArenaFull, UsageError: the arena or the socket cannot be had, or `until_eof` has no
            end to wait for.
    """
    if config.until_eof is not None:
        _require_lifeline(config.until_eof)
    # Two descriptors a connection: the usual soft limit of 1024 would be reached long before MAX_CLIENTS.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(_serve(config, ready))


def _require_lifeline(fd: int) -> None:
    try:
        mode, flags = os.fstat(fd).st_mode, fcntl.fcntl(fd, fcntl.F_GETFL)
    except OSError as error:
        raise UsageError(
            f"--until-eof {fd}: {error.strerror}; let the store inherit that descriptor"
        ) from None
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)) or flags & os.O_ACCMODE == os.O_WRONLY:
        raise UsageError(
            f"--until-eof {fd} is not a pipe's reading end or a socket, so its end would never come"
        )


async def _serve(config: ServiceConfig, ready: Callable[[Store], None]) -> None:
    admission = Admission(config.reserve)
    # The socket first: a store that cannot have it must not leave a new arena behind.
    with (
        listening(config.socket, bool(config.allow_uids)) as listener,
        Arena.open(config.arena, config.capacity, config.window, admission) as arena,
    ):
        clock = Clock()
        try:
            store = Store(arena, clock(), config.grace)
        except ArenaFull:
            if not arena.adopted:
                arena.unlink()  # no room for even its catalog
            raise
        await Service(config, store, clock).serve(listener, ready)
        if not config.keep:
            arena.unlink()
            with contextlib.suppress(OSError):  # none was pinned, or another user's
                os.unlink(pin_lock(arena.uuid))


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
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._sessions: dict[int, Session] = {}
        self._conversations: set[asyncio.Task[None]] = set()
        self._last_peer = 0
        self._unfinished = Budget(UNFINISHED_BYTES, "unfinished requests")
        self._unsent = Budget(UNSENT_BYTES, "replies that nobody reads")
        self._exits = Exits(self._on_exit)
        self._deadline: asyncio.TimerHandle | None = None
        self._said: Counter[str] = Counter()
        self._changes = Changes(self._react)
        self._checksummer = Checksummer(store)
        self._foretelling = Foretelling(self._catalog, DATA_OFFSET, store.arena.nbytes, store.arena.window)
        self._requests = Requests(
            store, self._changes, self._checksummer, clock, self._count_clients, self._foretell
        )

    # -- life --------------------------------------------------------------------------------------

    async def serve(self, listener: socket.socket, ready: Callable[[Store], None]) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop.set)
        if self._config.until_eof is not None:
            self._loop.add_reader(self._config.until_eof, self._on_lifeline, self._config.until_eof)
        for writer in self._catalog.holdouts():
            self._watch(writer, reopen_pidfd(writer))
        accepting = asyncio.create_task(self._accept(listener))
        summing = asyncio.create_task(self._checksummer.run())
        for task in (accepting, summing):
            task.add_done_callback(_report_bug)
        self._changes.announce()
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
            self._requests.close()
            self._exits.close()

    def _on_lifeline(self, fd: int) -> None:
        if not os.read(fd, 4096):
            self._stop.set()

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = await self._loop.sock_accept(listener)
            except OSError as error:
                self._seldom("cannot accept connections: %s", error.strerror)
                await asyncio.sleep(0.1)  # descriptors and memory come back when connections end
                continue
            try:
                sock.setblocking(False)
                pid, uid = peer_credentials(sock)
                session = Session(sock, peer_pidfd(sock), self._unfinished, self._unsent)
            except OSError as error:
                self._seldom("dropped a connection: %s", error.strerror)
                sock.close()
                continue
            self._last_peer += 1
            self._sessions[self._last_peer] = session
            task = asyncio.create_task(self._converse(session, self._last_peer, pid, uid))
            self._conversations.add(task)
            task.add_done_callback(self._conversations.discard)
            task.add_done_callback(_report_bug)
            await asyncio.sleep(0)  # sock_accept does not wait while somebody is knocking

    async def _converse(self, session: Session, number: int, pid: int, uid: int) -> None:
        """Serve one connection from its first byte to its last."""
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
        except OSError:
            pass  # it hung up
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

    def _count_clients(self) -> int:
        return sum(1 for session in self._sessions.values() if session.peer is not None)

    def _complain(self, session: Session, pid: int, error: WeightstoreError) -> None:
        """Tell the peer, and sometimes the log, why it loses its connection."""
        self._seldom("refused pid %d: %s", pid, error)
        session.send(_failure(0, error))
        session.finish()

    def _seldom(self, message: str, *facts: object) -> None:
        """Log what a client can bring about at will, but only the 1st, 10th, 100th, … time: it must not
        fill the disk."""
        self._said[message] += 1
        times = str(self._said[message])
        if times.strip("0") == "1":
            log.warning(f"{message} (number {times} of its kind)", *facts)

    def _part(self, session: Session, peer: Peer) -> None:
        """The connection has ended: so do its leases and refits."""
        self._store.drop_peer(peer)
        if peer.writer in self._catalog.holdouts():
            self._watch(peer.writer, session.take_pidfd())
        self._changes.announce()

    def _watch(self, writer: Writer, pidfd: int | None) -> None:
        """Settle what a writer that hung up may still be writing to, when its process is gone."""
        if pidfd is not None:
            self._exits.watch(writer, pidfd)
        elif writer.pid > 0:
            self._store.settle(writer)
        else:
            self._seldom(
                "a writer of another pid namespace went: its space is out of use until it says Drained"
            )

    def _on_exit(self, writer: Writer) -> None:
        self._store.settle(writer)
        self._changes.announce()

    # -- dispatch ----------------------------------------------------------------------------------

    def _handle(self, session: Session, request: wire.Request, number: int, pid: int) -> None:
        """Answer a request now, or start the task that will."""
        if isinstance(request, wire.Hello):
            self._hello(session, request, number, pid)
            return
        peer = session.peer
        if peer is None:
            raise ProtocolError("the first message on a connection must be Hello")
        answer: wire.Reply | Coroutine[Any, Any, wire.Reply]
        try:
            answer = self._requests.answer(peer, request)
        except WeightstoreError as error:
            answer = _failure(request.id, error)
        except Exception as error:
            answer = self._bug(request, error)
        if isinstance(answer, Coroutine):
            if len(session.tasks) > MAX_WAITING:
                answer.close()
                raise ProtocolError(f"more than {MAX_WAITING} requests of one connection are waiting")
            task = asyncio.create_task(self._answer_later(session, peer, request, answer))
            session.tasks.add(task)
            task.add_done_callback(session.tasks.discard)
        else:
            session.send(answer)

    async def _answer_later(
        self, session: Session, peer: Peer, request: wire.Request, waiting: Coroutine[Any, Any, wire.Reply]
    ) -> None:
        fds = []
        try:
            answer = await waiting
            if isinstance(answer, wire.RefitOpened):
                fds.append(self._writer_fd(peer, answer))
        except WeightstoreError as error:
            answer = _failure(request.id, error)
        except Exception as error:
            answer = self._bug(request, error)
        session.send(answer, fds)

    def _writer_fd(self, peer: Peer, opened: wire.RefitOpened) -> int:
        try:
            return self._store.arena.writer_fd()
        except OSError as error:
            self._store.abort_refit(opened.refit, peer, "no descriptor for its writer")
            self._changes.announce()
            raise self._no_descriptor(error) from None

    def _no_descriptor(self, error: OSError) -> ArenaUnusable:
        return ArenaUnusable(
            f"the store has no file descriptor left to hand out the arena ({error.strerror}): it serves "
            f"{len(self._sessions)} connections. Close some, or start it with a higher `ulimit -n`"
        )

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
        try:
            fd = arena.reader_fd()
        except OSError as error:
            session.send(_failure(request.id, self._no_descriptor(error)))
        else:
            session.send(welcome, [fd])

    def _react(self) -> None:
        """The catalog may have changed: make offers, sum what is new, plan the next deadline, and watch no
        process that owes nothing any more."""
        for lease, version in self._catalog.leases.make_offers():
            offer = wire.Offer(
                lease=lease.number,
                version=version.number,
                torn=bool(version.torn),
                records=wire.encode_records(None) if version.torn else version.encoded,
            )
            self._sessions[lease.peer.number].send(offer)
        self._checksummer.wake()
        self._exits.keep_only(self._catalog.holdouts)
        if self._deadline is not None:
            self._deadline.cancel()
        due = [r.deadline for r in self._catalog.open_refits() if r.declared.world_size > 1]
        if self._catalog.grace_until:
            due.append(self._catalog.grace_until)
        self._deadline = (
            self._loop.call_later(max(0.0, min(due) - self._clock()) + 0.01, self._expire) if due else None
        )

    def _foretell(self, subject: Refit | Lease) -> None:
        known = self._foretelling
        due = known.opened(subject) if isinstance(subject, Refit) else known.followed(subject)
        for lease, places in due:
            session = self._sessions.get(lease.peer.number)
            if session is not None:  # else it hung up meanwhile
                session.send(places)

    def _expire(self) -> None:
        for refit in self._store.expire(self._clock()):
            self._seldom("%s was aborted: %s", refit.describe(), refit.reason)
        self._changes.announce()

    def _bug(self, request: wire.Request, error: Exception) -> wire.Failed:
        kind = type(request).__name__
        self._said[kind] += 1
        if self._said[kind] == 1:
            log.error("a %s request failed for no fault of the client", kind, exc_info=error)
        return wire.Failed(
            id=request.id,
            error="WeightstoreError",
            message=f"the store failed on {kind} ({type(error).__name__}: {error}); this is a bug, and its "
            "log has the details",
        )


def _failure(request: int, error: WeightstoreError) -> wire.Failed:
    return wire.Failed(id=request, error=type(error).__name__, message=error.message, details=error.details)


def _report_bug(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a task of the store ended by a bug", exc_info=error)
