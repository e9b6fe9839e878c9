"""Names without a store: what becomes of a name, of a shape, and of a map as JSON."""

from __future__ import annotations

import subprocess
import sys
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightstore.errors import InvalidTensor, UsageError
from weightstore.names import Given, Kind, NameMap, Row, Stored
from weightstore.names.given import describe, given_of
from weightstore.names.resolve import resolve
from weightstore.names.router import Router
from weightstore.names.templates import Template
from weightstore.names.wrappers import strip_wrappers
from weightstore.types import Box, TensorRecord, TensorSpec, contiguous_stride, nbytes_of


def record(name: str, shape: tuple[int, ...], dtype: str = "float32", offset: int = 0) -> TensorRecord:
    return TensorRecord(name, dtype, shape, contiguous_stride(shape), offset, nbytes_of(dtype, shape))


def stored(*records: TensorRecord, components: list[str] | None = None, extend: bool = False) -> Stored:
    """What a refit on `records` writes into, each at a place of its own."""
    placed = {
        r.name: TensorRecord(r.name, r.dtype, r.shape, r.stride, 256 * i, r.nbytes)
        for i, r in enumerate(records)
    }
    scope = None if components is None else frozenset(components)
    return Stored("refit of 'm'", placed, scope, bool(records) and not extend)


def rows(
    names: NameMap, into: Stored, *given: tuple[str, tuple[int, ...]], dtype: str = "float32"
) -> list[Row]:
    return resolve(Router(names), [Given(name, dtype, shape) for name, shape in given], into)


def targets(names: NameMap, name: str) -> tuple[str, ...]:
    return Router(names).route(name).targets


# -- templates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "name", "found"),
    [
        ("to_q", "blocks.0.attn.to_q.weight", ("blocks.0.attn.", (), ".weight")),
        ("to_q", "to_q", ("", (), "")),
        ("to_q", "blocks.0.attn.to_q_norm.weight", None),
        ("to_q", "blocks.0.attn.xto_q.weight", None),
        ("attn.to_q", "blocks.0.attn.to_q.bias", ("blocks.0.", (), ".bias")),
        ("attn.to_q", "attn.x.to_q.bias", None),
        ("to_q", "to_q.0.to_q.w", ("to_q.0.", (), ".w")),
        ("blocks.*.q", "net.blocks.12.q.w", ("net.", ("12",), ".w")),
        ("blocks.*.q", "net.blocks.1.2.q.w", None),
        ("w*_*", "w1_left.weight", ("", ("1", "left"), ".weight")),
        ("a+b", "x.a+b.w", ("x.", (), ".w")),
        ("a.b", "axb.w", None),
    ],
)
def test_a_template_stands_for_whole_segments(
    template: str, name: str, found: tuple[str, tuple[str, ...], str] | None
) -> None:
    assert Template(template).match(name) == found


def test_stars_are_filled_in_their_order() -> None:
    match = Template("blocks.*.w*").match("net.blocks.3.wq.weight")
    assert match is not None
    assert Template("layers_*.qkv.*").fill(match) == "net.layers_3.qkv.q.weight"


@pytest.mark.parametrize("text", ["", ".", "a..b", ".a", "a.", "a b", "a.**", "ä"])
def test_what_is_no_template(text: str) -> None:
    with pytest.raises(UsageError, match="segments of a tensor name"):
        Template(text)


# -- wrappers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrapped", "bare"),
    [
        ("module.proj.weight", "proj.weight"),
        ("_orig_mod.module.proj.weight", "proj.weight"),
        ("module._orig_mod.module.proj.weight", "proj.weight"),
        ("_fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.proj.weight", "blocks.0.proj.weight"),
        ("blocks.0._checkpoint_wrapped_module._orig_mod.proj.weight", "blocks.0.proj.weight"),
        ("base_model.model.blocks.0.to_q.base_layer.weight", "blocks.0.to_q.weight"),
        ("base_model.model.base_model.model.w", "w"),
        ("transformer.module.base_model.model.w", "transformer.w"),
        ("transformer._orig_mod.w", "transformer.w"),
        # These words inside a model are its own.
        ("blocks.0.module.weight", "blocks.0.module.weight"),
        ("base_model.weight", "base_model.weight"),
        ("model.base_model.weight", "model.base_model.weight"),
        ("encoder.base_model.x.weight", "encoder.base_model.x.weight"),
        ("module", "module"),
        ("_orig_mod", "_orig_mod"),
    ],
)
def test_wrappers_are_stripped(wrapped: str, bare: str) -> None:
    assert strip_wrappers(wrapped, after_component=True) == bare
    assert strip_wrappers(bare, after_component=True) == bare


