"""The safetensors format as pure functions: bytes in, validated values out, and back.

A file is an 8-byte little-endian header length, that many bytes of JSON (which may end in spaces),
and then the tensors' bytes, row-major and little-endian, in the order of their `data_offsets`
(https://github.com/huggingface/safetensors, "Format"). Files come from anywhere, so nothing they
say is believed: a `Header` exists only if every rule of the format holds.

Invariants of a `Header`:
- its tensors, in file order, cover the bytes from `data_start` to the end of the file exactly once;
- a tensor's byte range is as long as its dtype and shape say;
- dtypes are the store's names; no name occurs twice.

The format has no strides and no ties. What weightstore needs of them it keeps in the header's
metadata (see `Alias` and `strides_from`); files without that metadata simply have neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from struct import Struct as Packer
from typing import Any, Final, NoReturn, TypeVar

import msgspec

from weightstore.errors import CheckpointError
from weightstore.types import ALIGN, ITEMSIZE, MAX_DIMS, MAX_NBYTES, nbytes_of

T = TypeVar("T")

MAX_HEADER: Final = 100_000_000
"""Cap on the JSON header in bytes: the one the safetensors library itself applies."""

PREFIX: Final = Packer("<Q")
DATA_ALIGN: Final = ALIGN
"""The header is padded so that data starts at a multiple of this. The format asks for 8; what lies in a file
as it will in the arena is loaded a fifth faster from the page cache."""

DTYPES: Final[dict[str, str]] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}
"""safetensors dtype → the store's dtype. The format's other dtypes have no place in the store."""

CODES: Final = {dtype: code for code, dtype in DTYPES.items()}

METADATA_KEY: Final = "__metadata__"
ALIASES_KEY: Final = "weightstore.aliases"
STRIDES_KEY: Final = "weightstore.strides"

_FIELDS: Final = frozenset({"dtype", "shape", "data_offsets"})


class FileTensor(msgspec.Struct, frozen=True):
    """A tensor of a file: bytes `begin` to `end`, counted from the start of the file, row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class Header(msgspec.Struct, frozen=True):
    """A validated header. `tensors` are in file order; `file` names the file in messages."""

    file: str
    data_start: int
    file_size: int
    tensors: tuple[FileTensor, ...]
    metadata: dict[str, str]


