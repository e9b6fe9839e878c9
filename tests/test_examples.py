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
    lines = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES}
    assert list(lines) == ["ddp_finetune", "fsdp2_finetune", "peft_lora", "serve", "serve_trainer"]
    for name, count in lines.items():
        assert count <= (110 if name.startswith("serve") else 60), name


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


def test_a_server_and_its_trainer(store: Store) -> None:
    output = run("serve_trainer", "--socket", store.socket, "--steps", "2", "--updates", "5")
    head, *rows, same, other = output.splitlines()
    phases = ["generate", "sleep", "train", "refit", "wake"]
    assert head.split() == ["step", "loss", *phases, "seconds"]
    for step, row in enumerate(rows):
        number, loss, *seconds = map(float, row.split())
        assert (number, len(seconds)) == (step, len(phases))
        assert loss > 0
        assert sum(seconds) > 0
    assert len(rows) == 2
    assert same.endswith("bit for bit: True")
    assert other.endswith("before training: True")
    assert store.tags("digits") == {"policy": 3}
    assert not [lease for lease in store.status().leases if lease.model == "digits"]  # the server is gone
