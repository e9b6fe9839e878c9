"""A role for the tests of `engine_hooks.demo.role`: run as ``python -m tests.echo_role``."""

from __future__ import annotations

import os
from typing import Any

from engine_hooks.demo.role import Emit, Handler, serve
from weightstore.errors import EngineAsleep


def _start(config: dict[str, Any]) -> dict[str, Handler]:
    def echo(emit: Emit, text: str) -> dict[str, Any]:
        print("not part of the protocol")
        for done, _ in enumerate(text, 1):
            emit({"done": done})
        return {"text": text, "config": config}

    def refuse(emit: Emit) -> dict[str, Any]:
        raise EngineAsleep("asleep since 3 s", seconds=3)

    def crash(emit: Emit) -> dict[str, Any]:
        os._exit(7)

    return {"echo": echo, "refuse": refuse, "crash": crash}


if __name__ == "__main__":
    serve(_start)
