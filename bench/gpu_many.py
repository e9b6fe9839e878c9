"""A model of thousands of tensors, most of them small: what a tensor costs that a byte does not."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from bench.gpu_common import large_and_small, random_modules
from bench.gpu_settings import GpuSettings
from bench.rows import Goal, Row, clock
from bench.shapes import total_bytes
from engine_hooks import EngineHook
from weightstore.local import local_store
from weightstore.types import TensorSpec, align_up

ONE = "the same bytes in one tensor"


def many(settings: GpuSettings) -> Iterator[Row]:
    specs = large_and_small(*settings.many)
    nbytes = sum(align_up(2 * s.shape[0]) for s in specs)
    one = [TensorSpec("transformer.t0.weight", "bfloat16", (nbytes // 2,), (1,))]
    wakes: dict[str, list[float]] = {}
    puts: dict[str, list[float]] = {}
    for name, chosen in ((ONE, one), ("measured", specs)):
        modules = random_modules(chosen)
        capacity = align_up(2 * nbytes + 2 * settings.window, settings.window)
        with local_store(capacity, window=settings.window) as store:
            with EngineHook.attach(store, "many", modules, device="cuda:0") as hook:
                wakes[name], puts[name] = [], []
                for _ in range(settings.rounds):
                    hook.sleep()
                    time.sleep(min(settings.asleep, 0.3))
                    wakes[name].append(clock(hook.wake))
                for number in range(settings.rounds + 2):
                    torch.cuda.synchronize()
                    began = time.perf_counter()
                    with store.refit("many") as refit:
                        refit.put_module(modules["transformer"], prefix="transformer.")
                    if number >= 2:  # the first ones pin
                        puts[name].append(time.perf_counter() - began)
                    hook.refit()
        modules.clear()
        torch.cuda.empty_cache()
    what = f"{len(specs)} tensors, {len(specs) - settings.many[1]} of them up to {settings.many[3] >> 10} KiB"
    for key, did, seconds in (("wake", "wake of", wakes), ("put", "put of", puts)):
        yield Row(
            f"many.{key}",
            f"{did} {what}",
            seconds,
            reference=ONE,
            references={ONE: "the same, of one tensor of all those bytes"},
            nbytes=total_bytes(specs),
            goal=Goal(0.97, True),
        )
