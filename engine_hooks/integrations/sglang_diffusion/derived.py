"""What SGLang keeps that was computed from weights, renewed after the weights changed.

Four kinds: conditioning kept across requests (text encoders' outputs), values that a model or a step cache
derives, products of a decoder's attention weights, and norms' fp32 copies of their parameters. The last are
found by address and version of the parameter; a captured graph has their own address in it, so they are
renewed in place.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import nn

from weightstore.types import component_of

_FP32_NORMS: Final = {"_weight_fp32_cache": "weight", "_bias_fp32_cache": "bias"}
"""Attributes of SGLang's FP32LayerNorm, each a key and a tensor, and the parameter it is a copy of."""

_FOLDED: Final = "_sgl_folded_v"
"""Attribute of a decoder's attention: its value and output projections as one matrix."""

_log = logging.getLogger("engine_hooks")


def renew(modules: Mapping[str, nn.Module], changed: Iterable[str]) -> None:
    """Make everything right that was derived from the weights of these names."""
    components = {component_of(name) for name in changed}
    if not components:
        return
    forget_conditioning()
    for name in components:
        module = modules[name]
        renew_fp32_norms(module)
        for part in module.modules():
            if vars(part).get(_FOLDED) is not None:
                setattr(part, _FOLDED, None)  # made anew at the next use
        for method, arguments in (
            ("refresh_weight_derived_caches", {"weights_path": None}),
            ("reset_teacache_state", {}),
        ):
            refresh = getattr(module, method, None)
            if refresh is not None:
                refresh(**arguments)


def forget_conditioning() -> None:
    from sglang.multimodal_gen.runtime.cache.conditioning import invalidate_conditioning_caches

    invalidate_conditioning_caches()


def renew_fp32_norms(module: nn.Module) -> int:
    """Bring fp32 copies up to their parameters, at their addresses; how many there were."""
    renewed = 0
    for part in module.modules():
        for attribute, name in _FP32_NORMS.items():
            kept: Any = vars(part).get(attribute)
            parameter = getattr(part, name, None)
            if kept is None or parameter is None:
                continue
            key, copy = kept
            with torch.inference_mode():  # it was made in a forward, as an inference tensor
                copy.copy_(parameter)
            vars(part)[attribute] = ((parameter.data_ptr(), parameter._version, *key[2:]), copy)
            renewed += 1
    return renewed