def test_behind_the_first_segment_only_where_that_is_the_component() -> None:
    assert targets(NameMap(), "transformer.module.w") == ("transformer.w",)
    assert targets(NameMap(prefix="transformer."), "encoder.module.w") == ("transformer.encoder.module.w",)
    assert targets(NameMap(prefix="transformer."), "module.encoder.w") == ("transformer.encoder.w",)
    assert targets(NameMap(strip=False), "module._orig_mod.w") == ("module._orig_mod.w",)


# -- the order of rules ------------------------------------------------------------------------------


def test_renames_follow_one_another_and_the_first_that_ends_it_does() -> None:
    names = (
        NameMap(prefix="t.")
        .rename(r"^net\.", "")
        .rename(r"^body\.(\d+)", r"blocks.\1")
        .fuse(["q", "k"], "qk")
        .rename("qk", "never")
        .split("mlp", ["up", "down"])
        .drop("mlp")
    )
    route = Router(names).route("module.net.body.7.q.weight")
    assert (route.targets, route.rules, route.piece) == (("t.blocks.7.qk.weight",), (0, 1, 2), 0)
    assert route.siblings == ("blocks.7.q.weight", "blocks.7.k.weight")
    assert targets(names, "body.1.mlp.weight") == ("t.blocks.1.up.weight", "t.blocks.1.down.weight")
    assert targets(names, "qk.x") == ("t.never.x",)


def test_a_drop_before_a_fuse_takes_its_names() -> None:
    lora = r"\.lora_[AB]\."
    dropping = NameMap().drop(lora).fuse(["q", "k"], "qk")
    fusing = NameMap().fuse(["q", "k"], "qk").drop(lora)
    assert targets(dropping, "q.lora_A.weight") == ()
    assert targets(fusing, "q.lora_A.weight") == ("qk.lora_A.weight",)


def test_a_rename_replaces_wherever_its_pattern_is_found() -> None:
    assert targets(NameMap().rename("_", "-"), "a_b.c_d") == ("a-b.c-d",)
    assert targets(NameMap().rename(r"(?P<n>\d)\.", r"\g<n>_"), "a.1.2.w") == ("a.1_2_w",)


# -- the map as a value ------------------------------------------------------------------------------


def test_a_map_is_a_value() -> None:
    base = NameMap(prefix="t.")
    one = base.drop("x").fuse(["a", "b"], "ab", shares=[2, 1], keep=True)
    assert base.rules == ()
    assert one == base.drop("x").fuse(("a", "b"), "ab", shares=(2, 1), keep=True)
    assert len({one, base.drop("x").fuse(["a", "b"], "ab", shares=[2, 1], keep=True)}) == 1
    with pytest.raises(AttributeError):
        one.prefix = "other."  # type: ignore[misc]


MAPS = st.builds(
    NameMap,
    prefix=st.sampled_from(["", "transformer."]),
    strip=st.booleans(),
    rules=st.lists(
        st.sampled_from(
            NameMap()
            .rename(r"^a\.(\w+)", r"b.\1", optional=True)
            .drop(r"lora_[AB]\.")
            .fuse(["to_q", "to_k"], "to_qk", dim=-1, shares=[3, 1])
            .fuse(["w.*.a", "w.*.b"], "v.*", keep=True, optional=True)
            .split("ab.*", ["*.a", "*.b", "*.c"], dim=1)
            .rules
        )
    ).map(tuple),
)


