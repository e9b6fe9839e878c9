"""Every example runs as its docstring says, with a store of its own and with one that is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import weightstore
from weightstore.client import Store

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PATIENCE = 150.0


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with weightstore.local_store("64MiB", window="8MiB") as store:
        yield store


def documented(example: Path) -> list[str]:
    """The command of an example's docstring, without what is optional."""
    found = re.search(r"``(.+?)``", example.read_text(encoding="utf-8"))
    assert found is not None, example
    program, *arguments = re.sub(r" \[[^]]*\]", "", found[1]).split()
    module = ["-m", "torch.distributed.run", "--standalone"] if program == "torchrun" else []
    return [sys.executable, *module, *arguments]


def run(example: str, *options: str) -> str:
    # One thread for each rank: more would only wait for one another on a small machine.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [*documented(ROOT / "examples" / f"{example}.py"), *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_examples_are_short_and_tested() -> None:
    assert [path.stem for path in EXAMPLES] == ["ddp_finetune", "fsdp2_finetune", "peft_lora"]
    for path in EXAMPLES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 60, path.name


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs, or none")
@pytest.mark.parametrize("example", ["ddp_finetune", "fsdp2_finetune"])
def test_sharded_and_replicated_trainers(example: str) -> None:
    lines = run(example).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["step 0", "step 1", "step 2"]
    assert [line.split()[-1] for line in lines] == ["2", "3", "4"]


def test_lora_merged_on_write(store: Store) -> None:
    lines = run("peft_lora", "--socket", store.socket).splitlines()
    assert len(lines) == 3
    assert all(line.endswith("the engine merged 0") for line in lines)
    assert store.tags("lora") == {"policy": 4, "ref": 1}


def test_lora_as_adapters() -> None:
    lines = run("peft_lora", "--adapters-only").splitlines()
    assert len(lines) == 3
    assert all(line.endswith("the engine merged 8") for line in lines)
