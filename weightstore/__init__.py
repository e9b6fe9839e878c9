"""weightstore: versioned model weights in shared host memory.

Names resolve on first use, so that the service process, which starts through this package, imports
neither torch nor any client code.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from weightstore import errors
    from weightstore.client import Store, connect
    from weightstore.ema import EmaReport, update_ema
    from weightstore.local import local_store
    from weightstore.names import NameMap, Plan
    from weightstore.reader import Lease
    from weightstore.report import RefitReport
    from weightstore.snapshot import Snapshot
    from weightstore.trainer import Refit
    from weightstore.types import TensorRecord, TensorSpec

__version__ = "0.1.0"

_HOME: Final = {
    "connect": "weightstore.client",
    "local_store": "weightstore.local",
    "Store": "weightstore.client",
    "Refit": "weightstore.trainer",
    "RefitReport": "weightstore.report",
    "Lease": "weightstore.reader",
    "EmaReport": "weightstore.ema",
    "update_ema": "weightstore.ema",
    "NameMap": "weightstore.names",
    "Plan": "weightstore.names",
    "Snapshot": "weightstore.snapshot",
    "TensorRecord": "weightstore.types",
    "TensorSpec": "weightstore.types",
}

__all__ = [
    "connect",
    "local_store",
    "Store",
    "Refit",
    "RefitReport",
    "Lease",
    "Snapshot",
    "NameMap",
    "Plan",
    "update_ema",
    "EmaReport",
    "TensorRecord",
    "TensorSpec",
    "errors",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        value: Any = import_module("weightstore.errors")
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'weightstore' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
