"""Real models' tensors in sizes a machine can hold: whole components, a cut of them, or shrunk shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import torch
from torch import nn

from weightstore.types import TensorSpec, contiguous_stride, nbytes_of


def cut(specs: Iterable[TensorSpec], limit: int) -> list[TensorSpec]:
    """The first tensors, in the model's order, that together stay within `limit` bytes; those that alone
    exceed it are passed over. Ties are made tensors of their own."""
    chosen: list[TensorSpec] = []
    left = limit
    for spec in specs:
        nbytes = nbytes_of(spec.dtype, spec.shape)
        if nbytes > limit:
            continue
        left -= nbytes
        if left < 0:
            break
        chosen.append(TensorSpec(spec.name, spec.dtype, spec.shape, spec.stride))
    return chosen


def shrink(specs: Iterable[TensorSpec], limit: int = 1024) -> list[TensorSpec]:
    """The same names, dtypes, dimensions and ties with at most `limit` elements each: for what costs by the
    tensor and not by the byte."""
    return [
        TensorSpec(
            spec.name,
            spec.dtype,
            shape := _shrunk(spec.shape, limit),
            contiguous_stride(shape),
            spec.alias_of,
        )
        for spec in specs
    ]


def _shrunk(shape: Sequence[int], limit: int) -> tuple[int, ...]:
    sizes = list(shape)
    while prod(sizes) > limit:
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        sizes[largest] = -(-sizes[largest] // 2)
    return tuple(sizes)


def total_bytes(specs: Iterable[TensorSpec]) -> int:
    """Bytes of all tensors, ties once."""
    return sum(nbytes_of(spec.dtype, spec.shape) for spec in specs if spec.alias_of is None)


def modules_of(specs: Iterable[TensorSpec], device: str = "cpu") -> dict[str, nn.Module]:
    """Modules by component whose parameters have these names and shapes, each allocated by itself and
    written once, as a training program's are."""
    modules: dict[str, nn.Module] = {}
    for spec in specs:
        component, _, rest = spec.name.partition(".")
        module = modules.setdefault(component, nn.Module())
        *path, leaf = rest.split(".")
        for step in path:
            if step not in module._modules:
                module.add_module(step, nn.Module())
            module = module.get_submodule(step)
        values = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)
        if device != "meta":
            values.view(torch.uint8).fill_(len(spec.name)) if values.dim() else values.fill_(1)
        module.register_parameter(leaf, nn.Parameter(values, requires_grad=False))
    return modules
