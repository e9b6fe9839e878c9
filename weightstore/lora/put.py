"""The two ways a trainer's adapter gets into a refit: merged into weights, or as adapter tensors.

Invariant: an adapter is added once, to weights of a version without adapters. Whatever would add it to merged
weights, or leave adapters of an earlier step beside it, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import torch

from weightstore.errors import CastRefused, UsageError
from weightstore.lora.merge import merged
from weightstore.lora.state_dict import Module, read_adapter
from weightstore.lora.stored import ROLES, WEIGHTS, adapter_names, tensor_name
from weightstore.lora.targets import Update, updates_of
from weightstore.names.name_map import NameMap
from weightstore.names.rows import Stored
from weightstore.tensors import NAMES
from weightstore.types import TensorSpec, component_of

if TYPE_CHECKING:
    from weightstore.reader import Lease


class Refitting(NamedTuple):
    """What these functions need of a refit.

    Attributes:
        stored: what it writes into.
        names: its name map.
        rank, world_size: this writer; each of several does its share.
        reserve: places for tensors to come, in one round trip.
        write: writes whole tensors under stored names.
        lease: of a tag of the same model.
    """

    stored: Stored
    names: NameMap | None
    rank: int
    world_size: int
    reserve: Callable[[Iterable[TensorSpec]], object]
    write: Callable[[Sequence[tuple[str, torch.Tensor]]], object]
    lease: Callable[[str], Lease]


class Given(NamedTuple):
    """An adapter as a trainer has it; see `Refit.put_lora`."""

    state_dict: Mapping[str, Any]
    config: Any
    alpha: float | str | None
    prefix: str
    adapter: str | None
    dtype: torch.dtype

    def modules(self) -> list[Module]:
        """Raises UsageError, InvalidTensor."""
        if NAMES.get(self.dtype) not in WEIGHTS:
            raise UsageError(
                f"dtype is what sums are computed in: {', '.join(sorted(WEIGHTS))}, not {self.dtype}"
            )
        return read_adapter(self.state_dict, self.config, self.alpha, self.adapter)


def put_lora(into: Refitting, given: Given, base_tag: str, device: torch.device | str | None) -> list[str]:
    """Write base + scale · B·A for every weight that the adapter is about; returns their names."""
    modules = given.modules()
    with into.lease(base_tag) as base:
        what = f"{into.stored.what}, LoRA on version {base.version} ({base_tag!r})"
        if adapter_names(base.records):
            raise UsageError(
                f"{what}: that version holds adapters itself, so it is no pristine base; give the tag "
                "of one without"
            )
        place = msgspec.structs.replace(into.stored, what=what, records=base.records)
        updates = updates_of(modules, into.names, given.prefix, place, given.dtype)
        _refuse_beside(into.stored, what, updates)
        own = updates[into.rank :: into.world_size]
        records = [base.records[update.target] for update in own]
        into.reserve([TensorSpec(r.name, r.dtype, r.shape, r.stride) for r in records])
        where = _device(device, modules)
        for target, a, b, scale in own:
            weight = merged(base[target], a, b, scale, given.dtype, where)
            if weight.dtype is torch.float16 and bool(torch.isinf(weight).any()):
                raise CastRefused(
                    f"{what}: {target} would exceed the largest float16; is its scale of {scale:g} right?",
                    overflow=[target],
                )
            into.write([(target, weight)])
    return [update.target for update in updates]


def put_adapter(into: Refitting, given: Given) -> list[str]:
    """Write A, B and scale for every weight that the adapter is about; returns the names of the weights."""
    if into.stored.closed:
        raise UsageError(
            f"{into.stored.what}: adapters are tensors that its base need not have; open the refit with "
            'partial=True, extend=True and base="ref"'
        )
    modules = given.modules()
    place = msgspec.structs.replace(into.stored, components=None)
    updates = updates_of(modules, into.names, given.prefix, place, given.dtype)
    dtype = NAMES[given.dtype]
    names = {tensor_name(update.target, dtype, role) for update in updates for role in ROLES}
    _refuse_beside(into.stored, into.stored.what, updates, names)
    items = []
    for update in updates:
        scale = torch.tensor(update.scale, dtype=torch.float64)
        for role, tensor in zip(ROLES, (update.a, update.b, scale), strict=True):
            items.append((tensor_name(update.target, dtype, role), tensor.contiguous()))
    into.write(items[into.rank :: into.world_size])
    return [update.target for update in updates]


def _refuse_beside(
    stored: Stored, what: str, updates: Sequence[Update], rewritten: Iterable[str] = ()
) -> None:
    """UsageError if the version to come would hold adapters for these components that are not `rewritten`."""
    components = {component_of(update.target) for update in updates}
    # lora.<dtype>.<component>.…
    left = [
        name
        for name in adapter_names(stored.records)
        if component_of(name.split(".", 2)[-1]) in components and name not in rewritten
    ]
    if left:
        raise UsageError(
            f"{what}: the version that the refit starts from has {len(left)} adapter tensors ({left[0]}, …) "
            'that would be added as well; start from one without: store.refit(…, base="ref")',
            adapters=left,
        )


def _device(device: torch.device | str | None, modules: Sequence[Module]) -> torch.device:
    """Where to compute: as asked, else where the adapter is, else on a GPU if there is one."""
    if device is not None:
        return torch.device(device)
    own = modules[0].b.device
    return torch.device("cuda") if own.type == "cpu" and torch.cuda.is_available() else own
