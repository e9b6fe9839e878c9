"""Names: from what a trainer calls its tensors to what the store calls them.

`NameMap` says how, once; `plan` says what would come of it before a byte moves. Everything here is pure
but `given` and `inlet`, which look at tensors, and `published`, which is how a map travels with its model.
"""

from __future__ import annotations

from weightstore.names.name_map import AS_STORED, NameMap
from weightstore.names.plan import Plan, plan
from weightstore.names.rows import Given, Kind, Row, Stored

__all__ = ["AS_STORED", "NameMap", "Plan", "plan", "Given", "Kind", "Row", "Stored"]
