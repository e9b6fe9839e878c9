"""The catalog's rules one by one; test_catalog_machine.py lets them collide."""

from __future__ import annotations

import pytest

from weightstore.allocator import NoSpace
from weightstore.catalog import Catalog, Peer, RefitState, VersionState, Writer
from weightstore.errors import (
    CoverageError,
    InvalidName,
    InvalidTensor,
    LeaseLost,
    RefitAborted,
    RefitClosed,
    RefitConflict,
    TagTorn,
    UnknownModel,
    UnknownTag,
    UnknownVersion,
    UsageError,
    VersionInUse,
)
from weightstore.types import ALIGN, Box, Extent, TensorSpec, contiguous_stride
from weightstore.wire import OpenRefit, Write

START = 1 << 16


def peer(number: int) -> Peer:
    return Peer(number, Writer(1000 + number, 1, f"i{number}"), f"client {number}")


ALICE, BOB = peer(1), peer(2)


def spec(name: str, *shape: int, dtype: str = "float32", alias_of: str | None = None) -> TensorSpec:
    return TensorSpec(name, dtype, shape, contiguous_stride(shape), alias_of)


SPECS = [spec("t.w", 64), spec("t.b", 8), spec("vae.w", 100)]


def opened(model: str = "m", tag: str = "latest", **kwargs: object) -> OpenRefit:
    return OpenRefit(id=0, model=model, tag=tag, **kwargs)  # type: ignore[arg-type]


def catalog(windows: int = 64) -> Catalog:
    return Catalog(START, windows * ALIGN)


def commit(c: Catalog, refit: int, names: list[str], who: Peer = ALICE, now: float = 1.0):
    version = c.prepare_commit(refit, who, [Write(n) for n in names], now)
    assert version is not None
    c.apply_commit(refit, version)
    return version


def publish(c: Catalog, specs: list[TensorSpec] = SPECS, **kwargs: object):
    refit = c.open_refit(opened(**kwargs), ALICE, 0.0)
    c.reserve(refit.number, ALICE, specs)
    return commit(c, refit.number, [s.name for s in specs if s.alias_of is None])


def refit_of(c: Catalog, **kwargs: object):
    refit = c.open_refit(opened(**kwargs), ALICE, 0.0)
    return commit(c, refit.number, list(refit.targets))


def test_the_first_refit_makes_version_one():
    c = catalog()
    version = publish(c)
    assert (version.number, version.parent, version.state) == (1, 0, VersionState.COMMITTED)
    assert c.resolve("m", "latest", None) is version
    assert version.components == {"t": 288, "vae": 400}
    usage = c.usage()
    assert usage.reachable == 4 * ALIGN and usage.free + usage.reachable == usage.committed


def test_a_component_refit_shares_the_rest_by_address():
    c = catalog()
    one = publish(c)
    c.set_tag("m", "ref", 1)
    two = refit_of(c, components=["t"])
    assert two.parent == 1
    assert two.records["vae.w"] is one.records["vae.w"]
    assert two.records["t.w"].offset != one.records["t.w"].offset
    assert c.usage().reachable == (4 + 2) * ALIGN
    assert [r.name for r in two.records.values()] == ["t.w", "t.b", "vae.w"]


def test_an_untagged_version_goes_when_nobody_holds_it():
    c = catalog()
    publish(c)
    lease, one = c.open_lease(BOB, "m", "latest", None, False, 0.0)
    refit_of(c)
    assert one.state is VersionState.RETIRED and 1 in c.models.get("m").versions
    c.release_lease(lease.number, BOB)
    assert one.state is VersionState.FREED and c.freed == [one]
    assert c.usage().reachable == 4 * ALIGN
    with pytest.raises(UnknownVersion, match=r"version 1 of model 'm' has been freed; live versions: 2"):
        c.resolve("m", "latest", 1)
    with pytest.raises(UnknownVersion, match="never existed"):
        c.resolve("m", "latest", 7)


def test_unknown_names_say_what_there_is():
    c = catalog()
    publish(c, model="flux1-dev")
    with pytest.raises(UnknownModel, match="did you mean 'flux1-dev'"):
        c.resolve("flux1_dev", "latest", None)
    with pytest.raises(UnknownTag, match="its tags: latest"):
        c.resolve("flux1-dev", "policy", None)
    with pytest.raises(InvalidName):
        c.open_refit(opened(model="../etc"), ALICE, 0.0)


