"""Real adapters for the LoRA tests: made by PEFT on tiny models, with seeded values that are not zero."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import tiny_models
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_out", "norm.linear"]


class Trained(NamedTuple):
    """A module before training, its adapter, the adapter's config, and the module as PEFT merges the two."""

    base: nn.Module
    state_dict: dict[str, torch.Tensor]
    config: LoraConfig
    merged: nn.Module


def lora(seed: int = 1, **options: Any) -> LoraConfig:
    options = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | options
    torch.manual_seed(seed)
    return LoraConfig(init_lora_weights=False, **options)


def trained(base: nn.Module, config: LoraConfig) -> Trained:
    """`base` trained with a LoRA: the adapter's values are PEFT's random ones under the current seed."""
    wrapped = get_peft_model(copy.deepcopy(base), config)
    adapter = {name: value.clone() for name, value in get_peft_model_state_dict(wrapped).items()}
    return Trained(base, adapter, config, wrapped.merge_and_unload().eval().requires_grad_(False))


def flux(seed: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> Trained:
    """A tiny FLUX transformer with LoRA on its attention and projections."""
    base = tiny_models.seeded(tiny_models.flux).to(dtype)
    return trained(base, lora(seed, **options))


def adapted_names(given: Trained, component: str = "transformer") -> set[str]:
    """Stored names of the weights that the adapter is about."""
    modules = {name.rpartition(".lora_")[0] for name in given.state_dict}
    return {f"{component}.{name.removeprefix('base_model.model.')}.weight" for name in modules}


class Layers(nn.Module):
    """One of each kind of layer that PEFT adapts; `grouped` it cannot merge."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.linear = nn.Linear(6, 9)
        self.point = nn.Conv2d(4, 8, 1)
        self.conv = nn.Conv2d(4, 8, 3)
        self.volume = nn.Conv3d(3, 5, (1, 3, 3))
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)
