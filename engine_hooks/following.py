"""Which version an engine's images hold, and how its lease gets them to the next.

Invariants:
- `held` is what the images that are on the device hold, all of them the same;
- "the same place in the arena means the same bytes" is believed only of two versions that were alive at
  one moment: `held` while the lease was on it, and what was offered then. A parked lease moves by
  itself, and so does one whose tag is refitted in place; then places may have been freed and given to
  other bytes in between. `advance` says which it was;
- a version that the images' layouts cannot hold is refused as a whole, before a byte is copied.

What a version means for this engine is worked out when it is offered, on the connection's thread; who then
refits or wakes finds it done.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from engine_hooks.adapters import Adapters, readapted_slots
from engine_hooks.plan import Layout, Records, Slot, by_component, changed_slots, misfits
from weightstore.errors import AttachError, LeaseLost, StoreGone, StoreSilent, StoreTimeout, WeightstoreError
from weightstore.lora.stored import adapters_in
from weightstore.mapping import ArenaMapping
from weightstore.records import end_of

if TYPE_CHECKING:
    from weightstore.client import Store
    from weightstore.reader import Lease

_log = logging.getLogger("engine_hooks")


@dataclass(frozen=True)
class Held:
    """A version: its number, each component's records (ignored names left out), and its adapters."""

    version: int
    records: Mapping[str, Records]
    adapters: Adapters


Changes = Mapping[str, Sequence[Slot]]
"""For each component the slots whose bytes are others in a newer version."""


class Step(NamedTuple):
    """Where the images go next: a version, and what it changes (None: it may be anything). `ahead`: the lease
    still stands on the version before, and `Following.take` has to follow."""

    held: Held
    changes: Changes | None
    ahead: bool


class _Prepared(NamedTuple):
    """A step that was worked out when it was offered: what it starts from, and where its bytes end."""

    start: Held
    held: Held
    changes: Changes
    end: int


