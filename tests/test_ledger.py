from __future__ import annotations

import msgspec
import pytest
from fake_store import record

from weightstore.errors import CoverageError
from weightstore.ledger import Ledger, Problems
from weightstore.types import Box, TensorRecord, TensorSpec
from weightstore.wire import Write

WEIGHT = record("t.w", 0, (4, 6))
BIAS = record("t.b", 256, (6,), "bfloat16")
EMBED = record("e.a", 512, (3,))
TIED = record("e.b", 512, (3,))
EMPTY = record("t.none", 0, (0, 2))
BASE = {r.name: r for r in (WEIGHT, BIAS, EMBED, TIED, EMPTY)}


def moved(place: TensorRecord) -> TensorRecord:
    """Where a refit puts a tensor of the base: elsewhere."""
    return record(place.name, place.offset + 4096, place.shape, place.dtype)


def ledger(components: list[str] | None = None, extend: bool = False, base: bool = True) -> Ledger:
    made = Ledger("refit of 'm'", BASE if base else {}, base, components, extend)
    if base:
        made.place(moved(found) for found in BASE.values())
    return made


def wants(*records: TensorRecord) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(r.name, r.dtype, r.shape) for r in records]


def refused(call: object, *arguments: object) -> dict[str, object]:
    with pytest.raises(CoverageError) as caught:
        call(*arguments)  # type: ignore[operator]
    return caught.value.details


def test_exactly_the_base_is_accepted() -> None:
    ledger().check(wants(*BASE.values()))


def test_every_wrong_name_is_told_at_once() -> None:
    made = ledger(["t"])
    made.enter("t.b")
    wrong = [
        ("t.new", "float32", (1,)),
        ("e.a", "float32", (3,)),
        ("t.w", "float32", (6, 4)),
        ("t.b", "bfloat16", (6,)),
    ]
    assert refused(made.check, wrong) == {
        "unknown": ["t.new"],
        "undeclared": ["e.a"],
        "mismatched": ["t.w"],
        "duplicate": ["t.b"],
    }


@pytest.mark.parametrize("prefix", ["", "t"])
@pytest.mark.parametrize("components", [None, ["t"]])
def test_a_prefix_that_was_forgotten_is_named(prefix: str, components: list[str] | None) -> None:
    wrong = [(f"{prefix}{name}", "float32", (1,)) for name in ("w", "b", "other")]
    with pytest.raises(CoverageError) as caught:
        ledger(components).check(wrong)
    assert "; 2 would match with prefix='t.'; nothing was written" in caught.value.message
    assert list(caught.value.details.values()) == [[name for name, _, _ in wrong]]
    with pytest.raises(CoverageError) as caught:
        ledger(components).check([("w.b", "float32", (1,))])
    assert "prefix" not in caught.value.message


def test_a_mismatch_shows_both_dtypes_and_shapes() -> None:
    with pytest.raises(CoverageError, match=r"t\.b: given float32 \[6\], stored bfloat16 \[6\]"):
        ledger().check([("t.b", "float32", (6,))])


def test_new_names_need_extend_or_no_base() -> None:
    new = [("t.new", "float32", (1,))]
    assert refused(ledger().check, new) == {"unknown": ["t.new"]}
    ledger(extend=True).check(new)
    ledger(base=False).check(new)
    assert refused(ledger(["e"], extend=True).check, new) == {"undeclared": ["t.new"]}


def test_a_tie_is_written_and_reported_once() -> None:
    made = ledger()
    made.check(wants(EMBED, TIED))
    assert made.enter("e.a") is True
    assert made.enter("e.b") is False
    assert made.writes() == [Write("e.a")]
    assert (made.tensors, made.nbytes) == (2, 12)
    assert refused(made.check, wants(TIED)) == {"duplicate": ["e.b"]}


def test_a_new_name_may_be_tied_to_one_of_the_base() -> None:
    made = ledger(extend=True)
    place = made.places["t.b"]
    made.place([msgspec.structs.replace(place, name="t.new")])
    assert made.enter("t.b") and not made.enter("t.new")
    assert made.writes() == [Write("t.b")] and made.tensors == 2
    assert made.tie("t.new") == made.tie("t.b") != made.tie("t.w")


def test_the_other_name_of_a_tie_may_follow_later() -> None:
    made = ledger()
    made.enter("e.b")
    made.check(wants(EMBED))
    item = made.item("e.a")
    assert item is not None
    assert item.record.name == "e.b"


