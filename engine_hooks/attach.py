"""Attaching: a version to hold, a device, and modules moved into images on it.

Invariant: until everything has succeeded nothing about the modules has changed; on any failure the lease
is released, the images are freed and the modules are as before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import nn

from engine_hooks.adapters import Adapters
from engine_hooks.backend import DeviceBackend
from engine_hooks.component import Component
from engine_hooks.following import Following
from engine_hooks.guard import taken
from engine_hooks.host import HostBackend
from engine_hooks.lifecycle import Event
from engine_hooks.plan import matcher, runs_of
from engine_hooks.reports import AttachReport
from engine_hooks.survey import Survey, publishable, survey
from weightstore.errors import (
    AttachError,
    DependencyMissing,
    DeviceError,
    RefitConflict,
    StoreTimeout,
    UnknownModel,
    UsageError,
)
from weightstore.lora.stored import COMPONENT as ADAPTERS
from weightstore.mapping import ArenaMapping
from weightstore.names import AS_STORED
from weightstore.types import ALIGN, check_name

if TYPE_CHECKING:
    from weightstore.client import Store
    from weightstore.reader import Lease, Places

_RETRY_SECONDS = 5.0
"""How long to wait for another engine's publication before looking whether it gave up."""

_log = logging.getLogger("engine_hooks")


@dataclass(frozen=True)
class Attached:
    """What an `EngineHook` is made of; the components are AWAKE."""

    backend: DeviceBackend
    following: Following
    components: list[Component]
    report: AttachReport


def attach(
    store: Store,
    model: str,
    modules: Mapping[str, nn.Module],
    device: str | torch.device,
    tag: str,
    ignore: Sequence[str],
    publish_timeout: float,
    backend: DeviceBackend | None,
) -> Attached:
    """All of it; see `EngineHook.attach`."""
    began = time.perf_counter()
    modules = check_components(modules)
    if backend is None:
        backend = make_backend(device)
    lease = None
    try:
        lease, published = lease_or_publish(store, model, tag, modules, publish_timeout)
        lease.require_readable(lease.version)
        # While the modules are looked at.
        records = [record for record in lease.records.values() if record.component in modules]
        backend.pin_ahead(lease.mapping, [(record.offset, record.nbytes) for record in records])
        ignored = matcher(ignore)
        surveys = survey(modules, lease.records, ignored, backend.device)
        following = Following(store, lease, {name: s.layout for name, s in surveys.items()}, ignored)
        components, copied, runs, merged = move_in(
            backend, surveys, modules, following.held.adapters, lease.mapping
        )
    except BaseException:
        backend.close()
        if lease is not None:
            lease.release()
        raise
    for component in components:
        component.move(Event.WOKE)
    lease.on_places = partial(_pin_ahead, backend, frozenset(modules))
    lease.on_places(lease, lease.places)  # those that the store has told of by now
    restrided = tuple(name for s in surveys.values() for name in s.restrided)
    if restrided:
        _log.warning(
            "%d weights of %r now have version %d's memory order instead of the modules' (%s); publish them "
            "in the modules' order to keep it",
            len(restrided),
            model,
            lease.version,
            ", ".join(restrided[:3]) + (", …" if restrided[3:] else ""),
        )
    report = AttachReport(
        version=lease.version,
        published=published,
        components=tuple(modules),
        tensors=sum(component.tensors for component in components),
        weight_bytes=sum(component.layout.nbytes for component in components),
        state_bytes=sum(component.engine_state.nbytes for component in components),
        copied_bytes=copied,
        merged=merged,
        runs=runs,
        restrided=restrided,
        seconds=time.perf_counter() - began,
    )
    return Attached(backend, following, components, report)


def _pin_ahead(backend: DeviceBackend, components: frozenset[str], lease: Lease, places: Places) -> None:
    """Where the next version may come to lie is prepared while it is written, or before: else the first wake
    on it would wait. Also on the connection's thread."""
    ranges = [stretch for name, stretches in places.items() if name in components for stretch in stretches]
    if ranges:
        backend.pin_ahead(lease.mapping, ranges)


