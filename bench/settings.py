"""How much `python -m bench host` measures."""

from __future__ import annotations

from dataclasses import dataclass

from bench import manifests
from bench.shapes import cut
from weightstore.types import TensorSpec

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """The full run, or with `QUICK` one that only shows that everything works.

    Attributes:
        model, components: whose first tensors are put, woken and loaded, in their real shapes.
        limit: bytes of them at most.
        rounds: samples of everything that moves those bytes.
        trips, leases, commits, starts, moves: samples of a control round trip, of lease + plan, of a commit,
            of a service start, of a tag followed.
        commit_tensors: tensors of a commit.
        engines: processes that follow one tag.
        window: the store's.
        quiet, patience: before each sample, wait until everything else on the machine uses less than `quiet`
            of its cores, but at most `patience` seconds.
    """

    model: str = "flux1-dev"
    components: tuple[str, ...] = ("transformer",)
    limit: int = 3 * GIB // 2
    rounds: int = 11
    trips: int = 3000
    leases: int = 20
    commits: int = 20
    starts: int = 10
    moves: int = 10
    commit_tensors: int = 5000
    engines: int = 64
    window: int = 256 * MIB
    quiet: float = 0.1
    patience: float = 20.0

    def specs(self) -> list[TensorSpec]:
        return cut(manifests.load(self.model, self.components), self.limit)


QUICK = Settings(
    model="sd3.5-medium",
    components=("vae",),
    limit=8 * MIB,
    rounds=2,
    trips=20,
    leases=2,
    commits=2,
    starts=1,
    moves=2,
    commit_tensors=100,
    engines=3,
    window=8 * MIB,
    patience=0.0,
)
