"""Manifests are what the built model says of itself; the compact form keeps what a checkpoint would hold."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import manifests as bundled
from tools.make_manifest import main, make_manifest, named_class
from tools.manifest_files import ManifestError, read_manifest, stored_tensors, write_compact
from weightstore.types import check_spec, nbytes_of

VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.42.1",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    "latent_channels": 4,
    "norm_num_groups": 4,
}
T5 = {
    "model_type": "t5",
    "vocab_size": 32,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 1,
}
QWEN = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": [4, 6, 6],
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny-pipeline")
    index = {
        "_class_name": "WanPipeline",
        "boundary_ratio": 0.9,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (root / "model_index.json").write_text(json.dumps(index))
    for name, config in {"vae": VAE, "text_encoder": T5, "transformer": WAN}.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
    return root


def test_a_pipeline_directory_becomes_one_manifest_per_model(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compact = tmp_path / "tiny.json.gz"
    args = ["--out", str(tmp_path), "--compact", str(compact), "--model", "tiny", "--dtype", "vae=float32"]
    assert main([str(pipeline), *args]) == 0
    out = capsys.readouterr().out
    assert "tiny.text_encoder: " in out and "1 ties" in out
    full = {p.name: json.loads(p.read_text()) for p in tmp_path.glob("tiny.*.json")}
    assert full.keys() == {"tiny.text_encoder.json", "tiny.transformer.json", "tiny.vae.json"}
    assert {t["dtype"] for t in full["tiny.vae.json"]["tensors"]} == {"float32"}

    parts = read_manifest(compact)
    assert list(parts) == ["text_encoder", "transformer", "vae"]
    for component, specs in parts.items():
        manifest = full[f"tiny.{component}.json"]
        assert manifest["component"] == component and manifest["model"] == "tiny"
        assert [s.name for s in specs] == [f"{component}.{row[0]}" for row in stored_tensors(manifest)]
        assert len(specs) == manifest["stats"]["n_state_dict_keys"]
        # The full form reads to the same specs as the compact one.
        assert read_manifest(tmp_path / f"tiny.{component}.json") == {component: specs}


@pytest.mark.parametrize(
    ("cls", "config", "dtype"),
    [
        ("diffusers.AutoencoderKL", VAE, "float16"),
        ("diffusers.QwenImageTransformer2DModel", QWEN, "bfloat16"),
        ("transformers.T5EncoderModel", T5, "bfloat16"),
    ],
)
def test_a_manifest_agrees_with_the_real_module(cls: str, config: dict[str, Any], dtype: str) -> None:
    kind: Any = named_class(cls)
    manifest = make_manifest("m", "c", kind, config, dtype)
    if cls.startswith("transformers"):
        module = kind(kind.config_class.from_dict(config))
    else:
        module = kind.from_config(config)
    module = torch.nn.Module.to(module, getattr(torch, dtype))
    state = module.state_dict()
    listed = {t["name"]: t for t in manifest["tensors"]}
    assert {n for n, t in listed.items() if "alias_of" in t or t["persistent"]} == state.keys()
    for name, tensor in state.items():
        entry = listed[name]
        assert entry["shape"] == list(tensor.shape)
        if "alias_of" in entry:
            assert tensor.data_ptr() == state[entry["alias_of"]].data_ptr()
        else:
            assert entry["dtype"] == str(tensor.dtype).removeprefix("torch.")
            assert entry["nbytes"] == tensor.nbytes
    stats = manifest["stats"]
    assert stats["params"] == sum(p.numel() for p in module.parameters())
    assert stats["param_bytes"] == sum(p.nbytes for p in module.parameters())
    assert sum(n for n, _ in stats["hist"].values()) == stats["n_params"] + stats["n_persistent_buffers"]
    json.dumps(manifest)


def test_ties_strays_and_fp32_modules_are_found() -> None:
    t5 = make_manifest("m", "c", named_class("transformers.T5EncoderModel"), T5, "bfloat16")
    assert t5["stats"]["shared"] == [["shared.weight", "encoder.embed_tokens.weight"]]
    assert ["encoder.embed_tokens.weight", "bfloat16", [32, 16], "shared.weight"] in stored_tensors(t5)

    qwen = make_manifest("m", "c", named_class("diffusers.QwenImageTransformer2DModel"), QWEN, "bfloat16")
    assert [name for name, _, _ in qwen["stats"]["unregistered_tensor_attrs"]] == [
        "pos_embed.pos_freqs",
        "pos_embed.neg_freqs",
    ]
    wan = make_manifest("m", "c", named_class("diffusers.WanTransformer3DModel"), WAN, "bfloat16")
    dtypes = {t["name"]: t["dtype"] for t in wan["tensors"]}
    assert dtypes["scale_shift_table"] == "float32" and dtypes["proj_out.weight"] == "bfloat16"
    assert [name for name, _, _ in wan["stats"]["nonpersistent_buffers"]] == [
        "rope.freqs_cos",
        "rope.freqs_sin",
    ]
    assert not any(name.startswith("rope.") for name, *_ in stored_tensors(wan))


def test_a_single_config_needs_its_class(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(pipeline / "vae" / "config.json")
    assert main([config]) == 2
    assert "--cls must name the component's class" in capsys.readouterr().err
    for path in (config, str(pipeline / "vae")):
        args = [
            "--cls",
            "diffusers.AutoencoderKL",
            "--component",
            "vae",
            "--model",
            "m",
            "--out",
            str(tmp_path),
        ]
        assert main([path, *args]) == 0
        assert json.loads((tmp_path / "m.vae.json").read_text())["config_in"] == VAE


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{p}", "--component", "unet"], "no component unet; there are scheduler, "),
        (["{p}", "--dtype", "int8"], "use float16"),
        (["{p}/vae", "--cls", "diffusers.NoSuchModel"], "no such class"),
        (["{p}/vae", "--cls", "no_such_library.Model"], "cannot import"),
        (["{p}/vae", "--cls", "transformers.T5Tokenizer"], "cannot be built"),
        (["{p}/nothing", "--cls", "diffusers.AutoencoderKL"], "cannot be read"),
    ],
)
def test_mistakes_are_named(
    pipeline: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([arg.replace("{p}", str(pipeline)) for arg in args]) == 2
    assert message in capsys.readouterr().err


def test_a_component_of_an_unknown_library_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model_index.json").write_text('{"unet": ["os", "Model"]}')
    assert main([str(tmp_path)]) == 2
    assert "cannot import diffusers.pipelines.os" in capsys.readouterr().err


def test_compact_manifests_are_reproducible_and_damage_is_noticed(pipeline: Path, tmp_path: Path) -> None:
    manifest = make_manifest("m", "vae", named_class("diffusers.AutoencoderKL"), VAE, "bfloat16")
    a, b = tmp_path / "a.json.gz", tmp_path / "b.json.gz"
    write_compact(a, "m", [manifest])
    write_compact(b, "m", [json.loads(json.dumps(manifest))])
    assert a.read_bytes() == b.read_bytes()
    a.write_bytes(a.read_bytes()[:-20])
    b.write_bytes(gzip.compress(b.read_bytes()))
    for path in (a, b):
        with pytest.raises(ManifestError, match="not a manifest"):
            read_manifest(path)


def test_the_bundled_models_are_the_measured_ones() -> None:
    expected = {  # tensors with bytes of their own, ties, and bytes; Wan2.2 and FLUX as measured
        "flux1-dev": (1819, 1, 246120960 + 9524621312 + 23802816640 + 167639366),
        "qwen-image": (2856, 0, 16584333312 + 40860802176 + 253785062),
        "sd3.5-medium": (2086, 1, 247300608 + 1389319680 + 9524621312 + 4486343040 + 452984832 + 167639366),
        "wan2.2-t2v-a14b": (2626, 1, 11361820672 + 2 * 28635351168 + 507570124),
    }
    assert bundled.names() == list(expected)
    for model, (own, ties, nbytes) in expected.items():
        specs = [check_spec(spec) for spec in bundled.load(model)]
        assert len({s.name for s in specs}) == len(specs) == own + ties
        assert sum(s.alias_of is not None for s in specs) == ties
        assert sum(nbytes_of(s.dtype, s.shape) for s in specs if s.alias_of is None) == nbytes
    vae = bundled.load("flux1-dev", ["vae"])
    assert len(vae) == 244 and all(spec.name.startswith("vae.") for spec in vae)
    with pytest.raises(KeyError, match="there are flux1-dev, qwen-image"):
        bundled.load("flux2")


def test_help_runs_as_a_script_without_torch() -> None:
    script = Path(__file__).parent.parent / "tools/make_manifest.py"
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0 and "--compact" in done.stdout
