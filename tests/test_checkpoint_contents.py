"""Opening a checkpoint finds every tensor, and every contradiction, before anything is read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightstore.checkpoint.contents import Contents
from weightstore.checkpoint.safetensors_header import ALIASES_KEY, STRIDES_KEY
from weightstore.errors import CheckpointError
from weightstore.types import TensorSpec

A = torch.arange(6, dtype=torch.float32).reshape(2, 3)
B = torch.arange(4, dtype=torch.bfloat16)


def sharded(
    directory: Path, shards: list[dict[str, torch.Tensor]], lies: dict[str, str] | None = None
) -> Path:
    directory.mkdir(exist_ok=True)
    weight_map = {}
    for i, tensors in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, directory / name)
        weight_map |= dict.fromkeys(tensors, name)
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map | (lies or {})}))
    return path


def refused(path: Path) -> str:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError) as caught:
        Contents(path)
    assert len(os.listdir("/proc/self/fd")) == before, "a refused checkpoint leaves files open"
    return caught.value.message


def test_names_places_and_prefixes(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    sharded(tmp_path / "text_encoder", [{"a": A}, {"b": B}])
    save_file({"a": A}, tmp_path / "vae/diffusion_pytorch_model.safetensors")
    with Contents(tmp_path, prefix="x.") as contents:
        assert contents.specs == [
            TensorSpec("x.text_encoder.a", "float32", (2, 3), (3, 1)),
            TensorSpec("x.text_encoder.b", "bfloat16", (4,), (1,)),
            TensorSpec("x.vae.a", "float32", (2, 3), (3, 1)),
        ]
        assert contents.nbytes == 24 + 8 + 24
        for name in ("x.text_encoder.a", "x.vae.a"):
            source = contents.sources[name]
            assert os.pread(source.file.fd, 24, source.tensor.begin) == A.numpy().tobytes()
        contents.check_unchanged()


def test_ties_and_strides_become_specs(tmp_path: Path) -> None:
    alias = {"target": "a", "dtype": "float32", "shape": [3, 2], "stride": [1, 3]}
    path = tmp_path / "f.safetensors"
    save_file({"a": A}, path, metadata={ALIASES_KEY: json.dumps({"t": alias}), STRIDES_KEY: '{"a": [1, 2]}'})
    with Contents(path) as contents:
        assert contents.specs == [
            TensorSpec("a", "float32", (2, 3), (1, 2)),
            TensorSpec("t", "float32", (3, 2), (1, 3), "a"),
        ]
        assert contents.nbytes == 24


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({STRIDES_KEY: '{"a": [1, 1]}'}, "has gaps or overlaps"),
        ({STRIDES_KEY: '{"a": [1]}'}, "2 dimensions and 1 strides"),
        ({STRIDES_KEY: '{"a": [-3, 1]}'}, "out of range"),
        (
            {ALIASES_KEY: '{"t": {"target": "z", "dtype": "int8", "shape": [], "stride": []}}'},
            "no target 'z'",
        ),
        ({ALIASES_KEY: '{"t": {"target": "a", "dtype": "int8", "shape": [], "stride": []}}'}, "1 bytes"),
        ({ALIASES_KEY: '{"t": {"target": "a", "dtype": "int7", "shape": [], "stride": []}}'}, "dtype 'int7'"),
        (
            {ALIASES_KEY: '{"t t": {"target": "a", "dtype": "int8", "shape": [24], "stride": [1]}}'},
            "not allowed",
        ),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(
    tmp_path: Path, metadata: dict[str, str], message: str
) -> None:
    save_file({"a": A}, tmp_path / "f.safetensors", metadata=metadata)
    assert message in refused(tmp_path / "f.safetensors")


def test_an_index_must_agree_with_its_shards(tmp_path: Path) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert "1 tensors it lists are not in its files: c" in refused(
        sharded(tmp_path / "1", [{"a": A}, {"b": B}], {"c": first})
    )
    two = [{"a": A, "c": A + 1}, {"b": B}]
    assert f"lists it in {second}" in refused(sharded(tmp_path / "2", two, {"a": second}))
    assert f"lists it in {second}" in refused(sharded(tmp_path / "3", [two[0], {"a": A, "b": B}]))
    path = sharded(tmp_path / "4", [{"a": A, "hidden": A + 1}, {"b": B}])
    table = json.loads(path.read_text())
    del table["weight_map"]["hidden"]
    path.write_text(json.dumps(table))
    message = refused(path)
    assert "holds tensor 'hidden'" in message and "does not list it" in message


def test_names_the_store_cannot_hold_are_refused(tmp_path: Path) -> None:
    save_file({"naïve name": A}, tmp_path / "f.safetensors")
    assert "is not allowed" in refused(tmp_path / "f.safetensors")


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "f.safetensors")
    assert "holds no tensors" in refused(tmp_path / "f.safetensors")


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f.safetensors")
    assert "not a regular file" in refused(tmp_path / "f.safetensors")
    (tmp_path / "d").mkdir()
    os.symlink("nowhere", tmp_path / "d/model.safetensors")
    assert "cannot be opened" in refused(tmp_path / "d")


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save_file({"a": A}, path)
    with Contents(path) as contents:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(CheckpointError, match="changed while it was read"):
            contents.check_unchanged()
