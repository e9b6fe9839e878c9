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
from bench.rl_step.memory import Sampler
from bench.sglang_process import Found, Run
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


class Pair:
    """An engine and its trainer, made up: an image is the step that the engine's weights are of."""

    pid = 0
    endpoint = ""

    def __init__(self, fails_at: int | None) -> None:
        self.asked: list[str] = []
        self._fails_at = fails_at
        self._weights = self._step = self._drawn = 0

    def ask(self, command: str, **_: Any) -> dict[str, Any]:
        self.asked.append(command)
        if command == "facts":
            return {"pid": 0}
        if command == "generate":
            return {"pixels": str(self._weights), "latents": str(self._weights), "spread": 1.0}
        return {"output": {"version": self._step}, "error": None, "seconds": 0.1}

    def image(self, what: str) -> tuple[str, str]:
        return str(self._weights), str(self._weights)

    def do(self, command: str, **arguments: Any) -> dict[str, Any]:
        self.asked.append(command)
        if command == "step":
            self._step = arguments["number"]
        if command in ("push", "put"):
            if self._step == self._fails_at:
                return {"error": "no such luck"}
            self._weights = self._step
            return {"error": None, "version": self._step}
        return {"bytes": 4, "freed": 4}


def measured(tmp_path: Path, key: str, pair: Any, known: dict[str, Any]) -> Found:
    found = Found(tmp_path / "x.json", {})
    options: Any = types.SimpleNamespace(cpu=True, cycles=3, bucket=1)
    run = Run(found, options, ["step"], pair, Sampler("cpu"), "", tmp_path / "none", 0, known)
    sglang_step.measure(run, pair, key, ("0", "0"), 0)
    return found


def test_both_ways_are_cycles_of_the_same_phases(tmp_path: Path) -> None:
    known: dict[str, Any] = {}
    orders = {
        "stock": ["release", "take", "step", "resume", "push"],
        "plugin": ["release", "take", "step", "put"],
    }
    for key, order in orders.items():
        pair = Pair(None)
        found = measured(tmp_path, key, pair, known)
        step = json.loads((tmp_path / "x.json").read_text())["sections"]["step"][key]
        assert step["status"] == "ok" and not found.wrong
        assert [cycle["image"] for cycle in step["cycles"]] == ["1/1", "2/2", "3/3"]
        for cycle in step["cycles"]:
            spent = sum(cycle["phases"].values()) - cycle["own_image"]
            assert cycle["overhead"] == pytest.approx(spent) and cycle["same"]
        started = pair.asked.index("release")
        assert [what for what in pair.asked[started:] if what != "facts"][: len(order)] == order
        assert pair.asked[-1] == "drop" and len(known[f"{key} release"]) == 3


def test_weights_that_did_not_arrive_or_differ_show(tmp_path: Path) -> None:
    pair = Pair(None)
    pair.do = lambda command, _do=pair.do, **more: (  # type: ignore[method-assign, misc]
        {"error": None, "version": 0} if command == "push" else _do(command, **more)
    )
    found = measured(tmp_path, "stock", pair, {})
    assert found.all["checks"]["step: stock: image 1 is right"] is False
    assert "did not arrive" in found.all["sections"]["step"]["stock"]["cycles"][0]["differs"]
    found = measured(tmp_path, "stock", Pair(None), {"pictures": {2: ("plugin", ("7", "7"))}})
    cycles = found.all["sections"]["step"]["stock"]["cycles"]
    assert [cycle["differs"] for cycle in cycles] == [None, "from plugin's after as many steps", None]


def test_a_failure_is_the_result_and_the_weights_are_brought_back(tmp_path: Path) -> None:
    pair = Pair(2)
    found = measured(tmp_path, "stock", pair, {})
    step = found.all["sections"]["step"]["stock"]
    assert step["status"] == "failed" and "no such luck" in step["reason"] and len(step["cycles"]) == 1
    assert found.wrong == ["step: stock: every cycle got to its end"]
    assert pair.asked[-1] == "drop" and pair.image("") == ("0", "0")
