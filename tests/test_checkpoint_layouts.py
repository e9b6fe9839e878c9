"""What a path is taken for, and which files of a directory are its weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from weightstore.checkpoint.layouts import find_checkpoint
from weightstore.errors import CheckpointError


def touch(directory: Path, *names: str) -> Path:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return directory


def index(directory: Path, name: str, weight_map: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path


def pipeline(directory: Path, **components: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    table = {"_class_name": "FluxPipeline", "_diffusers_version": "0.42.1", **components}
    (directory / "model_index.json").write_text(json.dumps(table))
    return directory


def refused(path: Path, variant: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(path, variant)
    return caught.value.message


def test_one_file(tmp_path: Path) -> None:
    touch(tmp_path, "any.name.safetensors")
    for path in (tmp_path / "any.name.safetensors", tmp_path):
        found = find_checkpoint(path)
        assert found.layout == "file"
        assert [(p.prefix, p.files) for p in found.parts] == [("", (tmp_path / "any.name.safetensors",))]


@pytest.mark.parametrize("base", ["model", "diffusion_pytorch_model", "something"])
def test_a_sharded_index_or_its_directory(tmp_path: Path, base: str) -> None:
    names = [f"{base}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    touch(tmp_path, *names)
    path = index(tmp_path, f"{base}.safetensors.index.json", {"b": names[1], "a": names[0], "c": names[0]})
    for given in (path, tmp_path, str(tmp_path)):
        found = find_checkpoint(given)
        assert found.layout == "sharded"
        (part,) = found.parts
        assert part.files == (tmp_path / names[0], tmp_path / names[1])
        assert part.index == path and part.weight_map == {"b": names[1], "a": names[0], "c": names[0]}


@pytest.mark.parametrize(
    "name",
    [
        "../w.safetensors",
        "/etc/w.safetensors",
        "sub/w.safetensors",
        "..",
        ".w.safetensors",
        "w.bin",
        "",
        3,
        None,
        "w\0.safetensors",
        "c:w.safetensors",
        "..\\w.safetensors",
    ],
)
def test_an_index_cannot_point_outside_its_directory(tmp_path: Path, name: object) -> None:
    (tmp_path / "in").mkdir()
    touch(tmp_path, "w.safetensors", "in/sub/w.safetensors")
    path = index(tmp_path / "in", "model.safetensors.index.json", {"t": name})
    assert "only a .safetensors file in the index's own directory is allowed" in refused(path)


def test_links_as_in_the_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    touch(tmp_path, "blobs/abc")
    (tmp_path / "snapshot").mkdir()
    os.symlink("../blobs/abc", tmp_path / "snapshot/model-00001-of-00001.safetensors")
    path = index(
        tmp_path / "snapshot", "model.safetensors.index.json", {"t": "model-00001-of-00001.safetensors"}
    )
    assert find_checkpoint(path).layout == "sharded"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": [1]}', "has no weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' occurs twice"),
        ('{"weight_map": {"a": "x.safetensors"}}', "1 of its 1 files are missing: x.safetensors"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    assert message in refused(path)


def test_a_pipeline_has_the_components_its_index_names(tmp_path: Path) -> None:
    pipeline(
        tmp_path,
        transformer=["diffusers", "FluxTransformer2DModel"],
        text_encoder=["transformers", "CLIPTextModel"],
        transformer_2=[None, None],
        scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"],
        tokenizer=["transformers", "CLIPTokenizer"],
        boundary_ratio=0.875,
        requires_safety_checker=True,
    )
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    touch(tmp_path, f"transformer/{shard}", "transformer/config.json", "text_encoder/model.safetensors")
    touch(tmp_path, "scheduler/scheduler_config.json", "tokenizer/vocab.json", "flux1-dev.safetensors")
    touch(tmp_path, "extra/model.safetensors", "assets/picture.png", ".cache/model.safetensors")
    index(tmp_path / "transformer", "diffusion_pytorch_model.safetensors.index.json", {"w": shard})
    found = find_checkpoint(tmp_path)
    assert found.layout == "pipeline"
    assert [(p.prefix, [f.name for f in p.files]) for p in found.parts] == [
        ("transformer.", [shard]),
        ("text_encoder.", ["model.safetensors"]),
    ]
    assert found.skipped == ("extra",)


def test_a_directory_of_component_directories_needs_no_index(tmp_path: Path) -> None:
    touch(
        tmp_path, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "notes/a.txt"
    )
    found = find_checkpoint(tmp_path)
    assert found.layout == "pipeline"
    assert [p.prefix for p in found.parts] == ["text_encoder.", "vae."]


def test_an_incomplete_pipeline_is_refused(tmp_path: Path) -> None:
    root = pipeline(tmp_path, vae=["diffusers", "AutoencoderKL"], unet=["diffusers", "UNet2DConditionModel"])
    touch(tmp_path, "vae/model.safetensors")
    assert "component 'unet', but there is no directory" in refused(root)
    touch(tmp_path, "unet/config.json")
    assert f"{root}/unet: no safetensors weights" in refused(root)
    touch(tmp_path, "unet/diffusion_pytorch_model.bin")
    assert "only diffusion_pytorch_model.bin; convert" in refused(root)
    touch(tmp_path, "unet/diffusion_pytorch_model.safetensors")
    assert len(find_checkpoint(root).parts) == 2


@pytest.mark.parametrize("name", ["../vae", "/vae", "a b", "v.ae"])
def test_component_names_are_plain_names(tmp_path: Path, name: str) -> None:
    pipeline(tmp_path, **{name: ["diffusers", "AutoencoderKL"]})
    message = refused(tmp_path)
    assert "model_index.json" in message and ("not allowed" in message or "dot" in message)


def test_a_pipeline_without_any_weights_is_refused(tmp_path: Path) -> None:
    pipeline(tmp_path, scheduler=["diffusers", "DDIMScheduler"])
    touch(tmp_path, "scheduler/scheduler_config.json")
    assert "(scheduler) none has safetensors weights" in refused(tmp_path)


@pytest.mark.parametrize(
    ("names", "variant", "expected"),
    [
        (["model.safetensors", "model.fp16.safetensors"], None, "model.safetensors"),
        (["model.safetensors", "model.fp16.safetensors"], "fp16", "model.fp16.safetensors"),
        (["model.fp16.safetensors"], None, "model.fp16.safetensors"),
        (["diffusion_pytorch_model.safetensors", "model.safetensors"], None, None),
        (["model.fp16.safetensors", "model.non_ema.safetensors"], None, None),
        (["model.fp16.safetensors", "model.non_ema.safetensors"], "non_ema", "model.non_ema.safetensors"),
        (["model.safetensors"], "fp16", None),
        (["model.safetensors", "consolidated.safetensors"], None, "model.safetensors"),
        (["a.safetensors", "b.safetensors"], None, None),
        (["sd3.5_medium.safetensors"], None, "sd3.5_medium.safetensors"),
        (["model.safetensors", "model.safetensors.index.json"], None, None),
        (["model.safetensors.index.fp16.json"], None, "model.safetensors.index.fp16.json"),
        (["model.fp16.safetensors.index.json", "model.safetensors"], None, "model.safetensors"),
        (
            ["model.safetensors", "model.safetensors.index.fp16.json"],
            "fp16",
            "model.safetensors.index.fp16.json",
        ),
    ],
)
def test_variants_and_ambiguity(
    tmp_path: Path, names: list[str], variant: str | None, expected: str | None
) -> None:
    for name in names:
        if name.endswith(".json"):
            touch(tmp_path, "model.fp16-00001-of-00001.safetensors")
            index(tmp_path, name, {"t": "model.fp16-00001-of-00001.safetensors"})
        else:
            touch(tmp_path, name)
    if expected is None:
        message = refused(tmp_path, variant)
        assert all(name in message for name in names)
    else:
        (part,) = find_checkpoint(tmp_path, variant).parts
        assert (part.index or part.files[0]).name == expected


def test_shards_without_an_index_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert "2 shards such as model-00001-of-00002.safetensors but no" in refused(tmp_path)


def test_nothing_there_or_nothing_known(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "absent")
    assert "no safetensors weights and no model_index.json" in refused(tmp_path)
    touch(tmp_path, "weights.bin")
    assert "not a checkpoint weightstore reads" in refused(tmp_path / "weights.bin")
    assert "only weights.bin" in refused(tmp_path)


def test_a_pipe_in_place_of_an_index_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    assert "not a regular file" in refused(tmp_path)
