"""What the hook's methods answer: what was done, and what was measured while doing it.

Bytes named freed, residual or mapped are measured with `DeviceBackend.memory_in_use` before and after;
bytes named copied are what was handed to the copy engine. `merged` counts weights that an adapter was added
to on the device. Seconds are wall-clock seconds. ``str(report)`` is one short line, however many weights
there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from weightstore.sizes import format_size

_SHOWN: Final = 5


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

    def __str__(self) -> str:
        whence = "published as" if self.published else "attached to"
        return (
            f"{', '.join(self.components)} {whence} version {self.version} in {self.seconds:.3g} s: "
            f"{format_size(self.copied_bytes)} copied, {format_size(self.state_bytes)} of engine state"
        )


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

    def __str__(self) -> str:
        if not self.slept:
            return f"{', '.join(self.already) or 'nothing'} slept already"
        return (
            f"{', '.join(self.slept)} asleep in {self.seconds:.3g} s: {format_size(self.freed_bytes)} freed, "
            f"{format_size(self.residual_bytes)} still in use, {format_size(self.saved_bytes)} of engine "
            "state saved"
        )


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

    def __str__(self) -> str:
        if not self.woken:
            return f"{', '.join(self.already) or 'nothing'} awake already, on version {self.version}"
        return (
            f"{', '.join(self.woken)} awake on version {self.version} in {self.seconds:.3g} s: "
            f"{format_size(self.copied_bytes)} copied, {_weights(self.changed)} may have changed"
        )


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

    def __str__(self) -> str:
        if self.asleep:
            return f"asleep; a wake brings version {self.version}"
        if self.version == self.previous:
            return f"on version {self.version} already"
        return (
            f"from version {self.previous} to {self.version} in {self.seconds:.3g} s: "
            f"{_weights(self.changed)} changed, {format_size(self.copied_bytes)} copied"
        )


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

    def __str__(self) -> str:
        seen = f"version {self.version}, {format_size(self.compared_bytes)} of {', '.join(self.components)}"
        if self.ok:
            return f"{seen}: equal, bit for bit"
        differing = f"{_weights(self.differing)} differ{_few(self.differing)}"
        return f"{seen}: {differing}; {len(self.moved)} moved{_few(self.moved)}"


def _weights(names: Sequence[str]) -> str:
    return f"{len(names)} weight{'' if len(names) == 1 else 's'}"


def _few(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''})" if names else ""
