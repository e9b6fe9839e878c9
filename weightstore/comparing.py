"""Which tensors have the very bytes that the base version has: for refits that write only what changed.

Bytes count, not values: -0.0 is not 0.0, and a NaN equals one of the same bits. A tensor of another dtype
than stored is compared as what it would be cast to.

Invariant: bounded memory, and each byte is read once at most; a difference ends a tensor's comparison soon.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Final

import torch

from weightstore.bulk import Span, each
from weightstore.copies import same_layout
from weightstore.cuda.uploads import uploads_into
from weightstore.mapping import ArenaMapping
from weightstore.tensors import place_of, same_pieces
from weightstore.types import TensorRecord


def unchanged(pairs: Iterable[tuple[TensorRecord, torch.Tensor]], mapping: ArenaMapping) -> list[bool]:
    """For each (record of the base, tensor of its shape): whether the tensor has the record's bytes.

    Raises:
        DeviceError: the device refused.
    """
    found: list[bool] = []
    alike: list[Span] = []
    on_device: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        for number, (record, tensor) in enumerate(pairs):
            place = place_of(mapping, record)
            found.append(True)
            if tensor.device.type == "cuda":
                on_device.append((number, place, tensor))
            elif place.dtype == tensor.dtype and same_layout(place, tensor):
                alike.append(Span(number, place.data_ptr(), tensor.data_ptr(), record.nbytes))
            else:
                found[number] = same_pieces(place, tensor)
        if on_device:
            same = uploads_into(mapping).unchanged([(place, tensor) for _, place, tensor in on_device])
            for (number, _, _), equal in zip(on_device, same, strict=True):
                found[number] = equal

    def compare(span: Span) -> None:
        if found[span.number] and _memcmp(span.target, span.source, span.nbytes):
            found[span.number] = False

    each(alike, compare)
    return found


_memcmp: Final = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcmp.restype = ctypes.c_int
