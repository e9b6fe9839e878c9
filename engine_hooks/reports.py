"""What the hook's methods answer: what was done, and what was measured while doing it.

Bytes named freed, residual or mapped are measured with `DeviceBackend.memory_in_use` before and after;
bytes named copied are what was handed to the copy engine. `merged` counts weights that an adapter was added
to on the device. Seconds are wall-clock seconds.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttachReport:
    """`published`: the store lacked the model and got it from these modules. `restrided`: weights that had
    another memory order in the modules than in the version, and now have the version's."""

    version: int
    published: bool
    components: tuple[str, ...]
    tensors: int
    weight_bytes: int
    state_bytes: int
    copied_bytes: int
    merged: int
    runs: int
    restrided: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class SleepReport:
    """`slept` now, `already` asleep before. `freed_bytes` is measured, `image_bytes` is what was unmapped;
    `residual_bytes` is still in use afterwards, by whatever else the process or device holds."""

    slept: tuple[str, ...]
    already: tuple[str, ...]
    freed_bytes: int
    residual_bytes: int
    image_bytes: int
    saved_bytes: int
    drain_seconds: float
    seconds: float


@dataclass(frozen=True)
class WakeReport:
    """`woken` now, `already` awake before. `changed` names the weights that may differ from what their
    component held before it slept: exactly those that do if only refits of an awake engine came between,
    all of the component's if a newer version came while everything slept, none if none came."""

    woken: tuple[str, ...]
    already: tuple[str, ...]
    version: int
    changed: tuple[str, ...]
    copied_bytes: int
    merged: int
    restored_bytes: int
    mapped_bytes: int
    runs: int
    seconds: float


@dataclass(frozen=True)
class RefitReport:
    """`changed` names the weights copied into awake components; a sleeping one gets its at wake.
    `asleep`: every component sleeps, so the newest version was only noted."""

    version: int
    previous: int
    asleep: bool
    changed: tuple[str, ...]
    copied_bytes: int
    merged: int
    runs: int
    drain_seconds: float
    seconds: float


@dataclass(frozen=True)
class VerifyReport:
    """`differing`: weights whose bytes on the device are not the version's. `recomputed`: how many of those
    compared are sums of base and adapter, and were compared with the sum computed anew. `moved`: tensors that
    somebody gave other memory since attach, so that the image no longer reaches them. `skipped`: components
    asleep."""

    version: int
    components: tuple[str, ...]
    skipped: tuple[str, ...]
    compared_bytes: int
    recomputed: int
    differing: tuple[str, ...]
    moved: tuple[str, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.differing and not self.moved