def test_a_second_refit_of_the_tag_conflicts_and_names_the_holder():
    c = catalog()
    publish(c)
    c.open_refit(opened(), ALICE, 0.0)
    before = c.usage()
    with pytest.raises(RefitConflict, match=r"held by client 1 \(pid 1001\)") as caught:
        c.open_refit(opened(), BOB, 0.0)
    assert caught.value.details["holder"] == "client 1 (pid 1001)"
    assert c.usage() == before
    c.open_refit(opened(tag="ema"), BOB, 0.0)  # another tag is free


def test_a_refit_declares_its_base_and_components():
    c = catalog()
    publish(c)
    with pytest.raises(CoverageError, match="no component transfomer; it has t, vae"):
        c.open_refit(opened(components=["transfomer"]), ALICE, 0.0)
    with pytest.raises(UsageError, match="needs a base version"):
        c.open_refit(opened(model="new", partial=True), ALICE, 0.0)
    refit = c.open_refit(opened(components=["t"], partial=True), ALICE, 0.0)
    assert refit.targets == {}
    with pytest.raises(CoverageError) as caught:
        c.reserve(
            refit.number,
            ALICE,
            [spec("vae.w", 100), spec("t.x", 1), spec("t.w", 65), spec("t.b", 8, dtype="int32")],
        )
    assert caught.value.details == {"undeclared": ["vae.w"], "unknown": ["t.x"], "mismatched": ["t.w", "t.b"]}
    (placed,) = c.reserve(refit.number, ALICE, [spec("t.b", 8)])
    assert c.reserve(refit.number, ALICE, [spec("t.b", 8)]) == [placed]  # asking again is no new place
    version = commit(c, refit.number, ["t.b"])
    assert version.records["t.b"] == placed


def test_coverage_fails_the_commit_with_all_names_and_the_writer_may_mend_it():
    c = catalog()
    publish(c)
    refit = c.open_refit(opened(), ALICE, 0.0)
    with pytest.raises(CoverageError) as caught:
        c.prepare_commit(refit.number, ALICE, [Write("t.w"), Write("nope")], 0.0)
    assert caught.value.details == {"unknown": ["nope"], "missing": ["t.b", "vae.w"]}
    assert c.models.get("m").tags == {"latest": 1}
    assert commit(c, refit.number, ["t.w", "t.b", "vae.w"]).number == 2


def test_writes_declared_ahead_are_checked_at_once_and_commit_nothing():
    c = catalog()
    publish(c)
    refit = c.open_refit(opened(partial=True, components=["t"]), ALICE, 0.0)
    c.reserve(refit.number, ALICE, [spec("t.b", 8)])
    with pytest.raises(UsageError, match="nothing was"):
        c.prepare_commit(refit.number, ALICE, None, 2.0)
    with pytest.raises(CoverageError) as caught:
        c.declare_writes(refit.number, ALICE, [])
    assert caught.value.details == {"missing": ["t.b"]}
    draft = c.declare_writes(refit.number, ALICE, [Write("t.b")])
    assert c.models.get("m").tags == {"latest": 1} and c.usage().pending == ALIGN
    c.reserve(refit.number, ALICE, [spec("t.w", 64)])  # the draft lacks this
    with pytest.raises(UsageError, match="nothing was"):
        c.prepare_commit(refit.number, ALICE, None, 2.0)
    draft = c.declare_writes(refit.number, ALICE, [Write("t.b"), Write("t.w")])
    refit_of(c, tag="other")  # takes number 2 in the meantime
    assert c.prepare_commit(refit.number, ALICE, None, 7.0) is draft
    c.apply_commit(refit.number, draft)
    assert (draft.number, draft.created) == (3, 7.0) and c.models.get("m").tags["latest"] == 3
    shared = c.open_refit(opened(**SHARED), ALICE, 0.0)
    with pytest.raises(UsageError, match="single writer"):
        c.declare_writes(shared.number, ALICE, [])


def test_extending_and_fresh_refits():
    c = catalog()
    publish(c)
    refit = c.open_refit(opened(partial=True, extend=True), ALICE, 0.0)
    c.reserve(refit.number, ALICE, [spec("lora.a", 4)])
    two = commit(c, refit.number, ["lora.a"])
    assert list(two.records) == ["t.w", "t.b", "vae.w", "lora.a"]
    fresh = c.open_refit(opened(fresh=True), ALICE, 0.0)
    c.reserve(fresh.number, ALICE, [spec("other.w", 4)])
    assert list(commit(c, fresh.number, ["other.w"]).records) == ["other.w"]


