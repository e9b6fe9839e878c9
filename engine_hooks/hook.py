"""The engine's side of weightstore: give the device's memory back, and have the newest weights there again.

Theory of operation. The hook holds one lease that follows a tag. While any component is on the device
the lease holds exactly the version in the images, and moves on only in `refit`. When all components
sleep the lease is parked: it takes new versions by itself, so an engine that sleeps keeps no old version
alive, and wakes on the newest one even if the store died meanwhile.

Invariants:
- components that are awake all hold the same version, `EngineHook.version`;
- sleep copies no weights, and saves engine state before its memory goes;
- nothing unmaps or overwrites an image while a generation runs (see `drain`), and no forward reaches an
  image that is not there (see `guard`).

Methods are serialised by a lock and may be called from any thread. Compiled code and CUDA graphs stay
valid, since addresses never change.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import nn

from engine_hooks.attach import Attached, attach
from engine_hooks.backend import DeviceBackend, Run
from engine_hooks.callbacks import Callback, Callbacks
from engine_hooks.component import Component
from engine_hooks.components import Components
from engine_hooks.drain import Drain
from engine_hooks.lifecycle import State, refusal
from engine_hooks.plan import total_bytes
from engine_hooks.reports import RefitReport, SleepReport, VerifyReport, WakeReport
from weightstore.errors import AttachError, EngineBroken, UsageError
from weightstore.types import DEFAULT_TAG

if TYPE_CHECKING:
    from weightstore.client import Store


class EngineHook:
    """An engine's modules on a device, bound to a model in the store. Made by `attach`.

    Attributes:
        attached: the report of `attach`.
        backend: the device backend.
        drain_timeout: seconds that `sleep` and `refit` wait for generations in flight (None: for ever).
    """

    def __init__(self, parts: Attached, drain_timeout: float | None) -> None:
        self.attached = parts.report
        self.backend: DeviceBackend = parts.backend
        self.drain_timeout = drain_timeout
        self._following = parts.following
        self._components = Components(parts.backend, parts.components)
        self._lock = threading.RLock()
        self._drain = Drain()
        self._callbacks = Callbacks()
        self._closed = False

    @classmethod
    def attach(
        cls,
        store: Store,
        model: str,
        modules: Mapping[str, nn.Module],
        *,
        device: str | torch.device = "cpu",
        tag: str = DEFAULT_TAG,
        ignore: Sequence[str] = (),
        drain_timeout: float | None = 60.0,
        publish_timeout: float = 600.0,
        backend: DeviceBackend | None = None,
    ) -> EngineHook:
        """Bind modules to the version that `tag` names, and put them on the device; they are then AWAKE.

        Parameters and buffers whose names the version has are weights and come from the arena, whatever the
        modules hold; they may be on meta. Other buffers and tensor attributes on the device are engine state
        and keep their values. If the store lacks the model it is published from the modules first. Where the
        version's memory order differs from the module's, the version's holds (and a warning names it).
        Until the end old and new weights coexist: attach from meta or the CPU if there is room for one only.

        Args:
            modules: the engine's modules by component name, the first segment of the tensors' names.
            ignore: shell-style patterns of names in the version that the modules lack on purpose.
            publish_timeout: seconds to wait for another process that is publishing the model.
            backend: a device backend to use instead of the one for `device`; from here on the hook's.

        Raises:
            AttachError: modules and version do not fit bit for bit; names every reason.
            DeviceMemoryError, DeviceError, DependencyMissing: the device.
            UnknownTag, TagTorn, StoreGone, StoreTimeout and others: the store.
        On any error the modules are as before.
        """
        parts = attach(store, model, modules, device, tag, ignore, publish_timeout, backend)
        return cls(parts, drain_timeout)

    # -- what is known -----------------------------------------------------------------------------

    @property
    def store(self) -> Store:
        return self._following.store

    @property
    def model(self) -> str:
        return self._following.model

    @property
    def tag(self) -> str:
        return self._following.tag

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The engine's modules by component name, as they were attached."""
        return self._components.modules

    @property
    def state(self) -> State:
        """BROKEN if any component is, ASLEEP if all are, else AWAKE; `states` tells them apart."""
        return self._components.state

    @property
    def states(self) -> dict[str, State]:
        return self._components.states

    @property
    def version(self) -> int:
        """The version on the device; while all sleep, the newest known, which a wake would bring."""
        return self._following.newest if self.state is State.ASLEEP else self._following.held.version

    def after_refit(self, callback: Callback) -> Callback:
        """Have `callback(changed names)` called after every wake and refit, before generations go on.

        For what the engine derives from weights and keeps outside of them (fused copies, step caches).
        `changed` is as in the reports; after a wake that brought nothing new it is empty: the same bytes are
        at the same addresses, and only what the engine itself dropped at sleep needs making again.
        If callbacks raise, the others are still called, then the first error is raised; the weights are in
        place. Returns `callback`, so it may be used as a decorator.
        """
        self._callbacks.add(callback)
        return callback

    @contextmanager
    def running(self, tags: Iterable[str] | None = None) -> Iterator[int]:
        """Around a generation: sleep and refit wait for its end. Yields the version it runs on.

        With `tags` those components must be awake, without at least one. Waits while a sleep, wake or refit
        is under way in another thread.

        Raises:
            EngineAsleep, EngineBroken: the weights are not there.
        """
        needed = self._components.choose(tags)

        def admit() -> None:
            self._check_open()
            for component in needed:
                if component.state is State.BROKEN or (tags is not None and component.asleep):
                    raise refusal(component.state, f"a generation with {component.name!r}")
            if self.state is State.ASLEEP:
                raise refusal(State.ASLEEP, "a generation")

        with self._drain.running(admit):
            yield self._following.held.version

    # -- sleep -------------------------------------------------------------------------------------

    def sleep(self, tags: Iterable[str] | None = None, *, drain_timeout: float | None = None) -> SleepReport:
        """Give the device memory of all components back, or of those named. Weights are not copied.

        Weights that were only moved since (to another memory order) are put back where they belong. A store
        that hangs is waited for, half a minute, once the memory is given back.

        Raises:
            EngineBusy: generations were still running after the timeout; nothing changed.
            AttachError: weights were replaced or changed, so that a sleep would lose them; nothing changed.
            DeviceError: the device; components whose memory did not go are BROKEN.
        """
        with self._operation() as began:
            chosen = self._components.choose(tags)
            todo = [component for component in chosen if not component.asleep]
            already = _names(component for component in chosen if component.asleep)
            if not todo:
                if self.state is State.ASLEEP and not self._following.parked:
                    self._following.park()  # a sleep before this one was interrupted when the memory had gone
                now = self.backend.memory_in_use()
                return SleepReport((), already, 0, now, 0, 0, 0.0, time.perf_counter() - began)
            with self._drained(drain_timeout) as waited:
                before = self.backend.memory_in_use()
                saved = self._components.put_to_sleep(todo)
                after = self.backend.memory_in_use()
                if self.state is State.ASLEEP:
                    self._following.park()
            return SleepReport(
                slept=_names(todo),
                already=already,
                freed_bytes=before - after,
                residual_bytes=after,
                image_bytes=sum(component.image.nbytes for component in todo),
                saved_bytes=saved,
                drain_seconds=waited,
                seconds=time.perf_counter() - began,
            )

    # -- wake --------------------------------------------------------------------------------------

    def wake(self, tags: Iterable[str] | None = None) -> WakeReport:
        """Put all components back on the device, or those named. Also mends BROKEN ones.

        If everything slept they get the newest version, else the version the others hold.

        Raises:
            TagTorn: an in-place refit of the tag has not committed.
            LeaseLost: the store no longer has what was held; attach anew.
            StoreSilent: the store is connected and hangs. (One that is gone is not needed.)
            DeviceMemoryError: too little memory. As after any error, all is as before and can be retried.
            AttachError: the newest version has other tensors than the modules, or somebody replaced those.
        """
        with self._operation() as began:
            chosen = self._components.choose(tags)
            todo = [component for component in chosen if not component.awake]
            already = _names(component for component in chosen if component.awake)
            if not todo:
                return WakeReport((), already, self.version, (), 0, 0, 0, 0, 0, time.perf_counter() - began)
            with self._drain.held_back():
                parked = self._following.parked
                held = self._following.unpark() if parked else self._following.current()
                try:
                    before = self.backend.memory_in_use()
                    runs, merged, restored = self._components.fill(todo, held, self._following.mapping)
                except BaseException:
                    if parked:
                        self._following.park()
                    raise
                if held.version != self._following.held.version:
                    self._components.missed_all()
                self._following.settle(held)
                mapped = self.backend.memory_in_use() - before
                self._callbacks.changed(_caught_up(todo))
                report = WakeReport(
                    woken=_names(todo),
                    already=already,
                    version=held.version,
                    changed=self._callbacks.untold,
                    copied_bytes=total_bytes(runs),
                    merged=merged,
                    restored_bytes=restored,
                    mapped_bytes=mapped,
                    runs=len(runs),
                    seconds=time.perf_counter() - began,
                )
                self._callbacks.tell()
            return report

    # -- refit -------------------------------------------------------------------------------------

    def refit(self, *, drain_timeout: float | None = None) -> RefitReport:
        """Take the tag's newest version: copy what changed into awake components.

        Those asleep get it at wake; if all are, nothing is copied. While the store is away that is the newest
        it has told of, and a warning says so.

        Raises:
            EngineBusy: as `sleep`; nothing changed.
            EngineBroken: a component is; wake() first.
            TagTorn, LeaseLost: as `wake`; the images keep the version they have.
            AttachError: the newest version does not fit; the images keep theirs.
            DeviceError: the copy failed half way; the components it was for are BROKEN. So they are if the
                store went away during the copy and came back with another version (LeaseLost).
        """
        with self._operation() as began:
            following = self._following
            previous = following.held
            if self.state is State.BROKEN:
                raise EngineBroken(
                    "a component is broken and cannot take a change; call wake() to fill it anew"
                )
            if not following.behind():
                following.hear()
            following.require_usable()
            asleep = self.state is State.ASLEEP
            if asleep or not following.behind():
                version = following.newest
                return RefitReport(
                    version, previous.version, asleep, (), 0, 0, 0, 0.0, time.perf_counter() - began
                )
            awake = self._components.in_state(State.AWAKE)
            runs: list[Run] = []
            merged = 0
            with self._drained(drain_timeout) as waited:
                try:
                    while following.behind():  # the store offers a version at a time
                        copied, sums = self._follow()
                        runs += copied
                        merged += sums
                        self._callbacks.changed(_caught_up(awake))
                except BaseException:
                    if self.state is State.AWAKE:  # generations go on with the steps that succeeded
                        self._callbacks.tell_on_the_way_out()
                    raise
                report = RefitReport(
                    version=self.version,
                    previous=previous.version,
                    asleep=False,
                    changed=self._callbacks.untold,
                    copied_bytes=total_bytes(runs),
                    merged=merged,
                    runs=len(runs),
                    drain_seconds=waited,
                    seconds=time.perf_counter() - began,
                )
                self._callbacks.tell()
            return report

    def _follow(self) -> tuple[list[Run], int]:
        """One step to a newer version; the runs copied, and weights that got an adapter."""
        following = self._following
        held, changes, ahead = following.step()
        if not ahead:
            before = following.held
            following.settle(held)
            try:
                return self._components.update(held, changes, following.mapping, None)
            except AttachError:
                following.settle(before)  # nothing was copied: that is what the images hold still
                raise
        # The store learns of the move, and may answer with the next offer, while the bytes are on their way.
        return self._components.update(held, changes, following.mapping, lambda: following.take(held))

    # -- verify, close -----------------------------------------------------------------------------

    def verify(self) -> VerifyReport:
        """Compare every awake component's weights on the device with the leased version, bit by bit.

        Weights that an adapter was added to are compared with the sum, computed anew from the arena.
        Whether the arena itself is sound is not looked at (`Store.verify` does that).

        Raises:
            EngineAsleep, EngineBroken: there is nothing of one version to compare.
            TagTorn, LeaseLost, DeviceError.
        """
        with self._operation() as began:
            if self.state is not State.AWAKE:
                raise refusal(self.state, "verify")
            held = self._following.current()
            awake = self._components.in_state(State.AWAKE)
            differing: list[str] = []
            recomputed = 0
            for component in awake:
                wrong, sums = component.differing(
                    self.backend, held.records[component.name], held.adapters, self._following.mapping
                )
                differing += wrong
                recomputed += sums
            return VerifyReport(
                version=held.version,
                components=_names(awake),
                skipped=_names(self._components.in_state(State.ASLEEP)),
                compared_bytes=sum(slot.nbytes for component in awake for slot in component.layout.slots),
                recomputed=recomputed,
                differing=tuple(differing),
                moved=tuple(name for component in awake for name in component.binding.moved()),
                seconds=time.perf_counter() - began,
            )

    def close(self, *, keep: bool = False, drain_timeout: float | None = None) -> None:
        """Detach: free the images, release the lease, take the guards away. Idempotent.

        With `keep` the modules keep their weights as private tensors on the device; else weights go to the
        meta device, ready to be attached again. Engine state always stays, as private tensors.

        Raises:
            EngineAsleep, EngineBroken: `keep` needs every component awake.
            EngineBusy: as `sleep`.
        """
        with self._lock:
            if self._closed:
                return
            self._callbacks.refuse_within()
            components = self._components.choose(None)
            for component in components:
                if keep and not component.awake:
                    raise refusal(component.state, f"keeping the weights of {component.name!r}")
            with self._drained(drain_timeout):
                for component in components:
                    component.leave(keep)
                self._closed = True
                self.backend.close()
                self._following.release()

    def __enter__(self) -> EngineHook:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        states = ", ".join(f"{name} {state.value}" for name, state in self.states.items())
        following = self._following
        return f"<EngineHook on {following.model!r} tag {following.tag!r} version {self.version}: {states}>"

    # -- shared steps ------------------------------------------------------------------------------

    @contextmanager
    def _operation(self) -> Iterator[float]:
        """One method at a time; yields when it began."""
        began = time.perf_counter()
        with self._lock:
            self._callbacks.refuse_within()
            self._check_open()
            yield began

    @contextmanager
    def _drained(self, timeout: float | None) -> Iterator[float]:
        with self._drain.drained(self.drain_timeout if timeout is None else timeout) as waited:
            yield waited

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this hook was closed; attach again")


def _names(components: Iterable[Component]) -> tuple[str, ...]:
    return tuple(component.name for component in components)


def _caught_up(components: Iterable[Component]) -> list[str]:
    """They hold the newest version; the names of what that changed."""
    return [name for component in components for name in component.caught_up()]
