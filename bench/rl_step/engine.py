"""The engine's process: a diffusers pipeline behind HTTP, as image servers are, with endpoints to control it.

    python -m bench.rl_step.engine MODEL        then one line of JSON on standard input (see `residents`)

POST /generate answers with the exact pixels of one picture, float32; POST /drain when nothing is in flight;
GET /facts with what the process knows of itself. All other endpoints are the resident's.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bench.rl_step import models
from bench.rl_step.residents import Resident, resident
from bench.rl_step.roles import Answers, configuration, end_with_input, prepare, wait_for_device


class Server:
    """The endpoints that every engine has."""

    def __init__(self, resident: Resident) -> None:
        self.resident = resident
        self._one_at_a_time = threading.Lock()
        self._count = threading.Condition()
        self._in_flight = 0

    def app(self) -> Any:
        from engine_hooks.integrations.http import handle_asleep

        routes = [
            Route("/generate", self.generate, methods=["POST"]),
            Route("/drain", self.drain, methods=["POST"]),
            Route("/facts", self.facts, methods=["GET"]),
            *self.resident.routes(),
        ]
        return handle_asleep(Starlette(routes=routes))

    def generate(self, request: Request) -> Response:
        with self._counted(), self.resident.generation(), self._one_at_a_time:
            began = time.perf_counter()
            pixels = models.draw(self.resident.model, self.resident.pipe, self.resident.device)
            wait_for_device(self.resident.device)
            seconds = time.perf_counter() - began
        facts = {
            "X-Pixels-SHA256": models.digest(pixels),
            "X-Seconds": f"{seconds:.6f}",
            "X-Spread": f"{float(pixels.std()):.4f}",
            "X-Shape": "x".join(map(str, pixels.shape)),
        }
        return Response(pixels.numpy().tobytes(), media_type="application/octet-stream", headers=facts)

    def drain(self, request: Request) -> Response:
        with self._count:
            drained = self._count.wait_for(lambda: not self._in_flight, timeout=60)
        return JSONResponse({"drained": drained}, status_code=200 if drained else 503)

    def facts(self, request: Request) -> Response:
        found: dict[str, Any] = {"pid": os.getpid()}
        if self.resident.device != "cpu":
            free, total = torch.cuda.mem_get_info()
            found |= {"device_used": total - free, "torch_reserved": torch.cuda.memory_reserved()}
        return JSONResponse(found)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        with self._count:
            self._in_flight += 1
        try:
            yield
        finally:
            with self._count:
                self._in_flight -= 1
                self._count.notify_all()


def main() -> None:
    began = time.perf_counter()
    answers = Answers()
    models.import_classes(models.MODELS[sys.argv[1]])
    imported = time.perf_counter()
    answers.say(imports=imported - began)
    config = configuration()
    end_with_input()
    started = time.perf_counter()
    prepare(config["device"])
    context = time.perf_counter()
    engine = resident(config)
    engine.pipe.set_progress_bar_config(disable=True)
    wait_for_device(config["device"])
    loaded = time.perf_counter()
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(Server(engine).app(), log_level="warning", lifespan="off"))
    answers.say(
        port=listening.getsockname()[1],
        context=context - started,
        load=loaded - context,
    )
    server.run(sockets=[listening])


if __name__ == "__main__":
    main()
