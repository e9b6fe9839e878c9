"""How much `python -m bench gpu` measures."""

from __future__ import annotations

from dataclasses import dataclass

from bench import manifests
from bench.shapes import cut
from weightstore.types import TensorSpec, component_of

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class GpuSettings:
    """The full run (an 80 GB GPU, 128 GiB of memory, /dev/shm of 90 GiB), or with `QUICK` a run in small.

    Attributes:
        model: whose tensors are put and woken; `main` is the component that is trained.
        limit: bytes of each component at most.
        rounds: samples of everything; `peer_rounds` of what others do, which takes long.
        peers: ways of section peers; none for all of them.
        asleep: seconds that an engine sleeps between rounds of training.
        warm_memory: bytes of host memory touched before anything is measured.
        many: (count, large, bytes of a large one, bytes of a small one at most) of the tensors of a model
            that is mostly small tensors.
    """

    model: str = "flux1-dev"
    main: str = "transformer"
    limit: int = 64 * GIB
    rounds: int = 5
    peer_rounds: int = 1
    peers: tuple[str, ...] = ()
    asleep: float = 2.0
    window: int = GIB
    warm_memory: int = 88 * GIB
    many: tuple[int, int, int, int] = (5000, 600, 30 * MIB, 64 << 10)

    def specs(self, whole: bool) -> list[TensorSpec]:
        """The tensors of the main component, or of the whole model."""
        parts: dict[str, list[TensorSpec]] = {}
        for spec in manifests.load(self.model):
            parts.setdefault(component_of(spec.name), []).append(spec)
        chosen = parts if whole else [self.main]
        return [spec for component in chosen for spec in cut(parts[component], self.limit)]


QUICK = GpuSettings(
    limit=24 * MIB,
    rounds=2,
    peer_rounds=1,
    asleep=0.1,
    window=16 * MIB,
    warm_memory=0,
    many=(200, 20, MIB, 64 << 10),
)