class Alias(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A name whose bytes are those of the tensor `target` of the same checkpoint part (a tie)."""

    target: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]


# -- reading --------------------------------------------------------------------------------------


def header_length(prefix: bytes, file_size: int, file: str) -> int:
    """Length in bytes of the JSON header, from the first 8 bytes of a file of `file_size` bytes."""
    if len(prefix) < PREFIX.size:
        raise CheckpointError(
            f"{file}: {file_size} bytes are too few for a safetensors file; it needs at least {PREFIX.size}",
            file=file,
            file_size=file_size,
        )
    (length,) = PREFIX.unpack(prefix[: PREFIX.size])
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{file}: claims a header of {length} bytes; the format allows {MAX_HEADER}. "
            "It is not a safetensors file, or it is damaged",
            file=file,
            header=length,
        )
    if length < 2 or PREFIX.size + length > file_size:
        raise CheckpointError(
            f"{file}: claims a header of {length} bytes in a file of {file_size}; "
            "the file is truncated or not a safetensors file",
            file=file,
            header=length,
            file_size=file_size,
        )
    return int(length)


def parse_header(body: bytes, file_size: int, file: str) -> Header:
    """Validate the JSON header `body` of a file of `file_size` bytes.

    Raises CheckpointError naming the file, the tensor and the numbers for anything the format
    does not allow, or the store cannot hold.
    """
    if not body.startswith(b"{"):
        raise CheckpointError(f"{file}: the header does not start with '{{' but with {body[:8]!r}", file=file)
    table = parse_json_object(body, f"{file}: header")
    metadata = _metadata(table.pop(METADATA_KEY, {}), file)
    data_start = PREFIX.size + len(body)
    tensors = [_tensor(name, info, data_start, file) for name, info in table.items()]
    tensors.sort(key=lambda t: (t.begin, t.end))
    end = data_start
    for tensor in tensors:
        if tensor.begin != end:
            what = "overlaps the tensor before it" if tensor.begin < end else "leaves a hole before it"
            _refuse(file, tensor.name, f"starts at byte {tensor.begin} where {end} was due: it {what}")
        end = tensor.end
    if end != file_size:
        what = "truncated" if end > file_size else "longer than its tensors"
        raise CheckpointError(
            f"{file}: its tensors end at byte {end} but the file has {file_size}: it is {what}",
            file=file,
            expected=end,
            file_size=file_size,
        )
    return Header(file, data_start, file_size, tuple(tensors), metadata)


def parse_json_object(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object without duplicate keys at any depth; `what` starts the error messages."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                raise CheckpointError(f"{what}: the key {_quote(key)} occurs twice", key=key)
            table[key] = value
        return table

    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{what} is not a JSON object but a {type(table).__name__}")
    return table


def _metadata(value: object, file: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise CheckpointError(f"{file}: {METADATA_KEY} must map strings to strings", file=file)
    return value


def _tensor(name: str, info: object, data_start: int, file: str) -> FileTensor:
    if not isinstance(info, dict) or info.keys() != _FIELDS:
        _refuse(file, name, f"must have exactly the fields {', '.join(sorted(_FIELDS))}")
    code, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        _refuse(file, name, f"has dtype {_quote(code)}; the store holds {', '.join(DTYPES)}")
    if not _are_counts(shape) or len(shape) > MAX_DIMS:
        _refuse(file, name, f"has shape {_quote(shape)}; it must be at most {MAX_DIMS} counts below 2**48")
    if not _are_counts(offsets) or len(offsets) != 2:
        _refuse(file, name, f"has data_offsets {_quote(offsets)}; they must be two counts below 2**48")
    begin, end = offsets
    expected = nbytes_of(DTYPES[code], shape)
    if end - begin != expected:
        _refuse(
            file,
            name,
            f"of shape {shape} and dtype {code} has {expected} bytes, "
            f"but its data_offsets {offsets} span {end - begin}",
        )
    return FileTensor(name, DTYPES[code], tuple(shape), data_start + begin, data_start + end)


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < MAX_NBYTES for n in value)


def _quote(value: object) -> str:
    return ascii(value)[:120]


def _refuse(file: str, tensor: str, problem: str) -> NoReturn:
    raise CheckpointError(f"{file}: tensor {_quote(tensor)} {problem}", file=file, tensor=tensor)


# -- ties and strides in the metadata ---------------------------------------------------------------


def aliases_from(header: Header) -> dict[str, Alias]:
    """The ties recorded in a file. Whether targets exist is for the caller: they may be in another shard."""
    names = {tensor.name for tensor in header.tensors}
    aliases = _own_metadata(header, ALIASES_KEY, dict[str, Alias])
    for name in aliases:
        if name in names:
            _refuse(header.file, name, "is in the file and also recorded as an alias of another tensor")
    return aliases


def strides_from(header: Header) -> dict[str, tuple[int, ...]]:
    """The strides, in elements, that tensors of a file had before they were written row-major."""
    strides = _own_metadata(header, STRIDES_KEY, dict[str, tuple[int, ...]])
    unknown = strides.keys() - {tensor.name for tensor in header.tensors}
    if unknown:
        _refuse(header.file, min(unknown), f"has a stride in metadata {STRIDES_KEY} but is not in the file")
    return strides


def _own_metadata(header: Header, key: str, kind: type[T]) -> T:
    what = f"{header.file}: metadata {key}"
    try:
        table = parse_json_object(header.metadata.get(key, "{}").encode("utf-8"), what)
        return msgspec.convert(table, kind)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise CheckpointError(f"{what} is malformed: {error}", file=header.file) from None


# -- writing --------------------------------------------------------------------------------------


def build_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str], file: str
) -> tuple[bytes, Header]:
    """The bytes before the data, and the header they parse to, for (name, dtype, shape) in file order.

    Readers view the data in place, so give wide dtypes first (`file_order`): then every tensor
    starts at a multiple of its item size.
    """
    table: dict[str, Any] = {METADATA_KEY: dict(metadata)}
    ends = list(accumulate((nbytes_of(dtype, shape) for _, dtype, shape in tensors), initial=0))
    for (name, dtype, shape), begin, end in zip(tensors, ends, ends[1:], strict=False):
        if name in table:
            _refuse(file, name, "cannot be written: safetensors reserves the name, or it was given twice")
        table[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    body = msgspec.json.encode(table)
    body += b" " * (-(PREFIX.size + len(body)) % DATA_ALIGN)
    if len(body) > MAX_HEADER:
        raise CheckpointError(
            f"{file}: {len(tensors)} tensors need a header of {len(body)} bytes; "
            f"the format allows {MAX_HEADER}. Write smaller shards",
            file=file,
            header=len(body),
        )
    size = PREFIX.size + len(body) + ends[-1]
    return PREFIX.pack(len(body)) + body, parse_header(body, size, file)


def file_order(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Wide dtypes first, otherwise in the order given."""
    return sorted(tensors, key=lambda t: -ITEMSIZE[t[1]])
