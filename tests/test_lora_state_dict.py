"""Adapters' state dicts, of real PEFT models and as diffusers writes them, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import adapters
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from weightstore.errors import InvalidTensor, UsageError
from weightstore.lora.state_dict import Module, read_adapter

A, B = torch.ones(2, 6), torch.ones(9, 2)
PAIR = {"net.lin.lora_A.weight": A, "net.lin.lora_B.weight": B}


def read(
    state_dict: dict[str, Any], config: Any = None, alpha: Any = None, adapter: Any = None
) -> list[Module]:
    return read_adapter(state_dict, config, alpha, adapter)


def scales(state_dict: dict[str, Any], config: Any = None, alpha: Any = None) -> dict[str, float]:
    return {module.name: module.scale for module in read(state_dict, config, alpha)}


# -- what PEFT makes ---------------------------------------------------------------------------------


def test_every_kind_of_layer_that_peft_adapts() -> None:
    config = adapters.lora(
        target_modules=["embedding", "linear", "point", "conv", "volume"], rank_pattern={"conv": 3}, r=2
    )
    model = get_peft_model(adapters.Layers(), config)
    modules = {m.name: m for m in read(get_peft_model_state_dict(model), config)}
    weights = {f"base_model.model.{n}": w for n, w in adapters.Layers().named_parameters()}
    assert set(modules) == {f"base_model.model.{name}" for name in config.target_modules}
    for name, module in modules.items():
        assert module.shape == tuple(weights[f"{name}.weight"].shape), name
        layer = model.get_submodule(name)
        delta = (module.b.flatten(1) @ module.a.flatten(1)).reshape(module.shape) * module.scale
        assert torch.allclose(delta, layer.get_delta_weight("default")), name
    assert modules["base_model.model.conv"].a.shape[0] == 3


@pytest.mark.parametrize("rslora", [False, True])
def test_scales_are_pefts(rslora: bool) -> None:
    config = adapters.lora(
        r=3,
        lora_alpha=5,
        target_modules=["linear", "conv"],
        rank_pattern={"conv": 2},
        alpha_pattern={"co.v": 7},
        use_rslora=rslora,
    )
    model = get_peft_model(adapters.Layers(), config)
    state_dict = get_peft_model_state_dict(model)
    found = scales(state_dict, config)
    assert found == {name: model.get_submodule(name).scaling["default"] for name in found}
    assert found["base_model.model.conv"] == 7 / (math.sqrt(2) if rslora else 2)
    assert scales(state_dict, config.to_dict()) == found


def test_a_whole_modules_state_dict_with_several_adapters() -> None:
    model = get_peft_model(adapters.Layers(), adapters.lora(target_modules=["linear"]))
    model.add_adapter("style", adapters.lora(seed=2, target_modules=["linear"]))
    state_dict = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    with pytest.raises(UsageError, match="adapters default, style; choose one"):
        read(state_dict, alpha=1)
    (chosen,) = read(state_dict, alpha=1, adapter="style")
    assert torch.equal(chosen.a, model.base_model.model.linear.lora_A["style"].weight)
    with pytest.raises(UsageError, match="no adapter 'other'; it holds default, style"):
        read(state_dict, alpha=1, adapter="other")


# -- other formats -----------------------------------------------------------------------------------


def test_alphas_of_modules_in_the_state_dict() -> None:
    both = PAIR | {
        "net.two.lora_down.weight": A,
        "net.two.lora_up.weight": B,
        "net.two.alpha": torch.tensor(8.0),
    }
    assert scales(both | {"net.lin.alpha": torch.tensor(1.0)}) == {"net.lin": 0.5, "net.two": 4.0}
    assert scales(both, config={"lora_alpha": 6}) == {"net.lin": 3.0, "net.two": 4.0}
    assert scales(both, alpha=2) == {"net.lin": 1.0, "net.two": 1.0}
    assert scales(both, alpha="rank") == {"net.lin": 1.0, "net.two": 1.0}
    with pytest.raises(UsageError, match=r"nothing tells the scale of net\.lin: give config="):
        scales(both)


def test_metadata_that_diffusers_packs_by_component() -> None:
    pairs = {
        f"{component}.lin.lora_{letter}.weight": value
        for component in ("transformer", "text_encoder")
        for letter, value in (("A", A), ("B", B))
    }
    metadata = {
        "transformer.lora_alpha": 4,
        "transformer.use_rslora": True,
        "text_encoder.lora_alpha": 3,
        "text_encoder.alpha_pattern": {"lin": 10},
    }
    assert scales(pairs, metadata) == {"transformer.lin": 4 / math.sqrt(2), "text_encoder.lin": 5.0}


def test_older_names_of_diffusers() -> None:
    assert scales({"lin.lora.down.weight": A, "lin.lora.up.weight": B}, alpha=2) == {"lin": 1.0}


# -- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("net.lin.lora_magnitude_vector", "DoRA"),
        ("net.lin.dora_scale", "DoRA"),
        ("net.lin.lora_B.bias", "biases of the adapter"),
        ("net.lin.hada_w1_a", "another method"),
        ("net.lin.lokr_w1", "another method"),
        ("lora_unet_blocks_0_to_q.lora_down.weight", "kohya"),
        ("net.lin.base_layer.bias", "no part of a LoRA"),
        ("net.head.modules_to_save.weight", "no part of a LoRA"),
        ("net.lin.weight", "no part of a LoRA"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(key: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        read(PAIR | {key: A}, alpha=1)
    assert caught.value.details["refused"] == [key]
    assert key in str(caught.value)


def test_a_real_dora_with_biases_and_saved_modules_is_refused() -> None:
    config = adapters.lora(target_modules=["linear"], use_dora=True, modules_to_save=["conv"], bias="all")
    state_dict = get_peft_model_state_dict(get_peft_model(adapters.Layers(), config))
    with pytest.raises(UsageError, match="use_dora"):
        read(state_dict, config)
    with pytest.raises(UsageError, match="lora_magnitude_vector: DoRA"):
        read(state_dict, alpha=1)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "lora_ga"])
def test_initialisations_that_change_the_base_are_refused(start: str) -> None:
    with pytest.raises(UsageError, match="changes the base weights"):
        read(PAIR, {"lora_alpha": 1, "init_lora_weights": start})


def test_initialisations_that_leave_the_base_alone() -> None:
    for start in (True, False, "gaussian", "orthogonal"):
        assert read(PAIR, {"lora_alpha": 1, "init_lora_weights": start})


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"lora_alpha": 1, "fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_alpha": 1, "layer_replication": [(0, 1)]}, "layer_replication"),
        ("adapter_config.json", "config is a str"),
    ],
)
def test_configs_of_something_else(config: Any, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        read(PAIR, config)


def test_halves_shapes_and_types() -> None:
    with pytest.raises(UsageError, match=r"A or B is missing for net\.lin") as caught:
        read({"net.lin.lora_A.weight": A}, alpha=1)
    assert caught.value.details["missing"] == ["net.lin"]
    with pytest.raises(UsageError, match="empty"):
        read({}, alpha=1)
    with pytest.raises(InvalidTensor, match=r"A \[2, 6\] and B \[9, 3\]"):
        read(PAIR | {"net.lin.lora_B.weight": torch.ones(9, 3)}, alpha=1)
    with pytest.raises(InvalidTensor, match="must be floating"):
        read(PAIR | {"net.lin.lora_B.weight": B.int()}, alpha=1)
    with pytest.raises(InvalidTensor, match="lora_A"):
        read(PAIR | {"net.lin.lora_A.weight": "weights"}, alpha=1)
    with pytest.raises(UsageError, match="alpha is a number"):
        read(PAIR, alpha="two")


def test_a_sharded_adapter_is_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        sharded = distribute_tensor(A, init_device_mesh("cpu", (1,)))
        with pytest.raises(InvalidTensor, match=r"net\.lin' is sharded.*full_tensor"):
            read(PAIR | {"net.lin.lora_A.weight": sharded}, alpha=1)
    finally:
        torch.distributed.destroy_process_group()


def test_a_default_config_needs_nothing_else() -> None:
    assert scales(PAIR, LoraConfig(r=2, lora_alpha=3)) == {"net.lin": 1.5}
