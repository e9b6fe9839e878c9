"""Image server: a diffusers pipeline whose weights the store holds, with SGLang's control endpoints.

Run ``python examples/serve.py --socket PATH [--port 8000] [--device cuda:0]``, then ask for a picture:
``curl -X POST 'localhost:8000/generate?seed=7' -o 7.png``. It draws handwritten digits once
`serve_trainer.py` has trained it. Weights come and go by docs/integrations/http.md.
"""

import argparse
import hashlib
import io
import socket
import threading

import torch
import uvicorn
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import weightstore
from engine_hooks.integrations.controls import Controls
from engine_hooks.integrations.diffusers import attach_pipeline
from engine_hooks.integrations.http import control_routes, handle_asleep


def pipeline() -> DDIMPipeline:
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (32, 64)}
    pipe = DDIMPipeline(UNet2DModel(**sizes, **blocks, norm_num_groups=8), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: DDIMPipeline, seed: int) -> tuple[bytes, str]:
    """A picture as a PNG file, and the SHA-256 of its exact pixels."""
    pixels = pipe(
        generator=torch.Generator().manual_seed(seed), num_inference_steps=10, output_type="np"
    ).images
    png = io.BytesIO()
    pipe.numpy_to_pil(pixels)[0].save(png, "PNG")
    return png.getvalue(), hashlib.sha256(pixels.tobytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", help="the store's")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    pipe, one_at_a_time = pipeline(), threading.Lock()
    with (
        weightstore.connect(options.socket) as store,
        attach_pipeline(store, "digits", pipe, tag="policy", device=options.device) as hook,
        socket.create_server(("127.0.0.1", options.port)) as listening,
    ):
        controls = Controls(hook)

        def generate(request: Request) -> Response:
            with controls.generation(), one_at_a_time:
                png, digest = draw(pipe, int(request.query_params.get("seed", "0")))
            return Response(png, media_type="image/png", headers={"X-Pixels-SHA256": digest})

        routes = [Route("/generate", generate, methods=["POST"]), *control_routes(controls)]
        server = uvicorn.Server(uvicorn.Config(handle_asleep(Starlette(routes=routes)), log_level="warning"))
        print(f"serving on http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
        server.run(sockets=[listening])


if __name__ == "__main__":
    main()
