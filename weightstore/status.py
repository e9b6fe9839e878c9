"""The store's state as the wire's status structs: for `status`, metrics and error messages."""

from __future__ import annotations

import os

from weightstore import __version__
from weightstore.catalog import Catalog, Model, VersionState
from weightstore.sizes import format_size
from weightstore.store import Store
from weightstore.types import align_up
from weightstore.wire import LeaseStatus, ModelStatus, RefitStatus, Status, VersionStatus


def build(store: Store, request: int, started: float, now: float, clients: int) -> Status:
    catalog = store.catalog
    return Status(
        id=request,
        server=__version__,
        pid=os.getpid(),
        started=started,
        now=now,
        grace_until=catalog.grace_until,
        clients=clients,
        arena=store.arena_status(),
        models=[
            _model(catalog, model) for model in catalog.models if model.versions or model.names is not None
        ],
        leases=[
            LeaseStatus(
                lease=lease.number,
                model=lease.model,
                tag=lease.tag,
                version=lease.version,
                follow=lease.follow,
                parked=lease.parked,
                offered=lease.offered,
                holder=str(lease.peer),
                since=lease.since,
            )
            for lease in catalog.leases
        ],
        refits=[
            RefitStatus(
                refit=refit.number,
                model=refit.model,
                tag=refit.tag,
                base=refit.base.number if refit.base is not None else 0,
                in_place=refit.declared.in_place,
                nbytes=sum(extent.nbytes for extent in refit.owned),
                joined=len(refit.joined),
                committed=len(refit.votes),
                world_size=refit.declared.world_size,
                holders=[str(peer) for peer in refit.joined.values()],
                since=refit.opened,
            )
            for refit in catalog.open_refits()
        ],
    )


def _model(catalog: Catalog, model: Model) -> ModelStatus:
    newest = model.versions[max(model.versions)] if model.versions else None
    return ModelStatus(
        name=model.name,
        tags=dict(model.tags),
        torn=[tag for tag, number in model.tags.items() if model.versions[number].torn],
        versions=[
            VersionStatus(
                number=v.number,
                parent=v.parent,
                state=v.state.value,
                created=v.created,
                tensors=len(v.records),
                nbytes=v.nbytes,
                tags=model.tags_of(v.number),
                leases=len(catalog.leases.on(model.name, v.number)),
                checksummed=v.checksummed,
            )
            for v in sorted(model.versions.values(), key=lambda v: v.number)
        ],
        components=newest.components if newest is not None else {},
        names=model.names is not None,
    )


def held_back(catalog: Catalog) -> str:
    """One sentence on space that no tag needs but somebody still holds; empty if there is none."""
    reasons = []
    for v in catalog.models.versions():
        if v.state is VersionState.RETIRED:
            own = sum(align_up(e.nbytes) for e in v.extents if not catalog.space.shared([e]))
            holders = ", ".join(sorted({str(lease.peer) for lease in catalog.leases.on(v.model, v.number)}))
            why = holders or ("the grace period after a restart" if catalog.grace_until else "an open refit")
            reasons.append(f"version {v.number} of {v.model!r} ({format_size(own)} of its own) by {why}")
    quarantined = catalog.usage().quarantined
    if quarantined:
        pids = ", ".join(sorted(str(w.pid) for w in catalog.space.holdouts()))
        reasons.append(f"{format_size(quarantined)} until writer process {pids} has ended")
    return f"Held, though no tag needs it: {'; '.join(reasons)}" if reasons else ""
