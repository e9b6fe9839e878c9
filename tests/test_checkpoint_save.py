"""What is saved opens in the Hugging Face libraries and loads back bit for bit, with its ties and strides."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import weightstore
from weightstore.checkpoint.load import load_checkpoint
from weightstore.checkpoint.save import save_checkpoint
from weightstore.client import Store
from weightstore.errors import CheckpointError, StorageError, UnknownModel
from weightstore.types import TensorSpec

MIB = 1 << 20
TRANSPOSED = "text_encoder.lm_head.weight_t"
"""A tie of another shape and stride than its target's."""
CONV = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with weightstore.local_store(capacity=256 * MIB, window=16 * MIB) as store:
        yield store


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    store: Store = request.getfixturevalue("store")
    for model in store.models():
        store.remove_model(model)
    status = store.status()
    assert (status.arena.used, status.refits, status.leases) == (0, [], [])


def put(store: Store, model: str, tensors: dict[str, torch.Tensor]) -> int:
    """Make `tensors` the model's next version; its number."""
    with store.refit(model, fresh=True) as refit:
        refit.put_many({name: tensor for name, tensor in tensors.items() if name != TRANSPOSED})
        if TRANSPOSED in tensors:
            refit.reserve(
                [TensorSpec(TRANSPOSED, "float32", (20, 50), (1, 20), "text_encoder.shared.weight")]
            )
    return refit.report.version


def pipeline_tensors() -> dict[str, torch.Tensor]:
    shared = torch.randn(50, 20, generator=torch.Generator().manual_seed(2))
    return {
        "transformer.blocks.0.weight": torch.randn(300, 7).bfloat16(),
        "transformer.blocks.0.flag": torch.tensor([True, False, True]),
        "transformer.blocks.1.weight": torch.randn(1000, 300),
        "transformer.scale": torch.tensor(0.5, dtype=torch.float64),
        "transformer.empty": torch.empty(3, 0),
        "vae.conv.weight": CONV.to(memory_format=torch.channels_last),
        "vae.fp8": torch.randn(33).to(torch.float8_e5m2),
        "text_encoder.shared.weight": shared,
        "text_encoder.encoder.embed_tokens.weight": shared,
        TRANSPOSED: shared.t(),
        "text_encoder.ids": torch.arange(9).to(torch.uint16),
    }


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def assert_same(store: Store, one: str, other: str) -> None:
    """Two models hold the same tensors: names, dtypes, shapes, strides, ties, bits."""
    with store.lease(one) as a, store.lease(other) as b:
        assert set(a.names) == set(b.names)

        def ties(records: object) -> set[frozenset[str]]:
            groups: dict[tuple[int, int], set[str]] = {}
            for record in records.values():  # type: ignore[attr-defined]
                if record.nbytes:
                    groups.setdefault((record.offset, record.nbytes), set()).add(record.name)
            return {frozenset(names) for names in groups.values()}

        assert ties(a.records) == ties(b.records)
        for name in a.names:
            left, right = a.records[name], b.records[name]
            assert (left.dtype, left.shape, left.stride) == (right.dtype, right.shape, right.stride), name
            assert torch.equal(raw(a[name]), raw(b[name])), name


def assert_file_holds(path: Path, expected: dict[str, torch.Tensor]) -> None:
    got = load_file(path)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape
        assert torch.equal(raw(got[name]), raw(value)), name


@pytest.mark.parametrize("layout", ["file", "sharded", "pipeline"])
def test_what_is_saved_loads_back_as_it_was(store: Store, tmp_path: Path, layout: str) -> None:
    version = put(store, "m", pipeline_tensors())
    path = tmp_path / ("new/m.safetensors" if layout == "file" else "new/m")
    report = save_checkpoint(store, "m", path, layout=layout, max_shard_bytes=100_000)
    assert (report.layout, report.version, report.ties) == (layout, version, 2)
    assert report.tensors == 9 and all(Path(name).is_file() for name in report.files)
    assert len(report.files) == {"file": 1, "sharded": 3, "pipeline": 5}[layout]
    loaded = load_checkpoint(store, "again", path)
    assert (loaded.layout, loaded.tensors, loaded.ties) == (layout, 9, 2)
    assert loaded.nbytes == report.nbytes
    assert_same(store, "m", "again")


