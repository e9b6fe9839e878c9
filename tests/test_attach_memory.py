"""Attaching must let go of the weights the modules came with, at once: the device has no room for both."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import nn

from engine_hooks import EngineHook
from weightstore.local import local_store


def address(tensor: torch.Tensor) -> int:
    """Where its bytes are; 0 for what has none, such as tensors other tests left on the meta device."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def test_the_modules_own_weights_are_gone_when_attach_returns() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    own = [weakref.ref(parameter.data.untyped_storage()) for parameter in net.parameters()]
    before = {parameter.data_ptr() for parameter in net.parameters()}
    gc.collect()
    gc.disable()  # what only the collector would find counts as kept
    try:
        with local_store("64MiB", window="16MiB") as store:
            with EngineHook.attach(store, "net", {"net": net}) as hook:
                assert hook.attached.published
                alive = [
                    found
                    for found in gc.get_objects()
                    if type(found) is torch.Tensor and address(found) in before
                ]
                assert alive == []
    finally:
        gc.enable()
    assert all(reference() is None for reference in own)
