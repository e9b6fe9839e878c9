"""Places for what a refit is to write: in the order asked for, contiguous where space allows.

Invariant: what is tied shares a place, whether the base ties it or the writer declares it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from weightstore.catalog.refits import Refit
from weightstore.catalog.space import Space
from weightstore.errors import InvalidTensor
from weightstore.types import MAX_NBYTES, TensorRecord, TensorSpec, contiguous_stride, nbytes_of


def place(space: Space, refit: Refit, moved: Sequence[TensorRecord], specs: Sequence[TensorSpec]) -> None:
    """Targets of `refit` for tensors of its base (`moved`) and for new ones.

    Raises:
        NoSpace: none is left that large; nothing was changed.
        InvalidTensor: an alias of what is not there, or more bytes than can be addressed.
    """
    targets = refit.targets
    sizes, slots = _sizes_of_moved(moved)
    there = {r.name: r.nbytes for r in (*targets.values(), *moved)} if specs else {}
    more, added = _sizes_of_new(specs, there)
    if sum(sizes) + sum(more) > MAX_NBYTES:
        raise InvalidTensor(
            f"{refit.describe()} asks for {sum(sizes) + sum(more):.3g} bytes at once, more than the "
            "store can address"
        )
    extents = space.reserve([*sizes, *more])
    for old, slot in zip(moved, slots, strict=True):
        where, stride = extents[slot], old.stride or contiguous_stride(old.shape)
        targets[old.name] = TensorRecord(old.name, old.dtype, old.shape, stride, where.offset, where.nbytes)
    for spec, slot in zip(specs, added, strict=True):
        where = targets[spec.alias_of or ""].extent if slot < 0 else extents[len(sizes) + slot]
        targets[spec.name] = TensorRecord(
            spec.name, spec.dtype, spec.shape, spec.stride, where.offset, where.nbytes
        )
    refit.owned.extend(e for e in extents if e.nbytes)


def _sizes_of_moved(records: Iterable[TensorRecord]) -> tuple[list[int], list[int]]:
    """Sizes to reserve for tensors of the base that are to be written anew, and for each of them the index of
    its size. What is tied in the base stays tied."""
    tied: dict[int, int] = {}
    sizes: list[int] = []
    slots: list[int] = []
    for record in records:
        slot = tied.setdefault(record.offset, len(sizes)) if record.nbytes else len(sizes)
        if slot == len(sizes):
            raw = record.encoding == "raw"
            sizes.append(record.nbytes if raw else nbytes_of(record.dtype, record.shape))
        slots.append(slot)
    return sizes, slots


def _sizes_of_new(specs: Sequence[TensorSpec], there: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """Sizes to reserve for new tensors, and for each of them the index of its size, or of its alias's; -1 for
    an alias of a tensor that is `there` (name → nbytes).

    Raises:
        InvalidTensor: an alias of an unknown tensor, or of one with another size.
    """
    by_name = {spec.name: spec for spec in specs}
    sizes: list[int] = []
    index: dict[str, int] = {}

    def slot_of(spec: TensorSpec) -> int:
        if spec.name not in index:
            nbytes = nbytes_of(spec.dtype, spec.shape)
            if spec.alias_of is not None:
                index[spec.name] = follow(spec, spec.alias_of, nbytes)
            else:
                index[spec.name] = len(sizes)
                sizes.append(nbytes)
        return index[spec.name]

    def follow(spec: TensorSpec, target: str, nbytes: int) -> int:
        other = by_name.get(target)
        new = other is not None and other.alias_of is None
        size = nbytes_of(other.dtype, other.shape) if other is not None and new else there.get(target)
        if size is None:
            raise InvalidTensor(
                f"{spec.name!r} is declared an alias of {target!r}, which this refit does not write itself"
            )
        if size != nbytes:
            raise InvalidTensor(f"{spec.name!r} cannot share the bytes of {target!r}: their sizes differ")
        return slot_of(other) if other is not None and new else -1

    slots = [slot_of(spec) for spec in specs]
    return sizes, slots
