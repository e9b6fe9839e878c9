"""Whose memory a module's weights are: the store's to give back and fill, or SGLang's own machinery's.

Decided once, when the engine is built, by what SGLang has done to the module or is configured to do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

import torch
from torch import nn

from engine_hooks.find import find_tensors, movers, unbindable

RESIDENT: Final = "resident"
"""SGLang's name for components that stay on the device."""


def left_to_sglang(
    modules: Mapping[str, nn.Module], server_args: Any, device: torch.device, tensor_parallel: int
) -> dict[str, str]:
    """Of an engine's modules those that the store cannot hold, and why, by name."""
    left = {}
    seen: dict[int, str] = {}
    for name, module in modules.items():
        first = seen.setdefault(id(module), name)
        why = f"is the same module as {first}" if first != name else None
        why = why or configured(name, server_args, tensor_parallel) or managed(module)
        why = why or unfit(name, module, device)
        if why is not None:
            left[name] = why
    return left


def configured(name: str, server_args: Any, tensor_parallel: int) -> str | None:
    """Why SGLang will move or divide this component's weights by its configuration, or None."""
    if tensor_parallel > 1:
        return f"is divided among {tensor_parallel} tensor parallel ranks"
    if server_args.should_use_fsdp_for_component(name):
        return "is sharded by FSDP"
    if getattr(server_args, "lora_path", None) and ("transformer" in name or "dit" in name):
        return "has a LoRA from the command line merged into it"
    mode = server_args.residency_mode(name)
    return None if mode == RESIDENT else f"is under {mode}"


def managed(module: nn.Module) -> str | None:
    """Why SGLang already moves this module's weights by itself, or None."""
    if is_sharded(module):
        return "is sharded by FSDP"
    if any(getattr(manager, "enabled", False) for manager in _managers(module)):
        return "is under layerwise-offload"
    if "_offload_weight_snapshot" in vars(module):
        return "is under snapshot-offload"
    return rereads(module)


def rereads(module: nn.Module) -> str | None:
    """Why a model refuses weights that come without a checkpoint's directory, or None."""
    validate = getattr(module, "validate_weight_update_source", None)
    if validate is not None:
        try:
            validate(weights_path=None)
        except ValueError as error:
            return f"takes no weights from memory: {error}"
    return None


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 has made `module` one of its own."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def _managers(module: nn.Module) -> Collection[Any]:
    return getattr(module, "layerwise_offload_managers", None) or ()


def unfit(name: str, module: nn.Module, device: torch.device) -> str | None:
    """Why these weights cannot lie in an image on `device`, or None."""
    for path, why in movers({name: module}):
        return f"cannot be bound: {path}: {why}"
    registered = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    if not registered:
        return "has no weights"
    for found in find_tensors({name: module}):
        why_not = unbindable(found.tensor)
        if why_not is not None:
            return f"cannot be bound: {found.name} {why_not}"
        if id(found.tensor) in registered and found.tensor.device.type not in (device.type, "meta"):
            return f"is not on {device}: {found.name} is on {found.tensor.device}"
    return None
