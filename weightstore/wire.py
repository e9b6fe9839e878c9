"""The control protocol: every message as a typed struct, and the framing around them.

Frame: 4-byte little-endian length, then that many bytes of msgpack. Each side decodes only the
union of messages it may receive; unknown tags, missing fields and wrong types are refused by the
decoder, so the code behind it works with validated values. File descriptors travel as SCM_RIGHTS
ancillary data on the first byte of the frame whose `fds` field counts them.

A request carries an `id` chosen by the client; exactly one reply carries it back. The store sends only
`Offer` and `Places` unasked. A connection is the identity: its leases and refits end with it.

Records travel pre-encoded (`msgspec.Raw` of ``list[TensorRecord]``): the store encodes a version once
and sends the same bytes to every reader.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct as Packer
from typing import Any, Final, cast

import msgspec

from weightstore.errors import ProtocolError, WeightstoreError, from_wire
from weightstore.types import Box, TensorRecord, TensorSpec

PROTOCOL: Final = 2
MAX_REQUEST: Final = 32 << 20
"""Cap on a frame the store accepts, in bytes: a commit of 100,000 tensors fits."""
MAX_REPLY: Final = 512 << 20
"""Cap on a frame a client accepts, in bytes."""

_LENGTH: Final = Packer("<I")
LENGTH_BYTES: Final = _LENGTH.size


class Message(msgspec.Struct, tag=True, frozen=True, omit_defaults=True, kw_only=True):
    """Anything that travels as a frame of its own."""


class _Request(Message, frozen=True, kw_only=True):
    id: int


class _Reply(Message, frozen=True, kw_only=True):
    id: int


# -- client to store ------------------------------------------------------------------------------


class Hello(_Request, frozen=True, kw_only=True):
    """First message on a connection. `client` describes the process for `status`; `instance` is a
    random name of the client object, the same on each of its reconnections (see Drained)."""

    protocol: int
    client: str = ""
    instance: str = ""


class OpenRefit(_Request, frozen=True, kw_only=True):
    """Begin or join a refit. Ranks that give the same `key` share one refit.

    `components` None means every component; with `partial` any subset of the named components'
    tensors may be written. `extend` permits names the base version lacks. `base` None means the
    tag's own version, else `latest`. A model without versions has no base, and then `components` may be
    named only by a `fresh` refit, which has none either: its version holds exactly the tensors it reserves
    and writes. With `skip_unchanged` no place is reserved for what is declared: writers reserve one for
    what changed, and say of the rest that it is kept.
    """

    model: str
    tag: str
    base: int | None = None
    components: list[str] | None = None
    partial: bool = False
    extend: bool = False
    fresh: bool = False
    in_place: bool = False
    skip_unchanged: bool = False
    key: str | None = None
    rank: int = 0
    world_size: int = 1
    timeout: float = 600.0

    @property
    def whole(self) -> bool:
        """Whether all of the base that is in scope is to be written, and so has a place from the start."""
        return not (self.partial or self.skip_unchanged)

    @property
    def all_placed(self) -> bool:
        """Whether its writer needs to know of nothing in the base but those places. (Ranks agree on who
        writes what by the base.)"""
        return self.whole and self.world_size == 1


class Reserve(_Request, frozen=True, kw_only=True):
    """Ask for arena space for tensors that `RefitOpened.targets` did not hold yet."""

    refit: int
    specs: list[TensorSpec]


class Write(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One tensor (or, with `box`, a part of one) that the writer has finished writing; or, `kept`, whose
    bytes it found to be the base's already."""

    name: str
    box: Box | None = None
    kept: bool = False


class DeclareWrites(_Request, frozen=True, kw_only=True):
    """What a lone writer will have written when its copies have landed: the store checks it and makes
    the version ready meanwhile, so that the commit that follows is short. Commits nothing."""

    refit: int
    writes: list[Write]


class CommitRefit(_Request, frozen=True, kw_only=True):
    """All that `writes` names has landed; None: all that was declared."""

    refit: int
    writes: list[Write] | None = None


class AbortRefit(_Request, frozen=True, kw_only=True):
    """End a refit without a version. The sender promises that none of its copies is still landing."""

    refit: int
    reason: str = ""


class Drained(_Request, frozen=True, kw_only=True):
    """After a reconnect: no copy of this client instance into an earlier refit is still landing."""


class OpenLease(_Request, frozen=True, kw_only=True):
    """Hold a version: of `version` if given, else what `tag` names. `follow` asks for offers."""

    model: str
    tag: str
    version: int | None = None
    follow: bool = False