def test_auto_chooses_by_path_and_names(store: Store, tmp_path: Path) -> None:
    put(store, "pipe", {"vae.w": torch.ones(2), "transformer.w": torch.ones(3)})
    put(store, "part", {"blocks.w": torch.ones(2), "norm.w": torch.ones(3)})
    assert save_checkpoint(store, "pipe", tmp_path / "a.safetensors").layout == "file"
    report = save_checkpoint(store, "pipe", tmp_path / "a")
    assert report.layout == "pipeline" and report.weights_only
    assert sorted(report.files) == [
        str(tmp_path / "a/transformer/diffusion_pytorch_model.safetensors"),
        str(tmp_path / "a/vae/diffusion_pytorch_model.safetensors"),
    ]
    assert save_checkpoint(store, "part", tmp_path / "b").files == (str(tmp_path / "b/model.safetensors"),)


def test_files_open_in_the_safetensors_library_and_are_equal(store: Store, tmp_path: Path) -> None:
    tensors = pipeline_tensors()
    put(store, "m", tensors)
    save_checkpoint(store, "m", tmp_path / "m.safetensors")
    stored = {n: t for n, t in tensors.items() if "embed_tokens" not in n and n != TRANSPOSED}
    assert_file_holds(tmp_path / "m.safetensors", stored)
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["weightstore.strides"]) == {"vae.conv.weight": [36, 1, 12, 4]}
    assert json.loads(metadata["weightstore.aliases"]).keys() == tensors.keys() - stored.keys()


def test_every_dtype_survives(store: Store, tmp_path: Path) -> None:
    bits = torch.arange(48, dtype=torch.uint8)
    tensors = {
        f"transformer.{str(dtype).removeprefix('torch.')}": bits.view(dtype)
        for dtype in (
            *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
            *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
            *(torch.uint64, torch.uint32, torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2),
        )
    }
    tensors["transformer.bool"] = bits > 20
    put(store, "m", tensors)
    save_checkpoint(store, "m", tmp_path / "m.safetensors")
    assert_file_holds(tmp_path / "m.safetensors", tensors)
    load_checkpoint(store, "again", tmp_path / "m.safetensors")
    assert_same(store, "m", "again")


def test_a_saved_component_is_what_diffusers_reads(store: Store, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).to(memory_format=torch.channels_last)
    vae.save_config(tmp_path / "vae")
    with store.refit("m", fresh=True) as refit:
        refit.put_module(vae, prefix="vae.")
    save_checkpoint(store, "m", tmp_path, layout="pipeline", max_shard_bytes=50_000)
    assert (tmp_path / "vae/diffusion_pytorch_model.safetensors.index.json").is_file()
    again = AutoencoderKL.from_pretrained(tmp_path / "vae").state_dict()
    for name, value in vae.state_dict().items():
        assert torch.equal(again[name], value), name


