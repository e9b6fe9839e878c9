"""The life of a refit on the writer's side: one state, the copies under way, and what the store is told.

    OPEN ⇄ COMMITTING ──► COMMITTED                a coverage error leads back to OPEN
     └────────┴─────────► ABORTED                  given up here, by another rank, or with the connection

Invariants:
- what `commit` reports as written has landed: it waits for all copies, and one that failed is not reported;
- `AbortRefit` and `Drained` are sent only when no copy is landing and no view is in use: they let the store
  reuse the bytes.

What is written, and where, is not known here (`writing.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Final, TypeVar

from weightstore import wire
from weightstore.connection import Connection
from weightstore.cuda.uploads import drain_uploads, uploads_under_way
from weightstore.errors import RefitAborted, RefitClosed, StoreGone, WeightstoreError
from weightstore.mapping import ArenaMapping

R = TypeVar("R", bound=wire.Reply)


class State(Enum):
    OPEN = "open"
    COMMITTING = "being committed"
    COMMITTED = "committed"
    ABORTED = "aborted"


MOVES: Final[dict[State, frozenset[State]]] = {
    State.OPEN: frozenset({State.COMMITTING, State.ABORTED}),
    State.COMMITTING: frozenset({State.OPEN, State.COMMITTED, State.ABORTED}),
    State.COMMITTED: frozenset(),
    State.ABORTED: frozenset(),
}


class Transaction:
    """One open refit as the connection knows it. Thread-safe.

    Attributes:
        what: names the refit in messages.
        base: number of the version it starts from; 0 for none.
        alone: whether this is its only writer.
        state: where it is in its life.
        viewed: whether somebody was given memory to write to, which no one here can wait for.
        planning: held by one call at a time between checking its names and entering them, also during a
            Reserve. Taken before anything else.
    """

    def __init__(
        self,
        connection: Connection,
        request: wire.OpenRefit,
        opened: wire.RefitOpened,
        mapping: ArenaMapping,
        ended: Callable[[], None],
    ) -> None:
        """`ended` is told once nothing of the refit can be landing any more."""
        on = f" on version {opened.base}" if opened.base else ""
        self.what = f"refit of {request.model!r} tag {request.tag!r}{on}"
        self.number = opened.refit
        self.base = opened.base
        self.alone = request.world_size == 1
        self.state = State.OPEN
        self.viewed = False
        self.planning = threading.Lock()
        self._model, self._tag = request.model, request.tag
        self._connection = connection
        self._mapping = mapping
        self._ended = ended
        self._reason = ""
        self._left = False
        self._copying = 0
        self._idle = threading.Condition()
        """Guards `state`, `_copying`, `viewed`; notified when the last copy has landed."""

    @property
    def lost(self) -> bool:
        """Whether the connection it was opened on has ended, and the refit with it."""
        return self._connection.lost

    def require_open(self) -> None:
        """Raises RefitClosed, or StoreGone if the connection has ended."""
        if self.state is not State.OPEN:
            raise self._closed_error()
        if self._connection.lost:
            raise self._gone("the connection to the store was lost")

    def ask(self, message: wire.Request, expect: type[R]) -> R:
        """The store's answer to a request about this refit; if that is its end, it has ended here too."""
        try:
            return self._connection.request(message, expect)
        except StoreGone as error:
            raise self._gone(error.message) from None
        except (RefitAborted, RefitClosed) as error:
            with self._idle:
                if self.state is State.OPEN:
                    self._move(State.ABORTED)
                    self._reason = error.message
            raise

    # -- copies under way --------------------------------------------------------------------------

    @contextmanager
    def landing(self) -> Iterator[None]:
        """Around entering and copying something.

        Never begun on a lost connection: whoever reconnects waits for the copies begun before, and
        then promises the store that there are none.
        """
        with self._idle:
            self.require_open()
            self._copying += 1
        try:
            yield
        finally:
            with self._idle:
                self._copying -= 1
                self._idle.notify_all()

    def begin_view(self) -> None:
        """Somebody is about to be given memory to write to."""
        with self._idle:
            self.require_open()
            self.viewed = True

    def drain(self) -> None:
        """Wait until no copy into the arena is under way. DeviceError if one from a device failed."""
        self._settle()
        drain_uploads(self._mapping)

    def _settle(self) -> None:
        """Wait until nobody copies: what remains is what devices have been told to copy."""
        with self._idle:
            self._idle.wait_for(lambda: not self._copying)

    # -- ending ------------------------------------------------------------------------------------

    def commit(self, check: Callable[[], None], writes: Callable[[], list[wire.Write]]) -> int:
        """The new version's number. `check` may still refuse; `writes` are asked for when nobody copies."""
        with self.planning, self._idle:
            self.require_open()
            check()
            self._move(State.COMMITTING)
        try:
            self._settle()
            written = writes()
            declare = self.alone and uploads_under_way(self._mapping)
            if declare:
                # What the store has to do for the version, it does while the last copies land.
                with self._asking(self._gone):
                    request = wire.DeclareWrites(id=0, refit=self.number, writes=written)
                    self._connection.request(request, wire.Done)
            drain_uploads(self._mapping)
        except BaseException:
            if self.state is State.COMMITTING:
                # Whether anything is still landing is unknown, so the store keeps the space until we hang up.
                self._end(State.ABORTED, "its copies failed")
            raise
        with self._asking(self._unknown_outcome):
            commit = wire.CommitRefit(id=0, refit=self.number, writes=None if declare else written)
            committed = self._connection.request(commit, wire.Committed)
        self._end(State.COMMITTED)
        return committed.version

    @contextmanager
    def _asking(self, gone: Callable[[str], StoreGone]) -> Iterator[None]:
        """Around a request while committing: what any answer but yes makes of the refit."""
        try:
            yield
        except (RefitAborted, RefitClosed) as error:
            self._end(State.ABORTED, error.message)
            self._leave()
            raise
        except StoreGone as error:
            self._end(State.ABORTED, "the store went away during its commit")
            raise gone(error.message) from None
        except WeightstoreError as error:
            if self.alone:
                with self._idle:
                    self._move(State.OPEN)
            else:
                self._end(State.ABORTED, error.message)
                self._leave()
            raise
        except BaseException:
            self._end(State.ABORTED, "its commit was interrupted")
            self._leave()
            raise

    def abort(self, reason: str) -> None:
        """Idempotent. Raises RefitClosed once committed."""
        with self.planning:
            with self._idle:
                if self.state is State.OPEN:
                    self._move(State.ABORTED)
                    self._reason = reason
                elif self.state is not State.ABORTED:
                    raise self._closed_error()
            self._leave(reason)

    def _move(self, state: State) -> None:
        assert state in MOVES[self.state], (self.state, state)
        self.state = state

    def _end(self, state: State, reason: str = "") -> None:
        with self._idle:
            self._move(state)
            self._reason = reason
        if state is State.COMMITTED or self._connection.lost:
            self._ended()

    def _leave(self, reason: str = "") -> None:
        """Tell the store that nothing of this aborted refit is landing any more."""
        if self._left:
            return
        self.drain()
        self._left = True
        self._ended()
        message = wire.AbortRefit(id=0, refit=self.number, reason=reason[:500])
        try:
            self._connection.request(message, wire.Done)
        except StoreGone:
            pass  # the refit ended with its connection; Drained follows on the next one
        except RefitClosed:
            pass  # the store has forgotten it already, or an interrupted commit had gone through

    # -- errors ------------------------------------------------------------------------------------

    def _closed_error(self) -> RefitClosed:
        why = f": {self._reason}" if self._reason else ""
        return RefitClosed(f"{self.what} is {self.state.value}{why}; open a new one", state=self.state.value)

    def _gone(self, why: str) -> StoreGone:
        return StoreGone(
            f"{why}. The {self.what} ended with the connection, nothing was committed; begin a new one when "
            "the store is back",
            socket=self._connection.peer,
            outcome="aborted",
        )

    def _unknown_outcome(self, why: str) -> StoreGone:
        return StoreGone(
            f"{why}. Its commit was under way, so the {self.what} may or may not have become a "
            f"version: ask store.tags({self._model!r}) when the store is back; if {self._tag!r} names a "
            f"version above {self.base}, it has (unless somebody else wrote one)",
            socket=self._connection.peer,
            outcome="unknown",
            model=self._model,
            tag=self._tag,
            base=self.base,
        )
