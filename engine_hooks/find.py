"""Every tensor a module holds, by name: parameters, buffers, and strays that are neither.

A stray is a tensor that a module keeps as a plain attribute, directly or inside lists, tuples and
dicts (Qwen-Image's `pos_embed.pos_freqs`), or that belongs to a module which is kept so. Objects of
other kinds are not searched.

Invariants:
- a tensor object is found once, with all the names it is registered under;
- names are `<component>.<path>` as in the module's state dict, without the `_orig_mod` that
  `torch.compile` puts between; a stray's path goes on with list indexes and dict keys.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn

_MODULE_INTERNALS: Final = frozenset(vars(nn.Module())) | {"_super_module_initialized"}
_COMPILED: Final = "_orig_mod"

# Hooks that move or replace a module's tensors behind our back, by the name they are registered under.
_DIFFUSERS_MOVERS: Final = ("group_offloading", "layerwise_casting")


class Kind(enum.Enum):
    PARAMETER = "parameter"
    BUFFER = "buffer"
    TRANSIENT = "non-persistent buffer"
    STRAY = "attribute"


@dataclass(eq=False)
class Found:
    """A tensor and where it was found; `places` are the registrations to rewrite if it is replaced."""

    component: str
    tensor: torch.Tensor
    kind: Kind
    names: list[str]
    places: list[tuple[dict[str, Any], str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def is_meta(self) -> bool:
        return self.tensor.device.type == "meta"


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside the wrapper that `torch.compile(module)` returns."""
    inner = module._modules.get(_COMPILED)
    return inner if isinstance(inner, nn.Module) else module


def find_tensors(components: Mapping[str, nn.Module]) -> list[Found]:
    """All tensors of the components, parameters and buffers first, strays last."""
    found: dict[int, Found] = {}
    trees: list[tuple[str, list[tuple[str, nn.Module]]]] = []
    for component, module in components.items():
        tree = list(_tree(component, module, ()))
        trees.append((component, tree))
        for path, part in tree:
            _registered(found, component, path, part)
    seen = {id(part) for _, tree in trees for _, part in tree}
    for component, tree in trees:
        for path, part in tree:
            _strays_of_module(found, component, path, part, seen)
    return list(found.values())


def owners(module: nn.Module) -> list[nn.Module]:
    """The submodules (and perhaps `module` itself) that hold parameters or buffers themselves."""
    parts = {id(part): part for _, part in _tree("", module, ())}
    return [part for part in parts.values() if part._parameters or part._buffers]


def _tree(path: str, module: nn.Module, above: tuple[int, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Paths and modules, a shared module once for each of its paths (as state dicts name them)."""
    module = unwrap(module)
    if id(module) in above:
        return
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _tree(f"{path}.{name}", child, (*above, id(module)))


def _registered(found: dict[int, Found], component: str, path: str, module: nn.Module) -> None:
    for key, parameter in module._parameters.items():
        if parameter is not None:
            _add(found, component, parameter, Kind.PARAMETER, f"{path}.{key}", module._parameters, key)
    for key, buffer in module._buffers.items():
        if buffer is not None:
            kind = Kind.TRANSIENT if key in module._non_persistent_buffers_set else Kind.BUFFER
            _add(found, component, buffer, kind, f"{path}.{key}", module._buffers, key)


def _add(
    found: dict[int, Found],
    component: str,
    tensor: torch.Tensor,
    kind: Kind,
    name: str,
    table: dict[str, Any],
    key: str,
) -> None:
    entry = found.setdefault(id(tensor), Found(component, tensor, kind, []))
    entry.names.append(name)
    entry.places.append((table, key))
    if kind is Kind.BUFFER and entry.kind is Kind.TRANSIENT:
        entry.kind = kind


def _strays_of_module(
    found: dict[int, Found], component: str, path: str, module: nn.Module, seen: set[int]
) -> None:
    for key, value in vars(module).items():
        if key not in _MODULE_INTERNALS:
            _strays(found, component, f"{path}.{key}", value, seen)


def _strays(found: dict[int, Found], component: str, path: str, value: object, seen: set[int]) -> None:
    if isinstance(value, torch.Tensor):
        if id(value) not in found:
            found[id(value)] = Found(component, value, Kind.STRAY, [path])
        return
    if not isinstance(value, (list, tuple, dict, nn.Module)) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        # A module outside the tree: nothing of it is in a state dict, so all it holds is stray.
        for part_path, part in _tree(path, value, ()):
            seen.add(id(part))
            for key, tensor in (*part._parameters.items(), *part._buffers.items()):
                _strays(found, component, f"{part_path}.{key}", tensor, seen)
            _strays_of_module(found, component, part_path, part, seen)
    elif isinstance(value, dict):
        for key, item in value.items():
            _strays(found, component, f"{path}.{key}", item, seen)
    else:
        for index, item in enumerate(value):
            _strays(found, component, f"{path}.{index}", item, seen)


def unbindable(tensor: torch.Tensor) -> str | None:
    """Why a tensor cannot be given memory inside an image, or None if it can."""
    cls = type(tensor)
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        return "is not initialised yet; run one forward first"
    if getattr(cls, "__torch_dispatch__", None) is not torch.Tensor.__torch_dispatch__:
        return f"is a {cls.__name__}, a tensor subclass that holds its data elsewhere (sharded or quantised)"
    # bitsandbytes' 8-bit weights hand their state over to the module at the first forward: the class stays.
    marked = any(
        getattr(tensor, mark, None) is not None for mark in ("quant_state", "quant_type", "SCB", "CB")
    )
    if marked or cls.__module__.partition(".")[0] == "bitsandbytes":
        return f"is a {cls.__name__} with quantisation state of its own"
    if tensor.is_quantized:
        return f"is quantised ({tensor.dtype})"
    if tensor.layout is not torch.strided:
        return f"has layout {tensor.layout}; only strided (dense) tensors have bytes to map"
    return None


def movers(components: Mapping[str, nn.Module]) -> list[tuple[str, str]]:
    """(module path, reason) for hooks that offload, stream or cast weights: those own the memory."""
    found = []
    for component, module in components.items():
        for path, part in _tree(component, module, ()):
            hook = getattr(part, "_hf_hook", None)
            for one in (hook, *getattr(hook, "hooks", ())):
                if type(one).__name__ == "CpuOffload" or getattr(one, "offload", False):
                    found.append((path, f"accelerate's {type(one).__name__} offloads its weights"))
            registered = getattr(getattr(part, "_diffusers_hook", None), "hooks", {})
            for name in registered:
                if any(mark in name for mark in _DIFFUSERS_MOVERS):
                    found.append((path, f"diffusers' {name} hook moves its weights"))
    return found
