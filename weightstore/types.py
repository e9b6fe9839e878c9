"""The nouns of the store as plain values: names, dtypes, extents, tensor specs and records.

Pure: no I/O, no torch, no numpy. Everything that crosses the socket or lies in the arena's own
records is built from these, so validation of untrusted names and shapes lives here as well.

Invariants:
- an offset is counted in bytes from the start of the arena; a tensor starts at a multiple of ALIGN;
- a stride is counted in elements, as torch does, and never negative;
- a tensor is dense: its elements occupy exactly ``nbytes`` bytes, in the order its stride gives.

The structs hold nothing that could form a cycle, so the garbage collector is spared them (``gc=False``):
thousands of records made at once would set it off, and with torch loaded a full collection takes 100 ms.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from typing import Final

import msgspec

from weightstore.errors import InvalidName, InvalidTensor, UsageError

ALIGN: Final = 256
"""Start alignment of every tensor in bytes: what cudaMalloc guarantees, so kernels see no change."""

MAX_NAME: Final = 512
MAX_DIMS: Final = 16
MAX_NBYTES: Final = 1 << 48
DEFAULT_TAG: Final = "latest"
MAX_NAME_MAP: Final = 1 << 20
"""Bytes of UTF-8 that a published name map may have as JSON: room for a rule per tensor of a large model."""

ITEMSIZE: Final[dict[str, int]] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint16": 2,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "uint32": 4,
    "int32": 4,
    "float32": 4,
    "uint64": 8,
    "int64": 8,
    "float64": 8,
    "complex64": 8,
}
"""Stored dtypes, by torch's names, and their bytes per element."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}")
_TENSOR_NAME = re.compile(r"[!-\-/-~]+(?:\.[!-\-/-~]+)*")


class Extent(msgspec.Struct, frozen=True, array_like=True, order=True, gc=False):
    """A byte range of the arena."""

    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


class Box(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The part of a tensor one writer wrote: elements ``lo[d] <= index < hi[d]`` in each dimension."""

    lo: tuple[int, ...]
    hi: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(max(0, h - b) for b, h in zip(self.lo, self.hi, strict=True))

    def intersects(self, other: Box) -> bool:
        return all(
            max(a, b) < min(c, d) for a, b, c, d in zip(self.lo, other.lo, self.hi, other.hi, strict=True)
        )


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a writer says of a tensor before it has a place: name, dtype, shape, stride in elements.

    `alias_of` names another tensor of the same refit or base whose bytes this one shares (a tie).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    alias_of: str | None = None


class TensorRecord(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A tensor with its place: `nbytes` bytes at `offset`. Tied tensors have equal extents.

    `encoding` says how the bytes are to be read; only ``raw`` (the tensor's own bytes) exists.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    nbytes: int
    encoding: str = "raw"

    @property
    def extent(self) -> Extent:
        return Extent(self.offset, self.nbytes)

    @property
    def component(self) -> str:
        return component_of(self.name)


def component_of(name: str) -> str:
    """The component a tensor belongs to: the first segment of its name."""
    return name.partition(".")[0]


def align_up(nbytes: int, alignment: int = ALIGN) -> int:
    return -(-nbytes // alignment) * alignment


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major stride of `shape` in elements, as torch gives it."""
    stride = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        stride[d] = stride[d + 1] * max(shape[d + 1], 1)
    return tuple(stride)


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the elements fill one gapless range exactly once (any dimension order)."""
    if 0 in shape:
        return True
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            break
        expected *= size
    else:
        return True  # row-major, as nearly all are
    expected = 1
    for step, size in sorted((st, sz) for sz, st in zip(shape, stride, strict=True) if sz != 1):
        if step != expected:
            return False
        expected *= size
    return True


def nbytes_of(dtype: str, shape: Sequence[int]) -> int:
    return prod(shape) * ITEMSIZE[dtype]


def check_name(kind: str, name: object) -> str:
    """Return a valid model, tag or component name, or raise InvalidName."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidName(
            f"{kind} name {str(name)[:80]!r} is not allowed: use 1 to 128 letters, digits, '_', '-' or "
            "'.', not starting with '-' or '.'"
        )
    return name


def check_name_map(model: str, names: str) -> str:
    """Return a name map that the store can keep, else raise UsageError: JSON of an object, of bounded size.

    What it says is looked at by clients only, before they publish it and when they use it.
    """
    nbytes = len(names.encode())
    if nbytes > MAX_NAME_MAP:
        raise UsageError(
            f"the name map of {model!r} has {nbytes} bytes as JSON, and may have {MAX_NAME_MAP}; say with "
            "patterns what it says name by name",
            requested=nbytes,
            capacity=MAX_NAME_MAP,
        )
    try:
        msgspec.json.decode(names, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"the name map of {model!r} is not JSON of a map: {error}") from None
    return names


def check_spec(spec: TensorSpec) -> TensorSpec:
    """Return `spec` if the store can hold such a tensor, else raise InvalidName or InvalidTensor."""
    name = spec.name
    if not _TENSOR_NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise InvalidName(
            f"tensor name {name[:80]!r} is not allowed: 1 to {MAX_NAME} printable ASCII characters, no "
            "spaces, and no empty segment between dots"
        )
    if spec.dtype not in ITEMSIZE:
        raise InvalidTensor(
            f"tensor {name!r} has dtype {spec.dtype[:40]!r}; the store holds {', '.join(sorted(ITEMSIZE))}"
        )
    if len(spec.shape) > MAX_DIMS or len(spec.stride) != len(spec.shape):
        raise InvalidTensor(
            f"tensor {name!r} has {len(spec.shape)} dimensions and {len(spec.stride)} strides; they must be "
            f"equal in number and at most {MAX_DIMS}"
        )
    numbers = (0, *spec.shape, *spec.stride)
    if min(numbers) < 0 or max(numbers) >= MAX_NBYTES:
        raise InvalidTensor(f"tensor {name!r} has a size or stride out of range")
    if nbytes_of(spec.dtype, spec.shape) > MAX_NBYTES:
        raise InvalidTensor(f"tensor {name!r} of shape {spec.shape} is larger than the store can address")
    if not is_dense(spec.shape, spec.stride):
        raise InvalidTensor(
            f"tensor {name!r} with shape {spec.shape} and stride {spec.stride} has gaps or overlaps itself; "
            "make it contiguous first"
        )
    return spec
