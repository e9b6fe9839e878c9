"""Real pipelines of five kinds, attached and built from configs: their pictures are those of pipelines
that were simply given the same weights, bit for bit, whatever they slept through."""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hooked import addresses, fresh_model, publish
from safetensors.torch import load_file, save_file
from test_docs import DOCS, run
from tiny_pipelines import KINDS, TRAINED, build, drop_weights, generate, modules_of, save
from torch import nn

import weightstore as ws
from engine_hooks.find import Found, Kind, find_tensors
from engine_hooks.integrations.diffusers import attach_pipeline, components_of, load_pipeline
from weightstore.checkpoint.load import load_checkpoint
from weightstore.client import Store
from weightstore.errors import AttachError, DependencyMissing, EngineAsleep, UnknownModel, UsageError

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with ws.local_store("512MiB", window="32MiB") as store:
        yield store


@functools.cache
def picture(kind: str, trained: int = 0, dtype: torch.dtype = F32) -> torch.Tensor:
    """What a pipeline makes that was given frozen weights of seed 0 and trained ones of another."""
    pipe = build(kind, 0, dtype)
    other = modules_of(build(kind, trained, dtype))
    pipe.register_modules(**{name: other[name] for name in TRAINED[kind]})
    return generate(pipe)


def train(store: Store, model: str, kind: str, seed: int, dtype: torch.dtype = F32) -> int:
    other = modules_of(build(kind, seed, dtype))
    trained = {name: other[name] for name in TRAINED[kind]}
    return publish(store, model, trained, components=list(trained))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def state_of(pipe: Any) -> dict[str, bytes]:
    """What no checkpoint has: tables and buffers that constructors compute."""
    found = find_tensors(modules_of(pipe))
    return {item.name: bits(item.tensor) for item in found if item.kind in (Kind.TRANSIENT, Kind.STRAY)}


# -- attaching -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_before_and_after_sleep_refit_and_wake(store: Store, kind: str) -> None:
    model = fresh_model()
    pipe = build(kind)
    state = state_of(pipe)
    with attach_pipeline(store, model, pipe) as hook:
        assert hook.attached.published
        assert set(hook.states) == set(modules_of(pipe))
        where = addresses(modules_of(pipe))
        with hook.running() as version:
            assert version == 1
            assert torch.equal(generate(pipe), picture(kind))

        hook.sleep()
        assert (pipe.device, pipe._execution_device, pipe.dtype) == (torch.device("cpu"),) * 2 + (F32,)
        with pytest.raises(EngineAsleep):
            generate(pipe)
        assert train(store, model, kind, seed=1) == 2
        hook.wake()
        assert torch.equal(generate(pipe), picture(kind, trained=1))
        assert not torch.equal(picture(kind, trained=1), picture(kind))
        assert state_of(pipe) == state
        assert hook.verify().differing == ()

        train(store, model, kind, seed=2)
        hook.refit()
        assert torch.equal(generate(pipe), picture(kind, trained=2))

        hook.sleep(tags=TRAINED[kind])
        with pytest.raises(EngineAsleep):
            generate(pipe)
        hook.wake()
        assert torch.equal(generate(pipe), picture(kind, trained=2))
        assert addresses(modules_of(pipe)) == where


def test_the_hook_goes_and_the_pipeline_stays(store: Store) -> None:
    pipe = build("flux")
    hook = attach_pipeline(store, fresh_model(), pipe, device="cpu")
    hook.close(keep=True)
    assert torch.equal(generate(pipe), picture("flux"))


def test_what_is_no_model_is_left_out() -> None:
    pipe = build("flux")
    assert components_of(pipe) == modules_of(pipe)
    assert pipe.components["image_encoder"] is None
    assert list(components_of(pipe, skip=["vae", "text_encoder"])) == ["text_encoder_2", "transformer"]
    with pytest.raises(UsageError, match="skip names vea; the pipeline has vae, "):
        components_of(pipe, skip=["vea"])
    with pytest.raises(UsageError, match="a Linear is no pipeline"):
        components_of(nn.Linear(1, 1))