def test_a_new_tag_starts_from_latest_or_must_name_its_base():
    c = catalog()
    publish(c)
    assert refit_of(c, tag="policy", components=["t"]).parent == 1
    c.remove_tag("m", "latest")
    with pytest.raises(UnknownTag, match="say which version is the base"):
        c.open_refit(opened(tag="ema"), ALICE, 0.0)
    assert refit_of(c, tag="ema", base=2).parent == 2


def test_ties_share_an_extent_and_move_together():
    c = catalog()
    one = publish(c, [spec("t.w", 64), spec("t.tied", 64, alias_of="t.w"), spec("t.b", 8)])
    assert one.records["t.w"].extent == one.records["t.tied"].extent
    refit = c.open_refit(opened(partial=True), ALICE, 0.0)
    c.reserve(refit.number, ALICE, [spec("t.tied", 64)])
    assert refit.targets["t.w"].extent == refit.targets["t.tied"].extent
    two = commit(c, refit.number, ["t.tied"])
    assert two.records["t.w"].extent == two.records["t.tied"].extent != one.records["t.w"].extent
    other = c.open_refit(opened(model="n"), ALICE, 0.0)
    with pytest.raises(InvalidTensor, match="alias of 'gone'"):
        c.reserve(other.number, ALICE, [spec("x", 4, alias_of="gone")])
    with pytest.raises(InvalidTensor, match="sizes differ"):
        c.reserve(other.number, ALICE, [spec("x", 4), spec("y", 5, alias_of="x")])


def test_no_space_changes_nothing_and_growing_helps():
    c = catalog(4)
    publish(c)
    before = (c.usage(), dict(c.refits))
    with pytest.raises(NoSpace) as refusal:
        c.open_refit(opened(), ALICE, 0.0)
    assert (c.usage(), c.refits) == before
    c.space.grow(refusal.value.shortfall)
    assert refit_of(c).number == 2


def test_an_abort_gives_the_space_back_and_ends_the_refit():
    c = catalog()
    publish(c)
    free = c.usage().free
    refit = c.open_refit(opened(), ALICE, 0.0)
    assert c.usage().pending == 4 * ALIGN
    c.abort_refit(refit.number, ALICE, "changed my mind")
    assert c.usage().free == free and refit.state is RefitState.ABORTED
    with pytest.raises(RefitClosed):
        c.prepare_commit(refit.number, ALICE, [], 0.0)
    with pytest.raises(RefitClosed):
        c.abort_refit(refit.number, BOB, "")


def test_a_writer_that_vanishes_leaves_its_space_in_quarantine_until_it_is_gone():
    c = catalog()
    publish(c)
    c.open_refit(opened(), ALICE, 0.0)
    c.drop_peer(ALICE)
    usage = c.usage()
    assert (usage.pending, usage.quarantined) == (0, 4 * ALIGN)
    assert c.space.holdouts() == {ALICE.writer}
    refit_of(c)  # the tag is free again, on other space
    assert not c.settle(BOB.writer)
    assert c.settle(ALICE.writer)
    assert c.usage().quarantined == 0


SHARED = {"key": "step 7", "world_size": 2}


def halves(rank: int) -> list[Write]:
    lo, hi = (0, 32) if rank == 0 else (32, 64)
    own = [Write("t.b")] if rank == 0 else [Write("vae.w")]
    return [Write("t.w", Box((lo,), (hi,))), *own]


def test_two_ranks_write_one_version():
    c = catalog()
    publish(c)
    refit = c.open_refit(opened(**SHARED), ALICE, 0.0)
    assert c.open_refit(opened(**SHARED, rank=1), BOB, 0.0) is refit
    assert c.prepare_commit(refit.number, BOB, halves(1), 0.0) is None
    version = c.prepare_commit(refit.number, ALICE, halves(0), 0.0)
    assert version is not None
    c.apply_commit(refit.number, version)
    assert refit.state is RefitState.COMMITTED and refit.version == 2


def test_ranks_must_agree_and_come_once():
    c = catalog()
    publish(c)
    c.open_refit(opened(**SHARED), ALICE, 0.0)
    with pytest.raises(RefitConflict, match="differently"):
        c.open_refit(opened(**SHARED, rank=1, partial=True), BOB, 0.0)
    with pytest.raises(RefitConflict, match=r"rank 0 .* already taken"):
        c.open_refit(opened(**SHARED), BOB, 0.0)
    with pytest.raises(RefitConflict, match="already rank 0"):
        c.open_refit(opened(**SHARED, rank=1), ALICE, 0.0)
    with pytest.raises(UsageError, match="rank 2 is not in 0 to 1"):
        c.open_refit(opened(tag="x", **SHARED, rank=2), BOB, 0.0)
    with pytest.raises(UsageError, match="same key"):
        c.open_refit(opened(tag="x", world_size=2), BOB, 0.0)


