"""May this refit overwrite its base, and may a version be built on a base that was overwritten?

In-place refits are for hosts without room for a second copy of the trained component. They break
the rule that a version's bytes never change, so they are let in only where nobody can notice: no
other tag or version shares the bytes, and every reader is parked and has been told.
"""

from __future__ import annotations

from collections.abc import Iterable

from weightstore.catalog.leases import Lease
from weightstore.catalog.refits import Refit
from weightstore.catalog.space import Space
from weightstore.catalog.versions import Model, Version
from weightstore.errors import TagTorn, VersionInUse


def torn_error(model: str, tag: str, version: Version) -> TagTorn:
    return TagTorn(
        f"version {version.number} of {model!r} (tag {tag!r}) is torn: an in-place refit of "
        f"{', '.join(sorted(version.torn))} has not committed. Wait for it if it is running; otherwise write "
        "those components whole with a new refit of the tag (in_place=True needs no more room), or load the "
        f"model again (`weightstore load {model} …`)",
        model=model,
        tag=tag,
        torn=sorted(version.torn),
    )


def require_torn_covered(refit: Refit, base: Version) -> None:
    """A version may be built on a torn base only if it replaces every torn component whole, whatever its
    bytes happen to be now."""
    declared = refit.declared
    covered = base.torn if declared.components is None else base.torn & set(declared.components)
    if declared.partial or declared.skip_unchanged or covered != base.torn:
        raise torn_error(refit.model, refit.tag, base)


def require_sole_use(
    refit: Refit,
    base: Version,
    model: Model,
    space: Space,
    leases: Iterable[Lease],
    open_refits: Iterable[Refit],
) -> None:
    """Raise VersionInUse if anybody but parked followers of the refit's own tag may see `base` change, or
    anybody else may be changing it."""
    if base.writers:
        pids = ", ".join(sorted(str(writer.pid) for writer in base.writers))
        raise VersionInUse(
            f"an earlier in-place refit of version {base.number} of {refit.model!r} was aborted, and process "
            f"{pids} may still be writing to it; try again when that has ended",
            pids=pids,
        )
    tags = model.tags_of(base.number)
    if tags != [refit.tag]:
        named = ", ".join(tag for tag in tags if tag != refit.tag)
        why = f"is also named by {named}" if named else f"is not what tag {refit.tag!r} names"
        raise VersionInUse(
            f"an in-place refit of tag {refit.tag!r} would overwrite version {base.number} of "
            f"{refit.model!r}, which {why}; move tags first, or refit without in_place",
            tags=tags,
        )
    if space.shared(r.extent for n, r in base.records.items() if refit.in_scope(n) and r.nbytes):
        raise VersionInUse(
            f"what an in-place refit of {refit.model!r} tag {refit.tag!r} would overwrite is shared with "
            "another live version; refit without in_place, or remove that version's tags and leases"
        )
    for other in open_refits:
        if other.base is base:
            raise VersionInUse(
                f"another open refit (tag {other.tag!r}) starts from version {base.number} of {refit.model!r}"
            )
    for lease in leases:
        if not (lease.follow and lease.parked and lease.tag == refit.tag):
            raise VersionInUse(
                f"{lease.peer} reads version {base.number} of {refit.model!r}; put that engine to sleep or "
                "release the lease before an in-place refit",
                holder=str(lease.peer),
            )