@given(MAPS)
def test_json_keeps_a_map(names: NameMap) -> None:
    assert NameMap.from_json(names.to_json()) == names
    assert NameMap.from_json(names.to_json().encode()) == names


def test_json_by_hand_needs_no_more_than_it_says() -> None:
    text = '{"prefix": "t.", "rules": [{"rule": "fuse", "sources": ["a", "b"], "into": "ab"}]}'
    assert NameMap.from_json(text) == NameMap(prefix="t.").fuse(["a", "b"], "ab")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a name map"),
        ("[]", "Expected `object`"),
        ('{"format": 2}', "Invalid enum value 2"),
        ('{"rule": []}', "unknown field"),
        ('{"rules": [{"rule": "melt"}]}', "Invalid value 'melt'"),
        ('{"rules": [{"rule": "drop", "pattern": "("}]}', "not a regular expression"),
        ('{"rules": [{"rule": "rename", "pattern": "a", "to": "b", "colour": 1}]}', "unknown field"),
        ('{"rules": [{"rule": "fuse", "sources": ["a", "a"], "into": "b"}]}', "different templates"),
    ],
)
def test_json_that_is_no_map(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        NameMap.from_json(text)


def test_rules_that_make_no_sense_are_refused_when_they_are_made() -> None:
    with pytest.raises(UsageError, match="cannot replace"):
        NameMap().rename("a", r"\1")
    with pytest.raises(UsageError, match="cannot replace"):
        NameMap().rename("(?P<x>a)", r"\g<y>")
    with pytest.raises(UsageError, match="two or more"):
        NameMap().split("a", ["b"])
    with pytest.raises(UsageError, match="equally many stars"):
        NameMap().fuse(["a.*", "b"], "c")
    with pytest.raises(UsageError, match="shares"):
        NameMap().fuse(["a", "b"], "c", shares=[1, 0])
    with pytest.raises(UsageError, match="shares"):
        NameMap().split("a", ["b", "c"], shares=[1, 2, 3])


def test_a_map_needs_no_torch() -> None:
    script = (
        "import sys, weightstore; weightstore.NameMap(); print('torch' in sys.modules, 'rich' in sys.modules)"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


# -- where elements go --------------------------------------------------------------------------------

QKV = NameMap().fuse(["q", "k", "v"], "qkv")


def test_pieces_of_equal_size_find_their_place_one_by_one() -> None:
    into = stored(record("t.qkv.w", (6, 4)))
    for i, name in enumerate("qkv"):
        [row] = rows(QKV, into, (f"t.{name}.w", (2, 4)))
        assert (row.kind, row.target) == (Kind.FUSED, "t.qkv.w")
        assert (row.box, row.whole, row.part) == (Box((2 * i, 0), (2 * i + 2, 4)), (6, 4), None)


def test_pieces_of_unequal_size_need_company_or_shares() -> None:
    into = stored(record("qkv.w", (8, 2)))
    together = rows(QKV, into, ("v.w", (3, 2)), ("q.w", (4, 2)), ("k.w", (1, 2)))
    assert [row.box for row in together] == [
        Box((5, 0), (8, 2)),
        Box((0, 0), (4, 2)),
        Box((4, 0), (5, 2)),
    ]
    [alone] = rows(QKV, into, ("q.w", (4, 2)))
    assert (alone.kind, alone.note) == (
        Kind.MISMATCHED,
        "8 elements cannot be shared out as 1 : 1 : 1; declare shares=",
    )
    shared = NameMap().fuse(["q", "k", "v"], "qkv", shares=[4, 1, 3])
    [alone] = rows(shared, into, ("k.w", (1, 2)))
    assert alone.box == Box((4, 0), (5, 2))


def test_a_piece_that_is_not_its_share_is_mismatched() -> None:
    into = stored(record("qkv.w", (6, 2)))
    [row] = rows(QKV, into, ("q.w", (4, 2)))
    assert (row.kind, row.note) == (Kind.MISMATCHED, "[4, 2], its piece of [6, 2] is [2, 2]")
    off = rows(QKV, into, ("q.w", (4, 2)), ("k.w", (1, 2)), ("v.w", (2, 2)))
    assert {row.note for row in off} == {"4 + 1 + 2 = 7 elements, stored 6"}
    shares = NameMap().fuse(["q", "k", "v"], "qkv", shares=[1, 1, 1])
    unlike = rows(shares, into, ("q.w", (4, 2)), ("k.w", (1, 2)), ("v.w", (1, 2)))
    assert {row.kind for row in unlike} == {Kind.MISMATCHED}
    assert "proportion" in unlike[0].note


def test_pieces_must_agree_in_everything_else() -> None:
    into = stored(record("qkv.w", (6, 2)))
    both = [("q.w", (2, 2)), ("k.w", (2, 3)), ("v.w", (2, 2))]
    assert [row.kind for row in rows(QKV, into, *both)] == [Kind.FUSED, Kind.MISMATCHED, Kind.FUSED]
    assert [row.kind for row in rows(QKV, into, ("q.w", (2,)))] == [Kind.MISMATCHED]
    assert [row.kind for row in rows(QKV, into, ("q.w", ()))] == [Kind.MISMATCHED]
    [row] = rows(QKV, into, ("q.w", (2, 2)), dtype="bfloat16")
    assert (row.kind, row.note) == (Kind.MISMATCHED, "bfloat16, stored float32")


def test_any_dimension_counted_from_either_end() -> None:
    into = stored(record("qk.w", (3, 4, 2)))
    for dim in (1, -2):
        names = NameMap().fuse(["q", "k"], "qk", dim=dim)
        [row] = rows(names, into, ("k.w", (3, 2, 2)))
        assert row.box == Box((0, 2, 0), (3, 4, 2))
    [row] = rows(NameMap().fuse(["q", "k"], "qk", dim=3), into, ("k.w", (3, 2, 2)))
    assert row.kind is Kind.MISMATCHED
    [row] = rows(NameMap().fuse(["q", "k"], "qk", dim=-4), into, ("k.w", (3, 2, 2)))
    assert row.kind is Kind.MISMATCHED


def test_a_new_fused_tensor_must_be_given_whole() -> None:
    whole = rows(QKV, stored(), ("q.w", (4, 2)), ("k.w", (1, 2)), ("v.w", (1, 2)))
    assert {row.kind for row in whole} == {Kind.FUSED}
    assert {row.whole for row in whole} == {(6, 2)}
    part = rows(QKV, stored(), ("q.w", (4, 2)), ("v.w", (1, 2)))
    assert {row.kind for row in part} == {Kind.UNKNOWN}
    assert "k.w missing" in part[0].note


def test_keep_stores_the_pieces_too() -> None:
    keeping = NameMap(prefix="t.").fuse(["q", "k"], "qk", keep=True)
    into = stored(record("t.q.w", (2, 1)), record("t.k.w", (2, 1)), record("t.qk.w", (4, 1)))
    made = rows(keeping, into, ("q.w", (2, 1)), ("k.w", (2, 1)))
    assert [(row.kind, row.source, row.target) for row in made] == [
        (Kind.RENAMED, "q.w", "t.q.w"),
        (Kind.FUSED, "q.w", "t.qk.w"),
        (Kind.RENAMED, "k.w", "t.k.w"),
        (Kind.FUSED, "k.w", "t.qk.w"),
    ]


def test_a_split_goes_by_the_stored_sizes() -> None:
    names = NameMap().split("qkv", ["q", "k", "v"])
    into = stored(record("q.w", (4, 2)), record("k.w", (1, 2)), record("v.w", (1, 2)))
    made = rows(names, into, ("qkv.w", (6, 2)))
    assert [(row.kind, row.target, row.part) for row in made] == [
        (Kind.SPLIT, "q.w", Box((0, 0), (4, 2))),
        (Kind.SPLIT, "k.w", Box((4, 0), (5, 2))),
        (Kind.SPLIT, "v.w", Box((5, 0), (6, 2))),
    ]
    assert {row.kind for row in rows(names, into, ("qkv.w", (5, 2)))} == {Kind.MISMATCHED}
    assert {row.kind for row in rows(names, into, ("qkv.w", (6, 3)))} == {Kind.MISMATCHED}
    assert {row.kind for row in rows(names, into, ("qkv.w", ()))} == {Kind.MISMATCHED}
    assert {row.kind for row in rows(names, into, ("qkv.w", (6, 2)), dtype="int8")} == {Kind.MISMATCHED}


def test_a_split_into_new_tensors_goes_by_shares() -> None:
    equal = rows(NameMap().split("ab", ["a", "b"], dim=1), stored(), ("ab.w", (2, 6)))
    assert [row.part for row in equal] == [Box((0, 0), (2, 3)), Box((0, 3), (2, 6))]
    shared = rows(NameMap().split("ab", ["a", "b"], shares=[2, 1]), stored(), ("ab.w", (6,)))
    assert [row.part for row in shared] == [Box((0,), (4,)), Box((4,), (6,))]
    odd = rows(NameMap().split("ab", ["a", "b"]), stored(), ("ab.w", (5,)))
    assert {row.kind for row in odd} == {Kind.MISMATCHED}


def test_two_for_one_place_are_a_conflict() -> None:
    into = stored(record("t.w", (4,)), record("t.qk", (4,)))
    same = rows(NameMap().rename("^u", "t"), into, ("t.w", (4,)), ("u.w", (4,)), ("module.t.w", (4,)))
    assert [row.kind for row in same] == [Kind.MATCHED, Kind.CONFLICT, Kind.CONFLICT]
    assert same[1].note == "t.w writes it too"
    names = NameMap().fuse(["q", "k"], "qk")
    mixed = rows(names, into, ("t.q", (2,)), ("t.k", (2,)), ("t.qk", (4,)), ("module.t.k", (2,)))
    assert [row.kind for row in mixed] == [Kind.FUSED, Kind.FUSED, Kind.CONFLICT, Kind.CONFLICT]
    twice = rows(NameMap(), into, ("t.w", (4,)), ("t.w", (4,)))
    assert [(row.kind, row.note) for row in twice][1] == (Kind.CONFLICT, "given twice")


def test_what_is_tied_may_be_given_under_each_name_in_one_form() -> None:
    tied = {name: record(name, (4,), offset=256) for name in ("a.qk", "b.qk", "c.qk")}
    names = NameMap().fuse(["q", "k"], "qk")
    pieces = [("a.q", (2,)), ("a.k", (2,)), ("b.q", (2,)), ("b.k", (2,))]
    assert {row.kind for row in rows(names, Stored("m", tied), *pieces)} == {Kind.FUSED}
    mixed = rows(names, Stored("m", tied), *pieces, ("c.qk", (4,)))
    assert mixed[-1].kind is Kind.CONFLICT


def test_unknown_undeclared_and_mismatched() -> None:
    into = stored(record("t.w", (4,)), record("v.w", (4,)), components=["t"])
    made = rows(NameMap(), into, ("t.w", (5,)), ("v.w", (4,)), ("t.x", (1,)), ("t.w.y", (1,)))
    assert [row.kind for row in made] == [Kind.MISMATCHED, Kind.UNDECLARED, Kind.UNKNOWN, Kind.UNKNOWN]
    assert made[0].note == "[5], stored [4]"


def test_new_names_must_be_ones_the_store_can_hold() -> None:
    made = rows(NameMap().rename("^a$", ""), stored(), ("a", (1,)), ("b c", (1,)), ("ok", (1,)))
    assert [row.kind for row in made] == [Kind.UNKNOWN, Kind.UNKNOWN, Kind.MATCHED]
    assert "not allowed" in made[0].note


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    lo = tuple(draw(st.integers(0, size)) for size in shape)
    return Box(lo, tuple(draw(st.integers(start, size)) for start, size in zip(lo, shape, strict=True)))


@settings(max_examples=300)
@given(st.data())
def test_a_shard_goes_where_its_elements_go(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    dim = data.draw(st.integers(0, len(shape) - 1))
    fused = data.draw(st.booleans())
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=3))
    along = [(*shape[:dim], size, *shape[dim + 1 :]) for size in sizes]
    whole = (*shape[:dim], sum(sizes), *shape[dim + 1 :])
    parts = [f"p{i}" for i in range(len(sizes))]
    if fused:
        made = rows(NameMap().fuse(parts, "all", dim=dim), stored(), *zip(parts, along, strict=True))
    else:
        into = stored(*(record(name, size) for name, size in zip(parts, along, strict=True)))
        made = rows(NameMap().split("all", parts, dim=dim), into, ("all", whole))
    sources = {row.source: torch.arange(prod(row.shape)).reshape(row.shape) for row in made}
    # Every element has its own number, so a wrong place shows.
    if fused:
        for i, name in enumerate(parts):
            sources[name] = sources[name] + 1000 * i
        expected = {"all": torch.cat([sources[name] for name in parts], dim)}
    else:
        expected = dict(zip(parts, sources["all"].split(sizes, dim), strict=True))
    landed = {name: torch.full(value.shape, -1) for name, value in expected.items()}
    held = {name: data.draw(boxes(tuple(value.shape))) for name, value in sources.items()}
    for row in made:
        placed = row.place(held[row.source])
        if placed is not None:
            take, put = (tuple(map(slice, box.lo, box.hi)) for box in placed)
            landed[row.target][put] = sources[row.source][take]
    present = {name: torch.zeros(value.shape, dtype=torch.bool) for name, value in sources.items()}
    for name, box in held.items():
        present[name][tuple(map(slice, box.lo, box.hi))] = True
    if fused:
        here = {"all": torch.cat([present[name] for name in parts], dim)}
    else:
        here = dict(zip(parts, present["all"].split(sizes, dim), strict=True))
    for name, value in expected.items():
        assert torch.equal(landed[name], torch.where(here[name], value, -1))


def test_empty_tensors_have_a_place_too() -> None:
    row = Row(Kind.MATCHED, "a", "a", "float32", (0, 3))
    full = Box((0, 0), (0, 3))
    assert row.place(full) == (full, full)
    scalar = Row(Kind.MATCHED, "a", "a", "float32", ())
    assert scalar.place(Box((), ())) == (Box((), ()), Box((), ()))
    nothing = Row(Kind.SPLIT, "ab", "b", "float32", (2,), part=Box((2,), (2,)))
    assert nothing.place(Box((0,), (2,))) == (Box((2,), (2,)), Box((0,), (0,)))


# -- what is given ------------------------------------------------------------------------------------


def test_whatever_holds_tensors_can_be_described() -> None:
    module = torch.nn.Linear(3, 2, device="meta")
    expected = [Given("t.weight", "float32", (2, 3)), Given("t.bias", "float32", (2,))]
    assert given_of(module, "t.") == expected
    assert given_of(module.state_dict(), "t.") == expected
    assert given_of(list(module.named_parameters()), "t.") == expected
    specs = [TensorSpec("weight", "float32", (2, 3), (3, 1)), TensorSpec("bias", "float32", (2,), (1,))]
    assert given_of(specs, "t.") == expected
    assert given_of({spec.name: spec for spec in specs}, "t.") == expected


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (torch.zeros(2, dtype=torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.zeros(2, dtype=torch.bool), "bool"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (np.zeros(2, np.uint16), "uint16"),
        (np.zeros(2), "float64"),
    ],
)
def test_dtypes_go_by_the_store_s_names(value: object, dtype: str) -> None:
    assert describe("x", value) == Given("x", dtype, (2,))


@pytest.mark.parametrize(
    "value", [1.0, [1, 2], None, np.array(["a"]), torch.zeros(1, dtype=torch.complex128)]
)
def test_what_is_no_tensor(value: object) -> None:
    with pytest.raises(InvalidTensor, match="'x'"):
        describe("x", value)
    with pytest.raises(InvalidTensor):
        given_of([value])
