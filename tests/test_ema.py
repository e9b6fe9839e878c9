"""Averages kept in the arena: the arithmetic, what is shared, the shadow, and tags that copy nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import adapters
import pytest
import torch
from diffusers.training_utils import EMAModel
from hooked import fresh_model
from torch import nn

import weightstore
from engine_hooks import EngineHook
from weightstore import update_ema
from weightstore.client import Store
from weightstore.errors import RefitConflict, UnknownTag, UsageError
from weightstore.tensors import same_bits

DECAY = 0.9
WEIGHT = 1 - DECAY


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with weightstore.local_store(capacity="512MiB", window="16MiB") as store:
        yield store


@pytest.fixture
def model() -> str:
    return fresh_model()


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Two trained components and a frozen one; a tie, a channels_last weight, integers, an empty tensor."""
    make = torch.Generator().manual_seed(seed)
    frozen = torch.Generator().manual_seed(99)

    def some(*shape: int, source: torch.Generator = make) -> torch.Tensor:
        return torch.randn(*shape, generator=source).to(dtype)

    tied = some(5, 7)
    return {
        "t.large": some(300, 411),
        "t.small": some(3),
        "t.conv": some(4, 6, 3, 3).contiguous(memory_format=torch.channels_last),
        "t.empty": some(0, 3),
        "t.steps": torch.tensor(seed),
        "t.tied": tied,
        "t.tied2": tied,
        "u.w": some(9, 9),
        "frozen.w": some(64, 64, source=frozen),
    }


TIES = ("t.tied", "t.tied2")
TRAINED = {"t.large", "t.small", "t.conv", "t.tied", "t.tied2", "u.w"}


def write(store: Store, model: str, values: dict[str, torch.Tensor], tag: str = "policy", **how: Any) -> int:
    """As a trainer does: everything the first time, later what is trained."""
    with store.refit(model, tag=tag, **how) as refit:
        refit.put_many(values)
    return refit.report.version


def train(store: Store, model: str, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    values = {n: t for n, t in tensors(seed, dtype).items() if not n.startswith("frozen")}
    write(store, model, values, components=["t", "u"])
    return tensors(seed, dtype)


def read(store: Store, model: str, tag: str = "ema") -> dict[str, torch.Tensor]:
    with store.lease(model, tag) as snapshot:
        return {name: snapshot[name].clone() for name in snapshot}


def places(store: Store, model: str, tag: str) -> dict[str, int]:
    with store.lease(model, tag) as snapshot:
        return {name: record.offset for name, record in snapshot.records.items()}


def mix(average: torch.Tensor, source: torch.Tensor, weight: float = WEIGHT) -> torch.Tensor:
    """What the average has to become: computed whole, in float32, rounded once."""
    return torch.lerp(average.float(), source.float(), weight).to(average.dtype)


# -- the arithmetic ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str
)
def test_averages_are_float32_rounded_once(store: Store, model: str, dtype: torch.dtype) -> None:
    expected = tensors(1, dtype)
    write(store, model, expected)
    made = update_ema(store, model, decay=DECAY)
    assert (made.created, made.averaged, made.nbytes) == (True, 0, 0)
    for seed in (2, 3, 4):
        policy = train(store, model, seed, dtype)
        report = update_ema(store, model, decay=DECAY)
        assert (report.created, report.averaged) == (False, len(TRAINED) - 1)
        expected = {n: mix(expected[n], t) if n in TRAINED else t for n, t in policy.items()}
        got = read(store, model)
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert got[name].stride() == tensor.stride()
            assert same_bits(got[name], tensor), name
        assert store.tags(model)["ema"] == report.version


