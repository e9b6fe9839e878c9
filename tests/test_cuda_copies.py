"""How copies are cut, without a GPU."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from weightstore.cuda.copies import split, split_rows
from weightstore.layout import DATA_OFFSET

offsets = st.integers(0, 5000).map(lambda n: DATA_OFFSET + n)


def crosses(offset: int, nbytes: int, window: int) -> bool:
    return (offset - DATA_OFFSET) // window != (offset + nbytes - 1 - DATA_OFFSET) // window


@given(st.lists(st.tuples(st.integers(0, 1 << 40), offsets, st.integers(0, 3000))), st.integers(1, 1000))
def test_split_moves_the_same_bytes_and_crosses_no_border(
    jobs: list[tuple[int, int, int]], window: int
) -> None:
    parts = split(jobs, window)
    assert not any(crosses(offset, nbytes, window) for _, offset, nbytes in parts)
    assert all(nbytes > 0 for _, _, nbytes in parts)
    joined: list[tuple[int, int, int]] = []
    rest = list(parts)
    for address, offset, nbytes in jobs:
        done = 0
        while done < nbytes:
            part = rest.pop(0)
            assert part[:2] == (address + done, offset + done)
            done += part[2]
        joined.append((address, offset, done))
    assert not rest
    assert joined == jobs


def test_split_leaves_a_copy_that_ends_at_a_border_whole() -> None:
    assert split([(0, DATA_OFFSET + 50, 50), (0, DATA_OFFSET + 100, 100)], 100) == [
        (0, DATA_OFFSET + 50, 50),
        (0, DATA_OFFSET + 100, 100),
    ]


@given(offsets, st.integers(1, 60), st.integers(1, 300), st.integers(0, 200), st.integers(1, 1000))
def test_blocks_of_rows_stay_within_windows(
    offset: int, rows: int, nbytes: int, gap: int, window: int
) -> None:
    pitch = nbytes + gap
    blocks = split_rows(offset, rows, nbytes, pitch, window)
    assert [first for first, _ in blocks] == [sum(n for _, n in blocks[:i]) for i in range(len(blocks))]
    assert sum(count for _, count in blocks) == rows
    for first, count in blocks:
        if count > 1:
            assert not crosses(offset + first * pitch, (count - 1) * pitch + nbytes, window)
