"""The trainer's process: a transformer of its own on the engine's device, trained, and sent in every way.

    python -m bench.rl_step.trainer MODEL       then lines of JSON on standard input: configuration, commands

A step is a real one and the same in every run: AdamW on the gradients of some layers, and decoupled weight
decay of every tensor, so that every byte of the transformer changes and a tensor that did not arrive shows.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from bench.rl_step import buckets, models
from bench.rl_step.roles import (
    PATIENCE,
    Answers,
    clocked,
    configuration,
    give_back,
    prepare,
    taken,
    wait_for_device,
)

LAYERS: Final = 12
"""How many linear layers AdamW trains: the last queries, keys and values of the transformer."""
DECAY: Final = 0.99
"""More than a bfloat16's last place, so that decay changes every weight."""


class Trainer:
    def __init__(self, config: dict[str, Any]) -> None:
        self.device: str = config["device"]
        self.seed: int = config["seed"]
        self.tag: str = config["tag"]
        self.model = models.MODELS[config["model"]]
        self.directory = Path(config["directory"])
        self.socket: str | None = config.get("socket")
        self._workspace: torch.Tensor | None = None
        self._store: Any = None
        self._sender: buckets.Sender | None = None
        self._server: Any = None
        self.seconds: dict[str, float] = {}
        with clocked(self.seconds, "build"):
            self.transformer = models.build(
                self.model, models.TRAINED, self.directory, self.device, self.seed
            )
            layers = [
                module
                for name, module in self.transformer.named_modules()
                if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ("to_q", "to_k", "to_v")
            ]
            self._layers = layers[-LAYERS:]
            for layer in self._layers:
                layer.requires_grad_(True)
            trained = [parameter for layer in self._layers for parameter in layer.parameters()]
            self._optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
            wait_for_device(self.device)

    # -- the step ----------------------------------------------------------------------------------

    def take(self, nbytes: int) -> dict[str, Any]:
        """Get the device memory that the step needs, as soon as it is there."""
        self._workspace = taken(nbytes, self.device, lambda: give_back(self.device))
        return {"bytes": nbytes}

    def step(self, number: int) -> dict[str, Any]:
        """The optimizer's step of that number; the memory taken for it is given back."""
        random = models.generator(self.device, self.seed, f"step {number}")
        loss = torch.zeros((), device=self.device)
        for layer in self._layers:
            inputs = torch.empty(64, layer.in_features, dtype=self.model.dtype, device=self.device)
            wanted = torch.empty(64, layer.out_features, dtype=self.model.dtype, device=self.device)
            inputs.normal_(generator=random)
            wanted.normal_(generator=random)
            loss = loss + (layer(inputs) - wanted).float().square().mean()
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_mul_(list(self.transformer.parameters()), DECAY)
        found = {"loss": float(loss)}
        self._workspace = None
        give_back(self.device)
        return found

    # -- the ways to send it -----------------------------------------------------------------------

    def publish(self) -> dict[str, Any]:
        """Put the whole pipeline into the store, or the transformer if the store has the pipeline."""
        store = self._connected()
        prefix = f"{models.TRAINED}."
        if self.model.name in store.models():
            return self.refit()
        frozen = {}  # kept until the commit: their copies may be under way until then
        with store.refit(self.model.name, tag=self.tag) as refit:
            for name in models.frozen(self.model):
                frozen[name] = models.build(self.model, name, self.directory, self.device, self.seed)
                refit.put_module(frozen[name], prefix=f"{name}.")
            refit.put_module(self.transformer, prefix=prefix)
        frozen.clear()
        give_back(self.device)
        return {"version": refit.report.version, "bytes": refit.report.nbytes}

    def prepare(self) -> dict[str, Any]:
        """Room for a second version of what is trained, pinned while the first images are drawn."""
        seconds: dict[str, float] = {}
        with clocked(seconds, "room"):
            nbytes = self._connected().prepare(
                self.model.name, self.tag, components=[models.TRAINED], device=self.device
            )
        return {"bytes": nbytes, "seconds": seconds}

    def refit(self) -> dict[str, Any]:
        store = self._connected()
        seconds: dict[str, float] = {}
        with clocked(seconds, "all"):
            with store.refit(self.model.name, tag=self.tag, components=[models.TRAINED]) as refit:
                refit.put_module(self.transformer, prefix=f"{models.TRAINED}.")
        return {"version": refit.report.version, "bytes": refit.report.nbytes, "seconds": seconds}

    def save(self, directory: str) -> dict[str, Any]:
        """As a checkpoint: what `save_pretrained` writes."""
        return {"bytes": models.save({models.TRAINED: self.transformer}, Path(directory), [models.TRAINED])}

    def save_frozen(self, directory: str) -> dict[str, Any]:
        total = 0
        for name in models.frozen(self.model):
            module = models.build(self.model, name, self.directory, self.device, self.seed)
            total += models.save({name: module}, Path(directory), [name])
            del module
            give_back(self.device)
        return {"bytes": total}

    def send(self, port: int) -> dict[str, Any]:
        """In buckets of device memory, which the engine at this port copies from."""
        if self._sender is None:
            size = buckets.BUCKET if self.device != "cpu" else 64 << 10
            self._sender = buckets.Sender(self.transformer, self.device, size)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        try:
            return {"buckets": self._sender.send(lambda message: _post(connection, "/bucket", message))}
        finally:
            connection.close()

    def checkpoint_engine(self, port: int) -> dict[str, Any]:
        """With checkpoint-engine's ParameterServer: into its pinned memory, and from there to the engine."""
        seconds: dict[str, float] = {}
        if self._server is None:
            with clocked(seconds, "start"):
                self._server = _parameter_server()
        server, name = self._server, "transformer"
        tensors = {key: parameter.detach() for key, parameter in self.transformer.named_parameters()}
        failed: list[BaseException] = []

        def ask(handles: list[tuple[str, str]]) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            try:
                _post(connection, f"/checkpoint_engine?handle={handles[0][1]}", {})
            except (OSError, RuntimeError) as error:
                failed.append(error)
            finally:
                connection.close()

        with clocked(seconds, "register"):
            server.register_checkpoint(name, named_tensors=tensors, use_shared_memory_pool=True)
        with clocked(seconds, "gather"):
            server.gather_metas(name)
        with clocked(seconds, "update"):
            server.update(name, ask)
        server.unregister_checkpoint(name)  # its pinned memory stays with it for the next time
        if failed:
            raise RuntimeError(f"the engine did not take the update: {failed[0]}")
        return {"seconds": seconds}

    # -- other -------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        parameters = list(self.transformer.parameters())
        found: dict[str, Any] = {
            "pid": os.getpid(),
            "trained_bytes": sum(parameter.nbytes for parameter in parameters),
            "trained_tensors": len(parameters),
            "seconds": self.seconds,
        }
        if self.device != "cpu":
            give_back(self.device)
            found["free"], found["total"] = torch.cuda.mem_get_info()
        return found

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()

    def _connected(self) -> Any:
        import weightstore

        if self._store is None:
            self._store = weightstore.connect(self.socket)
        return self._store


