"""Tensor records as a client receives them: decoded, and checked before anything addresses memory by them."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from weightstore.errors import ProtocolError
from weightstore.types import ALIGN, ITEMSIZE, TensorRecord, nbytes_of
from weightstore.wire import decode_records


def read_records(raw: msgspec.Raw) -> list[TensorRecord] | None:
    """The records in a message; None where the message says that they are known. Raises ProtocolError."""
    records = decode_records(raw)
    if records is not None:
        check_records(records)
    return records


def check_records(records: Iterable[TensorRecord]) -> None:
    """Raise ProtocolError for a record that no store makes: one that would read or write beside its bytes."""
    for r in records:
        if (
            r.dtype not in ITEMSIZE
            or len(r.shape) != len(r.stride)
            or min(r.offset, r.nbytes, *r.shape, *r.stride) < 0
            or (r.encoding == "raw" and nbytes_of(r.dtype, r.shape) != r.nbytes)
            or (r.nbytes and (r.offset % ALIGN or not _within(r)))
        ):
            raise ProtocolError(f"the store sent an impossible record: {r}")


def _within(r: TensorRecord) -> bool:
    last = sum((size - 1) * step for size, step in zip(r.shape, r.stride, strict=True))
    return r.encoding != "raw" or (last + 1) * ITEMSIZE[r.dtype] <= r.nbytes


def end_of(records: Iterable[TensorRecord]) -> int:
    """The first byte of the arena after all of `records`."""
    return max((r.offset + r.nbytes for r in records), default=0)
