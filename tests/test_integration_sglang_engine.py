"""The real, unmodified SGLang Diffusion engine on the CPU; only where sglang can be imported.

CI does not have it. With it (see docs/integrations/sglang-diffusion.md), and with WEIGHTSTORE_TEST_FLUX
naming the directory of a FLUX.1 checkpoint that a CPU can run, engines are started in processes of their own,
a minute each.
"""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine_hooks.integrations.sglang_diffusion import derived, loading, targets
from engine_hooks.integrations.sglang_diffusion.names import name_map
from weightstore.names.router import Router

pytest.importorskip("sglang.multimodal_gen")

ROOT = Path(__file__).resolve().parent.parent
FLUX = os.environ.get("WEIGHTSTORE_TEST_FLUX")

ARCHITECTURES = [
    "FluxTransformer2DModel",
    "QwenImageTransformer2DModel",
    "WanTransformer3DModel",
    "SanaTransformer2DModel",
    "ZImageTransformer2DModel",
]


def mapping_of(architecture: str) -> dict[str, object]:
    from sglang.multimodal_gen.configs.models.dits import flux, qwenimage, sana, wanvideo, zimage

    configs = {
        "FluxTransformer2DModel": flux.FluxArchConfig,
        "QwenImageTransformer2DModel": qwenimage.QwenImageArchConfig,
        "WanTransformer3DModel": wanvideo.WanVideoArchConfig,
        "SanaTransformer2DModel": sana.SanaArchConfig,
        "ZImageTransformer2DModel": zimage.ZImageArchConfig,
    }
    mapping: dict[str, object] = configs[architecture]().param_names_mapping
    return mapping


def small(architecture: str) -> torch.nn.Module:
    """diffusers' own module on meta, with three layers where its default has dozens."""
    diffusers = pytest.importorskip("diffusers")
    cls = getattr(diffusers, architecture)
    layers = "n_layers" if architecture == "ZImageTransformer2DModel" else "num_layers"
    with torch.device("meta"):
        model: torch.nn.Module = cls(**{layers: 3})
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_map_does_what_sglangs_own_mapping_does(architecture: str) -> None:
    """For every name of diffusers' module, with SGLang's real regular expressions and their evaluation."""
    from sglang.multimodal_gen.runtime.loader.utils import get_param_names_mapping

    mapped = get_param_names_mapping(mapping_of(architecture))
    state = small(architecture).state_dict()
    targets = {mapped(name)[0] for name in state}
    examples = [
        loading.example("transformer", name, tensor.shape[0] if tensor.ndim else 0, mapped, targets)
        for name, tensor in state.items()
    ]
    names = name_map(examples)
    assert len(names.rules) < 40
    routes = Router(names)
    for name in state:
        target, piece, _ = mapped(name)
        route = routes.route(f"transformer.{name}")
        assert route.targets == ((f"transformer.{target}",) if target else ())
        assert piece is None or route.piece == piece


def test_sglangs_own_fp32_norms_are_renewed_in_place() -> None:
    from sglang.multimodal_gen.runtime.layers.layernorm import FP32LayerNorm

    norm = FP32LayerNorm(8, dtype=torch.bfloat16)
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    with torch.inference_mode():
        norm.forward_native(x)
    copy = vars(norm)["_weight_fp32_cache"][1]
    with torch.no_grad():
        norm.weight.fill_(2.0)
        norm.bias.fill_(1.0)
    assert derived.renew_fp32_norms(norm) == 2
    with torch.inference_mode():
        again = norm.forward_native(x)
    assert vars(norm)["_weight_fp32_cache"][1] is copy and copy.tolist() == [2.0] * 8
    fresh = FP32LayerNorm(8, dtype=torch.bfloat16)
    fresh.load_state_dict(norm.state_dict())
    assert torch.equal(again, fresh.forward_native(x))


def test_every_hooked_name_is_there() -> None:
    for target in targets.HOOKS:
        assert callable(pkgutil.resolve_name(target)), target


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(FLUX is None, reason="WEIGHTSTORE_TEST_FLUX names no checkpoint")
def test_the_real_engine_through_the_store(tmp_path: Path) -> None:
    """Stock and plugin engines and a relaunch: every check of the benchmark, on the CPU."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    out = tmp_path / "found.json"
    command = [
        sys.executable,
        "-m",
        "bench",
        "sglang",
        "--cpu",
        "--checksum",
        "--only",
        "stock,plugin,step,relaunch",
    ]
    command += ["--model-dir", str(FLUX), "--out", str(out), "--side", "64", "--steps", "2"]
    command += ["--capacity", "256MiB", "--window", "16MiB", "--bucket", "512KiB"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["complete"] and all(found["checks"].values()) and len(found["checks"]) >= 25
