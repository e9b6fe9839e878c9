"""The loop of an RL step around the server of serve.py: generate, sleep, train, refit, wake, each timed.

Run ``python examples/serve_trainer.py [--socket PATH] [--steps 3] [--device cuda:0]``; without a socket it
starts a store. It starts the server, on the same device, which is the trainer's alone while the server
sleeps. The training is plain: a diffusion model learns scikit-learn's handwritten digits.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import serve
import torch
from sklearn.datasets import load_digits

import weightstore

PHASES = ("generate", "sleep", "train", "refit", "wake")


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - began


def train(pipe: Any, optimizer: torch.optim.Optimizer, images: torch.Tensor, updates: int) -> float:
    """`updates` steps on what is called epsilon prediction; the last loss."""
    for _ in range(updates):
        clean = images[torch.randint(len(images), (64,))]
        noise, when = torch.randn_like(clean), torch.randint(1000, (64,), device=clean.device)
        noisy = pipe.scheduler.add_noise(clean, noise, when)
        loss = (pipe.unet(noisy, when).sample - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", help="of a store that runs")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--updates", type=int, default=20, help="of the optimizer, for each step")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    pipe = serve.pipeline().to(options.device)  # the trainer's own copy
    optimizer = torch.optim.AdamW(pipe.unet.parameters(), lr=1e-3)
    images = torch.tensor(load_digits().images[:, None] / 8 - 1, dtype=torch.float32, device=options.device)
    with ExitStack() as held:
        socket = options.socket or held.enter_context(weightstore.local_store("64MiB", window="8MiB")).socket
        store = held.enter_context(weightstore.connect(socket))
        command = [sys.executable, str(Path(serve.__file__)), "--socket", socket, "--port", "0"]
        server = subprocess.Popen([*command, "--device", options.device], stdout=subprocess.PIPE, text=True)
        held.enter_context(server)
        held.callback(server.terminate)
        url = server.stdout.readline().split()[-1]

        def post(path: str, **body: Any) -> Any:
            """Raises for any status but 200."""
            return urlopen(Request(url + path, json.dumps(body).encode(), method="POST"), timeout=300)

        def pictures() -> list[str]:
            return [post(f"/generate?seed={seed}").headers["X-Pixels-SHA256"] for seed in range(4)]

        first = pictures()
        print("step   loss" + "".join(f"{phase:>10}" for phase in PHASES) + "   seconds", flush=True)
        for step in range(options.steps):
            seconds: dict[str, float] = {}
            with timed(seconds, "generate"):
                pictures()  # what RL would score
            with timed(seconds, "sleep"):
                post("/release_memory_occupation")
            with timed(seconds, "train"):
                loss = train(pipe, optimizer, images, options.updates)
            with timed(seconds, "refit"):
                with store.refit("digits", tag="policy", components=["unet"]) as refit:
                    refit.put_module(pipe.unet, prefix="unet.")
                post("/update_weights_from_store", tag="policy", version=refit.report.version)
            with timed(seconds, "wake"):
                post("/resume_memory_occupation")
            row = "".join(f"{seconds[phase]:>10.3f}" for phase in PHASES)
            print(f"{step:>4} {loss:>6.3f}{row}", flush=True)
        served = pictures()
        own = [serve.draw(pipe, seed)[1] for seed in range(4)]
        print(f"the server draws what the trainer's weights draw, bit for bit: {served == own}")
        print(f"and something else than before training: {not set(served) & set(first)}")
        if served != own:
            sys.exit(1)


if __name__ == "__main__":
    main()
