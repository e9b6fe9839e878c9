"""The hooks: each takes SGLang's function first, and calls it where the store has no part in the matter."""

from __future__ import annotations

import gc
import inspect
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from engine_hooks.hook import EngineHook
from engine_hooks.integrations.sglang_diffusion import order
from engine_hooks.integrations.sglang_diffusion.engine import STORE, Engine
from engine_hooks.integrations.sglang_diffusion.loading import Loading
from engine_hooks.integrations.sglang_diffusion.names import name_map
from engine_hooks.integrations.sglang_diffusion.ownership import configured, left_to_sglang
from engine_hooks.integrations.sglang_diffusion.settings import Settings
from engine_hooks.integrations.sglang_diffusion.targets import unhooked
from weightstore.errors import AttachError, UsageError
from weightstore.types import component_of

if TYPE_CHECKING:
    from torch import nn

    from weightstore.client import Store

Original = Callable[..., Any]

_log = logging.getLogger("engine_hooks")


class Plugin:
    """One per process. A worker process has one worker, whose engine this makes."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._opened: Store | None = None
        self._loading: Loading | None = None
        self._engines: WeakKeyDictionary[Any, Engine] = WeakKeyDictionary()

    def engine_of(self, worker: Any) -> Engine | None:
        """The worker's engine; None if nothing of it is the store's."""
        return self._engines.get(worker)

    # -- building ----------------------------------------------------------------------------------

    def init_device_and_model(self, original: Original, worker: Any) -> None:
        """Around a worker's building of its pipeline: attach what was built."""
        if missing := unhooked(worker):
            raise AttachError(
                f"this version of SGLang Diffusion has no {', '.join(missing)} to hook (made for 0.5.23); "
                "unset WEIGHTSTORE_MODEL"
            )
        self._loading = Loading(self._store, self._settings.model, self._settings.tag)
        try:
            original(worker)
            self._attach(worker, self._loading)
        finally:
            self._loading.close()
            self._loading = None
        # What a start leaves behind, hundreds of thousands of objects, stays for the process's life. Unless
        # the collector is told so, the first release waits for its look at all of them.
        gc.collect()
        gc.freeze()

    def load_component(self, original: Original, *args: Any, **kwargs: Any) -> Any:
        """Around the load of one component: remember which it is, for `load_weights`."""
        loading = self._loading
        if loading is None:
            return original(*args, **kwargs)
        component: str = kwargs["component_name"] if "component_name" in kwargs else args[0]
        server_args = kwargs["server_args"] if "server_args" in kwargs else args[3]
        held = configured(component, server_args, _tensor_parallel()) is None
        with loading.of(component if held else None):
            return original(*args, **kwargs)

    def load_weights(
        self, original: Original, model: nn.Module, weights: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """In place of reading a transformer's files, if the store has it."""
        if self._loading is None:
            return original(model, weights, *args, **kwargs)
        return self._loading.load(original, model, weights, *args, **kwargs)

    def _attach(self, worker: Any, loading: Loading) -> None:
        modules = _modules(worker.pipeline)
        device = _device()
        left = left_to_sglang(modules, worker.server_args, device, _tensor_parallel())
        records = loading.records
        if records is not None:
            stored = {component_of(name) for name in records}
            lacking = f"is no component of {self._settings.model!r} in the store"
            left |= {name: lacking for name in modules if name not in stored and name not in left}
        held = {name: module for name, module in modules.items() if name not in left}
        what = f"model {self._settings.model!r}, tag {self._settings.tag!r}"
        if left:
            reasons = "; ".join(f"{name} {why}" for name, why in left.items())
            _log.warning("weightstore: left to SGLang: %s", reasons)
        loading.take_placeholders_away(held)
        if not held:
            if modules and records is not None and all("is no component" in why for why in left.values()):
                raise AttachError(
                    f"{what} has none of this engine's modules ({', '.join(modules)}); it has "
                    f"{', '.join(sorted({component_of(name) for name in records}))}"
                )
            _log.warning("weightstore: %s: nothing of this engine is the store's", what)
            return
        store = self._store()
        order.turn(held.values())
        hook = EngineHook.attach(store, self._settings.model, held, device=device, tag=self._settings.tag)
        rest = {name: module for name, module in modules.items() if name not in held}
        # Another name of a module that the hook holds is not SGLang's to move.
        rest = {name: module for name, module in rest.items() if module not in held.values()}
        self._engines[worker] = Engine(worker, hook, rest)
        built = [name for name, loaded in loading.loaded.items() if loaded.placeholders]
        report = hook.attached
        _log.info(
            "weightstore: rank %s attached %s to %s, version %d (%s%d bytes, %.2f s)%s",
            worker.rank,
            ", ".join(held),
            what,
            report.version,
            "published by this engine, " if report.published else "",
            report.weight_bytes,
            report.seconds,
            f"; {', '.join(built)} filled from the store, not from files" if built else "",
        )
        self._publish_names(store, loading)

    def _publish_names(self, store: Store, loading: Loading) -> None:
        """So that trainers go on writing the names of the checkpoint that the engine was started from."""
        examples = [example for loaded in loading.loaded.values() for example in loaded.examples]
        if not examples or store.names(self._settings.model) is not None:
            return
        try:
            names = name_map(examples)
        except UsageError as error:
            _log.warning("weightstore: trainers have to give SGLang's names: %s", error)
            return
        if not names.rules:
            _log.info("weightstore: SGLang renames nothing; trainers' names are the engine's")
            return
        store.publish_names(self._settings.model, names)
        _log.info("weightstore: published %d rules for trainers' names", len(names.rules))

    def _store(self) -> Store:
        if self._opened is None:
            import weightstore

            self._opened = weightstore.connect(self._settings.socket)
        return self._opened

    # -- sleep, wake, refit ------------------------------------------------------------------------

    def release(self, original: Original, worker: Any) -> Any:
        engine = self.engine_of(worker)
        return original(worker) if engine is None else engine.release()

    def resume(self, original: Original, worker: Any) -> Any:
        engine = self.engine_of(worker)
        return original(worker) if engine is None else engine.resume()

    def is_sleeping(self, original: Original, worker: Any) -> bool:
        engine = self.engine_of(worker)
        return bool(original(worker)) if engine is None else engine.sleeping

    def update_from_disk(
        self,
        original: Original,
        worker: Any,
        model_path: str,
        flush_cache: bool = True,
        target_modules: list[str] | None = None,
    ) -> tuple[bool, str]:
        """A refit, if the path is the store's; refused for what the store holds; else SGLang's."""
        engine = self.engine_of(worker)
        if model_path.startswith(STORE):
            if engine is None:
                return False, f"{model_path}: nothing of this engine is the store's; the log says why"
            return engine.refit(model_path, target_modules)
        refusal = None if engine is None else engine.refusal_of(target_modules)
        if refusal is not None:
            return False, refusal
        answer: tuple[bool, str] = original(worker, model_path, flush_cache, target_modules)
        return answer

    def schedule_update_from_disk(self, original: Original, scheduler: Any, reqs: list[Any]) -> Any:
        """SGLang refuses updates while it sleeps; one from the store is taken at resume."""
        if reqs[0].model_path.startswith(STORE) and self.engine_of(scheduler.worker) is not None:
            from sglang.multimodal_gen.runtime.post_training.scheduler_post_training_mixin import (
                SchedulerPostTrainingMixin,
            )

            return SchedulerPostTrainingMixin._handle_update_weights_from_disk(scheduler, reqs)
        return original(scheduler, reqs)

    def update_from_tensor(self, original: Original, worker: Any, req: Any) -> tuple[bool, str]:
        engine = self.engine_of(worker)
        refusal = None if engine is None else engine.refusal_of(req.target_modules or ["transformer"])
        if refusal is not None:
            return False, refusal
        answer: tuple[bool, str] = original(worker, req)
        return answer

    # -- what reads or writes weights, which must be there -----------------------------------------

    def check_tensors(self, original: Original, worker: Any, req: Any) -> tuple[bool, str]:
        if self._asleep(worker):
            return False, _ASLEEP
        answer: tuple[bool, str] = original(worker, req)
        return answer

    def checksum(self, original: Original, worker: Any, module_names: list[str] | None = None) -> Any:
        return {"error": _ASLEEP} if self._asleep(worker) else original(worker, module_names)

    def set_lora(self, original: Original, worker: Any, *args: Any, **kwargs: Any) -> Any:
        """Beside the weights if they are the store's: not merged into them, and only while they are there."""
        given = inspect.signature(original).bind(worker, *args, **kwargs).arguments
        return self._lora(original, given.get("merge_mode") != "dynamic", worker, *args, **kwargs)

    def merge_lora(self, original: Original, worker: Any, *args: Any, **kwargs: Any) -> Any:
        return self._lora(original, True, worker, *args, **kwargs)

    def _lora(self, original: Original, merges: bool, worker: Any, *args: Any, **kwargs: Any) -> Any:
        engine = self.engine_of(worker)
        if engine is not None and merges and engine.adaptable:
            return _failed(
                f"the weights of {', '.join(engine.adaptable)} are the store's: a LoRA merged into them "
                'would be lost at the next sleep. Set it with merge_mode "dynamic", or write it to the store '
                "(refit.put_adapter, refit.put_lora)"
            )
        return _failed(_ASLEEP) if self._asleep(worker) else original(worker, *args, **kwargs)

    def _asleep(self, worker: Any) -> bool:
        engine = self.engine_of(worker)
        return engine is not None and engine.sleeping


_ASLEEP = "Server is sleeping. Call resume_memory_occupation first."


def _failed(message: str) -> Any:
    from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch

    return OutputBatch(error=message)


def _modules(pipeline: Any) -> dict[str, nn.Module]:
    from sglang.multimodal_gen.runtime.post_training.weights_updater import get_updatable_modules

    modules: dict[str, nn.Module] = get_updatable_modules(pipeline)
    return modules


def _device() -> torch.device:
    from sglang.multimodal_gen.runtime.distributed import get_local_torch_device

    return torch.device(get_local_torch_device())


def _tensor_parallel() -> int:
    from sglang.multimodal_gen.runtime.distributed import get_tp_world_size

    return int(get_tp_world_size())
