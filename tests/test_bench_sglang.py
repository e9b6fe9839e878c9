"""What of `python -m bench sglang` needs no SGLang: buckets, steps, sizes, and errors behind errors."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bench import sglang_probe, sglang_step
from bench.sglang_trainer import Trainer, buckets, read, turn


def test_buckets_keep_the_order_and_the_limit() -> None:
    given = [("a", 3), ("b", 3), ("c", 4), ("d", 11), ("e", 1), ("f", 9), ("g", 0)]
    found = buckets(given, 10)
    assert found == [["a", "b", "c"], ["d"], ["e", "f", "g"]]
    assert [name for names in found for name in names] == [name for name, _ in given]
    assert buckets([], 10) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_a_step_changes_every_weight_and_can_be_taken_back(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    tensor = torch.randn(64, 64).to(dtype)
    scalar = torch.tensor(1.5, dtype=torch.bfloat16)
    before = tensor.clone()
    turn([tensor, scalar], 3)
    assert not (tensor.float() == before.float()).any() and scalar != 1.5
    assert torch.isfinite(tensor.float()).all()
    turn([tensor, scalar], 3)
    assert torch.equal(tensor.view(torch.uint8), before.view(torch.uint8)) and scalar == 1.5


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for folder, names in (("transformer", ("x.weight", "x.bias", "proj_out.weight")), ("vae", ("y",))):
        (tmp_path / folder).mkdir()
        tensors = {name: torch.randn(8, 4, dtype=torch.bfloat16) for name in names}
        save_file(tensors, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_a_trainer_s_steps_are_counted_from_the_checkpoint(model: Path) -> None:
    """Whatever the steps before, step n is the checkpoint with n, and a new load is the checkpoint."""
    trainer = Trainer({"cpu": True, "model": str(model), "name": "m", "socket": ""})
    assert trainer.load() == {"seconds": pytest.approx(0, abs=60), "bytes": 3 * 64, "tensors": 3}
    whole = read(model, None, "cpu")
    trainer.step(5)
    trainer.step(2)
    for name, tensor in whole.items():
        assert torch.equal(trainer._tensors[name].view(torch.int16), tensor.view(torch.int16) ^ 2)
    trainer.load(["proj_out"])
    assert trainer._tensors.keys() == {"proj_out.weight"}
    assert torch.equal(trainer._tensors["proj_out.weight"], whole["proj_out.weight"])


def test_sizes_are_the_headers(model: Path) -> None:
    found = sglang_step.sizes(model)
    assert found["components"] == {"transformer": 192, "vae": 64} and found["whole_bytes"] == 256
    assert (found["trained_bytes"], found["trained_tensors"], found["dtypes"]) == (192, 3, ["BF16"])


def test_what_an_error_hides_is_kept() -> None:
    """As SGLang's capture does: its clean-up fails because of the first error, and only that is logged."""

    def capture(kept: str) -> None:
        try:
            raise NotImplementedError(f"sgl_kernel.{kept}")
        finally:
            assert kept is None

    sglang_probe._failed_captures.clear()
    with pytest.raises(AssertionError):
        sglang_probe.capture(capture, "weak_ref_tensor")
    (links,) = sglang_probe._failed_captures
    assert [link["type"] for link in links] == ["AssertionError", "NotImplementedError"]
    assert links[1]["message"] == "sgl_kernel.weak_ref_tensor" and "capture" in links[1]["at"]
    json.dumps(links)
    sglang_probe._failed_captures.clear()
    assert sglang_probe.capture(lambda value: value, 7) == 7 and not sglang_probe._failed_captures


def test_a_chain_ends_even_if_it_is_a_circle() -> None:
    first, second = ValueError("first"), KeyError("second")
    first.__context__, second.__context__ = second, first
    assert len(sglang_probe.chain(first)) == sglang_probe.LINKS
    assert sglang_probe.chain(None) == []


@pytest.mark.parametrize("bound_before", [False, True])
def test_weak_references_are_lent_to_a_stand_in(monkeypatch: pytest.MonkeyPatch, bound_before: bool) -> None:
    kernels: Any = types.ModuleType("sgl_kernel")
    kernels.__version__ = "0.4.10+stub"
    kernels.weak_ref_tensor = None
    monkeypatch.setitem(sys.modules, "sgl_kernel", kernels)
    references: Any = types.ModuleType(sglang_probe._REFERENCES)
    references.weak_ref_tensor = kernels.weak_ref_tensor
    monkeypatch.delitem(sys.modules, sglang_probe._REFERENCES, raising=False)
    if bound_before:
        monkeypatch.setitem(sys.modules, sglang_probe._REFERENCES, references)
    sglang_probe.lend_weak_references()
    assert sglang_probe.weak_references() == ("lent, bound" if bound_before else "lent, not bound yet")
    tensor = torch.ones(2)
    assert (references if bound_before else kernels).weak_ref_tensor(tensor) is tensor


def test_the_real_kernels_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: Any = types.ModuleType("sgl_kernel")
    kernels.__version__ = "0.4.10"
    kernels.weak_ref_tensor = own = lambda tensor: tensor
    monkeypatch.setitem(sys.modules, "sgl_kernel", kernels)
    monkeypatch.delitem(sys.modules, sglang_probe._REFERENCES, raising=False)
    sglang_probe.lend_weak_references()
    assert kernels.weak_ref_tensor is own and sglang_probe.weak_references().startswith(__name__)
