"""Decoders that SGLang turns to channels_last at their first use: their memory order, and their idea of it.

Such a decoder compares what a request wants with a flag of its own, and if they differ has torch move all of
its weights to new memory, in the other order. Of weights that are the store's that makes two copies, so they
are turned before they are published. What is turned later comes back at the next sleep or refit, in the
store's order (`Binding.take_back`), and the flag has to follow.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import nn

_FLAG: Final = "_sgl_channels_last"


def turn(modules: Iterable[nn.Module]) -> None:
    """Give decoders with a flag the order that requests want by default."""
    for part in _flagged(modules):
        part.to(memory_format=torch.channels_last)
    tell(modules)


def tell(modules: Iterable[nn.Module]) -> None:
    """Set every flag to what the weights are now."""
    for part in _flagged(modules):
        setattr(part, _FLAG, _is_channels_last(part))


def _flagged(modules: Iterable[nn.Module]) -> list[Any]:
    return [part for module in modules for part in module.modules() if hasattr(part, _FLAG)]


def _is_channels_last(part: nn.Module) -> bool:
    """Whether all of the convolutions' weights have that order; those of 1 × 1 pixel have both."""
    images = [p for p in part.parameters() if p.dim() == 4]
    return bool(images) and all(p.is_contiguous(memory_format=torch.channels_last) for p in images)