def test_a_module_under_two_names_is_bound_once(store: Store) -> None:
    model = fresh_model()
    pipe = build("sd3")
    pipe.register_modules(text_encoder_2=pipe.text_encoder)
    expected = generate(pipe)
    with attach_pipeline(store, model, pipe) as hook:
        assert set(hook.states) == {"transformer", "vae", "text_encoder", "text_encoder_3"}
        assert pipe.text_encoder_2 is pipe.text_encoder
        hook.sleep()
        with pytest.raises(EngineAsleep):
            pipe.text_encoder_2(torch.zeros(1, 4, dtype=torch.long))
        hook.wake()
        assert torch.equal(generate(pipe), expected)


def test_a_module_inside_another_is_bound_with_that(store: Store) -> None:
    part = nn.Linear(3, 3)
    whole = nn.Sequential(part, nn.Linear(3, 3))
    pipe = SimpleNamespace(components={"part": part, "whole": whole}, device=torch.device("cpu"))
    assert components_of(pipe) == {"whole": whole}
    model = fresh_model()
    with attach_pipeline(store, model, pipe) as hook:
        with store.refit(model, partial=True) as refit:
            refit.put("whole.0.bias", torch.full((3,), 7.0))
        hook.refit()
        assert torch.equal(part.bias, torch.full((3,), 7.0))


def test_one_module_for_two_stored_components_is_refused(store: Store) -> None:
    model = fresh_model()
    publish(store, model, modules_of(build("sd3")))
    pipe = build("sd3")
    pipe.register_modules(text_encoder_2=pipe.text_encoder)
    with pytest.raises(AttachError, match=r"text_encoder_2 is \(in\) the module of text_encoder") as caught:
        attach_pipeline(store, model, pipe)
    assert caught.value.details == {"components": ["text_encoder_2"]}


def test_modules_without_names_are_refused(store: Store) -> None:
    pipe = SimpleNamespace(components={"nets": [nn.Linear(1, 1)]}, device=torch.device("cpu"))
    with pytest.raises(AttachError, match="a list of modules"):
        attach_pipeline(store, fresh_model(), pipe)
    with pytest.raises(AttachError, match="nothing to attach"):
        attach_pipeline(store, fresh_model(), pipe, skip=["nets"])


def test_a_pipeline_on_meta_needs_a_device(store: Store) -> None:
    pipe = SimpleNamespace(components={"net": nn.Linear(1, 1, device="meta")}, device=torch.device("meta"))
    with pytest.raises(UsageError, match="say where it is to run"):
        attach_pipeline(store, fresh_model(), pipe)


# -- building from configs -----------------------------------------------------------------------------


