"""What the kernel is good for that copies beside the copy engine at the start of a wake."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from bench.gpu_common import GIB, Limit, random_modules
from bench.gpu_cycle import H2D, REFERENCES
from bench.gpu_settings import GpuSettings
from bench.rows import Row, clock
from bench.shapes import total_bytes
from engine_hooks import EngineHook
from engine_hooks.cuda import CudaBackend
from weightstore.local import local_store
from weightstore.types import align_up

SHARES = ((0, 16), (3, 16), (4, 24), (6, 16))
"""(GiB copied side by side, blocks of the kernel)."""


def assist(settings: GpuSettings) -> Iterator[Row]:
    specs = settings.specs(whole=True)
    whole = total_bytes(specs)
    modules = random_modules(specs)
    capacity = align_up(whole + settings.window + 256 * len(specs), settings.window)
    with local_store(capacity, window=settings.window) as store:
        for gib, blocks in SHARES:
            backend = CudaBackend(0, assist_bytes=gib * GIB, assist_blocks=blocks)
            hook = EngineHook.attach(store, "model", modules, backend=backend)
            limit = Limit(whole)
            try:
                for when, wait in (("now", 0.0), ("later", 0.3)):
                    seconds: dict[str, list[float]] = {H2D: [], "measured": []}
                    for _ in range(3):
                        seconds[H2D].append(limit.h2d(whole))
                        hook.sleep()
                        time.sleep(wait)
                        seconds["measured"].append(clock(hook.wake))
                    yield Row(
                        f"assist.{when}.{gib}gib.{blocks}blocks",
                        f"wake all {when}, {gib} GiB of it by engine and {blocks} blocks side by side",
                        seconds,
                        reference=H2D,
                        references=REFERENCES,
                        nbytes=whole,
                    )
            finally:
                hook.close()
                limit.close()
    modules.clear()
    torch.cuda.empty_cache()
