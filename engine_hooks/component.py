"""One component of an engine: its modules' tensors, its image and where it is in its life.

Invariant: forwards are let through exactly while the component is AWAKE.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from engine_hooks import adapters
from engine_hooks.adapters import Adapters
from engine_hooks.backend import DeviceBackend, Image
from engine_hooks.binding import Binding
from engine_hooks.guard import Guard
from engine_hooks.lifecycle import Event, State, advance
from engine_hooks.plan import Records, Slot, runs_for, slot_runs
from engine_hooks.state import EngineState
from engine_hooks.survey import Survey
from weightstore.mapping import ArenaMapping


class Component:
    """Born ASLEEP, with its tensors still where the modules had them."""

    def __init__(self, surveyed: Survey, image: Image, module: nn.Module) -> None:
        self.name = surveyed.component
        self.layout = surveyed.layout
        self.image = image
        self.binding = Binding(surveyed, image.tensor())
        self.engine_state = EngineState(surveyed.state_offset, surveyed.nbytes - surveyed.state_offset)
        self.tensors = len(surveyed.members)
        # Slots that changed in versions the image missed, by offset; None means that any may have.
        self._stale: dict[int, Slot] | None = {}
        self._module = module
        self._guard: Guard | None = None
        self._state = State.ASLEEP

    @property
    def module(self) -> nn.Module:
        return self._module

    @property
    def state(self) -> State:
        return self._state

    @property
    def asleep(self) -> bool:
        return self._state is State.ASLEEP

    @property
    def awake(self) -> bool:
        return self._state is State.AWAKE

    def move(self, event: Event) -> None:
        """Follow the table of `lifecycle`; the guard follows the state."""
        self._state = advance(self._state, event, self.name)
        if self._guard is None:
            self._guard = Guard(self.name, self._module)
        if self.awake:
            self._guard.open()
        else:
            self._guard.shut(self._state)

    def shut(self) -> None:
        """Refuse forwards already, because the memory is about to go."""
        if self._guard is not None:
            self._guard.shut(State.ASLEEP)

    def missed(self, slots: Iterable[Slot] | None) -> None:
        """A version came that the image lacks, in which these slots changed (None: any may have)."""
        if slots is None:
            self._stale = None
        elif self._stale is not None:
            self._stale.update((slot.offset, slot) for slot in slots if slot.nbytes)

    def stale_slots(self) -> list[Slot]:
        """The slots that may differ between what the image held last and the newest version it missed, by
        rising offset."""
        if self._stale is None:
            return [slot for slot in self.layout.slots if slot.nbytes]
        return [slot for _, slot in sorted(self._stale.items())]

    def caught_up(self) -> list[str]:
        """The image holds the newest version: raise autograd's version of what changed; returns the names."""
        changed = self.stale_slots()
        self.binding.mark_changed(slot.offset for slot in changed)
        self._stale = {}
        return [name for slot in changed for name in slot.names]

    def adapt(self, slots: Iterable[Slot], added: Adapters, source: ArenaMapping) -> int:
        """Add adapters to those of these slots that have one, and return how many have. The slots hold the
        base's bytes."""
        todo = adapters.adapted(slots, added)
        adapters.add(self.image.tensor(), self.layout, todo, source)
        return len(todo)

    def leave(self, keep_weights: bool) -> None:
        """Move the tensors out of the image, which may then be freed, and take the guard away."""
        with torch.inference_mode(False), torch.no_grad():
            self.binding.leave(keep_weights, self.engine_state.current(self.image.tensor()))
        if self._guard is not None:
            self._guard.remove()

    def differing(
        self, backend: DeviceBackend, records: Records, added: Adapters, source: ArenaMapping
    ) -> tuple[list[str], int]:
        """Names of weights whose bytes in the image are not the version's, and how many are sums.

        What has no adapter is compared with the arena. What has one is compared with the sum of base and
        adapter, computed anew from the arena on the same device.
        """
        plain = adapters.unadapted(self.layout.slots, added)
        sums = adapters.adapted(self.layout.slots, added)
        wrong = self._unlike_the_arena(backend, plain, records, source)
        wrong += adapters.differing(self.image.tensor(), sums, records, source)
        return [name for slot in wrong for name in slot.names], len(sums)

    def _unlike_the_arena(
        self, backend: DeviceBackend, slots: list[Slot], records: Records, source: ArenaMapping
    ) -> list[Slot]:
        """Whole runs are compared first, at copy speed; only where one differs its tensors are, one by one,
        since the padding between tensors means nothing."""
        unequal = backend.differing(self.image, runs_for(slots, records), source)
        if not unequal:
            return []
        suspects = [
            (slot, run)
            for slot, run in slot_runs(slots, records)
            if any(bad.target <= run.target < bad.target + bad.nbytes for bad in unequal)
        ]
        bad_runs = set(backend.differing(self.image, [run for _, run in suspects], source))
        return [slot for slot, run in suspects if run in bad_runs]
