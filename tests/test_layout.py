from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightstore import layout
from weightstore.errors import ArenaUnusable, UsageError
from weightstore.layout import Header, pack_header, unpack_header
from weightstore.sizes import format_size, parse_size

HEADER = Header(UUID(int=0x1234), capacity=1 << 30, window=1 << 26, created=1.75e9)


def test_areas_are_page_aligned_and_do_not_overlap() -> None:
    areas = [
        (0, layout.HEADER_BYTES),
        *((offset, layout.ROOT_BYTES) for offset in layout.ROOT_OFFSETS),
        (layout.BLOBS_OFFSET, layout.BLOBS_BYTES),
        (layout.DATA_OFFSET, HEADER.capacity),
    ]
    end = 0
    for offset, nbytes in areas:
        assert offset >= end and offset % layout.PAGE == 0
        end = offset + nbytes
    assert end == HEADER.nbytes
    assert layout.IDENTITY_BYTES <= layout.COMMITTED_OFFSET <= layout.HEADER_BYTES - 8


def test_committed_word_does_not_disturb_the_identity() -> None:
    page = bytearray(pack_header(HEADER).ljust(layout.HEADER_BYTES, b"\0"))
    assert layout.read_committed(page) == 0
    page[layout.COMMITTED_OFFSET : layout.COMMITTED_OFFSET + 8] = layout.pack_committed(3 << 40)
    assert layout.read_committed(page) == 3 << 40
    assert unpack_header(page) == HEADER


@given(
    st.builds(
        Header,
        uuid=st.uuids(),
        capacity=st.integers(1, 1 << 30).map(lambda n: n * layout.PAGE),
        window=st.integers(1, 1 << 30).map(lambda n: n * layout.PAGE),
        created=st.floats(0, 1e11),
    )
)
def test_header_round_trip(header: Header) -> None:
    assert unpack_header(pack_header(header)) == header


@given(st.integers(0, layout.IDENTITY_BYTES - 1), st.integers(1, 255))
def test_any_changed_byte_is_refused(position: int, flip: int) -> None:
    damaged = bytearray(pack_header(HEADER))
    damaged[position] ^= flip
    with pytest.raises(ArenaUnusable):
        unpack_header(damaged)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(noise: bytes) -> None:
    with pytest.raises(ArenaUnusable):
        unpack_header(noise)


def test_refusals_say_what_is_wrong() -> None:
    with pytest.raises(ArenaUnusable, match="holds 3 bytes, too few"):
        unpack_header(b"abc")
    with pytest.raises(ArenaUnusable, match=r"the thing starts with .* not a weightstore arena"):
        unpack_header(b"x" * 4096, "the thing")
    packed = bytearray(pack_header(HEADER))
    packed[8] = 7
    with pytest.raises(ArenaUnusable, match="layout 7, this weightstore reads layout 1") as caught:
        unpack_header(packed)
    assert caught.value.details == {"found": 7, "supported": 1}
    with pytest.raises(ArenaUnusable, match="positive multiples of 4096"):
        unpack_header(pack_header(Header(UUID(int=1), 4097, 4096, 0.0)))


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64GiB", 64 << 30),
        ("64 gib", 64 << 30),
        ("500MB", 500_000_000),
        ("500 M", 500_000_000),
        ("1.5KiB", 1536),
        ("0.1TiB", (1 << 40) // 10),
        ("9007199254740993b", 9007199254740993),
    ],
)
def test_parse_size(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "1,5GiB", "12 parsecs", "0x10", "1.GiB"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


def test_format_size() -> None:
    assert [format_size(n) for n in (0, 1023, 1536, 64 << 30, 33_715_493_273, 5 << 50)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "64 GiB",
        "31.4 GiB",
        "5120 TiB",
    ]
