"""What one call of a refit is to write: of each tensor given, the elements that are this writer's to write.

A tensor goes through up to three cuts before a byte of it is read: what this rank holds of it (a DTensor's
local shard), what this rank writes of that (of what several ranks hold, its share), and where a name map puts
it (a slice of a fused tensor). Each is a view of the one before; nothing is copied here.

Invariant: two names over the very same memory are tied, on every rank alike, however little a rank writes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import torch

from weightstore.dtensors import Holding, holding_of
from weightstore.errors import CoverageError, UsageError
from weightstore.sharding import is_dtensor, share, slices
from weightstore.tensors import NAMES, as_tensor, spec_of
from weightstore.types import ITEMSIZE, Box, TensorSpec, contiguous_stride, is_dense

if TYPE_CHECKING:
    from weightstore.names import Row

_SHOWN = 8


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


class Call(NamedTuple):
    """`others` are given too, but all of their elements are written by other ranks."""

    sources: list[Source]
    parts: list[Part]
    others: list[TensorSpec]


class Writers(NamedTuple):
    """Who writes: this is rank `rank` of `world_size`. What is `replicated`, each of them has whole."""

    rank: int = 0
    world_size: int = 1
    replicated: bool = False


@torch.no_grad()
def gather(
    items: Iterable[tuple[str, Any, Row | None]],
    writers: Writers | None = None,
    first_name: Callable[[str], str] = str,
) -> Call:
    """Look at every tensor of one call before any is written.

    Args:
        items: stored name, value, and the name map's row about it (None: the whole, as it is).
        writers: who writes; None for one alone.
        first_name: what all names tied to a stored name agree on.

    Raises:
        InvalidTensor: see `tensors.as_tensor` and `dtensors.holding_of`.
        CoverageError: a name given twice.
        UsageError: sharded tensors for a refit with a single writer.
    """
    call = Call([], [], [])
    writers = writers or Writers()
    seen: set[object] = set()
    ties: dict[tuple[object, ...], str] = {}
    wholes = _Wholes()
    lonely = []
    shared = writers.replicated and writers.world_size > 1
    for number, (name, value, row) in enumerate(items, 1):
        seen.add(name if row is None else (name, row))
        if len(seen) < number:
            raise CoverageError(
                f"tensor {name!r} is given twice in one call; nothing was written", duplicate=[name]
            )
        given = name if row is None or row.source is None else row.source
        kind = type(value)
        dense = kind is torch.nn.Parameter or kind is torch.Tensor or not is_dtensor(value)
        if dense and not shared and (row is None or not _is_cut(row)):
            # Nearly all tensors of nearly all trainers: what follows would make this of them, more slowly.
            call.sources.append(wholes.source(name, as_tensor(given, value)))
            continue
        holding = _holding(given, value, writers)
        if writers.world_size == 1 and not _whole(holding):
            lonely.append(given)
            continue
        _cut(call, name, row, holding, _tie(ties, name, row, holding), first_name)
    if lonely:
        shown = ", ".join(lonely[:_SHOWN]) + (", …" if len(lonely) > _SHOWN else "")
        raise UsageError(
            f"{len(lonely)} tensors are sharded over several ranks ({shown}), and this refit has a single "
            "writer: open it on every rank with the same key=, or put their .full_tensor()",
            sharded=lonely,
        )
    return call


def _is_cut(row: Row) -> bool:
    """Whether a part of what is given goes to `row`'s target, or it is a part of that."""
    return row.part is not None or row.box is not None


