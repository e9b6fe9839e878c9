"""What a refit wrote against what it declared."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightstore.catalog.coverage import check_coverage
from weightstore.errors import CoverageError
from weightstore.types import Box, TensorRecord, contiguous_stride
from weightstore.wire import Write


def record(name: str, shape: tuple[int, ...], offset: int = 0) -> TensorRecord:
    nbytes = 4
    for n in shape:
        nbytes *= n
    return TensorRecord(name, "float32", shape, contiguous_stride(shape), offset, nbytes)


TARGETS = {r.name: r for r in (record("a", (4, 6), 0), record("b", (3,), 256), record("empty", (0, 5), 0))}
WHOLE = [Write("a"), Write("b"), Write("empty")]


def problems(writes: list[Write], targets: dict[str, TensorRecord] = TARGETS) -> dict[str, list[str]]:
    with pytest.raises(CoverageError) as caught:
        check_coverage(targets, writes, "refit of 'm'")
    assert "nothing was changed" in caught.value.message
    return caught.value.details


def test_everything_once_is_right():
    check_coverage(TARGETS, WHOLE, "refit")


def test_all_problems_are_named_at_once():
    assert problems([Write("a"), Write("a"), Write("nope"), Write("zilch")]) == {
        "unknown": ["nope", "zilch"],
        "duplicate": ["a"],
        "missing": ["b", "empty"],
    }


def test_one_of_two_tied_names_covers_both_and_both_are_a_duplicate():
    tied = {"x": record("x", (2,), 512), "y": record("y", (2,), 512)}
    check_coverage(tied, [Write("y")], "refit")
    assert problems([Write("x"), Write("y")], tied) == {"duplicate": ["y"]}


def test_boxes_that_leave_a_hole_overlap_or_stick_out():
    rest = [Write("b"), Write("empty")]
    top, bottom = Box((0, 0), (2, 6)), Box((2, 0), (4, 6))
    check_coverage(TARGETS, [Write("a", top), Write("a", bottom), *rest], "refit")
    assert problems([Write("a", top), *rest]) == {"holes": ["a"]}
    assert problems([Write("a", top), Write("a", bottom), Write("a", Box((1, 1), (2, 2))), *rest]) == {
        "overlapping": ["a"]
    }
    assert problems([Write("a", Box((0, 0), (5, 6))), *rest])["mismatched"] == ["a"]
    assert problems([Write("a", Box((0,), (4,))), *rest])["mismatched"] == ["a"]
    assert problems([Write("a", top), Write("a"), *rest]) == {"duplicate": ["a"]}


def test_scalars_may_be_written_as_boxes():
    scalar = {"s": record("s", ())}
    check_coverage(scalar, [Write("s", Box((), ()))], "refit")
    assert problems([Write("s", Box((), ())), Write("s", Box((), ()))], scalar) == {"overlapping": ["s"]}


def test_components_of_which_nothing_was_written_are_told_apart():
    names = ("net.w", "net.b", "text.w", "vae.w", "vae.b")
    targets = {name: record(name, (2,), i * 256) for i, name in enumerate(names)}
    advice = "nothing of text, vae was written; if that is meant, declare components=['net']"
    with pytest.raises(CoverageError) as caught:
        check_coverage(targets, [Write("net.w"), Write("nope.w")], "refit")
    assert advice in caught.value.message
    assert caught.value.details["missing"] == ["net.b", "text.w", "vae.w", "vae.b"]
    for writes in ([], [Write(f"{component}.w") for component in ("net", "text", "vae")]):
        with pytest.raises(CoverageError) as caught:
            check_coverage(targets, writes, "refit")
        assert "declare" not in caught.value.message


def test_many_names_are_counted_and_the_first_shown():
    with pytest.raises(CoverageError, match=r"20 missing \(t0, t1, .*…\)"):
        check_coverage({f"t{i}": record(f"t{i}", (1,), i * 256) for i in range(20)}, [], "refit")


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    boxes=st.lists(st.tuples(*[st.integers(0, 6)] * 4), max_size=6),
)
def test_boxes_against_counting_every_element(
    rows: int, columns: int, boxes: list[tuple[int, int, int, int]]
):
    target = {"t": record("t", (rows, columns))}
    fitting = [b for b in boxes if b[0] <= b[2] <= rows and b[1] <= b[3] <= columns]
    counts = [[0] * columns for _ in range(rows)]
    for r0, c0, r1, c1 in fitting:
        for r in range(r0, r1):
            for c in range(c0, c1):
                counts[r][c] += 1
    flat = [n for row in counts for n in row]
    expected = (
        "missing" if not fitting else "overlapping" if max(flat) > 1 else "holes" if min(flat) == 0 else None
    )
    writes = [Write("t", Box(b[:2], b[2:])) for b in fitting]
    if expected is None:
        check_coverage(target, writes, "refit")
    else:
        assert list(problems(writes, target)) == [expected]


def test_a_mesh_of_very_many_parts_is_checked_and_a_chaos_of_them_refused():
    """A mesh in any dimension is cheap; what no straight cut separates is compared only up to a bound."""
    n = 60_000
    target = {"t": record("t", (2, n, 1))}
    columns = [Write("t", Box((0, i, 0), (2, i + 1, 1))) for i in range(n)]
    check_coverage(target, columns, "refit")
    assert problems([*columns, columns[9]], target) == {"overlapping": ["t"]}
    assert problems(columns[1:], target) == {"holes": ["t"]}
    wide = {"t": record("t", (n, 2 * n))}
    stairs = [Write("t", Box((i, i), (i + 2, i + 2))) for i in range(n - 2)]
    assert problems(stairs, wide) == {"irregular": ["t"]}


def test_a_pinwheel_that_no_straight_cut_separates_is_exact():
    target = {"t": record("t", (3, 3))}
    wheel = [((0, 0), (1, 2)), ((0, 2), (2, 3)), ((2, 1), (3, 3)), ((1, 0), (3, 1)), ((1, 1), (2, 2))]
    writes = [Write("t", Box(lo, hi)) for lo, hi in wheel]
    check_coverage(target, writes, "refit")
    assert problems(writes[:-1], target) == {"holes": ["t"]}
    assert problems([*writes, Write("t", Box((1, 0), (2, 2)))], target) == {"overlapping": ["t"]}
