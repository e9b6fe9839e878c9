"""The examples in docs/ run, and print what the pages say they print.

A page's python blocks run in one namespace, in order, with `store` and the page's fixture of it; a text block
is what the block before it printed. Json blocks are files that console blocks use.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import weightstore as ws
from weightstore.cli import main

DOCS = Path(__file__).resolve().parent.parent / "docs"


class Block(NamedTuple):
    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found[1], found[2], text.count("\n", 0, found.start()) + 2)
        for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def run(page: Path, namespace: dict[str, Any], directory: Path, json_as: str) -> int:
    """Run a page; how many of its blocks were checked."""
    printed = ""
    checked = 0
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        if block.language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block.text, where, "exec"), namespace)
            printed = out.getvalue()
        elif block.language == "text":
            shown = [line.rstrip() for line in printed.splitlines()]
            assert shown == block.text.splitlines(), where
        elif block.language == "json":
            (directory / json_as).write_text(block.text)
        elif block.language == "console":
            for line in block.text.splitlines():
                dollar, program, *arguments = shlex.split(line)
                assert (dollar, program) == ("$", "weightstore"), where
                result = CliRunner().invoke(main, arguments)
                assert result.exit_code == 0, f"{where}: {line}: {result.output}"
        else:
            pytest.fail(f"{where}: nobody runs {block.language}")
        checked += 1
    return checked


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ws.Store]:
    with ws.local_store("64MiB", window="8MiB") as store:
        monkeypatch.setenv("WEIGHTSTORE_SOCKET", store.socket)
        yield store


def test_names(store: ws.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with store.refit("flux1-dev") as refit:
        for layer in range(2):
            refit.put(f"transformer.blocks.{layer}.attn.to_qkv.weight", torch.zeros(12, 8))
            refit.put(f"transformer.blocks.{layer}.norm.weight", torch.zeros(8))
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"store": store}
    page = DOCS / "names.md"
    # The console block needs the files that the page speaks of.
    trained = {
        f"module.net.{layer}.attn.{name}.weight": torch.ones(4, 8)
        for layer in range(2)
        for name in ("to_q", "to_k", "to_v", "lora_A")
    }
    save_file(
        trained | {f"module.net.{n}.norm.weight": torch.ones(8) for n in range(2)}, "trained.safetensors"
    )
    assert run(page, namespace, tmp_path, json_as="names.json") == 11
    assert ws.NameMap.from_json((tmp_path / "names.json").read_bytes()) == namespace["names"]
    with store.lease("flux1-dev", tag="policy") as snapshot:
        trained = namespace["trained"]
        whole = torch.cat([trained[f"module.net.1.attn.to_{n}.weight"] for n in "qkv"])
        assert torch.equal(snapshot["transformer.blocks.1.attn.to_qkv.weight"], whole)
    assert sorted(store.models()) == ["flux1-dev", "flux1-new"]


def sd3() -> torch.nn.Module:
    from diffusers import SD3Transformer2DModel

    sizes = dict.fromkeys(("joint_attention_dim", "caption_projection_dim", "pooled_projection_dim"), 16)
    return SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, **sizes
    )


def step(module: torch.nn.Module) -> torch.nn.Module:
    """`module` after what a page calls a training step: every trained value is another."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return module


def test_lora(store: ws.Store, tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformer = sd3().requires_grad_(False)
    with store.refit("sd3", tag="policy") as refit:
        refit.put_module(transformer, prefix="transformer.")
    namespace: dict[str, Any] = {"store": store, "torch": torch, "train": step}
    namespace |= {"transformer": transformer, "engine": sd3()}
    assert run(DOCS / "lora.md", namespace, tmp_path, json_as="") == 13
    namespace["hook"].close()


def test_tags(store: ws.Store, tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformer = sd3()
    with store.refit("sd3", tag="policy") as refit:
        refit.put_module(transformer, prefix="transformer.")
        refit.put("vae.decoder.weight", torch.ones(100))
    namespace: dict[str, Any] = {"store": store, "torch": torch, "step": step}
    namespace |= {"transformer": transformer, "engine": sd3()}
    assert run(DOCS / "tags.md", namespace, tmp_path, json_as="") == 10


def test_a_page_that_says_something_else_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:6"):
        run(page, {}, tmp_path, json_as="map.json")


def test_refits(store: ws.Store, tmp_path: Path) -> None:
    with store.refit("flux", tag="policy") as refit:
        refit.put("transformer.proj.weight", torch.zeros(2, 2).bfloat16())
        refit.put("transformer.norm.weight", torch.zeros(2))
        refit.put("transformer.scale", torch.zeros(2).half())
    namespace: dict[str, Any] = {"store": store, "weightstore": ws}
    assert run(DOCS / "refits.md", namespace, tmp_path, json_as="") == 10
    shared = {"rank": 0, "world_size": 1}
    refitted = store.refit

    def as_one_rank(*arguments: Any, **options: Any) -> Any:
        return refitted(*arguments, **options, **shared)

    module = torch.nn.ParameterDict({name: torch.ones(2, 2) for name in ("a", "b")})
    store.refit = as_one_rank  # type: ignore[method-assign]
    namespace["transformer"] = module
    with store.refit("flux", tag="policy", fresh=True) as refit:
        refit.put_module(module, prefix="transformer.")
    namespace["after_a_step"](7)
    assert store.tags("flux")["policy"] == 6
