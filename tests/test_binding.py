"""Bindings over a plain tensor as the image: what a device adds is tested with the backends and the hook."""

from __future__ import annotations

import copy
import weakref

import pytest
import tiny_models
import torch
from paper_store import Paper
from torch import nn

from engine_hooks.binding import Binding
from engine_hooks.survey import Survey
from weightstore.errors import AttachError


def move_in(paper: Paper, modules: dict[str, nn.Module]) -> dict[str, tuple[Binding, torch.Tensor, Survey]]:
    bindings = {}
    with torch.no_grad():
        for name, surveyed in paper.survey(modules).items():
            image = torch.full((surveyed.nbytes,), 0xA5, dtype=torch.uint8)
            paper.fill(surveyed, image)
            binding = Binding(surveyed, image)
            binding.bind()
            binding.copy_state_in()
            bindings[name] = (binding, image, surveyed)
    return bindings


def lies_in(tensor: torch.Tensor, image: torch.Tensor) -> bool:
    return image.data_ptr() <= tensor.data_ptr() < image.data_ptr() + image.numel()


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@pytest.mark.parametrize("start", ["cpu", "meta"])
@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder"])
def test_a_bound_module_computes_the_same_bits(name: str, start: str) -> None:
    modules = tiny_models.build(name)
    paper = Paper(modules)
    expected = tiny_models.outputs(modules)[name]
    bound = {name: copy.deepcopy(modules[name]).to(start) if start == "meta" else modules[name]}
    _, image, _ = move_in(paper, bound)[name]
    original = tiny_models.build(name)[name].state_dict()
    for key, tensor in tensors(bound[name]).items():
        assert lies_in(tensor, image), key
        assert tensor.stride() == original[key].stride(), key
    assert torch.equal(tiny_models.RUNNERS[name](bound[name]), expected)


@pytest.mark.parametrize("start", ["cpu", "meta"])
def test_objects_flags_and_attributes_stay(start: str) -> None:
    modules: dict[str, nn.Module] = {"net": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))}
    paper = Paper(modules)
    net = modules["net"].to(start)
    net[0].weight.requires_grad_(False)
    net[0].weight.sharded = {"by": "rows"}
    net[1].train()
    before = tensors(net)
    flags = {name: (type(tensor), tensor.requires_grad) for name, tensor in before.items()}
    move_in(paper, modules)
    for name, tensor in tensors(net).items():
        assert tensor is before[name]
        assert (type(tensor), tensor.requires_grad) == flags[name]
        assert tensor.device.type == "cpu"
    assert net[0].weight.sharded == {"by": "rows"}
    assert net[1].training


def test_ties_stay_ties_and_nothing_else_looks_tied() -> None:
    modules = tiny_models.build("text_encoder")
    paper = Paper(modules)
    move_in(paper, modules)
    model = modules["text_encoder"]
    assert model.shared.weight is model.encoder.embed_tokens.weight
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(storages) == len(list(model.parameters()))
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.itemsize


def test_two_parameters_tied_by_the_store_share_memory() -> None:
    net = nn.ModuleList([nn.Linear(4, 4, bias=False)])
    net.append(net[0])
    paper = Paper({"net": net})
    apart = {"net": nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])}
    move_in(paper, apart)
    first, second = apart["net"][0].weight, apart["net"][1].weight
    assert first is not second
    assert first.data_ptr() == second.data_ptr()


class Strays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        base = torch.arange(10, dtype=torch.int64)
        self.freqs = torch.randn(3, 5, dtype=torch.complex64)
        self.lazy = self.freqs.conj()
        self.scalar = torch.tensor(7, dtype=torch.int32)
        self.empty = torch.empty(0, 3)
        self.many = {
            "half": [base[2:7], base[::3]],
            "wide": (base.expand(4, 10), torch.ones(2, dtype=torch.bool)),
        }
        self.float8 = torch.randn(9).to(torch.float8_e4m3fn)
        self.register_buffer("steps", torch.tensor(3), persistent=False)


def stray_tensors(module: Strays) -> list[torch.Tensor]:
    return [
        module.freqs, module.lazy, module.scalar, module.empty, *module.many["half"], *module.many["wide"],
        module.float8, module.steps,
    ]  # fmt: skip


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype is torch.float8_e4m3fn:
        one, other = one.view(torch.uint8), other.view(torch.uint8)
    return one.dtype is other.dtype and torch.equal(one, other)


def test_engine_state_of_every_shape_moves_in_bit_for_bit() -> None:
    torch.manual_seed(0)
    module = Strays()
    paper = Paper({"net": module})
    del paper.records["net.linear.bias"]  # then it must not be a parameter
    bias = module.linear.bias.detach()
    module.linear.bias = None
    module.linear.bias_kept = bias
    before = [tensor.clone(memory_format=torch.preserve_format) for tensor in stray_tensors(module)]
    objects = stray_tensors(module)
    strides = [tensor.stride() for tensor in objects]
    _, image, _ = move_in(paper, {"net": module})["net"]
    for tensor, kept, obj, stride in zip(stray_tensors(module), before, objects, strides, strict=True):
        assert tensor is obj
        assert tensor.stride() == stride
        assert same(tensor, kept)
        assert not tensor.numel() or lies_in(tensor, image)
    assert module.lazy.is_conj()
    assert module.many["half"][0].data_ptr() - module.many["half"][1].data_ptr() == 16  # still one memory
    module.many["half"][0].fill_(-1)
    assert module.many["wide"][0][3, 3] == -1