class _Wholes:
    """Tensors that are written as they are; of those over the very same memory all but the first are tied."""

    def __init__(self) -> None:
        self._first: dict[int, Source] = {}
        self._others: list[Source] = []

    def source(self, name: str, tensor: torch.Tensor) -> Source:
        # The tensors are alive until the copies are done, so equal addresses mean shared memory.
        address, shape = tensor.data_ptr(), tensor.shape
        first = self._first.get(address) if address else None  # an empty tensor's may be 0
        tied_to = None
        if first is not None:
            here = [first, *(other for other in self._others if other.tensor.data_ptr() == address)]
            tied_to = next((other.name for other in here if _same_memory(other.tensor, tensor)), None)
        source = Source(name, NAMES[tensor.dtype], shape, tensor, tied_to)
        if first is None:
            self._first[address] = source
        elif tied_to is None:
            self._others.append(source)
        return source


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Of two tensors that begin at the same address: do they show the same elements?"""
    return (
        0 not in one.shape
        and one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.device == other.device
    )


def _holding(name: str, value: Any, writers: Writers) -> Holding:
    if is_dtensor(value):
        holding = holding_of(name, value)
        # Where one rank writes alone, so it does what others have too.
        return holding if writers.world_size > 1 else holding._replace(replica=0, replicas=1)
    tensor = as_tensor(name, value)
    shape = tuple(tensor.shape)
    parts = [(Box((0,) * len(shape), shape), tensor)]
    replica, replicas = (writers.rank, writers.world_size) if writers.replicated else (0, 1)
    return Holding(shape, tuple(tensor.stride()), NAMES[tensor.dtype], parts, replica, replicas)


def _whole(holding: Holding) -> bool:
    return any(box.hi == holding.shape and not any(box.lo) for box, _ in holding.parts)


def _tie(ties: dict[tuple[object, ...], str], name: str, row: Row | None, holding: Holding) -> str | None:
    """An earlier name of this call that shows the same elements of the same memory."""
    if row is not None and row.box is not None:
        return None  # only a part of what is stored under `name`: the rest may differ
    for box, tensor in holding.parts[:1]:
        if tensor.numel():
            memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
            part = None if row is None else row.part
            first = ties.setdefault((*memory, holding.shape, box, part), name)
            return None if first == name else first
    return None


def _cut(
    call: Call,
    name: str,
    row: Row | None,
    holding: Holding,
    tied_to: str | None,
    first_name: Callable[[str], str],
) -> None:
    """Enter into `call` what this rank writes of one tensor."""
    shape = _target_shape(row, holding)
    written = False
    for held, tensor in holding.parts:
        key = first_name(tied_to or name)
        box = share(held, ITEMSIZE[holding.dtype], holding.replica, holding.replicas, key)
        if box is None:
            continue
        source, target = box, box
        if row is not None and _is_cut(row):
            placed = row.place(box)
            if placed is None:
                continue
            source, target = placed
        written = True
        piece = tensor if source == held else tensor[slices(source, held.lo)]
        if target.hi == shape and not any(target.lo):
            call.sources.append(Source(name, holding.dtype, shape, piece, tied_to))
        else:
            whole = TensorSpec(name, holding.dtype, shape, _stride(shape, holding), tied_to)
            call.parts.append(Part(name, holding.dtype, target, piece, whole))
    if not written:
        call.others.append(TensorSpec(name, holding.dtype, shape, _stride(shape, holding)))


def _target_shape(row: Row | None, holding: Holding) -> tuple[int, ...]:
    """The shape of the stored tensor."""
    if row is None or not _is_cut(row):
        return holding.shape
    if row.box is not None and row.whole is not None:
        return row.whole
    assert row.part is not None
    return tuple(map(int.__sub__, row.part.hi, row.part.lo))


def _stride(shape: tuple[int, ...], holding: Holding) -> tuple[int, ...]:
    """That of the tensor given, if it can be the stored one's."""
    same = shape == holding.shape and is_dense(shape, holding.stride)
    return holding.stride if same else contiguous_stride(shape)


# -- modules ------------------------------------------------------------------------------------------


def module_tensors(module: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and persistent buffer of `module` under its state_dict name, ties under each of
    their names."""
    left: list[tuple[str, torch.nn.Module]] = [(prefix, module)]
    while left:  # by hand: this stands before the first copy, and `named_modules` is slow
        lead, part = left.pop()
        for name, parameter in part._parameters.items():
            if parameter is not None:
                yield lead + name, parameter
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield lead + name, buffer
        children = [(f"{lead}{name}.", child) for name, child in part._modules.items() if child is not None]
        left += reversed(children)


def reshard(module: torch.nn.Module) -> None:
    """Have FSDP2 show its sharded parameters: after a forward its modules may still show gathered ones, in
    the dtype it computes in. Begins no collective."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if fsdp is not None:
        for part in module.modules():
            if isinstance(part, fsdp):
                part.reshard()
