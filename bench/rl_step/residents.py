"""How an engine has its weights on the device, and gives the memory back: one class for each thing people do.

Each builds the pipeline (`pipe`) and adds its own endpoints to the engine's (`routes`). Work on the device
runs to its end before an endpoint answers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bench.rl_step import buckets, models
from bench.rl_step.roles import clocked, give_back, wait_for_device

Routes = list[Any]


class Resident:
    """A pipeline with random weights made on the device, which stays there.

    Args:
        config: the engine's: `device`, `seed`, `directory` (of the configs), `model`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.device: str = config["device"]
        self.model = models.MODELS[config["model"]]
        self.directory = Path(config["directory"])
        self.pipe: Any = self.load()

    def load(self) -> Any:
        modules = {
            name: models.build(self.model, name, self.directory, self.device, self.config["seed"])
            for name in self.model.components
        }
        return models.assemble(self.model, modules, self.directory)

    def routes(self) -> Routes:
        return []

    @contextlib.contextmanager
    def generation(self) -> Iterator[None]:
        yield

    def _route(self, path: str, work: Callable[[dict[str, str]], dict[str, Any] | None]) -> Any:
        """POST `path`: calls `work` with the query's parameters, on a thread, and answers what it returns."""

        def endpoint(request: Request) -> Response:
            found = work(dict(request.query_params))
            give_back(self.device)
            return JSONResponse(found or {})

        return Route(path, endpoint, methods=["POST"])


class FromDisk(Resident):
    """What a relaunch does without a store: `from_pretrained` and `.to(device)`."""

    def load(self) -> Any:
        import diffusers

        kind = getattr(diffusers, self.model.pipeline)
        absent = dict.fromkeys(models.required_absent(self.model))
        pipe = kind.from_pretrained(
            str(self.directory), dtype=self.model.dtype, local_files_only=True, **absent
        )
        return pipe.to(self.device)


class FromStore(Resident):
    """The pipeline from its configs, its weights from the arena; SGLang's endpoints to release and resume."""

    def load(self) -> Any:
        import weightstore
        from engine_hooks.integrations.controls import Controls
        from engine_hooks.integrations.diffusers import load_pipeline

        self.store = weightstore.connect(self.config["socket"])
        pipe, self.hook = load_pipeline(
            self.store,
            self.model.name,
            self.directory,
            device=self.device,
            tag=self.config["tag"],
            components=dict.fromkeys(models.required_absent(self.model)),
        )
        self.controls = Controls(self.hook)
        return pipe

    def routes(self) -> Routes:
        from engine_hooks.integrations.http import control_routes

        return control_routes(self.controls)

    @contextlib.contextmanager
    def generation(self) -> Iterator[None]:
        with self.controls.generation():
            yield


class Pageable(Resident):
    """`pipe.to("cpu")`, `load_state_dict` of what the trainer saved, `pipe.to(device)`."""

    def routes(self) -> Routes:
        return [
            self._route("/to_cpu", lambda _: self._to("cpu")),
            self._route("/to_device", lambda _: self._to(self.device)),
            self._route("/load", self._load),
        ]

    def _to(self, device: str) -> None:
        self.pipe.to(device)
        wait_for_device(self.device)

    def _load(self, asked: dict[str, str]) -> None:
        from safetensors.torch import load_file

        transformer = self.pipe.components[models.TRAINED]
        state: dict[str, torch.Tensor] = {}
        for path in sorted(Path(asked["directory"]).glob("*.safetensors")):
            state |= load_file(str(path))
        transformer.load_state_dict(state)


class Paused(Resident):
    """Weights in a torch_memory_saver region with a copy in pinned host memory; new ones come in buckets of
    the trainer's device memory, or from checkpoint-engine."""

    def load(self) -> Any:
        from torch_memory_saver import torch_memory_saver as saver

        saver.hook_mode = "torch"
        self.saver = saver
        with saver.region(tag="weights", enable_cpu_backup=True, cpu_backup_backend="pinned"):
            return super().load()

    def routes(self) -> Routes:
        self._received: buckets.Receiver | None = None
        return [
            self._route("/pause", lambda _: self.saver.pause("weights")),
            self._route("/resume", lambda _: self.saver.resume("weights")),
            self._route("/keep_backups", self._keep),
            Route("/bucket", self._bucket, methods=["POST"]),
            self._route("/checkpoint_engine", self._from_checkpoint_engine),
        ]

    def _keep(self, asked: dict[str, str]) -> None:
        self.saver.retain_cpu_backup = True

    def _bucket(self, request: Request) -> Response:
        import anyio.from_thread

        body = anyio.from_thread.run(request.json)
        if self._received is None:
            self._received = buckets.Receiver(self.pipe.components[models.TRAINED])
        self._received.take(body)
        wait_for_device(self.device)
        return JSONResponse({})

    def _from_checkpoint_engine(self, asked: dict[str, str]) -> dict[str, Any]:
        import zmq
        from checkpoint_engine.worker import update_weights_from_ipc

        parameters = dict(self.pipe.components[models.TRAINED].named_parameters())

        def run(weights: list[tuple[str, torch.Tensor]]) -> None:
            with torch.no_grad():
                for name, tensor in weights:
                    parameters[name].copy_(tensor)

        seconds: dict[str, float] = {}
        with clocked(seconds, "update"), zmq.Context() as context:
            update_weights_from_ipc(context, asked["handle"], device_id=0, run=run)
        return seconds


class Buckets(Resident):
    """Stays on the device and takes buckets: for trying those out where nothing can be paused."""

    def routes(self) -> Routes:
        self._received: buckets.Receiver | None = None
        return [Route("/bucket", self._bucket, methods=["POST"])]

    _bucket = Paused._bucket


RESIDENTS: dict[str, type[Resident]] = {
    "random": Resident,
    "disk": FromDisk,
    "store": FromStore,
    "pageable": Pageable,
    "paused": Paused,
    "buckets": Buckets,
}


def resident(config: dict[str, Any]) -> Resident:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return RESIDENTS[config["resident"]](config)
