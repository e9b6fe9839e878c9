"""An engine in a process of its own, driven line by line over its standard input and output.

    python engine_process.py SOCKET MODEL

Commands, each answered by one line: `sleep`, `wake`, `refit`, `version`, `digest`; the end of input ends it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping

import torch
from torch import nn

import weightstore
from engine_hooks import EngineHook

ROWS = 1024


def build(columns: int, device: str = "meta") -> nn.Module:
    with torch.device(device):
        return nn.Linear(columns, ROWS, bias=False).requires_grad_(False)


def digest(modules: Mapping[str, nn.Module]) -> str:
    """Of every parameter's bits, in the order of the components."""
    total = hashlib.sha256()
    for module in modules.values():
        for parameter in module.parameters():
            total.update(parameter.detach().numpy().tobytes())
    return total.hexdigest()


def main(socket: str, model: str) -> None:
    store = weightstore.connect(socket)
    with store.lease(model) as snapshot:
        columns = {name.partition(".")[0]: snapshot[name].shape[1] for name in snapshot}
    modules = {name: build(n) for name, n in columns.items()}
    hook = EngineHook.attach(store, model, modules)
    print("ready", flush=True)
    for line in sys.stdin:
        command = line.strip()
        if command in ("sleep", "wake", "refit"):
            getattr(hook, command)()
            print(hook.version, flush=True)
        elif command == "version":
            print(hook.version, flush=True)
        elif command == "digest":
            print(digest(modules), flush=True)
    hook.close()
    store.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
