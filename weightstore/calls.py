"""A request under way: one thread waits for its outcome, the I/O thread brings it.

Invariants:
- an outcome comes once, and either the waiter gets it or, if it gave up before, `undo` does;
- descriptors that nobody takes are closed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, MutableSequence
from typing import Any

from weightstore import wire
from weightstore.errors import WeightstoreError


class Call:
    """What a reply should be, and whom it concerns. `posted` calls are given up from the start.

    Attributes:
        reply, fds, error: the outcome, once `wait` has returned True.
    """

    def __init__(
        self,
        expect: type[Any],
        on_reply: Callable[[Any], None] | None,
        on_failed: Callable[[WeightstoreError], None] | None,
        undo: Callable[[Any], None] | None,
        posted: bool,
    ) -> None:
        self.expect = expect
        self.on_reply = on_reply
        self._on_failed = on_failed
        self._undo = undo
        self._given_up = posted
        self._lock = threading.Lock()
        self._arrived = threading.Lock()  # held until the outcome is there; cheaper than an Event
        self._arrived.acquire()
        self._settled = False
        self.reply: Any = None
        self.fds: list[int] = []
        self.error: Exception | None = None

    def wait(self, timeout: float | None) -> bool:
        """Wait for the outcome. False after `timeout` seconds: the call is then given up."""
        try:
            arrived = self._arrived.acquire(timeout=-1 if timeout is None else max(0.0, timeout))
        except BaseException:  # Ctrl-C: nobody will look at the outcome
            if not self._give_up() and self.error is None:
                self._drop()
            raise
        return arrived or not self._give_up()

    def settle(
        self, reply: wire.Reply | None, fds: list[int], error: Exception | None, lost: bool = False
    ) -> None:
        """The outcome, on the I/O thread. `lost`: the connection ended, which no `on_failed` is told."""
        with self._lock:
            self._settled = True
            self.reply, self.fds, self.error = reply, fds, error
            given_up = self._given_up
        if error is not None:
            close_all(self.fds)
        if not given_up:
            self._arrived.release()
        elif error is None:
            self._drop()
        elif isinstance(error, WeightstoreError) and self._on_failed is not None and not lost:
            self._on_failed(error)

    def _give_up(self) -> bool:
        """Stop waiting. False if the outcome is there already."""
        with self._lock:
            self._given_up = not self._settled
            return self._given_up

    def _drop(self) -> None:
        close_all(self.fds)
        if self._undo is not None:
            self._undo(self.reply)


def close_all(fds: MutableSequence[int]) -> None:
    while fds:
        os.close(fds.pop())
