"""Writing: a refit is a transaction that ends in a new version, or in nothing.

    OPEN ⇄ COMMITTING ──► COMMITTED                a coverage error leads back to OPEN
     └────────┴─────────► ABORTED                  given up here, by another rank, or with the connection

Invariants:
- nothing is copied before every name of a call has been checked and the store has given it a place;
- what `commit` reports as written has landed: it waits for all copies, and one that failed is not reported;
- `AbortRefit` and `Drained` are sent only when no copy is landing and no view is in use: they let the store
  reuse the bytes.

torch is imported when a tensor comes; who fills the arena by other means (`mapping`, `wrote`) needs none.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from weightstore import wire
from weightstore.connection import Connection
from weightstore.cuda.uploads import drain_uploads
from weightstore.errors import (
    ProtocolError,
    RefitAborted,
    RefitClosed,
    StoreGone,
    UsageError,
    WeightstoreError,
)
from weightstore.ledger import Ledger, Problems
from weightstore.mapping import ArenaMapping
from weightstore.records import check_records, end_of, read_records
from weightstore.report import RefitReport
from weightstore.types import Box, TensorRecord, TensorSpec

if TYPE_CHECKING:
    import torch

    from weightstore.copies import Part, Source
    from weightstore.names import NameMap, Plan, Stored

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


class Refit:
    """A write transaction; made by `Store.refit`. Commits at the end of its `with` block, or aborts if the
    block raises. Thread-safe; copies run in the thread that puts.

    Every method that writes raises, changing nothing:
        CoverageError: names that are unknown, undeclared, given twice, or of another shape or dtype
            than stored; all of them, before a byte moves.
        InvalidTensor: a value the store cannot hold.
        ArenaFull: no place for it.
        RefitClosed: committed or aborted already.
        RefitAborted: another rank ended it.
        StoreGone: the connection ended, and the refit with it.

    Attributes:
        model, tag: what is written.
        base: number of the version it starts from; 0 for none.
    """

    def __init__(
        self,
        connection: Connection,
        request: wire.OpenRefit,
        opened: wire.RefitOpened,
        mapping: ArenaMapping,
        started: float,
        ended: Callable[[Refit], None],
        names: NameMap | None = None,
    ) -> None:
        """`ended` is told once nothing of the refit can be landing any more."""
        self.model = request.model
        self.tag = request.tag
        self.base = opened.base
        self._connection = connection
        self._number = opened.refit
        self._alone = request.world_size == 1
        self._mapping = mapping
        self._started = started
        self._ended = ended
        on = f" on version {opened.base}" if opened.base else ""
        self._what = f"refit of {self.model!r} tag {self.tag!r}{on}"
        base = {record.name: record for record in read_records(opened.base_records) or []}
        self._ledger = Ledger(self._what, base, bool(opened.base), request.components, request.extend)
        self._add_places(opened.targets)
        self._declared = request
        self._inlet = None
        if names is not None:
            from weightstore.names.inlet import Inlet

            self._inlet = Inlet(names, self._stored())
        self._names = names
        self._state = State.OPEN
        self._reason = ""
        self._report: RefitReport | None = None
        self._viewed = False
        self._left = False
        self._copying = 0
        self._idle = threading.Condition()
        """Guards `_state`, `_copying`, `_viewed`; notified when the last copy has landed."""
        self._planning = threading.Lock()
        """One call at a time between checking its names and entering them; held during a Reserve."""

    # -- writing -----------------------------------------------------------------------------------

    def put(self, name: str, tensor: Any) -> None:
        """Write one tensor: torch (CPU or CUDA, any stride), numpy, or anything with DLPack."""
        self.put_many(((name, tensor),))

    def put_many(self, tensors: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> None:
        """Write many tensors with one round trip at most. Values over the same memory are stored once."""
        from weightstore.copies import sources_of

        items = tensors.items() if isinstance(tensors, Mapping) else tensors
        parts: Sequence[Part] = ()
        if self._inlet is not None:
            items, parts = self._inlet.admit(items)
        self._write(sources_of(items), parts)

    def put_module(self, module: torch.nn.Module, prefix: str = "") -> None:
        """Write all parameters and persistent buffers of `module` under their state_dict names."""
        from weightstore.copies import module_tensors

        self.put_many(module_tensors(module, prefix))

    def put_part(self, name: str, tensor: Any, at: Sequence[int]) -> None:
        """Write a part of a tensor: `tensor`'s elements from index `at` on, as the ranks of a sharded
        trainer do. All parts, of all ranks, must make up the tensor exactly once.

        `name` and `at` are the stored tensor's: as `view`, `reserve` and `wrote` this goes past the name map.
        A tensor that the base version lacks must have been given its full shape with `reserve`.
        """
        from weightstore.copies import Part
        from weightstore.tensors import as_tensor, dtype_name

        source = as_tensor(name, tensor)
        lo = tuple(int(i) for i in at)
        if len(lo) != source.dim():
            raise UsageError(f"part of {name!r} at {list(lo)}: the part has {source.dim()} dimensions")
        box = Box(lo, tuple(i + n for i, n in zip(lo, source.shape, strict=True)))
        self._write((), (Part(name, dtype_name(name, source.dtype), box, source),))

    def view(self, name: str, spec: TensorSpec | torch.Tensor | None = None) -> torch.Tensor:
        """A writable tensor on the arena itself, to be filled before `commit` and not touched after it.

        It counts as written. Its content is undefined, except in an in-place refit. `spec`, needed for
        a tensor the base lacks, is a TensorSpec or any tensor (also on meta) of that dtype and shape.
        """
        from weightstore.tensors import spec_of, tensor_of

        expected = self._ledger.expected(name)
        if isinstance(spec, TensorSpec):
            spec = TensorSpec(name, spec.dtype, spec.shape, spec.stride)
        elif spec is not None:
            spec = spec_of(name, spec)
        elif expected is not None:
            spec = TensorSpec(name, expected.dtype, expected.shape, expected.stride)
        else:
            problems = Problems(self._what)
            problems.add("unknown", name, "give its dtype and shape, view(name, spec)")
            raise problems.error()
        with self._planning:
            self._require_open()
            self._ledger.check([(name, spec.dtype, spec.shape)], again=True)
            self._find_places([spec])
            self._begin_view()
            item = self._ledger.item(name)
            if item is None or name not in item.names:
                self._ledger.enter(name)
        return tensor_of(self._mapping, self._ledger.places[name])

    def reserve(self, specs: Iterable[TensorSpec]) -> list[TensorRecord]:
        """Places for tensors to come, in one round trip; each must be written before the commit. Strides of
        tensors that the base has are the base's."""
        specs = list(specs)
        with self._planning:
            self._require_open()
            self._find_places(specs)
            return [self._ledger.places[spec.name] for spec in specs]

    def plan(self, tensors: Any, prefix: str = "") -> Plan:
        """What would become of `tensors` if exactly they were put: a dry run, for which nothing is copied.

        Args:
            tensors: a state dict, pairs of name and tensor, an `nn.Module` or TensorSpecs; they may be on
                meta, or sharded.
            prefix: put before their names, as `put_module` does.

        Raises:
            InvalidTensor: something the store cannot hold.
        """
        from weightstore.names import NameMap, plan
        from weightstore.names.given import given_of

        return plan(self._names or NameMap(strip=False), given_of(tensors, prefix), self._stored())

    @property
    def mapping(self) -> ArenaMapping:
        """The arena, writable, for writers that do without tensors: fill `reserve`d places, then say so
        with `wrote`."""
        self._begin_view()
        return self._mapping

    def wrote(self, names: Iterable[str]) -> None:
        """These tensors' places have been filled through `mapping`. Names tied to them need not be named."""
        names = list(names)
        with self._planning:
            self._require_open()
            problems = Problems(self._what)
            for name in names:
                if name not in self._ledger.places:
                    problems.add("unknown", name, "no place was reserved for it")
            problems.raise_any()
            places = self._ledger.places
            self._ledger.check((name, places[name].dtype, places[name].shape) for name in names)
            for name in names:
                self._ledger.enter(name)

    # -- ending ------------------------------------------------------------------------------------

    def commit(self) -> int:
        """Make the new version and move the tag; its number. Shared refits wait here for all ranks.

        Raises:
            CoverageError: tensors are missing, or a name rule matched nothing; the refit of a lone writer is
                still open.
            RefitAborted, RefitClosed: it ended without a version.
            StoreGone: the store went away; ``details["outcome"]`` is "unknown" if the commit was on its way.
        """
        with self._planning, self._idle:
            self._require_open()
            if self._inlet is not None:
                self._inlet.check_used(self._alone, self._ledger.tensors > 0)
            self._move(State.COMMITTING)
        try:
            self.drain()
        except BaseException:
            # Whether anything is still landing is unknown, so the store keeps the space until we hang up.
            self._end(State.ABORTED, "its copies failed")
            raise
        request = wire.CommitRefit(id=0, refit=self._number, writes=self._ledger.writes())
        try:
            committed = self._connection.request(request, wire.Committed)
        except (RefitAborted, RefitClosed) as error:
            self._end(State.ABORTED, error.message)
            self._leave()
            raise
        except StoreGone as error:
            self._end(State.ABORTED, "the store went away during its commit")
            raise self._unknown_outcome(error) from None
        except WeightstoreError as error:
            if self._alone:
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
        self._end(State.COMMITTED)
        self._report = RefitReport(
            self.model,
            self.tag,
            committed.version,
            self.base,
            self._ledger.tensors,
            self._ledger.nbytes,
            time.perf_counter() - self._started,
        )
        return committed.version

    def abort(self, reason: str = "") -> None:
        """End without a version; every rank's refit ends. Views must not be in use any more. Idempotent.

        Raises:
            RefitClosed: it was committed.
        """
        with self._planning:
            with self._idle:
                if self._state is State.OPEN:
                    self._move(State.ABORTED)
                    self._reason = reason
                elif self._state is not State.ABORTED:
                    raise self._closed_error()
            self._leave(reason)

    @property
    def report(self) -> RefitReport:
        """What was written. Raises UsageError before the commit."""
        if self._report is None:
            raise UsageError(f"{self._what} is {self._state.value}; there is a report once it is committed")
        return self._report

    @property
    def state(self) -> State:
        return self._state

    @property
    def lost(self) -> bool:
        """Whether the connection it was opened on has ended, and the refit with it."""
        return self._connection.lost

    @property
    def viewed(self) -> bool:
        """Whether somebody was given memory to write to, which no one here can wait for."""
        return self._viewed

    def __enter__(self) -> Refit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            if self._state is State.OPEN:
                try:
                    self.commit()
                except BaseException as failure:
                    if self._state is State.OPEN:
                        self.abort(str(failure))
                    raise
        elif self._state is not State.COMMITTED:
            self.abort(f"{type(error).__name__}: {error}")

    def __repr__(self) -> str:
        return f"<{self._what}: {self._state.value}>"

    # -- places ------------------------------------------------------------------------------------

    def _write(self, sources: Sequence[Source], parts: Sequence[Part] = ()) -> None:
        """Write whole tensors and parts of others in one call: all are checked before a byte moves."""
        from weightstore.copies import copy_all, parts_once, ties_that_differ
        from weightstore.tensors import place_of

        ledger, places = self._ledger, self._ledger.places
        parts = parts_once(parts, ledger)
        with ExitStack() as landing:
            with self._planning:
                self._require_open()
                ledger.check(
                    ((source.name, source.dtype, source.shape) for source in sources),
                    parts=((part.name, part.dtype, part.box, part.whole) for part in parts),
                )
                problems = Problems(self._what)
                for name, other in ties_that_differ(sources, ledger, self._mapping, self.drain).items():
                    problems.add("mismatched", name, f"tied to {other}, whose values differ from those given")
                problems.raise_any()
                specs = [source.spec() for source in sources if source.name not in places]
                wholes = {part.name: ledger.expected(part.name) or part.whole for part in parts}
                specs += [
                    TensorSpec(n, w.dtype, w.shape, w.stride) for n, w in wholes.items() if w is not None
                ]
                self._find_places(specs)
                entered: list[tuple[str, Box | None]] = [(source.name, None) for source in sources]
                entered += [(part.name, part.box) for part in parts]
                landing.enter_context(self._landing(entered))
                first = [source for source in sources if ledger.enter(source.name)]
                for part in parts:
                    ledger.enter_part(part.name, part.box)
            pairs = [(place_of(self._mapping, places[source.name]), source.tensor) for source in first]
            for part in parts:
                pairs.append((place_of(self._mapping, places[part.name])[part.slices()], part.tensor))
            copy_all(pairs, self._mapping)

    def _stored(self) -> Stored:
        """What is written into, for those who map names to it."""
        from weightstore.names import Stored

        declared = self._declared
        components = None if declared.components is None else frozenset(declared.components)
        closed = bool(self.base) and not declared.extend
        return Stored(self._what, self._ledger.known, components, closed, declared.partial)

    def _find_places(self, specs: Iterable[TensorSpec]) -> None:
        """Have the store reserve what has no place yet, in one round trip."""
        new = self._ledger.without_place(specs)
        if new:
            message = wire.Reserve(id=0, refit=self._number, specs=new)
            records = self._ask(message, wire.Reserved).records
            if [record.name for record in records] != [spec.name for spec in new]:
                raise ProtocolError(f"the store reserved {len(records)} places for {len(new)} other tensors")
            self._add_places(records)

    def _add_places(self, records: list[TensorRecord]) -> None:
        check_records(records)
        if end_of(records) > self._mapping.nbytes:
            raise ProtocolError(f"the store reserved places beyond the arena's {self._mapping.nbytes} bytes")
        self._ledger.places.update((record.name, record) for record in records)

    def _ask(self, message: wire.Request, expect: type[R]) -> R:
        try:
            return self._connection.request(message, expect)
        except StoreGone as error:
            raise self._gone(error.message) from None
        except (RefitAborted, RefitClosed) as error:
            with self._idle:
                if self._state is State.OPEN:
                    self._move(State.ABORTED)
                    self._reason = error.message
            raise

    # -- copies under way --------------------------------------------------------------------------

    @contextmanager
    def _landing(self, entered: list[tuple[str, Box | None]]) -> Iterator[None]:
        """Entering and copying `entered`; if anything goes wrong, none of it counts as written.

        Never begun on a lost connection: whoever reconnects waits for the copies begun before, and
        then promises the store that there are none.
        """
        with self._idle:
            self._require_open()
            self._copying += 1
        try:
            yield
        except BaseException:
            for name, box in entered:
                self._ledger.withdraw(name, box)
            raise
        finally:
            with self._idle:
                self._copying -= 1
                self._idle.notify_all()

    def _begin_view(self) -> None:
        with self._idle:
            self._require_open()
            self._viewed = True

    def drain(self) -> None:
        """Wait until no copy into the arena is under way. DeviceError if one from a device failed."""
        with self._idle:
            self._idle.wait_for(lambda: not self._copying)
        drain_uploads(self._mapping)

    # -- states ------------------------------------------------------------------------------------

    def _move(self, state: State) -> None:
        assert state in MOVES[self._state], (self._state, state)
        self._state = state

    def _end(self, state: State, reason: str = "") -> None:
        with self._idle:
            self._move(state)
            self._reason = reason
        if state is State.COMMITTED or self._connection.lost:
            self._ended(self)

    def _leave(self, reason: str = "") -> None:
        """Tell the store that nothing of this aborted refit is landing any more."""
        if self._left:
            return
        self.drain()
        self._left = True
        self._ended(self)
        message = wire.AbortRefit(id=0, refit=self._number, reason=reason[:500])
        try:
            self._connection.request(message, wire.Done)
        except StoreGone:
            pass  # the refit ended with its connection; Drained follows on the next one
        except RefitClosed:
            pass  # the store has forgotten it already, or an interrupted commit had gone through

    def _require_open(self) -> None:
        if self._state is not State.OPEN:
            raise self._closed_error()
        if self._connection.lost:
            raise self._gone("the connection to the store was lost")

    def _closed_error(self) -> RefitClosed:
        why = f": {self._reason}" if self._reason else ""
        return RefitClosed(
            f"{self._what} is {self._state.value}{why}; open a new one", state=self._state.value
        )

    def _gone(self, why: str) -> StoreGone:
        return StoreGone(
            f"{why}. The {self._what} ended with the connection, nothing was committed; begin a new one when "
            "the store is back",
            socket=self._connection.peer,
            outcome="aborted",
        )

    def _unknown_outcome(self, error: StoreGone) -> StoreGone:
        return StoreGone(
            f"{error.message}. Its commit was under way, so the {self._what} may or may not have become a "
            f"version: ask store.tags({self.model!r}) when the store is back; if {self.tag!r} names a "
            f"version above {self.base}, it has (unless somebody else wrote one)",
            socket=self._connection.peer,
            outcome="unknown",
            model=self.model,
            tag=self.tag,
            base=self.base,
        )
