"""The catalog: versions, refits, tags and leases as pure logic over offsets.

Theory of operation
-------------------

Nothing here reads or writes weights, a socket or a clock: `now` is an argument, space is numbers.
The store (weightstore.store) makes each change durable; the service does the waiting.

Three lifecycles, each one table in its module:

    version   COMMITTED → RETIRED → FREED      tagged / only held / gone        (versions.py)
    refit     OPEN → COMMITTED | ABORTED       a version, or nothing            (refits.py)
    lease     held version → offered version   moves when the holder takes it   (leases.py)

A version is *live* while a tag names it, a lease holds it or has been offered it, or an open refit
started from it. `Catalog.collect` frees what is not live, and nothing else frees a version.

An extent is in exactly one of these hands, which is what `space.py` keeps count of:

    free         the allocator's
    reachable    referred to by at least one live version
    pending      reserved by an open refit
    quarantined  of an aborted refit one of whose writers may still have a copy landing
"""

from weightstore.catalog.catalog import Catalog
from weightstore.catalog.leases import Lease
from weightstore.catalog.refits import Refit, RefitState
from weightstore.catalog.space import Usage
from weightstore.catalog.versions import Model, Version, VersionState
from weightstore.catalog.writers import Peer, Writer

__all__ = [
    "Catalog",
    "Lease",
    "Model",
    "Peer",
    "Refit",
    "RefitState",
    "Usage",
    "Version",
    "VersionState",
    "Writer",
]
