"""The engine's side of weightstore: sleep, wake and refit of modules whose weights lie in the store.

from engine_hooks import EngineHook

hook = EngineHook.attach(store, "flux1-dev", {"transformer": dit, "vae": vae}, device="cuda:0")
"""

from __future__ import annotations

from engine_hooks.hook import EngineHook
from engine_hooks.lifecycle import State
from engine_hooks.reports import AttachReport, RefitReport, SleepReport, VerifyReport, WakeReport

__all__ = [
    "EngineHook",
    "State",
    "AttachReport",
    "SleepReport",
    "WakeReport",
    "RefitReport",
    "VerifyReport",
]