def check_components(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Raises InvalidName or AttachError for what cannot be components, or is another hook's."""
    if not isinstance(modules, Mapping):
        raise AttachError(
            f"the engine's modules are a {type(modules).__name__}; give a mapping of component name to "
            "nn.Module, as in {'transformer': pipe.transformer} (attach_pipeline takes a diffusers pipeline)"
        )
    if not modules:
        raise AttachError("there is nothing to attach: give the engine's modules by component name")
    for name, module in modules.items():
        check_name("component", name)
        if name == ADAPTERS:
            raise AttachError(
                f"component name {name!r} is taken: it holds the adapters of the other components"
            )
        if "." in name:
            raise AttachError(
                f"component name {name!r} has a dot; the component is what stands before the first dot"
            )
        if not isinstance(module, nn.Module):
            raise AttachError(f"component {name!r} is a {type(module).__name__}, not an nn.Module")
    others = [name for name, module in modules.items() if taken(module)]
    if others:
        raise AttachError(
            f"a hook that is open has {', '.join(others)} already, and two would undo each other's work: use "
            "that hook (it serves every pipeline that shares its modules), or close() it and attach then",
            components=others,
        )
    return dict(modules)


def make_backend(device: str | torch.device) -> DeviceBackend:
    """The backend for a device.

    Raises:
        DependencyMissing: a CUDA device without the CUDA extra.
        DeviceError: the device cannot be used.
        UsageError: a device type there is no backend for.
    """
    wanted = torch.device(device)
    if wanted.type == "cpu":
        return HostBackend()
    if wanted.type != "cuda":
        raise UsageError(f"no backend for device {str(device)!r}; use 'cpu' or 'cuda[:index]'")
    try:
        import_module("cuda.bindings.driver")
    except ImportError as error:
        raise DependencyMissing(
            f"device {str(device)!r} needs the CUDA bindings: pip install 'weightstore[cuda]', or for CUDA "
            f"12 what `weightstore doctor` says; without a GPU use device='cpu' ({error})"
        ) from error
    if not torch.cuda.is_available():
        raise DeviceError(
            f"device {str(device)!r}: torch {torch.__version__} sees no GPU; install a CUDA build of torch, "
            "look at CUDA_VISIBLE_DEVICES, or use device='cpu'"
        )
    from engine_hooks.cuda import CudaBackend

    return CudaBackend(wanted)


def lease_or_publish(
    store: Store, model: str, tag: str, modules: Mapping[str, nn.Module], timeout: float
) -> tuple[Lease, bool]:
    """A following lease on the tag; if the store lacks the model, it is published from the modules first.

    Of several engines that find it lacking one publishes and the others wait for it. Returns the lease
    and whether this one published.

    Raises:
        AttachError: the store lacks the model and the modules cannot provide it.
        StoreTimeout: somebody else's publication did not end within `timeout` seconds.
        whatever `Store.lease` and `Store.refit` raise.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            return store.lease(model, tag=tag, follow=True), False
        except UnknownModel as error:
            publishable(modules)  # or says why not, before anything is opened
            unknown = error
        try:
            with store.refit(model, tag=tag, names=AS_STORED) as refit:
                if refit.base:
                    refit.abort("the model was published meanwhile")
                    continue
                refit.put_many(publishable(modules))
            if unknown.details.get("close"):
                _log.warning(
                    "%s This engine published a new model %r; if that was a slip: `weightstore rm %s`",
                    unknown.message,
                    model,
                    model,
                )
            return store.lease(model, tag=tag, follow=True), True
        except RefitConflict:
            left = deadline - time.monotonic()
            try:
                store.wait_for(model, tag, after=0, timeout=max(0.0, min(left, _RETRY_SECONDS)))
            except StoreTimeout:
                if left <= 0:
                    raise StoreTimeout(
                        f"another process has been publishing {model!r} for over {timeout:g} s; see "
                        "`weightstore status`, or give a longer publish_timeout"
                    ) from None


def move_in(
    backend: DeviceBackend,
    surveys: Mapping[str, Survey],
    modules: Mapping[str, nn.Module],
    added: Adapters,
    source: ArenaMapping,
) -> tuple[list[Component], int, int, int]:
    """Reserve and fill the images, copy engine state there, and bind the modules' tensors to them.

    Returns the components (to be moved to AWAKE), bytes copied, runs, and the number of weights that got an
    adapter. On any failure the modules are as before; the images are the backend's to free.
    """
    components = []
    fills = []
    for name, surveyed in surveys.items():
        image = backend.reserve(max(surveyed.nbytes, ALIGN))
        components.append(Component(surveyed, image, modules[name]))
        fills.append((image, runs_of(surveyed.layout, surveyed.layout.records)))
    bound: list[Component] = []

    def bind() -> None:
        # Normal tensors, whatever mode the caller is in: inference tensors have no version to raise.
        with torch.inference_mode(False), torch.no_grad():
            for component in components:
                component.binding.bind()
                bound.append(component)

    try:
        backend.wake(fills, source, meanwhile=bind)
        with torch.inference_mode(False), torch.no_grad():
            for component in components:
                component.binding.copy_state_in()
        merged = sum(component.adapt(component.layout.slots, added, source) for component in components)
    except BaseException:
        for component in reversed(bound):
            component.binding.unbind()
        raise
    for component in components:
        component.binding.forget_origin()
    if backend.device.type == "cuda":
        torch.cuda.empty_cache()  # the old weights' memory would stay with torch's allocator
    return (
        components,
        sum(run.nbytes for _, runs in fills for run in runs),
        sum(len(runs) for _, runs in fills),
        merged,
    )