def test_a_hole_between_ranks_aborts_for_all():
    c = catalog()
    publish(c)
    free = c.usage().free
    refit = c.open_refit(opened(**SHARED), ALICE, 0.0)
    c.open_refit(opened(**SHARED, rank=1), BOB, 0.0)
    c.prepare_commit(refit.number, ALICE, halves(0), 0.0)
    with pytest.raises(CoverageError) as caught:
        c.prepare_commit(refit.number, BOB, [Write("vae.w")], 0.0)
    assert caught.value.details == {"holes": ["t.w"]}
    with pytest.raises(RefitAborted, match="1 holes"):
        c.refit_of(refit.number, ALICE)
    assert c.usage().free == free  # both had committed: nobody writes any more


def test_a_dead_rank_aborts_for_all_and_the_others_are_waited_for():
    c = catalog()
    publish(c)
    refit = c.open_refit(opened(**SHARED), ALICE, 0.0)
    c.open_refit(opened(**SHARED, rank=1), BOB, 0.0)
    c.drop_peer(BOB)
    with pytest.raises(RefitAborted, match="rank 1, client 2"):
        c.prepare_commit(refit.number, ALICE, halves(0), 0.0)
    assert c.space.holdouts() == {ALICE.writer, BOB.writer}
    c.abort_refit(refit.number, ALICE, "seen")
    c.settle(BOB.writer)
    assert c.usage().quarantined == 0 and not c.refits


def test_ranks_that_never_come_are_named_when_time_is_up():
    c = catalog()
    publish(c)
    refit = c.open_refit(opened(**SHARED, timeout=5.0), ALICE, 100.0)
    assert c.expire(104.9) == []
    assert c.expire(105.0) == [refit]
    with pytest.raises(RefitAborted, match=r"ranks \[1\] never joined within 5 s"):
        c.refit_of(refit.number, ALICE)


def test_a_follower_is_offered_the_newest_and_holds_both_until_it_answers():
    c = catalog()
    publish(c)
    lease, one = c.open_lease(BOB, "m", "latest", None, True, 0.0)
    two = refit_of(c)
    assert [(x.number, v.number) for x, v in c.leases.make_offers()] == [(lease.number, 2)]
    three = refit_of(c)
    assert c.leases.make_offers() == []  # one offer at a time
    assert (one.state, two.state, three.state) == (
        VersionState.RETIRED,
        VersionState.RETIRED,
        VersionState.COMMITTED,
    )
    c.take_offer(lease.number, BOB, 2)
    assert one.state is VersionState.FREED
    ((_, offered),) = c.leases.make_offers()
    assert offered is three
    c.take_offer(lease.number, BOB, 99)  # not what is out
    assert lease.version == 2
    c.take_offer(lease.number, BOB, 3)
    assert two.state is VersionState.FREED and lease.version == 3


def test_unparking_jumps_to_the_newest():
    c = catalog()
    publish(c)
    lease, _ = c.open_lease(BOB, "m", "latest", None, True, 0.0)
    c.park_lease(lease.number, BOB, True)
    refit_of(c)
    c.leases.make_offers()
    assert c.leases.answering("m")
    assert c.park_lease(lease.number, BOB, False).number == 2
    assert not c.leases.answering("m") and lease.version == 2
    assert list(c.models.get("m").versions) == [2]


def test_a_lease_belongs_to_its_connection():
    c = catalog()
    publish(c)
    lease, _ = c.open_lease(BOB, "m", "latest", None, False, 0.0)
    with pytest.raises(LeaseLost):
        c.release_lease(lease.number, ALICE)
    with pytest.raises(UsageError, match="follows a tag"):
        c.park_lease(lease.number, BOB, True)
    with pytest.raises(UsageError, match="not both"):
        c.open_lease(BOB, "m", "latest", 1, True, 0.0)
    c.drop_peer(BOB)
    assert len(c.leases) == 0


def test_a_retired_version_can_be_tagged_while_somebody_holds_it():
    c = catalog()
    publish(c)
    c.open_lease(BOB, "m", "latest", None, False, 0.0)
    refit_of(c)
    c.set_tag("m", "old", 1)
    c.drop_peer(BOB)
    assert c.resolve("m", "old", None).state is VersionState.COMMITTED


