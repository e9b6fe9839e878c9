"""The safetensors header parser, against files of the safetensors library and damaged copies of them."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from weightstore.checkpoint.safetensors_header import (
    ALIASES_KEY,
    CODES,
    MAX_HEADER,
    STRIDES_KEY,
    Alias,
    Header,
    aliases_from,
    build_header,
    file_order,
    header_length,
    parse_header,
    strides_from,
)
from weightstore.errors import CheckpointError
from weightstore.types import ITEMSIZE, nbytes_of


def parse(data: bytes) -> Header:
    """What a reader does with a file of these bytes."""
    length = header_length(data[:8], len(data), "f.safetensors")
    return parse_header(data[8 : 8 + length], len(data), "f.safetensors")


def file_of(table: Any, data: bytes = b"") -> bytes:
    body = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(body)) + body + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


REAL = save(
    {
        "transformer.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "transformer.scale": torch.tensor(2.5, dtype=torch.bfloat16),
        "vae.empty": torch.empty(0, 3, dtype=torch.float16),
        "vae.table": torch.arange(5, dtype=torch.int64),
    },
    metadata={"format": "pt"},
)


def test_a_file_of_the_safetensors_library_is_read_as_the_library_reads_it() -> None:
    header = parse(REAL)
    assert header.metadata == {"format": "pt"}
    expected = load(REAL)
    assert {t.name for t in header.tensors} == expected.keys()
    for tensor in header.tensors:
        value = expected[tensor.name]
        assert tensor.shape == tuple(value.shape)
        assert tensor.dtype == str(value.dtype).removeprefix("torch.")
        raw = value.flatten().view(torch.uint8) if value.numel() else torch.empty(0, dtype=torch.uint8)
        assert REAL[tensor.begin : tensor.end] == bytes(raw.tolist())


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
def test_every_dtype_of_the_store_can_be_written_and_read_by_the_library(dtype: str) -> None:
    head, header = build_header([("t", dtype, (3, 1))], {"format": "pt"}, "f")
    data = bytes(range(3 * ITEMSIZE[dtype])) if dtype != "bool" else b"\1\0\1"
    tensor = load(head + data)["t"]
    assert str(tensor.dtype) == f"torch.{dtype}" and tuple(tensor.shape) == (3, 1)
    assert bytes(tensor.flatten().view(torch.uint8).tolist()) == data
    assert header.tensors[0].dtype == dtype


def test_wide_dtypes_come_first_so_that_data_is_aligned() -> None:
    order = file_order(
        [("a", "bool", (3,)), ("b", "bfloat16", (3,)), ("c", "complex64", ()), ("d", "int16", ())]
    )
    assert [name for name, _, _ in order] == ["c", "b", "d", "a"]
    _, header = build_header(order, {}, "f")
    for tensor in header.tensors:
        assert tensor.begin % ITEMSIZE[tensor.dtype] == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes are too few"),
        (b"\x02\0\0", "3 bytes are too few"),
        (struct.pack("<Q", MAX_HEADER + 1) + b"{}", f"header of {MAX_HEADER + 1} bytes"),
        (struct.pack("<Q", 1 << 63) + b"{}", f"header of {1 << 63} bytes"),
        (struct.pack("<Q", 3) + b"{}", "header of 3 bytes in a file of 10"),
        (struct.pack("<Q", 0), "header of 0 bytes"),
        (file_of(b" {}"), "does not start with"),
        (file_of(b"[]"), "does not start with"),
        (file_of(b'{"a":'), "not valid JSON"),
        (file_of(b'{"\xff":1}'), "not valid JSON"),
        (file_of(b'{"a":' + b"[" * 100_000), "not valid JSON"),
        (file_of(b'{"a":' + b"9" * 10_000 + b"}"), "not valid JSON"),
        (file_of(b"{} x"), "not valid JSON"),
        (
            file_of(b'{"a":{"dtype":"F32","shape":[1],"shape":[2],"data_offsets":[0,8]}}', b"12345678"),
            "twice",
        ),
        (file_of(b'{"a":1,"a":1}'), "'a' occurs twice"),
        (file_of({"__metadata__": {"a": 1}}), "map strings to strings"),
        (file_of({"__metadata__": []}), "map strings to strings"),
        (file_of({"a": 3}), "must have exactly the fields"),
        (file_of({"a": {"dtype": "F32", "shape": [2]}}, b"12345678"), "must have exactly the fields"),
        (file_of({"a": entry() | {"scale": 2}}, b"12345678"), "must have exactly the fields"),
        (file_of({"a": entry("F8_E8M0", (8,))}, b"12345678"), "dtype 'F8_E8M0'"),
        (file_of({"a": entry() | {"dtype": ["F32"]}}, b"12345678"), "dtype"),
        (file_of({"a": entry(shape=(-2,))}, b"12345678"), "shape"),
        (file_of({"a": entry(shape=(2.0,))}, b"12345678"), "shape"),
        (file_of({"a": entry(shape=(True, 2))}, b"12345678"), "shape"),
        (file_of({"a": entry() | {"shape": 2}}, b"12345678"), "shape"),
        (file_of({"a": entry(shape=(1,) * 1000)}, b"1234"), "shape"),
        (file_of({"a": entry(shape=(1 << 48,))}, b"12345678"), "shape"),
        (file_of({"a": entry(offsets=(0, 8, 8))}, b"12345678"), "data_offsets"),
        (
            file_of({"a": entry(offsets=(8, 0))}, b"12345678"),
            "has 8 bytes, but its data_offsets [8, 0] span -8",
        ),
        (file_of({"a": entry(offsets=(-8, 0))}, b"12345678"), "data_offsets"),
        (file_of({"a": entry(shape=(3,))}, b"12345678"), "has 12 bytes, but its data_offsets [0, 8] span 8"),
        (file_of({"a": entry(shape=(1 << 40, 1 << 40))}, b"12345678"), f"has {1 << 82} bytes"),
        (file_of({"a": entry(), "b": entry()}, b"12345678"), "overlaps"),
        (file_of({"a": entry(), "b": entry(offsets=(4, 12))}, b"12345678abcd"), "overlaps"),
        (file_of({"a": entry(), "b": entry(shape=(0,), offsets=(4, 4))}, b"12345678"), "overlaps"),
        (file_of({"a": entry(offsets=(4, 12))}, b"12345678abcd"), "leaves a hole"),
        (file_of({"a": entry()}, b"1234567"), "truncated"),
        (file_of({"a": entry()}, b"123456789"), "longer than its tensors"),
    ],
)
def test_what_is_wrong_is_refused_and_named(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(data)
    assert message in caught.value.message
    assert caught.value.message.startswith("f.safetensors")


def test_header_padding_and_an_empty_tensor_between_others_are_allowed() -> None:
    table = {"a": entry(), "e": entry(shape=(0, 7), offsets=(8, 8)), "b": entry(offsets=(8, 16))}
    header = parse(file_of(json.dumps(table).encode() + b" \n ", b"x" * 16))
    assert [t.name for t in header.tensors] == ["a", "e", "b"]
    assert header.tensors[1].nbytes == 0


def check_is_sound(header: Header, size: int) -> None:
    """The promise of a Header: every byte of the data belongs to exactly one tensor, all in the file."""
    end = header.data_start
    for tensor in header.tensors:
        assert tensor.begin == end
        assert tensor.nbytes == nbytes_of(tensor.dtype, tensor.shape)
        end = tensor.end
    assert end == size == header.file_size


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_or_still_sound(data: st.DataObject) -> None:
    damaged = bytearray(REAL)
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "number"]))
        at = data.draw(st.integers(0, max(0, len(damaged) - 1)))
        if kind == "flip" and damaged:
            damaged[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del damaged[at : at + data.draw(st.integers(1, 40))]
        elif kind == "insert":
            damaged[at:at] = data.draw(st.binary(min_size=1, max_size=12))
        else:
            digits = [i for i, byte in enumerate(damaged) if chr(byte).isdigit()]
            if digits:
                damaged[data.draw(st.sampled_from(digits))] = ord(data.draw(st.sampled_from("0123456789-.e")))
    try:
        header = parse(bytes(damaged))
    except CheckpointError:
        return
    check_is_sound(header, len(damaged))
    for read in (aliases_from, strides_from):
        assert read(header) == {}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
lying_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(CODES.values())) | json_values,
        "shape": st.lists(st.integers(0, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2) | json_values,
    }
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.text(max_size=6), lying_entries | json_values, max_size=4), st.integers(0, 64))
def test_a_lying_header_is_refused_or_still_sound(table: dict[str, Any], data_bytes: int) -> None:
    data = file_of(table, bytes(data_bytes))
    try:
        header = parse(data)
    except CheckpointError:
        return
    check_is_sound(header, len(data))


tensor_lists = st.lists(
    st.tuples(
        st.text(min_size=1, max_size=8).filter(lambda s: s != "__metadata__"),
        st.sampled_from(sorted(ITEMSIZE)),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    unique_by=lambda t: t[0],
    max_size=6,
)


@settings(max_examples=100, deadline=None)
@given(tensor_lists)
def test_what_is_built_parses_to_the_same(tensors: list[tuple[str, str, tuple[int, ...]]]) -> None:
    head, header = build_header(file_order(tensors), {"k": "v"}, "f.safetensors")
    assert len(head) % 8 == 0
    again = parse(head + bytes(header.file_size - len(head)))
    assert again == header
    assert sorted((t.name, t.dtype, t.shape) for t in again.tensors) == sorted(tensors)


def test_a_name_the_format_reserves_or_given_twice_cannot_be_written() -> None:
    for tensors in ([("__metadata__", "bool", ())], [("a", "bool", ()), ("a", "int8", ())]):
        with pytest.raises(CheckpointError, match="cannot be written"):
            build_header(tensors, {}, "f")


def with_metadata(**metadata: str) -> Header:
    return build_header([("a", "float32", (2, 3))], metadata, "f")[1]


def test_ties_and_strides_are_read_from_the_metadata() -> None:
    alias = {"target": "a", "dtype": "float32", "shape": [3, 2], "stride": [1, 3]}
    header = with_metadata(**{ALIASES_KEY: json.dumps({"b": alias}), STRIDES_KEY: '{"a": [1, 2]}'})
    assert aliases_from(header) == {"b": Alias("a", "float32", (3, 2), (1, 3))}
    assert strides_from(header) == {"a": (1, 2)}
    assert aliases_from(with_metadata()) == {} and strides_from(with_metadata()) == {}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (ALIASES_KEY, "[1]", "not a JSON object"),
        (ALIASES_KEY, "{", "not valid JSON"),
        (ALIASES_KEY, '{"b": "a"}', "malformed"),
        (ALIASES_KEY, '{"b": {"target": "a", "dtype": "int8", "shape": [1]}}', "malformed"),
        (ALIASES_KEY, '{"a": {"target": "a", "dtype": "int8", "shape": [], "stride": []}}', "also recorded"),
        (ALIASES_KEY, '{"b": 1, "b": 2}', "twice"),
        (STRIDES_KEY, '{"a": [1.5, 1]}', "malformed"),
        (STRIDES_KEY, '{"b": [1]}', "is not in the file"),
        (STRIDES_KEY, '{"\ud800": [1]}', "malformed"),
    ],
)
def test_malformed_metadata_of_ours_is_refused(key: str, value: str, message: str) -> None:
    header = Header("f", 0, 0, with_metadata().tensors, {key: value})
    with pytest.raises(CheckpointError, match=message):
        aliases_from(header) if key == ALIASES_KEY else strides_from(header)


def test_a_real_file_cut_anywhere_is_refused() -> None:
    for size in range(len(REAL)):
        with pytest.raises(CheckpointError):
            parse(REAL[:size])