class Following:
    """The lease of one engine. It owns the lease; used under the hook's lock."""

    def __init__(
        self,
        store: Store,
        lease: Lease,
        layouts: Mapping[str, Layout],
        ignored: Callable[[str], bool],
    ) -> None:
        """Raises AttachError if the version that the lease holds has adapters that fit nothing in it."""
        self._store = store
        self._lease = lease
        self._layouts = layouts
        self._ignored = ignored
        adapters, reasons = adapters_in(lease.records)
        if reasons:
            raise self._unfit(lease.version, reasons)
        self.held = Held(lease.version, {name: layout.records for name, layout in layouts.items()}, adapters)
        self._prepared: _Prepared | None = None
        lease.on_records = self._offered

    @property
    def store(self) -> Store:
        return self._store

    @property
    def model(self) -> str:
        return self._lease.model

    @property
    def tag(self) -> str:
        return self._lease.tag

    @property
    def newest(self) -> int:
        """The version that the lease stands on; while parked the newest that the store told of."""
        return self._lease.version

    @property
    def mapping(self) -> ArenaMapping:
        return self._lease.mapping

    @property
    def parked(self) -> bool:
        return self._lease.parked

    def behind(self) -> bool:
        """Whether there is another version to take than the images hold."""
        return self._lease.pending is not None or self._lease.version != self.held.version

    def hear(self) -> None:
        """One round trip, so that an offer which the store has already made is known here."""
        try:
            self._store.wait_for(self.model, self.tag, after=self._lease.version, timeout=0)
        except (StoreGone, StoreSilent) as error:
            _log.warning(
                "staying on version %d, since nobody can say whether there is another: %s",
                self.held.version,
                error,
            )
        except StoreTimeout:
            pass  # there is none

    def require_usable(self) -> None:
        """Raise TagTorn or LeaseLost if there is nothing to read, now or after a wake."""
        self._lease.require_whole()

    def park(self) -> None:
        """Let the lease move by itself from now on."""
        try:
            self._lease.park()
        except WeightstoreError as error:
            # The memory is given back, which is what was asked; the wake will meet the same error.
            _log.warning("asleep, but the lease could not be parked: %s", error)

    def unpark(self) -> Held:
        """The newest version, held from now on. Raises TagTorn (still parked), LeaseLost, AttachError."""
        self._lease.unpark()
        try:
            return self._fitting()
        except BaseException:
            self.park()
            raise

    def current(self) -> Held:
        """The version in the images, with its bytes still in the arena.

        Raises LeaseLost, TagTorn; AttachError if a refit let go of it for one that does not fit.
        """
        lease = self._lease
        lease.require_readable(lease.version)
        if self._fitting() is not self.held:
            raise LeaseLost(
                f"version {self.held.version}, which the components on the device hold, was let go for "
                f"version {lease.version}; call refit() first, or sleep() if a component is broken",
                held=self.held.version,
                version=lease.version,
            )
        return self.held

    def step(self) -> Step:
        """The next version to bring the images to, if they are `behind`.

        Raises TagTorn, LeaseLost, AttachError; the images are then behind until a `step` succeeds.
        """
        lease = self._lease
        offer = lease.offer
        on_held = lease.version == self.held.version and not lease.torn
        if on_held and offer is not None and offer.records is not None:
            with suppress(AttachError):  # taken all the same: the store offers no other before that
                prepared = self._prepare(offer.version, offer.records)
                if prepared.end <= lease.mapping.nbytes:
                    return Step(prepared.held, prepared.changes, ahead=True)
        lease.advance()
        lease.require_readable(lease.version)
        held = self._fitting()
        # The lease was on `held` when it had that offer, so both versions were alive then.
        comparable = on_held and offer is not None and held.version == offer.version
        return Step(held, self._changes(held) if comparable else None, ahead=False)

    def take(self, held: Held) -> None:
        """Move the lease to what `step` said, while its bytes are being copied or once they have been.

        Raises LeaseLost; what the images hold is then not certain. The lease has not moved to any other
        version, so who fills them anew finds it where it was, or lost.
        """
        if not self._lease.advance(held.version):
            raise LeaseLost(
                f"the store was away while version {held.version} was being copied, and may have freed it "
                "since; call wake() to fill the weights anew",
                version=held.version,
            )
        self._lease.require_readable(held.version)
        self.settle(held)

    def settle(self, held: Held) -> None:
        """The images follow `held` from now on."""
        self.held = held

    def release(self) -> None:
        # It refers to what refers to it: all of that would wait for the garbage collector.
        self._lease.on_records = self._lease.on_places = None
        self._lease.release()

    def _fitting(self) -> Held:
        return self._fit(self._lease.version, self._lease.records)

    def _fit(self, version: int, records: Records) -> Held:
        """A version as this engine sees it. Raises AttachError."""
        prepared = self._prepared
        for known in (self.held, None if prepared is None else prepared.held):
            if known is not None and known.version == version:
                return known
        grouped = by_component(records, self._layouts, self._ignored)
        reasons = [line for name, layout in self._layouts.items() for line in misfits(layout, grouped[name])]
        adapters, misfit = adapters_in(records)
        if reasons or misfit:
            raise self._unfit(version, reasons + misfit)
        return Held(version, grouped, adapters)

    def _changes(self, new: Held) -> Changes:
        old = self.held
        return {
            name: changed_slots(layout, old.records[name], new.records[name])
            + readapted_slots(layout, old.adapters, new.adapters)
            for name, layout in self._layouts.items()
        }

    def _prepare(self, version: int, records: Records) -> _Prepared:
        """The step from `held` to a version that was offered. Raises AttachError."""
        prepared, start = self._prepared, self.held
        if prepared is None or prepared.start is not start or prepared.held.version != version:
            held = self._fit(version, records)
            prepared = _Prepared(start, held, self._changes(held), end_of(records.values()))
            self._prepared = prepared
        return prepared

    def _offered(self, version: int, records: Records) -> None:
        """On the connection's thread: have ready what will be asked for. A version that does not fit is
        somebody else's to report, once he meets it."""
        with suppress(AttachError):
            self._prepare(version, records)

    def _unfit(self, version: int, reasons: list[str]) -> AttachError:
        return AttachError(
            f"version {version} of {self.model!r} does not fit this engine: "
            f"{'; '.join(reasons[:10])}{' …' if len(reasons) > 10 else ''}. Move the tag to one that fits, "
            "or attach anew",
            reasons=reasons,
        )
