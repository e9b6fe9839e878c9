"""One real SGLang Diffusion engine, unmodified, that does what it is told on stdin: for `sglang_engine`.

Commands and answers are lines of JSON. The engine is SGLang's own generator with its spawned worker, driven
through its scheduler's requests, which are what its HTTP endpoints send. Only the standard library is
imported at module scope, since the worker executes this file again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from typing import Any

_CPU_SHIM = """
import importlib.abc, importlib.util, sys
class Loader(importlib.abc.Loader):
    def __init__(self, inner): self.inner = inner
    def create_module(self, spec): return self.inner.create_module(spec)
    def exec_module(self, module):
        self.inner.exec_module(module)
        module.cuda.synchronize = lambda *a, **k: None
        module.cpu.empty_cache = lambda: None
class Finder(importlib.abc.MetaPathFinder):
    busy = False
    def find_spec(self, name, path, target=None):
        if name != "torch" or self.busy: return None
        self.busy = True
        try: spec = importlib.util.find_spec("torch")
        finally: self.busy = False
        spec.loader = Loader(spec.loader)
        return spec
sys.meta_path.insert(0, Finder())
"""
"""For a rehearsal without a GPU: two functions that stock's release calls and a CPU build lacks."""


class Engine:
    """The generator and its scheduler's client."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator
        from sglang.multimodal_gen.runtime.entrypoints.post_training import io_struct
        from sglang.multimodal_gen.runtime.scheduler_client import sync_scheduler_client

        self.requests = io_struct
        self.client = sync_scheduler_client
        began = time.perf_counter()
        arguments = {
            "num_gpus": 1,
            "attention_backend": "torch_sdpa",
            "warmup_mode": "off",
            "log_level": "info",
            "output_path": os.path.join(config["folder"], "images"),
        }
        self.generator = DiffGenerator.from_pretrained(
            model_path=config["model"], **{**arguments, **config["arguments"]}
        )
        self.start_seconds = time.perf_counter() - began

    def generate(self) -> dict[str, Any]:
        """An image's hashes: of the pixels, and of all latents on the way."""
        import numpy as np

        began = time.perf_counter()
        side = self.config["side"]
        result = self.generator.generate(
            sampling_params_kwargs={
                "prompt": "a photo of a cat sitting on a red mat",
                "height": side,
                "width": side,
                "num_inference_steps": self.config["steps"],
                "guidance_scale": 3.5,
                "seed": 42,
                "save_output": False,
                "return_frames": True,
                "return_file_paths_only": False,
                "return_trajectory_latents": True,
            }
        )
        if result is None:
            return {"refused": True, "seconds": time.perf_counter() - began}
        frames = result.frames if result.frames is not None else result.samples
        pixels = np.ascontiguousarray(np.stack([np.asarray(frame) for frame in frames]))
        latents = result.trajectory_latents.detach().float().cpu().contiguous().numpy()
        return {
            "pixels": hashlib.sha256(pixels.tobytes()).hexdigest()[:16],
            "latents": hashlib.sha256(latents.tobytes()).hexdigest()[:16],
            "spread": float(pixels.std()),
            "seconds": time.perf_counter() - began,
        }

    def _ask(self, request: Any) -> dict[str, Any]:
        began = time.perf_counter()
        answer = self.client.forward(request)
        seconds = time.perf_counter() - began
        return {"output": answer.output, "error": answer.error, "seconds": seconds}

    def release(self) -> dict[str, Any]:
        return self._ask(self.requests.ReleaseMemoryOccupationReqInput())

    def resume(self) -> dict[str, Any]:
        return self._ask(self.requests.ResumeMemoryOccupationReqInput())

    def checksum(self, modules: list[str] | None = None) -> dict[str, Any]:
        return self._ask(self.requests.GetWeightsChecksumReqInput(module_names=modules))

    def update(self, model_path: str) -> dict[str, Any]:
        return self._ask(self.requests.UpdateWeightFromDiskReqInput(model_path=model_path))

    def facts(self) -> dict[str, Any]:
        """What the worker says of itself (`sglang_probe`), and what its process holds on the host."""
        from sglang.multimodal_gen.runtime.entrypoints.control_requests import ListLorasReq

        found: dict[str, Any] = self._ask(ListLorasReq())["output"]
        return {**found, "host": rollup(found["pid"])}


def rollup(pid: int) -> dict[str, int]:
    """Bytes by kind from /proc/PID/smaps_rollup; locked and shared pages count by their share in Pss."""
    sums = {}
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            for line in file:
                name, _, rest = line.partition(":")
                if name in ("Rss", "Pss", "Pss_Anon", "Pss_Shmem", "Locked"):
                    sums[name] = int(rest.split()[0]) * 1024
    except OSError:
        return {}  # it has ended, or is not ours to look at
    return sums


def main() -> None:
    config = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints must not break the protocol
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    if config["cpu"]:
        os.environ["SGLANG_DIFFUSION_PLATFORM_OVERRIDE"] = "cpu"
        with open(os.path.join(config["folder"], "sitecustomize.py"), "w") as file:
            file.write(_CPU_SHIM)  # for the worker: the folder is on its path
        exec(compile(_CPU_SHIM, "shim", "exec"), {"__name__": "shim"})
    began = time.perf_counter()
    engine = Engine(config)
    started = {
        "import_and_start": time.perf_counter() - began,
        "start": engine.start_seconds,
        "endpoint": engine.generator.server_args.scheduler_endpoint,
    }
    print(json.dumps({"started": started}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("command")
        if name == "end":
            break
        try:
            answer = getattr(engine, name)(**command)
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"[:2000]}
        print(json.dumps(answer), file=answers, flush=True)
    engine.generator.shutdown()


if __name__ == "__main__":
    main()
