"""Any order of refits, leases, tags, deaths and drains: the catalog's invariants hold after each step.

The machine keeps a simulated memory of one value per alignment unit. Writers fill their targets
with a value of their own before they commit, and dying writers scribble until they are settled. So
"a leased version's bytes never change" is checked on bytes, not on bookkeeping.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from weightstore.allocator import NoSpace
from weightstore.catalog import Catalog, Peer, Refit, Version, VersionState, Writer
from weightstore.errors import UsageError, WeightstoreError
from weightstore.types import ALIGN, Extent, TensorSpec, align_up
from weightstore.wire import OpenRefit, Write

PICK = st.integers(0, 7)
START = 4 * ALIGN
TAGS = ["latest", "policy", "ema"]
NAMES = ["t.a", "t.b", "t.c", "v.a", "v.b"]
SIZES = {"t.a": 2 * ALIGN, "t.b": ALIGN, "t.c": 10, "v.a": 3 * ALIGN, "v.b": 0}


def spec(name: str) -> TensorSpec:
    return TensorSpec(name, "uint8", (SIZES[name],), (1,))


def choose(candidates: list[Any], pick: int) -> Any:
    """One of the candidates, or None if there are none: then a rule does nothing."""
    return candidates[pick % len(candidates)] if candidates else None


def units(extent: Extent) -> range:
    return range(extent.offset, extent.offset + align_up(extent.nbytes), ALIGN)


class CatalogMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.catalog = Catalog(START, 8 * ALIGN)
        self.peers: list[Peer] = []
        self.last_peer = 0
        self.dead: list[tuple[Writer, list[Extent]]] = []
        self.memory: dict[int, int] = {}
        self.contents: dict[Version, dict[Extent, int]] = {}
        self.stamp = 0
        self.now = 0.0
        for _ in range(3):
            self.connect()

    @initialize()
    def publish(self) -> None:
        refit = self.catalog.open_refit(OpenRefit(id=0, model="m", tag="latest"), self.peers[0], 0.0)
        self.catalog.reserve(refit.number, self.peers[0], [spec(n) for n in NAMES])
        self.finish(refit, skip=False)

    # -- helpers -----------------------------------------------------------------------------------

    def attempt(self, call: Any, *args: Any) -> Any:
        """A refused call must leave no trace."""
        before = self.snapshot()
        try:
            return call(*args)
        except NoSpace as need:
            assert self.snapshot() == before
            self.catalog.space.grow(need.shortfall)
            return None
        except WeightstoreError:
            assert self.snapshot() == before
            return None

    def snapshot(self) -> Any:
        c = self.catalog
        return (
            c.usage(),
            c.space.references(),
            {m.name: (dict(m.tags), {n: (v.state, v.torn) for n, v in m.versions.items()}) for m in c.models},
            {n: (r.state, dict(r.targets), dict(r.joined)) for n, r in c.refits.items()},
            [(x.number, x.version, x.offered, x.parked, x.torn) for x in c.leases],
        )

    def fill(self, extent: Extent, value: int) -> None:
        for unit in units(extent):
            self.memory[unit] = value

    def write(self, refit: Refit) -> dict[Extent, int]:
        """The refit's writers are told its targets, and fill them all."""
        self.catalog.begin_writing(refit.number, self.owner(refit))
        self.stamp += 1
        for record in refit.targets.values():
            self.fill(record.extent, self.stamp)
        return {r.extent: self.stamp for r in refit.targets.values() if r.nbytes}

    def open_refits(self) -> list[Refit]:
        return list(self.catalog.open_refits())

    def owner(self, refit: Refit) -> Peer:
        return next(iter(refit.joined.values()))

    # -- rules -------------------------------------------------------------------------------------

    @rule()
    def connect(self) -> None:
        if len(self.peers) == 5:
            return
        self.last_peer += 1
        self.peers.append(Peer(self.last_peer, Writer(self.last_peer, 1, "x"), "p"))

    @rule(
        pick=PICK,
        tag=st.sampled_from(TAGS),
        components=st.sampled_from([None, ["t"], ["v"]]),
        mode=st.sampled_from(["whole", "whole", "partial", "fresh", "in_place"]),
        at_once=st.booleans(),
    )
    def refit(self, pick: int, tag: str, components: list[str] | None, mode: str, at_once: bool) -> None:
        who = choose(self.peers, pick)
        request = OpenRefit(
            id=0,
            model="m",
            tag=tag,
            components=None if mode == "fresh" else components,
            partial=mode == "partial",
            fresh=mode == "fresh",
            in_place=mode == "in_place",
        )
        refit = self.attempt(self.catalog.open_refit, request, who, self.now)
        if refit is None or self.catalog.unaware(refit) or not at_once:
            return
        if mode in ("partial", "fresh"):
            names = NAMES if mode == "fresh" else [n for n in NAMES[::2] if refit.in_scope(n)]
            if self.attempt(self.catalog.reserve, refit.number, who, [spec(n) for n in names]) is None:
                return
        self.finish(refit, skip=False)

    @rule(pick=PICK, names=st.lists(st.sampled_from(NAMES), unique=True, min_size=1))
    def reserve(self, pick: int, names: list[str]) -> None:
        refit = choose(self.open_refits(), pick)
        if refit is None:
            return
        self.attempt(self.catalog.reserve, refit.number, self.owner(refit), [spec(n) for n in names])

    @rule(pick=PICK, skip=st.booleans())
    def commit(self, pick: int, skip: bool) -> None:
        refit = choose(self.open_refits(), pick)
        if refit is None:
            return
        if not self.catalog.unaware(refit):  # else the service does not let an in-place writer begin yet
            self.finish(refit, skip)

    def finish(self, refit: Refit, skip: bool) -> None:
        base, kept = refit.base, self.contents.get(refit.base) if refit.base else {}
        written = self.write(refit)
        names = list(refit.targets)[1 if skip else 0 :]
        try:
            version = self.catalog.prepare_commit(
                refit.number, self.owner(refit), [Write(n) for n in names], self.now
            )
        except UsageError:
            assert skip or not refit.targets
            return
        assert version is not None and not skip
        self.contents[version] = {e: written[e] if e in written else (kept or {})[e] for e in version.extents}
        self.catalog.apply_commit(refit.number, version)
        assert self.catalog.resolve("m", refit.tag, None) is version
        assert base is None or version.parent == base.number

    @rule(pick=PICK)
    def begin(self, pick: int) -> None:
        """A writer gets to work; others come and go before it ends."""
        refit = choose(self.open_refits(), pick)
        if refit is not None and not self.catalog.unaware(refit):
            self.write(refit)

    @rule(pick=PICK)
    def abort(self, pick: int) -> None:
        refit = choose(self.open_refits(), pick)
        if refit is None:
            return
        if not self.catalog.unaware(refit):
            self.write(refit)
        self.catalog.abort_refit(refit.number, self.owner(refit), "")

    @rule(pick=PICK, writing=st.booleans())
    def die(self, pick: int, writing: bool) -> None:
        writers = [self.owner(refit) for refit in self.open_refits()] if writing else []
        who = choose(writers or self.peers, pick)
        if who is None or len(self.peers) == 1:
            return
        # Where its process may write until it has really gone: what it owned, bytes of its own making.
        reach = [e for r in self.open_refits() if self.owner(r) == who for e in r.owned]
        for refit in self.open_refits():
            if self.owner(refit) == who and not self.catalog.unaware(refit):
                self.write(refit)
        self.peers.remove(who)
        self.catalog.drop_peer(who)
        self.dead.append((who.writer, reach))

    @rule(pick=PICK)
    def scribble_and_settle(self, pick: int) -> None:
        """A dead connection's process writes on until it has really gone."""
        entry = choose(self.dead, pick)
        if entry is None:
            return
        writer, reach = entry
        for extent in reach:
            self.fill(extent, -1)
        self.dead.remove(entry)
        self.catalog.settle(writer)

    @rule(pick=PICK, tag=st.sampled_from(TAGS), follow=st.booleans())
    def lease(self, pick: int, tag: str, follow: bool) -> None:
        who = choose(self.peers, pick)
        self.attempt(self.catalog.open_lease, who, "m", tag, None, follow, self.now)

    @rule(
        pick=PICK,
        tag=st.sampled_from(TAGS),
        version=st.integers(0, 12),
        follow=st.booleans(),
        parked=st.booleans(),
        torn=st.booleans(),
    )
    def renew(self, pick: int, tag: str, version: int, follow: bool, parked: bool, torn: bool) -> None:
        """A holder comes back on a new connection, however late and whatever it believes."""
        who = choose(self.peers, pick)
        parked, torn = parked and follow, torn and follow
        self.attempt(self.catalog.leases.renew, who, "m", tag, version, follow, parked, torn, self.now)

    @rule(pick=PICK, what=st.sampled_from(["take", "park", "unpark", "release"]))
    def use_lease(self, pick: int, what: str) -> None:
        lease = choose(list(self.catalog.leases), pick)
        if lease is None:
            return
        if what == "take":
            self.catalog.take_offer(lease.number, lease.peer, lease.offered)
        elif what == "release":
            self.catalog.release_lease(lease.number, lease.peer)
        else:
            self.attempt(self.catalog.park_lease, lease.number, lease.peer, what == "park")

    @rule()
    def offer(self) -> None:
        for lease, version in self.catalog.leases.make_offers():
            assert lease.offered == version.number

    @rule(pick=PICK, tag=st.sampled_from(TAGS), number=st.integers(0, 12))
    def set_tag(self, pick: int, tag: str, number: int) -> None:
        self.attempt(self.catalog.set_tag, "m", tag, number)

    @rule(tag=st.sampled_from(TAGS))
    def remove_tag(self, tag: str) -> None:
        self.attempt(self.catalog.remove_tag, "m", tag)

    @rule()
    def end_or_start_grace(self) -> None:
        if self.catalog.grace_until:
            self.catalog.end_grace()
        elif not any(refit.declared.in_place for refit in self.open_refits()):
            self.catalog.grace_until = 1.0

    # -- invariants --------------------------------------------------------------------------------

    @invariant()
    def every_unit_is_in_exactly_one_hand(self) -> None:
        space = self.catalog.space
        hands: list[int] = []
        for block in space.free_blocks():
            hands += units(block)
        for extent in space.references():
            hands += units(extent)
        for refit in self.open_refits():
            for extent in refit.owned:
                hands += units(extent)
        for debt in space.debts:
            for extent in debt.extents:
                hands += units(extent)
        assert sorted(hands) == list(range(START, START + space.committed, ALIGN))
        usage = self.catalog.usage()
        total = usage.free + usage.reachable + usage.pending + usage.quarantined
        assert total == usage.committed

    @invariant()
    def references_are_those_of_the_versions(self) -> None:
        counts: dict[Extent, int] = {}
        for version in self.catalog.models.versions():
            for extent in version.extents:
                counts[extent] = counts.get(extent, 0) + 1
        assert counts == self.catalog.space.references()

    @invariant()
    def readable_versions_hold_the_bytes_they_were_committed_with(self) -> None:
        for version in self.catalog.models.versions():
            if not version.torn:
                for extent, value in self.contents[version].items():
                    assert {self.memory[u] for u in units(extent)} == {value}

    @invariant()
    def what_a_lease_may_read_exists(self) -> None:
        for lease in self.catalog.leases:
            versions = self.catalog.models.get(lease.model).versions
            assert lease.torn or lease.version in versions
            assert not lease.offered or lease.offered_torn or lease.offered in versions
            if not lease.parked and not lease.torn:
                assert not versions[lease.version].torn

    @invariant()
    def only_live_versions_exist(self) -> None:
        c = self.catalog
        held = c.leases.held()
        bases = {r.base for r in self.open_refits()}
        for model in c.models:
            for version in model.versions.values():
                tagged = version.number in model.tags.values()
                live = tagged or (model.name, version.number) in held or version in bases or c.grace_until
                assert live
                assert version.state is (VersionState.COMMITTED if tagged else VersionState.RETIRED)
            assert set(model.tags.values()) <= set(model.versions)


CatalogMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_any_order_of_events = CatalogMachine.TestCase


@pytest.mark.parametrize("seed", range(4))
def test_long_random_walks(seed: int) -> None:
    """Hypothesis shrinks well but walks slowly; this reaches what takes many steps to set up."""
    rng = random.Random(seed)
    for _ in range(60):
        machine = CatalogMachine()
        machine.publish()
        for _ in range(80):
            step(machine, rng)
            for check in INVARIANTS:
                check(machine)


def step(machine: CatalogMachine, rng: random.Random) -> None:
    pick = rng.randrange(8)
    tag, names = rng.choice(TAGS), rng.sample(NAMES, rng.randint(1, 3))
    modes = ["whole", "whole", "partial", "fresh", "in_place"]
    rng.choice(
        [
            machine.connect,
            lambda: machine.refit(pick, tag, rng.choice([None, ["t"], ["v"]]), rng.choice(modes), pick > 3),
            lambda: machine.refit(pick, tag, None, rng.choice(modes), True),
            lambda: machine.reserve(pick, names),
            lambda: machine.commit(pick, pick == 0),
            lambda: machine.begin(pick),
            lambda: machine.abort(pick),
            lambda: machine.die(pick, pick > 2),
            lambda: machine.scribble_and_settle(pick),
            lambda: machine.lease(pick, tag, pick > 2),
            lambda: machine.renew(pick, tag, rng.randrange(12), pick > 2, rng.random() < 0.5, pick == 3),
            lambda: machine.use_lease(pick, rng.choice(["take", "park", "unpark", "release"])),
            machine.offer,
            lambda: machine.set_tag(pick, tag, rng.randrange(12)),
            lambda: machine.remove_tag(tag),
            machine.end_or_start_grace,
        ]
    )()


INVARIANTS = (
    CatalogMachine.every_unit_is_in_exactly_one_hand,
    CatalogMachine.references_are_those_of_the_versions,
    CatalogMachine.readable_versions_hold_the_bytes_they_were_committed_with,
    CatalogMachine.what_a_lease_may_read_exists,
    CatalogMachine.only_live_versions_exist,
)
