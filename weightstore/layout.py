"""Where things lie in the arena segment, and its header: pure struct packing, no I/O.

    0            header page: identity (written once, checksummed), then the `committed` counter
    64 KiB       two root slots of 1 MiB each (the store's own records, see persistence)
    4 MiB        blobs: 60 MiB (encoded catalog states)
    64 MiB       data: `capacity` bytes, committed window by window

The service writes these bytes and clients read them to recognise the arena they were promised, so
both sides import this module and neither knows more about the other's memory.

Invariants:
- every offset counts from the start of the segment;
- the identity part of the header fits in one page and is covered by its own checksum, so a header
  is either entirely believable or refused with what is wrong about it;
- `committed` lies outside the checksummed part: it is one aligned 8-byte word that grows, written only by
  the store that holds the arena's lock.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Final
from uuid import UUID

import xxhash

from weightstore.errors import ArenaUnusable

KIB: Final = 1 << 10
MIB: Final = 1 << 20

MAGIC: Final = b"WGHTSTOR"
LAYOUT_VERSION: Final = 1

HEADER_BYTES: Final = 4096
ROOT_BYTES: Final = MIB
ROOT_OFFSETS: Final = (64 * KIB, 64 * KIB + ROOT_BYTES)
BLOBS_OFFSET: Final = 4 * MIB
BLOBS_BYTES: Final = 60 * MIB
DATA_OFFSET: Final = 64 * MIB
COMMITTED_OFFSET: Final = 2048
"""Where the `committed` word lies: far from the identity, so the two never share a cache line."""

PAGE: Final = 4096
"""Capacity and window are multiples of this."""

# magic, layout version, padding, uuid, capacity, window, created
_IDENTITY: Final = Struct("<8sI4x16sQQd")
_WORD: Final = Struct("<Q")
IDENTITY_BYTES: Final = _IDENTITY.size + _WORD.size


@dataclass(frozen=True)
class Header:
    """What an arena says about itself. `capacity` and `window` are data bytes, `created` is Unix time."""

    uuid: UUID
    capacity: int
    window: int
    created: float

    @property
    def nbytes(self) -> int:
        """Size of the whole segment in bytes: the meta area and `capacity` bytes of data."""
        return DATA_OFFSET + self.capacity


def pack_header(header: Header) -> bytes:
    """The identity bytes of `header` with their checksum, to be written at offset 0."""
    identity = _IDENTITY.pack(
        MAGIC, LAYOUT_VERSION, header.uuid.bytes, header.capacity, header.window, header.created
    )
    return identity + _WORD.pack(xxhash.xxh3_64_intdigest(identity))


def unpack_header(buffer: bytes | bytearray | memoryview, what: str = "shared memory object") -> Header:
    """Read the header at the start of `buffer`; `what` names the object in messages.

    Raises:
        ArenaUnusable: too short, another magic, another layout version, a wrong checksum, or numbers
            that no store writes.
    """
    identity = bytes(buffer[: _IDENTITY.size])
    checksum = bytes(buffer[_IDENTITY.size : IDENTITY_BYTES])
    if len(identity) + len(checksum) < IDENTITY_BYTES:
        raise ArenaUnusable(
            f"{what} holds {len(buffer)} bytes, too few for an arena header of {IDENTITY_BYTES}; it is not "
            "a weightstore arena"
        )
    magic, version, uuid, capacity, window, created = _IDENTITY.unpack(identity)
    if magic != MAGIC:
        raise ArenaUnusable(
            f"{what} starts with {magic!r}, not {MAGIC!r}: it is not a weightstore arena, and was left alone"
        )
    if version != LAYOUT_VERSION:
        raise ArenaUnusable(
            f"{what} has arena layout {version}, this weightstore reads layout {LAYOUT_VERSION}; use the "
            "weightstore that wrote it, or remove it if its weights are not needed",
            found=version,
            supported=LAYOUT_VERSION,
        )
    (expected,) = _WORD.unpack(checksum)
    if xxhash.xxh3_64_intdigest(identity) != expected:
        raise ArenaUnusable(f"{what} has a damaged arena header: its checksum does not match its fields")
    if not capacity or not window or capacity % PAGE or window % PAGE:
        raise ArenaUnusable(
            f"{what} claims a capacity of {capacity} and a window of {window} bytes; both must be positive "
            f"multiples of {PAGE}"
        )
    return Header(UUID(bytes=uuid), capacity, window, created)


def read_committed(buffer: bytes | bytearray | memoryview) -> int:
    """Data bytes committed so far, from the header page in `buffer`."""
    return int(_WORD.unpack_from(buffer, COMMITTED_OFFSET)[0])


def pack_committed(nbytes: int) -> bytes:
    """The word to be written at COMMITTED_OFFSET."""
    return _WORD.pack(nbytes)
