"""What a refit writes: from tensors given to bytes at their places.

Invariants:
- nothing is copied before every name of a call has been checked, every value that may not fit its dtype has
  been looked at, and the store has given it a place; except to places that nobody reads, where a call that
  turns out to be wrong has written nothing all the same;
- what failed to be copied does not count as written.

torch is imported when a tensor comes; who fills the arena by other means (`reserve`, `wrote`) needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import msgspec

from weightstore import wire
from weightstore.casts import Cast
from weightstore.cuda.uploads import drain_uploads
from weightstore.errors import ProtocolError, UsageError
from weightstore.ledger import Ledger, Problems
from weightstore.mapping import ArenaMapping
from weightstore.records import check_records, end_of, read_records
from weightstore.transaction import Transaction
from weightstore.types import Box, TensorRecord, TensorSpec

if TYPE_CHECKING:
    import torch

    from weightstore.lora.put import Refitting
    from weightstore.names import NameMap, Row, Stored
    from weightstore.reader import Lease
    from weightstore.sources import Call, Part, Source


Entered = list[tuple[str, "Box | None"]]
"""Names, and for parts their boxes, that a call has entered in the ledger."""

GROUP = 128
"""Tensors of a device that are looked at while those before them are being copied."""


def copied_later(tensor: Any) -> bool:
    """Whether a copy from it is under way when `copy_all` returns."""
    return bool(getattr(tensor, "is_cuda", False))


class Writing:
    """One refit's. Thread-safe; copies run in the thread that puts.

    Attributes:
        ledger: what may be written and has been.
        stored: what is written into, for those who map names to it.
    """

    def __init__(
        self,
        life: Transaction,
        declared: wire.OpenRefit,
        opened: wire.RefitOpened,
        mapping: ArenaMapping,
        names: NameMap | None,
        cast: Cast,
    ) -> None:
        self._life = life
        self._declared = declared
        self._mapping = mapping
        self._cast = cast
        base = {record.name: record for record in read_records(opened.base_records) or []}
        self._check_places(opened.targets)
        self.ledger = Ledger(
            life.what, base, bool(life.base), declared.components, declared.extend, opened.targets
        )
        self._inlet = None
        if names is not None:
            from weightstore.names.inlet import Inlet

            self._inlet = Inlet(names, self.stored, published=opened.names is not None)

    @property
    def stored(self) -> Stored:
        from weightstore.names import Stored

        declared = self._declared
        components = None if declared.components is None else frozenset(declared.components)
        closed = bool(self._life.base) and not declared.extend
        return Stored(self._life.what, self.ledger.known, components, closed, declared.partial, self._cast)

    def check_used(self) -> None:
        """Before the commit: see `Inlet.check_used`."""
        if self._inlet is not None:
            self._inlet.check_used(self._life.alone, bool(self.ledger.tensors or self.ledger.unchanged))

    # -- tensors -----------------------------------------------------------------------------------

    def put(self, tensors: Mapping[str, Any] | Iterable[tuple[str, Any]], replicated: bool) -> None:
        """See `Refit.put_many`."""
        from weightstore.sources import Writers, gather

        items = tensors.items() if isinstance(tensors, Mapping) else tensors
        routed: Iterable[tuple[str, Any, Row | None]] = (
            ((name, value, None) for name, value in items)
            if self._inlet is None
            else self._inlet.admit(items)
        )
        writers = Writers(self._declared.rank, self._declared.world_size, replicated)

        def write(some: Iterable[tuple[str, Any, Row | None]]) -> Entered:
            return self._write(gather(some, writers, self.ledger.first_name))

        if self._can_stream():
            routed = list(routed)
            if len(routed) > GROUP and copied_later(routed[0][1]):
                self._write_in_groups(routed, write)
                return
        write(routed)

    def _can_stream(self) -> bool:
        """Whether tensors may be written before all of a call have been checked: nobody reads their places,
        which they all have, and none of them depends on another."""
        declared = self._declared
        if not (self._life.base and declared.all_placed) or declared.extend or declared.in_place:
            return False
        return self._inlet is None and self.ledger.untied

    def _write_in_groups(
        self, routed: list[tuple[str, Any, Row | None]], write: Callable[[Any], Entered]
    ) -> None:
        """Look at each group of tensors while the ones before are on their way. A mistake undoes the call."""
        entered: Entered = []
        try:
            for start in range(0, len(routed), GROUP):
                entered += write(routed[start : start + GROUP])
        except BaseException as error:
            self._withdraw(entered)
            if not isinstance(error, UsageError):
                raise
            write(routed)  # raises for all there is to complain of, as if nothing had been copied

    def adapting(self, names: NameMap | None, lease: Callable[[str], Lease]) -> Refitting:
        """What putting an adapter needs. It maps names itself."""
        from weightstore.lora.put import Refitting
        from weightstore.sources import gather

        def write(items: Sequence[tuple[str, torch.Tensor]]) -> None:
            self._write(gather((name, tensor, None) for name, tensor in items))

        rank, world_size = self._declared.rank, self._declared.world_size
        return Refitting(self.stored, names, rank, world_size, self.reserve, write, lease)

    def put_part(self, name: str, tensor: Any, at: Sequence[int]) -> None:
        """See `Refit.put_part`."""
        from weightstore.sources import Call, Part
        from weightstore.tensors import as_tensor, dtype_name

        source = as_tensor(name, tensor)
        lo = tuple(int(i) for i in at)
        if len(lo) != source.dim():
            raise UsageError(f"part of {name!r} at {list(lo)}: the part has {source.dim()} dimensions")
        box = Box(lo, tuple(i + n for i, n in zip(lo, source.shape, strict=True)))
        self._write(Call([], [Part(name, dtype_name(name, source.dtype), box, source)], []))

    def _write(self, call: Call) -> Entered:
        """Write what `call` says: all is checked before a byte moves. Returns what then counts as written."""
        from weightstore.copies import copy_all
        from weightstore.sharding import slices
        from weightstore.tensors import place_of

        life, ledger, places = self._life, self.ledger, self.ledger.places
        kept = self._look_at_values(call)
        entered: Entered = []
        with ExitStack() as landing:
            with life.planning:
                parts = self._checked(call)
                sources = [source for source in call.sources if source.name not in kept]
                self._find_places(self._specs(sources, call.parts, kept))
                landing.enter_context(self._landing(entered))
                first = []
                for name in kept:
                    if ledger.keep(name):
                        entered.append((name, None))
                for source in sources:
                    if ledger.enter(source.name):
                        entered.append((source.name, None))
                        first.append(source)
                for part in parts:
                    ledger.enter_part(part.name, part.box)
                    entered.append((part.name, part.box))
                for part in call.parts:
                    ledger.add_name(part.name)
            whole = ((place_of(self._mapping, places[source.name]), source.tensor) for source in first)
            cut = ((place_of(self._mapping, places[p.name])[slices(p.box)], p.tensor) for p in parts)
            copy_all(chain(whole, cut), self._mapping)
        return entered

    def _look_at_values(self, call: Call) -> list[str]:
        """Refuse values that do not fit their stored dtype; the names whose values are the base's, if those
        are to be left out."""
        from weightstore.casts import refuse_overflow

        given_all: list[Source | Part] = [*call.sources, *call.parts]
        cast = [given for given in given_all if self._dtype(given) != given.dtype]
        compared = []
        if self._declared.skip_unchanged:
            compared = [source for source in call.sources if self.ledger.movable(source.name)]
        if not cast and not compared:
            return []
        with self._life.planning:
            self._checked(call)
        if self._cast != "any":
            refuse_overflow(((g.name, g.tensor, self._dtype(g)) for g in cast), self._life.what)
        if not compared:
            return []
        from weightstore.comparing import unchanged

        records = [self.ledger.known[source.name] for source in compared]
        same = unchanged(zip(records, (source.tensor for source in compared), strict=True), self._mapping)
        return [source.name for source, equal in zip(compared, same, strict=True) if equal]

    def _checked(self, call: Call) -> list[Part]:
        """Raise for whatever keeps `call` from being written now; the parts that have to be."""
        from weightstore.copies import parts_once, ties_that_differ

        self._life.require_open()
        parts = parts_once(call.parts, self.ledger, self._mapping, self._life.drain)
        self.ledger.check(
            ((source.name, source.dtype, source.shape) for source in call.sources),
            parts=((part.name, part.dtype, part.box, part.whole) for part in parts),
            others=call.others,
            cast=self._cast,
        )
        problems = Problems(self._life.what)
        differing = ties_that_differ(call.sources, self.ledger, self._mapping, self._life.drain)
        for name, other in differing.items():
            problems.add("mismatched", name, f"tied to {other}, whose values differ from those given")
        problems.raise_any()
        return parts

    def _dtype(self, given: Source | Part) -> str:
        """What it is stored as."""
        expected = self.ledger.expected(given.name)
        return given.dtype if expected is None else expected.dtype

    def _specs(
        self, sources: Sequence[Source], parts: Sequence[Part], kept: Sequence[str]
    ) -> list[TensorSpec]:
        """What the store has to make room for, as far as there is none yet."""
        specs = []
        for source in sources:
            if source.name not in self.ledger.places:
                spec = msgspec.structs.replace(source.spec(), dtype=self._dtype(source))
                if spec.alias_of is not None and spec.alias_of in kept:  # which has no place to be shared
                    spec = msgspec.structs.replace(spec, alias_of=None)
                specs.append(spec)
        wholes = {part.name: self.ledger.expected(part.name) or part.whole for part in parts}
        for name, whole in wholes.items():
            if whole is not None:
                alias = whole.alias_of if isinstance(whole, TensorSpec) else None
                specs.append(TensorSpec(name, whole.dtype, whole.shape, whole.stride, alias))
        return specs

    @contextmanager
    def _landing(self, entered: Entered) -> Iterator[None]:
        """Entering and copying; if anything goes wrong, nothing of `entered` counts as written."""
        with self._life.landing():
            try:
                yield
            except BaseException:
                self._withdraw(entered)
                raise

    def _withdraw(self, entered: Entered) -> None:
        try:
            # What a device was told to copy must not land over what is put under these names next.
            drain_uploads(self._mapping)
        finally:
            for name, box in entered:
                self.ledger.withdraw(name, box)

    # -- places ------------------------------------------------------------------------------------

    def view(self, name: str, spec: TensorSpec | torch.Tensor | None) -> torch.Tensor:
        """See `Refit.view`."""
        from weightstore.tensors import spec_of, tensor_of

        ledger = self.ledger
        expected = ledger.expected(name)
        if isinstance(spec, TensorSpec):
            spec = TensorSpec(name, spec.dtype, spec.shape, spec.stride)
        elif spec is not None:
            spec = spec_of(name, spec)
        elif expected is not None:
            spec = TensorSpec(name, expected.dtype, expected.shape, expected.stride)
        else:
            problems = Problems(self._life.what)
            if ledger.in_scope(name):
                problems.add("unknown", name, "give its dtype and shape, view(name, spec)")
            else:
                problems.add("undeclared", name)
            raise problems.error()
        with self._life.planning:
            self._life.require_open()
            ledger.check([(name, spec.dtype, spec.shape)], again=True)
            self._find_places([spec])
            self._life.begin_view()
            item = ledger.item(name)
            if item is not None:
                drain_uploads(self._mapping)  # nor over what the view is filled with
            if item is None or item.kept or name not in item.names:
                ledger.enter(name)
        return tensor_of(self._mapping, ledger.places[name])

    def reserve(self, specs: Iterable[TensorSpec]) -> list[TensorRecord]:
        """See `Refit.reserve`."""
        specs = list(specs)
        with self._life.planning:
            self._life.require_open()
            self._find_places(specs)
            return [self.ledger.places[spec.name] for spec in specs]

    def wrote(self, names: Iterable[str]) -> None:
        """See `Refit.wrote`."""
        names = list(names)
        places = self.ledger.places
        with self._life.planning:
            self._life.require_open()
            problems = Problems(self._life.what)
            for name in names:
                if name not in places:
                    problems.add("unknown", name, "no place was reserved for it")
            problems.raise_any()
            self.ledger.check((name, places[name].dtype, places[name].shape) for name in names)
            for name in names:
                self.ledger.enter(name)

    def _find_places(self, specs: Iterable[TensorSpec]) -> None:
        """Have the store reserve what has no place yet, in one round trip."""
        new = self.ledger.without_place(specs)
        if new:
            message = wire.Reserve(id=0, refit=self._life.number, specs=new)
            records = self._life.ask(message, wire.Reserved).records
            if [record.name for record in records] != [spec.name for spec in new]:
                raise ProtocolError(f"the store reserved {len(records)} places for {len(new)} other tensors")
            self._check_places(records)
            self.ledger.place(records)

    def _check_places(self, records: list[TensorRecord]) -> None:
        check_records(records)
        if end_of(records) > self._mapping.nbytes:
            raise ProtocolError(f"the store reserved places beyond the arena's {self._mapping.nbytes} bytes")
