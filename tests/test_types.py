"""Which strides are dense, judged against the definition; which specs the store refuses."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from weightstore.errors import InvalidName, InvalidTensor
from weightstore.types import MAX_DIMS, MAX_NBYTES, TensorSpec, check_spec, contiguous_stride, is_dense

sizes = st.lists(st.integers(0, 4), max_size=4)


def places(shape: list[int], stride: list[int]) -> list[int]:
    """The element offset of every index."""
    return [sum(i * s for i, s in zip(index, stride, strict=True)) for index in product(*map(range, shape))]


@given(sizes, st.data())
def test_dense_means_that_the_elements_fill_one_range_once(shape: list[int], data: st.DataObject) -> None:
    stride = data.draw(st.lists(st.integers(0, 24), min_size=len(shape), max_size=len(shape)))
    found = sorted(places(shape, stride))
    assert is_dense(shape, stride) == (found == list(range(len(found))))


@given(sizes, st.randoms(use_true_random=False))
@example([], None)
@example([2, 1, 3], None)
def test_any_order_of_dimensions_is_dense(shape: list[int], random: object) -> None:
    order = list(range(len(shape)))
    if random is not None:
        random.shuffle(order)  # type: ignore[attr-defined]
    inner = contiguous_stride([shape[d] for d in order])
    stride = [inner[order.index(d)] for d in range(len(shape))]
    assert is_dense(shape, stride)


@pytest.mark.parametrize(
    ("spec", "error", "said"),
    [
        (TensorSpec("a b", "uint8", (1,), (1,)), InvalidName, "no spaces"),
        (TensorSpec("a", "float128", (1,), (1,)), InvalidTensor, "float128"),
        (TensorSpec("a", "uint8", (1,), ()), InvalidTensor, "strides"),
        (TensorSpec("a", "uint8", (1,) * (MAX_DIMS + 1), (1,) * (MAX_DIMS + 1)), InvalidTensor, "dimensions"),
        (TensorSpec("a", "uint8", (-1,), (1,)), InvalidTensor, "out of range"),
        (TensorSpec("a", "uint8", (2,), (-1,)), InvalidTensor, "out of range"),
        (TensorSpec("a", "uint8", (MAX_NBYTES,), (1,)), InvalidTensor, "out of range"),
        (TensorSpec("a", "int64", (MAX_NBYTES - 1,), (1,)), InvalidTensor, "larger"),
        (TensorSpec("a", "uint8", (2, 2), (3, 1)), InvalidTensor, "gaps"),
        (TensorSpec("a", "uint8", (2, 2), (1, 1)), InvalidTensor, "overlaps"),
    ],
)
def test_what_the_store_cannot_hold_is_refused(spec: TensorSpec, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        check_spec(spec)


def test_what_it_can_hold_is_not() -> None:
    for shape, stride in (((), ()), ((0, 3), (9, 9)), ((3, 4), (1, 3)), ((5, 1, 2), (2, 77, 1))):
        assert check_spec(TensorSpec("a.b", "bfloat16", shape, stride)).shape == shape
