"""What else puts an engine to sleep: the same tensors, each way in a process of its own.

torch_memory_saver is what SGLang uses for language models (pip install torch_memory_saver); where it is not
installed its rows are left out. `goal`s compare with the rows of `cycle`, in the same run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from bench.gpu_settings import GpuSettings
from bench.rows import Row
from bench.shapes import total_bytes

ROOT = Path(__file__).resolve().parent.parent

CHILD = """
import json, os, sys, time
import torch
from bench.gpu_common import random_modules
from bench.gpu_settings import GpuSettings

way, rounds, settings = sys.argv[1], int(sys.argv[2]), GpuSettings(**json.loads(sys.argv[3]))

def clock(work):
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began

torch.zeros(1, device="cuda")
if way == "module.to":
    modules = random_modules(settings.specs(whole=False))

    def sleep():
        for module in modules.values():
            module.to("cpu")
        torch.cuda.empty_cache()

    def wake():
        for module in modules.values():
            module.to("cuda")
elif way == "vllm_style":
    modules = random_modules(settings.specs(whole=False))
    tensors = [parameter for module in modules.values() for parameter in module.parameters()]
    shapes = [tensor.shape for tensor in tensors]
    backup = []

    def sleep():
        for tensor in tensors:
            backup.append(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True))
            backup[-1].copy_(tensor.data)
            tensor.data = torch.empty(0, dtype=tensor.dtype, device="cuda")
        torch.cuda.empty_cache()

    def wake():
        for tensor, saved in zip(tensors, backup):
            tensor.data = saved.to("cuda", non_blocking=True)
        torch.cuda.synchronize()
        backup.clear()
else:
    from torch_memory_saver import torch_memory_saver as saver

    saver.hook_mode = "torch"
    backend = way.partition(" ")[0]
    with saver.region(tag="weights", enable_cpu_backup=True, cpu_backup_backend=backend):
        modules = random_modules(settings.specs(whole=False))
    if way.endswith("kept"):
        saver.retain_cpu_backup = True
    sleep, wake = (lambda: saver.pause("weights")), (lambda: saver.resume("weights"))

parameter = next(next(iter(modules.values())).parameters())
before = parameter.detach().clone()
times = {"sleep": [], "wake": []}
for _ in range(rounds):
    times["sleep"].append(clock(sleep))
    time.sleep(settings.asleep)
    times["wake"].append(clock(wake))
assert torch.equal(parameter.view(torch.uint8), before.view(torch.uint8))
print(json.dumps(times), flush=True)
os._exit(0)  # torch_memory_saver calls it an error when its pool is freed, as it is at exit
"""

ALONE = ("vllm_style", "module.to")
"""Ways that need nothing but torch."""
WAYS = {
    "pinned": "torch_memory_saver, pinned backup",
    "pinned kept": "torch_memory_saver, pinned backup kept from sleep to sleep (retain_cpu_backup)",
    "mmap": "torch_memory_saver, mmap backup",
    "vllm_style": "the steps of vLLM's sleep level 1, in torch: pinned copies made at sleep, dropped at wake",
    "module.to": "module.to('cpu'), empty_cache(), module.to('cuda')",
}


def peers(settings: GpuSettings) -> Iterator[Row]:
    nbytes = total_bytes(settings.specs(whole=False))
    ways = [
        way
        for way in WAYS
        if (way in ALONE or find_spec("torch_memory_saver")) and way in (settings.peers or WAYS)
    ]
    for way in ways:
        rounds = settings.peer_rounds + (way in ("pinned kept", "vllm_style"))
        try:
            times = _child(way, rounds, settings)
        except subprocess.CalledProcessError as error:
            print(f"{WAYS[way]}: {error}", file=sys.stderr)
            continue
        for what in ("sleep", "wake"):
            yield Row(
                f"peers.{what}.{way.replace(' ', '_')}",
                f"{what} the {settings.main} with {WAYS[way]}",
                {"measured": times[what][-1:]},  # the steady one, where there are two
                nbytes=nbytes,
                notes={"first": times[what][0]},
            )


def _child(way: str, rounds: int, settings: GpuSettings) -> dict[str, list[float]]:
    chosen = json.dumps({"limit": settings.limit, "asleep": settings.asleep})
    done = subprocess.run(
        [sys.executable, "-c", CHILD, way, str(rounds), chosen],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
    )
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found
