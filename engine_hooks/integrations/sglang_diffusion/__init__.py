"""SGLang Diffusion: sleep, wake and refit of an unmodified engine through the store, by its plugin seam.

Switched on by two environment variables; the package's entry point does the rest:

    export WEIGHTSTORE_SOCKET=/run/weightstore/store.sock WEIGHTSTORE_MODEL=flux1-dev
    sglang serve --model-path …

`WEIGHTSTORE_TAG` is the tag to follow. Without `WEIGHTSTORE_MODEL` the plugin does nothing but say so.

SGLang calls `activate` in the launcher and in every worker, before it imports its own runtime; so nothing
of SGLang is imported here. It logs and ignores a plugin that raises: what cannot work is therefore found
out, and raised, where the worker loads its model, and stops the engine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from weightstore.types import DEFAULT_TAG

_log = logging.getLogger("engine_hooks")

_WORKER: Final = "sglang.multimodal_gen.runtime.managers.gpu_worker.GPUWorker"
_SCHEDULER: Final = "sglang.multimodal_gen.runtime.managers.scheduler.Scheduler"
_LOADER: Final = "sglang.multimodal_gen.runtime.loader"

HOOKS: Final[dict[str, str]] = {
    f"{_LOADER}.component_loaders.component_loader.PipelineComponentLoader.load_component": "load_component",
    f"{_LOADER}.fsdp_load.load_model_from_full_model_state_dict": "load_weights",
    f"{_WORKER}.init_device_and_model": "init_device_and_model",
    f"{_WORKER}.release_memory_occupation": "release",
    f"{_WORKER}.resume_memory_occupation": "resume",
    f"{_WORKER}.is_sleeping": "is_sleeping",
    f"{_WORKER}.update_weights_from_disk": "update_from_disk",
    f"{_WORKER}.update_weights_from_tensor": "update_from_tensor",
    f"{_WORKER}.update_weights_from_tensor_checker": "check_tensors",
    f"{_WORKER}.get_weights_checksum": "checksum",
    f"{_WORKER}.set_lora": "set_lora",
    f"{_WORKER}.merge_lora_weights": "merge_lora",
    f"{_WORKER}.unmerge_lora_weights": "merge_lora",
    f"{_SCHEDULER}._handle_update_weights_from_disk": "schedule_update_from_disk",
}
"""What of SGLang is wrapped, and by which method of `Plugin`. Each gets the original first."""


class Settings(NamedTuple):
    """`socket` None is the store's default."""

    model: str
    tag: str
    socket: str | None


def settings(environ: Mapping[str, str]) -> Settings | None:
    """What the environment asks for; None if it names no model."""
    model = environ.get("WEIGHTSTORE_MODEL", "").strip()
    if not model:
        return None
    tag = environ.get("WEIGHTSTORE_TAG", "").strip() or DEFAULT_TAG
    return Settings(model, tag, environ.get("WEIGHTSTORE_SOCKET", "").strip() or None)


def activate() -> None:
    """SGLang's entry point: register the hooks, or say why not."""
    wanted = settings(os.environ)
    if wanted is None:
        _log.warning(
            "weightstore is installed but WEIGHTSTORE_MODEL is not set: SGLang keeps its own weights"
        )
        return
    from engine_hooks.integrations.sglang_diffusion.plugin import Plugin

    platforms: Any = __import__(
        "sglang.multimodal_gen.runtime.platforms.plugins", fromlist=["HookRegistry", "HookType"]
    )
    plugin = Plugin(wanted)
    for target, method in HOOKS.items():
        platforms.HookRegistry.register(target, getattr(plugin, method), platforms.HookType.AROUND)
    _log.info("weightstore: hooks for model %r, tag %r registered", wanted.model, wanted.tag)
