"""What a refit wrote, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from weightstore.sizes import format_size


@dataclass(frozen=True)
class RefitReport:
    """Of one committed refit, as this writer sees it.

    Attributes:
        version: the new version; `base` the one it was built on, 0 for none.
        tensors: names this writer wrote.
        nbytes: bytes this writer wrote; tied tensors count once.
        seconds: from opening the refit to the answer to its commit.
        unchanged: names this writer gave whose bytes are the base's and stayed there (``skip_unchanged``).
    """

    model: str
    tag: str
    version: int
    base: int
    tensors: int
    nbytes: int
    seconds: float
    unchanged: int = 0

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes per second, over all of `seconds`."""
        return self.nbytes / max(self.seconds, 1e-9) / 1e9

    def __str__(self) -> str:
        on = f" on version {self.base}" if self.base else ""
        kept = f", {self.unchanged} unchanged" if self.unchanged else ""
        return (
            f"{self.model}: {self.tag} is now version {self.version}{on}: {self.tensors} "
            f"tensor{'' if self.tensors == 1 else 's'}, {format_size(self.nbytes)} in {self.seconds:.3g} s "
            f"({self.gb_per_s:.3g} GB/s){kept}"
        )
