"""How a tensor is described to the copy engine, checked against numpy."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from weightstore.cuda.upload import Strides, merge, tiles
from weightstore.types import contiguous_stride

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def addresses(dims: list[Strides]) -> list[tuple[int, int]]:
    """Every (target, source) element offset the dimensions describe."""
    return [
        (
            sum(i * d.target for i, d in zip(index, dims, strict=True)),
            sum(i * d.source for i, d in zip(index, dims, strict=True)),
        )
        for index in itertools.product(*(range(d.size) for d in dims))
    ]


@given(shapes, st.data())
def test_merge_describes_the_same_copy_with_fewer_dimensions(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    inverse = sorted(range(len(shape)), key=order.__getitem__)
    dense = contiguous_stride([shape[d] for d in order])
    source = tuple(dense[inverse[d]] for d in range(len(shape)))
    target = contiguous_stride(shape)
    plain = addresses([Strides(*d) for d in zip(shape, target, source, strict=True)])
    merged = merge(shape, target, source)
    assert sorted(addresses(merged)) == sorted(plain)
    assert len(merged) <= max(len(shape), 1)
    if source == target:
        assert len(merged) <= 1


def test_merge_of_rows_with_padding_is_two_dimensions() -> None:
    assert merge((10, 20, 30), (600, 30, 1), (6400, 320, 1)) == [Strides(200, 30, 320), Strides(30, 1, 1)]


@given(shapes, st.integers(1, 40))
def test_tiles_cover_everything_once_in_bounded_pieces(shape: tuple[int, ...], limit: int) -> None:
    seen = np.zeros(shape, int)
    for tile in tiles(shape, limit):
        assert math.prod(seen[tile].shape) <= limit
        seen[tile] += 1
    assert (seen == 1).all()
