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
from importlib import import_module

from engine_hooks.integrations.sglang_diffusion.settings import settings
from engine_hooks.integrations.sglang_diffusion.targets import HOOKS

_log = logging.getLogger("engine_hooks")


def activate() -> None:
    """SGLang's entry point: register the hooks, or say why not."""
    wanted = settings(os.environ)
    if wanted is None:
        _log.warning(
            "weightstore is installed but WEIGHTSTORE_MODEL is not set: SGLang keeps its own weights"
        )
        return
    from engine_hooks.integrations.sglang_diffusion.plugin import Plugin

    platforms = import_module("sglang.multimodal_gen.runtime.platforms.plugins")
    plugin = Plugin(wanted)
    for target, method in HOOKS.items():
        platforms.HookRegistry.register(target, getattr(plugin, method), platforms.HookType.AROUND)
    _log.info("weightstore: hooks for model %r, tag %r registered", wanted.model, wanted.tag)
