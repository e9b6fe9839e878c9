"""What keeps a pipeline's components from being bound bit for bit, one line for each, with what to do.

The hook itself refuses such modules too, tensor by tensor. Here a component is named once, before the
store is asked for anything, and the remedy is in terms of the pipeline's own methods.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn

from engine_hooks.find import find_tensors, movers, unbindable
from weightstore.errors import AttachError

_REMEDIES: Final = {
    "accelerate": "undo enable_model_cpu_offload() and enable_sequential_cpu_offload() with "
    "pipe.remove_all_hooks(): sleep gives the memory back instead",
    "group_offloading": "build the pipeline without enable_group_offload(): sleep gives the memory back "
    "instead",
    "layerwise_casting": "build the pipeline without enable_layerwise_casting(): it makes new weights at "
    "every forward",
}


def refuse_unfit(pipe: Any, modules: Mapping[str, nn.Module], device: torch.device) -> None:
    """AttachError with one line for each component that something else moves or places, or has quantised."""
    lines = {}
    upcasts = _reads_force_upcast(type(pipe))
    for name, module in modules.items():
        line = (
            _moved(name, module)
            or _placed_elsewhere(module, device)
            or _quantised(name, module)
            or (_upcast(name, module) if upcasts else None)
        )
        if line is not None:
            lines[name] = line
    if lines:
        shown = "\n".join(f"  {name} {line}" for name, line in lines.items())
        raise AttachError(
            f"{len(lines)} of the pipeline's components cannot be bound bit for bit, nothing was changed\n"
            f"{shown}",
            components=list(lines),
        )


def _moved(name: str, module: nn.Module) -> str | None:
    found = movers({name: module})
    if not found:
        return None
    path, why = found[0]
    remedy = next((text for mark, text in _REMEDIES.items() if mark in why), "remove that hook first")
    where = "" if path == name else f" (at {path})"
    return f"is moved by others: {why}{where}; {remedy}"


def _placed_elsewhere(module: nn.Module, device: torch.device) -> str | None:
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in (hook, *getattr(hook, "hooks", ())):
            place = getattr(one, "execution_device", None)
            if place is not None and not _same(place, device):
                return (
                    f"is dispatched to {place} by a device_map, and would be moved to {device}; call "
                    "pipe.reset_device_map() first, or build the pipeline without device_map"
                )
    return None


def _same(place: int | str | torch.device, device: torch.device) -> bool:
    other = torch.device(f"cuda:{place}" if isinstance(place, int) else place)
    return (other.type, other.index or 0) == (device.type, device.index or 0)


def _quantised(name: str, module: nn.Module) -> str | None:
    found = find_tensors({name: module})
    reasons = [(item.name, why) for item in found if (why := unbindable(item.tensor)) is not None]
    if not reasons:
        return None
    first, why = reasons[0]
    return (
        f"has {len(reasons)} of {len(found)} tensors that cannot be given memory in an image, as {first} "
        f"{why}; load it unquantised or dequantise it, or leave it as it is: skip=[{name!r}]"
    )


def _upcast(name: str, module: nn.Module) -> str | None:
    config = getattr(module, "config", None)
    if not getattr(config, "force_upcast", False) or getattr(module, "dtype", None) is not torch.float16:
        return None
    return (
        "is float16 and says force_upcast: this pipeline turns it into float32 and back at every generation, "
        "which gives it other memory; build the pipeline in bfloat16, use a VAE made for float16 with "
        f"force_upcast=False, or leave it as it is: skip=[{name!r}]"
    )


def _reads_force_upcast(kind: type) -> bool:
    """Whether a pipeline's code looks at `force_upcast`; FLUX's VAE says it too, and nobody heeds it."""
    functions = [inspect.unwrap(f) for one in kind.__mro__ for f in vars(one).values() if callable(f)]
    codes = [code for f in functions if (code := getattr(f, "__code__", None)) is not None]
    return any("force_upcast" in code.co_names for code in codes)