def _post(connection: http.client.HTTPConnection, path: str, message: Mapping[str, Any]) -> None:
    connection.request("POST", path, json.dumps(message).encode(), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    said = answer.read()
    if answer.status != 200:
        raise RuntimeError(
            f"{path.partition('?')[0]}: {answer.status} {said[:2000].decode(errors='replace')}"
        )


def _parameter_server() -> Any:
    """checkpoint-engine's server, alone on this machine: it expects a launcher and a network."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "NCCL_SOCKET_IFNAME": "lo", "PS_MAX_BUCKET_SIZE_GB": "2"}
    from checkpoint_engine import ps

    ps.get_ip = lambda: "127.0.0.1"
    return ps.ParameterServer(auto_pg=True, master_addr="127.0.0.1", master_port=port)


def main() -> None:
    began = time.perf_counter()
    answers = Answers()
    model = models.MODELS[sys.argv[1]]
    model.components[models.TRAINED].cls()
    for name in models.frozen(model):
        model.components[name].cls()
    answers.say(imports=time.perf_counter() - began)
    config = configuration()
    prepare(config["device"])
    trainer = Trainer(config)
    answers.say(**trainer.facts())
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answers.say(**getattr(trainer, command.pop("do"))(**command))
        except Exception as error:  # whatever it is, it is this way's result
            answers.say(failed=f"{type(error).__name__}: {error}"[:2000])
    trainer.close()
    os._exit(0)  # no library's clean-up is worth waiting for


if __name__ == "__main__":
    main()