def test_empty_tensors_are_tied_to_nothing() -> None:
    other = record("t.empty", 0, (0,))
    made = Ledger("refit", {EMPTY.name: EMPTY, other.name: other, WEIGHT.name: WEIGHT}, True, None, False)
    made.places.update({r.name: r for r in (EMPTY, other, WEIGHT)})
    assert made.enter("t.none")
    assert made.enter("t.empty")
    assert made.enter("t.w")
    assert len(made.writes()) == 3


def test_parts_are_reported_as_boxes() -> None:
    made = ledger()
    boxes = [Box((0, 0), (2, 6)), Box((2, 0), (4, 6))]
    for box in boxes:
        made.check((), parts=[("t.w", "float32", box, None)])
        made.enter_part("t.w", box)
    assert made.writes() == [Write("t.w", box) for box in boxes]
    assert (made.tensors, made.nbytes) == (1, 96)


@pytest.mark.parametrize(
    ("name", "dtype", "box", "kind"),
    [
        ("t.w", "float32", Box((1, 0), (3, 6)), "overlapping"),
        ("t.w", "float32", Box((2, 0), (5, 6)), "mismatched"),
        ("t.w", "float32", Box((-1, 0), (0, 6)), "mismatched"),
        ("t.w", "float32", Box((2,), (4,)), "mismatched"),
        ("t.w", "float16", Box((2, 0), (4, 6)), "mismatched"),
        ("t.b", "bfloat16", Box((0,), (6,)), "duplicate"),
        ("e.a", "float32", Box((0,), (3,)), "undeclared"),
        ("t.new", "float32", Box((0,), (3,)), "unknown"),
    ],
)
def test_a_wrong_part_is_refused(name: str, dtype: str, box: Box, kind: str) -> None:
    made = ledger(["t"])
    made.enter_part("t.w", Box((0, 0), (2, 6)))
    made.enter("t.b")
    before = made.writes()
    assert refused(made.check, (), False, [(name, dtype, box, None)]) == {kind: [name]}
    assert made.writes() == before


def test_a_whole_after_a_part_is_a_duplicate() -> None:
    made = ledger()
    made.enter_part("t.w", Box((0, 0), (2, 6)))
    assert refused(made.check, wants(WEIGHT)) == {"duplicate": ["t.w"]}


def test_what_did_not_get_written_can_be_written_again() -> None:
    made = ledger()
    first, second = Box((0, 0), (2, 6)), Box((2, 0), (4, 6))
    made.enter("t.b")
    made.enter_part("t.w", first)
    made.enter_part("t.w", second)
    made.withdraw("t.b")
    made.withdraw("t.w", second)
    assert made.writes() == [Write("t.w", first)]
    made.check(wants(BIAS))
    made.check((), parts=[("t.w", "float32", second, None)])


def test_parts_of_one_call_are_judged_together() -> None:
    made = ledger(extend=True)
    low, high = Box((0, 0), (2, 6)), Box((1, 0), (4, 6))
    parts = [
        ("t.w", "float32", low, None),
        ("t.w", "float32", high, None),
        ("t.b", "bfloat16", Box((0,), (6,)), None),
        ("t.new", "float32", Box((0,), (1,)), None),
        ("t.w", "float32", Box((0,), (1,)), None),
    ]
    assert refused(made.check, wants(BIAS), False, parts) == {
        "overlapping": ["t.w"],
        "duplicate": ["t.b"],
        "unknown": ["t.new"],
        "mismatched": ["t.w"],
    }


def test_a_part_of_a_new_tensor_is_judged_by_what_is_said_of_the_whole() -> None:
    whole = TensorSpec("t.new", "float32", (4, 6), (6, 1))
    box = Box((0, 0), (2, 6))
    ledger(extend=True).check((), parts=[("t.new", "float32", box, whole)])
    assert refused(ledger().check, (), False, [("t.new", "float32", box, whole)]) == {"unknown": ["t.new"]}
    beyond = [("t.new", "float32", Box((3, 0), (5, 6)), whole)]
    assert refused(ledger(extend=True).check, (), False, beyond) == {"mismatched": ["t.new"]}


def test_long_lists_are_cut_in_the_message_only() -> None:
    problems = Problems("refit of 'm'")
    for i in range(100):
        problems.add("unknown", f"t.{i}")
    error = problems.error()
    assert len(error.details["unknown"]) == 100
    assert "100 unknown (t.0, " in error.message and "…" in error.message
    assert len(error.message) < 200
