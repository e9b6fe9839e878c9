"""Refits: write transactions shared by one or more writers.

    OPEN ── every writer committed, coverage exact ──► COMMITTED   a new version
      └──── a writer aborts, dies or never comes ────► ABORTED     nothing

A refit owns the extents it reserved (`owned`) until it ends: on commit they become the version's,
on abort they go back, or into quarantine while one of its writers may still be writing. An
in-place refit owns none; its targets are the base version's own extents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from weightstore.catalog.coverage import describe_problems
from weightstore.catalog.versions import Model, Version
from weightstore.catalog.writers import Peer, Writer
from weightstore.errors import CoverageError, RefitClosed, UsageError
from weightstore.types import MAX_NAME, Extent, TensorRecord, TensorSpec, check_name, component_of
from weightstore.wire import OpenRefit, Write

MAX_COMPONENTS: Final = 1000
MAX_RANKS: Final = 1 << 16
MAX_TENSORS: Final = 200_000
"""Of one refit; placing so many takes the store a few seconds in which it answers nobody else."""


class RefitState(Enum):
    OPEN = "open"
    COMMITTED = "committed"
    ABORTED = "aborted"


REFIT_MOVES: Final[dict[RefitState, frozenset[RefitState]]] = {
    RefitState.OPEN: frozenset({RefitState.COMMITTED, RefitState.ABORTED}),
    RefitState.COMMITTED: frozenset(),
    RefitState.ABORTED: frozenset(),
}


@dataclass(eq=False)
class Refit:
    """One write transaction.

    Attributes:
        targets: the tensors that have a place to be written to.
        owned: extents reserved for it, distinct and non-empty.
        joined: the peer of each rank that has come; `votes` what each committed rank wrote.
        torn_before: what was torn in the base when an in-place refit opened.
        draft: the version it would become, if a lone writer has declared what it will have written.
        written: whether a writer has been told its places, so that bytes there may have changed.
        names: the model's name map when it was opened: all ranks must go by the same.
    """

    number: int
    model: str
    tag: str
    base: Version | None
    declared: OpenRefit
    opened: float
    targets: dict[str, TensorRecord] = field(default_factory=dict)
    owned: list[Extent] = field(default_factory=list)
    joined: dict[int, Peer] = field(default_factory=dict)
    votes: dict[int, list[Write]] = field(default_factory=dict)
    torn_before: frozenset[str] = frozenset()
    draft: Version | None = None
    written: bool = False
    names: str | None = None
    state: RefitState = RefitState.OPEN
    version: int = 0
    reason: str = ""

    @property
    def deadline(self) -> float:
        """When it is aborted if ranks are still missing, or some have committed and others not."""
        return self.opened + self.declared.timeout

    def move(self, state: RefitState, reason: str = "") -> None:
        self.require_open()
        if state not in REFIT_MOVES[self.state]:
            raise ValueError(f"refit {self.number} cannot go from {self.state.value} to {state.value}")
        self.state = state
        self.reason = reason

    def require_open(self) -> None:
        if self.state is not RefitState.OPEN:
            why = f": {self.reason}" if self.reason else ""
            raise RefitClosed(
                f"refit {self.number} of {self.model!r} was already {self.state.value}{why}; open a new one",
                refit=self.number,
                state=self.state.value,
            )

    def rank_of(self, peer: Peer) -> int | None:
        return next((rank for rank, joined in self.joined.items() if joined == peer), None)

    def writing(self) -> set[Writer]:
        """Writers that may have copies in flight: those who joined and have not committed yet."""
        return {peer.writer for rank, peer in self.joined.items() if rank not in self.votes}

    def complete(self) -> bool:
        return len(self.votes) == self.declared.world_size

    def all_writes(self) -> list[Write]:
        return [write for rank in sorted(self.votes) for write in self.votes[rank]]

    # -- what it may write -------------------------------------------------------------------------

    def in_scope(self, name: str) -> bool:
        components = self.declared.components
        return components is None or component_of(name) in components

    def declared_names(self) -> list[str]:
        """The base's tensors that get a place at once: all in scope, unless some may stay where they are."""
        if self.base is None or not self.declared.whole:
            return []
        components = self.declared.components
        if components is None:
            return list(self.base.records)
        wanted = frozenset(components)
        return [name for name in self.base.records if component_of(name) in wanted]

    def staying(self, writes: Iterable[Write]) -> dict[str, TensorRecord]:
        """The base's tensors without a place of which a writer has to say that they are unchanged: all in
        scope; in a partial refit those of which one did."""
        if self.base is None or not self.declared.skip_unchanged:
            return {}
        names: Iterable[str] = self.base.records
        if self.declared.partial:
            names = {write.name for write in writes if write.kept} & self.base.records.keys()
        return {n: self.base.records[n] for n in names if n not in self.targets and self.in_scope(n)}

    def with_ties(self, names: Iterable[str]) -> list[str]:
        """`names` and every base tensor tied to one of them, in the base's order: a tie moves whole."""
        if self.base is None:
            return list(names)
        wanted = set(names)
        extents = {
            self.base.records[n].extent
            for n in wanted
            if n in self.base.records and self.base.records[n].nbytes
        }
        return [n for n, r in self.base.records.items() if n in wanted or r.extent in extents]

    def check_specs(self, specs: Sequence[TensorSpec]) -> None:
        """Raise CoverageError with every name of `specs` that the refit may not write as given, or UsageError
        if they are too many."""
        tensors = len(self.targets) + sum(spec.name not in self.targets for spec in specs)
        if tensors > MAX_TENSORS:
            raise UsageError(f"{self.describe()} would write {tensors} tensors; {MAX_TENSORS} are allowed")
        problems: dict[str, list[str]] = {}
        known = self.base.records if self.base is not None else {}
        for spec in specs:
            here = self.targets.get(spec.name) or known.get(spec.name)
            if not self.in_scope(spec.name):
                problems.setdefault("undeclared", []).append(spec.name)
            elif here is None:
                if self.base is not None and not self.declared.extend:
                    problems.setdefault("unknown", []).append(spec.name)
            elif (here.dtype, here.shape) != (spec.dtype, spec.shape):
                problems.setdefault("mismatched", []).append(spec.name)
        counts = Counter(spec.name for spec in specs)
        repeated = [name for name, count in counts.items() if count > 1]
        if repeated:
            problems["duplicate"] = repeated
        if problems:
            raise CoverageError(describe_problems(self.describe(), problems), **problems)

    def describe(self) -> str:
        base = f" on version {self.base.number}" if self.base is not None else ""
        return f"refit of {self.model!r} tag {self.tag!r}{base}"


