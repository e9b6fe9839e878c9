"""The engine's process: draws digits, sleeps, follows the tag and wakes on what it names."""

from __future__ import annotations

import time
from typing import Any

import weightstore
from engine_hooks.demo import MODEL, TAG, model
from engine_hooks.demo.role import Emit, Handler, serve
from engine_hooks.hook import EngineHook

SAMPLER_STEPS = 20
GUIDANCE = 2.0
WAIT = 120.0
"""Seconds to wait for a refit that the driver says was committed."""


class Engine:
    """An inference engine that never reads a checkpoint: its modules start empty, on ``meta``."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._device = model.pick_device(config["device"])
        self._modules = {
            "unet": model.build_unet("meta").eval().requires_grad_(False),
            "text_encoder": model.build_text_encoder(config["text_size"], "meta"),
        }
        self._store = weightstore.connect(config["socket"])
        self._hook: EngineHook | None = None

    @property
    def hook(self) -> EngineHook:
        if self._hook is None:
            raise weightstore.errors.UsageError("the engine is not attached yet")
        return self._hook

    def attach(self, emit: Emit) -> dict[str, Any]:
        self._hook = EngineHook.attach(self._store, MODEL, self._modules, device=self._device, tag=TAG)
        report = self._hook.attached
        return {"version": report.version, "copied": report.copied_bytes, "seconds": report.seconds}

    def draw(self, emit: Emit, per_digit: int) -> dict[str, Any]:
        started = time.monotonic()
        with self.hook.running():
            images = model.draw(
                self._modules["unet"],
                self._modules["text_encoder"],
                per_digit,
                steps=SAMPLER_STEPS,
                guidance=GUIDANCE,
                seed=self._config["seed"],
            )
        seconds = time.monotonic() - started
        # 17 grey levels in the data; 256 are plenty for what is drawn.
        levels = ((images + 1) * 127.5).round().byte()
        return {"pixels": bytes(levels.flatten().tolist()).hex(), "seconds": seconds}

    def sleep(self, emit: Emit) -> dict[str, Any]:
        report = self.hook.sleep()
        return {"freed": report.freed_bytes, "saved": report.saved_bytes, "seconds": report.seconds}

    def wake(self, emit: Emit, after: int) -> dict[str, Any]:
        """Wait until the tag names a version newer than `after`, then wake: on that one or a newer."""
        self._store.wait_for(MODEL, TAG, after=after, timeout=WAIT)
        report = self.hook.wake()
        return {"version": self.hook.version, "copied": report.copied_bytes, "seconds": report.seconds}

    def digests(self, emit: Emit) -> dict[str, Any]:
        """What the live modules hold now, tensor by tensor, and what differs from the arena in place."""
        report = self.hook.verify()
        return {
            "digests": model.digests(self._modules),
            "unlike_arena": [*report.differing, *report.moved, *report.skipped],
        }


def _start(config: dict[str, Any]) -> dict[str, Handler]:
    engine = Engine(config)
    return {
        "attach": engine.attach,
        "draw": engine.draw,
        "sleep": engine.sleep,
        "wake": engine.wake,
        "digests": engine.digests,
    }


if __name__ == "__main__":
    serve(_start)
