"""engine_hooks/state.py: the saved copy is the truth until the wake that used it has succeeded."""

from __future__ import annotations

import torch

from engine_hooks.state import EngineState


def test_only_its_own_bytes_are_saved_and_restored() -> None:
    image = torch.arange(100, dtype=torch.uint8)
    state = EngineState(40, 20)
    assert state.save(image) == 20
    image.zero_()
    assert state.restore(image) == 20
    assert image[40:60].tolist() == list(range(40, 60))
    assert int(image[:40].sum()) == int(image[60:].sum()) == 0


def test_a_saved_copy_is_not_overwritten_until_it_was_used() -> None:
    image = torch.full((10,), 1, dtype=torch.uint8)
    state = EngineState(0, 10)
    state.save(image)
    image.fill_(9)  # what a half-unmapped image shows
    assert state.save(image) == 0
    state.restore(image)
    assert image.tolist() == [1] * 10
    state.restored()
    image.fill_(2)
    assert state.save(image) == 10
    assert state.current(torch.zeros(10, dtype=torch.uint8)).tolist() == [2] * 10


def test_without_state_nothing_happens() -> None:
    image = torch.zeros(4, dtype=torch.uint8)
    state = EngineState(4, 0)
    assert state.save(image) == state.restore(image) == 0
    assert not state.saved
    assert state.current(image).numel() == 0
