from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from engine_hooks.guard import Guard, taken
from engine_hooks.lifecycle import State
from weightstore.errors import EngineAsleep, EngineBroken


class Codec(nn.Module):
    """Entered below its top, as VAEs are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


X = torch.ones(2, 4)


def test_every_entrance_is_shut_and_opens_again() -> None:
    codec = Codec()
    guard = Guard("vae", codec)
    expected = codec(X)
    guard.shut(State.ASLEEP)
    for entrance in (codec, codec.decode, codec.inner[0]):
        with pytest.raises(EngineAsleep, match="forward of 'vae'"):
            entrance(X)
    guard.open()
    assert torch.equal(codec.decode(X), expected)


def test_a_state_dict_is_made_of_weights_that_are_there() -> None:
    codec = Codec()
    compiled = torch.compile(codec, backend="eager")
    guard = Guard("vae", compiled)
    expected = list(codec.state_dict())
    guard.shut(State.ASLEEP)
    for holder in (codec, compiled, codec.inner, codec.inner[0]):
        with pytest.raises(EngineAsleep, match="state_dict of 'vae'"):
            holder.state_dict()
    guard.open()
    assert list(codec.state_dict()) == expected
    assert not any(module._state_dict_pre_hooks for module in codec.modules())


def test_a_module_is_taken_as_long_as_somebody_holds_its_guard() -> None:
    codec = Codec()
    assert not taken(codec)
    guard = Guard("vae", torch.compile(codec, backend="eager"))
    assert taken(codec)
    guard.remove()
    assert not taken(codec)
    held = [Guard("vae", codec)]
    assert taken(codec)
    held.clear()
    assert not taken(codec)


def test_broken_says_so() -> None:
    codec = Codec()
    guard = Guard("vae", codec)
    guard.shut(State.ASLEEP)
    guard.shut(State.BROKEN)
    with pytest.raises(EngineBroken):
        codec(X)


def test_an_awake_module_carries_one_hook_and_a_freed_one_none() -> None:
    codec = Codec()
    guard = Guard("vae", codec)

    def hooks() -> int:
        return sum(len(module._forward_pre_hooks) for module in codec.modules())

    assert hooks() == 1
    guard.shut(State.ASLEEP)
    assert hooks() > 1
    guard.open()
    assert hooks() == 1
    guard.remove()
    guard.remove()
    assert hooks() == 0
    codec(X)


def test_the_guard_comes_before_other_hooks() -> None:
    codec = Codec()
    codec.register_forward_pre_hook(lambda module, args: pytest.fail("touched weights"))
    Guard("vae", codec).shut(State.ASLEEP)
    with pytest.raises(EngineAsleep):
        codec(X)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_code_is_guarded_and_never_recompiled(fullgraph: bool) -> None:
    codec = Codec()
    guard = Guard("vae", codec)
    counter = CompileCounter()
    compiled = torch.compile(codec, backend=counter, fullgraph=fullgraph)
    with torch.no_grad():
        expected = compiled(X)
        compiled(X)
        frames = counter.frame_count
        for _ in range(3):
            guard.shut(State.ASLEEP)
            with pytest.raises((EngineAsleep, torch._dynamo.exc.Unsupported)):
                compiled(X)
            guard.open()
            assert torch.equal(compiled(X), expected)
    assert counter.frame_count == frames


def test_a_module_compiled_before_is_guarded_from_outside() -> None:
    codec = Codec()
    compiled = torch.compile(codec, backend="eager")
    compiled(X)
    guard = Guard("vae", compiled)
    guard.shut(State.ASLEEP)
    with pytest.raises(EngineAsleep):
        compiled(X)
    guard.open()
    compiled(X)
