from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable

import pytest
import tiny_models
import torch
from torch import nn

from engine_hooks.find import Kind, find_tensors, movers, owners, unbindable


def names(modules: dict[str, nn.Module]) -> dict[str, Kind]:
    return {name: found.kind for found in find_tensors(modules) for name in found.names}


def test_every_kind_is_found_under_its_state_dict_name() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module.register_buffer("mask", torch.ones(2), persistent=False)
    found = names({"net": module})
    assert {n.removeprefix("net.") for n, k in found.items() if k in (Kind.PARAMETER, Kind.BUFFER)} == set(
        module.state_dict()
    )
    assert found["net.mask"] is Kind.TRANSIENT
    assert found["net.0.weight"] is Kind.PARAMETER
    assert found["net.1.running_mean"] is Kind.BUFFER


def test_strays_are_found_in_attributes_and_nested_containers() -> None:
    pair = namedtuple("pair", "left right")
    module = nn.Linear(2, 2)
    module.plain = torch.ones(1)
    module.nested = [
        {"a": (torch.ones(2), pair(torch.ones(3), None))},
        OrderedDict(b=torch.ones(4)),
        "text",
        7,
    ]
    found = {f.name: f for f in find_tensors({"c": module})}
    strays = {name: f.tensor.numel() for name, f in found.items() if f.kind is Kind.STRAY}
    assert strays == {"c.plain": 1, "c.nested.0.a.0": 2, "c.nested.0.a.1.0": 3, "c.nested.1.b": 4}


def test_containers_that_hold_themselves_end() -> None:
    module = nn.Linear(2, 2)
    ring: list[object] = [torch.ones(1)]
    ring.append(ring)
    module.ring = ring
    module.me = [module]
    assert [name for name, kind in names({"c": module}).items() if kind is Kind.STRAY] == ["c.ring.0"]


def test_modules_outside_the_tree_are_all_stray() -> None:
    module = nn.Linear(2, 2)
    module.hidden = [nn.BatchNorm1d(3)]
    found = names({"c": module})
    assert found["c.hidden.0.weight"] is Kind.STRAY
    assert found["c.hidden.0.running_mean"] is Kind.STRAY


def test_a_tensor_object_is_found_once_with_all_its_names() -> None:
    module = tiny_models.seeded(tiny_models.t5)
    (tied,) = [f for f in find_tensors({"te": module}) if len(f.names) > 1]
    assert sorted(tied.names) == ["te.encoder.embed_tokens.weight", "te.shared.weight"]
    module.held_again = [module.shared.weight]
    assert not [
        f for f in find_tensors({"te": module}) if f.kind is Kind.STRAY and f.name.startswith("te.held")
    ]


def test_a_shared_submodule_gives_both_names() -> None:
    shared = nn.Linear(2, 2)
    assert set(names({"c": nn.ModuleDict({"a": shared, "b": shared})})) == {
        "c.a.weight", "c.a.bias", "c.b.weight", "c.b.bias"
    }  # fmt: skip


def test_qwens_rotary_tables_are_strays() -> None:
    module = tiny_models.seeded(tiny_models.qwen)
    found = {f.name: f for f in find_tensors({"t": module})}
    assert found["t.pos_embed.pos_freqs"].kind is Kind.STRAY
    assert found["t.pos_embed.pos_freqs"].tensor.dtype is torch.complex64


def test_compiled_wrappers_do_not_show_in_names() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), torch.compile(nn.Linear(2, 2)))
    assert set(names({"c": torch.compile(inner)})) == {"c.0.weight", "c.0.bias", "c.1.weight", "c.1.bias"}
    assert inner[0] in owners(torch.compile(inner))


class Dispatching(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Labelled(nn.Parameter):
    """A subclass that only carries attributes, as engines have for loading: bindable."""


def quantised_parameter() -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    parameter.quant_state = object()
    return parameter


def used_quantised_parameter() -> nn.Parameter:
    """As an 8-bit weight of bitsandbytes is after its first forward: nothing tells but its class."""
    parameter = nn.Parameter(torch.ones(2))
    parameter.__class__ = type("Int8Params", (nn.Parameter,), {"__module__": "bitsandbytes.nn.modules"})
    return parameter


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: torch.ones(2, 2).to_sparse(), "layout"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantised"),
        (lambda: torch.ones(2).as_subclass(Dispatching), "Dispatching"),
        (quantised_parameter, "quantisation state"),
        (used_quantised_parameter, "Int8Params with quantisation state"),
        (lambda: nn.LazyLinear(2).weight, "not initialised"),
    ],
    ids=["sparse", "quantised", "dispatching subclass", "bitsandbytes-like", "used", "lazy"],
)
def test_what_cannot_be_bound_says_why(make: Callable[[], torch.Tensor], why: str) -> None:
    assert why in str(unbindable(make()))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2),
        nn.Parameter(torch.ones(2)),
        Labelled(torch.ones(2)),
        torch.ones(2, device="meta"),
        torch.ones(()),
    ],
)
def test_ordinary_tensors_can(tensor: torch.Tensor) -> None:
    assert unbindable(tensor) is None


def test_hooks_that_move_weights_are_named() -> None:
    accelerate = pytest.importorskip("accelerate")
    offloaded = accelerate.cpu_offload(nn.Sequential(nn.Linear(2, 2)), execution_device=torch.device("cpu"))
    assert any(path == "c.0" and "accelerate" in why for path, why in movers({"c": offloaded}))

    from diffusers.hooks import apply_layerwise_casting

    cast = nn.Sequential(nn.Linear(2, 2))
    apply_layerwise_casting(cast, torch.float8_e4m3fn, torch.float32)
    assert any("layerwise_casting" in why for _, why in movers({"c": cast}))
    assert movers({"c": nn.Sequential(nn.Linear(2, 2))}) == []
