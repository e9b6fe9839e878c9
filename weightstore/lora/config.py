"""What a PEFT configuration says about scales, and whether it describes a LoRA that is base + scale · B·A at
all.

Understood are a `LoraConfig`, its `to_dict()` (adapter_config.json), and what diffusers packs into a LoRA
file's metadata, where each key carries its component (``transformer.lora_alpha``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import sqrt
from typing import Any, Final

from weightstore.errors import UsageError

_OTHERWISE: Final = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "fan_in_fan_out",
)
"""Settings under which the weights are not, or not only, base + scale · B·A of (out, in) layers."""

_KEEP_THE_BASE: Final = frozenset({"gaussian", "eva", "orthogonal", "mica"})
"""Initialisations that leave the base weights alone. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) take from
them what they put into B·A, so that adding it to the pristine base counts it twice."""


class Scaling:
    """The scale of each module of one adapter.

    Raises:
        UsageError: a configuration of something else than plain LoRA, by name.
    """

    def __init__(self, config: Any, alpha: float | str | None) -> None:
        """`alpha` holds for all modules and goes before the configuration's; "rank" makes every scale 1."""
        if isinstance(alpha, str) and alpha != "rank":
            raise UsageError(f'alpha is a number or "rank" (scale 1), not {alpha!r}')
        self._alpha = alpha
        self._plain, self._by_component = _by_component(_as_dict(config))
        for settings in (self._plain, *self._by_component.values()):
            _check(settings)

    def scale(self, module: str, rank: int, alpha: float | None) -> float | None:
        """For a module of this name and rank; None if nothing tells. `alpha` is the state dict's own."""
        if self._alpha == "rank":
            return 1.0
        component, inside = module.partition(".")[::2]
        settings = self._by_component.get(component)
        if settings is None:
            settings, inside = self._plain, module
        if self._alpha is not None:
            alpha = float(self._alpha)
        elif alpha is None:
            pattern = _matching(settings.get("alpha_pattern") or {}, inside)
            chosen = settings.get("lora_alpha") if pattern is None else pattern
            if chosen is None:
                return None
            alpha = float(chosen)
        return alpha / (sqrt(rank) if settings.get("use_rslora") else rank)


def _by_component(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Mapping[str, Any]]]:
    """The settings for everything, and those for one component each, whose keys carry its name."""
    heads = {key.partition(".")[0] for key in config if key.endswith(".lora_alpha")}
    plain = {key: value for key, value in config.items() if key.partition(".")[0] not in heads}
    return plain, {
        head: {
            key.removeprefix(f"{head}."): value for key, value in config.items() if key.startswith(f"{head}.")
        }
        for head in heads
    }


def _as_dict(config: Any) -> Mapping[str, Any]:
    if config is None:
        return {}
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise UsageError(
            f"config is a {type(config).__name__}; give a peft.LoraConfig or its dict, one adapter's "
            "(model.peft_config['default'])"
        )
    return config


def _check(settings: Mapping[str, Any]) -> None:
    kind = settings.get("peft_type", "LORA")
    if str(getattr(kind, "value", kind)).upper() != "LORA":
        raise UsageError(f"this adapter is a {kind}, not a LoRA; merge it yourself and put the tensors")
    wrong = [name for name in _OTHERWISE if settings.get(name)]
    start = settings.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _KEEP_THE_BASE:
        wrong.append(f"init_lora_weights={start!r}, which changes the base weights")
    if wrong:
        raise UsageError(
            f"this LoRA is not base + scale · B·A of the stored weights: {', '.join(wrong)}. Merge it "
            "yourself (merge_and_unload) and put the tensors",
            unsupported=wrong,
        )


def _matching(patterns: Mapping[str, Any], module: str) -> Any:
    """As PEFT chooses: the first pattern that matches the end of the module's name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return None