def same(one: Found, other: Found) -> bool:
    a, b = one.tensor, other.tensor
    alike = (one.kind, one.names, a.dtype, a.shape, a.stride(), a.requires_grad)
    return alike == (other.kind, other.names, b.dtype, b.shape, b.stride(), b.requires_grad) and (
        bits(a) == bits(b)
    )


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, BF16) for kind in KINDS), ("flux", F16), ("wan", F16), ("sdxl", F32)]
)
def test_a_pipeline_without_weight_files(store: Store, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = fresh_model()
    original = build(kind, 0, dtype)
    save(original, tmp_path)
    usual = type(original).from_pretrained(str(tmp_path), dtype=dtype)
    publish(store, model, modules_of(usual))
    drop_weights(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt")]

    pipe, hook = load_pipeline(store, model, tmp_path)
    with hook:
        assert type(pipe) is type(usual)
        assert not hook.attached.published
        expected = {item.name: item for item in find_tensors(modules_of(usual))}
        found = {item.name: item for item in find_tensors(modules_of(pipe))}
        assert found.keys() == expected.keys()
        assert [name for name in found if not same(found[name], expected[name])] == []
        for name, module in modules_of(pipe).items():
            like = modules_of(usual)[name]
            assert (type(module), module.training) == (type(like), like.training)
            assert getattr(module, "generation_config", None) == getattr(like, "generation_config", None)
        settings = {key: value for key, value in usual.config.items() if key not in usual.components}
        assert {key: pipe.config[key] for key in settings} == settings
        assert pipe.scheduler.config == usual.scheduler.config

        pipe.set_progress_bar_config(disable=True)
        assert torch.equal(generate(pipe), picture(kind, dtype=dtype))
        hook.sleep()
        train(store, model, kind, seed=1, dtype=dtype)
        hook.wake()
        assert torch.equal(generate(pipe), picture(kind, trained=1, dtype=dtype))


@pytest.fixture(scope="module")
def flux(store: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model in the store, and a directory of it without weights. Not to be written to."""
    model = fresh_model()
    publish(store, model, modules_of(build("flux")))
    return model, save(build("flux"), tmp_path_factory.mktemp("flux"), weights=False)


def test_components_may_be_given_or_left_out(store: Store, flux: tuple[str, Path]) -> None:
    model, directory = flux
    scheduler = build("flux").scheduler
    pipe, hook = load_pipeline(
        store,
        model,
        directory,
        components={"text_encoder_2": None, "tokenizer_2": None, "scheduler": scheduler},
    )
    with hook:
        assert pipe.text_encoder_2 is None
        assert pipe.scheduler is scheduler
        assert set(hook.states) == {"transformer", "vae", "text_encoder"}


def test_another_pipeline_of_the_same_components(store: Store, flux: tuple[str, Path]) -> None:
    from diffusers import FluxImg2ImgPipeline

    pipe, hook = load_pipeline(store, flux[0], flux[1], pipeline_class=FluxImg2ImgPipeline)
    with hook:
        assert type(pipe) is FluxImg2ImgPipeline


def test_skipped_components_come_from_files(store: Store, tmp_path: Path) -> None:
    model = fresh_model()
    original = build("flux", 0, BF16)
    save(original, tmp_path)
    for name in ("transformer", "text_encoder"):
        drop_weights(tmp_path / name)
    modules = modules_of(original)
    publish(store, model, {name: modules[name] for name in ("transformer", "text_encoder")})
    with pytest.raises(AttachError, match="vae is not a component of the store's version"):
        load_pipeline(store, model, tmp_path)
    pipe, hook = load_pipeline(store, model, tmp_path, dtype=BF16, skip=["vae", "text_encoder_2"])
    with hook:
        assert set(hook.states) == {"transformer", "text_encoder"}
        hook.sleep()
        assert pipe.vae.dtype is BF16
        assert bits(pipe.vae.decoder.conv_in.weight) == bits(original.vae.decoder.conv_in.weight)


def test_what_the_store_has_in_another_dtype_is_named(store: Store, flux: tuple[str, Path]) -> None:
    model, directory = flux
    dtypes = {"vae": BF16, "default": F32}
    with pytest.raises(AttachError, match=r"bfloat16.* in the module, float32.* in the store") as caught:
        load_pipeline(store, model, directory, dtype=dtypes)
    assert {name.partition(".")[0] for name in caught.value.details["mismatched"]} == {"vae"}


def test_a_model_the_store_lacks(store: Store, flux: tuple[str, Path]) -> None:
    with pytest.raises(UnknownModel):
        load_pipeline(store, "nobody", flux[1])
    assert "nobody" not in store.models()


def edited(directory: Path, into: Path, changes: dict[str, dict[str, Any]]) -> Path:
    """A copy of `directory` whose JSON files have other values."""
    for path in directory.rglob("*.*"):
        copied = into / path.relative_to(directory)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(path.read_bytes())
    for name, change in changes.items():
        file = into / name
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return into


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"transformer/config.json": {"quantization_config": {"quant_method": "x"}}},
            "transformer is quantised",
        ),
        (
            {"text_encoder_2/config.json": {"quantization_config": {"quant_method": "bitsandbytes"}}},
            "text_encoder_2 is quantised",
        ),
        ({"model_index.json": {"vae": ["my_code", "Vae"]}}, "vae is a Vae of 'my_code'"),
        ({"model_index.json": {"vae": ["transformers", "AutoModel"]}}, "vae is a AutoModel of"),
        ({"model_index.json": {"_class_name": "NoPipeline"}}, "has no pipeline 'NoPipeline'"),
    ],
)
def test_what_a_config_does_not_determine_is_refused(
    store: Store, flux: tuple[str, Path], tmp_path: Path, changes: dict[str, dict[str, Any]], reason: str
) -> None:
    model, directory = flux
    with pytest.raises(AttachError, match=reason):
        load_pipeline(store, model, edited(directory, tmp_path, changes))


def test_no_pipeline_directory(store: Store, flux: tuple[str, Path], tmp_path: Path) -> None:
    model, directory = flux
    with pytest.raises(UsageError, match=r"has no model_index\.json"):
        load_pipeline(store, model, "black-forest-labs/FLUX.1-dev")
    (edited(directory, tmp_path, {}) / "vae" / "config.json").unlink()
    with pytest.raises(UsageError, match=r"has no vae/config\.json"):
        load_pipeline(store, model, tmp_path)


def test_without_diffusers_the_extra_is_named(
    store: Store, flux: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(DependencyMissing, match=r"weightstore\[diffusers\]"):
        load_pipeline(store, *flux)


def test_a_failed_load_leaves_nothing_behind(store: Store, flux: tuple[str, Path]) -> None:
    model, directory = flux
    before = copy.deepcopy(store.tags(model))
    with pytest.raises(AttachError):
        load_pipeline(store, model, directory, dtype=BF16)
    assert store.tags(model) == before
    assert torch.get_default_dtype() is F32
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_checkpoint_with_other_names_than_the_modules(store: Store, tmp_path: Path) -> None:
    """FLUX.1's CLIP says text_model. in its file, and transformers 5 drops that while it loads."""
    model = fresh_model()
    save(build("flux"), tmp_path)
    file = tmp_path / "text_encoder" / "model.safetensors"
    save_file({f"text_model.{name}": weight for name, weight in load_file(file).items()}, file)
    load_checkpoint(store, model, tmp_path)
    with pytest.raises(AttachError, match=r"close: text_encoder\.") as caught:
        load_pipeline(store, model, tmp_path)
    assert {name.partition(".")[0] for name in caught.value.details["unknown"]} == {"text_encoder"}
    names = ws.NameMap().rename(r"^text_encoder\.text_model\.", "text_encoder.")
    load_checkpoint(store, model, tmp_path, names=names)
    pipe, hook = load_pipeline(store, model, tmp_path)
    with hook:
        pipe.set_progress_bar_config(disable=True)
        assert torch.equal(generate(pipe), picture("flux"))


# -- the page that describes it ------------------------------------------------------------------------


def test_the_page_does_what_it_says(store: Store, tmp_path: Path) -> None:
    qwen = build("qwen-image")
    namespace: dict[str, Any] = {
        "store": store,
        "torch": torch,
        "weightstore": ws,
        "load_checkpoint": load_checkpoint,
        "device": "cpu",
        "pipe": build("flux"),
        "prompt": "a cat",
        "options": {"num_inference_steps": 1, "height": 16, "width": 16, "max_sequence_length": 24},
        "transformer": build("flux", seed=1).transformer,
        "directory": save(build("flux"), tmp_path / "flux", weights=False),
        "qwen_image_directory": save(qwen, tmp_path / "qwen"),
    }
    assert run(DOCS / "integrations" / "diffusers.md", namespace, tmp_path, json_as="") == 14
    pipe, hook = load_pipeline(store, "qwen-image", tmp_path / "qwen")
    with hook:
        pipe.set_progress_bar_config(disable=True)
        assert torch.equal(generate(pipe), picture("qwen-image"))
    namespace["hook"].close()