def test_a_saved_text_encoder_is_what_transformers_reads(store: Store, tmp_path: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    encoder = T5EncoderModel(config)
    config.save_pretrained(tmp_path / "text_encoder")
    with store.refit("m", fresh=True) as refit:
        refit.put_module(encoder, prefix="text_encoder.")
    report = save_checkpoint(store, "m", tmp_path)
    assert report.files == (str(tmp_path / "text_encoder/model.safetensors"),)
    assert report.ties == 1
    again = T5EncoderModel.from_pretrained(tmp_path / "text_encoder").state_dict()
    for name, value in encoder.state_dict().items():
        assert torch.equal(again[name], value), name


def test_the_targets_own_index_names_the_files(store: Store, tmp_path: Path) -> None:
    put(store, "m", {"vae.w": torch.ones(2), "transformer.w": torch.ones(2)})
    index = {"vae": ["transformers", "X"], "transformer": ["diffusers", "Y"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    report = save_checkpoint(store, "m", tmp_path)
    assert not report.weights_only
    assert {os.path.relpath(f, tmp_path) for f in report.files} == {
        "vae/model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
    }


def test_saving_again_replaces_shards_and_index(store: Store, tmp_path: Path) -> None:
    put(store, "big", {f"b.{i}": torch.full((1000,), float(i)) for i in range(5)})
    put(store, "small", {"b.0": torch.zeros(3)})
    save_checkpoint(store, "big", tmp_path / "d", max_shard_bytes=4000)
    assert len(list((tmp_path / "d").iterdir())) == 6
    (tmp_path / "d/config.json").write_text("{}")
    save_checkpoint(store, "small", tmp_path / "d")
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["config.json", "model.safetensors"]
    save_checkpoint(store, "big", tmp_path / "d", max_shard_bytes=8000)
    assert len(list((tmp_path / "d").iterdir())) == 5
    load_checkpoint(store, "again", tmp_path / "d")
    assert_same(store, "big", "again")


def test_a_directory_with_other_weights_is_refused(store: Store, tmp_path: Path) -> None:
    put(store, "m", {"vae.w": torch.ones(2)})
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/model.safetensors").write_bytes(b"theirs")
    with pytest.raises(CheckpointError, match=r"holds model\.safetensors; .* two sets of weights"):
        save_checkpoint(store, "m", tmp_path)
    assert [p.name for p in (tmp_path / "vae").iterdir()] == ["model.safetensors"]


def test_a_version_of_the_past_can_be_saved_while_it_is_leased(store: Store, tmp_path: Path) -> None:
    old = put(store, "m", {"a.w": torch.zeros(4)})
    with store.lease("m", version=old):
        new = put(store, "m", {"a.w": torch.ones(4)})
        report = save_checkpoint(store, "m", tmp_path / "old.safetensors", version=old)
    assert report.version == old
    assert_file_holds(tmp_path / "old.safetensors", {"a.w": torch.zeros(4)})
    assert save_checkpoint(store, "m", tmp_path / "new.safetensors").version == new


def test_ties_between_components_are_written_twice_and_reported(store: Store, tmp_path: Path) -> None:
    shared = torch.randn(8)
    put(store, "m", {"vae.w": shared, "transformer.w": shared})
    report = save_checkpoint(store, "m", tmp_path)
    assert report.untied == ("transformer.w",) and report.tensors == 2
    load_checkpoint(store, "again", tmp_path)
    with store.lease("again") as snapshot:
        assert torch.equal(snapshot["vae.w"], shared) and torch.equal(snapshot["transformer.w"], shared)


def leftovers(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


@pytest.mark.parametrize("layout", ["file", "pipeline"])
def test_a_failed_save_leaves_what_was_there(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    target = tmp_path / ("d/w.safetensors" if layout == "file" else "d")
    put(store, "m", {"vae.w": torch.zeros(3), "text_encoder.w": torch.zeros(4)})
    save_checkpoint(store, "m", target, layout=layout)
    before = {name: (tmp_path / name).read_bytes() for name in leftovers(tmp_path) if "." in name}
    put(store, "m", {"vae.w": torch.ones(3), "text_encoder.w": torch.ones(4), "unet.w": torch.ones(1)})

    def full(fd: int, views: object, offset: int) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", full)
        with pytest.raises(StorageError, match="No space left on device"):
            save_checkpoint(store, "m", target, layout=layout)
    assert {name: (tmp_path / name).read_bytes() for name in leftovers(tmp_path) if "." in name} == before
    assert not (tmp_path / "d/unet").exists()
    save_checkpoint(store, "m", target, layout=layout)
    load_checkpoint(store, "again", target)
    assert_same(store, "m", "again")


def test_a_target_that_cannot_be_written_is_named(store: Store, tmp_path: Path) -> None:
    put(store, "m", {"vae.w": torch.zeros(3)})
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StorageError, match="taken"):
        save_checkpoint(store, "m", tmp_path / "taken/d")
    with pytest.raises(UnknownModel):
        save_checkpoint(store, "nobody", tmp_path / "d")
    assert leftovers(tmp_path) == ["taken"]


def test_files_get_the_usual_permissions(store: Store, tmp_path: Path) -> None:
    put(store, "m", {"vae.w": torch.zeros(3)})
    before = os.umask(0o027)
    try:
        save_checkpoint(store, "m", tmp_path / "w.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "w.safetensors").stat().st_mode) == 0o640


def test_names_that_lead_out_of_a_pipeline_are_refused(store: Store, tmp_path: Path) -> None:
    with store.refit("m", fresh=True) as refit:
        refit.reserve([TensorSpec("/evil.w", "uint8", (1,), (1,))])
        refit.wrote(["/evil.w"])
    with pytest.raises(CheckpointError, match="has no place in a pipeline"):
        save_checkpoint(store, "m", tmp_path / "d", layout="pipeline")
    assert leftovers(tmp_path) == []


def test_progress_adds_up(store: Store, tmp_path: Path) -> None:
    tensors = pipeline_tensors()
    put(store, "m", tensors)
    seen: list[tuple[int, int]] = []
    report = save_checkpoint(store, "m", tmp_path / "d", progress=lambda *progress: seen.append(progress))
    assert seen[0] == (0, report.nbytes) and seen[-1] == (report.nbytes, report.nbytes)
