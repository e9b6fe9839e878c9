"""Tensor records as a client receives them: decoded, and checked before anything addresses memory by them."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from msgspec.structs import astuple

from weightstore.errors import ProtocolError
from weightstore.types import ALIGN, ITEMSIZE, TensorRecord
from weightstore.wire import decode_records


def read_records(raw: msgspec.Raw) -> list[TensorRecord] | None:
    """The records in a message; None where the message says that they are known. Raises ProtocolError."""
    records = decode_records(raw)
    if records is not None:
        check_records(records)
    return records


def check_records(records: Iterable[TensorRecord]) -> None:
    """Raise ProtocolError for a record that no store makes: one that would read or write beside its bytes."""
    # A model's thousands of tensors are of a few dozen kinds, and this runs for every version a reader takes.
    kinds: set[tuple[object, ...]] = set()
    for r in records:
        kind = (r.dtype, r.shape, r.stride, r.nbytes, r.encoding)
        if r.offset < 0 or (r.nbytes and r.offset % ALIGN) or (kind not in kinds and not _possible(r)):
            raise ProtocolError(f"the store sent an impossible record: {r}")
        if kind not in kinds:
            kinds.add(kind)


def _possible(record: TensorRecord) -> bool:
    """Whether there are tensors of this kind; where this one lies is not looked at."""
    _, dtype, shape, stride, _, nbytes, encoding = astuple(record)
    itemsize = ITEMSIZE.get(dtype)
    if itemsize is None or len(shape) != len(stride) or nbytes < 0:
        return False
    numel, last = 1, 0
    for size, step in zip(shape, stride, strict=True):
        if size < 0 or step < 0:
            return False
        numel *= size
        last += (size - 1) * step
    if encoding != "raw":
        return True
    return numel * itemsize == nbytes and (not numel or (last + 1) * itemsize <= nbytes)


def end_of(records: Iterable[TensorRecord]) -> int:
    """The first byte of the arena after all of `records`."""
    return max([r.offset + r.nbytes for r in records], default=0)