def test_views_of_weights_follow_them() -> None:
    module = nn.Linear(8, 4)
    paper = Paper({"net": module})
    module.rows = module.weight.detach()[1:3]
    binding, _, surveyed = move_in(paper, {"net": module})["net"]
    with torch.no_grad():
        module.weight[1].fill_(5)
    assert bool((module.rows[0] == 5).all())
    before = module.rows._version
    binding.mark_changed([surveyed.offsets["net.weight"]])
    assert module.rows._version > before


def test_versions_rise_for_what_changed_only() -> None:
    module = nn.Linear(8, 4)
    binding, _, surveyed = move_in(Paper({"net": module}), {"net": module})["net"]
    weight, bias = module.weight._version, module.bias._version
    binding.mark_changed([surveyed.offsets["net.weight"]])
    assert module.weight._version == weight + 1
    assert module.bias._version == bias


def test_unbinding_puts_everything_back() -> None:
    modules = tiny_models.build("transformer")
    paper = Paper(modules)
    module = modules["transformer"]
    pointers = {name: tensor.data_ptr() for name, tensor in tensors(module).items()}
    binding, _, _ = move_in(paper, modules)["transformer"]
    assert {name: t.data_ptr() for name, t in tensors(module).items()} != pointers
    binding.unbind()
    assert {name: t.data_ptr() for name, t in tensors(module).items()} == pointers

    meta = {"transformer": copy.deepcopy(module).to("meta")}
    binding, _, _ = move_in(paper, meta)["transformer"]
    binding.unbind()
    assert all(t.device.type == "meta" for t in tensors(meta["transformer"]).values())


def test_a_tensor_that_refuses_leaves_all_as_they_were() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    paper = Paper({"net": module})
    module.to("meta")
    held = weakref.ref(module[1].weight)  # torch will not swap such a tensor's innards
    with pytest.raises(AttachError, match=r"net\.1\.weight cannot be given memory"):
        move_in(paper, {"net": module})
    assert all(t.device.type == "meta" for t in tensors(module).values())
    assert held() is module[1].weight


def test_weights_that_somebody_replaced_are_found() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    binding, _, _ = move_in(Paper({"net": module}), {"net": module})["net"]
    assert binding.moved() == []
    module[0].weight.data = torch.zeros(4, 4)
    module[1].bias = nn.Parameter(torch.zeros(4))
    assert sorted(binding.moved()) == ["net.0.weight", "net.1.bias"]
    assert sorted(binding.take_back()) == ["net.0.weight", "net.1.bias"]


def test_weights_that_only_moved_are_taken_back() -> None:
    module = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4))
    binding, _, _ = move_in(Paper({"net": module}), {"net": module})["net"]
    expected = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    module[0].to(memory_format=torch.channels_last)
    module[1].weight.data = module[1].weight.data.clone()
    module[2].weight.data = module[2].weight.data + 1
    assert binding.take_back() == ["net.2.weight"]
    assert binding.moved() == ["net.2.weight"]
    assert module[0].weight.is_contiguous()
    for name in ("0.weight", "1.weight"):
        assert torch.equal(module.get_parameter(name), expected[name])


def test_leaving_with_the_weights_makes_private_copies() -> None:
    modules = tiny_models.build("text_encoder")
    expected = tiny_models.outputs(modules)["text_encoder"]
    binding, image, surveyed = move_in(Paper(modules), modules)["text_encoder"]
    with torch.no_grad():
        binding.leave(True, image[surveyed.state_offset :])
    image.fill_(0)
    model = modules["text_encoder"]
    assert model.shared.weight is model.encoder.embed_tokens.weight
    assert torch.equal(tiny_models.run_t5(model), expected)


def test_leaving_without_goes_to_meta_and_keeps_engine_state() -> None:
    module = Strays()
    kept = module.freqs.clone()
    binding, image, surveyed = move_in(Paper({"net": module}), {"net": module})["net"]
    weight = module.linear.weight
    held = weakref.ref(module.linear.bias)
    state = image[surveyed.state_offset :].clone()
    with torch.no_grad():
        binding.leave(False, state)
    image.fill_(0)
    assert weight is module.linear.weight
    assert weight.device.type == "meta"
    assert module.linear.bias.device.type == "meta"  # a new object: the old one is held by somebody
    assert held() is None or not lies_in(held(), image)
    assert torch.equal(module.freqs, kept)
    assert bool(module.many["wide"][0][3, 3] == 3)


def test_tensors_made_in_inference_mode_can_be_bound() -> None:
    with torch.inference_mode():
        module = nn.Linear(4, 4)
    paper = Paper({"net": module})
    binding, image, surveyed = move_in(paper, {"net": module})["net"]
    assert lies_in(module.weight, image)
    before = module.weight._version
    binding.mark_changed(surveyed.offsets.values())
    assert module.weight._version == before + 1
