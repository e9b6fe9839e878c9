"""Between torch and the store: dtypes, what a tensor is to the store, and tensors over arena bytes.

Invariants:
- `as_tensor` gives a plain strided torch tensor or raises InvalidTensor; code behind it need not look again;
- a tensor over arena bytes has exactly the record's shape, stride and bits, without a copy;
- a tensor handed to users (`tensor_of`) has a storage of its own extent, so that saving or comparing it by
  storage does not drag in the whole arena.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch

from weightstore.errors import InvalidTensor, ProtocolError
from weightstore.mapping import ArenaMapping
from weightstore.sharding import is_dtensor
from weightstore.types import ITEMSIZE, TensorRecord, TensorSpec, contiguous_stride, is_dense

DTYPES: Final[dict[str, torch.dtype]] = {name: getattr(torch, name) for name in ITEMSIZE}
NAMES: Final[dict[torch.dtype, str]] = {dtype: name for name, dtype in DTYPES.items()}

_BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dtype_name(name: str, dtype: torch.dtype) -> str:
    """The store's name of `dtype`. InvalidTensor, naming tensor `name`, if the store has none."""
    found = NAMES.get(dtype)
    if found is None:
        raise InvalidTensor(
            f"tensor {name!r} has dtype {dtype}; the store holds {', '.join(sorted(ITEMSIZE))}",
            name=name,
            dtype=str(dtype),
        )
    return found


def as_tensor(name: str, value: Any) -> torch.Tensor:
    """`value` as a plain strided tensor over the same memory: torch, numpy, or anything with DLPack.

    It may require grad: whoever computes with it does so under `torch.no_grad`.

    Raises:
        InvalidTensor: anything else; a DTensor or other subclass; sparse, meta or uninitialized tensors;
            dtypes the store does not hold.
    """
    if type(value) is torch.Tensor or type(value) is torch.nn.Parameter:
        tensor = value
    elif isinstance(value, torch.Tensor):
        tensor = _unwrapped(name, value)
    else:
        tensor = _imported(name, value)
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        what = "on the meta device, without values" if tensor.is_meta else f"{tensor.layout}, not strided"
        raise InvalidTensor(f"tensor {name!r} is {what}; give a dense tensor with its values", name=name)
    dtype_name(name, tensor.dtype)
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.detach().resolve_conj().resolve_neg()
    return tensor


def _unwrapped(name: str, value: torch.Tensor) -> torch.Tensor:
    """A subclass that only adds methods, without the subclass."""
    if torch.nn.parameter.is_lazy(value):
        raise InvalidTensor(
            f"tensor {name!r} is an uninitialized lazy parameter; run the module once", name=name
        )
    if is_dtensor(value):
        raise InvalidTensor(
            f"tensor {name!r} is a DTensor, which says itself what of it lies here: give it to put",
            name=name,
        )
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise InvalidTensor(
            f"tensor {name!r} is a {type(value).__name__}, which keeps its values elsewhere; give a tensor",
            name=name,
        )
    return value.detach().as_subclass(torch.Tensor)


def _imported(name: str, value: Any) -> torch.Tensor:
    np = sys.modules.get("numpy")  # whoever has an array has imported it
    try:
        if np is not None and isinstance(value, np.ndarray):
            return _from_numpy(value)
        if hasattr(value, "__dlpack__"):
            return torch.utils.dlpack.from_dlpack(value).detach()
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise InvalidTensor(f"tensor {name!r}, a {type(value).__name__}: {error}", name=name) from None
    raise InvalidTensor(
        f"tensor {name!r} is a {type(value).__name__}; give a torch tensor, a numpy array or DLPack",
        name=name,
    )


class _Writable:
    """A numpy array described as writable, to spare a read-only one torch's warning; we only read it."""

    def __init__(self, array: Any) -> None:
        self.owner = array
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


def _from_numpy(array: Any) -> torch.Tensor:
    import numpy as np

    # bfloat16 and fp8 arrays (package ml_dtypes) are unknown to torch under their own name.
    extension = DTYPES.get(array.dtype.name) if array.dtype.kind not in "biufc" else None
    if extension is not None:
        array = array.view(np.dtype(f"u{array.dtype.itemsize}"))
    if any(step < 0 for step in array.strides):
        array = array.copy()
    if not array.flags.writeable:
        array = np.asarray(_Writable(array))
    tensor = torch.from_numpy(array)
    return tensor if extension is None else tensor.view(extension)


def spec_of(name: str, tensor: torch.Tensor, alias_of: str | None = None) -> TensorSpec:
    """What the store is told of `tensor` (which may be on meta). A dense stride is kept, any other made
    contiguous."""
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    if not tensor.is_contiguous() and not is_dense(shape, stride):
        stride = contiguous_stride(shape)
    return TensorSpec(name, dtype_name(name, tensor.dtype), shape, stride, alias_of)


def tensor_of(mapping: ArenaMapping, record: TensorRecord) -> torch.Tensor:
    """The tensor that `record` names in `mapping`, with a storage of its own that keeps the pages alive."""
    _require_raw(record)
    if not record.nbytes:
        return torch.empty_strided(record.shape, record.stride, dtype=DTYPES[record.dtype])
    flat = torch.from_numpy(mapping.array(record.offset, record.nbytes))
    return flat.view(DTYPES[record.dtype]).as_strided(record.shape, record.stride)


def place_of(mapping: ArenaMapping, record: TensorRecord) -> torch.Tensor:
    """As `tensor_of`, several times faster, as a view of one tensor over the whole arena: for copies."""
    start = record.offset // ITEMSIZE[record.dtype]
    return mapping.typed(record.dtype).as_strided(record.shape, record.stride, start)


def _require_raw(record: TensorRecord) -> None:
    if record.encoding != "raw":
        raise ProtocolError(
            f"tensor {record.name!r} is stored as {record.encoding!r}, which this release cannot read"
        )


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a dense tensor as uint8 of shape (nbytes,), in memory order, without a copy."""
    flat = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return flat.view(torch.uint8)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of equal shape and dtype hold the same bits, wherever they are (NaNs included)."""
    with torch.no_grad():
        return torch.equal(bits_of(a.cpu()), bits_of(b.cpu()))


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements as integers (or pairs of them), to compare bits instead of values."""
    return tensor.detach().view(_BITS[tensor.dtype.itemsize])


def tiles(shape: Sequence[int], limit: int) -> Iterator[tuple[slice, ...]]:
    """Index tuples that cut a tensor of `shape` into pieces of at most `limit` elements, in order. Pure."""
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    if row <= limit:
        step = max(limit // max(row, 1), 1)
        for at in range(0, shape[0], step):
            yield (slice(at, min(at + step, shape[0])), *(slice(0, n) for n in shape[1:]))
        return
    for at in range(shape[0]):
        for rest in tiles(shape[1:], limit):
            yield (slice(at, at + 1), *rest)


PIECE: Final = 4 << 20
"""Elements looked at in one go where that needs memory."""


def same_pieces(place: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether `place` holds the bits of `tensor` once cast; the first piece that differs ends it."""
    return all(
        same_bits(place[tile], tensor[tile].detach().to(place.dtype)) for tile in tiles(place.shape, PIECE)
    )