class RenewLease(_Request, frozen=True, kw_only=True):
    """After a reconnect: hold again what an earlier connection held. `torn` is what the holder
    believes of it, so that the store can offer what makes that right."""

    model: str
    tag: str
    version: int
    follow: bool
    parked: bool
    torn: bool = False


class TakeOffer(_Request, frozen=True, kw_only=True):
    """The holder of a following lease now has the records of `version`, and lets go of the last."""

    lease: int
    version: int


class ParkLease(_Request, frozen=True, kw_only=True):
    """A parked lease follows its tag but reads no bytes (the engine sleeps): it takes every offer
    at once and lets an in-place refit go on. Unparking answers with the newest version."""

    lease: int
    parked: bool


class ReleaseLease(_Request, frozen=True, kw_only=True):
    lease: int


class WaitFor(_Request, frozen=True, kw_only=True):
    """Answer once `tag` names a version greater than `after`, or after `timeout` seconds."""

    model: str
    tag: str
    after: int = 0
    timeout: float | None = None


class SetTag(_Request, frozen=True, kw_only=True):
    model: str
    tag: str
    version: int


class RemoveTag(_Request, frozen=True, kw_only=True):
    model: str
    tag: str


class RemoveModel(_Request, frozen=True, kw_only=True):
    """Remove all tags of a model and its name map. Leased versions stay until released."""

    model: str


class PublishNames(_Request, frozen=True, kw_only=True):
    """Keep a name map (JSON) with a model, in place of the last; None takes it back. The model need not
    have a version yet. What the map means is the clients' affair: the store never compiles its patterns."""

    model: str
    names: str | None


class GetNames(_Request, frozen=True, kw_only=True):
    model: str


class GetStatus(_Request, frozen=True, kw_only=True):
    pass


class VerifyVersion(_Request, frozen=True, kw_only=True):
    """Recompute the checksums of a version and compare with those computed after its commit."""

    model: str
    tag: str
    version: int | None = None


Request = (
    Hello
    | OpenRefit
    | Reserve
    | DeclareWrites
    | CommitRefit
    | AbortRefit
    | Drained
    | OpenLease
    | RenewLease
    | TakeOffer
    | ParkLease
    | ReleaseLease
    | WaitFor
    | SetTag
    | RemoveTag
    | RemoveModel
    | PublishNames
    | GetNames
    | GetStatus
    | VerifyVersion
)


# -- store to client ------------------------------------------------------------------------------


class Welcome(_Reply, frozen=True, kw_only=True):
    """Answers Hello; one read-only descriptor of the arena travels with it."""

    arena: str
    capacity: int
    window: int
    nbytes: int
    server: str
    pid: int
    fds: int = 1


class RefitOpened(_Reply, frozen=True, kw_only=True):
    """`targets` are the places of the tensors the refit declared; `base` and `base_records` the version it
    starts from (no records if the refit is `all_placed`); `names` the model's published name map when the
    refit was begun, the same for all its ranks. One read-write descriptor of the arena travels with it."""

    refit: int
    base: int
    base_records: msgspec.Raw
    targets: list[TensorRecord]
    names: str | None = None
    fds: int = 1


class Reserved(_Reply, frozen=True, kw_only=True):
    records: list[TensorRecord]


class Committed(_Reply, frozen=True, kw_only=True):
    version: int


class LeaseGranted(_Reply, frozen=True, kw_only=True):
    lease: int
    version: int
    records: msgspec.Raw


class LeaseState(_Reply, frozen=True, kw_only=True):
    """Answers ParkLease. `records` is empty (`null`) when the holder already has `version`."""

    version: int
    torn: bool
    records: msgspec.Raw


class VersionIs(_Reply, frozen=True, kw_only=True):
    version: int


class NamesAre(_Reply, frozen=True, kw_only=True):
    """Answers GetNames; None where none are published."""

    names: str | None


class Done(_Reply, frozen=True, kw_only=True):
    pass


class Failed(_Reply, frozen=True, kw_only=True):
    """The request changed nothing; `error` is a class name of errors.py."""

    error: str
    message: str
    details: dict[str, Any] = {}

    def to_error(self) -> WeightstoreError:
        return from_wire(self.error, self.message, self.details)


class VersionStatus(msgspec.Struct, frozen=True):
    number: int
    parent: int
    state: str
    created: float
    tensors: int
    nbytes: int
    tags: list[str]
    leases: int
    checksummed: bool


