"""Adapters that a version holds beside its weights: which weights of an engine they are added to, and the
adding, on the engine's device.

An adapted weight's slot is first filled with the base's bytes, as any slot; then scale · B·A is added there,
in place. Weights go one by one, so that scratch stays small: the adapters of a few of them at a time, and one
block of the sum.

Invariant: what is added to a slot is added to bytes that have just come from the arena, never to a sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

import torch

from engine_hooks.plan import Layout, Slot
from weightstore.errors import DeviceMemoryError
from weightstore.lora.merge import merge, merged
from weightstore.lora.stored import Adapter
from weightstore.mapping import ArenaMapping
from weightstore.tensors import DTYPES, flat_bytes, place_of
from weightstore.types import TensorRecord

Adapters = Mapping[str, Adapter]
"""By the name of the weight they are added to."""

_STAGE: Final = 16 << 20
"""Bytes of adapters brought to a GPU at once."""
_GAP: Final = 4096
"""Bytes between two tensors that are copied along rather than making two copies of one."""


class Adapted(NamedTuple):
    """A slot and what is added to it."""

    slot: Slot
    adapter: Adapter


def adapted(slots: Iterable[Slot], adapters: Adapters) -> list[Adapted]:
    """Those of `slots` that get an adapter, in the order in which the adapters lie in the arena."""
    found = [
        Adapted(slot, adapters[name])
        for slot in slots
        for name in slot.names
        if name in adapters and slot.nbytes
    ]
    return sorted(found, key=lambda one: one.adapter.a.offset)


def unadapted(slots: Iterable[Slot], adapters: Adapters) -> list[Slot]:
    """Those of `slots` that hold the arena's own bytes."""
    return [slot for slot in slots if not any(name in adapters for name in slot.names)]


def readapted_slots(layout: Layout, old: Adapters, new: Adapters) -> list[Slot]:
    """The slots whose adapter is another in `new`. Sound only for versions that were alive at one moment, as
    `plan.changed_slots`."""
    names = {name for name in old.keys() | new.keys() if not _same(old.get(name), new.get(name))}
    if not names:
        return []
    return [slot for slot in layout.slots if any(name in names for name in slot.names)]


def _same(one: Adapter | None, other: Adapter | None) -> bool:
    return other is None if one is None else one.same_bytes(other)


def add(image: torch.Tensor, layout: Layout, todo: Sequence[Adapted], source: ArenaMapping) -> None:
    """Add adapters to slots of `image`, a mapped uint8 tensor, that hold the base's bytes. Returns when
    kernels launched from now on, on any stream, see the sums.

    Raises:
        DeviceMemoryError: no room for the scratch.
    """
    if not todo:
        return
    with _computing(image.device):
        for (slot, adapter), a, b, scale in _staged(todo, source, image.device):
            merge(_weight(image, layout, slot), a, b, scale, DTYPES[adapter.dtype])


def differing(
    image: torch.Tensor,
    todo: Sequence[Adapted],
    records: Mapping[str, TensorRecord],
    source: ArenaMapping,
) -> list[Slot]:
    """The slots whose bytes are not those of a sum computed anew, on the same device, from the arena's base.

    Raises:
        DeviceMemoryError: no room for the scratch, which is one weight more than `add` needs.
    """
    wrong: list[Slot] = []
    if not todo:
        return wrong
    with _computing(image.device):
        for (slot, adapter), a, b, scale in _staged(todo, source, image.device):
            base = place_of(source, records[adapter.target])
            expected = merged(base, a, b, scale, DTYPES[adapter.dtype], image.device)
            held = image[slot.offset : slot.offset + slot.nbytes]
            if not torch.equal(held.view(torch.int16), flat_bytes(expected).view(torch.int16)):
                wrong.append(slot)
    return wrong


def _weight(image: torch.Tensor, layout: Layout, slot: Slot) -> torch.Tensor:
    """The slot as the tensor it holds."""
    record = layout.records[slot.names[0]]
    flat = image[slot.offset : slot.offset + slot.nbytes].view(DTYPES[record.dtype])
    return flat.as_strided(record.shape, record.stride)


@contextmanager
def _computing(device: torch.device) -> Iterator[None]:
    """Around work on `device`, all of which has been done at the end."""
    with torch.inference_mode(False), torch.no_grad():
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device):
            try:
                yield
            except torch.OutOfMemoryError as error:
                free, total = torch.cuda.mem_get_info(device)
                raise DeviceMemoryError(
                    f"no room on {device} to add adapters: {free} of {total} bytes are free ({error}). Free "
                    "memory and wake again",
                    free=free,
                    total=total,
                ) from error
            finally:
                torch.cuda.synchronize(device)


def _staged(
    todo: Sequence[Adapted], source: ArenaMapping, device: torch.device
) -> Iterator[tuple[Adapted, torch.Tensor, torch.Tensor, float]]:
    """Each with its A and B, readable on `device`, and its scale."""
    for batch in _batches(todo, _STAGE):
        chunks = [] if device.type == "cpu" else _chunks(batch, source, device)
        for one in batch:
            pair = [_view(record, chunks, source) for record in (one.adapter.a, one.adapter.b)]
            yield one, pair[0], pair[1], float(place_of(source, one.adapter.scale))


def _batches(todo: Sequence[Adapted], nbytes: int) -> Iterator[list[Adapted]]:
    """In order, with at most `nbytes` of adapters each, if one alone has not more."""
    batch: list[Adapted] = []
    room = nbytes
    for one in todo:
        size = one.adapter.a.nbytes + one.adapter.b.nbytes
        if batch and size > room:
            yield batch
            batch, room = [], nbytes
        batch.append(one)
        room -= size
    if batch:
        yield batch


def _chunks(
    batch: Sequence[Adapted], source: ArenaMapping, device: torch.device
) -> list[tuple[int, torch.Tensor]]:
    """The batch's A and B on the device, in as few copies as their places allow: arena offsets and bytes."""
    records = sorted((r for _, adapter in batch for r in (adapter.a, adapter.b)), key=lambda r: r.offset)
    ranges: list[list[int]] = []
    for record in records:
        if ranges and record.offset - ranges[-1][1] <= _GAP:
            ranges[-1][1] = max(ranges[-1][1], record.offset + record.nbytes)
        else:
            ranges.append([record.offset, record.offset + record.nbytes])
    return [(start, source.tensor[start:end].to(device)) for start, end in ranges]


def _view(
    record: TensorRecord, chunks: Sequence[tuple[int, torch.Tensor]], source: ArenaMapping
) -> torch.Tensor:
    for start, chunk in chunks:
        at = record.offset - start
        if 0 <= at and at + record.nbytes <= chunk.numel():
            flat = chunk[at : at + record.nbytes].view(DTYPES[record.dtype])
            return flat.as_strided(record.shape, record.stride)
    return place_of(source, record)
