"""LoRA on a GPU: merged by a trainer there, or added by an engine there, with the same bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from engine_hooks import EngineHook
from engine_hooks.lifecycle import State
from weightstore.client import Store
from weightstore.errors import DeviceMemoryError
from weightstore.local import local_store
from weightstore.lora import merge as merging

MIB = 1 << 20
RANK = 24
SHAPES = {"narrow": (300, 515), "wide": (4096, 3072), "square": (1024, 1024)}


@pytest.fixture
def store() -> Iterator[Store]:
    with local_store("512MiB", window="64MiB") as store:
        yield store


def net(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.ModuleDict({name: nn.Linear(into, out) for name, (out, into) in SHAPES.items()})
    layers["conv"] = nn.Conv2d(64, 128, 3).to(memory_format=torch.channels_last)
    return layers.to(dtype)


def adapter(seed: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    shapes = {name: ((RANK, into), (out, RANK)) for name, (out, into) in SHAPES.items()}
    shapes["conv"] = ((RANK, 64, 3, 3), (128, RANK, 1, 1))
    return {
        f"{name}.lora_{letter}.weight": (torch.randn(shape, generator=make) * 0.1).to(device)
        for name, pair in shapes.items()
        for letter, shape in zip("AB", pair, strict=True)
    }


def publish(store: Store, dtype: torch.dtype) -> nn.Module:
    base = net(dtype)
    with store.refit("toy", tag="policy") as refit:
        refit.put_module(base, prefix="net.")
    store.tag("toy", "ref", "policy")
    return base


def merged_on_write(
    store: Store, given: dict[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    with store.refit("toy", tag="merged", base="ref", partial=True) as refit:
        refit.put_lora(given, alpha=9, prefix="net.", dtype=dtype)
    with store.lease("toy", "merged") as snapshot:
        return {name.removeprefix("net."): snapshot[name].clone() for name in snapshot}


def send(store: Store, given: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
    with store.refit("toy", tag="policy", base="ref", partial=True, extend=True) as refit:
        refit.put_adapter(given, alpha=9, prefix="net.", dtype=dtype)


def holds(engine: nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor.cpu(), expected[name]) for name, tensor in engine.state_dict().items())


@pytest.mark.parametrize("source", ["cpu", "cuda"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_give_the_same_bits(
    store: Store, source: str, stored: torch.dtype, dtype: torch.dtype
) -> None:
    publish(store, stored)
    given = adapter(1, source)
    expected = merged_on_write(store, given, dtype)
    # The engine's process lets products be rounded; the trainer's did not.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    engine = net(stored)
    try:
        with EngineHook.attach(store, "toy", {"net": engine}, device="cuda:0", tag="policy") as hook:
            send(store, given, dtype)
            assert hook.refit().merged == 4
            assert holds(engine, expected)
            hook.sleep()
            assert hook.wake().merged == 4
            assert holds(engine, expected)
            assert (hook.verify().ok, hook.verify().recomputed) == (True, 4)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_products_are_those_of_float32(store: Store) -> None:
    base = publish(store, torch.float32)
    given = adapter(1)
    torch.set_float32_matmul_precision("high")
    try:
        got = merged_on_write(store, given, torch.float32)
    finally:
        torch.set_float32_matmul_precision("highest")
    exact = given["wide.lora_B.weight"].double() @ given["wide.lora_A.weight"].double() * (9 / RANK)
    error = (got["wide.weight"].double() - base["wide"].weight.double() - exact).abs().max()
    assert error < 1e-5  # TF32 would be off by a thousandth


def test_the_base_comes_back_and_verify_sees_one_bit(store: Store) -> None:
    base = publish(store, torch.bfloat16)
    engine = net(torch.bfloat16)
    with EngineHook.attach(store, "toy", {"net": engine}, device="cuda:0", tag="policy") as hook:
        send(store, adapter(1))
        hook.refit()
        with torch.no_grad():
            engine["conv"].weight.view(torch.int16)[3, 5, 1, 1] ^= 1
        assert hook.verify().differing == ("net.conv.weight",)
        store.tag("toy", "policy", "ref")
        hook.refit()
        assert hook.verify().ok
        assert holds(engine, {name: tensor.clone() for name, tensor in base.state_dict().items()})


def test_scratch_is_small_and_stays_so(store: Store) -> None:
    publish(store, torch.bfloat16)
    engine = net(torch.bfloat16)
    with EngineHook.attach(store, "toy", {"net": engine}, device="cuda:0", tag="policy") as hook:
        send(store, adapter(1))
        hook.refit()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        hook.sleep()
        hook.wake()
        scratch = merging.BLOCK * 4
        staged = sum(t.numel() * 4 for t in adapter(1).values())
        assert torch.cuda.max_memory_allocated() - before < scratch + 2 * staged + 40 * MIB
        assert torch.cuda.memory_allocated() <= before


def test_no_room_for_scratch_is_an_error_that_a_wake_mends(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, torch.bfloat16)
    engine = net(torch.bfloat16)
    expected = merged_on_write(store, adapter(1), torch.float32)
    with EngineHook.attach(store, "toy", {"net": engine}, device="cuda:0", tag="policy") as hook:
        send(store, adapter(1))
        hook.sleep()
        monkeypatch.setattr(merging, "_operand", lambda *_: torch.empty(1 << 42, device="cuda"))
        with pytest.raises(DeviceMemoryError, match="no room on cuda:0 to add adapters"):
            hook.wake()
        assert hook.state is State.ASLEEP
        monkeypatch.undo()
        hook.wake()
        assert holds(engine, expected)