def test_tags_under_a_refit_stay():
    c = catalog()
    publish(c)
    c.open_refit(opened(), ALICE, 0.0)
    for change in (
        lambda: c.set_tag("m", "latest", 1),
        lambda: c.remove_tag("m", "latest"),
        lambda: c.remove_model("m"),
    ):
        with pytest.raises(RefitConflict, match="wait until it ends"):
            change()


def test_numbers_go_on_rising_after_a_model_was_removed():
    c = catalog()
    publish(c)
    c.remove_model("m")
    assert c.usage().reachable == 0
    with pytest.raises(UnknownModel):
        c.resolve("m", "latest", None)
    assert publish(c).number == 2


# -- in place -------------------------------------------------------------------------------------


def test_an_in_place_refit_needs_no_space_and_keeps_the_addresses():
    c = catalog(4)
    one = publish(c)
    refit = c.open_refit(opened(components=["t"], in_place=True), ALICE, 0.0)
    assert refit.targets["t.w"] is one.records["t.w"] and c.usage().pending == 0
    with pytest.raises(TagTorn, match="torn: an in-place refit of t "):
        c.resolve("m", "latest", None)
    two = commit(c, refit.number, ["t.w", "t.b"])
    assert two.extents == one.extents and one.state is VersionState.FREED
    assert c.resolve("m", "latest", None) is two
    assert c.usage().reachable == 4 * ALIGN


def test_an_in_place_refit_is_refused_where_somebody_would_notice():
    c = catalog()
    publish(c)
    request = opened(in_place=True, components=["t"])
    reader, _ = c.open_lease(BOB, "m", "latest", None, False, 0.0)
    with pytest.raises(VersionInUse, match=r"client 2 \(pid 1002\) reads version 1"):
        c.open_refit(request, ALICE, 0.0)
    c.release_lease(reader.number, BOB)
    c.set_tag("m", "ref", 1)
    with pytest.raises(VersionInUse, match="also named by ref"):
        c.open_refit(request, ALICE, 0.0)
    c.remove_tag("m", "ref")
    refit_of(c, tag="policy", components=["vae"])  # shares t with version 1
    with pytest.raises(VersionInUse, match="shared with another"):
        c.open_refit(request, ALICE, 0.0)
    assert not c.resolve("m", "latest", None).torn
    with pytest.raises(UsageError, match="neither fresh nor extend"):
        c.open_refit(opened(in_place=True, fresh=True), ALICE, 0.0)


def test_a_parked_follower_is_told_before_anything_is_written():
    c = catalog()
    publish(c)
    lease, one = c.open_lease(BOB, "m", "latest", None, True, 0.0)
    c.park_lease(lease.number, BOB, True)
    refit = c.open_refit(opened(in_place=True), ALICE, 0.0)
    assert c.unaware(refit) == [lease]
    assert [(v.number, bool(v.torn)) for _, v in c.leases.make_offers()] == [(1, True)]
    c.take_offer(lease.number, BOB, 1)
    assert lease.torn and c.unaware(refit) == []
    two = commit(c, refit.number, list(one.records))
    assert [v for _, v in c.leases.make_offers()] == [two]
    c.take_offer(lease.number, BOB, 2)
    assert not lease.torn


def test_a_reader_that_comes_back_late_does_not_make_half_written_bytes_readable():
    c = catalog()
    publish(c)
    refit = c.open_refit(opened(in_place=True), ALICE, 0.0)
    c.begin_writing(refit.number, ALICE)
    with pytest.raises(LeaseLost, match="overwritten by an in-place refit"):
        c.leases.renew(BOB, "m", "latest", 1, True, False, False, 1.0)
    lease, _ = c.leases.renew(BOB, "m", "latest", 1, True, True, False, 1.0)
    assert c.unaware(refit) == [lease]
    c.drop_peer(ALICE)
    with pytest.raises(TagTorn):
        c.resolve("m", "latest", None)
    assert [(v.number, bool(v.torn)) for _, v in c.leases.make_offers()] == [(1, True)]


def test_an_in_place_refit_that_never_began_tears_nothing():
    c = catalog()
    publish(c)
    lease, _ = c.open_lease(BOB, "m", "latest", None, True, 0.0)
    c.park_lease(lease.number, BOB, True)
    refit = c.open_refit(opened(in_place=True), ALICE, 0.0)
    c.abort_refit(refit.number, ALICE, "the follower did not answer")
    assert not c.resolve("m", "latest", None).torn