def test_it_is_what_diffusers_computes(store: Store, model: str) -> None:
    module = adapters.Layers()
    write(store, model, {f"net.{n}": t for n, t in module.state_dict().items()})
    update_ema(store, model, decay=DECAY)
    theirs = EMAModel(module.parameters(), decay=DECAY, min_decay=DECAY)
    theirs.step(module.parameters())  # its first step takes the parameters as they are
    for _ in range(3):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        theirs.step(module.parameters())
        write(store, model, {f"net.{n}": t for n, t in module.state_dict().items()})
        update_ema(store, model, decay=DECAY)
    theirs.copy_to(module.parameters())
    ours = read(store, model)
    for name, tensor in module.state_dict().items():
        assert torch.allclose(ours[f"net.{name}"], tensor, rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize(("decay", "winner"), [(0.0, "policy"), (1.0, "ema")])
def test_the_ends_of_the_scale_are_exact(store: Store, model: str, decay: float, winner: str) -> None:
    write(store, model, tensors(1))
    update_ema(store, model)
    policy, before = train(store, model, 2), tensors(1)
    update_ema(store, model, decay=decay)
    got = read(store, model)
    for name in TRAINED:
        assert torch.equal(got[name], (policy if winner == "policy" else before)[name])


def test_complex_and_double_weights(store: Store, model: str) -> None:
    def values(seed: int) -> dict[str, torch.Tensor]:
        make = torch.Generator().manual_seed(seed)
        return {
            "t.c": torch.randn(33, 5, dtype=torch.complex64, generator=make),
            "t.d": torch.randn(40, dtype=torch.float64, generator=make),
        }

    write(store, model, values(1))
    update_ema(store, model)
    write(store, model, values(2))
    update_ema(store, model, decay=DECAY)
    got = read(store, model)
    assert torch.equal(got["t.d"], torch.lerp(values(1)["t.d"], values(2)["t.d"], WEIGHT))
    parts = [torch.view_as_real(values(seed)["t.c"]) for seed in (1, 2)]
    assert torch.equal(torch.view_as_real(got["t.c"]), torch.lerp(*parts, WEIGHT))


def test_not_a_number_stays_visible(store: Store, model: str) -> None:
    write(store, model, {"t.w": torch.ones(4, dtype=torch.bfloat16)})
    update_ema(store, model, shadow="float32")
    write(store, model, {"t.w": torch.tensor([1.0, float("nan"), 2.0, 3.0], dtype=torch.bfloat16)})
    for _ in range(2):
        update_ema(store, model, shadow="float32")
        assert torch.isnan(read(store, model)["t.w"]).tolist() == [False, True, False, False]


# -- what is shared ----------------------------------------------------------------------------------


def test_what_did_not_change_is_shared_by_address(store: Store, model: str) -> None:
    write(store, model, tensors(1))
    update_ema(store, model)
    assert places(store, model, "ema") == places(store, model, "policy")
    train(store, model, 2)
    update_ema(store, model)
    policy, ema = places(store, model, "policy"), places(store, model, "ema")
    own = {name for name in ema if ema[name] != policy[name]}
    assert own == TRAINED
    assert ema[TIES[0]] == ema[TIES[1]]
    with store.lease(model, "policy") as snapshot:
        assert snapshot.records["frozen.w"].offset == ema["frozen.w"]


def test_components_that_are_not_averaged_are_the_sources(store: Store, model: str) -> None:
    write(store, model, tensors(1))
    update_ema(store, model, components=["t"])
    policy = train(store, model, 2)
    update_ema(store, model, components=["t"], decay=DECAY)
    got = read(store, model)
    assert torch.equal(got["u.w"], policy["u.w"])
    assert torch.equal(got["t.large"], mix(tensors(1)["t.large"], policy["t.large"]))
    write(store, model, {"u.w": tensors(3)["u.w"]}, components=["u"])
    # Of "t" nothing differs between the two any more but the average itself.
    store.tag(model, "ema", "policy")
    report = update_ema(store, model, components=["t"])
    assert (report.averaged, report.nbytes) == (0, 0)
    write(store, model, {"u.w": tensors(4)["u.w"]}, components=["u"])
    report = update_ema(store, model, components=["t"])
    assert (report.averaged, report.version) == (0, store.tags(model)["policy"])
    assert places(store, model, "ema") == places(store, model, "policy")


def test_an_engine_follows_the_average(store: Store, model: str) -> None:
    torch.manual_seed(0)
    net = nn.Linear(8, 8)
    write(store, model, {f"net.{n}": t for n, t in net.state_dict().items()})
    update_ema(store, model, shadow="float32")
    engine = nn.Linear(8, 8)
    with EngineHook.attach(store, model, {"net": engine}, tag="ema") as hook:
        before = copy.deepcopy(net.state_dict())
        with torch.no_grad():
            net.weight.mul_(2)
        write(store, model, {f"net.{n}": t for n, t in net.state_dict().items()})
        update_ema(store, model, decay=DECAY, shadow="float32")
        assert set(hook.refit().changed) == {"net.bias", "net.weight"}
        assert torch.equal(engine.weight, mix(before["weight"], net.weight))
        assert hook.verify().ok


def test_adapters_are_averaged_as_a_and_b(store: Store, model: str) -> None:
    given = [adapters.flux(seed, target_modules=["to_q"]) for seed in (1, 2)]
    write(store, model, {f"transformer.{n}": t for n, t in given[0].base.state_dict().items()})
    store.tag(model, "ref", "policy")
    for one in given:
        with store.refit(model, tag="policy", base="ref", partial=True, extend=True) as refit:
            refit.put_adapter(one.state_dict, config=one.config, prefix="transformer.")
        update_ema(store, model, decay=DECAY)
    policy, ema = read(store, model, "policy"), read(store, model)
    assert policy.keys() == ema.keys()
    name = "lora.float32.transformer.transformer_blocks.0.attn.to_q.weight"
    first, second = (one.state_dict for one in given)
    key = "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight"
    assert torch.equal(ema[f"{name}.A"], mix(first[key], second[key]))
    assert torch.equal(ema[f"{name}.scale"], policy[f"{name}.scale"])


# -- the shadow --------------------------------------------------------------------------------------


def test_a_shadow_keeps_what_bfloat16_rounds_away(store: Store, model: str) -> None:
    one = torch.ones(70_000, dtype=torch.bfloat16)
    for shadow in (None, "float32"):
        name = f"{model}-{shadow}"
        write(store, name, {"t.w": one})
        update_ema(store, name, shadow=shadow)
        write(store, name, {"t.w": one * 2})
        exact = one.float()
        for _ in range(30):
            update_ema(store, name, decay=0.999, shadow=shadow)
            exact = torch.lerp(exact, one.float() * 2, 1 - 0.999)
        got = read(store, name)
        if shadow is None:
            assert torch.equal(got["t.w"], one)  # every step was less than half a unit in the last place
        else:
            assert torch.equal(got["shadow.t.w"], exact)
            assert torch.equal(got["t.w"], exact.to(torch.bfloat16))
            assert not torch.equal(got["t.w"], one)


def test_only_what_is_rounded_has_a_shadow(store: Store, model: str) -> None:
    values = tensors(1, torch.bfloat16) | {"t.norm": torch.ones(5)}
    write(store, model, values)
    update_ema(store, model, shadow="float32")
    assert not any(name.startswith("shadow.") for name in read(store, model))
    write(store, model, tensors(2, torch.bfloat16) | {"t.norm": torch.zeros(5)})
    report = update_ema(store, model, shadow="float32", decay=DECAY)
    got = read(store, model)
    # Of the tied pair, one; of what is float32 itself, or frozen, or no number, none. The whole model was
    # written anew, so "frozen" counts as changed here.
    shadows = {name.removeprefix("shadow.") for name in got if name.startswith("shadow.")}
    assert shadows == {"t.large", "t.small", "t.conv", "t.tied", "u.w", "frozen.w"}
    assert all(got[f"shadow.{name}"].dtype == torch.float32 for name in shadows)
    assert got["shadow.t.conv"].stride() == values["t.conv"].stride()
    assert report.nbytes == sum(6 * values[name].numel() for name in shadows) + 4 * 5


def test_a_tag_that_was_moved_counts_more_than_its_shadow(store: Store, model: str) -> None:
    write(store, model, {"t.w": torch.full((40_000,), 1.0, dtype=torch.bfloat16)})
    update_ema(store, model, shadow="float32")
    write(store, model, {"t.w": torch.full((40_000,), 2.0, dtype=torch.bfloat16)})
    update_ema(store, model, shadow="float32", decay=0.5)
    # Somebody writes to the average itself, past its shadow: half of the tensor.
    reset = torch.full((40_000,), 1.5, dtype=torch.bfloat16)
    reset[:20_000] = 8.0
    write(store, model, {"t.w": reset}, tag="ema", partial=True)
    assert read(store, model)["shadow.t.w"][0] == 1.5
    update_ema(store, model, shadow="float32", decay=0.5)
    got = read(store, model)["shadow.t.w"]
    assert got[:20_000].unique().tolist() == [5.0]
    assert got[20_000:].unique().tolist() == [1.75]


def test_a_shadow_is_not_left_behind(store: Store, model: str) -> None:
    write(store, model, tensors(1, torch.bfloat16))
    update_ema(store, model, shadow="float32")
    train(store, model, 2, torch.bfloat16)
    update_ema(store, model, shadow="float32")
    train(store, model, 3, torch.bfloat16)
    before = store.tags(model)
    with pytest.raises(UsageError, match="holds a shadow"):
        update_ema(store, model)
    assert store.tags(model) == before
    update_ema(store, model, shadow="float32")
    # Training goes on from the average; its version, shadow and all, is the policy's base now.
    store.tag(model, "policy", "ema")
    report = update_ema(store, model, shadow="float32")
    assert report.averaged == len(TRAINED) - 1


# -- errors ------------------------------------------------------------------------------------------


def test_what_cannot_be_averaged_is_told_and_changes_nothing(store: Store, model: str) -> None:
    write(store, model, tensors(1))
    update_ema(store, model)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"decay": 1.5}, "decay is between 0 and 1, not 1.5"),
        ({"decay": float("nan")}, "decay"),
        ({"target": "policy"}, "average of itself"),
        ({"shadow": "float64"}, "shadow is None or"),
        ({"components": "t"}, "list of names"),
        ({"components": ["t", "nothing"]}, "no component nothing; it has frozen, t, u"),
    ]
    before = store.tags(model)
    for options, why in wrong:
        with pytest.raises(UsageError, match=why):
            update_ema(store, model, **options)
    with pytest.raises(UnknownTag, match="nobody"):
        update_ema(store, model, source="nobody", target="other")
    with store.refit(model, tag="ema", partial=True) as other:
        with pytest.raises(RefitConflict):
            update_ema(store, model)
        other.abort()
    assert store.tags(model) == before
    assert store.status().arena.pending == 0


def test_another_shape_than_before_is_told(store: Store, model: str) -> None:
    write(store, model, {"t.w": torch.ones(4), "t.v": torch.ones(2)})
    update_ema(store, model)
    with store.refit(model, tag="policy", fresh=True) as refit:
        refit.put_many({"t.w": torch.ones(5), "t.v": torch.zeros(2), "t.new": torch.ones(3)})
    with pytest.raises(UsageError, match=r"t\.w is float32\[5\], its average float32\[4\]"):
        update_ema(store, model)


# -- tags --------------------------------------------------------------------------------------------


def test_tagging_touches_no_extent(store: Store, model: str) -> None:
    first = write(store, model, tensors(1))
    train(store, model, 2)
    # What is to be named has to be alive: `old` is set before the next refit.
    arena = store.status().arena
    held = places(store, model, "policy")
    current = store.tags(model)["policy"]
    assert store.tag(model, "old", version=current) == current
    assert store.tag(model, "ref", "policy") == current
    assert store.status().arena == arena
    for tag in ("old", "ref"):
        assert places(store, model, tag) == held
    train(store, model, 3)
    assert places(store, model, "old") == held
    got = read(store, model, "old")
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors(2).items())
    assert first < current < store.tags(model)["policy"]
