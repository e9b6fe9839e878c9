"""Between torch and records: over a real mapping, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_store import FakeArena, record
from hypothesis import given
from hypothesis import strategies as st

from weightstore.errors import InvalidTensor, ProtocolError
from weightstore.layout import DATA_OFFSET
from weightstore.mapping import ArenaMapping
from weightstore.tensors import (
    DTYPES,
    as_tensor,
    dtype_name,
    flat_bytes,
    place_of,
    same_bits,
    spec_of,
    tensor_of,
)
from weightstore.types import ITEMSIZE, TensorRecord, check_spec


@pytest.fixture(scope="module")
def mapping() -> Iterator[ArenaMapping]:
    arena = FakeArena()
    fd = arena.writer()
    with ArenaMapping(fd, arena.nbytes, True) as mapping:
        yield mapping
    os.close(fd)
    arena.close()


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Any bit pattern, NaNs and infinities included (bool: its two values)."""
    if dtype is torch.bool or 0 in shape:
        return torch.randint(0, 2, shape).to(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return torch.from_numpy(np.frombuffer(os.urandom(nbytes), np.uint8).copy()).view(dtype).reshape(shape)


def test_the_table_names_every_stored_dtype_as_torch_does() -> None:
    assert set(DTYPES) == set(ITEMSIZE)
    for name, dtype in DTYPES.items():
        assert str(dtype) == f"torch.{name}"
        assert dtype.itemsize == ITEMSIZE[name]
        assert dtype_name("x", dtype) == name


@pytest.mark.parametrize("name", sorted(ITEMSIZE))
def test_every_dtype_round_trips_bit_for_bit(mapping: ArenaMapping, name: str) -> None:
    source = random_bits((5, 7), DTYPES[name])
    spec = spec_of("x", as_tensor("x", source))
    place = TensorRecord("x", spec.dtype, spec.shape, spec.stride, DATA_OFFSET + 256, 35 * ITEMSIZE[name])
    place_of(mapping, place).copy_(source)
    shown = tensor_of(mapping, place)
    assert (shown.dtype, shown.shape, shown.stride()) == (source.dtype, source.shape, source.stride())
    assert same_bits(shown, source)
    assert bytes(mapping.view(place.offset, place.nbytes)) == bytes(flat_bytes(source).tolist())


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 4, 1)])
def test_scalars_empties_and_ones(mapping: ArenaMapping, shape: tuple[int, ...]) -> None:
    source = random_bits(shape, torch.bfloat16)
    spec = check_spec(spec_of("x", source))
    place = TensorRecord("x", spec.dtype, spec.shape, spec.stride, DATA_OFFSET, source.numel() * 2)
    place_of(mapping, place).copy_(source)
    shown = tensor_of(mapping, place)
    assert shown.shape == source.shape
    assert same_bits(shown, source)


@given(st.permutations(range(4)), st.tuples(*[st.integers(1, 4)] * 4))
def test_dense_strides_are_kept_and_bytes_follow_memory(order: list[int], shape: tuple[int, ...]) -> None:
    source = torch.arange(int(np.prod(shape)), dtype=torch.int16).reshape(shape).permute(*order)
    spec = check_spec(spec_of("x", source))
    assert spec.stride == source.stride()
    assert flat_bytes(source).view(torch.int16).tolist() == list(range(source.numel()))


def test_channels_last_is_kept_and_gaps_are_closed() -> None:
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert spec_of("x", image).stride == image.stride() == (60, 1, 15, 3)
    for loose in (torch.randn(4, 6)[:, ::2], torch.randn(3, 1).expand(3, 4), torch.randn(4, 4)[1:, 1:]):
        spec = check_spec(spec_of("x", loose))
        assert spec.stride == (spec.shape[1], 1)


