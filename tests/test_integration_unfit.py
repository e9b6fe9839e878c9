"""What a pipeline can have that keeps its weights from being bound: each refused by component, before
anything happens, with what to do; and what looks alike and is no hindrance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hooked import fresh_model
from tiny_pipelines import build, generate, modules_of, save
from torch import nn
from torch.utils import _pytree as pytree

import weightstore as ws
from engine_hooks.integrations.diffusers import attach_pipeline, load_pipeline
from engine_hooks.integrations.unfit import refuse_unfit
from weightstore.client import Store
from weightstore.errors import AttachError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with ws.local_store("128MiB", window="16MiB") as store:
        yield store


class Halved(torch.Tensor):
    """A quantised weight as torchao makes them: a wrapper whose data are the tensors inside it."""

    halves: torch.Tensor

    @staticmethod
    def __new__(cls, halves: torch.Tensor) -> Halved:
        return torch.Tensor._make_wrapper_subclass(cls, halves.shape, dtype=halves.dtype)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, halves: torch.Tensor) -> None:
        self.halves = halves

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["halves"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, meta: Any, size: Any, stride: Any) -> Halved:
        return cls(inner["halves"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].halves)
        args, kwargs = pytree.tree_map_only(cls, lambda t: t.halves * 2, (args, kwargs or {}))
        return func(*args, **kwargs)


def quantise(pipe: Any) -> None:
    for part in pipe.text_encoder_2.modules():
        if isinstance(part, nn.Linear):
            part.weight = nn.Parameter(Halved(part.weight.data / 2), requires_grad=False)


def dispatched_elsewhere(pipe: Any) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    hook = AlignDevicesHook(execution_device="cpu")
    add_hook_to_module(pipe.transformer, hook)
    hook.execution_device = 1  # as if a device_map had put it on the second GPU


def in_float16(pipe: Any) -> None:
    pipe.vae.to(torch.float16)


ALL = ["vae", "text_encoder", "text_encoder_2", "transformer"]


@pytest.mark.parametrize(
    ("kind", "spoil", "components", "reason"),
    [
        ("flux", lambda p: p.enable_model_cpu_offload(device="cpu"), ALL, "remove_all_hooks"),
        ("flux", lambda p: p.enable_sequential_cpu_offload(device="cpu"), ALL, "remove_all_hooks"),
        (
            "flux",
            lambda p: p.transformer.enable_group_offload(onload_device=CPU, offload_type="leaf_level"),
            ["transformer"],
            "without enable_group_offload",
        ),
        (
            "flux",
            lambda p: p.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn),
            ["transformer"],
            "without enable_layerwise_casting",
        ),
        ("flux", dispatched_elsewhere, ["transformer"], "dispatched to 1 by a device_map.*reset_device_map"),
        ("flux", quantise, ["text_encoder_2"], r"14 of 21 tensors .*is a Halved.*skip=\['text_encoder_2'\]"),
        ("sdxl", in_float16, ["vae"], "force_upcast"),
    ],
    ids=["model offload", "sequential", "group", "layerwise", "device map", "quantised", "upcast"],
)  # fmt: skip
def test_refused_by_component_with_what_to_do(
    store: Store, kind: str, spoil: Callable[[Any], None], components: list[str], reason: str
) -> None:
    model = fresh_model()
    pipe = build(kind)
    spoil(pipe)
    hooks = [len(part._forward_pre_hooks) for m in modules_of(pipe).values() for part in m.modules()]
    with pytest.raises(AttachError, match=reason) as caught:
        attach_pipeline(store, model, pipe)
    assert caught.value.details == {"components": components}
    assert str(caught.value).count("\n") == len(components)
    assert model not in store.models()
    assert hooks == [len(part._forward_pre_hooks) for m in modules_of(pipe).values() for part in m.modules()]


@pytest.mark.parametrize("enable", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_without_the_offload_hooks_it_is_bound(store: Store, enable: str) -> None:
    pipe = build("flux")
    expected = generate(pipe)
    getattr(pipe, enable)(device="cpu")
    pipe.remove_all_hooks()
    with attach_pipeline(store, fresh_model(), pipe) as hook:
        hook.sleep()
        hook.wake()
        assert torch.equal(generate(pipe), expected)


def test_a_quantised_component_may_stay_as_it_is(store: Store) -> None:
    pipe = build("flux")
    quantise(pipe)
    expected = generate(pipe)
    weight = pipe.text_encoder_2.encoder.block[0].layer[0].SelfAttention.q.weight
    with attach_pipeline(store, fresh_model(), pipe, skip=["text_encoder_2"]) as hook:
        assert "text_encoder_2" not in hook.states
        hook.sleep()
        hook.wake()
        assert torch.equal(generate(pipe), expected)
        assert pipe.text_encoder_2.encoder.block[0].layer[0].SelfAttention.q.weight is weight


def test_dispatched_to_where_it_is_attached(store: Store, tmp_path: Path) -> None:
    from accelerate import dispatch_model

    pipe = build("flux")
    expected = generate(pipe)
    dispatch_model(pipe.transformer, device_map={"": "cpu"}, force_hooks=True)
    assert torch.device(pipe.transformer._hf_hook.execution_device) == CPU
    model = fresh_model()
    with attach_pipeline(store, model, pipe) as hook:
        hook.sleep()
        hook.wake()
        assert torch.equal(generate(pipe), expected)
    mapped = type(pipe).from_pretrained(str(save(build("flux"), tmp_path)), device_map="cpu")
    mapped.set_progress_bar_config(disable=True)
    with attach_pipeline(store, model, mapped):
        assert mapped._execution_device == CPU
        assert torch.equal(generate(mapped), expected)


def test_a_vae_that_nobody_upcasts_may_be_float16(store: Store) -> None:
    pipe = build("flux", dtype=torch.float16)
    assert pipe.vae.config.force_upcast
    refuse_unfit(pipe, modules_of(pipe), CPU)
    large = build("sdxl", dtype=torch.float16)
    large.vae.register_to_config(force_upcast=False)
    with attach_pipeline(store, fresh_model(), large) as hook:
        generate(large)
        assert hook.verify().ok


def test_several_reasons_are_told_at_once() -> None:
    pipe = build("flux")
    quantise(pipe)
    dispatched_elsewhere(pipe)
    with pytest.raises(AttachError, match="2 of the pipeline's components") as caught:
        refuse_unfit(pipe, modules_of(pipe), CPU)
    assert caught.value.details == {"components": ["text_encoder_2", "transformer"]}


def test_a_built_pipeline_is_looked_at_too(store: Store, tmp_path: Path) -> None:
    """A VAE of float16 in an SDXL pipeline: told by name, whatever way the pipeline came."""
    model = fresh_model()
    pipe = build("sdxl", dtype=torch.float16)
    save(pipe, tmp_path, weights=False)
    with store.refit(model) as refit:
        for name, module in modules_of(pipe).items():
            refit.put_module(module, prefix=f"{name}.")
    with pytest.raises(AttachError, match="vae is float16 and says force_upcast"):
        load_pipeline(store, model, tmp_path)
