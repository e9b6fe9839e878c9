"""The sum itself: PEFT's bits, whatever the process allows, in blocks, for every dtype and stride."""

from __future__ import annotations

from collections.abc import Iterator

import adapters
import pytest
import torch

from weightstore.lora import merge as merging
from weightstore.lora.merge import merge, merged
from weightstore.lora.precision import exact_products
from weightstore.lora.state_dict import read_adapter

CPU = torch.device("cpu")


def operands(out: int = 40, into: int = 24, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    make = torch.Generator().manual_seed(out)
    return (
        torch.randn(out, into, generator=make),
        torch.randn(rank, into, generator=make),
        torch.randn(out, rank, generator=make),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_pefts_merge_bit_for_bit(dtype: torch.dtype) -> None:
    given = adapters.flux(dtype=dtype)
    weights, expected = given.base.state_dict(), given.merged.state_dict()
    modules = read_adapter(given.state_dict, given.config, None, None)
    assert len(modules) > 5
    for name, a, b, scale in modules:
        key = f"{name.removeprefix('base_model.model.')}.weight"
        got = merged(weights[key], a, b, scale, torch.float32, CPU)
        assert got.dtype == dtype
        assert torch.equal(got, expected[key]), key
        assert not torch.equal(got, weights[key]), key


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_computed_in_one_dtype_and_rounded_to_another_once(dtype: torch.dtype, stored: torch.dtype) -> None:
    weight, a, b = operands()
    weight = weight.to(stored)
    expected = (weight.to(dtype) + (b.to(dtype) @ a.to(dtype)) * 0.3).to(stored)
    merge(weight, a, b, 0.3, dtype)
    assert torch.equal(weight, expected)


def test_convolutions_and_other_memory_orders() -> None:
    config = adapters.lora(target_modules=["conv", "volume", "point", "embedding", "linear"], r=2)
    given = adapters.trained(adapters.Layers(), config)
    expected = given.merged.state_dict()
    for name, a, b, scale in read_adapter(given.state_dict, config, None, None):
        key = f"{name.removeprefix('base_model.model.')}.weight"
        base = given.base.state_dict()[key]
        got = merged(base, a, b, scale, torch.float32, CPU)
        assert torch.allclose(got, expected[key], rtol=1e-5, atol=1e-6), key
        if base.dim() == 4:
            turned = base.to(memory_format=torch.channels_last)
            result = merged(turned, a, b, scale, torch.float32, CPU)
            assert result.stride() == turned.stride()
            assert torch.equal(result, got)


def test_blocks_are_cut_by_shape_and_change_nothing_but_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, a, b = operands(1000, 24)
    whole = merged(weight, a, b, 2.0, torch.float32, CPU)
    largest = 0
    empty = torch.empty

    def spied(*args: object, **options: object) -> torch.Tensor:
        nonlocal largest
        made = empty(*args, **options)  # type: ignore[call-overload]
        largest = max(largest, made.numel() - a.numel() - b.numel())
        return made  # type: ignore[no-any-return]

    monkeypatch.setattr(merging, "BLOCK", 7 * 24)
    monkeypatch.setattr(torch, "empty", spied)
    blocks = merged(weight, a, b, 2.0, torch.float32, CPU)
    assert largest <= 7 * 24
    assert torch.allclose(blocks, whole, rtol=0, atol=1e-5)


@pytest.fixture
def careless() -> Iterator[None]:
    """A process that lets products be rounded, as trainers and engines do."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield
    torch.set_float32_matmul_precision(before)


def test_a_careless_process_computes_the_same_bits(careless: None) -> None:
    weight, a, b = operands()
    with torch.autocast("cpu", enabled=False):
        expected = (weight.double() + (b.double() @ a.double()) * 2).float()
    got = merged(weight, a, b, 2.0, torch.float32, CPU)
    assert torch.allclose(got, expected, rtol=1e-6, atol=1e-6)
    assert (b @ a).dtype == torch.bfloat16  # it is careless still
    assert torch.get_float32_matmul_precision() == "medium"


def test_flags_are_put_back_after_an_error() -> None:
    flags = getattr(torch.backends.mkldnn, "matmul", None)
    if flags is None:
        pytest.skip("this torch has one precision for all products")
    before = flags.fp32_precision
    with pytest.raises(ZeroDivisionError), exact_products(CPU, torch.float32):
        assert flags.fp32_precision == "ieee"
        raise ZeroDivisionError
    assert flags.fp32_precision == before


def test_operands_may_require_grad_and_lie_anyhow() -> None:
    weight, a, b = operands()
    expected = merged(weight, a, b, 0.7, torch.float32, CPU)
    spread = torch.zeros(8, 48)[::2, ::2].copy_(a).requires_grad_()
    with torch.inference_mode():
        inference = b.T.clone().T
    assert torch.equal(merged(weight, spread, inference, 0.7, torch.float32, CPU), expected)
    parameter = torch.nn.Parameter(weight.clone())
    merge(parameter, a, b, 0.7, torch.float32)
    assert torch.equal(parameter, expected)
