"""From a trainer's tensors to places in the arena: what is put, and the one way bytes get there.

Invariants:
- every copy of a source tensor into the arena goes through `copy_all`;
- what is tied in the arena gets its bytes once: other names of the same extent are compared, not written.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
import torch

from weightstore.bulk import Span, copy_spans
from weightstore.cuda.uploads import uploads_into
from weightstore.errors import CoverageError
from weightstore.ledger import Ledger
from weightstore.mapping import ArenaMapping
from weightstore.tensors import NAMES, as_tensor, place_of, same_bits, spec_of
from weightstore.types import Box, TensorSpec, is_dense


class Source(msgspec.Struct, frozen=True, gc=False):
    """A tensor to be written under `name`. `tied_to` names an earlier one of the same call over the very
    same memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    tensor: torch.Tensor
    tied_to: str | None

    def spec(self) -> TensorSpec:
        return spec_of(self.name, self.tensor, self.tied_to)


class Part(msgspec.Struct, frozen=True, gc=False):
    """A tensor to be written to `box` of the tensor `name`. `whole` describes all of that one; it is needed
    where the base lacks it and no place was reserved for it."""

    name: str
    dtype: str
    box: Box
    tensor: torch.Tensor
    whole: TensorSpec | None = None

    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(lo, hi) for lo, hi in zip(self.box.lo, self.box.hi, strict=True))


def sources_of(items: Iterable[tuple[str, Any]]) -> list[Source]:
    """Look at every tensor of one call before any is written.

    Raises:
        InvalidTensor: see `tensors.as_tensor`.
        CoverageError: a name given twice.
    """
    sources: dict[str, Source] = {}
    by_address: dict[int, list[Source]] = {}
    for name, value in items:
        if name in sources:
            raise CoverageError(
                f"tensor {name!r} is given twice in one call; nothing was written", duplicate=[name]
            )
        tensor = as_tensor(name, value)
        shape = tuple(tensor.shape)
        tied_to = None
        # The tensors are alive until the copies are done, so equal addresses mean shared memory.
        alike = by_address.setdefault(tensor.data_ptr(), []) if 0 not in shape else []
        for other in alike:
            if _same_memory(tensor, other.tensor):
                tied_to = other.name
                break
        source = Source(name, NAMES[tensor.dtype], shape, tensor, tied_to)
        sources[name] = source
        if tied_to is None:
            alike.append(source)
    return list(sources.values())


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Of two tensors at one address: do they show the same elements?"""
    return (a.dtype, a.shape, a.stride(), a.device) == (b.dtype, b.shape, b.stride(), b.device)


def module_tensors(module: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and persistent buffer of `module` under its state_dict name, ties under each of
    their names."""
    for path, part in module.named_modules(remove_duplicate=False):
        lead = f"{prefix}{path}." if path else prefix
        for name, parameter in part._parameters.items():
            if parameter is not None:
                yield lead + name, parameter
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield lead + name, buffer


def ties_that_differ(
    sources: Sequence[Source], ledger: Ledger, mapping: ArenaMapping, drain: Callable[[], None]
) -> dict[str, str]:
    """Sources that share their bytes in the store with another name, whose bits differ: name → other.

    The other may be in the same call or written earlier; `drain` waits until earlier copies have landed.
    """
    first: dict[Hashable, Source] = {}
    differing: dict[str, str] = {}
    for source in sources:
        earlier = ledger.item(source.name)
        other = first.setdefault(ledger.tie(source.name), source)
        if earlier is not None:
            drain()
            if not _same(source.tensor, place_of(mapping, earlier.record)):
                differing[source.name] = earlier.record.name
        elif other is not source and (source.tied_to or source.name) != (other.tied_to or other.name):
            if not _same(source.tensor, other.tensor):
                differing[source.name] = other.name
    return differing


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and same_bits(a, b)


def parts_once(parts: Iterable[Part], ledger: Ledger) -> list[Part]:
    """`parts` without those that are already there under a tied name, bit for bit."""
    first: dict[tuple[Hashable, Box], Part] = {}
    once = []
    for part in parts:
        other = first.setdefault((ledger.tie(part.name), part.box), part)
        if other.name == part.name or not _same(part.tensor, other.tensor):
            once.append(part)
    return once


def copy_all(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], mapping: ArenaMapping) -> None:
    """Copy each source into its place: pairs of (place in `mapping`, source), equal in shape and dtype.

    Either may have any stride; equal dense layouts, the usual case, are copied as bytes at memory speed.
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
            elif _same_layout(place, source):
                nbytes = source.numel() * source.element_size()
                alike.append(Span(len(alike), place.data_ptr(), source.data_ptr(), nbytes))
            else:
                place.copy_(source)
        if on_device:
            uploads_into(mapping).put_all(on_device)
        copy_spans(alike)


def _same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Of two tensors of equal shape: do both hold the same elements in the same order, without gaps?"""
    if a.is_contiguous() and b.is_contiguous():
        return True
    return a.stride() == b.stride() and is_dense(a.shape, a.stride())