def test_a_torn_tag_is_healed_only_by_writing_the_torn_components_whole():
    c = catalog()
    publish(c)
    c.open_refit(opened(in_place=True, components=["t"]), ALICE, 0.0)
    c.drop_peer(ALICE)
    with pytest.raises(TagTorn):
        c.open_lease(BOB, "m", "latest", None, False, 0.0)
    with pytest.raises(TagTorn):
        c.set_tag("m", "copy", 1)
    for request in (opened(components=["vae"]), opened(components=["t"], partial=True)):
        with pytest.raises(TagTorn, match="components whole"):
            c.open_refit(request, BOB, 0.0)
    healed = c.open_refit(opened(components=["t"]), BOB, 0.0)
    version = commit(c, healed.number, ["t.w", "t.b"], BOB)
    assert not c.resolve("m", "latest", None).torn and version.records["vae.w"].offset


def test_a_torn_tag_is_healed_in_place_too():
    c = catalog()
    publish(c)
    c.open_refit(opened(in_place=True), ALICE, 0.0)
    c.drop_peer(ALICE)
    with pytest.raises(VersionInUse, match=f"process {ALICE.writer.pid} may still be writing to it"):
        c.open_refit(opened(in_place=True), BOB, 0.0)
    c.settle(ALICE.writer)
    again = c.open_refit(opened(in_place=True), BOB, 0.0)
    commit(c, again.number, list(again.targets), BOB)
    assert not c.resolve("m", "latest", None).torn


def test_a_writer_that_gives_up_in_place_has_stopped_writing():
    c = catalog()
    publish(c)
    refit = c.open_refit(opened(in_place=True), ALICE, 0.0)
    c.abort_refit(refit.number, ALICE, "out of memory")
    assert c.holdouts() == set()
    c.open_refit(opened(in_place=True), BOB, 0.0)


def test_space_that_was_overwritten_in_place_waits_for_its_writer():
    c = catalog()
    publish(c)
    c.open_refit(opened(in_place=True), ALICE, 0.0)
    c.drop_peer(ALICE)
    healed = c.open_refit(opened(), BOB, 0.0)
    commit(c, healed.number, list(healed.targets), BOB)
    assert c.models.get("m").versions.keys() == {2} and c.usage().quarantined > 0
    assert c.holdouts() == {ALICE.writer}
    assert c.settle(ALICE.writer) and c.usage().quarantined == 0


# -- grace ----------------------------------------------------------------------------------------


def test_nothing_is_freed_and_nothing_overwritten_while_the_grace_period_runs():
    c = catalog()
    publish(c)
    c.grace_until = 50.0
    refit_of(c)
    one = c.models.get("m").version(1)
    assert one.state is VersionState.RETIRED
    lease, held = c.leases.renew(BOB, "m", "latest", 1, False, False, False, 10.0)
    assert held is one
    with pytest.raises(VersionInUse, match="restarted"):
        c.open_refit(opened(in_place=True), ALICE, 0.0)
    c.end_grace()
    assert one.state is VersionState.RETIRED
    c.release_lease(lease.number, BOB)
    assert one.state is VersionState.FREED
    with pytest.raises(LeaseLost, match="no longer in the store"):
        c.leases.renew(BOB, "m", "latest", 1, False, False, False, 60.0)
    parked, newest = c.leases.renew(BOB, "m", "latest", 1, True, True, False, 60.0)
    assert (newest.number, parked.parked) == (2, True)


def test_extents_have_alignment_and_exact_sizes():
    c = catalog()
    version = publish(c, [spec("a", 3, dtype="int8"), spec("b"), spec("c", 0, 7)])
    assert version.records["a"].extent == Extent(START, 3)
    assert version.records["b"].extent == Extent(START + ALIGN, 4)
    assert version.records["c"].nbytes == 0
    assert version.extents == {Extent(START, 3), Extent(START + ALIGN, 4)}


def test_a_holder_that_wrongly_believes_its_bytes_torn_is_offered_the_truth():
    c = catalog()
    publish(c)
    lease, _ = c.leases.renew(BOB, "m", "latest", 1, True, True, True, 10.0)
    ((offered, version),) = c.leases.make_offers()
    assert offered is lease and version.number == 1 and not lease.offered_torn
    c.take_offer(lease.number, BOB, 1)
    assert not lease.torn
