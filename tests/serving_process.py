"""An image server in a process of its own: a small FLUX pipeline, OpenAI's image endpoint, and the controls.

    python serving_process.py SOCKET MODEL

It prints its port, and ends with its standard input. Pictures are float32 pixels, base64.
"""

from __future__ import annotations

import base64
import socket
import sys
import threading

import tiny_pipelines
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

import weightstore
from engine_hooks.integrations.controls import Controls
from engine_hooks.integrations.diffusers import attach_pipeline
from engine_hooks.integrations.http import control_routes, handle_asleep

KIND = "flux"


class Generation(BaseModel):
    prompt: str
    seed: int = 0


def encode(pixels: torch.Tensor) -> str:
    return base64.b64encode(pixels.float().contiguous().numpy().tobytes()).decode()


def main(path: str, model: str) -> None:
    torch.set_num_threads(1)  # as the process that it is compared with
    pipe = tiny_pipelines.build(KIND)
    one_at_a_time = threading.Lock()
    with weightstore.connect(path) as store:
        hook = attach_pipeline(store, model, pipe, tag="policy")
        controls = Controls(hook)
        app = handle_asleep(FastAPI())

        @app.post("/v1/images/generations")
        def generate(wanted: Generation) -> dict[str, list[dict[str, str]]]:
            with controls.generation(), one_at_a_time:
                pixels = tiny_pipelines.generate(pipe, wanted.prompt, wanted.seed)
            return {"data": [{"b64_json": encode(pixels)}]}

        app.router.routes.extend(control_routes(controls))
        listening = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        print(listening.getsockname()[1], flush=True)
        sys.stdin.read()
        server.should_exit = True
        thread.join()
        hook.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
