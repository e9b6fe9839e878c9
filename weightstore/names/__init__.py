"""Names: from what a trainer calls its tensors to what the store calls them.

`NameMap` says how, once; `plan` says what would come of it before a byte moves. Everything here is pure
but `given` and `inlet`, which look at tensors.
"""

from __future__ import annotations

from weightstore.names.name_map import NameMap
from weightstore.names.plan import Plan, plan
from weightstore.names.rows import Given, Kind, Row, Stored

__all__ = ["NameMap", "Plan", "plan", "Given", "Kind", "Row", "Stored"]
