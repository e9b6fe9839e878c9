"""From a trainer's tensors to places in the arena: the one way bytes get there.

Invariants:
- every copy of a source tensor into the arena goes through `copy_all`;
- what is tied in the arena gets its bytes once: other names of the same extent are compared, not written.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

import torch

from weightstore.bulk import Span, copy_spans
from weightstore.cuda.uploads import uploads_into
from weightstore.ledger import Ledger
from weightstore.mapping import ArenaMapping
from weightstore.sharding import slices
from weightstore.sources import Part, Source
from weightstore.tensors import DTYPES, place_of, same_bits
from weightstore.types import Box, TensorRecord, is_dense

AT_ONCE = 128
"""CUDA tensors handed over together: their copies are one request to the driver."""


def ties_that_differ(
    sources: Sequence[Source], ledger: Ledger, mapping: ArenaMapping, drain: Callable[[], None]
) -> dict[str, str]:
    """Sources that share their bytes in the store with another name, whose bits differ: name → other.

    The other may be in the same call or written earlier; `drain` waits until earlier copies have landed.
    """
    first: dict[Hashable, Source] = {}
    differing: dict[str, str] = {}
    for source in sources:
        earlier, expected = ledger.item(source.name), ledger.expected(source.name)
        other = first.setdefault(ledger.tie(source.name), source)
        if earlier is not None:
            drain()
            if not _same(source.tensor, place_of(mapping, earlier.record), expected):
                differing[source.name] = earlier.record.name
        elif other is not source and (source.tied_to or source.name) != (other.tied_to or other.name):
            if not _same(source.tensor, other.tensor, expected):
                differing[source.name] = other.name
    return differing


def _same(a: torch.Tensor, b: torch.Tensor, stored: TensorRecord | None) -> bool:
    """Whether both have the same bits once they are of the stored dtype."""
    dtype = a.dtype if stored is None else DTYPES[stored.dtype]
    if a.shape != b.shape or (stored is None and a.dtype != b.dtype):
        return False
    return same_bits(a.detach().to(dtype), b.detach().to(dtype))


def parts_once(
    parts: Iterable[Part], ledger: Ledger, mapping: ArenaMapping, drain: Callable[[], None]
) -> list[Part]:
    """`parts` without those that are there under a tied name, bit for bit: in the same call or earlier."""
    first: dict[tuple[Hashable, Box], Part] = {}
    once = []
    for part in parts:
        name, whole = part.name, part.whole
        if whole is not None and whole.alias_of is not None and ledger.expected(name) is None:
            name = whole.alias_of  # they will be tied once they have a place
        other = first.setdefault((ledger.tie(name), part.box), part)
        earlier, expected = ledger.item(part.name), ledger.expected(part.name)
        if other is not part and other.name != part.name:
            there = _same(part.tensor, other.tensor, expected)
        elif earlier is not None and part.name not in earlier.names and part.box in earlier.boxes:
            drain()
            there = _same(part.tensor, place_of(mapping, earlier.record)[slices(part.box)], expected)
        else:
            there = False
        if not there:
            once.append(part)
    return once


def copy_all(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], mapping: ArenaMapping) -> None:
    """Copy each source into its place: pairs of (place in `mapping`, source), equal in shape.

    Either may have any stride; equal dense layouts, the usual case, are copied as bytes at memory speed. A
    source of another dtype is cast as ``source.to(dtype)`` does, on its device, with bounded scratch.
    Returns when the bytes of CPU tensors have landed; those of CUDA tensors are on their way until
    `weightstore.cuda.uploads.drain_uploads` returns, and the sources may be overwritten by work submitted
    later to the current stream.
    """
    with torch.no_grad():
        on_device = []
        alike: list[Span] = []
        for place, source in pairs:
            if source.device.type == "cuda":
                on_device.append((place, source))
                if len(on_device) == AT_ONCE:  # under way while the next places are looked up
                    uploads_into(mapping).put_all(on_device)
                    on_device = []
            elif place.dtype == source.dtype and same_layout(place, source):
                nbytes = source.numel() * source.element_size()
                alike.append(Span(len(alike), place.data_ptr(), source.data_ptr(), nbytes))
            else:
                place.copy_(source)
        if on_device:
            uploads_into(mapping).put_all(on_device)
        start = mapping.address
        copy_spans(alike, before=lambda span: mapping.prefault(span.target - start, span.nbytes))


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Of two tensors of equal shape: do both hold the same elements in the same order, without gaps?"""
    if a.is_contiguous() and b.is_contiguous():
        return True
    return a.stride() == b.stride() and is_dense(a.shape, a.stride())