def check_request(request: OpenRefit) -> None:
    """Raise InvalidName or UsageError for an opening that nothing could make right."""
    check_name("model", request.model)
    check_name("tag", request.tag)
    components = request.components or []
    if len(components) > MAX_COMPONENTS:
        raise UsageError(
            f"{len(components)} components are more than the {MAX_COMPONENTS} a refit can declare"
        )
    for component in components:
        check_name("component", component)
    if request.key is not None and len(request.key) > MAX_NAME:
        raise UsageError(f"a refit's key of {len(request.key)} characters: {MAX_NAME} are allowed")
    if not 0 < request.world_size <= MAX_RANKS:
        raise UsageError(f"world_size is {request.world_size}; 1 to {MAX_RANKS} writers can share a refit")
    if not 0 <= request.rank < request.world_size:
        raise UsageError(f"rank {request.rank} is not in 0 to {request.world_size - 1} (world_size - 1)")
    if request.world_size > 1 and request.key is None:
        raise UsageError(f"{request.world_size} writers share this refit: give all of them the same key=")
    if not request.timeout > 0:
        raise UsageError(f"timeout must be positive, not {request.timeout}")
    if request.in_place and (request.fresh or request.extend):
        raise UsageError("an in-place refit writes over its base, so it can be neither fresh nor extend it")
    if request.skip_unchanged and (request.in_place or request.fresh):
        raise UsageError(
            "skip_unchanged leaves tensors where the base has them; an in-place refit has no other place for "
            "them, and a fresh one no base"
        )


def check_declaration(request: OpenRefit, model: Model | None, base: Version | None) -> None:
    """Raise UsageError or CoverageError for a refit that contradicts its base."""
    if base is not None:
        if not request.components or request.extend:
            return
        present = {component_of(name) for name in base.records}
        unknown = [c for c in request.components if c not in present]
        if unknown:
            raise CoverageError(
                f"model {request.model!r} version {base.number} has no component {', '.join(unknown)}; it "
                f"has {', '.join(sorted(present))} (extend=True adds new ones)",
                unknown=unknown,
            )
        return
    if request.in_place or request.partial:
        what = "an in-place" if request.in_place else "a partial"
        why = "fresh" if request.fresh and model is not None else "the model's first"
        raise UsageError(
            f"{what} refit of {request.model!r} needs a base version, and this one is {why}; write the whole "
            "model first"
        )


def same_transaction(first: OpenRefit, other: OpenRefit) -> bool:
    """Whether a rank that joins declares what the first one declared."""

    def shape(r: OpenRefit) -> tuple[object, ...]:
        scope = None if r.components is None else tuple(sorted(r.components))
        modes = (r.partial, r.extend, r.fresh, r.in_place, r.skip_unchanged)
        return (r.base, scope, modes, r.world_size)

    return shape(first) == shape(other)
