"""One connection to a store: requests from any thread, answered through one I/O thread.

The connection is dumb: it matches replies with requests, hands what is `Unasked` to a callback, carries file
descriptors, and ends. What a lease or a refit is, it does not know.

Invariants:
- no lock is held while blocking, and only the I/O thread reads; a thread that sends writes what the
  socket takes at once and leaves the rest to the I/O thread. So neither side can wait for the other in
  a circle, however large the frames are;
- messages are handled in the order they arrive, each completely before the next: `on_reply` and the
  callback for what is unasked see the peer's order;
- every descriptor received is either given to a caller or closed;
- when the connection ends, every waiter is released with the reason, then `on_lost` is told;
- in a forked child the connection is closed (the parent's goes on): a child that kept it open would hide
  its parent's death from the store.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from weightstore import wire
from weightstore.calls import Call, close_all
from weightstore.errors import (
    AccessDenied,
    ProtocolError,
    StoreGone,
    StoreSilent,
    UsageError,
    WeightstoreError,
    from_wire,
)
from weightstore.inbox import MAX_FDS, Inbox

R = TypeVar("R", bound=wire.Reply)

_RECEIVE_BYTES: Final = 1 << 18
_log = logging.getLogger("weightstore")


class _IOThread(threading.Thread):
    pass


def on_io_thread() -> bool:
    """Whether this is the thread of a connection, which must not wait for a store."""
    return isinstance(threading.current_thread(), _IOThread)


class Connection:
    """A connected socket and its I/O thread. Thread-safe.

    Args:
        sock: a connected stream socket; the connection owns it from here on.
        peer: how messages name the other end (the socket's path).
        on_unasked: called with each `wire.Unasked`, on the I/O thread; must not block.
        on_lost: called once with the reason when the connection ends by itself, on the I/O thread.
        cap: the largest frame accepted, in bytes.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        on_unasked: Callable[[Connection, wire.Unasked], None],
        on_lost: Callable[[Connection, WeightstoreError], None],
        cap: int = wire.MAX_REPLY,
    ) -> None:
        sock.setblocking(False)
        self.peer = peer
        self._sock = sock
        self._on_unasked = on_unasked
        self._on_lost = on_lost
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._calls: dict[int, Call] = {}
        self._last_id = 0
        self._outbox: deque[memoryview] = deque()
        self._inbox = Inbox(peer, cap)
        self._send_error: OSError | None = None
        self._error: WeightstoreError | None = None
        self._closing = False
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        _alive.add(self)
        self._thread = _IOThread(target=self._run, name="weightstore-connection", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        path: str,
        timeout: float,
        on_unasked: Callable[[Connection, wire.Unasked], None],
        on_lost: Callable[[Connection, WeightstoreError], None],
    ) -> Connection:
        """Connect to the Unix socket at `path`.

        Raises:
            StoreGone: nobody listens there, or does not accept within `timeout` seconds.
            AccessDenied: the socket's directory or file may not be used by this user.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            sock.connect(path)
        except PermissionError:
            sock.close()
            raise AccessDenied(
                f"uid {os.getuid()} may not use the store's socket {path}; run as the store's user",
                socket=path,
            ) from None
        except OSError as error:
            sock.close()
            raise StoreGone(
                f"no store answers at {path} ({error.strerror or error}); start one with "
                f"`weightstore serve --socket {path}`",
                socket=path,
            ) from None
        return cls(sock, path, on_unasked, on_lost)

    @property
    def lost(self) -> bool:
        """Whether the connection has ended, for whatever reason."""
        return self._error is not None

    def request(
        self,
        message: wire.Request,
        expect: type[R],
        *,
        timeout: float | None = None,
        on_reply: Callable[[R], None] | None = None,
        undo: Callable[[R], None] | None = None,
    ) -> R:
        """Send `message` (its id is chosen here) and wait for the reply.

        `on_reply` runs on the I/O thread before anything that the peer sent later is looked at. `undo`
        runs there instead of this call's return if the caller has stopped waiting (timeout, Ctrl-C)
        when the reply comes. Neither may block.

        Raises:
            WeightstoreError: what the store answered, as the class it raised.
            StoreGone: the connection ended before the reply; whether the request took effect is unknown.
            StoreSilent: no reply within `timeout` seconds.
            ProtocolError: a reply of another kind.
            UsageError: called on the I/O thread, or in a forked child.
        """
        reply, fds = self._ask(message, expect, timeout, on_reply, undo)
        close_all(fds)
        return reply

    def request_fd(
        self,
        message: wire.Request,
        expect: type[R],
        *,
        timeout: float | None = None,
        undo: Callable[[R], None] | None = None,
    ) -> tuple[R, int]:
        """`request` for a reply that carries one descriptor, which the caller then owns."""
        reply, fds = self._ask(message, expect, timeout, None, undo)
        if len(fds) != 1:
            close_all(fds)
            raise ProtocolError(f"{type(reply).__name__} came with {len(fds)} descriptors instead of 1")
        return reply, fds[0]

    def post(
        self,
        message: wire.Request,
        expect: type[R],
        *,
        on_failed: Callable[[WeightstoreError], None] | None = None,
    ) -> None:
        """Send `message` and return at once; allowed on the I/O thread, does nothing once lost.

        `on_failed` is called on the I/O thread if the store refuses; without it a refusal is logged.
        """
        with contextlib.suppress(StoreGone, ProtocolError):  # whatever ended the connection
            self._send(message, Call(expect, None, on_failed or _log_refusal, None, posted=True))

    def close(self) -> None:
        """End the connection and join its thread; waiters get StoreGone. Idempotent."""
        self._closing = True
        if os.getpid() != self._pid:
            return
        with self._lock:
            if not self.lost:
                self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # -- sending -----------------------------------------------------------------------------------

    def _ask(
        self,
        message: wire.Request,
        expect: type[R],
        timeout: float | None,
        on_reply: Callable[[R], None] | None,
        undo: Callable[[R], None] | None,
    ) -> tuple[R, list[int]]:
        if on_io_thread():
            raise UsageError(
                f"{type(message).__name__} would wait for itself: an offer callback must hand requests over "
                "to another thread"
            )
        call = Call(expect, on_reply, None, undo, posted=False)
        self._send(message, call)
        if not call.wait(timeout):
            raise StoreSilent(
                f"the store at {self.peer} did not answer {type(message).__name__} within {timeout:g} s; "
                "it is stopped or overloaded. Let it go on, or end it: clients do without one that is gone",
                socket=self.peer,
                timeout=timeout,
            )
        if call.error is not None:
            try:
                raise call.error
            finally:
                # Else the error, by its traceback, would keep this frame and every caller's alive, with all
                # the tensors they hold, until the garbage collector finds the cycle.
                del call
        return call.reply, call.fds

    def _send(self, message: wire.Request, call: Call) -> None:
        if os.getpid() != self._pid:
            raise UsageError(
                f"this connection to {self.peer} belongs to process {self._pid}, and this is a fork of it; "
                "call weightstore.connect() in the child"
            )
        with self._lock:
            if self._error is not None:
                raise _again(self._error)
            self._last_id += 1
            self._calls[self._last_id] = call
            frame = wire.frame(msgspec.structs.replace(message, id=self._last_id))
            self._outbox.append(memoryview(frame))
            if len(self._outbox) == 1:
                self._flush()
            if self._outbox:
                self._wake()

    def _flush(self) -> None:
        """Write what the socket takes now. The lock is held."""
        try:
            while self._outbox:
                sent = self._sock.send(self._outbox[0], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                if sent == len(self._outbox[0]):
                    self._outbox.popleft()
                else:
                    self._outbox[0] = self._outbox[0][sent:]
        except BlockingIOError:
            pass
        except OSError as error:
            # The peer's last words may still lie in the socket: the I/O thread reads them, then ends.
            self._send_error = error

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    # -- the I/O thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        reason: WeightstoreError
        try:
            self._loop()
            reason = StoreGone(
                f"the connection to the store at {self.peer} was closed here", socket=self.peer
            )
        except WeightstoreError as error:
            reason = error
        except OSError as error:
            reason = self._gone(error.strerror or str(error))
        except Exception as error:  # a bug of ours must not leave callers waiting for ever
            _log.exception("the connection to %s failed", self.peer)
            reason = ProtocolError(f"the connection to {self.peer} failed: {error!r}")
        self._end(reason)

    def _loop(self) -> None:
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        while not self._closing:
            with self._lock:
                self._flush()
                wanted = select.POLLIN | (select.POLLOUT if self._outbox and not self._send_error else 0)
            poll.register(self._sock, wanted)
            ready = dict(poll.poll(None if self._send_error is None else 0))
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
            if ready.get(self._sock.fileno(), 0) & ~select.POLLOUT:
                self._receive()
            elif self._send_error is not None:
                raise self._send_error

    def _receive(self) -> None:
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                _RECEIVE_BYTES, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        self._inbox.take_fds(ancillary, bool(flags & socket.MSG_CTRUNC))
        if not data:
            raise self._gone("it closed the connection")
        for message, fds in self._inbox.take(data):
            self._handle(message, fds)

    def _handle(self, message: wire.Reply, fds: list[int]) -> None:
        if isinstance(message, wire.Unasked):
            self._on_unasked(self, message)
            return
        with self._lock:
            call = self._calls.pop(message.id, None)
        if call is None:
            close_all(fds)
            if isinstance(message, wire.Failed):
                raise message.to_error()  # the store's reason for ending the connection
            raise ProtocolError(f"{self.peer} answered request {message.id}, which was never made")
        error: Exception | None = None
        if isinstance(message, wire.Failed):
            error = message.to_error()
        elif not isinstance(message, call.expect):
            error = ProtocolError(
                f"{self.peer} answered {type(message).__name__}, not {call.expect.__name__}"
            )
        elif call.on_reply is not None:
            try:
                call.on_reply(message)
            except Exception as failure:
                error = failure
        call.settle(message, fds, error)
        if isinstance(error, ProtocolError) and not isinstance(message, wire.Failed):
            raise _again(error)

    def _end(self, reason: WeightstoreError) -> None:
        with self._lock:
            self._error = reason
            calls = list(self._calls.values())
            self._calls.clear()
            self._outbox.clear()
            self._sock.close()
            os.close(self._wake_fd)
        _alive.discard(self)
        self._inbox.close()
        for call in calls:
            call.settle(None, [], _again(reason), lost=True)
        if not self._closing:
            self._on_lost(self, reason)

    def _gone(self, why: str) -> StoreGone:
        return StoreGone(
            f"lost the store at {self.peer}: {why}; if it does not come back by itself, start it with "
            f"`weightstore serve --socket {self.peer}`",
            socket=self.peer,
        )

    def _forget_in_child(self) -> None:
        """After fork(), in the child: give up the descriptors without a word to the peer."""
        with contextlib.suppress(OSError):
            self._sock.close()
        with contextlib.suppress(OSError):
            os.close(self._wake_fd)


_alive: weakref.WeakSet[Connection] = weakref.WeakSet()


def _forget_all_in_child() -> None:
    for connection in list(_alive):
        connection._forget_in_child()
    _alive.clear()


os.register_at_fork(after_in_child=_forget_all_in_child)


def _again(error: WeightstoreError) -> WeightstoreError:
    """A fresh instance to raise in another thread: one instance would collect every thread's traceback."""
    return from_wire(type(error).__name__, error.message, error.details)


def _log_refusal(error: WeightstoreError) -> None:
    _log.warning("the store refused a notice: %s", error)
