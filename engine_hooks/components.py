"""All components of one engine, and the three things done to their images: emptied, filled, updated.

Each leaves every component in a state that is true, also when the device fails half way. Nothing here
waits for generations; `EngineHook` calls only while none runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from engine_hooks.backend import DeviceBackend, Meanwhile, Run
from engine_hooks.component import Component
from engine_hooks.following import Changes, Held
from engine_hooks.lifecycle import Event, State
from engine_hooks.plan import runs_for, runs_of
from weightstore.errors import AttachError, UsageError
from weightstore.mapping import ArenaMapping

ALL = "weights"
"""The tag that means every component."""
_SHOWN = 5
"""Names that a message lists."""


class Components:
    """By name, in the order they were attached."""

    def __init__(self, backend: DeviceBackend, components: Iterable[Component]) -> None:
        self._backend = backend
        self._all = {component.name: component for component in components}

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {name: component.module for name, component in self._all.items()}

    @property
    def states(self) -> dict[str, State]:
        return {name: component.state for name, component in self._all.items()}

    @property
    def state(self) -> State:
        """BROKEN if any is, ASLEEP if all are, else AWAKE."""
        states = set(self.states.values())
        if State.BROKEN in states:
            return State.BROKEN
        return State.ASLEEP if states == {State.ASLEEP} else State.AWAKE

    def choose(self, tags: Iterable[str] | None) -> list[Component]:
        """Those named; None and "weights" mean all. UsageError for unknown names."""
        wanted = {ALL} if tags is None else {tags} if isinstance(tags, str) else set(tags)
        unknown = wanted - self._all.keys() - {ALL}
        if unknown:
            shown = [tag if tag.isprintable() else repr(tag) for tag in sorted(unknown)[:_SHOWN]]
            more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
            raise UsageError(
                f"no component {', '.join(shown)}{more}; attached are {', '.join(self._all)}, and {ALL!r} "
                "means all"
            )
        return [component for name, component in self._all.items() if ALL in wanted or name in wanted]

    def in_state(self, state: State) -> list[Component]:
        return [component for component in self._all.values() if component.state is state]

    def put_to_sleep(self, todo: Sequence[Component]) -> int:
        """Save engine state and give the memory back; bytes saved. Weights that were moved come back first;
        AttachError, with nothing changed, if one cannot: it would be lost, or keep its memory."""
        _refuse_moved([name for c in todo if c.awake for name in c.binding.take_back()])
        saved_before = [component for component in todo if component.engine_state.saved]
        try:
            saved = sum(component.engine_state.save(component.image.tensor()) for component in todo)
        except BaseException:
            for component in todo:
                if component not in saved_before:
                    component.engine_state.restored()  # it lives on, and goes on changing, in the image
            raise
        for component in todo:
            component.shut()
        try:
            self._backend.unmap([component.image for component in todo])
        finally:
            for component in todo:
                component.move(Event.FAILED if component.image.mapped else Event.SLEPT)
        return saved

    def fill(self, todo: Sequence[Component], held: Held, source: ArenaMapping) -> tuple[list[Run], int, int]:
        """Weights from the arena, adapters added to them, engine state from its saved copy; or nothing mapped
        that was not.

        Returns the runs copied, the number of weights that got an adapter, and the bytes of state restored.
        Raises AttachError if weights no longer lie in their image.
        """
        unmapped = [component.image for component in todo if not component.image.mapped]
        runs = [runs_of(component.layout, held.records[component.name]) for component in todo]
        images = [component.image for component in todo]
        fills = list(zip(images, runs, strict=True))
        self._backend.wake(fills, source, meanwhile=lambda: _require_bound(todo))
        try:
            merged = sum(component.adapt(component.layout.slots, held.adapters, source) for component in todo)
            restored = sum(component.engine_state.restore(component.image.tensor()) for component in todo)
        except BaseException:
            self._backend.unmap(unmapped)
            raise
        for component in todo:
            component.engine_state.restored()
            component.move(Event.WOKE)
        return [run for some in runs for run in some], merged, restored

    def missed_all(self) -> None:
        """A version came of which no image holds anything for certain."""
        for component in self._all.values():
            component.missed(None)

    def update(
        self, new: Held, changes: Changes | None, source: ArenaMapping, meanwhile: Meanwhile | None
    ) -> tuple[list[Run], int]:
        """Bring awake images to `new`, which has these changes; on failure those with something to copy are
        BROKEN. `meanwhile` as in `DeviceBackend.update`.

        Returns the runs copied and the number of weights that got an adapter. Raises AttachError, with
        nothing copied, if weights to be changed were replaced.
        """
        todo = []
        merged = 0
        for name, component in self._all.items():
            component.missed(None if changes is None else changes[name])
            runs = runs_for(component.stale_slots(), new.records[name]) if component.awake else []
            if runs:
                todo.append((component, runs))
        for component, _ in todo:
            if component.binding.moved(slot.offset for slot in component.stale_slots()):
                _refuse_moved(component.binding.take_back())
        try:
            self._backend.update([(component.image, runs) for component, runs in todo], source, meanwhile)
            for component, _ in todo:
                merged += component.adapt(component.stale_slots(), new.adapters, source)
        except BaseException:
            for component, _ in todo:
                component.move(Event.FAILED)
            raise
        for component, _ in todo:
            component.move(Event.REFITTED)
        return [run for _, runs in todo for run in runs], merged


def _require_bound(components: Iterable[Component]) -> None:
    """AttachError if somebody gave weights other memory than their image's: they would stay stale."""
    _refuse_moved([name for component in components for name in component.binding.moved()])


def _refuse_moved(moved: Sequence[str]) -> None:
    if moved:
        raise AttachError(
            f"{len(moved)} weights were replaced or changed after attach (module.to(dtype), "
            f"load_state_dict(assign=True), …) and no longer lie in their image: {', '.join(moved[:5])}; "
            "close the hook and attach again",
            moved=moved,
        )
