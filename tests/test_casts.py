"""Casts: which are made, that they are torch's own bit for bit, and which values stop them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from hooked import fresh_model
from hypothesis import given, settings
from hypothesis import strategies as st

import weightstore as ws
from weightstore import copies
from weightstore.casts import (
    OVERFLOWS_FROM,
    WITHOUT_INF,
    always_fits,
    check_mode,
    kind_of,
    range_of,
    refusal,
    refuse_overflow,
)
from weightstore.errors import CastRefused, CoverageError, UsageError
from weightstore.names import NameMap
from weightstore.tensors import DTYPES, NAMES, same_bits
from weightstore.types import ITEMSIZE

FLOATS = list(OVERFLOWS_FROM)
INTS = [name for name in ITEMSIZE if kind_of(name) == "int"]


# -- dtypes -------------------------------------------------------------------------------------------


def test_kinds_are_torchs() -> None:
    for name, dtype in DTYPES.items():
        kind = "complex" if dtype.is_complex else "float" if dtype.is_floating_point else "int"
        assert kind_of(name) == ("bool" if dtype == torch.bool else kind)


def test_safe_casts_stay_within_a_kind() -> None:
    for given_, stored in product(ITEMSIZE, repeat=2):
        assert (refusal(given_, stored, "safe") == "") == (kind_of(given_) == kind_of(stored))
        assert (refusal(given_, stored, "never") == "") == (given_ == stored)
        assert refusal(given_, stored, "any") == ""
    assert refusal("int64", "float32", "safe") == 'int becomes float with cast="any" only'


def test_only_three_modes() -> None:
    assert [check_mode(mode) for mode in ("safe", "any", "never")] == ["safe", "any", "never"]
    with pytest.raises(UsageError, match="'always'; it can be 'safe', 'any', 'never'"):
        check_mode("always")


def test_integers_have_torchs_range() -> None:
    for name in INTS:
        info = torch.iinfo(DTYPES[name])
        assert range_of(name) == (info.min, info.max)


@pytest.mark.parametrize("stored", [name for name in FLOATS if name != "float64"])
def test_what_overflows_is_where_torch_says(stored: str) -> None:
    wide = torch.float64 if stored == "float32" else torch.float32
    at = torch.tensor(OVERFLOWS_FROM[stored], dtype=torch.float64).to(wide)
    if at.double().item() < OVERFLOWS_FROM[stored]:
        at = torch.nextafter(at, torch.tensor(math.inf, dtype=wide))
    below = torch.nextafter(at, torch.tensor(0.0, dtype=wide))
    assert below.to(DTYPES[stored]).double().item() == torch.finfo(DTYPES[stored]).max
    if stored not in WITHOUT_INF:
        assert at.to(DTYPES[stored]).double().isinf()
    assert worst(below, stored) is None and worst(-below, stored) is None
    assert worst(at, stored) == at.item() and worst(-at, stored) == -at.item()


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float8_e5m2"])
def test_float64_overflows_where_torch_rounds_it_twice(stored: str) -> None:
    at = torch.tensor(OVERFLOWS_FROM[stored], dtype=torch.float64)
    for step in range(1, 60):
        value = at * (1 - 2.0**-step)
        assert (worst(value, stored) is not None) == bool(value.to(DTYPES[stored]).isinf())


def test_what_always_fits_is_wider() -> None:
    fits = {(a, b) for a, b in product(FLOATS, repeat=2) if a != b and always_fits(a, b)}
    assert {("bfloat16", "float32"), ("float16", "bfloat16"), ("float8_e4m3fn", "float8_e5m2")} <= fits
    assert not fits & {(b, a) for a, b in fits}
    assert ("float32", "bfloat16") not in fits  # its largest values round up to infinity
    assert always_fits("int8", "int16") and not always_fits("int8", "uint64")
    assert always_fits("uint8", "int16") and not always_fits("int16", "int8")


# -- values -------------------------------------------------------------------------------------------


def worst(tensor: torch.Tensor, stored: str) -> float | None:
    """The value that stops `tensor` from being cast; None if none does."""
    try:
        refuse_overflow([("w", tensor, stored)], "refit of 'm'")
    except CastRefused as error:
        value: float = error.details["overflow"]["w"]
        return value
    return None


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(width=32), max_size=6),
    st.sampled_from(["float16", "bfloat16", "float8_e5m2"]),
    st.booleans(),
)
def test_a_cast_is_refused_just_if_a_number_would_become_infinite(
    values: list[float], stored: str, turned: bool
) -> None:
    tensor = torch.tensor([values, values[::-1]], dtype=torch.float32)
    tensor = tensor.T if turned else tensor
    overflows = tensor.isfinite() & ~tensor.to(DTYPES[stored]).isfinite()
    found = worst(tensor, stored)
    assert (found is not None) == bool(overflows.any())
    if found is not None:
        assert abs(found) == tensor[overflows].abs().max().item()


def test_nans_and_infinities_are_not_overflows() -> None:
    odd = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    for stored in ("float16", "bfloat16", "float8_e5m2"):
        assert worst(odd, stored) is None
    large = torch.tensor([math.nan, math.inf, 7e4, -8e4, 3.0])
    assert worst(large, "float16") == -8e4
    assert worst(large[[2, 4]], "float16") == 7e4
    assert worst(torch.full((3,), math.nan), "float16") is None


def test_a_dtype_without_infinities_takes_none() -> None:
    assert worst(torch.tensor([464.0, -1.0]), "float8_e4m3fn") is None
    assert worst(torch.tensor([465.0, -1.0]), "float8_e4m3fn") == 465
    assert worst(torch.tensor([1.0, -math.inf]), "float8_e4m3fn") == -math.inf
    assert worst(torch.tensor([math.nan, math.inf]), "float8_e4m3fn") == math.inf
    assert worst(torch.tensor([1000.0, -500.0]).to(torch.float8_e5m2), "float8_e4m3fn") == 1024


@pytest.mark.parametrize("given_", INTS)
def test_integers_must_not_wrap_around(given_: str) -> None:
    low, high = range_of(given_)
    ends = torch.tensor([low, high], dtype=DTYPES[given_])
    for stored in INTS:
        least, most = range_of(stored)
        fits = least <= low and high <= most
        found = worst(ends, stored)
        assert (found is None) == fits
        if found is not None:
            assert not least <= found <= most
        assert worst(torch.tensor([0, 100], dtype=DTYPES[given_]), stored) is None


def test_all_names_are_told_with_their_largest_value() -> None:
    tensors = {
        "a": torch.full((2, 2), 1e5),
        "fine": torch.ones(3),
        "b": torch.tensor([1.0, -9e9], dtype=torch.float64),
    }
    with pytest.raises(
        CastRefused, match=r"values of 2 tensors overflow .*a: 100000 in float32.*b: -9e\+09 in"
    ) as caught:
        refuse_overflow([(name, tensor, "float16") for name, tensor in tensors.items()], "refit of 'm'")
    assert caught.value.details == {"overflow": {"a": 1e5, "b": -9e9}}


# -- through a store ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store() -> Iterator[ws.Store]:
    with ws.local_store("128MiB", window="16MiB") as store:
        yield store


@pytest.fixture
def model() -> str:
    return fresh_model()


def publish(store: ws.Store, model: str, **tensors: torch.Tensor) -> None:
    with store.refit(model, fresh=True) as refit:
        refit.put_many({f"t.{name}": tensor for name, tensor in tensors.items()})


def read(store: ws.Store, model: str, name: str) -> torch.Tensor:
    with store.lease(model) as snapshot:
        return snapshot[f"t.{name}"].clone()


def test_every_safe_cast_is_torchs_own_bit_for_bit(store: ws.Store, model: str) -> None:
    floats = torch.cat([torch.randn(4097), torch.tensor([0.0, -0.0, 1e-8, -1e-30, 400.0, 1e-45])])
    values = {name: floats.to(DTYPES[name]) for name in FLOATS}
    values |= {name: torch.arange(0, 120).to(DTYPES[name]) for name in INTS}
    pairs = [(a, b) for a, b in product(values, repeat=2) if a != b and kind_of(a) == kind_of(b)]
    layouts = {"": lambda t: t, "_turned": lambda t: t[:120].view(2, 3, 20).permute(2, 0, 1)}
    given_ = {f"t.{a}.{b}{suffix}": layout(values[a]) for a, b in pairs for suffix, layout in layouts.items()}
    stored = {name: DTYPES[name.split(".")[2].removesuffix("_turned")] for name in given_}
    with store.refit(model) as refit:
        refit.put_many({name: torch.zeros(t.shape, dtype=stored[name]) for name, t in given_.items()})
    with store.refit(model) as refit:
        refit.put_many(given_)
    with store.lease(model) as snapshot:
        for name, tensor in given_.items():
            assert snapshot[name].dtype == stored[name]
            assert same_bits(snapshot[name], tensor.to(stored[name])), name


def test_a_large_master_copy_becomes_bfloat16_and_norms_stay(store: ws.Store, model: str) -> None:
    # As Wan has it: fp32 norms among bfloat16 weights.
    master = {"proj": torch.randn(1500, 1001), "norm": torch.randn(1001), "bias": torch.randn(7)}
    publish(store, model, proj=master["proj"].bfloat16(), norm=master["norm"], bias=master["bias"].bfloat16())
    stepped = {name: tensor + 0.1 for name, tensor in master.items()}
    with store.refit(model) as refit:
        refit.put_many({f"t.{name}": tensor for name, tensor in stepped.items()})
    assert same_bits(read(store, model, "proj"), stepped["proj"].bfloat16())
    assert same_bits(read(store, model, "bias"), stepped["bias"].bfloat16())
    assert same_bits(read(store, model, "norm"), stepped["norm"])
    assert refit.report.nbytes == 1500 * 1001 * 2 + 1001 * 4 + 7 * 2  # as stored


def test_an_overflow_is_told_before_a_byte_moves(
    store: ws.Store, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, model, a=torch.zeros(4).half(), b=torch.zeros(2, 2).half(), c=torch.zeros(3))
    given_ = {
        "t.a": torch.tensor([1.0, 2.0, 3e5, 4.0]),
        "t.b": torch.full((2, 2), -1e6),
        "t.c": torch.ones(3),
    }
    refit = store.refit(model)
    with monkeypatch.context() as patch:
        patch.setattr(copies, "copy_all", lambda *_: pytest.fail("a byte moved"))
        with pytest.raises(CastRefused) as caught:
            refit.put_many(given_)
    assert caught.value.details["overflow"] == {"t.a": 3e5, "t.b": -1e6}
    with pytest.raises(CastRefused, match=r"t\.a: 300000 in float32 does not fit float16"):
        refit.put_part("t.a", given_["t.a"], at=[0])
    refit.put_many({name: tensor.clamp(-6e4, 6e4) for name, tensor in given_.items()})  # and it goes on
    assert refit.commit() == 2


def test_kinds_change_only_when_asked(store: ws.Store, model: str) -> None:
    publish(
        store,
        model,
        f=torch.zeros(3),
        i=torch.zeros(3, dtype=torch.int64),
        b=torch.zeros(3, dtype=torch.bool),
    )
    other = {
        "t.f": torch.tensor([1, 2, 3]),
        "t.i": torch.tensor([1.5, -2.5, 9.0]),
        "t.b": torch.tensor([0, 2, 1]),
    }
    with pytest.raises(
        CoverageError, match=r"given int64 \[3\], stored float32 \[3\]; int becomes"
    ) as caught:
        with store.refit(model) as refit:
            refit.put_many(other)
    assert caught.value.details == {"mismatched": ["t.f", "t.i", "t.b"]}
    with store.refit(model, cast="any") as refit:
        refit.put_many(other)
    for name, tensor in other.items():
        found = read(store, model, name.removeprefix("t."))
        assert torch.equal(found, tensor.to(found.dtype))


def test_any_also_lets_values_overflow(store: ws.Store, model: str) -> None:
    publish(store, model, w=torch.zeros(2).half())
    with store.refit(model, cast="any") as refit:
        refit.put("t.w", torch.tensor([1e9, 1.0]))
    assert read(store, model, "w").tolist() == [math.inf, 1.0]


def test_never_refuses_every_other_dtype(store: ws.Store, model: str) -> None:
    publish(store, model, w=torch.zeros(2).half())
    with pytest.raises(CoverageError, match=r"given float32 \[2\], stored float16 \[2\]"):
        with store.refit(model, cast="never") as refit:
            refit.put("t.w", torch.ones(2))
    with pytest.raises(UsageError, match="cast is 'yes'"):
        store.refit(model, cast="yes")  # type: ignore[arg-type]


def test_what_the_base_lacks_is_stored_as_given(store: ws.Store, model: str) -> None:
    publish(store, model, w=torch.zeros(2).half())
    with store.refit(model, extend=True, partial=True) as refit:
        refit.put("t.new", torch.ones(2, dtype=torch.float64))
    assert read(store, model, "new").dtype == torch.float64


def test_a_reserved_place_decides_as_well(store: ws.Store, model: str) -> None:
    with store.refit(model) as refit:
        refit.reserve([ws.TensorSpec("t.w", "bfloat16", (3, 4), (4, 1))])
        refit.put_part("t.w", torch.full((1, 4), 1.001), at=(0, 0))
        refit.put_part("t.w", torch.full((2, 4), 2.001, dtype=torch.float64), at=(1, 0))
    assert read(store, model, "w")[:, 0].tolist() == [1.0, 2.0, 2.0]


def test_views_and_what_is_filled_by_hand_are_not_cast(store: ws.Store, model: str) -> None:
    publish(store, model, w=torch.zeros(2).half())
    refit = store.refit(model)
    with pytest.raises(CoverageError, match="given float32"):
        refit.view("t.w", torch.zeros(2))
    assert refit.view("t.w").dtype == torch.float16
    refit.abort()


def test_ties_are_compared_as_they_are_stored(store: ws.Store, model: str) -> None:
    shared = torch.randn(5).bfloat16()
    with store.refit(model) as refit:
        refit.put_many({"t.a": shared, "t.b": shared})
    a = torch.randn(5)
    with store.refit(model) as refit:
        refit.put_many({"t.a": a, "t.b": a.bfloat16()})  # the same once cast
    assert same_bits(read(store, model, "b"), a.bfloat16())
    with pytest.raises(CoverageError, match=r"tied to t\.a"), store.refit(model) as refit:
        refit.put_many({"t.a": a, "t.b": a + 1})


def test_casts_and_name_maps_go_together(store: ws.Store, model: str) -> None:
    publish(store, model, qkv=torch.zeros(6, 2).bfloat16(), out=torch.zeros(2, 2))
    source = {f"module.{name}": torch.randn(2, 2) for name in ("q", "k", "v")}
    source["module.out"] = torch.randn(2, 2).half()
    names = NameMap(prefix="t.").fuse(["q", "k", "v"], "qkv")
    with store.refit(model, names=names) as refit:
        assert refit.plan(source).ok
        refit.put_many(source)
    expected = torch.cat([source[f"module.{n}"] for n in ("q", "k", "v")]).bfloat16()
    assert same_bits(read(store, model, "qkv"), expected)
    assert same_bits(read(store, model, "out"), source["module.out"].float())
    for options, why in ({"cast": "never"}, "stored bfloat16"), ({}, "becomes float"):
        wrong: dict[str, Any] = source if options else {n: t.int() for n, t in source.items()}
        with pytest.raises(CoverageError, match=why), store.refit(model, names=names, **options) as refit:
            refit.put_many(wrong)


def test_names_and_dtypes_are_the_stores() -> None:
    assert {NAMES[dtype] for dtype in DTYPES.values()} == set(ITEMSIZE)
