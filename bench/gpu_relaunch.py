"""A fresh engine process and a warm store: until the weights are on the GPU, after imports and context."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from bench.gpu_common import random_modules
from bench.gpu_settings import GpuSettings
from bench.rows import Goal, Row
from bench.shapes import total_bytes
from weightstore.local import local_store
from weightstore.types import align_up

ROOT = Path(__file__).resolve().parent.parent
SLOWER = "the slower of pinning alone and copying alone"

CHILD = """
import json, sys, time
import torch
import weightstore
from bench.gpu_settings import GpuSettings
from bench.shapes import modules_of
from engine_hooks import EngineHook
from weightstore.cuda import driver
from weightstore.cuda.pinning import PinnedArena

way, where, settings = sys.argv[1], sys.argv[2], GpuSettings(**json.loads(sys.argv[3]))
torch.zeros(1, device="cuda")
torch.cuda.synchronize()
if way == "load_file":
    from safetensors.torch import load_file

    began = time.perf_counter()
    state = load_file(where, device="cuda:0")
    torch.cuda.synchronize()
    found = {"seconds": time.perf_counter() - began}
else:
    store = weightstore.connect(where)
    modules = modules_of(settings.specs(whole=False), "meta")
    found = {}
    if way == "alone":
        arena = PinnedArena.share(store.mapping, driver.device(0))
        with store.lease("model") as snapshot:
            ranges = [(record.offset, record.nbytes) for record in snapshot.records.values()]
        began = time.perf_counter()
        arena.ensure(ranges)
        found["pin"] = time.perf_counter() - began
    began = time.perf_counter()
    hook = EngineHook.attach(store, "model", modules, device="cuda:0")
    found["seconds"] = time.perf_counter() - began
    assert not hook.verify().differing
print(json.dumps(found))
"""


def relaunch(settings: GpuSettings) -> Iterator[Row]:
    specs = settings.specs(whole=False)
    nbytes = total_bytes(specs)
    modules = random_modules(specs)
    loads: dict[str, list[float]] = {"measured": []}
    with TemporaryDirectory(dir="/dev/shm") as directory:  # memory, as the page cache is
        path = os.path.join(directory, "model.safetensors")
        _save(modules, path)
        for _ in range(2):
            loads["measured"].append(_child("load_file", path, settings)["seconds"])
    capacity = align_up(nbytes + 256 * len(specs) + settings.window, settings.window)
    seconds: dict[str, list[float]] = {SLOWER: [], "measured": []}
    pins: list[float] = []
    copies: list[float] = []
    with local_store(capacity, window=settings.window) as store:
        with store.refit("model") as refit:
            for name, module in modules.items():
                refit.put_module(module, prefix=f"{name}.")
        modules.clear()
        torch.cuda.empty_cache()
        for _ in range(min(settings.rounds, 3)):
            seconds["measured"].append(_child("attach", store.socket, settings)["seconds"])
            alone = _child("alone", store.socket, settings)
            pins.append(alone["pin"])
            copies.append(alone["seconds"])
            seconds[SLOWER].append(max(alone["pin"], alone["seconds"]))
    yield Row(
        "relaunch.load_file",
        f"safetensors.load_file(device='cuda') of the {settings.main}, file in memory",
        loads,
        nbytes=nbytes,
    )
    yield Row(
        "relaunch",
        f"EngineHook.attach in a fresh process, {settings.main} on meta, store warm: pin, map, copy, bind",
        seconds,
        reference=SLOWER,
        references={SLOWER: "in other fresh processes: pinning first, then attach with everything pinned"},
        nbytes=nbytes,
        goal=Goal(1 / 1.15, True),
        notes={"pin_alone": pins, "attach_with_all_pinned": copies},
    )


def _save(modules: dict[str, torch.nn.Module], path: str) -> None:
    from safetensors.torch import save_file

    tensors = {f"{name}.{key}": value for name, m in modules.items() for key, value in m.state_dict().items()}
    save_file(tensors, path)


def _child(way: str, where: str, settings: GpuSettings) -> dict[str, float]:
    chosen = json.dumps({"limit": settings.limit, "asleep": settings.asleep})
    done = subprocess.run(
        [sys.executable, "-c", CHILD, way, where, chosen],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found