class ModelStatus(msgspec.Struct, frozen=True):
    """`tags` maps a tag to its version; `torn` lists tags whose in-place refit was never committed;
    `names` says whether a name map is published. A model may have one before its first version."""

    name: str
    tags: dict[str, int]
    torn: list[str]
    versions: list[VersionStatus]
    components: dict[str, int]
    names: bool = False


class LeaseStatus(msgspec.Struct, frozen=True):
    lease: int
    model: str
    tag: str
    version: int
    follow: bool
    parked: bool
    offered: int
    holder: str
    since: float


class RefitStatus(msgspec.Struct, frozen=True):
    refit: int
    model: str
    tag: str
    base: int
    in_place: bool
    nbytes: int
    joined: int
    committed: int
    world_size: int
    holders: list[str]
    since: float


class ArenaStatus(msgspec.Struct, frozen=True):
    """Bytes of the data area: `capacity` can be committed, `committed` is, `used` + `free` make up
    `committed`. `used` splits into `reachable` (live versions), `pending` (open refits) and
    `quarantined` (refits whose writer may still be writing)."""

    name: str
    uuid: str
    capacity: int
    window: int
    committed: int
    used: int
    free: int
    reachable: int
    pending: int
    quarantined: int
    largest_free: int
    meta_used: int
    meta_capacity: int


class Status(_Reply, frozen=True, kw_only=True):
    server: str
    pid: int
    started: float
    now: float
    grace_until: float
    clients: int
    arena: ArenaStatus
    models: list[ModelStatus]
    leases: list[LeaseStatus]
    refits: list[RefitStatus]


class Verified(_Reply, frozen=True, kw_only=True):
    """`corrupt` names tensors whose bytes differ from their checksum; `computed` counts extents that
    had no checksum yet and got one now; `digest` identifies the version's content."""

    version: int
    tensors: int
    nbytes: int
    compared: int
    computed: int
    corrupt: list[str]
    digest: str


class Offer(Message, frozen=True, kw_only=True):
    """Unasked: the tag a lease follows has moved to `version`; or, with `torn`, its bytes are about
    to be overwritten in place. The holder answers with TakeOffer(version)."""

    lease: int
    version: int
    torn: bool
    records: msgspec.Raw


class Places(Message, frozen=True, kw_only=True):
    """Unasked: a refit of the tag that a lease follows has places in these windows, as (offset, nbytes) in
    the arena by component: its version may come to lie there, and who has to prepare for reading there may
    begin. A lease is told of a window once; nothing is answered."""

    lease: int
    places: dict[str, list[tuple[int, int]]]


Unasked = Offer | Places
Reply = (
    Welcome
    | RefitOpened
    | Reserved
    | Committed
    | LeaseGranted
    | LeaseState
    | VersionIs
    | NamesAre
    | Done
    | Failed
    | Status
    | Verified
    | Offer
    | Places
)

# -- codec ----------------------------------------------------------------------------------------

_encoder = msgspec.msgpack.Encoder()
_request_decoder = msgspec.msgpack.Decoder(Request)
_reply_decoder = msgspec.msgpack.Decoder(Reply)
_records_decoder = msgspec.msgpack.Decoder(list[TensorRecord] | None)


def frame(message: Message) -> bytes:
    """The bytes to send for `message`."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def frame_length(prefix: bytes | bytearray | memoryview, cap: int) -> int:
    """The body length a 4-byte prefix announces; ProtocolError above `cap` or at zero."""
    (length,) = _LENGTH.unpack(prefix)
    if not 0 < length <= cap:
        raise ProtocolError(f"frame of {length} bytes announced; allowed are 1 to {cap}")
    return int(length)


def decode_request(body: bytes | bytearray | memoryview) -> Request:
    try:
        return cast(Request, _request_decoder.decode(body))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"malformed request: {error}") from None


def decode_reply(body: bytes | bytearray | memoryview) -> Reply:
    try:
        return cast(Reply, _reply_decoder.decode(body))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"malformed reply: {error}") from None


def encode_records(records: Iterable[TensorRecord] | None) -> msgspec.Raw:
    """Encode records once for many readers; None becomes the empty marker of LeaseState."""
    return msgspec.Raw(_encoder.encode(None if records is None else list(records)))


def decode_records(raw: msgspec.Raw) -> list[TensorRecord] | None:
    try:
        return cast(list[TensorRecord] | None, _records_decoder.decode(raw))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"malformed tensor records: {error}") from None
