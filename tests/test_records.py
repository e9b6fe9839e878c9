from __future__ import annotations

import msgspec
import pytest
from fake_store import record

from weightstore.errors import ProtocolError
from weightstore.records import check_records, end_of, read_records
from weightstore.types import TensorRecord
from weightstore.wire import encode_records

GOOD = record("t.w", 0, (2, 3))


def test_records_survive_the_wire() -> None:
    assert read_records(encode_records([GOOD])) == [GOOD]
    assert read_records(encode_records([])) == []
    assert read_records(encode_records(None)) is None


def test_the_end_is_the_furthest_byte() -> None:
    assert end_of([]) == 0
    assert end_of([record("a", 4096, (8,)), GOOD]) == record("a", 4096).offset + 32


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float31"},
        {"stride": (3,)},
        {"offset": -256},
        {"offset": GOOD.offset + 8},
        {"nbytes": 20},
        {"nbytes": -24},
        {"shape": (-2, -3)},
        {"stride": (-3, 1)},
        {"stride": (6, 1)},
    ],
)
def test_records_that_would_address_other_bytes_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match="impossible record"):
        check_records([msgspec.structs.replace(GOOD, **change)])


def test_any_dense_order_and_a_tensor_without_elements_are_fine() -> None:
    check_records(
        [GOOD, msgspec.structs.replace(GOOD, stride=(1, 2)), TensorRecord("e", "int8", (0,), (1,), 7, 0)]
    )


def test_bytes_that_are_no_records_are_refused() -> None:
    with pytest.raises(ProtocolError, match="malformed tensor records"):
        read_records(msgspec.Raw(msgspec.msgpack.encode([1, 2])))
