"""Waiting for a machine and a store to have nothing else to do, so that a sample shares no core with it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from bench.settings import Settings
from weightstore.client import Store

_POLL = 0.005
_LOOK = 0.2
"""Seconds over which the use of the cores is counted: some tens of the kernel's ticks."""


def settle(store: Store) -> None:
    """Wait until the store has summed all its versions, which it does in the background."""
    while not all(v.checksummed for m in store.status().models for v in m.versions):
        time.sleep(_POLL)


@dataclass
class Quiet:
    """Waits for others to leave the cores alone, and keeps how far they did.

    Attributes:
        busy: what share of the cores others used just before each sample.
        waited: seconds waited in all.
    """

    limit: float
    patience: float
    busy: list[float] = field(default_factory=list)
    waited: float = 0.0

    @classmethod
    def of(cls, settings: Settings) -> Quiet:
        return cls(settings.quiet, settings.patience)

    def __call__(self) -> None:
        """Wait for a moment that is quiet, or until patience ends. Looks for a moment even if it is zero."""
        began = time.monotonic()
        while True:
            busy = busy_share(_LOOK)
            passed = time.monotonic() - began
            if busy < self.limit or passed >= self.patience:
                break
        self.busy.append(round(busy, 3))
        self.waited += passed

    def notes(self) -> dict[str, object]:
        """For a row's notes."""
        return {"others_cpu_share": self.busy, "waited_seconds": round(self.waited, 1)}


def busy_share(seconds: float) -> float:
    """The share of all cores in use over the next `seconds`, in which this process sleeps."""
    before = _ticks()
    time.sleep(seconds)
    idle, total = (now - then for now, then in zip(_ticks(), before, strict=True))
    return 1.0 - idle / total if total else 0.0


def _ticks() -> tuple[int, int]:
    """Idle and all ticks of all cores so far; memory on its way to a disk is no use of a core."""
    with open("/proc/stat") as stat:
        counts = [int(field) for field in stat.readline().split()[1:9]]
    return counts[3] + counts[4], sum(counts)
