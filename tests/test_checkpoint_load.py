"""Loading real files into a real store, and everything that must leave the store as it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import weightstore
from weightstore.checkpoint.load import load_checkpoint
from weightstore.client import Store
from weightstore.errors import ArenaFull, CheckpointError, RefitConflict, StorageError

MIB = 1 << 20


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with weightstore.local_store(capacity=256 * MIB, window=16 * MIB) as store:
        yield store


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test, once its models are removed, the arena is empty and no file is left open."""
    files = len(os.listdir("/proc/self/fd"))
    yield
    if "store" in request.fixturenames:
        store: Store = request.getfixturevalue("store")
        for model in store.models():
            store.remove_model(model)
        status = store.status()
        assert (status.arena.used, status.refits, status.leases) == (0, [], [])
        assert len(os.listdir("/proc/self/fd")) <= files + 8


def values(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of many dtypes and sizes, some not a multiple of anything."""
    generator = torch.Generator().manual_seed(seed)
    big = torch.randn(1000, 2049, generator=generator)
    return {
        "blocks.0.weight": big,
        "blocks.0.bias": big[0, :3].bfloat16(),
        "blocks.1.weight": big[:500].bfloat16(),
        "blocks.1.mask": big[:7, 0] > 0,
        "scale": torch.tensor(3.25, dtype=torch.float64),
        "empty": torch.empty(0, 4, dtype=torch.float16),
        "ids": torch.arange(77)[None],
        "fp8": big[1, :100].to(torch.float8_e4m3fn),
        "freqs": torch.view_as_complex(big[0, :64].reshape(32, 2).clone()),
    }


def assert_holds(store: Store, model: str, expected: dict[str, torch.Tensor], tag: str = "latest") -> None:
    with store.lease(model, tag) as snapshot:
        assert set(snapshot.names) == expected.keys()
        for name, value in expected.items():
            got = snapshot[name]
            assert got.dtype == value.dtype and got.shape == value.shape, name
            assert torch.equal(raw(got), raw(value)), name


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def write_shards(directory: Path, base: str, shards: list[dict[str, torch.Tensor]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i, tensors in enumerate(shards):
        name = f"{base}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (directory / f"{base}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_one_file(store: Store, tmp_path: Path) -> None:
    tensors = values()
    save_file(tensors, tmp_path / "w.safetensors")
    seen: list[tuple[int, int]] = []
    report = load_checkpoint(
        store, "m", tmp_path / "w.safetensors", progress=lambda *progress: seen.append(progress)
    )
    assert_holds(store, "m", tensors)
    nbytes = sum(t.nbytes for t in tensors.values())
    assert (report.layout, report.files, store.tags("m")) == ("file", 1, {"latest": report.version})
    assert (report.tensors, report.ties, report.nbytes) == (9, 0, nbytes)
    assert 0 < report.read_seconds <= report.seconds and report.gbps > 0
    assert seen[0] == (0, nbytes) and seen[-1] == (nbytes, nbytes)


def test_neighbours_in_the_file_are_neighbours_in_the_arena(store: Store, tmp_path: Path) -> None:
    tensors = {f"blocks.{i:03d}": torch.full((128,), float(i)) for i in range(50)}  # 512 bytes each
    save_file(tensors, tmp_path / "w.safetensors")
    load_checkpoint(store, "m", tmp_path / "w.safetensors")
    with store.lease("m") as snapshot:
        records = sorted(snapshot.records.values(), key=lambda r: r.offset)
        assert [r.name for r in records] == sorted(tensors)
        assert records[-1].offset + 512 - records[0].offset == 50 * 512
    assert_holds(store, "m", tensors)


def test_a_sharded_directory_with_a_prefix(store: Store, tmp_path: Path) -> None:
    tensors = values()
    names = list(tensors)
    write_shards(
        tmp_path, "diffusion_pytorch_model", [{n: tensors[n] for n in names[i::3]} for i in range(3)]
    )
    report = load_checkpoint(store, "m", tmp_path, prefix="transformer.")
    assert (report.layout, report.files) == ("sharded", 3)
    assert_holds(store, "m", prefixed("transformer.", tensors))


def test_a_pipeline_directory(store: Store, tmp_path: Path) -> None:
    dit, vae, encoder = values(1), values(2), values(3)
    names = list(dit)
    write_shards(
        tmp_path / "transformer",
        "diffusion_pytorch_model",
        [{n: dit[n] for n in names[:4]}, {n: dit[n] for n in names[4:]}],
    )
    for component, base, tensors in (
        ("vae", "diffusion_pytorch_model", vae),
        ("text_encoder", "model.fp16", encoder),
        ("unlisted", "model", encoder),
    ):
        (tmp_path / component).mkdir()
        save_file(tensors, tmp_path / component / f"{base}.safetensors")
    (tmp_path / "scheduler").mkdir()
    index = {
        "_class_name": "P",
        "scheduler": ["diffusers", "S"],
        "text_encoder": ["transformers", "T"],
        "transformer": ["diffusers", "D"],
        "vae": ["diffusers", "V"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    report = load_checkpoint(store, "m", tmp_path, tag="policy")
    assert (report.layout, report.files, report.skipped) == ("pipeline", 4, ("unlisted",))
    expected = prefixed("transformer.", dit) | prefixed("vae.", vae) | prefixed("text_encoder.", encoder)
    assert_holds(store, "m", expected, "policy")


def test_loading_again_replaces_the_whole_version(store: Store, tmp_path: Path) -> None:
    first, second = values(1), {"other.name": torch.ones(3), "ids": torch.zeros(2, 2)}
    save_file(first, tmp_path / "a.safetensors")
    save_file(second, tmp_path / "b.safetensors")
    before = load_checkpoint(store, "m", tmp_path / "a.safetensors").version
    used = store.status().arena.used
    report = load_checkpoint(store, "m", tmp_path / "b.safetensors")
    assert report.version == before + 1
    assert_holds(store, "m", second)
    assert store.status().arena.used < used, "the old version was not freed"
    load_checkpoint(store, "m", tmp_path / "a.safetensors", tag="ref")
    assert_holds(store, "m", second)
    assert_holds(store, "m", first, "ref")


def damaged(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    if how == "truncated":
        del data[-1:]
    elif how == "longer":
        data += b"x"
    elif how == "oversized header":
        data[:8] = (1 << 40).to_bytes(8, "little")
    elif how == "overlapping":
        head = json.loads(data[8 : 8 + length])
        head["ids"]["data_offsets"] = head["blocks.0.bias"]["data_offsets"]
        body = json.dumps(head).encode()
        data[: 8 + length] = len(body).to_bytes(8, "little") + body
    elif how == "lying shape":
        data[:] = data.replace(b'"shape":[1000,2049]', b'"shape":[1000,2048]')
    elif how == "bad name":
        data[:] = data.replace(b'"scale"', b'"sc le"')
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "it is truncated"),
        ("longer", "longer than its tensors"),
        ("oversized header", "header of 1099511627776 bytes"),
        ("overlapping", "tensor 'ids'"),
        ("lying shape", "tensor 'blocks.0.weight' of shape [1000, 2048]"),
        ("bad name", "'sc le' is not allowed"),
    ],
)
def test_a_bad_file_is_refused_and_the_store_is_as_before(
    store: Store, tmp_path: Path, how: str, message: str
) -> None:
    good = {"w": torch.arange(5)}
    save_file(good, tmp_path / "good.safetensors")
    load_checkpoint(store, "m", tmp_path / "good.safetensors")
    store.verify("m")  # has it checksummed, which the status shows
    before = store.status()
    save_file(values(), tmp_path / "bad.safetensors")
    damaged(tmp_path / "bad.safetensors", how)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(store, "m", tmp_path / "bad.safetensors")
    assert message in caught.value.message and "bad.safetensors" in caught.value.message
    after = store.status()
    assert (after.models, after.arena) == (before.models, before.arena)
    assert_holds(store, "m", good)


def test_one_bad_shard_refuses_all(store: Store, tmp_path: Path) -> None:
    tensors = values()
    write_shards(tmp_path, "model", [{"scale": tensors["scale"]}, {"ids": tensors["ids"]}])
    damaged(tmp_path / "model-00002-of-00002.safetensors", "truncated")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors"):
        load_checkpoint(store, "m", tmp_path)
    assert store.models() == []


@pytest.mark.parametrize("change", ["shrinks", "is written to"])
def test_a_file_that_changes_while_it_is_read_aborts_the_refit(
    store: Store, tmp_path: Path, change: str
) -> None:
    good = {"w": torch.arange(5)}
    path = tmp_path / "w.safetensors"
    save_file(good, path)
    load_checkpoint(store, "m", path)
    store.verify("m")
    before = store.status()
    save_file(values(), path)

    def interfere(done: int, total: int) -> None:
        if done == 0:
            size = path.stat().st_size
            if change == "shrinks":
                os.truncate(path, size // 2)
            else:
                with open(path, "r+b") as file:
                    file.seek(size - 1)
                    file.write(b"x")

    with pytest.raises(CheckpointError, match="changed while it was read"):
        load_checkpoint(store, "m", path, progress=interfere)
    after = store.status()
    assert after.models == before.models and after.refits == []
    assert after.arena.used == before.arena.used
    assert_holds(store, "m", good)


def test_an_io_error_aborts_the_refit(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(values(), tmp_path / "w.safetensors")

    def failing(fd: int, views: object, offset: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(StorageError, match=r"w\.safetensors: I/O error at byte \d+: Input/output error"):
        load_checkpoint(store, "m", tmp_path / "w.safetensors")
    assert store.models() == [] and store.status().arena.used == 0


def test_an_interrupted_load_leaves_nothing(store: Store, tmp_path: Path) -> None:
    save_file(values(), tmp_path / "w.safetensors")

    def interrupted(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_checkpoint(store, "m", tmp_path / "w.safetensors", progress=interrupted)
    assert store.models() == [] and store.status().arena.used == 0


def test_what_does_not_fit_is_refused_before_reading(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.zeros(1)}, path)
    head = json.dumps({"w": {"dtype": "U8", "shape": [300 * MIB], "data_offsets": [0, 300 * MIB]}}).encode()
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + 300 * MIB)
    seen: list[tuple[int, int]] = []
    with pytest.raises(ArenaFull):
        load_checkpoint(store, "m", path, progress=lambda *progress: seen.append(progress))
    assert seen == [] and store.models() == []


def test_a_refit_of_the_tag_that_is_open_is_respected(store: Store, tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "w.safetensors")
    with store.refit("m", fresh=True) as refit:
        refit.put("w", torch.ones(1))
        with pytest.raises(RefitConflict):
            load_checkpoint(store, "m", tmp_path / "w.safetensors")
    assert_holds(store, "m", {"w": torch.ones(1)})
