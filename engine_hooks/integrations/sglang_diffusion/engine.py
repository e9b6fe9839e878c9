"""One worker's engine: SGLang's verbs by way of the hook, and what the hook does not hold by SGLang's own.

Invariants:
- the hook's modules and the rest sleep together: if one part fails, the other is put back;
- SGLang never touches weights of the hook's while they are not there;
- graphs that were captured stay: addresses of the hook's modules do not change. They are dropped only if
  SGLang moved a transformer of the rest.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import nn

from engine_hooks.hook import EngineHook
from engine_hooks.integrations.answers import Answer
from engine_hooks.integrations.controls import Controls
from engine_hooks.integrations.sglang_diffusion import derived, order
from engine_hooks.lifecycle import State

STORE: Final = "weightstore:"
"""What `model_path` of an update from disk begins with when the update is to come from the store."""

_SLACK: Final = 64 << 20
"""Bytes more in torch's allocator than after the last sleep that are not worth looking for."""


class Engine:
    """A worker that a hook is attached to; `rest` are the modules that are SGLang's own."""

    def __init__(self, worker: Any, hook: EngineHook, rest: Mapping[str, nn.Module]) -> None:
        self.hook = hook
        self.controls = Controls(hook)
        self._worker = worker
        self._rest = dict(rest)
        self._others = _controller(worker, self._rest) if self._rest else None
        self._floor: int | None = None
        order.tell(hook.modules.values())
        hook.after_refit(self._renew)

    def _renew(self, changed: Collection[str]) -> None:
        """After a wake or a refit, before generations go on."""
        order.tell(self.hook.modules.values())
        derived.renew(self.hook.modules, changed)

    @property
    def sleeping(self) -> bool:
        """Whether generations must be refused; resuming ends it."""
        if self._others is not None and self._others.is_sleeping():
            return True
        return self.hook.state is not State.AWAKE or State.ASLEEP in self.hook.states.values()

    def release(self) -> dict[str, Any]:
        """As SGLang's: success, sleeping, message. RuntimeError for what failed rather than was refused."""
        if merged := self._merged_lora():
            return {
                "success": False,
                "sleeping": self.sleeping,
                "message": f"a LoRA is merged into {', '.join(merged)}, which a sleep would lose: unmerge it "
                "first, or have the trainer put it into the store",
            }
        body = _body(self.controls.release())
        if not body["success"]:
            return body
        went = bool(body["components"])
        if self._others is not None and not self._others.is_sleeping():
            try:
                self._others.release_memory_occupation()
            except BaseException:
                self.hook.wake()
                raise
            went = True
        if went:
            self._give_cache_back()
        return body

    def resume(self) -> dict[str, Any]:
        """As SGLang's, on the newest version."""
        body = _body(self.controls.resume())
        if body["success"] and self._others is not None and self._others.is_sleeping():
            try:
                self._others.resume_memory_occupation()
            except BaseException:
                self.hook.sleep()
                raise
            moved = [name for name, module in self._rest.items() if hasattr(module, "param_names_mapping")]
            if moved:
                self._worker._drop_breakable_cuda_graphs(f"weights of {', '.join(moved)} moved by resume")
        return body

    def refit(self, model_path: str, target_modules: Collection[str] | None) -> tuple[bool, str]:
        """Take the newest version now; while asleep it is taken at resume.

        Args:
            model_path: ``weightstore:``, or with the model, or with model and tag: ``weightstore:m@policy``.
        """
        model, _, tag = model_path.removeprefix(STORE).strip("/").partition("@")
        unknown = set(target_modules or ()) - self.hook.modules.keys()
        if unknown:
            return False, (
                f"{', '.join(sorted(unknown))} cannot be updated from the store, which holds "
                f"{', '.join(self.hook.modules)}"
            )
        answer = self.controls.update_from_store(model or None, tag or None)
        return answer.ok, str((answer.body or {}).get("message", ""))

    def refusal_of(self, target_modules: Collection[str] | None) -> str | None:
        """Why SGLang may not write into these modules (None: all) by itself."""
        held = [name for name in self.hook.modules if target_modules is None or name in target_modules]
        if not held:
            return None
        return (
            f"the weights of {', '.join(held)} are the store's, and an update past it would be lost at the "
            f"next sleep: write a version with weightstore (store.refit({self.hook.model!r}, "
            f"{self.hook.tag!r})), then resume, or post update_weights_from_disk with model_path "
            f"{STORE + self.hook.model!r}"
        )

    def _give_cache_back(self) -> None:
        """Activations of past generations lie in torch's allocator; SGLang's release gives them back too.

        What cycles hold is looked for thoroughly only if more is in use than after an earlier sleep.
        """
        gc.collect(1)
        if torch.cuda.is_available():
            if self._floor is None or torch.cuda.memory_allocated() > self._floor + _SLACK:
                gc.collect()
            self._floor = torch.cuda.memory_allocated()
            torch.cuda.empty_cache()

    @property
    def adaptable(self) -> list[str]:
        """The modules of the hook's that SGLang would put a LoRA on."""
        return [name for name, module in self.hook.modules.items() if hasattr(module, "param_names_mapping")]

    def _merged_lora(self) -> list[str]:
        merged: Mapping[str, bool] = getattr(self._worker.pipeline, "is_lora_merged", None) or {}
        return [name for name, is_merged in merged.items() if is_merged and name in self.hook.modules]


def _controller(worker: Any, modules: Mapping[str, nn.Module]) -> Any:
    """SGLang's own controller of sleep and wake, over these modules only."""
    from sglang.multimodal_gen.runtime.managers.memory_managers.memory_occupation_controller import (
        MemoryOccupationController,
    )

    return MemoryOccupationController(
        pipeline=SimpleNamespace(modules=dict(modules)),
        rank=worker.rank,
        use_fsdp_inference=worker.server_args.use_fsdp_inference,
    )


def _body(answer: Answer) -> dict[str, Any]:
    """SGLang answers a body with its success as 200 or 400, and an exception as 500."""
    body = dict(answer.body or {})
    if answer.status >= 500:
        raise RuntimeError(str(body.get("message", "failed")))
    return body