def test_a_tensor_of_the_arena_has_a_storage_of_its_own_extent(mapping: ArenaMapping) -> None:
    a, b = (tensor_of(mapping, record(name, offset, (8,))) for name, offset in (("a", 0), ("b", 256)))
    assert a.untyped_storage().nbytes() == 32
    assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()
    assert a.data_ptr() == mapping.address + DATA_OFFSET == place_of(mapping, record("a", 0, (8,))).data_ptr()


def test_an_encoding_this_release_does_not_know_is_refused(mapping: ArenaMapping) -> None:
    with pytest.raises(ProtocolError, match="packed"):
        tensor_of(mapping, record("a", 0, encoding="packed"))


# -- what may be put ------------------------------------------------------------------------------


def test_numpy_shares_its_memory() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert as_tensor("x", array).data_ptr() == array.ctypes.data
    assert as_tensor("x", array.T).stride() == (1, 3)


def test_read_only_numpy_is_taken_without_a_warning() -> None:
    array = np.arange(6, dtype=np.uint16)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_tensor("x", array).tolist() == [0, 1, 2, 3, 4, 5]


def test_numpy_backwards_is_put_forwards() -> None:
    assert as_tensor("x", np.arange(4)[::-1]).tolist() == [3, 2, 1, 0]


def test_dlpack_is_taken() -> None:
    class Foreign:
        """As cupy's: no tensor, no array, only the protocol."""

        def __init__(self) -> None:
            self.tensor = torch.arange(3.0)

        def __dlpack__(self, **arguments: Any) -> Any:
            return self.tensor.__dlpack__(**arguments)

        def __dlpack_device__(self) -> Any:
            return self.tensor.__dlpack_device__()

    foreign = Foreign()
    assert as_tensor("x", foreign).data_ptr() == foreign.tensor.data_ptr()


def test_parameters_subclasses_and_conjugates_become_plain_values() -> None:
    class Tagged(torch.Tensor):
        pass

    assert type(as_tensor("x", torch.randn(2).as_subclass(Tagged))) is torch.Tensor
    parameter = torch.nn.Parameter(torch.randn(3))
    assert as_tensor("x", parameter).data_ptr() == parameter.data_ptr()
    values = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    plain = as_tensor("x", values.conj())
    assert not plain.is_conj()
    assert plain.tolist() == [1 - 2j, 3 + 4j]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (torch.empty(2, device="meta"), "meta"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.zeros(2, dtype=torch.complex128), "complex128.*the store holds bfloat16"),
        (np.array(["a"]), "ndarray"),
        (np.zeros(2, ">f4"), "ndarray"),
        (np.zeros(2, np.longdouble), "ndarray"),
        (torch.nn.parameter.UninitializedParameter(), "uninitialized"),
        ([1.0, 2.0], "list"),
        (None, "NoneType"),
    ],
)
def test_what_the_store_cannot_hold_is_refused_by_name(value: Any, why: str) -> None:
    with pytest.raises(InvalidTensor, match=rf"(?s)'the\.name'.*{why}"):
        as_tensor("the.name", value)


def test_tensors_whose_values_lie_elsewhere_are_refused() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(InvalidTensor, match="FakeTensor"):
        as_tensor("x", torch.empty(2))


def test_a_dtensor_is_no_plain_tensor() -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = DTensor.from_local(torch.randn(2), init_device_mesh("cpu", (1,)))
        for value in (sharded, torch.nn.Parameter(sharded)):
            with pytest.raises(InvalidTensor, match="DTensor, which says itself"):
                as_tensor("x", value)
    finally:
        dist.destroy_process_group()


def test_same_bits_tells_nans_and_zeros_apart() -> None:
    nan = torch.tensor([float("nan"), 0.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    for order in permutations(range(3)):
        values = torch.randn(2, 3, 4).permute(*order)
        assert same_bits(values, values.contiguous())


def test_importing_the_client_imports_no_torch() -> None:
    script = "import sys, weightstore.client; print('torch' in sys.modules, 'numpy' in sys.modules)"
    root = Path(__file__).resolve().parent.parent
    ran = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]
